"""What a recipe does to rows on purpose: `on_system`, `filter`, `dedupe`, `prune`, `max_pairs_per_prompt`, `balance`,
`augment`, in this order. Every row that goes is counted with its reason beside the defects, and every row that is
changed or added under `changed`; neither counts against `data.limits`.

`on_system` holds for held-out rows too: the model meets there what it meets in training. All else is for `data.train`
alone; `augment` comes after `eval_fraction` has taken its rows, so that no copy of a training row is held out.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import unicodedata
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias, overload

import numpy as np

from alignment.data import languages, sources
from alignment.data.checks import CHOSEN_BY_USER, Defect, Message, Tally, check_row, strings
from alignment.data.hooks import load_hook
from alignment.data.spool import Spool
from alignment.errors import DataError
from alignment.recipe.algorithms import Schema
from alignment.recipe.schema import SCRIPTS, Balance, Data, Filter, Prune, Range

Row = dict[str, Any]
Numbers: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Flags: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"

# Why a remedy takes a row; the report and the log use these words beside those of `checks.REASONS`.
TAKEN: dict[str, str] = {
    "filtered-length": "an answer shorter or longer than data.filter.length",
    "filtered-column": "a column whose value data.filter.columns does not let through, or that is not there",
    "filtered-pattern": "text that data.filter.matches wants and that is absent, or that data.filter.excludes found",
    "filtered-script": "letters of other scripts than data.filter.scripts",
    "filtered-language": "an answer in another language than data.filter.languages",
    "duplicate": "the same row, or the same prompt, stands earlier (data.dedupe)",
    "pruned": "outside the share that data.prune keeps",
    "prune-no-number": "no number in the column that data.prune looks at",
    "too-many-for-prompt": "more rows of one prompt than data.max_pairs_per_prompt",
    "balanced-away": "more rows of one value than data.balance leaves",
    "augmented-away": "a function of data.augment returned nothing for it",
}
ANSWERS = ("chosen", "rejected", "completion")
LETTERS_OF_SCRIPT = 0.9


@dataclass(frozen=True)
class Found:
    """A normalised row, where it stands, the index of its source, and the columns that a remedy looks at."""

    row: Row
    where: str
    source: int
    columns: Row = field(default_factory=dict, compare=False)


@dataclass
class Account(Tally):
    """What became of the rows of one source, remedies included."""

    changed: Counter[str] = field(default_factory=Counter)

    @property
    def defective(self) -> int:
        """Dropped rows that are the fault of the data."""
        asked = CHOSEN_BY_USER | TAKEN.keys()
        return sum(count for reason, count in self.dropped.items() if reason not in asked)

    @property
    def taken(self) -> dict[str, int]:
        """Rows that a remedy took, by reason."""
        return {reason: count for reason, count in self.dropped.most_common() if reason in TAKEN}


# --- row by row -----------------------------------------------------------------------------------------------------


def settle_system(row: Row, how: str, where: str, account: Account) -> Row:
    """A row with its system turn as `data.on_system` wants it.

    Raises:
        DataError: it has one, and `how` is error.
    """
    column = "messages" if "messages" in row else "prompt"
    turns: list[Message] = row.get(column) or []
    if how == "keep" or not isinstance(turns, list) or not turns or turns[0]["role"] != "system":
        return row
    if how == "error":
        raise DataError(f"{where}: has a system turn, and data.on_system is error")
    rest = turns[1:]
    if how == "merge" and turns[0]["content"].strip():
        if not rest or rest[0]["role"] != "user":
            raise Defect("starts-with-assistant", "no user turn to merge the system turn into")
        rest = [{**rest[0], "content": f"{turns[0]['content']}\n\n{rest[0]['content']}"}, *rest[1:]]
    account.changed["system-merged" if how == "merge" else "system-dropped"] += 1
    return {**row, column: rest}


def column_passes(record: Row, wanted: Filter | None) -> bool:
    """Whether the columns of a record are as `filter.columns` wants them."""
    return wanted is None or all(
        name in record and _passes(record[name], rule) for name, rule in wanted.columns.items()
    )


def _passes(value: Any, rule: Any) -> bool:
    if isinstance(rule, Range):
        number = as_number(value)
        return (
            number is not None and (rule.min is None or number >= rule.min) and (rule.max is None or number <= rule.max)
        )
    return any(_equal(value, one) for one in (rule if isinstance(rule, list) else [rule]))


def _equal(value: Any, wanted: Any) -> bool:
    """Equality in which true is not 1, and a CSV file's `true` and `3` are what they spell."""
    if isinstance(value, str) and not isinstance(wanted, str):
        if isinstance(wanted, bool):
            return value.strip().lower() == str(wanted).lower()
        return as_number(value) == wanted
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


