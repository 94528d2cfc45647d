"""Data files, record by record: JSON, JSONL, CSV and TSV, plain or packed by gzip or zstd, and Parquet.

JSON and CSV are read here, line by line or object by object, so that damage is reported as
`train.jsonl:3: invalid JSON: ...` and memory does not grow with the file. Damage to a file always stops: a file that
is broken in one place is not to be trusted in the others. So does a file that changes while it is read.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from alignment.errors import DataError

LINE_LIMIT = 64 * 2**20  # bytes of one line, or of one object of an array
CHUNK = 2**20  # characters of a JSON array that are read at once
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
PACKED = (".gz", ".zst")
MARK = b"\xef\xbb\xbf"  # byte order mark
CELL = re.compile(r'\s*\[\s*\{\s*"(role|from|content|value)"\s*:')  # a CSV cell that holds messages
SPACE = re.compile(r"\s*")


class Record(NamedTuple):
    """One row as the file holds it, and where it stands: `file:line`, or `file[index]` where there are no lines."""

    value: dict[str, Any]
    where: str


def display(path: str | Path) -> str:
    """A path as the user knows it: relative where it lies below the working directory."""
    try:
        return str(Path(path).relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def is_data(path: Path) -> bool:
    """Whether the name of a file is that of a data file."""
    return _unpacked(path.name).endswith(SUFFIXES)


def _unpacked(name: str) -> str:
    return next((name.removesuffix(ending) for ending in PACKED if name.endswith(ending)), name)


def suffix_of(path: Path) -> str:
    """The kind of a data file, `.jsonl` for `a.jsonl.gz`.

    Raises:
        DataError: it is none of the known kinds.
    """
    suffix = Path(_unpacked(path.name)).suffix
    if suffix not in SUFFIXES or (suffix == ".parquet" and path.suffix in PACKED):
        raise DataError(
            f"{display(path)}: unknown kind of file; known are {', '.join(SUFFIXES)} (also with .gz or .zst, "
            "but for .parquet)"
        )
    return suffix


def read_file(path: Path) -> Iterator[Record]:
    """Every record of one file, in its order.

    Raises:
        DataError: an unreadable or damaged file, or one that something writes to; one line with file and line.
    """
    suffix, name = suffix_of(path), display(path)
    try:
        before = _state(path)
        yield from _read_parquet(path, name) if suffix == ".parquet" else _read_text(path, suffix, name)
        if _state(path) != before:
            raise DataError(f"{name}: changed while it was read; start again when nothing writes to it")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{name}: damaged gzip file: {error}; fetch or pack it again") from None
    except OSError as error:
        if path.suffix == ".zst" and error.errno is None:  # pyarrow's, without a number
            raise DataError(f"{name}: damaged zstd file: {error}; fetch or pack it again") from None
        raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None


def _state(path: Path) -> tuple[int, int, int]:
    found = os.stat(path)
    return found.st_ino, found.st_size, found.st_mtime_ns


def _read_text(path: Path, suffix: str, name: str) -> Iterator[Record]:
    with _open(path) as stream:
        if suffix in (".csv", ".tsv"):
            yield from _read_csv(stream, name, "\t" if suffix == ".tsv" else ",")
        elif suffix == ".json" and stream.peek(CHUNK).removeprefix(MARK).lstrip().startswith(b"["):
            yield from _read_array(stream, name)
        else:
            yield from _read_lines(stream, name)


def _open(path: Path) -> io.BufferedReader:
    if path.suffix == ".gz":
        return cast(io.BufferedReader, gzip.open(path, "rb"))
    if path.suffix == ".zst":
        import pyarrow

        return io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"), 2**16)
    return path.open("rb")


# --- lines ----------------------------------------------------------------------------------------------------------


def _lines(stream: BinaryIO, name: str) -> Iterator[tuple[int, str]]:
    """Numbered lines as text, line ends kept; a byte order mark is skipped."""
    number = 0
    while line := stream.readline(LINE_LIMIT + 1):
        number += 1
        if len(line) > LINE_LIMIT:
            raise DataError(
                f"{name}:{number}: line of more than {LINE_LIMIT // 2**20} MiB; one line is one row (an array of rows "
                "is a .json file)"
            )
        if number == 1:
            _refuse_utf16(line, name)
            line = line.removeprefix(MARK)
        yield number, _decode(line, f"{name}:{number}")


def _refuse_utf16(head: bytes, name: str) -> None:
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{name}: is UTF-16 text; save it as UTF-8")


def _decode(data: bytes, where: str) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: invalid UTF-8 at byte {error.start + 1}; save the file as UTF-8") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [key for key, _ in pairs]
        raise ValueError(f"duplicate key {next(key for key in names if names.count(key) > 1)!r}")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _what(error: json.JSONDecodeError) -> str:
    """What is wrong, before ` at column 3`: some of the decoder's messages end with a word for that."""
    return error.msg.removesuffix(" starting at").removesuffix(" at")


_JSON = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_no_constant)


