"""Judges: how they are found, what they are given, and one clear line for each way in which they fail."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import RecipeError
from alignment.evaluation.judges import Judge, JudgeError, judge_replies, length_reward, load_judge, regex_reward
from alignment.recipe.schema import Reward

ROWS = [{"prompt": [{"role": "user", "content": f"question {index}"}], "answer": str(index)} for index in range(4)]
ROWS[2]["style"] = "brief"


def scored(function: Callable[..., Any]) -> list[float]:
    judge = Judge("j", function, "judges.py:j")
    return judge_replies(judge, ROWS, ["a", "b", "c", "d"], [True, True, False, True]).tolist()


def test_a_judge_is_given_conversations_and_every_column_as_a_list() -> None:
    seen: dict[str, Any] = {}

    def look(**given: Any) -> list[float]:
        seen.update(given)
        return [0.0] * 4

    assert scored(look) == [0.0] * 4
    assert seen["prompts"] == [row["prompt"] for row in ROWS]
    assert seen["completions"][1] == [{"role": "assistant", "content": "b"}]
    assert seen["answer"] == ["0", "1", "2", "3"]
    assert seen["style"] == [None, None, "brief", None]
    assert seen["finished"] == [True, True, False, True]
    assert set(seen) == {"prompts", "completions", "answer", "style", "finished"}


def test_nan_and_none_mean_not_applicable() -> None:
    values = scored(lambda **given: [1, float("nan"), None, True])
    assert values[0] == values[3] == 1.0
    assert math.isnan(values[1])
    assert math.isnan(values[2])


@pytest.mark.parametrize(
    ("returned", "line"),
    [
        ([1.0], "rewards: judges.py:j returned 1 values for 4 replies"),
        (3.5, "rewards: judges.py:j must return a list of numbers, it returned float"),
        ([1.0, 2.0, "high", 4.0], "rewards: judges.py:j returned 'high' for row 3 ('question 2'); a number is needed"),
        ([1.0, float("inf"), 0.0, 0.0], "judges.py:j returned inf for row 2 ('question 1')"),
    ],
)
def test_a_wrong_result_is_one_line(returned: Any, line: str) -> None:
    with pytest.raises(JudgeError) as caught:
        scored(lambda **given: returned)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_judge_that_raises_is_named_with_the_row_at_fault() -> None:
    def fails(prompts: list[Any], answer: list[str], **columns: Any) -> list[float]:
        return [1.0 / (int(value) - 2) for value in answer]

    with pytest.raises(JudgeError) as caught:
        scored(fails)
    assert str(caught.value) == (
        "rewards: judges.py:j failed on row 3 ('question 2'): ZeroDivisionError: float division by zero"
    )


def test_a_judge_that_raises_only_on_the_whole_list_says_so() -> None:
    def fails(prompts: list[Any], **columns: Any) -> list[float]:
        if len(prompts) > 1:
            raise MemoryError
        return [0.0]

    with pytest.raises(JudgeError, match=r"on none of them alone: MemoryError$"):
        scored(fails)


def test_the_gold_reward_of_the_quickstart_loads_from_its_file(root: Path) -> None:
    judge = load_judge(Reward(function=f"{root}/data/quickstart/gold.py:correct", name="correct"))
    row = {
        "prompt": [{"role": "user", "content": "What is the capital of France?"}],
        "kind": "capital", "subject": "France", "answer": "Paris", "style": "plain",
    }  # fmt: skip
    replies = ["The capital of France is Paris.", "The capital of France is Rome."]
    assert judge_replies(judge, [row, row], replies, [True, True]).tolist() == [1.0, 0.0]


def test_a_judge_loads_from_a_module() -> None:
    assert load_judge(Reward(function="math:fsum", name="sum")).function is math.fsum


def test_a_pattern_is_searched_in_the_whole_reply() -> None:
    judge = load_judge(Reward(name="format", regex="^a.*z$"))
    replies = ["a\nz", "a z b", "ab z", ""]
    assert judge_replies(judge, ROWS, replies, [True] * 4).tolist() == [1.0, 0.0, 1.0, 0.0]
    assert regex_reward("b")(prompts=[], completions=["abc", "ac"]) == [1.0, 0.0]
    assert (judge.name, judge.source) == ("format", "regex ^a.*z$")


def test_a_length_is_a_soft_limit_in_words() -> None:
    judge = load_judge(Reward(name="brief", length=4))
    replies = ["", "one two  three\nfour", "one two three four five", "word " * 8]
    assert judge_replies(judge, ROWS, replies, [True] * 4).tolist() == [0.0, 0.0, -0.25, -1.0]
    assert length_reward(2)(prompts=[], completions=["a b c"]) == [-0.5]
    assert (judge.name, judge.source) == ("brief", "length 4")


def test_a_reward_model_is_no_judge() -> None:
    with pytest.raises(RecipeError, match="rewards: rm: a judge is a function; a reward model belongs in `scorers:`"):
        load_judge(Reward(name="rm", model="stage:reward"))


@pytest.mark.parametrize(
    ("function", "line"),
    [
        ("no_such_package.gold:score", "cannot be imported (ModuleNotFoundError"),
        ("missing.py:score", "cannot be imported (FileNotFoundError"),
        ("math:no_such", "math has no function no_such"),
        ("math:pi", "math has no function pi"),
    ],
)
def test_a_judge_that_cannot_be_found_is_one_line(function: str, line: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load_judge(Reward(function=function, name="gold"))
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_fails_while_it_is_imported_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text("raise RuntimeError('no key')\n")
    with pytest.raises(RecipeError, match=r"bad\.py:score: cannot be imported \(RuntimeError: no key\)"):
        load_judge(Reward(function=f"{tmp_path}/bad.py:score", name="bad"))
