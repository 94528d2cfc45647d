"""Evaluation sets whose rows must not be trained on: those of the recipe's evaluate stages, and `data.against`.

    watches = [watch(source) for source in sources]
    ...                                     # every batch of training rows: watch.look(hashed)
    for one in watches: yield from finding(one, limit)

A set may be of any format, also of none that is known: every text of a record counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from alignment.data import sources
from alignment.data.checks import Defect
from alignment.data.duplicates import Watch, Watched
from alignment.data.findings import PLACES, Finding, Limit
from alignment.data.opened import open_source, rows_of
from alignment.data.words import NGRAM
from alignment.errors import DataError
from alignment.recipe.described import described
from alignment.recipe.schema import Source

Say = Callable[[str], None]


def watch(wanted: Source) -> Watch:
    """What is to be looked for of an evaluation set, one text for each record.

    Raises:
        DataError: it cannot be read.
    """
    where, rows = [], []
    for place, said in _records(wanted):
        where.append(place)
        rows.append([text for text in dict.fromkeys(said) if text])
    return Watch(Watched.of(sources.identity(described(wanted)), where, rows))


def watches(wanted: Sequence[Source], say: Say) -> list[Watch]:
    """Those of the sets that can be read; of the others it is said that they are not looked for.

    They are of other stages, which say so themselves when it is their turn.
    """
    found = []
    for source in wanted:
        try:
            found.append(watch(source))
        except DataError as error:
            say(f"not looked for in the training rows: {error}")
    return found


def finding(seen: Watch, limit: Limit) -> Iterator[Finding]:
    """What of a set is in the training rows."""
    known, some = seen.known()
    if some:
        says = (
            f"of {seen.watched.name} are in the training rows: half or more of their runs of {NGRAM} words, or "
            f"all of a shorter text; {some:,} share at least one run"
        )
        yield Finding("contaminated", len(known), len(seen.watched.where), says, tuple(known[:PLACES]),
                      {"set": seen.watched.name, "any": some}, limit("contaminated"))  # fmt: skip


def _records(wanted: Source) -> Iterator[tuple[str, Iterator[str]]]:
    """Where each record stands, and its texts: turn by turn where it is of a known format, as they are where not."""
    wanted = described(wanted).model_copy(update={"pairs": "all"})  # every answer of several
    try:
        opened = open_source(wanted, None)
    except DataError:  # of no known format, which an evaluation set may be; what cannot be read is refused here:
        for record in sources.read(wanted):
            yield record.where, _asked(sources.adapt(record.value, wanted))
        return
    for record in opened.records:
        try:
            yield record.where, _asked(rows_of(record, opened))
        except Defect:
            yield record.where, _asked(record.value)


def _asked(value: Any) -> Iterator[str]:
    """Every text of a record but its system turns, which evaluation and training may well share."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict) and "system" not in (value.get("role"), value.get("from")):
        for name, item in value.items():
            if name not in ("role", "from", "system"):
                yield from _asked(item)
    elif isinstance(value, list):
        for item in value:
            yield from _asked(item)
