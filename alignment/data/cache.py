"""The content-addressed cache of token tables, and what is remembered of the files that they were made from.

    <cache>/tokens/<key>/    table.arrow, report.json: the key is that of the rows and of all that decides their tokens
    <cache>/prepared/<key>   the keys and reports of a stage, by the content of its files and its settings

The second spares reading the rows: a stage whose files are the same bytes as before, read by the same code in the same
way, has the same rows. A file's content is known by its hash, which is remembered by device, inode, size and both time
stamps (`pipeline/files.py`): a file that is edited and given its old size and modification time has another time of
change. `augment` calls functions whose result may hang on anything, and data sets on the hub are not files: stages with
these are read every time.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from alignment.data.files import display
from alignment.data.shorten import Changes
from alignment.data.sources import find_files
from alignment.data.tokens import Row, Settings, Stats, tables
from alignment.errors import DataError, StorageError
from alignment.pipeline.files import file_hash
from alignment.recipe.described import described
from alignment.recipe.schema import Data, Source

CODE_VERSION = 2  # raise it when the same rows would give other tokens: it is part of the cache key
STALE = 24 * 3600  # seconds after which an unfinished table is litter of a killed process
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
REPORT, TABLE = "report.json", "table.arrow"

Say = Callable[[str], None]
Table = tuple[datasets.Dataset, Stats]


def row_key(rows: Sequence[Row], settings: Settings, tokenizer_digest: str) -> str:
    """SHA-256 of the rows and of all that decides their tokens."""
    digest = hashlib.sha256()
    digest.update(json.dumps([CODE_VERSION, asdict(settings), tokenizer_digest], sort_keys=True).encode())
    encoder = json.JSONEncoder(sort_keys=True, ensure_ascii=False, default=str)
    for row in rows:
        digest.update(encoder.encode(row).encode())
    return digest.hexdigest()


# --- what is remembered of files ------------------------------------------------------------------------------------


def file_key(data: Data, settings: Settings, tokenizer_digest: str, cache: Path) -> str | None:
    """What decides the rows of a stage and their tokens, without reading a row; None where that cannot be said."""
    if data.augment:
        return None
    try:
        sources = [[_source(source, cache) for source in part] for part in (data.train, data.eval, data.watched)]
    except (DataError, StorageError, OSError):  # said where the rows are read
        return None
    if any(source is None for part in sources for source in part):
        return None
    rest = data.model_dump(mode="json", exclude={"train", "eval", "against"})
    parts = [CODE_VERSION, _code(), asdict(settings), tokenizer_digest, sources, rest]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _source(source: Source, cache: Path) -> Any:
    found = described(source)
    files = find_files(found)
    if files is None:
        return None
    hashes = [(display(file), file_hash(file, cache.parent)) for file in files]
    return [display(found.path), found.model_dump(mode="json", exclude={"path"}), hashes]


@functools.cache
def _code() -> str:
    """A hash of the code that reads rows and looks at them."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def recall(key: str, cache: Path) -> dict[str, Any] | None:
    """What was remembered under a key."""
    try:
        found = json.loads((cache / "prepared" / key).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def remember(key: str, cache: Path, record: Mapping[str, Any]) -> None:
    """Keep something under a key. Raises StorageError."""
    with storage(cache):
        (cache / "prepared").mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(prefix=".", dir=cache / "prepared")
        with os.fdopen(handle, "w") as file:  # a record that is damaged is made again: no fsync
            json.dump(dict(record), file)
        os.chmod(beside, 0o666 & ~_umask())
        os.replace(beside, cache / "prepared" / key)


# --- tables ---------------------------------------------------------------------------------------------------------


@contextmanager
def storage(cache: Path) -> Iterator[None]:
    """An error of the file system is the user's to mend."""
    try:
        yield
    except OSError as error:
        if error.errno in STORAGE_ERRORS:
            raise StorageError(f"{cache}: token cache cannot be written: {error.strerror}") from error
        raise


def stored(key: str, cache: Path) -> Table | None:
    """A table of the cache; None where it is missing or damaged."""
    folder = cache / "tokens" / key
    return opened(folder) if damage(folder) is None else None


def made(
    key: str, rows: Sequence[Row], where: Sequence[str], settings: Settings, tokenizer: PreTrainedTokenizerBase,
    cache: Path, say: Say,
) -> tuple[Table, float | None]:  # fmt: skip
    """The table of a key, made where it is missing or damaged; and the seconds that this took, or None.

    Raises:
        DataError: rows that cannot be tokenized; StorageError: the cache cannot be written.
    """
    folder = cache / "tokens" / key
    with storage(folder.parent):
        if folder.exists() and damage(folder) is None:
            return opened(folder), None
        with _alone(folder.parent, say):
            if folder.exists():
                fault = damage(folder)
                if fault is None:  # made by another process in the meantime
                    return opened(folder), None
                say(f"token cache {folder.name[:12]}: {fault}; made again")
                shutil.rmtree(folder, ignore_errors=True)
            start = time.monotonic()
            _build(rows, where, settings, tokenizer, folder)
            return opened(folder), time.monotonic() - start


@contextmanager
def _alone(folder: Path, say: Say) -> Iterator[None]:
    """Let one process at a time make tables: the ranks of a launch all ask for the same one.

    This only saves work. Where a file system has no locks, the rename in `_build` still keeps every table whole.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as file:
        with suppress(OSError):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say(f"waiting for another process that tokenizes into {folder}")
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    rows: Sequence[Row], where: Sequence[str], settings: Settings, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> None:
    """Write the table beside its place and rename it there; whoever is first to rename wins, the table is the same."""
    _sweep(folder.parent)
    beside = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        changes = Changes(settings, tokenizer)
        pieces, stats = tables(rows, where, changes.settings, tokenizer, changes)
        _write(pieces, beside / TABLE)
        stats.truncated += changes.shortened
        stats.neutralized = changes.neutralized
        record = {"rows": stats.rows, "sha256": _hash(beside / TABLE), "stats": stats.as_dict()}
        with (beside / REPORT).open("w") as file:
            json.dump(record, file, sort_keys=True, indent=1)
            file.flush()
            os.fsync(file.fileno())
        beside.chmod(0o777 & ~_umask())
        try:
            beside.rename(folder)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def _write(pieces: Iterator[pa.Table], path: Path) -> None:
    first = next(pieces, None)
    with path.open("wb") as file:
        if first is None:
            first = pa.table({"row": pa.array([], pa.int64())})
        with pa.ipc.new_stream(file, first.schema) as writer:
            for piece in itertools.chain([first], pieces):
                writer.write_table(piece)
        file.flush()
        os.fsync(file.fileno())


def opened(folder: Path) -> Table:
    """The table of a folder, mapped into memory, and its statistics."""
    record = json.loads((folder / REPORT).read_text())
    return datasets.Dataset.from_file(str(folder / TABLE)), Stats(**record["stats"])


def damage(folder: Path) -> str | None:
    """What is wrong with a cached table, or None: its bytes and its number of rows must be those recorded."""
    try:
        record = json.loads((folder / REPORT).read_text())
        (folder / TABLE).stat()
        if _hash(folder / TABLE) != record["sha256"]:
            return f"{TABLE} is damaged"
        table, stats = opened(folder)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return f"{REPORT} is damaged ({type(error).__name__})"
    return None if len(table) == stats.rows == record["rows"] else f"{TABLE} has another number of rows than recorded"


def _hash(table: Path) -> str:
    """SHA-256 of a table, remembered while nothing touches it."""
    try:
        return file_hash(table, table.parents[3])
    except (DataError, StorageError):  # a cache that can only be read is one all the same
        with table.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _sweep(folder: Path) -> None:
    """Remove tables that a killed process left unfinished."""
    for litter in folder.glob(".unfinished-*"):
        try:
            if time.time() - litter.stat().st_mtime > STALE:
                shutil.rmtree(litter, ignore_errors=True)
        except FileNotFoundError:
            continue


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
