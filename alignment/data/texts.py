"""What the text of the rows of a split comes to: content, duplicates, pairs, and what of held-out rows and evaluation
sets is in them. All of it is found before tokens, in one pass; `report` prints it and `limits` holds it against
`data.limits`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from alignment.data import content, duplicates, pairs, words
from alignment.data.duplicates import Memory, Watch, Watched
from alignment.data.findings import PLACES, Finding, Limit, Seen
from alignment.data.loading import row_of, where_of
from alignment.data.remedies import Account, Found, Rows
from alignment.data.spool import View

BATCH = 1000  # rows hashed at once


@dataclass(frozen=True)
class Loaded:
    """The rows of a split and what became of the others."""

    found: Rows
    accounts: list[Account]

    @cached_property
    def rows(self) -> Sequence[dict[str, Any]]:
        """The rows themselves."""
        return View(self.found, row_of)

    @cached_property
    def where(self) -> Sequence[str]:
        """Where each stands."""
        return View(self.found, where_of)


@dataclass(frozen=True)
class Text:
    """What the text of the rows came to; `pairs` are the numbers of the pair linter, `by_source` counts findings."""

    findings: list[Finding]
    by_source: list[Counter[str]]
    pairs: dict[str, Any] | None


def read(
    schema: str, train: Loaded, held: Loaded | None, watches: Sequence[Watch], limit: Limit, *, tokens: bool
) -> Text:
    """Look at the text of every row once; what is watched for is noted on the way.

    Args:
        held: rows of evaluation, of which nothing may be trained on.
        tokens: also look for control tokens of other templates.
    """
    memory, seen, linter = Memory(schema), Seen(), pairs.Pairs()
    held_out = None if held is None else _HeldOut(schema, held)
    looking = [*watches, *([] if held_out is None else [held_out.watch])]
    by_source = [Counter[str]() for _ in train.accounts]
    for found, source in _batches(train.found):
        rows, where = [one.row for one in found], [one.where for one in found]
        hashed = words.hashed([duplicates.parts(row, schema) for row in rows])
        memory.add(rows, where, source, hashed)
        for watch in looking:
            watch.look(hashed)
        if schema == "preference":
            linter.add(rows, hashed)
        for row, place in zip(rows, where, strict=True):
            for check, kinds in content.look(row, tokens=tokens).items():
                seen.add(check, place, *kinds)
                by_source[source][check] += 1
    contents = (seen.finding(check, len(memory), says, limit(check)) for check, says in content.SAYS.items())
    findings = [finding for finding in contents if finding is not None]
    for finding, repeats in _repeats(memory, limit):
        of_source = np.bincount(memory.sources[repeats], minlength=len(by_source))
        for index, count in enumerate(of_source.tolist()):
            by_source[index][finding.check] += count
        findings.append(finding)
    numbers = None
    if schema == "preference" and len(memory):
        numbers = pairs.summary(linter, memory)
        findings += pairs.findings(linter, memory, limit)
    if held_out is not None:
        findings += held_out.findings(memory, limit)
    return Text(findings, by_source, numbers)


def _batches(rows: Rows) -> Iterator[tuple[list[Found], int]]:
    """The rows in batches in which all are of one source, and that source."""
    sources = rows.sources
    edges: list[int] = (np.flatnonzero(np.diff(sources)) + 1).tolist()
    for begin, end in zip([0, *edges], [*edges, len(rows)], strict=True):
        for first in range(begin, end, BATCH):
            yield list(rows[first : min(first + BATCH, end)]), int(sources[first])


def _repeats(memory: Memory, limit: Limit) -> Iterator[tuple[Finding, Any]]:
    """Exact and near duplicates; each row is counted once, as an exact one where it is."""
    own = np.arange(len(memory))
    exact = duplicates.first_of(memory.exact)
    near = np.where(exact == own, duplicates.near_first(memory), own)
    says = {
        "duplicate": "hold the same turns as an earlier row",
        "near-duplicate": "share four fifths or more of their three-word runs with an earlier row, in every part "
        "(estimated)",
    }
    for check, earlier in (("duplicate", exact), ("near-duplicate", near)):
        rows = np.flatnonzero(earlier != own)
        if len(rows):
            across = int((memory.sources[rows] != memory.sources[earlier[rows]]).sum())
            where = [f"{memory.where[row]} ({memory.where[earlier[row]]})" for row in rows[:PLACES].tolist()]
            text = says[check] + (f"; of {across:,} that one stands in another source" if across else "")
            values = {"within": len(rows) - across, "across": across}
            yield Finding(check, len(rows), len(memory), text, tuple(where), values, limit(check)), rows


class _HeldOut:
    """Held-out rows: those whose prompt is trained on, and those whose text is."""

    def __init__(self, schema: str, held: Loaded) -> None:
        self._schema, self._where = schema, list(held.where)
        rows = list(held.rows)
        parts = [duplicates.parts(row, schema) for row in rows]
        self._memory = Memory(schema)
        self._memory.add(rows, self._where, 0, words.hashed(parts))
        spoken = [[text for part in row[-2:] for text in part] for row in parts]
        self.watch = Watch(Watched.of("eval", self._where, spoken))

    def findings(self, memory: Memory, limit: Limit) -> Iterator[Finding]:
        """What of them is in the training rows."""
        prompts, where = self._memory, self._where
        leaked = duplicates.leaked(prompts.parts[:, 0], memory.parts[:, 0])
        if len(leaked):
            of_rows = int(np.isin(prompts.exact, memory.exact).sum())
            what = "text" if self._schema == "text" else "prompt"
            says = f"of the held-out rows have a {what} that is trained on; {of_rows:,} are trained on as they stand"
            places = tuple(where[index] for index in leaked[:PLACES])
            yield Finding("leak", len(leaked), len(where), says, places, {"whole_rows": of_rows}, limit("leak"))
        known, some = self.watch.known()
        leaked_where = {where[index] for index in leaked}
        known = [place for place in known if place not in leaked_where]
        if known:
            says = (
                f"of the held-out rows have half or more of their runs of {words.NGRAM} words (or all, of a shorter "
                f"one) in training rows, under other prompts; {some:,} share at least one"
            )
            yield Finding("leak-ngram", len(known), len(where), says, tuple(known[:PLACES]), {"any": some},
                          limit("leak-ngram"))  # fmt: skip
