"""The rewards of a stage that trains on them: planted faults, and what a recipe may say."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.recipe.algorithms import ALGORITHMS, TRAINED, dpo
from alignment.recipe.load import load_recipe
from alignment.recipe.resolve import parents

STAGE = """\
  tuned:
    algorithm: ppo
    model: stage:sft
    data: {train: [{path: q.jsonl}]}
    rewards:
      - {name: gold, function: "gold.py:score"}
"""
FAULTS = {
    "{name: rm, model: stage:sft}": (
        "rewards[0].model: sft publishes a language model (sft), and a reward model is needed; use stage:reward"
    ),
    "{name: rm, model: stage:rewrd}": 'rewards[0].model: no stage is named "rewrd" (did you mean reward?)',
    "{name: rm, model: stage:tuned}": "rewards[0].model: links to itself; name an earlier stage",
    "{name: rm, model: stage:later}": (
        "rewards[0].model: links to later, which runs later; stages run as they are written, so move later up"
    ),
    "{name: rm, model: stage:compare}": (
        "rewards[0].model: compare publishes no model (evaluate), and a reward model is needed; use stage:reward"
    ),
    "{name: rm, model: reward}": "rewards[0].model: no such folder: reward; write stage:reward to link to the stage",
    "{name: rm, model: org/judge@main}": (
        "rewards[0].model: main is no commit of org/judge; write all of its 40 hexadecimal digits"
    ),
    "{name: a, function: gone.py:f}": "rewards[0].function: no such file: gone.py",
    "{name: a, function: 3}": "rewards[0].function: expected text, found 3",
    "{name: a, length: 4, weight: 0}": (
        "rewards[0].weight: must not be 0: the reward would not count; remove it, or give it a weight"
    ),
    "{name: a, length: 4, weight: .inf}": "rewards[0].weight: expected a finite number, found .inf",
    "{name: a, length: 4.5}": "rewards[0].length: expected a whole number, found 4.5",
    "{name: a, length: 4, normalize: batch}": (
        'rewards[0].normalize: expected none, stored or running, found "batch"'
    ),
    "{name: a, length: 4, normalize: stored}": (
        "rewards[0]: normalize: stored is for `model:`, which brings its mean and deviation; write running"
    ),
    "{name: a, regex: '*'}": (
        "rewards[0].regex: is not a regular expression of Python: nothing to repeat at position 0"
    ),
    "{name: a, model: stage:reward, length: 2}": (
        "rewards[0]: give exactly one of function, model, regex, length (found model, length)"
    ),
    "{name: a, regexp: x}": "rewards[0].regexp: unknown key (did you mean regex?)",
    "{regex: x}": "rewards[0].name: is missing",
}  # fmt: skip
LATER = """\
  later:
    algorithm: reward
    model: stage:sft
    data: {train: [{path: p.jsonl}]}
"""


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    """An algorithm that trains on prompts and rewards."""
    made = replace(dpo, name="ppo", sections=TRAINED | {"rewards"}, schema="prompts", needs=lambda train: iter(()))
    monkeypatch.setitem(ALGORITHMS, "ppo", made)


def recipe(good: str, reward: str) -> str:
    return good + STAGE.replace('{name: gold, function: "gold.py:score"}', reward) + LATER


@pytest.mark.parametrize(("reward", "line"), FAULTS.items(), ids=list(FAULTS))
def test_a_planted_fault_is_told_in_one_line(
    reward: str, line: str, good: str, problems: Callable[..., list[str]]
) -> None:
    (found,) = problems(recipe(good, reward))
    assert found == f"r.yaml:{good.count(chr(10)) + 6}: stages.tuned.{line}"


def test_a_circle_is_found_through_a_reward(good: str, problems: Callable[..., list[str]]) -> None:
    text = recipe(good, "{name: rm, model: stage:later}")
    head, _, tail = text.rpartition("model: stage:sft")
    found = problems(f"{head}model: stage:tuned{tail}")
    assert "stages.tuned.rewards[0].model: links in a circle: later itself builds on tuned" in found[0]
    assert "stages.later.model: links in a circle: tuned itself builds on later" in found[1]


@pytest.mark.parametrize("written", ["rewards: []", ""])
def test_a_stage_that_maximises_nothing_is_refused(written: str, good: str, problems: Callable[..., list[str]]) -> None:
    text = good + STAGE.partition("    rewards:")[0] + (f"    {written}\n" if written else "")
    (found,) = problems(text)
    assert found.endswith("stages.tuned.rewards: is missing: what ppo maximises, [{name: rm, model: stage:<name>}]")


def test_every_source_loads_and_a_reward_model_is_a_parent(good: str, problems: Callable[..., list[str]]) -> None:
    Path("gold.py").touch()
    rewards = """\
{name: gold, function: "gold.py:score", weight: 1}
      - {name: rm, model: stage:reward, normalize: running}
      - {name: hub, model: org/reward-model, normalize: none}
      - {name: format, regex: "^.{10,}$", weight: -0.5}
      - {name: brief, length: 40}"""
    text = recipe(good, rewards)
    assert problems(text) == []
    stage = load_recipe("r.yaml").stages["tuned"]
    assert parents(stage) == ["sft", "reward"]
    assert [(reward.name, reward.weight, reward.normalize) for reward in stage.rewards] == [
        ("gold", 1.0, None), ("rm", 1.0, "running"), ("hub", 1.0, "none"), ("format", -0.5, None), ("brief", 1.0, None),
    ]  # fmt: skip


def test_rewards_of_an_algorithm_without_any_are_refused_once(good: str, problems: Callable[..., list[str]]) -> None:
    text = recipe(good, "{name: rm, model: stage:sft}").replace("algorithm: ppo", "algorithm: dpo")
    (found,) = problems(text)
    assert "stages.tuned.rewards: is not read by the algorithm dpo" in found
