"""Two steps of every shipped recipe, in this process; one through the launcher; each DeepSpeed file with two ranks."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from alignment.pipeline import runs as files
from alignment.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "recipes").rglob("*.yaml"))
DEEPSPEED = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "ds_configs").glob("zero*.json"))
# The long ones, whose stages other recipes cover.
SLOW = {"recipes/tiny/dpo-family.yaml"}


@pytest.mark.parametrize(
    "recipe", [pytest.param(path, marks=pytest.mark.slow) if path in SLOW else path for path in RECIPES]
)
def test_every_recipe_smokes(recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignment.training.smoke import smoke

    monkeypatch.chdir(ROOT)
    loaded = load_recipe(recipe)
    assert smoke(loaded, runs=tmp_path, run="x") == 0
    for name, stage in loaded.stages.items():
        manifest = files.verify_parent(tmp_path / "x-smoke" / name, deep=True)
        assert manifest["algorithm"] == stage.algorithm


def test_rewards_are_made_small(tmp_path: Path) -> None:
    from alignment.models.load import load_scorer
    from alignment.training.rewards import stored_scale
    from alignment.training.smoke import _small_reward

    stay = [
        {"name": "a", "model": "stage:reward", "weight": 2.0},
        {"name": "b", "regex": "x"},
        {"name": "c", "length": 4},
    ]
    assert [_small_reward(reward, tmp_path) for reward in stay] == stay
    judge = _small_reward({"name": "d", "function": "gone.py:f", "weight": -1.0}, tmp_path)
    assert judge == {"name": "d", "function": "alignment.training.smoke:length_reward", "weight": -1.0}
    made = _small_reward({"name": "e", "model": "org/name", "normalize": "stored"}, tmp_path)
    scorer, _ = load_scorer(made["model"])
    assert stored_scale(Path(made["model"]), scorer) == (0.0, 1.0)
    assert made["normalize"] == "stored"


def alignment(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment: dict[str, Any] = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-m", "alignment", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=900,
    )  # fmt: skip


def test_a_recipe_smokes_through_the_launcher(tmp_path: Path) -> None:
    done = alignment("run", "recipes/zephyr-7b/qlora.yaml", "--smoke", "--launch", "--runs", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("sft", "dpo"):
        stage = tmp_path / "zephyr-7b-qlora-smoke" / name
        assert files.read_status(stage)["state"] == "done"
        assert files.read_manifest(stage)["model"]["adapter"] is not None


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its kernels with g++, which is not here")
@pytest.mark.parametrize("config", DEEPSPEED)
def test_every_deepspeed_file_smokes_with_two_ranks(config: str, tmp_path: Path) -> None:
    halves = [f"stages.{name}.batch.per_device=4" for name in ("base", "reward", "kto")]
    overrides = ["launch.processes=2", f"launch.deepspeed={config}", *halves]
    done = alignment(
        "run", "recipes/tiny/chain.yaml", "--smoke", "--launch", "--runs", str(tmp_path),
        *(word for override in overrides for word in ("--set", override)),
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("base", "sft", "reward", "kto"):
        manifest = files.verify_parent(tmp_path / "tiny-chain-smoke" / name, deep=True)
        assert manifest["batch"]["processes"] == 2
        assert (tmp_path / "tiny-chain-smoke" / name / "model.safetensors").stat().st_size > 100_000
    assert json.loads((tmp_path / "tiny-chain-smoke" / "evaluate" / "metrics.json").read_text())


def test_a_recipe_for_a_cluster_becomes_one_for_this_host(tmp_path: Path) -> None:
    from alignment.training.smoke import _on_this_host

    assert _on_this_host({"processes": 16, "nodes": 2, "slurm": {"nodes": 2}, "env": {"A": "b"}}) == {
        "processes": 2, "env": {"A": "b"},
    }  # fmt: skip
    assert _on_this_host({"accelerate": "own.yaml"}) == {"accelerate": "own.yaml"}  # refuses `processes` beside it
