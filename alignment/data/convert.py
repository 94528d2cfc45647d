"""`alignment data convert`: rows of any known format as JSON Lines in the conversational schema of TRL.

Rows stream: memory does not grow with the file. The new file stands under its name only when it is whole, and a file
that is already there is never written over.
"""

from __future__ import annotations

import datetime
import decimal
import gzip
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

from alignment.data.checks import EXAMPLES, Defect, Tally, check_row
from alignment.data.files import display
from alignment.data.opened import Opened, open_source, rows_of
from alignment.errors import DataError, StorageError
from alignment.recipe.algorithms import Schema
from alignment.recipe.problems import did_you_mean
from alignment.recipe.schema import Source

ENDINGS = (".jsonl", ".jsonl.gz", ".jsonl.zst")

Say = Callable[[str], None]


def source_of(path: str, *, columns: Sequence[str], **keys: Any) -> Source:
    """A source as the command line gives it. Raises DataError for a column that is not `ours=theirs`."""
    mapped = {}
    for text in columns:
        ours, equals, theirs = text.partition("=")
        if not (ours and equals and theirs):
            raise DataError(f"--column {text}: give our name and the file's: --column prompt=question")
        mapped[ours] = theirs
    return Source(path=path, columns=mapped, **keys)


def convert(source: Source, out: Path, *, schema: Schema | None, strict: bool, say: Say) -> dict[str, Any]:
    """Write the rows of a source to a new file; returns what became of them.

    Args:
        schema: the schema to write; None for the one that suits the format.
        strict: stop at the first defective row, instead of dropping and counting it.

    Raises:
        DataError: unreadable, of no known format, without a usable row; OUT exists, or is no JSON Lines file.
        StorageError: OUT cannot be written.
    """
    refuse(out)
    opened = open_source(source, schema)
    say(f"{opened.name}: {opened.says}: {opened.why}")
    tally = Tally(opened.name, opened.says)
    written = 0
    try:
        with writer(out) as stream:
            for line in _lines(opened, tally, strict):
                stream.write(line)
                written += 1
            if not written:
                raise DataError(f"{tally.source}: no usable row: {tally.summary()}")
    except OSError as error:
        raise StorageError(f"{display(out)}: cannot be written: {error.strerror or error}") from None
    if tally.defective:
        share = tally.defective / tally.rows_in
        say(f"{tally.source}: dropped {tally.defective:,} ({share:.1%}): {tally.summary()}")
    say(f"{display(out)}: {written:,} {opened.schema} rows from {tally.rows_in:,}")
    return {
        "out": str(out),
        "source": tally.source,
        "format": tally.format,
        "why": opened.why,
        "schema": opened.schema,
        "rows": {"in": tally.rows_in, "kept": written, "dropped": dict(tally.dropped.most_common())},
        "examples": {reason: places[:EXAMPLES] for reason, places in tally.examples.items()},
    }


def refuse(out: Path) -> None:
    """Refuse a name that is no JSON Lines file's, or is taken. Raises DataError."""
    if not out.name.endswith(ENDINGS):
        hint = did_you_mean("".join(out.suffixes[-2:]), ENDINGS)
        raise DataError(f"{display(out)}: is written as JSON Lines; name it {', '.join(ENDINGS)}{hint}")
    if out.exists() or out.is_symlink():
        raise DataError(f"{display(out)}: exists, and is not written over; give another name")
    if not out.parent.is_dir():
        raise DataError(f"{display(out.parent)}: no such folder")


def _lines(opened: Opened, tally: Tally, strict: bool) -> Iterator[bytes]:
    """The rows of a source as lines; those that cannot be used are counted."""
    for record in opened.records:
        tally.rows_in += 1
        try:
            rows = rows_of(record, opened)
            for row in rows:
                check_row(row, opened.schema)
            lines = [_line(row) for row in rows]
        except Defect as defect:
            if strict:
                raise DataError(f"{record.where}: {defect.reason}: {defect}") from None
            tally.drop(defect.reason, record.where, defect.detail)
            continue
        yield from lines


def _line(row: dict[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False, default=_plain).encode() + b"\n"
    except ValueError:
        raise Defect("wrong-type", "a number that is not finite") from None


def _plain(value: Any) -> str:
    """What Parquet holds and JSON does not, as text."""
    if isinstance(value, (datetime.date, datetime.time, decimal.Decimal)):
        return str(value)
    raise Defect("wrong-type", f"{type(value).__name__} cannot be written as JSON")


@contextmanager
def writer(out: Path) -> Iterator[IO[bytes]]:
    """A file beside its place, which is renamed there when all is written and on disk."""
    handle, beside = tempfile.mkstemp(prefix=f".{out.name}.", suffix=".unfinished", dir=out.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            with _packed(file, out) as stream:
                yield stream
            file.flush()
            os.fsync(handle)
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, out)
    except BaseException:
        os.unlink(beside)
        raise


@contextmanager
def _packed(file: IO[bytes], out: Path) -> Iterator[IO[bytes]]:
    if out.suffix == ".gz":
        with gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            yield cast(IO[bytes], packed)
    elif out.suffix == ".zst":
        import pyarrow

        # pyarrow closes what it writes into: it is given a descriptor of its own.
        with pyarrow.CompressedOutputStream(os.fdopen(os.dup(file.fileno()), "wb"), "zstd") as packed:
            yield packed
    else:
        yield file


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
