"""Sources of rows: files, folders, globs and hub names, read record by record; mixtures and splits, seeded.

Local JSON, JSONL and CSV files (also gzipped) are read here, line by line, so that damage is reported as
`train.jsonl:3: invalid JSON: ...`. Damage to a file always stops: a file that is broken in one place is not to be
trusted in the others. Parquet is read by pyarrow, hub names by `datasets.load_dataset`.
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import os
import random
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from alignment.errors import DataError
from alignment.recipe.schema import Source

LINE_LIMIT = 64 * 2**20  # bytes of one line; a JSON array may be FILE_LIMIT long
FILE_LIMIT = 4 * 2**30
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

T = TypeVar("T")


class Record(NamedTuple):
    """One row as the file holds it, and where it stands: `file:line`, or `file[index]` where there are no lines."""

    value: dict[str, Any]
    where: str


def read(source: Source) -> Iterator[Record]:
    """Every record of a source, in file order.

    Raises:
        DataError: nothing found, an unreadable or damaged file, no records; one line with file and line.
    """
    files = find_files(source)
    records = _read_hub(source) if files is None else (record for file in files for record in _read_file(file))
    count = 0
    for count, record in enumerate(records, 1):  # noqa: B007
        yield record
    if not count:
        raise DataError(f"{display(source.path)}: no records")


def display(path: str | Path) -> str:
    """A path as the user knows it: relative where it lies below the working directory."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def find_files(source: Source) -> list[Path] | None:
    """The files that a source names, sorted; None for a hub name.

    A folder gives the files of `split` where its files are named after splits (`train.jsonl`,
    `train-00000-of-00002.parquet`, `train/...`), and all its data files where they are not.
    """
    path = Path(source.path)
    if path.is_file():
        _data_suffix(path)
        return [path]
    if path.is_dir():
        return _files_of_folder(path, source.split)
    if any(character in source.path for character in "*?["):
        found = sorted(Path(name) for name in glob.glob(source.path, recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"{source.path}: no file matches")
        for file in found:
            _data_suffix(file)
        return found
    if HUB_NAME.fullmatch(source.path) and not _is_data(path):
        return None
    raise DataError(f"{display(path)}: no such file or folder")


def _is_data(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(SUFFIXES)


def _data_suffix(path: Path) -> str:
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in SUFFIXES:
        raise DataError(f"{display(path)}: unknown kind of file; known are {', '.join(SUFFIXES)} (also with .gz)")
    return suffix


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _is_data(file))
    if not files:
        raise DataError(f"{display(folder)}: no data files ({', '.join(SUFFIXES)}) in this folder")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        words = re.split(r"[^A-Za-z0-9]+", str(file.relative_to(folder)))
        for name in {*SPLITS, split} & set(words):
            by_split.setdefault(name, []).append(file)
    if not by_split:
        return files
    if split not in by_split:
        raise DataError(f"{display(folder)}: no files of split {split!r}; it has {', '.join(sorted(by_split))}")
    return by_split[split]


def _read_file(path: Path) -> Iterator[Record]:
    suffix, name = _data_suffix(path), display(path)
    try:
        if suffix == ".parquet":
            yield from _read_parquet(path, name)
            return
        with _open(path) as stream:
            if suffix in (".csv", ".tsv"):
                yield from _read_csv(stream, name, "\t" if suffix == ".tsv" else ",")
            elif suffix == ".json" and _starts_with_bracket(stream):
                yield from _read_array(stream, name)
            else:
                yield from _read_lines(stream, name)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: damaged gzip file: {error}") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None


def _open(path: Path) -> BinaryIO:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _starts_with_bracket(stream: BinaryIO) -> bool:
    head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()
    stream.seek(0)
    return head.startswith(b"[")


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines as text, line ends kept; a byte order mark is skipped."""
    number = 0
    while line := stream.readline(LINE_LIMIT + 1):
        number += 1
        if len(line) > LINE_LIMIT:
            raise DataError(f"{name}:{number}: line of more than {LINE_LIMIT // 2**20} MiB")
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, _decode(line, f"{name}:{number}")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: invalid UTF-8 at byte {error.start + 1}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in names if names.count(key) > 1)!r}")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _parse(text: str, name: str, first_line: int) -> Any:
    """Parse JSON; an error names the line of the file and the column."""
    try:
        return _JSON.decode(text)
    except json.JSONDecodeError as error:
        where = f"{name}:{first_line + error.lineno - 1}"
        raise DataError(f"{where}: invalid JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise DataError(f"{name}:{first_line}: invalid JSON: nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{name}:{first_line}: invalid JSON: {error}") from None


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a record must be a JSON object with columns, found {type(value).__name__}")
    return Record(value, where)


def _read_lines(stream: BinaryIO, name: str) -> Iterator[Record]:
    for number, line in _lines(stream, name):
        if line.strip():
            yield _object(_parse(line.rstrip("\r\n"), name, number), f"{name}:{number}")


def _read_array(stream: BinaryIO, name: str) -> Iterator[Record]:
    data = stream.read(FILE_LIMIT + 1)
    if len(data) > FILE_LIMIT:
        raise DataError(f"{name}: JSON array of more than {FILE_LIMIT // 2**30} GiB; write it as .jsonl")
    data = data.removeprefix(b"\xef\xbb\xbf")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        line_start = data.rfind(b"\n", 0, error.start) + 1
        number = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name}:{number}: invalid UTF-8 at byte {error.start - line_start + 1}") from None
    for index, value in enumerate(_parse(text, name, 1)):
        yield _object(value, f"{name}[{index}]")


def _read_csv(stream: BinaryIO, name: str, delimiter: str) -> Iterator[Record]:
    csv.field_size_limit(LINE_LIMIT)
    rows = csv.reader((line for _, line in _lines(stream, name)), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    start = 1  # a quoted field may span lines: a record is where it begins
    try:
        for fields in rows:
            if fields and header is None:
                header = fields
                if len(set(header)) != len(header):
                    raise DataError(f"{name}:{start}: duplicate column in the header: {', '.join(header)}")
            elif fields and header is not None:
                if len(fields) != len(header):
                    raise DataError(f"{name}:{start}: {len(fields)} fields, the header has {len(header)}")
                yield Record(dict(zip(header, fields, strict=True)), f"{name}:{start}")
            start = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}:{start}: invalid CSV: {error}") from None


def _read_parquet(path: Path, name: str) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1000):
                for value in batch.to_pylist():
                    yield Record(value, f"{name}[{index}]")
                    index += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: damaged Parquet file: {str(error).splitlines()[0]}") from None


def _read_hub(source: Source) -> Iterator[Record]:
    import datasets
    from datasets.exceptions import DatasetsError

    part = source.subset or source.folder
    subset = f" ({part})" if part else ""
    try:
        rows = datasets.load_dataset(
            source.path, name=source.subset, data_dir=source.folder, revision=source.revision, split=source.split
        )  # no trust_remote_code: code of a data set repository is not run
    except (DatasetsError, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"{source.path}{subset}: no such file here, and not to be had from the hub: {reason}; "
            "give the path of a local copy, or connect (HF_HUB_OFFLINE=0)"
        ) from None
    for index, value in enumerate(rows):
        yield Record(dict(value), f"{source.path}[{index}]")


def generator(seed: int, *purpose: object) -> random.Random:
    """A random generator of its own for each purpose, the same in every process and Python version."""
    return random.Random(f"{seed}/{'/'.join(map(str, purpose))}")


def take(rows: Sequence[T], count: int, seed: int, *purpose: object) -> list[T]:
    """`count` of the rows, drawn without replacement, in their original order."""
    if count >= len(rows):
        return list(rows)
    return [rows[index] for index in sorted(generator(seed, *purpose).sample(range(len(rows)), count))]


def mix(parts: Sequence[Sequence[T]], weights: Sequence[float | None], seed: int) -> list[list[T]]:
    """The rows that each source contributes to a mixture.

    Without weights: all. With weights (an unweighted source then has weight 1) the shares of the rows are as the
    weights, and the mixture is the largest that these shares allow without using a row twice: the source that is
    scarce for its weight gives all its rows, the others a seeded draw.
    """
    if all(weight is None for weight in weights):
        return [list(part) for part in parts]
    filled = [1.0 if weight is None else weight for weight in weights]
    scale = min(len(part) / weight for part, weight in zip(parts, filled, strict=True))
    counts = [min(len(part), round(scale * weight)) for part, weight in zip(parts, filled, strict=True)]
    return [take(parts[index], count, seed, "mixture", index) for index, count in enumerate(counts)]


def hold_out(rows: Sequence[T], fraction: float, seed: int) -> tuple[list[T], list[T]]:
    """Split rows into (train, eval): `fraction` of them, at least one, is held out by a seeded draw."""
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        raise DataError(f"data.eval_fraction {fraction} of {len(rows)} rows leaves nothing to train on")
    held = set(generator(seed, "eval").sample(range(len(rows)), count))
    return [row for i, row in enumerate(rows) if i not in held], [row for i, row in enumerate(rows) if i in held]


def rename(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """A record under our column names; `columns` maps our name to the file's."""
    if not columns:
        return record
    taken = set(columns.values()) | set(columns)
    renamed = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    return renamed | {name: value for name, value in record.items() if name not in taken}


def require_columns(sample: Iterable[Record], source: Source) -> None:
    """Refuse `columns` that name no column of the file."""
    found = {name for record in sample for name in record.value}
    for ours, theirs in source.columns.items():
        if theirs not in found:
            raise DataError(
                f"{display(source.path)}: columns: {ours}: no column {theirs!r}; the file has "
                f"{', '.join(sorted(map(str, found)))}"
            )


def identity(source: Source) -> str:
    """The source as the log and the manifest name it."""
    extras = [part for part in (source.subset, source.revision and f"@{source.revision}") if part]
    return " ".join([display(source.path), *extras, *([] if os.path.isfile(source.path) else [source.split])])
