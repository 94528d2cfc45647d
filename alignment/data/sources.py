"""Sources of rows: files, folders, globs and hub names, read record by record; mixtures and splits, seeded.

Files are read by `files.py`, hub names by `datasets.load_dataset`. A source may also be the description of a data set
by another tool (`recipe/described.py`), which is looked up here.
"""

from __future__ import annotations

import glob
import os
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from alignment.data.files import SUFFIXES, Record, display, is_data, read_file, suffix_of
from alignment.errors import DataError
from alignment.recipe.described import FACTORY, described
from alignment.recipe.schema import Source, Turns

__all__ = ["Record", "display"]

TALK = ("messages", "conversations", "prompt", "completion", "chosen", "rejected")  # columns that hold turns
SPLITS = ("train", "test", "validation", "valid", "dev", "eval")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")

T = TypeVar("T")


def read(source: Source) -> Iterator[Record]:
    """Every record of a source, in file order.

    Raises:
        DataError: nothing found, an unreadable or damaged file, no records; one line with file and line.
    """
    source = described(source)
    files = find_files(source)
    records = _read_hub(source) if files is None else (record for file in files for record in read_file(file))
    count = 0
    for count, record in enumerate(records, 1):  # noqa: B007
        yield record
    if not count:
        raise DataError(f"{display(source.path)}: no records")


def find_files(source: Source) -> list[Path] | None:
    """The files that a source names, sorted; None for a hub name.

    A folder gives the files of `split` where its files are named after splits (`train.jsonl`,
    `train-00000-of-00002.parquet`, `train/...`), and all its data files where they are not.
    """
    source = described(source)
    path = Path(source.path)
    _refuse_broken_link(path)
    if path.is_file():
        suffix_of(path)
        return [path]
    if path.is_dir():
        return _files_of_folder(path, source.split)
    if any(character in source.path for character in "*?["):
        found = sorted(Path(name) for name in glob.glob(source.path, recursive=True) if Path(name).is_file())
        if not found:
            raise DataError(f"{source.path}: no file matches")
        for file in found:
            suffix_of(file)
        return found
    if HUB_NAME.fullmatch(source.path) and not is_data(path):
        return None
    if path.exists():
        raise DataError(f"{display(path)}: is neither a file nor a folder")
    raise DataError(f"{display(path)}: no such file or folder")


def _refuse_broken_link(path: Path) -> None:
    if path.is_symlink() and not path.exists():
        raise DataError(f"{display(path)}: is a link to {os.readlink(path)}, which does not exist")


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    named = sorted(file for file in folder.rglob("*") if is_data(file) and file.name != FACTORY)
    for file in named:
        _refuse_broken_link(file)
    files = [file for file in named if file.is_file()]
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


def rename(record: dict[str, Any], columns: dict[str, str]) -> dict[str, Any]:
    """A record under our column names; `columns` maps our name to the file's."""
    if not columns:
        return record
    taken = set(columns.values()) | set(columns)
    renamed = {ours: record[theirs] for ours, theirs in columns.items() if theirs in record}
    return renamed | {name: value for name, value in record.items() if name not in taken}


def adapt(record: dict[str, Any], source: Source) -> dict[str, Any]:
    """A record under our names: of columns, and of keys and roles of turns where the source says how they are named."""
    record = rename(record, source.columns)
    if source.turns is None:
        return record
    return {name: _retold(value, source.turns) if name in TALK else value for name, value in record.items()}


def _retold(value: Any, names: Turns) -> Any:
    if isinstance(value, list):
        return [_retold(turn, names) for turn in value]
    if not isinstance(value, dict):
        return value
    told = dict(value)
    for ours, theirs in (("role", names.role), ("content", names.content)):
        if theirs is not None and theirs in told:
            told[ours] = told.pop(theirs)
    role = "role" if "role" in told else "from"
    if isinstance(told.get(role), str):
        told[role] = names.roles.get(told[role], told[role])
    return told


def require_columns(sample: Iterable[Record], source: Source) -> None:
    """Refuse `columns` that name no column of the file, and `turns` that name no key of its turns."""
    sample = list(sample)
    found = {name for record in sample for name in record.value}
    for ours, theirs in source.columns.items():
        if theirs not in found:
            raise DataError(
                f"{display(source.path)}: columns: {ours}: no column {theirs!r}; the file has "
                f"{', '.join(sorted(map(str, found)))}"
            )
    if source.turns is None:
        return
    rows = [rename(record.value, source.columns) for record in sample]
    keys = {key for row in rows for name in TALK for turn in _listed(row.get(name)) for key in turn}
    for key, name in (("role", source.turns.role), ("content", source.turns.content)):
        if name is not None and name not in keys:
            raise DataError(
                f"{display(source.path)}: turns: {key}: no turn has {name!r}; they have "
                f"{', '.join(sorted(map(str, keys))) or 'no keys'}"
            )


def _listed(value: Any) -> list[dict[str, Any]]:
    """The turns in a column: a list of them, or one."""
    return [turn for turn in (value if isinstance(value, list) else [value]) if isinstance(turn, dict)]


def identity(source: Source) -> str:
    """The source as the log and the manifest name it."""
    extras = [part for part in (source.subset, source.revision and f"@{source.revision}") if part]
    return " ".join([display(source.path), *extras, *([] if os.path.isfile(source.path) else [source.split])])
