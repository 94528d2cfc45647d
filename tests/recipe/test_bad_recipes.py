"""Bad recipes: one fault planted in a good one, and the exact lines that must come out (`bad_recipes.txt`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest


class Case(NamedTuple):
    """Texts to replace in the good recipe, what replaces them, and the expected lines."""

    old: list[str]
    new: list[str]
    expected: list[str]


def _cases() -> list[Case]:
    text = Path(__file__).with_name("bad_recipes.txt").read_text(encoding="utf-8")
    cases = []
    for block in text.split("\n\n"):
        case = Case([], [], [])
        for line in block.splitlines():
            target = {"- ": case.old, "+ ": case.new, "> ": case.expected}.get(line[:2])
            if target is not None:
                target.append(line[2:].replace("\\n", "\n") if target is not case.expected else line[2:])
        if case.expected:
            cases.append(case)
    return cases


CASES = _cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: (case.new[0] or "no " + case.old[0]).strip()[:50])
def test_planted_fault_is_told_in_exactly_these_lines(
    case: Case, good: str, problems: Callable[..., list[str]]
) -> None:
    text = good
    for old, new in zip(case.old, case.new, strict=True):
        assert text.count(old) == 1
        text = text.replace(old, new)
    assert problems(text) == [f"r.yaml:{line}" for line in case.expected]


def test_table_is_read_whole() -> None:
    assert len(CASES) >= 148


def test_the_recipe_without_a_fault_passes(good: str, problems: Callable[..., list[str]]) -> None:
    assert problems(good) == []


def test_faults_in_different_places_come_at_once_and_in_file_order(
    good: str, problems: Callable[..., list[str]]
) -> None:
    text = (
        good.replace("loss_type: [sigmoid, sft]", "learning_rtae: 1")
        .replace("pairs:", "paires:")
        .replace("seed: 7", "seed: 0010")
        .replace("model: stage:base", "model: stage:bass")
        .replace("global: 64", "global: -1")
    )
    assert problems(text, ["stages.dpo.train.beta=low", "stages.reward.batch.global=7"]) == [
        'r.yaml:2: seed: 0010 is read as 8 by YAML 1.1; write 10 or 8, or "0010" to mean text',
        'r.yaml:17: stages.sft.model: no stage is named "bass" (did you mean base?)',
        "r.yaml:23: stages.sft.batch.global: expected at least 1, found -1",
        "r.yaml:38: stages.dpo.train.learning_rtae: unknown key of trl.DPOConfig (did you mean learning_rate?)",
        "r.yaml:43: stages.compare.scorers: has nothing to score; give `pairs:`",
        "r.yaml:45: stages.compare.paires: unknown key (did you mean pairs?)",
        "--set: stages.reward.batch.global: 7 rows cannot be split over 2 processes x 8 rows (batch.per_device); "
        "the nearest legal value is 16",
        '--set: stages.dpo.train.beta: expected a number, found "low"',
    ]
