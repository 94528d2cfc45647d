"""The data report of one stage: what its rows are, what is wrong with them, what its model will see.

    report = examine(Subject("dpo", "preference", stage), cache=Path("runs/.cache"), say=print)
    print("\\n".join(page.lines(report)))

The rows are those that a run trains on: the code of a run reads them, puts them right and mixes them. A report is a
plain mapping, the same that `alignment data check --json` prints; `page` writes it for a person. Text is looked at as
it is read, before tokens; with a tokenizer the token table of training is made (or taken from the cache) and counted,
and the chat template proved.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from alignment.data import contamination, content, lengths, limits, proof, sources, texts
from alignment.data.checks import EXAMPLES, REASONS
from alignment.data.findings import PLACES, Finding, Limit, limit_of
from alignment.data.loading import Loading, Splits, load_splits
from alignment.data.prepare import Prepared, prepare
from alignment.data.remedies import TAKEN
from alignment.data.texts import Loaded
from alignment.data.tokens import Settings
from alignment.recipe.algorithms import Schema
from alignment.recipe.schema import Data, DataLimits, Source, Stage

SAMPLE = 500  # rows, drawn with the seed, whose tokens are counted by language

Say = Callable[[str], None]


@dataclass(frozen=True)
class Subject:
    """What a report is about.

    Attributes:
        name: the stage, or `files`.
        schema: of its rows.
        stage: resolved, with `data`, whose limits say when the report fails, and the seed of all draws.
        against: evaluation sets: sources whose text must not be trained on.
        strict: it fails with any finding.
        tokenizer: fitted to the stage's template; None where there is none yet.
        why_no_tokens: the reason, where it is None.
        max_length: of its rows, in tokens.
        grouped: batches are made of rows of like length.
    """

    name: str
    schema: Schema
    stage: Stage
    against: Sequence[Source] = ()
    strict: bool = False
    tokenizer: PreTrainedTokenizerBase | None = None
    why_no_tokens: str = ""
    max_length: int | None = None
    grouped: bool = False

    @property
    def data(self) -> Data:
        """The section that names the rows."""
        assert self.stage.data is not None, "a stage that trains"
        return self.stage.data

    @property
    def seed(self) -> int:
        """The seed of mixture, split, remedies and padding."""
        assert self.stage.seed is not None, "a resolved stage"
        return self.stage.seed

    @property
    def limit(self) -> Limit:
        """The largest share that each check may see."""
        return limit_of(self.data.limits, strict=self.strict)

    @property
    def settings(self) -> Settings:
        """How its rows become tokens."""
        data = self.data
        return Settings(self.schema, self.max_length, data.on_overlong, self.seed, data.on_special_token)


def _unlimited(data: Data) -> Data:
    """The section without limits: however many rows are defective, they are to be reported.

    More rows may be dropped than were read, where pairs are made of several answers.
    """
    return data.model_copy(update={"limits": DataLimits.model_construct(dropped=math.inf), "strict": False})


def _splits(data: Data, schema: Schema, seed: int, say: Say) -> Splits:
    data = _unlimited(data)
    return load_splits(data, Loading(schema, seed, data.strict, data.limits, say, data))


def training_rows(data: Data, schema: Schema, seed: int) -> Loaded:
    """The rows of a stage in the order of its token table, whose column `row` counts them."""
    alone = data.model_copy(update={"eval": []})
    return Loaded(*_splits(alone, schema, seed, lambda text: None)["train"])


def examine(subject: Subject, *, cache: Path, say: Say) -> dict[str, Any]:
    """The report of a subject.

    Raises:
        DataError: data that cannot be read at all.
        StorageError: the cache cannot be written.
    """
    started = time.monotonic()
    splits = _splits(subject.data, subject.schema, subject.seed, say)
    train, held = Loaded(*splits["train"]), Loaded(*splits["eval"]) if "eval" in splits else None
    report: dict[str, Any] = {"stage": subject.name, "schema": subject.schema, "sources": [], "findings": []}
    watches = [contamination.watch(source) for source in subject.against]
    text = texts.read(
        subject.schema, train, held, watches, subject.limit, tokens=subject.tokenizer is None
    )  # fmt: skip
    found = list(text.findings)
    if text.pairs is not None:
        report["pairs"] = text.pairs
    for watch in watches:
        found += contamination.finding(watch, subject.limit)
    kept = np.bincount(train.found.sources, minlength=len(train.accounts)).tolist()
    if subject.tokenizer is not None:
        found += _proof(subject, train, report)
        made = _prepared(subject, splits, cache, say)
        found += _tokens(subject, made, train, held, report)
        kept = [entry["kept"] for entry in made.report["train"]["sources"]]
    else:
        report["tokens"] = {"not_counted": subject.why_no_tokens}
    _rows(train, held, kept, text.by_source, report)
    found = [*_dropped(subject, train, held, report), *found]
    report["findings"] = [finding.as_dict() for finding in found]
    report["limits_passed"] = [finding.check for finding in found if finding.passed_limit]
    report["seconds"] = round(time.monotonic() - started, 2)
    return report


# --- tokens ---------------------------------------------------------------------------------------------------------


def _proof(subject: Subject, train: Loaded, report: dict[str, Any]) -> Iterator[Finding]:
    """Prove the template on rows of the training split."""
    assert subject.tokenizer is not None
    if subject.schema in proof.SCHEMAS:
        proved = proof.prove(subject.tokenizer, train.rows, subject.schema)
        report["proof"] = proved.as_dict()
        for line in proved.lines:
            yield Finding("template-proof", 1, 1, line, (), {}, 0.0)


def _prepared(subject: Subject, splits: Splits, cache: Path, say: Say) -> Prepared:
    """The token tables that training reads, of the rows that were looked at."""
    assert subject.tokenizer is not None
    stage = subject.stage.model_copy(update={"data": _unlimited(subject.data)})
    return prepare(
        stage, subject.schema, subject.tokenizer, max_length=subject.max_length, cache=cache, say=say, splits=splits
    )


def _tokens(
    subject: Subject, made: Prepared, train: Loaded, held: Loaded | None, report: dict[str, Any]
) -> Iterator[Finding]:
    """Count the token tables."""
    assert subject.tokenizer is not None
    report["tokens"] = {"max_length": subject.max_length, "notes": made.report["train"]["notes"]}
    for name, table, loaded in (("train", made.train, train), ("eval", made.eval, held)):
        if table is None or loaded is None:
            continue
        counts = lengths.count(table, limits.stops(subject.tokenizer, subject.schema), limits.bos(subject.tokenizer))
        report["tokens"][name] = _token_summary(subject, counts, made.report[name])
        drawn = sources.take(range(len(loaded.rows)), SAMPLE, subject.seed, "languages", name)
        report["tokens"][name]["per_character"] = lengths.per_character(
            subject.tokenizer, [content.texts(loaded.rows[index]) for index in drawn]
        )
        if name == "train":
            yield from lengths.findings(counts, subject.schema, loaded.where, subject.limit)
            yield from limits.cut(made.report[name], subject.settings, subject.limit, len(table))


def _token_summary(subject: Subject, counts: lengths.Counts, made: dict[str, Any]) -> dict[str, Any]:
    summary = lengths.summary(
        counts, subject.schema, per_device=subject.stage.batch.per_device, seed=subject.seed, grouped=subject.grouped,
        size=subject.max_length,
    )  # fmt: skip
    emptied = made["dropped"].get("emptied-by-truncation", 0)
    return summary | {
        "truncated": made["truncated"], "overlong": made["dropped"].get("overlong", 0), "emptied": emptied,
        "boundary_mismatches": made["boundary_mismatches"], "key": made["key"],
    }  # fmt: skip


# --- rows -----------------------------------------------------------------------------------------------------------


def _rows(
    train: Loaded, held: Loaded | None, kept: Sequence[int], seen: Sequence[Counter[str]], report: dict[str, Any]
) -> None:
    """Rows in, kept, dropped and changed, in total and of every source; `taken` is what remedies dropped."""
    total: dict[str, Counter[str]] = {"dropped": Counter(), "taken": Counter(), "changed": Counter()}
    for account, left, checks in zip(train.accounts, kept, seen, strict=True):
        counts = {"dropped": account.dropped, "taken": Counter(account.taken), "changed": account.changed}
        for name, counter in counts.items():
            total[name].update(counter)
        report["sources"].append({
            "source": account.source, "format": account.format, "in": account.rows_in, "kept": left,
            **{name: dict(counter.most_common()) for name, counter in counts.items()},
            "findings": {check: count for check, count in checks.items() if count},
        })  # fmt: skip
    report["rows"] = {
        "in": sum(entry["in"] for entry in report["sources"]),
        "kept": sum(entry["kept"] for entry in report["sources"]),
        **{name: dict(counter.most_common()) for name, counter in total.items()},
    }
    if held is not None:
        report["eval_rows"] = len(held.rows)


def _dropped(subject: Subject, train: Loaded, held: Loaded | None, report: dict[str, Any]) -> Iterator[Finding]:
    """One finding for each reason for which rows were dropped, and one where they are more than the limit.

    What a remedy took is counted, and no finding: the recipe asks for it.
    """
    total = report["rows"]["in"]
    for reason, count in report["rows"]["dropped"].items():
        if reason in TAKEN:
            continue
        where = [place for account in train.accounts for place in account.examples.get(reason, [])]
        limit = 0.0 if subject.strict else None
        yield Finding(reason, count, total, f"are dropped: {REASONS[reason]}", tuple(where[:PLACES]), {}, limit)
    for account in [*train.accounts, *(held.accounts if held else [])]:
        limit = subject.limit("dropped") or 0.0
        if account.rows_in and account.defective > limit * account.rows_in:
            says = f"of {account.source} are defective and dropped"
            yield Finding("dropped", account.defective, account.rows_in, says, (), {"examples": EXAMPLES}, limit)
