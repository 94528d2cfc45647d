"""From the `data:` section of a stage to the token table it trains on.

`prepare` reads the sources, converts and checks their rows, tokenizes them, and keeps the table in a content-addressed
cache (`cache.py`), from which it is memory-mapped. `load_rows` stops before tokenization: evaluation uses it. Every
dropped row is counted with its reason, said, and reported; data that passes one of `data.limits` stops the stage before
a model loads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from alignment.data import cache as tables
from alignment.data import limits as bounds
from alignment.data import templates
from alignment.data.checks import EXAMPLES
from alignment.data.loading import Loading, Splits, load, load_splits, row_of, where_of
from alignment.data.remedies import Account, Rows
from alignment.data.spool import View
from alignment.data.tokens import Settings, Stats
from alignment.errors import DataError
from alignment.recipe.algorithms import Schema
from alignment.recipe.schema import Data, DataLimits, Source, Stage

Say = Callable[[str], None]
Row = dict[str, Any]


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
    splits: Splits | None = None,
) -> Prepared:
    """The token tables of a resolved stage, from the cache where they are in it.

    Args:
        splits: the rows, where they are loaded already; what is dropped here goes on their accounts, and the caller
            sees to all limits but that of dropped rows.

    Raises:
        DataError: unusable data, or data that passes a limit; the text is one line.
        StorageError: the cache cannot be written.
    """
    data = stage.data
    assert data is not None, "a stage that trains"
    assert stage.seed is not None, "a resolved stage"
    settings = Settings(schema, max_length, data.on_overlong, stage.seed, data.on_special_token)
    digest = templates.digest(tokenizer)
    if splits is not None:
        return _tabled(splits, data, settings, tokenizer, digest, cache, say)
    key = tables.file_key(data, settings, digest, cache)
    if key is not None and (known := _recalled(key, settings, cache, say)) is not None:
        return known
    said: list[str] = []

    def tell(text: str) -> None:
        said.append(text)
        say(text)

    splits = load_splits(data, Loading(schema, stage.seed, data.strict, data.limits, tell, data))
    made = _tabled(splits, data, settings, tokenizer, digest, cache, say)
    bounds.enforce(splits, made.train, made.report["train"], data, settings, tokenizer, tell)
    if key is not None and key == tables.file_key(data, settings, digest, cache):  # nothing was written meanwhile
        tables.remember(key, cache, {"report": made.report, "said": said})
    return made


def _recalled(key: str, settings: Settings, cache: Path, say: Say) -> Prepared | None:
    """The tables of a stage whose files were read before; None where the cache has them no more."""
    known = tables.recall(key, cache)
    if known is None:
        return None
    report: dict[str, Any] = known["report"]
    found = {name: tables.stored(part["key"], cache) for name, part in report.items()}
    ready = {name: table for name, table in found.items() if table is not None}
    if len(ready) < len(found):
        return None
    for line in known["said"]:
        say(line)
    for name, (_, stats) in ready.items():
        _tell(name, stats, None, settings, say)
    return Prepared(ready["train"][0], ready["eval"][0] if "eval" in ready else None, report)


def _tabled(
    splits: Splits, data: Data, settings: Settings, tokenizer: PreTrainedTokenizerBase, digest: str, cache: Path,
    say: Say,
) -> Prepared:  # fmt: skip
    """The token tables of rows that are loaded."""
    ready: dict[str, datasets.Dataset] = {}
    report: dict[str, Any] = {}
    for name, (found, counts) in splits.items():
        rows, where = View(found, row_of), View(found, where_of)
        key = tables.row_key(rows, settings, digest)
        (table, stats), seconds = tables.made(key, rows, where, settings, tokenizer, cache, say)
        _account(stats, found, counts)
        report[name] = {"key": key, **_report(stats, found, counts)}
        _tell(name, stats, seconds, settings, say)
        for tally in counts:
            tally.enforce(data.limits.dropped, data.strict)
        if not len(table):
            raise DataError(f"{name}: no row is left to learn from: {'; '.join(t.summary() for t in counts)}")
        ready[name] = table
    return Prepared(ready["train"], ready.get("eval"), report)


def _account(stats: Stats, found: Rows, tallies: Sequence[Account]) -> None:
    """Put the rows dropped at tokenization on the account of their sources."""
    for reason, indices in stats.dropped.items():
        for index in indices:
            tallies[found[index].source].drop(reason, found[index].where, stats.details.get(reason, ""))


def _report(stats: Stats, found: Rows, tallies: Sequence[Account]) -> dict[str, Any]:
    left: np.ndarray[Any, np.dtype[np.bool_]] = np.ones(len(found), np.bool_)
    for indices in stats.dropped.values():
        left[indices] = False
    kept = np.bincount(found.sources[left], minlength=len(tallies)).tolist()
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
        "kept": int(left.sum()),
        "dropped": {reason: len(indices) for reason, indices in stats.dropped.items()},
        "truncated": stats.truncated,
        "neutralized": stats.neutralized,
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
    if stats.neutralized:
        say(
            f"{name}: {stats.neutralized:,} rows with control tokens in their text, neutralized (data.on_special_token)"
        )
    if stats.boundary_mismatches:
        say(f"{name}: {stats.boundary_mismatches:,} rows whose answer changes how the end of the prompt is tokenized")
