"""A hub model that nobody pinned: a stage finds its commit once, goes on from it, and says and records it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.errors import ExitCode
from alignment.models.load import load_policy
from alignment.pipeline import chains, runs
from alignment.recipe.load import load_recipe
from alignment.recipe.schema import is_commit
from alignment.training import readback, trainers

NAME = "org/tiny"
OLD, NEW = "a1" * 20, "b2" * 20
WRITE = "for a result that can be repeated write"
Run = Callable[..., Path]
Recipe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The hub's cache; the process that reads models back has the environment in which it was started."""
    folder = tmp_path_factory.mktemp("hub")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_CACHE", str(folder))
        patch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folder))
        readback.stop()
        yield folder
        readback.stop()


@pytest.fixture
def cache(place: Path, tiny_run: Path) -> Path:
    """One model in two states; its newest is the old one until `move`."""
    folder = place / f"models--{NAME.replace('/', '--')}"
    shutil.rmtree(folder, ignore_errors=True)
    for commit in (OLD, NEW):
        shutil.copytree(tiny_run / "sft", folder / "snapshots" / commit, ignore=shutil.ignore_patterns("checkpoint-*"))
        (folder / "snapshots" / commit / runs.MANIFEST).unlink()
    weights = folder / "snapshots" / NEW / "model.safetensors"
    save_file({name: tensor + 0.01 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(OLD)
    return folder


def move(cache: Path) -> None:
    """The repository has a new commit."""
    (cache / "refs" / "main").write_text(NEW)


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    original = trainers.DPOTrainer.compute_loss

    def killed(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step and self.model.training:
            raise RuntimeError("killed")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(trainers.DPOTrainer, "compute_loss", killed)


def test_the_commit_is_said_and_recorded(
    cache: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = run_recipe(tiny_recipe("dpo", dpo={"model": NAME}), tmp_path) / "dpo"
    said = capsys.readouterr().out
    assert f"  {NAME} is not pinned; {WRITE} `{NAME}@{OLD}`\n" in said
    start = json.loads((stage / runs.MANIFEST).read_text())["model"]["start"]
    assert (start["from"], start["revision"], start["commit"]) == (NAME, None, OLD)


def test_what_is_pinned_is_not_mentioned(
    cache: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = run_recipe(tiny_recipe("dpo", dpo={"model": f"{NAME}@{NEW}"}), tmp_path) / "dpo"
    assert f"{NAME} is" not in capsys.readouterr().out
    start = json.loads((stage / runs.MANIFEST).read_text())["model"]["start"]
    assert (start["revision"], start["commit"]) == (NEW, NEW)


def test_a_stopped_stage_goes_on_from_the_commit_with_which_it_began(
    cache: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """DPO loads its reference again when it is started again: from the newest commit it would be another model."""
    recipe = tiny_recipe("dpo", dpo={"model": NAME})
    (tmp_path / "whole").mkdir()
    whole = run_recipe(recipe, tmp_path / "whole") / "dpo"
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        run_recipe(recipe, tmp_path, expect=ExitCode.FAILED)
    move(cache)
    capsys.readouterr()
    stage = run_recipe(recipe, tmp_path) / "dpo"
    assert f"{NAME} is at another commit now ({NEW}); this stage goes on from {OLD}" in capsys.readouterr().out
    ours, theirs = load_file(stage / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((stage / runs.MANIFEST).read_text())["model"]["start"]["commit"] == OLD


def test_a_commit_that_is_gone_is_refused(
    cache: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    recipe = tiny_recipe("dpo", dpo={"model": NAME})
    with monkeypatch.context() as patch:
        stop_at(3, patch)
        run_recipe(recipe, tmp_path, expect=ExitCode.FAILED)
    move(cache)
    shutil.rmtree(cache / "snapshots" / OLD)
    stage = run_recipe(recipe, tmp_path, expect=ExitCode.BAD_INPUT) / "dpo"
    assert f"model: {NAME}: this stage began from commit {OLD}, which is neither in the cache nor to be had" in (
        capsys.readouterr().err
    )
    assert not (stage / runs.MANIFEST).exists()


def test_a_stage_with_nothing_to_lose_starts_from_the_newest(
    cache: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe("dpo", dpo={"model": NAME})
    with monkeypatch.context() as patch:
        stop_at(1, patch)
        run_recipe(recipe, tmp_path, expect=ExitCode.FAILED)
    move(cache)
    stage = run_recipe(recipe, tmp_path) / "dpo"
    assert json.loads((stage / runs.MANIFEST).read_text())["model"]["start"]["commit"] == NEW


@pytest.mark.parametrize("revision", [None, OLD], ids=["unpinned", "pinned"])
def test_an_adapter_keeps_the_commit_of_its_base(
    revision: str | None, cache: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The stages after it, and everyone who loads it, would put it on the newest commit."""
    peft = {"r": 4, "target_modules": "all-linear"}
    recipe = tiny_recipe("sft", "dpo", sft={"peft": peft})
    recipe["stages"]["sft"]["model"] = {"path": NAME} | ({"revision": revision} if revision else {})
    run = run_recipe(recipe, tmp_path, until="sft")
    before, _ = load_policy(run / "sft")
    move(cache)
    after, _ = load_policy(run / "sft")
    assert all(torch.equal(p, q) for p, q in zip(before.parameters(), after.parameters(), strict=True))
    assert json.loads((run / "sft" / runs.MANIFEST).read_text())["model"]["adapter"]["base_revision"] == OLD
    run = run_recipe(recipe, tmp_path)  # dpo trains on the adapter
    config = json.loads((run / "dpo" / "adapter_config.json").read_text())
    assert (config["base_model_name_or_path"], config["revision"]) == (NAME, OLD)


def test_stages_of_one_run_that_begin_from_two_commits_are_told(
    cache: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe("reward", "dpo", reward={"model": NAME}, dpo={"model": NAME})
    run_recipe(recipe, tmp_path, until="reward")
    move(cache)
    capsys.readouterr()
    run_recipe(recipe, tmp_path)
    assert f"{NAME}: stage reward of this run began from another commit, {OLD}" in capsys.readouterr().out


def test_the_plan_says_what_is_not_pinned(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    rows = "data: {train: [{path: org/rows}, {path: org/more, revision: " + OLD + "}]}"
    path.write_text(f"name: x\nmodel: {NAME}\nstages:\n  sft: {{algorithm: sft, {rows}}}\n")
    first, second = chains.cautions(load_recipe(path), "sft")
    assert first == f"stages.sft.model: {NAME} is not pinned: its newest commit is loaded; {WRITE} `{NAME}@{OLD}`"
    assert second.startswith("stages.sft.data.train[0]: org/rows is not pinned")
    pinned = load_recipe(path, [f"model={{path: {NAME}, revision: {OLD}}}", f"stages.sft.data.train[0].revision={NEW}"])
    assert chains.cautions(pinned, "sft") == []


@pytest.mark.parametrize(
    ("named", "noted"),
    [("org/rm", f"org/rm is not pinned: its newest commit is loaded; {WRITE} `org/rm@COMMIT`"),
     (NAME, f"{NAME} is not pinned: its newest commit is loaded; {WRITE} `{NAME}@{OLD}`"),
     (f"org/rm@{OLD}", None), ("./folder", None)],
)  # fmt: skip
def test_the_plan_says_it_of_reward_models_too(cache: Path, named: str, noted: str | None, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    rewards = f"rewards: [{{name: rm, model: {named}}}], data: {{train: [{{path: org/rows, revision: {OLD}}}]}}"
    path.write_text(f"name: x\nmodel: {NAME}@{OLD}\nstages:\n  ppo: {{algorithm: ppo, {rewards}}}\n")
    found = chains.cautions(load_recipe(path), "ppo")
    assert found == ([] if noted is None else [f"stages.ppo.rewards[0].model: {noted}"])


@pytest.mark.parametrize("revision", [None, "main", "v1.0", OLD[:39], OLD.upper()])
def test_only_a_full_hash_is_a_commit(revision: str | None) -> None:
    assert is_commit(OLD)
    assert not is_commit(revision)
