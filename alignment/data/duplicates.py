"""Rows that repeat others: exact and near duplicates, rows held out that were learnt, evaluation sets in the training
rows.

`Memory` keeps what is needed of rows that go by in batches: hashes, no text (some 600 bytes on disk for a pair). Two
rows are exact duplicates when they hold the same turns, near duplicates when each of their parts (prompt, answer, ...)
shares four fifths of its three-word shingles, as MinHash estimates it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from alignment.data import words
from alignment.data.spool import Numbers, Spool
from alignment.data.words import Hashed, Index, Short, Words

NEAR = 0.8
HALF = 0.5  # share of a text's n-grams from which on it counts as known
BITS = 22  # of the table that is asked before the sorted list of n-grams
PAIRS = 2**16  # signatures compared at once

Row = Mapping[str, Any]
PARTS: dict[str, tuple[str, ...]] = {
    "text": ("text",),
    "messages": ("prompt", "answer"),
    "prompts": ("prompt",),
    "unpaired": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
}


def parts(row: Row, schema: str) -> list[list[str]]:
    """The texts of a row by parts; of a conversation the last turn is the answer."""
    if schema == "text":
        return [[row["text"]]]
    if schema == "messages":
        said = [_said(turn) for turn in row["messages"]]
        return [said[:-1], said[-1:]]
    return [[_said(turn) for turn in row[name]] for name in PARTS[schema]]


def _said(turn: Row) -> str:
    calls = turn.get("tool_calls")
    content: str = turn["content"]
    return f"{content} {json.dumps(calls, ensure_ascii=False, sort_keys=True)}" if calls else content


def exact(row: Row, schema: str) -> int:
    """A hash of the turns of a row, to the letter; other columns do not count."""
    named = ("text",) if schema == "text" else ("messages",) if schema == "messages" else PARTS[schema]
    held = [row["text"]] if schema == "text" else [[_turn(turn) for turn in row[name]] for name in named]
    text = json.dumps([held, row.get("label")] if schema == "unpaired" else held, ensure_ascii=False)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _turn(turn: Row) -> list[Any]:
    return [turn["role"], turn["content"], turn.get("tool_calls"), turn.get("reasoning_content")]


class Memory:
    """What is kept of the rows of a split: of each some 12 bytes in memory, and hashes in temporary files."""

    def __init__(self, schema: str) -> None:
        count = len(PARTS[schema])
        self.schema = schema
        self.where: Spool[str] = Spool()
        self._sources, self._exact = Numbers(np.int32), Numbers(np.uint64)
        self._parts, self._signatures = Numbers(np.uint64, count), Numbers(np.uint16, count, words.HASHES)
        self._bands = [Numbers(np.uint64) for _ in range(words.BANDS)]

    def add(self, rows: Sequence[Row], where: Sequence[str], source: int, found: Hashed) -> None:
        """Remember a batch of rows; `found` are their hashed parts."""
        signatures, bands = words.signatures(found, len(PARTS[self.schema]))
        self.where.extend(where)
        self._sources.add([source] * len(rows))
        self._exact.add([exact(row, self.schema) for row in rows])
        self._parts.add(words.part_digests(found))
        self._signatures.add(signatures)
        for numbers, band in zip(self._bands, bands.T, strict=True):
            numbers.add(band)

    def __len__(self) -> int:
        return len(self.where)

    @property
    def sources(self) -> Index:
        """(N,) the index of the source of each row."""
        found: Index = self._sources.array
        return found

    @property
    def exact(self) -> Words:
        """(N,) a hash of each row, to the letter."""
        found: Words = self._exact.array
        return found

    @property
    def parts(self) -> Words:
        """(N, parts) digests of the parts, without regard to case and punctuation."""
        found: Words = self._parts.array
        return found

    @property
    def signatures(self) -> Short:
        """(N, parts, HASHES) MinHash signatures of the parts."""
        found: Short = self._signatures.array
        return found

    def band(self, index: int) -> Words:
        """(N,) the keys of one band."""
        found: Words = self._bands[index].array
        return found


# --- within one split -----------------------------------------------------------------------------------------------


def first_of(values: Words) -> Index:
    """For each value the index of the first that is equal to it; its own where it is the first."""
    _, firsts, inverse = np.unique(values, return_index=True, return_inverse=True)
    earliest: Index = firsts[inverse]
    return earliest


def near_first(memory: Memory) -> Index:
    """For each row an earlier row that it nearly repeats, or its own index.

    Rows of one bucket of a band are compared with the first of it and with the one before them.
    """
    signatures = memory.signatures
    nearest = np.arange(len(memory))
    for band in range(words.BANDS):
        keys = memory.band(band)
        order = np.argsort(keys, kind="stable")
        keys = keys[order]
        same = np.concatenate([[False], keys[1:] == keys[:-1]])
        begin = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        at = np.flatnonzero(same)
        for earlier in (order[begin[at]], order[at - 1]):
            later = order[at]
            open_ = nearest[later] == later
            left, right = earlier[open_], later[open_]
            for start in range(0, len(left), PAIRS):
                one, two = left[start : start + PAIRS], right[start : start + PAIRS]
                alike = words.similarity(signatures[one], signatures[two]).min(axis=1) >= NEAR
                nearest[two[alike]] = one[alike]
    return nearest


# --- between rows and what they are held against --------------------------------------------------------------------


@dataclass(frozen=True)
class Watched:
    """Texts that training rows should not hold: what they are called, where each stands, and its hashed words."""

    name: str
    where: tuple[str, ...]
    texts: Hashed
    _grams: Words
    _owner: Index
    _order: Words
    _table: np.ndarray[Any, np.dtype[np.bool_]]

    @classmethod
    def of(cls, name: str, where: Sequence[str], rows: Sequence[Sequence[str]]) -> Watched:
        """Watch for rows, each a list of texts."""
        found = words.hashed([[list(row)] for row in rows])
        values, owner = words.grams(found, words.NGRAM)
        row_of_text: Index = np.repeat(np.arange(len(rows)), np.diff(found.parts))
        table = np.zeros(2**BITS, np.bool_)
        table[values & np.uint64(2**BITS - 1)] = True
        return cls(name, tuple(where), found, values, row_of_text[owner], np.unique(values), table)


@dataclass
class Watch:
    """What of the watched texts was seen in the rows that went by."""

    watched: Watched
    _seen: np.ndarray[Any, np.dtype[np.bool_]] = field(init=False)
    _short: set[int] = field(init=False)
    _met: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._seen = np.zeros(len(self.watched._order), np.bool_)
        self._short = set(self._short_digests()[0].tolist())

    def _short_digests(self) -> tuple[Words, Index]:
        """The digest of the longest text of each row that has none as long as an n-gram, and the row.

        Below three words a text is nobody's own: "Yes." is in every file.
        """
        found = self.watched.texts
        row_of_text: Index = np.repeat(np.arange(len(found.parts) - 1), np.diff(found.parts))
        order = np.lexsort((-found.lengths, row_of_text))  # by row, the longest first
        longest = order[np.unique(row_of_text[order], return_index=True)[1]]
        short = longest[(found.lengths[longest] < words.NGRAM) & (found.lengths[longest] >= words.SHINGLE)]
        return words.digests(found)[short], row_of_text[short]

    def look(self, found: Hashed) -> None:
        """Note which of the watched texts are in a batch of rows."""
        watched = self.watched
        if len(watched._order):
            values, _ = words.grams(found, words.NGRAM)
            values = values[watched._table[values & np.uint64(2**BITS - 1)]]
            at = np.minimum(np.searchsorted(watched._order, values), len(watched._order) - 1)
            self._seen[at[watched._order[at] == values]] = True
        if self._short:
            self._met |= self._short & set(words.digests(found).tolist())

    def known(self) -> tuple[list[str], int]:
        """Where the texts stand that the rows hold (half of the n-grams, or all of a short text), and how many share
        at least one n-gram."""
        watched = self.watched
        total, seen = np.zeros(len(watched.where)), np.zeros(len(watched.where))
        np.add.at(total, watched._owner, 1)
        if len(watched._grams):
            hits = self._seen[np.searchsorted(watched._order, watched._grams)]
            np.add.at(seen, watched._owner, hits)
        half = (total > 0) & (seen >= HALF * np.maximum(total, 1))
        equal: np.ndarray[Any, np.dtype[np.bool_]] = np.zeros(len(watched.where), np.bool_)
        for digest, row in zip(*(column.tolist() for column in self._short_digests()), strict=True):
            equal[row] = digest in self._met
        return [watched.where[index] for index in np.flatnonzero(half | equal)], int(((seen > 0) | equal).sum())


def leaked(prompts: Words, known: Words) -> Index:
    """Indices of the held-out prompts that are prompts of training rows too."""
    found: Index = np.flatnonzero(np.isin(prompts, known))
    return found
