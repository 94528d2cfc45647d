"""A small recipe on local files, and what a worker would leave behind, without a worker."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.pipeline import runs
from alignment.pipeline.plan import StagePlan, StageSpec, prepare, write_stage
from alignment.recipe.load import load_recipe
from alignment.recipe.schema import Recipe

RECIPE = """\
name: small
seed: 7
chat_template: chatml
precision: {compute: float32}
model: base
stages:
  sft:
    algorithm: sft
    data: {train: [{path: rows/sft.jsonl}]}
    batch: {global: 8, per_device: 4}
    train: {learning_rate: 2.0e-4, max_length: 64, num_train_epochs: 1}
  dpo:
    algorithm: dpo
    model: stage:sft
    data: {train: [{path: rows/preferences.jsonl}]}
    batch: {global: 8, per_device: 4}
    train: {beta: 0.1, max_length: 64}
  kto:
    algorithm: kto
    model: stage:sft
    data: {train: [{path: rows/preferences.jsonl}]}
    batch: {global: 8, per_device: 4}
    train: {max_length: 64}
  evaluate:
    algorithm: evaluate
    models: [stage:sft, stage:dpo]
    baseline: stage:sft
    rewards: [{function: "judge.py:score", name: length}]
    prompts: [{path: rows/prompts.jsonl}]
    sampling: {max_new_tokens: 8}
"""
# Without shapes it would be Llama 7B, whose checkpoints need more room than a disk may have.
SMALL = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1,
         "num_attention_heads": 2, "vocab_size": 64}  # fmt: skip
TALK = {"prompt": [{"role": "user", "content": "Hello?"}], "chosen": [{"role": "assistant", "content": "Hello!"}],
        "rejected": [{"role": "assistant", "content": "No."}]}  # fmt: skip


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe, rows, a judge and something like a model, which is the working directory."""
    (tmp_path / "rows").mkdir()
    rows = {"sft": {"messages": TALK["prompt"] + TALK["chosen"]}, "preferences": TALK,
            "prompts": {"prompt": TALK["prompt"]}}  # fmt: skip
    for name, row in rows.items():
        (tmp_path / "rows" / f"{name}.jsonl").write_text((json.dumps(row) + "\n") * 16)
    (tmp_path / "judge.py").write_text("def score(prompts, completions, **columns):\n    return [1.0]\n")
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "base" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def load(workplace: Path) -> Callable[..., Recipe]:
    """Load the recipe, with overrides."""
    return lambda *overrides: load_recipe("recipe.yaml", overrides)


@pytest.fixture
def look(workplace: Path) -> Callable[..., StagePlan]:
    """Prepare one stage of the recipe."""

    def prepare_one(recipe: Recipe, name: str, **options: Any) -> StagePlan:
        where = {"runs": Path("runs"), "run": recipe.name, "recipe_path": Path("recipe.yaml")}
        return prepare(recipe, name, **(where | options))

    return prepare_one


def begin(spec: StageSpec) -> None:
    """Leave behind what a worker leaves that was stopped after its first checkpoint."""
    write_stage(spec)
    folder = spec.output / "checkpoint-2"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(b"half trained")
    runs.seal(folder, step=2, world_size=1, fingerprint_sha256=spec.fingerprint_sha256)


@pytest.fixture
def start() -> Callable[..., None]:
    """The function `begin`."""
    return begin


def publish(spec: StageSpec, weights: bytes = b"trained") -> None:
    """Leave behind what a worker leaves that finished."""
    spec.output.mkdir(parents=True, exist_ok=True)
    (spec.output / "model.safetensors").write_bytes(weights)
    (spec.output / "config.json").write_text("{}")
    files = {name: entry for name, entry in runs.settle(spec.output).items() if name != runs.STAGE}
    runs.write_manifest(spec.output, {
        "run": spec.run, "stage": spec.stage, "algorithm": spec.config.algorithm, "kind": "causal-lm",
        "fingerprint": spec.fingerprint, "fingerprint_sha256": spec.fingerprint_sha256, "files": files,
        "weights_sha256": runs.weights_sha256(files), "metrics": {"eval_loss": 1.25}, "forced": list(spec.forced),
        "parents": {
            name: {"weights_sha256": (runs.read_manifest(folder) or {})["weights_sha256"]}
            for name, folder in spec.parents.items()
        },
    })  # fmt: skip


@pytest.fixture
def finish() -> Callable[..., None]:
    """The function `publish`."""
    return publish
