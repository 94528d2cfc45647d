"""Judges: functions that score replies, with TRL's reward-function signature.

    def score(prompts, completions, **columns) -> list[float]

A recipe names a function of its own, or asks for one of the two that are here: a pattern that replies should match
(`regex`), a number of words that they should not exceed (`length`).

A judge is called once with lists: the prompts, the completions as conversations (`[{"role": "assistant", "content":
...}]`), every other column of the rows by its name, and `finished`, whether each reply ended with a stop token. NaN
or None means that it does not apply to a row.
"""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from alignment.data.hooks import described, load_hook
from alignment.errors import RecipeError, UserError
from alignment.evaluation.metrics import Floats
from alignment.recipe.schema import Reward

Row = Mapping[str, Any]
Function = Callable[..., Sequence[float | None]]


class JudgeError(UserError):
    """A judge that fails, or returns something other than one number per reply."""


@dataclass(frozen=True)
class Judge:
    """A named scoring function."""

    name: str
    function: Function
    source: str  # as the recipe names it


def load_judge(reward: Reward) -> Judge:
    """The function that a recipe's reward names (`pkg.mod:fn` or `path/file.py:fn`), or that it describes.

    Raises:
        RecipeError: no such file, module or function, or importing it fails; or the reward is a model.
    """
    if reward.regex is not None:
        return Judge(reward.name, regex_reward(reward.regex), f"regex {reward.regex}")
    if reward.length is not None:
        return Judge(reward.name, length_reward(reward.length), f"length {reward.length}")
    if reward.function is None:
        raise RecipeError(f"rewards: {reward.name}: a judge is a function; a reward model belongs in `scorers:`")
    return Judge(reward.name, load_hook(reward.function, "rewards"), reward.function)


def regex_reward(pattern: str) -> Function:
    """1.0 for a reply in which `re.search` finds the pattern (`.` matches line breaks too), else 0.0."""
    found_in = re.compile(pattern, re.DOTALL).search

    def score(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [float(found_in(_text(completion)) is not None) for completion in completions]

    return score


def length_reward(words: int) -> Function:
    """A soft limit: 0 up to `words` words (parts between white space), from there on -(words over) / `words`."""

    def score(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        return [-max(0, len(_text(completion).split()) - words) / words for completion in completions]

    return score


def _text(completion: Any) -> str:
    """What a completion says: plain text, or the content of its last message."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def judge_replies(judge: Judge, rows: Sequence[Row], replies: Sequence[str], finished: Sequence[bool]) -> Floats:
    """The judge's score of each reply (N,), NaN where it does not apply.

    Raises:
        JudgeError: it raised, or did not return one finite number (or NaN, or None) per reply; names function and row.
    """
    try:
        scores = _call(judge, rows, replies, finished)
    except Exception as error:  # a user's function may raise anything
        where = _failing_row(judge, rows, replies, finished)
        raise JudgeError(f"rewards: {judge.source} failed on {where}: {described(error)}") from error
    try:
        count = len(scores)
    except TypeError:
        found = type(scores).__name__
        raise JudgeError(f"rewards: {judge.source} must return a list of numbers, it returned {found}") from None
    if count != len(rows):
        raise JudgeError(f"rewards: {judge.source} returned {count} values for {len(rows)} replies")
    return np.array([_number(judge, rows, index, score) for index, score in enumerate(scores)], dtype=np.float64)


def _call(judge: Judge, rows: Sequence[Row], replies: Sequence[str], finished: Sequence[bool]) -> Any:
    names = dict.fromkeys(name for row in rows for name in row if name not in ("prompt", "finished"))
    columns = {name: [row.get(name) for row in rows] for name in names}
    completions = [[{"role": "assistant", "content": reply}] for reply in replies]
    prompts = [row["prompt"] for row in rows]
    return judge.function(prompts=prompts, completions=completions, finished=list(finished), **columns)


def _failing_row(judge: Judge, rows: Sequence[Row], replies: Sequence[str], finished: Sequence[bool]) -> str:
    """Which row makes the judge raise: it is called again with one row at a time."""
    for index, row in enumerate(rows):
        try:
            _call(judge, [row], [replies[index]], [finished[index]])
        except Exception:  # as in `judge_replies`
            return row_name(rows, index)
    return f"all {len(rows)} rows together, on none of them alone"


def _number(judge: Judge, rows: Sequence[Row], index: int, score: Any) -> float:
    if score is None:
        return math.nan
    if not isinstance(score, numbers.Real) or math.isinf(score):
        raise JudgeError(f"rewards: {judge.source} returned {score!r} for {row_name(rows, index)}; a number is needed")
    return float(score)


def row_name(rows: Sequence[Row], index: int) -> str:
    """How a message names a row: its number, and how its prompt (a text or messages) begins.

    The number is that of the table where the row is from one of tokens, as `alignment data show --row` takes it.
    """
    prompt = rows[index]["prompt"]
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    text = " ".join(text.split())
    number = rows[index]["row"] if "prompt_ids" in rows[index] and "row" in rows[index] else index + 1
    return f"row {number} ({text[:60] + '...' if len(text) > 60 else text!r})"
