"""Rows of made-up words without meaning, the same for a seed: what the tests of this folder plant faults into.

`conftest.py` puts this folder on the path: `from made_rows import pair, prose`.
"""

from __future__ import annotations

import random
from typing import Any

WORDS = [f"{a}{b}{c}" for a in "bdfgklmnpr" for b in "aeiou" for c in ("n", "s", "t", "rk", "lm", "nd")]


def prose(seed: int, count: int = 30) -> str:
    """A text of so many words; no two seeds have a run of words in common."""
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def pair(seed: int, **columns: Any) -> dict[str, Any]:
    """A pair as a file holds it."""
    return {"prompt": prose(3 * seed), "chosen": prose(3 * seed + 1), "rejected": prose(3 * seed + 2), **columns}


def talk(*texts: str) -> dict[str, Any]:
    """A conversation in which user and assistant take turns."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[index % 2], "content": text} for index, text in enumerate(texts)]}


def talks(count: int = 100, start: int = 0) -> list[dict[str, Any]]:
    """Conversations of a question and an answer."""
    return [talk(prose(2 * seed), prose(2 * seed + 1)) for seed in range(start, start + count)]