def as_number(value: Any) -> float | None:
    """A finite number, also one that is spelled; None for all else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    return float(value)


def filtered(row: Row, wanted: Filter) -> str | None:
    """Why a filter takes a row of any schema; None where it does not."""
    if wanted.length is not None:
        least, most = wanted.length.min or 0, wanted.length.max
        for text in _answers(row):
            if len(text) < least or (most is not None and len(text) > most):
                return "filtered-length"
    said = _said(row)
    if wanted.matches is not None and not any(re.search(wanted.matches, text) for text in said):
        return "filtered-pattern"
    if wanted.excludes is not None and any(re.search(wanted.excludes, text) for text in said):
        return "filtered-pattern"
    if wanted.scripts is not None and not _in_scripts("\n".join(said), wanted.scripts):
        return "filtered-script"
    if wanted.languages is not None:
        found = languages.of("\n".join(_answers(row)))
        if found is not None and found not in wanted.languages:
            return "filtered-language"
    return None


def _turns(row: Row) -> list[Message]:
    return [turn for name in ("messages", "prompt", *ANSWERS) for turn in row.get(name) or ()]


def _said(row: Row) -> list[str]:
    return [row["text"]] if "text" in row else [turn["content"] for turn in _turns(row)]


def _answers(row: Row) -> list[str]:
    """The answers of a row; of a row without any, its text or its prompt."""
    if "messages" in row:
        return [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
    found = [turn["content"] for name in ANSWERS for turn in row.get(name) or ()]
    return found or ["\n".join(_said(row))]


@lru_cache(maxsize=2**16)
def _script(letter: str) -> str:
    return unicodedata.name(letter, "").partition(" ")[0]


def _in_scripts(text: str, names: Sequence[str]) -> bool:
    """Whether nearly all letters are of these scripts; a text without letters is of every script."""
    words = {word for name in names for word in SCRIPTS[name]}
    counts = Counter(_script(letter) for letter in text if letter.isalpha())
    return sum(counts[word] for word in words) >= LETTERS_OF_SCRIPT * counts.total()


# --- over all rows --------------------------------------------------------------------------------------------------


class Rows(Sequence[Found]):
    """Rows in a spool, of which some are chosen, in an order: 20 bytes of memory for each, and none of their text.

    A slice is again such a choice. `add` is for the one who fills the spool.
    """

    def __init__(self, spool: Spool[tuple[Row, str, Row]], sources: array[int], chosen: Numbers) -> None:
        self._spool, self._sources, self._chosen = spool, sources, chosen

    @classmethod
    def of(cls, found: Iterable[Found]) -> Rows:
        """All of some rows."""
        spool, of = Spool[tuple[Row, str, Row]](), array("i")
        for one in found:
            spool.append((one.row, one.where, one.columns))
            of.append(one.source)
        return cls(spool, of, np.arange(len(spool)))

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> Found: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Found | Rows:
        if isinstance(index, slice):
            return Rows(self._spool, self._sources, self._chosen[index])
        at = int(self._chosen[index])
        row, where, columns = self._spool[at]
        return Found(row, where, self._sources[at], columns)

    def pick(self, places: Sequence[int] | Numbers) -> Rows:
        """The rows at some places, in the order of these."""
        return Rows(self._spool, self._sources, self._chosen[np.asarray(places, np.int64)])

    @property
    def sources(self) -> Numbers:
        """(N,) the index of the source of each."""
        found: Numbers = np.asarray(self._sources, np.int64)[self._chosen]
        return found


def looked_at(data: Data) -> set[str]:
    """The columns of the file that remedies over all rows need."""
    names = {remedy.by for remedy in (data.balance, data.prune) if remedy is not None}
    return names | ({"score_chosen", "score_rejected"} if "margin" in names else set())


def thin(rows: Rows, accounts: Sequence[Account], data: Data, seed: int) -> Rows:
    """The rows without those that dedupe, prune and max_pairs_per_prompt take."""
    if data.dedupe is not None:
        rows = _without_repeats(rows, data.dedupe, accounts)
    if data.prune is not None:
        rows = _pruned(rows, data.prune, accounts)
    if data.max_pairs_per_prompt is not None:
        rows = _at_most(rows, data.max_pairs_per_prompt, prompt_of, "too-many-for-prompt", accounts, seed)
    return rows


def balanced(rows: Rows, wanted: Balance, accounts: Sequence[Account], seed: int) -> Rows:
    """The rows, with at most so many of each value of a column."""
    counts, there = Counter[str](), False
    for found in rows:
        counts[_value(found, wanted.by)] += 1
        there = there or found.columns.get(wanted.by) is not None
    if len(rows) and not there:
        raise DataError(f"data.balance.by: no row has a column {wanted.by!r}")
    most = wanted.rows or min(counts.values(), default=1)
    return _at_most(rows, most, lambda found: _value(found, wanted.by), "balanced-away", accounts, seed)


def _value(found: Found, name: str) -> str:
    return json.dumps(found.columns.get(name), sort_keys=True, default=str)


def asked(row: Row) -> list[Message]:
    """The turns of a conversation that stand before the first answer."""
    if "prompt" in row:
        return list(row["prompt"])
    turns: list[Message] = row["messages"]
    return list(itertools.takewhile(lambda turn: turn["role"] != "assistant", turns))


def shown(row: Row) -> list[str]:
    """The texts of a row that an answer is given to; of a document all of it."""
    return [row["text"]] if "text" in row else [turn["content"] for turn in asked(row)]


def prompt_of(found: Found) -> str:
    """What stands before the first answer, as one text."""
    row = found.row
    if "text" in row:
        return str(row["text"])
    return json.dumps([[turn["role"], turn["content"].strip()] for turn in asked(row)])


def _content(found: Found) -> str:
    """All that is learned from a row, without the space around texts."""
    kept = {key: value for key, value in found.row.items() if key in ("text", "messages", "prompt", *ANSWERS, "label",
                                                                      "tools")}  # fmt: skip
    return json.dumps([text.strip() for text in strings(kept)] + [kept.get("label")])


def _mark(text: str) -> bytes:
    """What is kept of a text to know it again: some 130 bytes of memory in a set or a mapping."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _without_repeats(rows: Rows, what: str, accounts: Sequence[Account]) -> Rows:
    key = _content if what == "rows" else prompt_of
    seen: set[bytes] = set()
    kept = array("q")
    for index, found in enumerate(rows):
        mark = _mark(key(found))
        if mark in seen:
            accounts[found.source].drop("duplicate", found.where)
        else:
            seen.add(mark)
            kept.append(index)
    return rows.pick(kept)


