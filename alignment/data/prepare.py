"""From the `data:` section of a stage to the token table it trains on.

`prepare` reads the sources, converts and checks their rows, tokenizes them, and keeps the table in a content-addressed
cache (`cache/tokens/<key>/`), from which it is memory-mapped. `load_rows` stops before tokenization: evaluation uses
it. Every dropped row is counted with its reason, said, and reported; too many stop the stage before a model loads.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from alignment.data import sources, templates
from alignment.data.checks import EXAMPLES
from alignment.data.loading import Loading, load
from alignment.data.remedies import Account, Found, augmented
from alignment.data.shorten import shortened
from alignment.data.tokens import Settings, Stats, tables
from alignment.errors import DataError, StorageError
from alignment.recipe.algorithms import Schema
from alignment.recipe.schema import Data, DataLimits, Source, Stage

CODE_VERSION = 1  # raise it when the same rows would give other tokens: it is part of the cache key
STALE = 24 * 3600  # seconds after which an unfinished table is litter of a killed process
STORAGE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)

Say = Callable[[str], None]
Row = dict[str, Any]
Splits = dict[str, tuple[list[Found], list[Account]]]


@dataclass(frozen=True)
class Prepared:
    """Token tables, and the report that goes into the manifest."""

    train: datasets.Dataset
    eval: datasets.Dataset | None
    report: dict[str, Any]


def load_rows(
    sources: Sequence[Source],
    schema: Schema,
    *,
    seed: int,
    strict: bool,
    limits: DataLimits,
    say: Say,
    data: Data | None = None,
    held_out: bool = False,
) -> list[Row]:
    """The normalised rows of a list of sources (see `formats`), mixed by their weights.

    Args:
        data: the section whose remedies are applied, without `augment`; `held_out`: the sources are its `eval`.

    Raises:
        DataError: a damaged file, wrong columns, or more defective rows than `limits` allow.
    """
    how = Loading(schema, seed, strict, limits, say, data, held_out)
    return [found.row for found in load(sources, how)[0]]


# --- tables ---------------------------------------------------------------------------------------------------------


def prepare(
    stage: Stage,
    schema: Schema,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    cache: Path,
    say: Say,
) -> Prepared:
    """The token tables of a resolved stage, from the cache where they are in it.

    Raises:
        DataError: unusable data; the text is one line.
        StorageError: the cache cannot be written.
    """
    data = stage.data
    assert data is not None, "a stage that trains"
    assert stage.seed is not None, "a resolved stage"
    splits = load_splits(data, Loading(schema, stage.seed, data.strict, data.limits, say, data))
    return tabled(splits, stage, schema, tokenizer, max_length=max_length, cache=cache, say=say)


def tabled(
    splits: Splits,
    stage: Stage,
    schema: Schema,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None,
    cache: Path,
    say: Say,
) -> Prepared:
    """The token tables of rows that are loaded; what is dropped here goes on the same accounts.

    Raises:
        DataError, StorageError: as `prepare`.
    """
    data = stage.data
    assert data is not None, "a stage that trains"
    assert stage.seed is not None, "a resolved stage"
    settings = Settings(schema, max_length, data.on_overlong, stage.seed)
    tokenizer_digest = templates.digest(tokenizer)
    ready: dict[str, datasets.Dataset] = {}
    report: dict[str, Any] = {}
    for name, (found, counts) in splits.items():
        key = _key(found, settings, tokenizer_digest)
        table, stats, seconds = _table(found, settings, tokenizer, cache / "tokens" / key, say)
        _account(stats, found, counts)
        report[name] = {"key": key, **_report(stats, found, counts)}
        _tell(name, stats, seconds, settings, say)
        for tally in counts:
            tally.enforce(data.limits.dropped, data.strict)
        if not len(table):
            raise DataError(f"{name}: no row is left to learn from: {'; '.join(t.summary() for t in counts)}")
        ready[name] = table
    return Prepared(ready["train"], ready.get("eval"), report)


def load_splits(data: Data, how: Loading) -> Splits:
    """The rows of training (`train`) and, where there are such, of evaluation (`eval`), with all remedies applied.

    Raises:
        DataError: as `load_rows`, or a function of `augment` that fails.
    """
    rows, accounts = load(data.train, how)
    splits = {"train": (rows, accounts)}
    if data.eval:
        splits["eval"] = load(data.eval, replace(how, held_out=True))
    elif data.eval_fraction is not None:
        train, held = sources.hold_out(rows, data.eval_fraction, how.seed)
        copies = [Account(account.source, account.format, account.rows_in) for account in accounts]
        splits = {"train": (train, accounts), "eval": (held, copies)}
        how.say(f"held out {len(held):,} of {len(rows):,} rows for evaluation (data.eval_fraction)")
    if data.augment:
        before, accounts = splits["train"]
        after = augmented(before, data.augment, how.schema, accounts)
        splits["train"] = (after, accounts)
        how.say(f"data.augment: {len(before):,} rows became {len(after):,}")
    return splits


def _key(found: Sequence[Found], settings: Settings, tokenizer_digest: str) -> str:
    """SHA-256 of the rows and of all that decides their tokens."""
    digest = hashlib.sha256()
    digest.update(json.dumps([CODE_VERSION, asdict(settings), tokenizer_digest], sort_keys=True).encode())
    for item in found:
        digest.update(json.dumps(item.row, sort_keys=True, ensure_ascii=False, default=str).encode())
    return digest.hexdigest()


def _account(stats: Stats, found: Sequence[Found], tallies: Sequence[Account]) -> None:
    """Put the rows dropped at tokenization on the account of their sources."""
    for reason, indices in stats.dropped.items():
        for index in indices:
            tallies[found[index].source].drop(reason, found[index].where, stats.details.get(reason, ""))


def _report(stats: Stats, found: Sequence[Found], tallies: Sequence[Account]) -> dict[str, Any]:
    lost = {index for indices in stats.dropped.values() for index in indices}
    kept = [sum(item.source == i for n, item in enumerate(found) if n not in lost) for i in range(len(tallies))]
    return {
        "sources": [
            {
                "source": tally.source,
                "format": tally.format,
                "rows_in": tally.rows_in,
                "kept": count,
                "dropped": dict(tally.dropped.most_common()),
                "changed": dict(tally.changed.most_common()),
                "examples": {reason: places[:EXAMPLES] for reason, places in tally.examples.items()},
            }
            for tally, count in zip(tallies, kept, strict=True)
        ],
        "rows": stats.rows,
        "kept": len(found) - len(lost),
        "dropped": {reason: len(indices) for reason, indices in stats.dropped.items()},
        "truncated": stats.truncated,
        "boundary_mismatches": stats.boundary_mismatches,
        "tokens": stats.tokens,
        "trained_tokens": stats.trained_tokens,
        "length": stats.length,
        "notes": stats.notes,
    }


def _tell(name: str, stats: Stats, seconds: float | None, settings: Settings, say: Say) -> None:
    how = "from the cache" if seconds is None else f"tokenized in {seconds:.1f} s"
    unit = "rows"
    if settings.schema == "text" and settings.max_length is not None:
        unit = f"blocks of {settings.max_length:,} tokens (documents in seeded random order, EOS between)"
    length = ", ".join(f"{quantile} {stats.length.get(quantile, 0):,}" for quantile in ("p50", "p95", "max"))
    counts = f"{stats.rows:,} {unit}, {stats.tokens:,} tokens, {stats.trained_tokens:,} trained"
    say(f"{name}: {counts}; length {length}; {how}")
    for reason, indices in stats.dropped.items():
        detail = f" ({stats.details[reason]})" if stats.details.get(reason) else ""
        say(f"{name}: dropped {len(indices):,}: {reason}{detail}")
    for note in stats.notes:
        say(f"{name}: {note}")
    if stats.truncated:
        how = "a cut answer has no stop token"
        if settings.on_overlong == "truncate_left":
            how = "the beginning of their prompts is gone"
        say(f"{name}: {stats.truncated:,} rows cut at {settings.max_length:,} tokens; {how}")
    if stats.boundary_mismatches:
        say(f"{name}: {stats.boundary_mismatches:,} rows whose answer changes how the end of the prompt is tokenized")


# --- cache ----------------------------------------------------------------------------------------------------------


def _table(
    found: Sequence[Found], settings: Settings, tokenizer: PreTrainedTokenizerBase, folder: Path, say: Say
) -> tuple[datasets.Dataset, Stats, float | None]:
    """The table of a cache folder, made where it is missing or damaged; and the seconds that this took, or None."""
    try:
        if folder.exists() and _damage(folder) is None:
            return (*_open(folder), None)
        with _alone(folder.parent, say):
            if folder.exists():
                damage = _damage(folder)
                if damage is None:  # made by another process in the meantime
                    return (*_open(folder), None)
                say(f"token cache {folder.name[:12]}: {damage}; made again")
                shutil.rmtree(folder, ignore_errors=True)
            start = time.monotonic()
            _build(found, settings, tokenizer, folder)
            return (*_open(folder), time.monotonic() - start)
    except OSError as error:
        if error.errno in STORAGE_ERRORS:
            raise StorageError(f"{folder.parent}: token cache cannot be written: {error.strerror}") from error
        raise


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


def _build(found: Sequence[Found], settings: Settings, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the table beside its place and rename it there; whoever is first to rename wins, the table is the same."""
    _sweep(folder.parent)
    beside = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=folder.parent))
    try:
        rows, where = [item.row for item in found], [item.where for item in found]
        short, count, settings = shortened(rows, settings, tokenizer)
        pieces, stats = tables(short, where, settings, tokenizer)
        _write(pieces, beside / "table.arrow")
        stats.truncated += count
        record = {"rows": stats.rows, "sha256": _sha256(beside / "table.arrow"), "stats": stats.as_dict()}
        with (beside / "report.json").open("w") as file:
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


def _open(folder: Path) -> tuple[datasets.Dataset, Stats]:
    record = json.loads((folder / "report.json").read_text())
    return datasets.Dataset.from_file(str(folder / "table.arrow")), Stats(**record["stats"])


def _damage(folder: Path) -> str | None:
    """What is wrong with a cached table, or None: its bytes and its number of rows must be those recorded."""
    try:
        record = json.loads((folder / "report.json").read_text())
        if _sha256(folder / "table.arrow") != record["sha256"]:
            return "table.arrow is damaged"
        table, stats = _open(folder)
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, pa.ArrowException) as error:
        return f"report.json is damaged ({type(error).__name__})"
    return (
        None if len(table) == stats.rows == record["rows"] else "table.arrow has another number of rows than recorded"
    )


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
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
