"""`data.eval_fraction`: which rows are held out of training.

    held = hold_out(rows, 0.02, seed=1)
    rows.pick(held.places), held.says

Rows that share a prompt fall on one side: a model that has learnt three answers to a question is not tested by the
fourth. The prompt is what stands before the first answer (of a document all of it), without regard to case and
punctuation, which is at least as wide as what `leak` counts. Prompts are taken in an order that the seed and their own
words decide, so neither the order of the rows nor that of the files changes what is held out.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.data import words
from alignment.data.remedies import Flags, Found, Numbers, shown
from alignment.errors import DataError


@dataclass(frozen=True)
class HeldOut:
    """What is held out.

    Attributes:
        places: of the rows, ascending.
        rows, prompts: how many there were to choose from; taken: how many prompts are held out.
    """

    places: Numbers
    rows: int
    prompts: int
    taken: int

    @property
    def says(self) -> str:
        """The counts in one line."""
        text = f"held out {len(self.places):,} of {self.rows:,} rows for evaluation (data.eval_fraction)"
        if self.prompts == self.rows:
            return text
        return f"{text}: {self.taken:,} of {self.prompts:,} prompts, whose rows stay together"


def hold_out(rows: Sequence[Found], fraction: float, seed: int) -> HeldOut:
    """Choose whole prompts until `fraction` of the rows is held out (at least one row).

    Where rows share prompts it may be fewer rows than that, and is never more.

    Raises:
        DataError: nothing would be left to train on, or no prompt has as few rows as are to be held out.
    """
    count = len(rows)
    wanted = max(1, round(fraction * count))
    if wanted >= count:
        raise DataError(f"data.eval_fraction {fraction:g} of {count:,} rows leaves nothing to train on")
    keys = np.fromiter((_key(found, seed) for found in rows), np.uint64, count)
    _, group, sizes = np.unique(keys, return_inverse=True, return_counts=True)  # by key: the order of the draw
    room = wanted
    taken: Flags = np.zeros(len(sizes), np.bool_)
    for index in np.flatnonzero(sizes <= wanted).tolist():
        if sizes[index] <= room:
            taken[index] = True
            room -= int(sizes[index])
            if not room:
                break
    if not taken.any():
        raise DataError(_none_fits(fraction, wanted, count, sizes))
    return HeldOut(np.flatnonzero(taken[group]), count, len(sizes), int(taken.sum()))


def _none_fits(fraction: float, wanted: int, count: int, sizes: np.ndarray[Any, np.dtype[np.int64]]) -> str:
    said = (
        f"data.eval_fraction {fraction:g} of {count:,} rows is {wanted:,}, and rows of one prompt are held out together"
    )
    if len(sizes) == 1:
        return f"{said}: all rows have the same prompt; give rows with other prompts as data.eval"
    smallest = int(sizes.min())
    least = math.ceil(smallest / count * 10_000) / 10_000
    return (
        f"{said}: the rarest of {len(sizes):,} prompts has {smallest:,}; raise it to {least:g} or more, or give "
        "held-out rows as data.eval"
    )


def _key(found: Found, seed: int) -> int:
    """A number for the prompt of a row: the place of the prompt in the draw."""
    said = "\0".join(" ".join(words.split(text)) for text in shown(found.row))
    digest = hashlib.blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8, key=f"{seed}/eval".encode())
    return int.from_bytes(digest.digest(), "big")
