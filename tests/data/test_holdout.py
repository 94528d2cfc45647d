"""`data.eval_fraction`: whole prompts are held out, the same ones whatever the order of the rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from made_rows import pair, prose, talk
from transformers import PreTrainedTokenizerFast

from alignment.data.holdout import hold_out
from alignment.data.prepare import Prepared, prepare
from alignment.data.remedies import Found
from alignment.errors import DataError, ExitCode
from alignment.recipe.schema import Stage

Row = dict[str, Any]


def turn(role: str, content: str) -> Row:
    return {"role": role, "content": content}


def asked(prompt: str, answer: str = "a") -> Row:
    return {"prompt": [turn("user", prompt)], "completion": [turn("assistant", answer)]}


def found(rows: Sequence[Row]) -> list[Found]:
    return [Found(row, f"x:{index}", 0) for index, row in enumerate(rows)]


def prompts_of(rows: Sequence[Row]) -> set[str]:
    return {row["prompt"][0]["content"] for row in rows}


@pytest.mark.parametrize("each", [1, 2, 3, 5])
@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.5])
def test_rows_of_one_prompt_fall_on_one_side(each: int, fraction: float) -> None:
    rows = [asked(f"question {index % 40}", f"answer {index}") for index in range(40 * each)]
    held = hold_out(found(rows), fraction, seed=3)
    wanted = round(fraction * len(rows))
    assert len(held.places) == wanted - wanted % each, "as many whole prompts as fit"
    assert (held.rows, held.prompts, held.taken) == (len(rows), 40, len(held.places) // each)
    places = set(held.places.tolist())
    out, left = (
        prompts_of([rows[at] for at in places]),
        prompts_of([r for at, r in enumerate(rows) if at not in places]),
    )
    assert not out & left
    assert held.places.tolist() == sorted(places)


def test_prompts_of_many_rows_do_not_keep_the_count_from_being_exact() -> None:
    rows = [asked("the same for half of them", str(index)) for index in range(100)]
    rows += [asked(f"question {index}") for index in range(100)]
    for seed in range(20):
        held = hold_out(found(rows), 0.1, seed)
        assert (len(held.places), held.taken) == (20, 20)
        assert min(held.places) >= 100, "half of the rows is more than a tenth of them"


def test_the_order_of_rows_does_not_matter_and_the_seed_does() -> None:
    rows = [asked(f"question {index % 60}", f"answer {index}") for index in range(150)]
    before = prompts_of([rows[at] for at in hold_out(found(rows), 0.2, seed=1).places])
    mixed = random.Random(0).sample(rows, len(rows))
    assert prompts_of([mixed[at] for at in hold_out(found(mixed), 0.2, seed=1).places]) == before
    assert prompts_of([rows[at] for at in hold_out(found(rows), 0.2, seed=2).places]) != before
    more = [*rows, *(asked(f"new question {index}") for index in range(5))]
    after = prompts_of([more[at] for at in hold_out(found(more), 0.2, seed=1).places])
    assert len(before - after) <= 3, "new rows take the places of few"


def test_every_prompt_is_as_likely_to_be_held_out() -> None:
    rows = found([asked(f"question {index}") for index in range(50)])
    times = [0] * 50
    for seed in range(400):
        for at in hold_out(rows, 0.2, seed).places:
            times[at] += 1
    assert sum(times) == 400 * 10
    assert all(abs(count - 80) <= 4.5 * (400 * 0.2 * 0.8) ** 0.5 for count in times)


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (asked("What is a hen?"), asked("what is a HEN", "b"), True),
        (asked("What is a hen?"), asked("What is a fox?"), False),
        (asked("这是什么？"), asked("这是什么", "b"), True),
        (talk("Q", "A"), talk("Q", "B", "more?", "C"), True),
        (talk("Q", "A", "more?", "B"), talk("Q", "other", "else?", "C"), True),  # the first answer tells of the others
        (talk("P", "A"), talk("Q", "A"), False),
        ({"text": "The fox."}, {"text": "the fox"}, True),
        ({"text": "The fox."}, {"text": "The hen."}, False),
        ({"prompt": [turn("system", "S"), turn("user", "Q")]}, {"prompt": [turn("user", "Q")]}, False),
        ({"prompt": [turn("user", "Q"), turn("assistant", "A"), turn("user", "R")]},
         {"prompt": [turn("user", "Q"), turn("assistant", "B"), turn("user", "R")]}, False),
    ],
)  # fmt: skip
def test_what_is_one_prompt(one: Row, other: Row, same: bool) -> None:
    rest = [{"text": f"x{index}"} for index in range(8)]
    assert hold_out(found([one, other, *rest]), 0.5, seed=1).prompts == (9 if same else 10)


@pytest.mark.parametrize(
    ("prompts", "fraction", "says"),
    [
        (["a"] * 40, 0.1, "data.eval_fraction 0.1 of 40 rows is 4, and rows of one prompt are held out together: all "
         "rows have the same prompt; give rows with other prompts as data.eval"),
        (["a", "b", "b", "a", "c", "c", "c"] * 10, 0.1,
         "data.eval_fraction 0.1 of 70 rows is 7, and rows of one prompt are held out together: the rarest of 3 "
         "prompts has 20; raise it to 0.2858 or more, or give held-out rows as data.eval"),
        (["a"], 0.5, "data.eval_fraction 0.5 of 1 rows leaves nothing to train on"),
        (["a", "b"], 0.9, "data.eval_fraction 0.9 of 2 rows leaves nothing to train on"),
    ],
)  # fmt: skip
def test_too_few_prompts_are_one_line(prompts: list[str], fraction: float, says: str) -> None:
    rows = found([asked(prompt, str(index)) for index, prompt in enumerate(prompts)])
    with pytest.raises(DataError) as error:
        hold_out(rows, fraction, seed=1)
    assert str(error.value) == says
    assert error.value.code == ExitCode.BAD_INPUT
    if "raise it to" in says:
        assert len(hold_out(rows, float(says.split("raise it to ")[1].split()[0]), seed=1).places) == 20


def test_a_run_on_pairs_that_share_prompts_passes_the_leak_limit(
    tmp_path: Path, lines: Callable[..., Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    """Four pairs of each prompt, which the limit for leaks would stop were they held out one by one."""
    rows = [pair(seed, prompt=prose(9000 + seed % 30)) for seed in range(120)]
    path, said = lines(rows), list[str]()

    def run(seed: int, **limits: float) -> Prepared:
        stage = {"algorithm": "dpo", "seed": seed, "data": {
            "train": [{"path": str(path)}], "eval_fraction": 0.1, "limits": {"leak": 0.0, **limits},
        }}  # fmt: skip
        return prepare(
            Stage.model_validate(stage), "preference", tokenizer, max_length=None, cache=tmp_path / "cache",
            say=said.append,
        )  # fmt: skip

    made = run(7)
    assert (len(made.train), len(made.eval)) == (108, 12)
    assert (
        "held out 12 of 120 rows for evaluation (data.eval_fraction): 3 of 30 prompts, whose rows stay together" in said
    )
    heads = [{tuple(ids) for ids in table["prompt_ids"]} for table in (made.train, made.eval)]
    assert (len(heads[0]), len(heads[1]), heads[0] & heads[1]) == (27, 3, set())
    again = run(7)
    assert again.report == made.report
    assert again.eval.to_list() == made.eval.to_list(), "what was held out is held out again, from the cache"
    assert run(8).report["eval"]["key"] != made.report["eval"]["key"]
