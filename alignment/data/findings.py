"""What a data report says: one `Finding` for each check that saw something, with its count, its share and its rows.

A check is known by a stable name in kebab case (`near-duplicate`), the same in the terminal, in the JSON and, with
underscores, in `data.limits`. `Seen` counts while rows go by and remembers where the first few stood.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from alignment.data.checks import REASONS
from alignment.recipe.schema import DataLimits

# Every check that may be found beside the reasons for dropping rows (`checks.REASONS`). The report, `data.limits`, and
# the table in recipes/README.md use these words.
CHECKS: tuple[str, ...] = (
    "dropped",
    "duplicate", "near-duplicate", "leak", "leak-ngram", "contaminated",
    "control-character", "damaged-text", "special-token-in-content", "tool-call-without-answer", "secret",
    "personal-data",
    "near-equal-answers", "contradictory", "negative-margin", "zero-margin", "length-bias", "separable",
    "first-words-bias", "formatting-bias",
    "truncated", "unstopped", "untrained", "double-bos", "prompt-boundary", "template-proof",
)  # fmt: skip
Limit = Callable[[str], float | None]  # the largest share that `data.limits` allows a check
PLACES = 20  # rows that a finding names; its count is of all
Z = 1.959964  # two-sided 95 %


@dataclass(frozen=True)
class Finding:
    """What one check saw.

    Attributes:
        check: its stable name, one of `CHECKS` or of `checks.REASONS`.
        count: rows (or what `unit` says) that it saw.
        total: of how many.
        says: one sentence for a person; it quotes no row.
        rows: where the first `PLACES` of them stand: `file:line`, or `file[index]`.
        values: its numbers, for `--json`.
        limit: the largest share that `data.limits` allows; None where it only reports.
        value: what is compared with the limit, where that is not the share of rows.
    """

    check: str
    count: int
    total: int
    says: str
    rows: tuple[str, ...] = ()
    values: dict[str, Any] = field(default_factory=dict)
    limit: float | None = None
    value: float | None = None

    def __post_init__(self) -> None:
        assert self.check in CHECKS or self.check in REASONS, self.check

    @property
    def share(self) -> float:
        """The share of the rows."""
        return self.count / self.total if self.total else 0.0

    @property
    def passed_limit(self) -> bool:
        """Whether more was seen than the recipe allows."""
        return self.limit is not None and (self.share if self.value is None else self.value) > self.limit

    def as_dict(self) -> dict[str, Any]:
        """The finding for JSON."""
        found: dict[str, Any] = {
            "check": self.check, "count": self.count, "of": self.total, "share": self.share, "says": self.says,
            "rows": list(self.rows), "values": self.values, "limit": self.limit, "limit_passed": self.passed_limit,
        }  # fmt: skip
        return found


def limit_of(limits: DataLimits, *, strict: bool = False) -> Limit:
    """The largest share that each check may see; with `strict`, none may see anything."""

    def limit(check: str) -> float | None:
        found: float | None = 0.0 if strict else getattr(limits, check.replace("-", "_"), None)
        return found

    return limit


def line(finding: Mapping[str, Any]) -> str:
    """A finding (as `as_dict` gives it) in one line: how many, of what, and the limit that it passes."""
    if finding["check"] == "template-proof":
        return str(finding["says"])
    share = f" ({100 * finding['share']:.1f} %)" if finding["of"] > 1 else ""
    text = f"{finding['count']:,}{share} {finding['says']}"
    if finding["limit_passed"]:
        text += f". LIMIT PASSED (data.limits.{finding['check'].replace('-', '_')}: {finding['limit']:g})"
    return text


@dataclass
class Seen:
    """A count for each check, and the first places of each."""

    counts: Counter[str] = field(default_factory=Counter)
    places: dict[str, list[str]] = field(default_factory=dict)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)

    def add(self, check: str, where: str, *kinds: str) -> None:
        """Count one row; `kinds` are what was seen in it, counted apart."""
        self.counts[check] += 1
        places = self.places.setdefault(check, [])
        if len(places) < PLACES:
            places.append(where)
        if kinds:
            self.kinds.setdefault(check, Counter()).update(set(kinds))

    def finding(self, check: str, total: int, says: str, limit: float | None = None) -> Finding | None:
        """The finding of a check; None if it saw nothing. `{kinds}` in `says` becomes their counts."""
        if not self.counts[check]:
            return None
        kinds = self.kinds.get(check, Counter())
        listed = ", ".join(f"{kind} {count:,}" for kind, count in kinds.most_common())
        return Finding(
            check, self.counts[check], total, says.replace("{kinds}", listed), tuple(self.places[check]),
            {"kinds": dict(kinds.most_common())} if kinds else {}, limit,
        )  # fmt: skip


@dataclass(frozen=True)
class Share:
    """A share of `of` things with its 95 % interval."""

    value: float
    low: float
    high: float
    of: int

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} % [{100 * self.low:.1f}, {100 * self.high:.1f}]"

    def as_dict(self) -> dict[str, Any]:
        """For JSON; a share of nothing is null."""
        if not self.of:
            return {"value": None, "interval": None, "of": 0}
        return {"value": self.value, "interval": [self.low, self.high], "of": self.of}


def wilson(count: float, of: int) -> Share:
    """A share and the interval that holds the true one 95 times of 100; ties may count one half.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference.
    """
    if not of:
        return Share(math.nan, math.nan, math.nan, 0)
    share, spread = float(count) / of, Z * Z / of
    middle = (share + spread / 2) / (1 + spread)
    half = Z * math.sqrt(share * (1 - share) / of + spread / (4 * of)) / (1 + spread)
    return Share(share, max(0.0, middle - half), min(1.0, middle + half), of)
