"""The pair linter: what a preference model could learn from pairs other than which answer is better.

`Pairs` takes what it needs of batches of pairs; `findings` and `as_dict` say what it came to. Every accuracy and share
is given with its 95 % interval, and every classifier is judged on rows that it did not learn from.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from alignment.data import words
from alignment.data.duplicates import NEAR, Memory
from alignment.data.findings import PLACES, Finding, Limit, Share, wilson
from alignment.data.remedies import as_number
from alignment.data.spool import Numbers
from alignment.data.words import Hashed, Index, Words

FEATURES = 2**15  # buckets of the bag of words
LEARNT_FROM = 50_000  # pairs at most that the classifier sees
ENOUGH = 50  # pairs below which no bias is claimed
BIASED = 0.6  # accuracy from which on one glance at the length, or at the form, says too much
SEPARABLE = 0.9
OPENING = 3  # words
OPENINGS = 400_000  # different ones that are counted at a time
SCORES = (("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"), ("gold_chosen", "gold_rejected"))
RANKS = ("rank_chosen", "rank_rejected")  # 1 is the best
RATERS = ("rater", "annotator", "annotator_id", "worker", "worker_id")

Ints: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"
Buckets: TypeAlias = "np.ndarray[Any, np.dtype[np.uint16]]"

FORMS: dict[str, re.Pattern[str]] = {
    "list": re.compile(r"^\s*(?:[-*•]|\d+[.)])\s", re.MULTILINE),
    "heading": re.compile(r"^#{1,6} ", re.MULTILINE),
    "bold": re.compile(r"\*\*[^*\n]+\*\*"),
    "code block": re.compile(r"```"),
    "table": re.compile(r"^\|.*\|\s*$", re.MULTILINE),
    "paragraphs": re.compile(r"\S\n\s*\n\S"),
    "link": re.compile(r"https?://"),
    "exclamation mark": re.compile(r"!"),
    "question at the end": re.compile(r"\?\s*\Z"),
    "emoji": re.compile("[\U0001f300-\U0001faff\u2600-\u27bf]"),
}
_LITERALS = {"bold": "**", "code block": "```", "link": "http", "exclamation mark": "!", "table": "|", "heading": "# "}


def forms(text: str) -> list[bool]:
    """Which of `FORMS` a text has."""
    ascii_, found = text.isascii(), []
    for name, pattern in FORMS.items():
        literal = _LITERALS.get(name)
        absent = (literal is not None and literal not in text) or (name == "emoji" and ascii_)
        found.append(not absent and pattern.search(text) is not None)
    return found


def opening(text: str) -> str:
    """The first words of an answer."""
    return " ".join(words.split(text[:80])[:OPENING])


def _numbers(row: Mapping[str, Any]) -> float | None:
    """How much better the chosen answer was judged, where the row says it."""
    margin = as_number(row.get("margin"))
    if margin is not None:
        return margin
    for chosen, rejected in (*SCORES, RANKS[::-1]):
        one, two = as_number(row.get(chosen)), as_number(row.get(rejected))
        if one is not None and two is not None:
            return one - two
    return None


@dataclass
class Pairs:
    """What is kept of the pairs that went by; one instance for all sources of a split."""

    lengths: Numbers = field(default_factory=lambda: Numbers(np.int32, 2))  # characters of chosen, rejected
    openings: tuple[Counter[str], Counter[str]] = field(default_factory=lambda: (Counter(), Counter()))
    form: np.ndarray[Any, np.dtype[np.int64]] = field(default_factory=lambda: np.zeros((len(FORMS), 2), np.int64))
    margins: Numbers = field(default_factory=lambda: Numbers(np.float64))  # NaN where a row has none
    raters: set[str] = field(default_factory=set)
    _bags: list[tuple[Ints, Buckets]] = field(default_factory=list)  # per batch: row of each word (signed), bucket
    _learnt: int = 0

    def add(self, rows: Sequence[Mapping[str, Any]], found: Hashed) -> None:
        """Take a batch of pairs; `found` are their hashed parts (prompt, chosen, rejected)."""
        sizes, margins = [], []
        for row in rows:
            chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
            sizes.append((len(chosen), len(rejected)))
            for counter, text in zip(self.openings, (chosen, rejected), strict=True):
                counter[opening(text)] += 1
            ours, theirs = np.array(forms(chosen)), np.array(forms(rejected))
            self.form[:, 0] += ours & ~theirs
            self.form[:, 1] += theirs & ~ours
            margin = _numbers(row)
            margins.append(np.nan if margin is None else margin)
            rater = next((row[name] for name in RATERS if row.get(name) is not None), None)
            if rater is not None:
                self.raters.add(str(rater))
        self.lengths.add(sizes)
        self.margins.add(margins)
        _forget_rare(self.openings)
        self._bag(found)

    def _bag(self, found: Hashed) -> None:
        """The different words of each answer, as +(row + 1) for the chosen and -(row + 1) for the rejected one."""
        room = LEARNT_FROM - self._learnt
        if room <= 0:
            return
        part: Index = np.repeat(np.arange(len(found.parts) - 1), np.diff(found.part_words))
        wanted = (part % 3 > 0) & (part // 3 < room) & (found.words > 0)
        keys = np.unique(
            part[wanted].astype(np.uint64) * np.uint64(FEATURES) + found.words[wanted] % np.uint64(FEATURES)
        )
        owner = (keys // np.uint64(FEATURES)).astype(np.int64)
        signed = np.where(owner % 3 == 1, 1, -1) * (owner // 3 + 1 + self._learnt)
        self._bags.append((signed.astype(np.int32), (keys % np.uint64(FEATURES)).astype(np.uint16)))
        self._learnt += min(room, (len(found.parts) - 1) // 3)

    # --- what it came to ---

    def longer_wins(self) -> Share:
        """The share of pairs in which the longer answer (in characters) is the chosen one; equal ones left out."""
        chosen, rejected = self.lengths.array.astype(np.int64).T
        return wilson(int((chosen > rejected).sum()), int((chosen != rejected).sum()))

    def length_only(self, prompts: Words) -> Share:
        """Accuracy of a classifier that sees which answer is longer, and learns on one half which to prefer."""
        chosen, rejected = self.lengths.array.astype(np.int64).T
        sign = np.sign(chosen - rejected)
        half = _halves(prompts)
        right = 0.0
        for side in (False, True):
            prefers = np.sign(sign[half != side].sum()) or 1
            right += ((prefers * sign[half == side] > 0) + 0.5 * (sign[half == side] == 0)).sum()
        return wilson(right, len(sign))

    def bag_of_words(self, prompts: Words) -> Share:
        """Accuracy of a naive Bayes classifier on the words of the answers, learnt on one half of the prompts and
        judged on the other, both ways."""
        if not self._learnt:
            return wilson(0, 0)
        signed = np.concatenate([signed for signed, _ in self._bags])
        bucket = np.concatenate([bucket for _, bucket in self._bags])
        row, chosen = np.abs(signed) - 1, signed > 0
        half = _halves(prompts[: self._learnt])
        right = 0.0
        for side in (False, True):
            learn = half[row] != side
            counts = [
                np.bincount(bucket[learn & (chosen == which)], minlength=FEATURES) + 1.0 for which in (True, False)
            ]
            weights = np.log(counts[0] / counts[1])
            judged = ~learn
            score = np.bincount(
                row[judged], weights=np.where(chosen[judged], 1, -1) * weights[bucket[judged]], minlength=self._learnt
            )[half == side]
            score = np.where(np.abs(score) < 1e-9, 0.0, score)
            right += ((score > 0) + 0.5 * (score == 0)).sum()
        return wilson(right, self._learnt)

    def biased_openings(self) -> list[tuple[str, int, int]]:
        """Openings that (nearly) only chosen or only rejected answers have: (words, of chosen, of rejected)."""
        chosen, rejected = self.openings
        tested = {words_ for words_ in {*chosen, *rejected} if chosen[words_] + rejected[words_] >= ENOUGH}
        found = []
        for said in tested:
            counts = chosen[said], rejected[said]
            # Of all openings that are looked at, less than one in a hundred runs shows one by chance.
            if max(counts) >= 0.8 * sum(counts) and _surprise(max(counts), sum(counts)) * len(tested) < 0.01:
                found.append((said, *counts))
        return sorted(found, key=lambda entry: (-(entry[1] + entry[2]), entry[0]))

    def biased_forms(self) -> dict[str, Share]:
        """Forms that decide: of the pairs in which one answer alone has it, the share in which that one is chosen."""
        shares = {
            name: wilson(int(ours), int(ours + theirs)) for name, (ours, theirs) in zip(FORMS, self.form, strict=True)
        }
        return {
            name: share
            for name, share in shares.items()
            if share.of >= ENOUGH and (share.low > BIASED or share.high < 1 - BIASED)
        }


def _forget_rare(counters: tuple[Counter[str], Counter[str]]) -> None:
    """Keep memory flat: beyond `OPENINGS` different ones, those seen least often are forgotten (they begin again)."""
    least = 1
    while sum(map(len, counters)) > OPENINGS:
        for counter in counters:
            for text in [text for text, count in counter.items() if count <= least]:
                del counter[text]
        least *= 2


def _surprise(most: int, of: int) -> float:
    """A bound on the probability that a fair coin shows one side that often (Hoeffding), for both sides."""
    excess = most / of - 0.5
    return float(2 * np.exp(-2 * of * excess * excess))


def _halves(prompts: Words) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Which half each pair is in; pairs of one prompt are never parted."""
    return (prompts >> np.uint64(17)) & np.uint64(1) == 1


