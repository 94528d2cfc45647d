"""The first loss of every row, and policy against reference in the three ways a DPO stage can start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import full_train
from alignment.recipe.schema import Stage

Recipe = Callable[..., dict[str, Any]]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
PREFERENCE_ROWS = [row.name for row in ALGORITHMS.values() if row.build.endswith(":dpo")]


def log_of(stage: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]


def first(stage: Path) -> dict[str, Any]:
    return log_of(stage)[0]


@pytest.mark.parametrize("name", PREFERENCE_ROWS)
def test_the_first_loss_of_each_dpo_row_is_what_its_formula_says(
    name: str, tiny_run: Path, run_recipe: Callable[..., Path], tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe("dpo", dpo={"algorithm": name, "model": str(tiny_run / "sft"), "train": {"max_steps": 1}})
    run = run_recipe(recipe, tmp_path)
    train = full_train(Stage.model_validate(recipe["stages"]["dpo"]))
    expected = ALGORITHMS[name].expected_first_loss(train)
    assert first(run / "dpo")["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("name", "expected"), [("reward", 0.6931), ("kto", 0.5)])
def test_the_first_loss_of_reward_and_kto(
    name: str, expected: float, tiny_run: Path, run_recipe: Callable[..., Path], tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe(name, **{name: {"model": str(tiny_run / "sft"), "train": {"max_steps": 1}}})
    run = run_recipe(recipe, tmp_path)
    assert first(run / name)["loss"] == pytest.approx(expected, abs=1e-4)


def test_policy_equals_reference_full_new_adapter_and_adapter_continued(
    run_recipe: Callable[..., Path], tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe("base", "sft", sft={"peft": LORA})
    stages = recipe["stages"]
    dpo = tiny_recipe("dpo")["stages"]["dpo"]
    stages["continued"] = dpo  # no peft: goes on with the adapter of sft
    stages["new"] = dpo | {"peft": LORA}  # merges it, then a new one
    stages["full"] = dpo | {"model": "stage:base"}
    run = run_recipe(recipe, tmp_path)
    for name, adapter in (("continued", True), ("new", True), ("full", False)):
        entry = first(run / name)
        # beta * (log-probability of the policy - of the reference), per answer: both zero, not only their difference.
        assert entry["rewards/chosen"] == pytest.approx(0, abs=1e-5), name
        assert entry["rewards/rejected"] == pytest.approx(0, abs=1e-5), name
        assert (run / name / "adapter_config.json").exists() is adapter
        assert log_of(run / name)[5]["loss"] < 0.69
    # The reference is the SFT model, not the base under its adapter: the same log-probabilities as a full copy of it.
    assert first(run / "continued")["logps/chosen"] == pytest.approx(first(run / "new")["logps/chosen"], abs=2e-3)
    assert abs(first(run / "continued")["logps/chosen"] - first(run / "full")["logps/chosen"]) > 1e-2


def test_a_reference_that_is_not_the_start_is_named(
    tiny_run: Path,
    run_recipe: Callable[..., Path],
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from alignment.training import builders

    original = builders.load_policy

    def other(path: str, *, trainable: bool = False, **options: Any) -> Any:
        return original(path if trainable else tiny_run / "base", trainable=trainable, **options)

    monkeypatch.setattr(builders, "load_policy", other)
    run = run_recipe(tiny_recipe("dpo", dpo={"model": str(tiny_run / "sft")}), tmp_path, expect=1)
    said = capsys.readouterr().err
    assert "reference: a chosen answer has log-probability" in said
    assert "the base instead of the SFT model" in said
    assert json.loads((run / "dpo" / "status.json").read_text())["code"] == 1
    assert not (run / "dpo" / "manifest.json").exists()
