"""A recipe without a fault, and how to plant one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from alignment.errors import RecipeError
from alignment.recipe.load import load_recipe

GOOD = """\
name: chain
seed: 7
chat_template: chatml
precision: {compute: bfloat16}
launch: {processes: 2}
checkpoints: {every: 100, keep: 3}
stages:
  base:
    algorithm: pretrain
    model:
      init:
        config: {model_type: llama, hidden_size: 32, rms_norm_eps: 1e-5}
        tokenizer: {train: {vocab_size: 512}}
    data: {train: [{path: corpus.jsonl}]}
  sft:
    algorithm: sft
    model: stage:base
    data:
      train:
        - {path: a.jsonl, weight: 0.5}
        - {path: b.jsonl}
      eval: [{path: c.jsonl}]
    batch: {global: 64, per_device: 16}
    train:
      learning_rate: 2e-4
      num_train_epochs: 2
      eval_strategy: steps
    peft: {r: 16, target_modules: all-linear}
    precision: {weights: bfloat16}
  reward:
    algorithm: reward
    model: stage:sft
    data: {train: [{path: p.jsonl}], eval_fraction: 0.1}
  dpo:
    algorithm: dpo
    model: stage:sft
    data: {train: [{path: p.jsonl}]}
    train: {beta: 0.05, loss_type: [sigmoid, sft]}
  compare:
    algorithm: evaluate
    models: [stage:sft, stage:dpo]
    baseline: stage:sft
    scorers: [stage:reward]
    prompts: [{path: q.jsonl}]
    pairs: [{path: p.jsonl}]
"""


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """A function that gives the problems of a text as `r.yaml`, with overrides; empty where there are none."""
    monkeypatch.chdir(tmp_path)

    def check(text: str | bytes, overrides: Sequence[str] = ()) -> list[str]:
        Path("r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        try:
            load_recipe("r.yaml", overrides)
        except RecipeError as error:
            found = error.problems
        else:
            return []
        assert found
        return found

    return check


@pytest.fixture(scope="session")
def good() -> str:
    """The text of a recipe without a fault."""
    return GOOD
