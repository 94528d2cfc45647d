"""Several rated or ranked answers to one prompt, and the pairs that are made of them.

A reader of this module turns a record into `{"prompt": [...], "answers": [Rated, ...], other columns}`, the best
answer first. `pairs` makes preference rows of it; answers of equal rating are never paired, because nobody said which
is the better one:

    best-worst   the best answer and the worst: one pair
    adjacent     each answer and the next worse one
    all          each answer and every worse one
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import Any

from alignment.data.checks import Defect, Message
from alignment.data.turns import (
    Row,
    alpaca_prompt,
    answer,
    cued,
    is_transcript,
    others,
    parsed,
    prompt,
    text,
    with_system,
)

PROMPTS = ("prompt", "instruction", "question", "query", "history")
LISTS = ("completions", "responses", "answers", "candidates")
TEXTS = ("response", "answer", "text", "content", "completion", "output")
RANKS = ("rank", "ranks", "ranking")  # 1 is the best
SCORES = ("score", "scores", "rating", "ratings", "reward", "rewards", "overall_score")  # more is better
ENDS = (("_A", "_B"), ("_a", "_b"), ("_0", "_1"), ("_1", "_2"))  # of the columns of a first and a second answer
PAIRED = ("human_ref", "response", "answer", "completion")
VERDICTS = ("labels", "better_response_id", "winner")


@dataclass(frozen=True)
class Rated:
    """One answer, and its rating: a score (more is better) or a rank (less is better)."""

    message: Message
    rating: float
    is_rank: bool = False

    @property
    def worth(self) -> float:
        return -self.rating if self.is_rank else self.rating


def pairs(row: Row, how: str) -> list[Row]:
    """The preference rows of a row of rated answers.

    Raises:
        Defect: there are no two answers of different rating.
    """
    rest = {key: value for key, value in row.items() if key not in ("prompt", "answers")}
    ordered: list[Rated] = row["answers"]
    wanted: Iterator[tuple[Rated, Rated]]
    if how == "best-worst":
        wanted = iter([(ordered[0], ordered[-1])])
    else:
        wanted = combinations(ordered, 2) if how == "all" else pairwise(ordered)
    made = []
    for better, worse in wanted:
        if better.worth > worse.worth:
            kind = "rank" if better.is_rank else "score"
            ratings = {f"{kind}_chosen": better.rating, f"{kind}_rejected": worse.rating}
            answers = {"chosen": [better.message], "rejected": [worse.message]}
            made.append({"prompt": row["prompt"], **answers, **ratings, **rest})
    if not made:
        raise Defect("tied-scores")
    return made


def best(row: Row) -> Row:
    """The prompt and the best answer, the first of several, as a conversation."""
    tools = {"tools": row["tools"]} if "tools" in row else {}
    return {"messages": [*row["prompt"], row["answers"][0].message], **tools}


# --- reading --------------------------------------------------------------------------------------------------------


def first(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the names that a row has as a column."""
    return next((name for name in names if name in row), None)


def answers_column(row: Mapping[str, Any]) -> str | None:
    """The column that holds a list of answers."""
    return next((name for name in LISTS if isinstance(row.get(name), list)), None)