def _parse(line: str, where: str) -> Any:
    """Parse one line of JSON, its end included; an error names the column."""
    text = line.rstrip("\r\n")
    try:
        return _JSON.decode(text)
    except json.JSONDecodeError as error:
        if text.lstrip().startswith("\0"):
            raise DataError(
                f"{where}: NUL bytes where JSON belongs: the file was not written to its end; write or fetch it again"
            ) from None
        cut = "" if text != line else "; the file ends in this line: was it cut?"
        raise DataError(f"{where}: invalid JSON: {_what(error)} at column {error.colno}{cut}") from None
    except RecursionError:
        raise DataError(f"{where}: invalid JSON: nested too deeply") from None
    except ValueError as error:
        raise DataError(f"{where}: invalid JSON: {error}") from None


def _object(value: Any, where: str) -> Record:
    if not isinstance(value, dict):
        raise DataError(f"{where}: a record must be a JSON object with columns, found {type(value).__name__}")
    return Record(value, where)


def _read_lines(stream: BinaryIO, name: str) -> Iterator[Record]:
    for number, line in _lines(stream, name):
        if line.strip():
            yield _object(_parse(line, f"{name}:{number}"), f"{name}:{number}")


# --- an array of objects --------------------------------------------------------------------------------------------


class _Array:
    """A window on the text of a JSON array: what was read and not yet used, and the line at which it begins."""

    def __init__(self, stream: BinaryIO, name: str):
        self.stream, self.name = stream, name
        self.text, self.at, self.ended = "", 0, False
        self.line, self.column = 1, 1  # of the character at `at`
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._bytes = 0  # read so far, and of them in lines that are complete
        self._lines, self._line_start = 1, 0

    def more(self, characters: int = CHUNK) -> bool:
        """Read on; False at the end of the file."""
        data = self.stream.read(characters if self._bytes else max(characters, len(MARK)))
        if not self._bytes:
            _refuse_utf16(data, self.name)
            data = data.removeprefix(MARK)
        try:
            text = self._decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            # `error.object` is this piece, after what was left of the last one.
            before = error.object[: error.start]
            number = self._lines + before.count(b"\n")
            start = self._bytes + len(data) - len(error.object) - self._line_start  # within its line
            byte = len(before) - before.rfind(b"\n") if number > self._lines else start + len(before) + 1
            raise DataError(f"{self.name}:{number}: invalid UTF-8 at byte {byte}; save the file as UTF-8") from None
        if b"\n" in data:
            self._lines += data.count(b"\n")
            self._line_start = self._bytes + data.rfind(b"\n") + 1
        self._bytes += len(data)
        self.text, self.at = self.text[self.at :] + text, 0
        self.ended = not data
        return not self.ended

    def skip(self, end: int) -> None:
        """Go on to a place in the window, and count its lines."""
        used = self.text[self.at : end]
        if "\n" in used:
            self.line += used.count("\n")
            self.column = len(used) - used.rfind("\n")
        else:
            self.column += len(used)
        self.at = end

    def peek(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            found = SPACE.match(self.text, self.at)
            assert found is not None
            self.skip(found.end())
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def fail(self, message: str) -> DataError:
        return DataError(f"{self.name}:{self.line}: invalid JSON: {message} at column {self.column}")

    def value(self) -> Any:
        """The next value; it may need more text than the window holds yet."""
        size = CHUNK
        while True:
            try:
                found, end = _JSON.raw_decode(self.text, self.at)
                self.skip(end)
                return found
            except json.JSONDecodeError as error:
                if not self.ended and len(self.text) - self.at <= LINE_LIMIT:
                    self.more(size)
                    size *= 2
                    continue
                if not self.ended:
                    raise DataError(
                        f"{self.name}:{self.line}: an object of more than {LINE_LIMIT // 2**20} MiB, or invalid JSON: "
                        f"{_what(error)}"
                    ) from None
                self.skip(error.pos)
                raise self.fail(_what(error)) from None
            except RecursionError:
                raise DataError(f"{self.name}:{self.line}: invalid JSON: nested too deeply") from None
            except ValueError as error:
                raise DataError(f"{self.name}:{self.line}: invalid JSON: {error}") from None


def _read_array(stream: BinaryIO, name: str) -> Iterator[Record]:
    array = _Array(stream, name)
    array.peek()
    array.skip(array.at + 1)  # the bracket
    index = 0
    if array.peek() == "]":
        array.skip(array.at + 1)
    else:
        while True:
            array.peek()
            yield _object(array.value(), f"{name}[{index}]")
            index += 1
            after = array.peek()
            if after not in (",", "]"):
                raise array.fail("Expecting ',' delimiter")
            array.skip(array.at + 1)
            if after == "]":
                break
    if array.peek():
        raise array.fail("Extra data")


# --- tables ---------------------------------------------------------------------------------------------------------


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
                    raise DataError(
                        f"{name}:{start}: {len(fields)} fields, the header has {len(header)}; quote the fields that "
                        "hold a delimiter or a line end"
                    )
                yield Record({key: _cell(cell) for key, cell in zip(header, fields, strict=True)}, f"{name}:{start}")
            start = rows.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}:{start}: invalid CSV: {error}; is a quotation mark open?") from None


def _cell(text: str) -> Any:
    """A cell as text, or as the list of messages that it holds in JSON."""
    if CELL.match(text):
        try:
            return json.loads(text)
        except ValueError:
            return text
    return text


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
        raise DataError(
            f"{name}: damaged Parquet file: {str(error).splitlines()[0]}; fetch or write it again"
        ) from None
