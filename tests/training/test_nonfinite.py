"""A number that is not finite stops the run before the update, and says which rows it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from alignment.errors import ExitCode
from alignment.pipeline import plan as planning
from alignment.pipeline import runs, seals
from alignment.recipe.load import load_recipe
from alignment.training import nonfinite, trainers

Recipe = Callable[..., dict[str, Any]]
Run = Callable[..., Path]
CLASSES = {"sft": trainers.SFTTrainer, "reward": trainers.RewardTrainer, "dpo": trainers.DPOTrainer,
           "kto": trainers.KTOTrainer}  # fmt: skip
PLANTED_WORKER = Path(__file__).with_name("planted_worker.py")


def plant(fault: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault at step 4, between the checkpoints of steps 2 and 4."""
    if fault == "loss":
        original = CLASSES[name].compute_loss

        def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
            found = original(self, *args, **kwargs)
            return found * float("nan") if self.state.global_step == 3 and self.model.training else found

        monkeypatch.setattr(CLASSES[name], "compute_loss", loss)
        return
    theirs = nonfinite.Finite.on_pre_optimizer_step

    def faulty(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = next(self.trainer.model.parameters())
        if state.global_step == 3 and fault == "gradient":
            first.grad[0] = float("inf")
        theirs(self, args, state, control, **kwargs)
        if state.global_step == 3 and fault == "weight":
            with torch.no_grad():
                first[-1] = float("nan")  # in the update itself: loss and gradients were finite

    monkeypatch.setattr(nonfinite.Finite, "on_pre_optimizer_step", faulty)


@pytest.mark.parametrize("fault", ["loss", "gradient", "weight"])
@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto"])
def test_it_stops_before_the_update(
    name: str, fault: str, tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = tiny_recipe(name, **{name: {"model": str(tiny_run / ("base" if name == "sft" else "sft"))}})
    with monkeypatch.context() as patch:
        plant(fault, name, patch)
        run = run_recipe(recipe, tmp_path, expect=ExitCode.NON_FINITE)
    stage, said = run / name, capsys.readouterr().err
    found = [path.name for path in seals.checkpoints(stage)]
    assert all(seals.seal_fault(stage / path) is None for path in found)
    for path in found:
        assert all(bool(t.isfinite().all()) for t in load_file(stage / path / "model.safetensors").values())
    assert not (stage / "manifest.json").exists()
    assert runs.read_status(stage)["code"] == ExitCode.NON_FINITE
    if fault == "weight":
        assert "step 4: 1 weights are not finite (model." in said
        assert "The last good checkpoint is checkpoint-2" in said
        assert found == ["checkpoint-2"]
        return
    assert "step 4: " in said
    assert "nothing was updated. It was in rows " in said
    assert "The state before it is in checkpoint-3" in said
    assert found == ["checkpoint-3", "checkpoint-2"]
    record = json.loads((stage / nonfinite.RECORD).read_text())
    rows = record["ranks"][0]["rows"]
    assert record["step"] == 4
    assert len(rows) == (4 if fault == "loss" else 8)  # of the forward pass, or of all of the step
    assert all(0 <= row < 96 for row in rows)


def test_the_state_that_is_kept_goes_on_to_the_bit(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base")})
    (tmp_path / "whole").mkdir()
    whole = run_recipe(recipe, tmp_path / "whole")
    with monkeypatch.context() as patch:
        plant("gradient", "sft", patch)
        run_recipe(recipe, tmp_path, expect=ExitCode.NON_FINITE)
    run = run_recipe(recipe, tmp_path)
    ours, theirs = (load_file(folder / "sft" / "model.safetensors") for folder in (run, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    mine, undisturbed = (
        [{**json.loads(line), "time": None} for line in (folder / "sft" / runs.LOG).read_text().splitlines()]
        for folder in (run, whole)
    )
    assert mine == undisturbed  # the sums of the step that went wrong are in no line


def test_the_single_row_is_named(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of eight rows of a step and four of a forward pass, the one that does it."""
    original = trainers.SFTTrainer.compute_loss
    guilty: list[torch.Tensor] = []

    def loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and model.training and not guilty:
            row = inputs["input_ids"][2]
            guilty.append(row[inputs["attention_mask"][2].bool()].clone())
        found = original(self, model, inputs, *args, **kwargs)
        hit = guilty and any(torch.equal(row[: len(guilty[0])], guilty[0]) for row in inputs["input_ids"])
        return found * float("inf") if hit else found

    monkeypatch.setattr(trainers.SFTTrainer, "compute_loss", loss)
    run = run_recipe(tiny_recipe("sft", sft={"model": str(tiny_run / "base")}), tmp_path, expect=ExitCode.NON_FINITE)
    record = json.loads((run / "sft" / nonfinite.RECORD).read_text())["ranks"][0]
    assert record["alone"] == [record["rows"][2]]
    said = capsys.readouterr().err
    assert "step 3: the loss is inf" in said
    assert f"alone, row {record['alone'][0]} gives it too ('user" in said


def test_broken_weights_are_not_blamed_on_a_row(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    begin = nonfinite.Finite.on_step_begin

    def broken(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        begin(self, args, state, control, **kwargs)
        if state.global_step == 3:
            with torch.no_grad():
                self.trainer.model.model.norm.weight[0] = float("nan")

    monkeypatch.setattr(nonfinite.Finite, "on_step_begin", broken)
    run = run_recipe(tiny_recipe("sft", sft={"model": str(tiny_run / "base")}), tmp_path, expect=ExitCode.NON_FINITE)
    said = capsys.readouterr().err
    assert "1 weights are not finite already (model.norm.weight): no row is to blame" in said
    assert "The last good checkpoint is checkpoint-2" in said
    assert [path.name for path in seals.checkpoints(run / "sft")] == ["checkpoint-2"]


def launched(fault: str, recipe: dict[str, Any], folder: Path, root: Path) -> tuple[planning.StagePlan, str]:
    """A real launch of the recipe's one stage on two ranks, with a fault in the second one at step 4."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"launch": {"processes": 2}}, sort_keys=False))
    (name,) = recipe["stages"]
    plan = planning.prepare(load_recipe(path), name, runs=folder, run="x", recipe_path=path)
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--main_process_port", "0", str(PLANTED_WORKER), fault, "1", "4", str(planning.write_stage(plan.spec)),
    ]  # fmt: skip
    environment = dict(os.environ, ACCELERATE_USE_CPU="true", PYTHONPATH=str(root))
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600)
    return plan, done.stdout + done.stderr


ON_ONE_RANK = {
    "ppo-loss": "step 4: the loss is nan; nothing was updated. It was in rows ",
    "ppo-reward": "step 4: rewards: letters gave nan for row ",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ON_ONE_RANK)
def test_one_rank_of_ppo_stops_all(fault: str, root: Path, tiny_run: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    """The other rank would wait for it in the next sum."""
    train = {"max_steps": 5, "num_mini_batches": 1}
    plan, said = launched(
        fault, tiny_recipe("ppo", ppo={"model": str(tiny_run / "sft"), "train": train}), tmp_path, root
    )
    status = runs.read_status(plan.spec.output)
    assert (status["state"], status["code"]) == ("failed", ExitCode.NON_FINITE), said
    record = json.loads((plan.spec.output / nonfinite.RECORD).read_text())
    assert [one["rank"] for one in record["ranks"]] == [0, 1]
    assert [path.name for path in seals.checkpoints(plan.spec.output)] == ["checkpoint-3", "checkpoint-2"]
    assert "The state before it is in checkpoint-3" in status["message"]
    assert status["message"].startswith(ON_ONE_RANK[fault])


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["loss", "gradient", "weight"])
def test_one_rank_stops_all(fault: str, root: Path, tiny_run: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    plan, said = launched(fault, tiny_recipe("sft", sft={"model": str(tiny_run / "base")}), tmp_path, root)
    status = runs.read_status(plan.spec.output)
    assert (status["state"], status["code"]) == ("failed", ExitCode.NON_FINITE), said
    assert "step 4: " in status["message"]
    found = [folder.name for folder in seals.checkpoints(plan.spec.output)]
    if fault == "weight":
        assert found == ["checkpoint-2"]
        assert "1 weights of rank 1 are not finite" in status["message"]
        return
    assert found == ["checkpoint-3", "checkpoint-2"]
    record = json.loads((plan.spec.output / nonfinite.RECORD).read_text())
    assert [one["rank"] for one in record["ranks"]] == [0, 1]
    assert [len(one["rows"]) for one in record["ranks"]] == [4, 4]
    assert not set(record["ranks"][0]["rows"]) & set(record["ranks"][1]["rows"])
    if fault == "loss":
        assert "of rank 1" in status["message"]
        assert "of rank 0" not in status["message"]