def _pruned(rows: Rows, wanted: Prune, accounts: Sequence[Account]) -> Rows:
    """The share of the rows whose number is highest, lowest, or in the middle."""
    numbers = np.fromiter(
        (math.nan if (number := _number(found, wanted.by)) is None else number for found in rows), np.float64, len(rows)
    )
    there = np.flatnonzero(~np.isnan(numbers))
    if len(rows) and not len(there):
        hint = "; `alignment data score` writes it" if wanted.by == "loss" else ""
        raise DataError(f"data.prune.by: no row has a number in a column {wanted.by!r}{hint}")
    order = there[np.argsort(numbers[there], kind="stable")]
    count = max(1, round(wanted.keep * len(order)))
    first = {"highest": len(order) - count, "lowest": 0, "middle": (len(order) - count) // 2}[wanted.side]
    kept: Flags = np.zeros(len(rows), np.bool_)
    kept[order[first : first + count]] = True
    for index in np.flatnonzero(~kept):
        found = rows[int(index)]
        accounts[found.source].drop("prune-no-number" if np.isnan(numbers[index]) else "pruned", found.where)
    return rows.pick(np.flatnonzero(kept))


def _number(found: Found, name: str) -> float | None:
    number = as_number(found.columns.get(name))
    if number is None and name == "margin":
        chosen, rejected = (as_number(found.columns.get(f"score_{which}")) for which in ("chosen", "rejected"))
        number = None if chosen is None or rejected is None else chosen - rejected
    return number


def _at_most(
    rows: Rows, most: int, key: Callable[[Found], str], reason: str, accounts: Sequence[Account], seed: int
) -> Rows:
    """The rows with at most so many of each key, drawn with the seed, in their order."""
    groups: dict[bytes, array[int]] = {}
    for index, found in enumerate(rows):
        groups.setdefault(_mark(key(found)), array("q")).append(index)
    kept: Flags = np.ones(len(rows), np.bool_)
    for group in groups.values():
        if len(group) > most:
            kept[group] = False
            kept[sources.take(group, most, seed, reason, key(rows[group[0]]))] = True
    for gone in rows.pick(np.flatnonzero(~kept)):
        accounts[gone.source].drop(reason, gone.where)
    return rows.pick(np.flatnonzero(kept))


# --- functions of the user ------------------------------------------------------------------------------------------


def augmented(rows: Rows, hooks: Sequence[str], schema: Schema, accounts: Sequence[Account]) -> Rows:
    """The rows that functions make of each row: `fn(row) -> list of rows`; a returned row must be one of the schema.

    Raises:
        RecipeError: a function cannot be imported.
        DataError: it fails, or returns what cannot be trained on; the line names the row.
    """
    for hook in hooks:
        rows = Rows.of(_made(rows, hook, schema, accounts))
    return rows


def _made(rows: Rows, hook: str, schema: Schema, accounts: Sequence[Account]) -> Iterator[Found]:
    """What one function makes of the rows."""
    function = load_hook(hook, "data.augment")
    for found in rows:
        copy = json.loads(json.dumps(found.row, default=str))
        try:
            results = function(copy)
        except Exception as error:  # whatever a user's function raises
            raise DataError(f"{found.where}: {hook} failed: {type(error).__name__}: {error}") from error
        if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
            raise DataError(f"{found.where}: {hook} must return a list of rows, not {type(results).__name__}")
        try:
            for result in results:
                check_row(result, schema)
        except (Defect, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{found.where}: {hook} returned what is no row of {schema}: {error}") from None
        account = accounts[found.source]
        if not results:
            account.drop("augmented-away", found.where)
        account.changed["augmented"] += sum(result != found.row for result in results)
        for result in results:
            yield Found(result, found.where, found.source, found.columns)