# --- votes ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Votes:
    """Pairs that were judged more than once.

    Attributes:
        contradicted: indices of rows whose opposite is there too.
        several: pairs (of a prompt and two answers) with more than one vote.
        agree, compared: votes of one pair taken two at a time: how many say the same, of how many.
    """

    contradicted: Index
    several: int
    agree: int
    compared: int


def votes(memory: Memory) -> Votes:
    """Find the rows that judge the same two answers to the same prompt, in either order."""
    prompt, chosen, rejected = memory.parts.T
    low, high = np.minimum(chosen, rejected), np.maximum(chosen, rejected)
    key = np.stack([prompt, low, high], axis=1)
    _, pair = np.unique(key, axis=0, return_inverse=True)
    pair = pair.reshape(-1)
    different = chosen != rejected
    first = np.bincount(pair[different & (chosen == low)], minlength=pair.max(initial=-1) + 1)
    second = np.bincount(pair[different & (chosen == high)], minlength=pair.max(initial=-1) + 1)
    contradicted = np.flatnonzero(different & (first[pair] > 0) & (second[pair] > 0))
    total = first + second
    agree = (first * (first - 1) + second * (second - 1)) // 2
    return Votes(contradicted, int((total > 1).sum()), int(agree.sum()), int((total * (total - 1) // 2).sum()))


# --- findings ---------------------------------------------------------------------------------------------------------


def summary(pairs: Pairs, memory: Memory) -> dict[str, Any]:
    """The numbers of the pairs, for JSON and for the page."""
    prompts = memory.parts[:, 0]
    found = votes(memory)
    margins = pairs.margins.array
    margins = margins[~np.isnan(margins)]
    summary: dict[str, Any] = {
        "pairs": len(memory),
        "prompts": len(np.unique(prompts)),
        "longer_wins": pairs.longer_wins().as_dict(),
        "length_only_accuracy": pairs.length_only(prompts).as_dict(),
        "bag_of_words_accuracy": pairs.bag_of_words(prompts).as_dict(),
    }
    if len(margins):
        p5, p50, p95 = np.quantile(margins, [0.05, 0.5, 0.95])
        summary["margin"] = {
            "rows": len(margins), "p5": float(p5), "p50": float(p50), "p95": float(p95),
            "zero": int((margins == 0).sum()), "negative": int((margins < 0).sum()),
        }  # fmt: skip
    if found.compared and (len(found.contradicted) or pairs.raters):  # without either these are plain repeats
        agreement = found.agree / found.compared
        # The order inside a pair is arbitrary, so two raters who guess agree half of the time.
        summary["agreement"] = {
            "pairs_with_several_votes": found.several, "agreement": agreement, "kappa": 2 * agreement - 1,
            "raters": len(pairs.raters) or None,
        }  # fmt: skip
    return summary


def findings(pairs: Pairs, memory: Memory, limit: Limit) -> Iterator[Finding]:
    """What is wrong with pairs that were all usable one by one."""
    total, places = len(memory), memory.where
    if not total:
        return

    def of(check: str, rows: Index, says: str, **values: Any) -> Finding:
        named = tuple(places[index] for index in rows[:PLACES])
        return Finding(check, len(rows), total, says, named, values, limit(check))

    signatures = memory.signatures
    alike = np.flatnonzero(words.similarity(signatures[:, 1], signatures[:, 2]) >= NEAR)
    if len(alike):
        yield of("near-equal-answers", alike, "have two answers that are nearly the same text: little to learn from")
    contradicted = votes(memory).contradicted
    if len(contradicted):
        yield of("contradictory", contradicted, "say A over B where another row says B over A, for the same prompt")
    margins = pairs.margins.array
    if len(negative := np.flatnonzero(margins < 0)):
        yield of("negative-margin", negative, "prefer the answer that their own scores call worse")
    if len(zero := np.flatnonzero(margins == 0)):
        yield of("zero-margin", zero, "prefer one of two answers with equal scores")
    yield from _biases(pairs, memory, limit)


def _biases(pairs: Pairs, memory: Memory, limit: Limit) -> Iterator[Finding]:
    values: dict[str, Any]
    total, prompts = len(memory), memory.parts[:, 0]
    if total < ENOUGH:
        return
    accuracy, longer = pairs.length_only(prompts), pairs.longer_wins()
    if accuracy.low > BIASED:
        which = "longer" if longer.value > 0.5 else "shorter"
        says = (
            f"have the {which} answer chosen; a look at the lengths alone is right in {accuracy}: the length is learnt"
        )
        count = round(max(longer.value, 1 - longer.value) * longer.of)
        values = {"longer_wins": longer.as_dict(), "accuracy": accuracy.as_dict()}
        yield Finding("length-bias", count, total, says, (), values, limit("length-bias"), accuracy.value)
    separable = pairs.bag_of_words(prompts)
    if separable.low > SEPARABLE:
        says = (
            f"can be told apart by single words, {separable} of those not learnt from: too easy to teach anything else"
        )
        values = {"accuracy": separable.as_dict()}
        count = round(separable.value * separable.of)
        yield Finding("separable", count, separable.of, says, (), values, limit("separable"), separable.value)
    if said := pairs.biased_openings():
        shown = ", ".join(f"{text!r} ({ours:,} chosen, {theirs:,} rejected)" for text, ours, theirs in said[:3])
        count = sum(ours + theirs for _, ours, theirs in said)
        says = f"of the answers begin in a way that tells whether they are chosen: {shown}"
        values = {"openings": [{"words": text, "chosen": ours, "rejected": theirs} for text, ours, theirs in said]}
        yield Finding("first-words-bias", count, 2 * total, says, (), values, limit("first-words-bias"))
    if forms_ := pairs.biased_forms():
        shown = "; ".join(f"{name}: chosen in {share} of {share.of:,}" for name, share in forms_.items())
        says = f"are told by their form, where one answer alone has it: {shown}"
        count = max(share.of for share in forms_.values())
        values = {"forms": {name: share.as_dict() for name, share in forms_.items()}}
        yield Finding("formatting-bias", count, total, says, (), values, limit("formatting-bias"))
