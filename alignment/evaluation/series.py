"""A log of numbers, and what can be said of it beyond its noise.

    series = read(Path("runs/quickstart/dpo/log.jsonl"))
    print(change(series, "loss"))         # loss 0.71 in the first fifth, 0.55 in the last (noise 0.03)

Numbers are compared as medians of the first and the last fifth. A change counts when it is larger than what the scatter
of single lines would give; to call a number flat, its order must show no trend either. The log is read while a run
writes it, so its last line may be cut.
"""

from __future__ import annotations

import json
import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from alignment.errors import DataError
from alignment.pipeline.files import storage

LINES = 10  # logged lines: a fifth of fewer is a single line, and its median no median
NOISES = 4.0  # standard errors: some twenty rules look at each stage, so that 2 would cry wolf in every second run
TREND = 2.0  # standard errors: a number without trend is further off in one of twenty logs

Points = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class Series:
    """The entries of a log in their order; `cut`: its last line was incomplete and is left out."""

    entries: tuple[dict[str, Any], ...]
    cut: bool = False

    def points(self, key: str) -> Points:
        """The finite values of a key with their steps."""
        found = [(entry["step"], entry[key]) for entry in self.entries if is_number(entry.get(key))]
        return [(step, float(value)) for step, value in found if math.isfinite(value)]


def read(path: Path) -> Series | None:
    """Read a `log.jsonl`; None if there is none.

    Raises:
        DataError: a line before the last is no entry with a step.
        StorageError: the file cannot be read.
    """
    if not path.exists():
        return None
    with storage(path, "read"):
        lines = path.read_bytes().splitlines()
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            entries.append({**entry, "step": int(entry["step"])})
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                return Series(tuple(entries), cut=True)
            raise DataError(f"{path}:{number}: damaged: no JSON object with a step") from error
    return Series(tuple(entries))


def is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Change:
    """How a key moves over a run.

    Attributes:
        first, middle, last: medians of these fifths of its values.
        noise: the least change between two fifths that is no noise.
        trend: standard errors of the rank correlation of values and their order; in noise it is normal with mean 0.
        steps: from, to.
    """

    key: str
    first: float
    middle: float
    last: float
    noise: float
    trend: float
    steps: tuple[int, int]

    @property
    def rises(self) -> bool:
        """It does, beyond doubt."""
        return self.last - self.first > self.noise

    @property
    def falls(self) -> bool:
        """It does, beyond doubt."""
        return self.first - self.last > self.noise

    @property
    def may_rise(self) -> bool:
        """There are signs of it: what is only noisy must not be called flat."""
        return self.rises or self.trend > TREND

    @property
    def may_fall(self) -> bool:
        """There are signs of it."""
        return self.falls or self.trend < -TREND

    def __str__(self) -> str:
        return f"{self.key} {self.first:.3g} in the first fifth, {self.last:.3g} in the last (noise {self.noise:.2g})"


def change(series: Series, key: str) -> Change:
    """Compare the fifths of a key that is logged at least twice.

    One line's deviation is taken from neighbouring lines (the median absolute difference, times 1.4826 / sqrt 2 where
    they are normal), so that a trend is not counted as noise; the median of k of them errs by 1.2533 / sqrt k of it.
    """
    points = series.points(key)
    values = [value for _, value in points]
    fifth, half = max(1, len(values) // 5), len(values) // 2
    steps = [abs(after - before) for before, after in pairwise(values)]
    deviation = 1.4826 / math.sqrt(2) * statistics.median(steps)
    return Change(
        key=key,
        first=statistics.median(values[:fifth]),
        middle=statistics.median(values[half - fifth // 2 :][:fifth]),
        last=statistics.median(values[-fifth:]),
        noise=NOISES * 1.2533 * deviation * math.sqrt(2 / fifth),
        trend=spearman(range(len(values)), values) * math.sqrt(len(values) - 1),
        steps=(points[0][0], points[-1][0]),
    )


def rank_correlation(series: Series, one: str, other: str) -> float:
    """Spearman's, of two keys over the lines that have both."""
    a, b = dict(series.points(one)), dict(series.points(other))
    both = sorted(a.keys() & b.keys())
    return spearman([a[step] for step in both], [b[step] for step in both])


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """The rank correlation of two sequences of one length; 0 where one of them is constant or has no two values."""
    try:
        return statistics.correlation(_ranks(one), _ranks(other))
    except statistics.StatisticsError:
        return 0.0


def _ranks(values: Sequence[float]) -> list[float]:
    """Equal values share the mean of their ranks."""
    ordered = sorted(values)
    return [(bisect_left(ordered, value) + bisect_right(ordered, value) - 1) / 2 for value in values]
