"""Texts as hashed words, in numpy: what duplicates, overlaps and the pair linter count with.

A row is a list of parts (prompt, chosen, rejected), a part a list of texts (its turns). `hashed` makes one flat array
of a batch of rows; `shingles`, `ngrams`, `digests` and `signatures` are made of it without a loop over words. The
hashes are the same in every process and on every machine.

MinHash is our own, some forty lines: `datasketch` hashes word by word in Python, a hundred times slower here, and
brings SciPy with it.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Words: TypeAlias = "np.ndarray[Any, np.dtype[np.uint64]]"
Index: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Short: TypeAlias = "np.ndarray[Any, np.dtype[np.uint16]]"

SHINGLE = 3  # words; what near duplicates are compared by
NGRAM = 13  # words; what leaks are found by (Brown et al. 2020, arXiv:2005.14165, appendix C)
HASHES = 64  # of a signature: the standard error of an estimated similarity of 0.8 is 0.05
BANDS = 16  # of four hashes: rows as alike as 0.8 share one with probability 0.9998, as 0.3 with 0.12
CACHED = 2**20  # words whose hash is remembered
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)

_ASCII = re.compile(r"\w+", re.ASCII)
_ANY = re.compile("[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]|[^\\W\u3040-\u30ff\u3400-\u9fff\uac00-\ud7a3]+")
_generator = np.random.default_rng(20)
_A = _generator.integers(0, 2**63, HASHES, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
_B = _generator.integers(0, 2**63, HASHES, dtype=np.uint64)


class _Hashes(dict[str, int]):
    """A 63-bit hash of each word, computed once."""

    def __missing__(self, word: str) -> int:
        if len(self) >= CACHED:
            self.clear()
        digest = hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        value = self[word] = int.from_bytes(digest, "little") >> 1
        return value


_HASHES = _Hashes()


def split(text: str) -> list[str]:
    """The words of a text in lower case, without punctuation; of Chinese, Japanese and Korean the characters."""
    return (_ASCII if text.isascii() else _ANY).findall(text.lower())


@dataclass(frozen=True)
class Hashed:
    """A batch of rows as one array of word hashes.

    Attributes:
        words: (W,) hashes; a text shorter than a shingle is filled up with zeros.
        texts: (T + 1,) where each text begins in `words`.
        parts: (P + 1,) where each part begins in `texts`; every row has the same number of parts.
        lengths: (T,) words of each text, without the zeros.
    """

    words: Words
    texts: Index
    parts: Index
    lengths: Index

    @property
    def part_words(self) -> Index:
        """(P + 1,) where each part begins in `words`."""
        starts: Index = self.texts[self.parts]
        return starts


def hashed(rows: Sequence[Sequence[Sequence[str]]]) -> Hashed:
    """Hash the words of rows -> parts -> texts; a part without texts counts as one empty text."""
    flat: list[int] = []
    texts, parts, lengths = [0], [0], []
    for row in rows:
        for part in row:
            for text in part or ("",):
                words = split(text)
                lengths.append(len(words))
                flat += map(_HASHES.__getitem__, words)
                if len(words) < SHINGLE:
                    flat += [0] * (SHINGLE - len(words))
                texts.append(len(flat))
            parts.append(len(texts) - 1)
    return Hashed(np.array(flat, np.uint64), np.array(texts), np.array(parts), np.array(lengths, np.int64))


def _mixed(values: Words) -> Words:
    """The finalizer of SplitMix64: sums of products become evenly spread."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Words = values ^ (values >> np.uint64(31))
    return mixed


def grams(found: Hashed, size: int) -> tuple[Words, Index]:
    """The hash of every run of `size` words inside one text, and the text of each: (G,), (G,)."""
    count = len(found.words) - size + 1
    if count <= 0:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    values = found.words[:count].copy()
    for step in range(1, size):
        values = values * MULTIPLIER + found.words[step : count + step]
    owner: Index = np.repeat(np.arange(len(found.lengths)), np.diff(found.texts))
    inside = owner[:count] == owner[size - 1 :]
    return _mixed(values[inside]), owner[:count][inside]


def digests(found: Hashed) -> Words:
    """One hash for each text, of its words in order: (T,). Texts that differ in case or punctuation have the same."""
    sizes = np.diff(found.texts)
    place = np.arange(len(found.words)) - np.repeat(found.texts[:-1], sizes)
    powers = np.cumprod(np.full(int(sizes.max(initial=0)) + 1, MULTIPLIER, np.uint64), dtype=np.uint64)
    sums: Words = np.add.reduceat(found.words * powers[place], found.texts[:-1])
    return _mixed(sums + found.lengths.astype(np.uint64))


def part_digests(found: Hashed) -> Words:
    """One hash for each part, of its texts in order: (P,)."""
    single = digests(found)
    sizes = np.diff(found.parts)
    place = np.arange(len(single)) - np.repeat(found.parts[:-1], sizes)
    powers = np.cumprod(np.full(int(sizes.max(initial=0)) + 1, MULTIPLIER, np.uint64), dtype=np.uint64)
    sums: Words = np.add.reduceat(single * powers[place], found.parts[:-1])
    return _mixed(sums)


def signatures(found: Hashed, parts_per_row: int) -> tuple[Short, Words]:
    """MinHash signatures of every part, (R, parts, HASHES), and the keys of the bands of every row, (R, BANDS).

    The share of equal hashes in two signatures estimates the Jaccard similarity of the sets of shingles. The signature
    of a row is the minimum of its parts'; 16 bits of each hash are kept.

    Source: Broder 1997, On the resemblance and containment of documents; Li & König 2010 (arXiv:0908.4370) for keeping
    a few bits.
    """
    values, owner = grams(found, SHINGLE)
    part_of_text: Index = np.repeat(np.arange(len(found.parts) - 1), np.diff(found.parts))
    parts: Index = np.arange(len(found.parts) - 1)
    starts = np.searchsorted(part_of_text[owner], parts)
    least: np.ndarray[Any, np.dtype[np.uint32]] = np.empty((len(parts), HASHES), np.uint32)
    for index in range(HASHES):
        least[:, index] = np.minimum.reduceat((values * _A[index] + _B[index]) >> np.uint64(32), starts)
    by_row = least.reshape(-1, parts_per_row, HASHES)
    whole = by_row.min(axis=1).astype(np.uint64).reshape(len(by_row), BANDS, -1)
    keys = whole[:, :, 0]
    for column in range(1, whole.shape[2]):
        keys = keys * MULTIPLIER + whole[:, :, column]
    return by_row.astype(np.uint16), _mixed(keys + np.arange(BANDS, dtype=np.uint64))


def similarity(first: Short, second: Short) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Estimated similarity of signatures along the last axis."""
    return (first == second).mean(axis=-1)