def rating_key(row: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """Where the ratings of a list of answers stand: a key of each answer, or a column as long as the list."""
    column = answers_column(row)
    items = row[column] if column else []
    inside = [item for item in items if isinstance(item, dict)]
    name = first(inside[0], names) if inside else None
    return name or next((name for name in names if isinstance(row.get(name), list) and column), None)


def is_ultrafeedback(row: Mapping[str, Any]) -> bool:
    """Whether each answer has UltraFeedback's annotations of several aspects."""
    items = row.get("completions")
    return isinstance(items, list) and bool(items) and isinstance(items[0], dict) and "annotations" in items[0]


def two_columns(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of a first and a second answer (`human_ref_A` and `human_ref_B`) where a verdict tells them apart."""
    for stem in PAIRED:
        for ends in ENDS:
            names = (stem + ends[0], stem + ends[1])
            more = stem + {"_1": "_2", "_2": "_3"}.get(ends[1], "_C"), stem + "_c"
            if not all(name in row for name in names) or any(name in row for name in more):
                continue  # with a third answer it is no pair
            if first(row, VERDICTS) or _score_columns(row, ends):
                return names
    return None


def _score_columns(row: Mapping[str, Any], ends: tuple[str, str]) -> tuple[str, str] | None:
    for stem in SCORES:
        names = (stem + ends[0], stem + ends[1])
        if all(name in row for name in names):
            return names
    return None


def number(value: Any, field: str) -> float:
    """A rating as a number; text that spells one counts (`"4"`)."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise Defect("no-score", f"{field} is {value!r}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Defect("no-score", f"{field} is {value!r}")
    return float(value)


def _at(item: Any, path: str) -> Any:
    """The value at a dotted path (`annotations.helpfulness.Rating`)."""
    for part in path.split("."):
        item = item.get(part) if isinstance(item, dict) else None
    return item


def _mean_of_aspects(item: Row) -> float:
    """UltraFeedback's rating of an answer: the mean over the aspects that were rated.

    The file's own `overall_score` is not used unless it is asked for: in part of the rows it is 10 where the critique
    says 1.
    """
    aspects = item.get("annotations")
    found = []
    for name, aspect in aspects.items() if isinstance(aspects, dict) else ():
        rating = aspect.get("Rating") if isinstance(aspect, dict) else None
        if rating not in (None, "N/A"):
            found.append(number(rating, f"annotations.{name}.Rating"))
    if not found:
        raise Defect("no-score", "annotations hold no Rating")
    return sum(found) / len(found)


def _question(row: Row) -> tuple[list[Message], str]:
    column = first(row, PROMPTS) or "prompt"
    value = row.get(column)
    found = cued(value, column) if is_transcript(value) else prompt(value)
    return with_system(row, found), column


def _said(item: Any) -> Message:
    """One answer of a list: text, a message, or an object that holds the text."""
    if isinstance(item, dict) and "role" not in item:
        name = first(item, TEXTS)
        item = item.get(name) if name else None
    found = answer(item, "an answer")
    if len(found) != 1:
        raise Defect("answer-not-one-turn", f"roles: {', '.join(turn['role'] for turn in found) or 'none'}")
    return found[0]


def _row(row: Row, question: list[Message], rated: list[Rated], *used: str) -> Row:
    if len(rated) < 2:
        raise Defect("too-few-answers")
    rated.sort(key=lambda one: -one.worth)  # the sort is stable: equals stay in the order of the file
    return {"prompt": question, "answers": rated, **others(row, *used, "system")}


def from_ultrafeedback(row: Row, score: str | None = None) -> Row:
    """UltraFeedback as it was published: `instruction`, and `completions` with `annotations`."""
    question, column = _question(row)
    rated = []
    for item in row["completions"] if isinstance(row.get("completions"), list) else ():
        if not isinstance(item, dict):
            raise Defect("wrong-type", f"a completion is {type(item).__name__}, not an object")
        rating = _mean_of_aspects(item) if score is None else number(_at(item, score), score)
        rated.append(Rated(_said(item), rating))
    return _row(row, question, rated, column, "completions", "models", "correct_answers", "incorrect_answers")


def _from_list(row: Row, key: str | None, is_rank: bool) -> Row:
    """A list of answers with a rating in each, or in a column beside it."""
    question, column = _question(row)
    listed = answers_column(row)
    if listed is None or key is None:
        raise Defect("missing-column", f"one of {', '.join(LISTS)}, with ratings")
    items, beside = row[listed], row.get(key)
    if isinstance(beside, str):
        beside = parsed(beside, key)
    if isinstance(beside, list):
        if len(beside) != len(items):
            raise Defect("no-score", f"{len(items)} {listed}, {len(beside)} {key}")
        ratings = beside
    else:
        ratings = [_at(item, key) for item in items]
    rated = [Rated(_said(item), number(rating, key), is_rank) for item, rating in zip(items, ratings, strict=True)]
    return _row(row, question, rated, column, listed, key)


def from_scores(row: Row, score: str | None = None) -> Row:
    """A prompt, a list of answers, and a score of each: more is better."""
    return _from_list(row, score or rating_key(row, SCORES), False)


def from_ranks(row: Row, score: str | None = None) -> Row:
    """A prompt, a list of answers, and a rank of each: 1 is the best (Nectar)."""
    return _from_list(row, score or rating_key(row, RANKS), True)


def from_ordered(row: Row, score: str | None = None) -> Row:
    """A prompt and a list of answers, the best first (LLaMA-Factory's ranked `output`)."""
    items = row.get("output")
    if not isinstance(items, list):
        raise Defect("wrong-type", "output is not a list")
    rated = [Rated(_said(item), float(place), True) for place, item in enumerate(items, 1)]
    return _row(row, alpaca_prompt(row), rated, "instruction", "input", "output", "history")


def from_two_columns(row: Row, score: str | None = None) -> Row:
    """Two answers in columns of their own, and scores or a verdict (SHP: `score_A`, `score_B`, `labels`).

    Raises:
        Defect: as everywhere, and where the verdict contradicts the scores.
    """
    names = two_columns(row)
    if names is None:
        raise Defect("missing-column", "two answers, with scores or a verdict")
    question, column = _question(row)
    ends = next(ends for ends in ENDS if names[0].endswith(ends[0]) and names[1].endswith(ends[1]))
    scored = (score + ends[0], score + ends[1]) if score else _score_columns(row, ends)
    told = first(row, VERDICTS)
    verdict = _verdict(row[told], told, ends) if told else None
    if scored:
        ratings = [number(row.get(name), name) for name in scored]
        if verdict is not None and (ratings[0] - ratings[1]) * (0.5 - verdict) < 0:
            raise Defect("wrong-label", f"{told} contradicts {' and '.join(scored)}")
    else:
        if verdict is None:
            raise Defect("tied-scores")
        ratings = [1.0 - verdict, float(verdict)]
    rated = [Rated(_said(text(row[name], name)), rating) for name, rating in zip(names, ratings, strict=True)]
    return _row(row, question, rated, column, *names, *(scored or ()), told or "")


def _verdict(value: Any, column: str, ends: tuple[str, str]) -> int | None:
    """Which of the two answers is the better one, 0 or 1; None for a tie. SHP's `labels` is 1 where the first is."""
    word = str(value).strip().lower() if isinstance(value, (str, int, float)) else ""
    if word.startswith("tie"):
        return None
    word = word.removesuffix(".0")
    if column == "labels":
        known = {"1": 0, "true": 0, "0": 1, "false": 1}
    else:
        known = {end.lstrip("_").lower(): place for place, end in enumerate(ends)} | {"model_a": 0, "model_b": 1}
    if word not in known:
        raise Defect("wrong-label", f"{column} is {value!r}")
    return known[word]
