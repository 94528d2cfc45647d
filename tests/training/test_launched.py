"""Real launches: two ranks give what one process gives, and ZeRO really shards."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from alignment.pipeline import runs

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its kernels with g++")


def launch(recipe: dict[str, Any], folder: Path, root: Path) -> Path:
    """Run a recipe through `alignment run`, as a user does."""
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-m", "alignment", "run", str(path), "--runs", str(folder)], cwd=root, env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / recipe["name"]


def losses(stage: Path) -> list[float]:
    lines = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@needs_compiler
@pytest.mark.parametrize("algorithm", ["sft", "dpo"])
@pytest.mark.parametrize("deepspeed", [None, "ds_configs/zero2.json", "ds_configs/zero3.json"])
def test_two_ranks_train_as_one_process_does(
    algorithm: str,
    deepspeed: str | None,
    root: Path,
    tiny_run: Path,
    tiny_recipe: Callable[..., dict[str, Any]],
    run_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    start = {"model": str(tiny_run / ("base" if algorithm == "sft" else "sft"))}
    one = run_recipe(tiny_recipe(algorithm, **{algorithm: start}), tmp_path)
    recipe = tiny_recipe(algorithm, **{algorithm: start}) | {"name": "two"}
    recipe["launch"] = {"processes": 2} | ({"deepspeed": str(root / deepspeed)} if deepspeed else {})
    two = launch(recipe, tmp_path, root)
    assert losses(two / algorithm) == pytest.approx(losses(one / algorithm), rel=1e-4)
    assert runs.read_manifest(two / algorithm)["batch"] == {
        "global": 8, "per_device": 4, "processes": 2, "accumulation": 1,
    }  # fmt: skip
    ours, theirs = (load_file(run / algorithm / "model.safetensors") for run in (two, one))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.float().numpy() == pytest.approx(theirs[name].numpy(), abs=2e-4), name


@needs_compiler
@pytest.mark.parametrize("adapters", [False, True], ids=["full", "lora"])
def test_ppo_is_the_same_however_it_is_sharded(
    adapters: bool,
    root: Path,
    tiny_run: Path,
    tiny_recipe: Callable[..., dict[str, Any]],
    tmp_path: Path,
) -> None:
    """Two ranks, plain and ZeRO-1, 2, 3: the same replies, numbers and weights; what is saved loads."""
    changes: dict[str, Any] = {"model": str(tiny_run / "sft"), "batch": {"per_device": 2}}
    if adapters:
        changes["peft"] = {"r": 4, "target_modules": "all-linear"}
    found = {}
    for name, file in {"plain": None, "zero1": "zero1", "zero2": "zero2", "zero3": "zero3"}.items():
        recipe = tiny_recipe("ppo", ppo=changes) | {"name": name}
        recipe["launch"] = {"processes": 2} | ({"deepspeed": str(root / f"ds_configs/{file}.json")} if file else {})
        stage = launch(recipe, tmp_path, root) / "ppo"
        log = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
        weights = load_file(stage / ("adapter_model.safetensors" if adapters else "model.safetensors"))
        found[name] = [line for line in log if "objective/scores" in line], weights
    for name in ("zero1", "zero2", "zero3"):
        for ours, theirs in zip(found[name][0], found["plain"][0], strict=True):
            assert ours["samples"] == theirs["samples"]
            for key in ("objective/scores", "objective/kl", "loss/policy_avg", "loss/value_avg", "val/ratio"):
                assert ours[key] == pytest.approx(theirs[key], abs=1e-5), (name, key)
        for key, tensor in found["plain"][1].items():
            assert found[name][1][key].float().numpy() == pytest.approx(tensor.numpy(), abs=2e-4), (name, key)


def test_by_hand_as_on_any_cluster(
    root: Path, tiny_run: Path, tiny_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base")})
    path = tmp_path / "hand.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
        "--main_process_port", "0", "-m", "alignment.train", str(path), "--stage", "sft", "--runs", str(tmp_path),
        "--set", "seed=11",
    ]  # fmt: skip
    environment = dict(os.environ, ACCELERATE_USE_CPU="true")
    first = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    stage = tmp_path / "tiny" / "sft"
    assert runs.read_status(stage)["state"] == "done", first.stdout + first.stderr
    assert runs.verify_parent(stage, deep=True)["batch"]["processes"] == 2
    again = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode != 0
    assert "stage sft: done" in again.stderr
