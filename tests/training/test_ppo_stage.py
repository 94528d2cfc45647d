"""PPO as a stage of a recipe: what it publishes, how it goes on after a stop, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from alignment.errors import ExitCode
from alignment.models.load import load_policy
from alignment.pipeline import runs
from alignment.recipe.schema import Reward
from alignment.training.rewards import load_rewards

Run = Callable[..., Path]
Recipe = Callable[..., dict[str, Any]]
LORA = {"r": 4, "target_modules": "all-linear"}


@pytest.fixture(scope="module")
def scored(run_recipe: Run, tiny_recipe: Recipe, tiny_run: Path) -> Path:
    """A finished reward model on the tiny SFT model."""
    return run_recipe(tiny_recipe("reward", reward={"model": str(tiny_run / "sft")})) / "reward"


def recipe_of(tiny_recipe: Recipe, tiny_run: Path, **changes: Any) -> dict[str, Any]:
    return tiny_recipe("ppo", ppo={"model": str(tiny_run / "sft")} | changes)


def log_of(stage: Path) -> list[dict[str, Any]]:
    entries = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [entry for entry in entries if "objective/scores" in entry]


def test_the_policy_is_published_and_the_critic_beside_it(
    run_recipe: Run, tiny_recipe: Recipe, tiny_run: Path, scored: Path
) -> None:
    rewards = [{"name": "rm", "model": str(scored)}]
    stage = run_recipe(recipe_of(tiny_recipe, tiny_run, rewards=rewards)) / "ppo"
    policy, tokenizer = load_policy(stage)
    critic = AutoModelForSequenceClassification.from_pretrained(stage / "critic")
    assert critic.num_labels == 1
    start = load_file(tiny_run / "sft" / "model.safetensors")
    moved = load_file(stage / "model.safetensors")
    assert any(not torch.equal(moved[name], start[name]) for name in start)
    manifest = runs.verify_parent(stage, deep=True)
    assert manifest["kind"] == "causal-lm"
    assert manifest["model"]["architecture"] == "LlamaForCausalLM"
    assert manifest["model"]["parameters"] == sum(p.numel() for p in policy.parameters())
    assert policy.generation_config.eos_token_id == [tokenizer.eos_token_id]
    lines = log_of(stage)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert set(lines[0]["time"]) >= {"generate", "score", "update", "tokens_per_second", "seconds"}
    assert {"prompt", "reply", "score", "finished"} == set(lines[0]["samples"][0])
    # The scores are the stored scale's: mean 0 over what the reward model was trained on.
    config = json.loads((scored / "config.json").read_text())
    first = lines[0]
    expected = (first["rewards/rm"] - config["score_mean"]) / config["score_std"]
    assert first["objective/scores"] == pytest.approx(expected, abs=1e-4)


def test_an_adapter_is_published_where_adapters_were_trained(
    run_recipe: Run, tiny_recipe: Recipe, tiny_run: Path
) -> None:
    stage = run_recipe(recipe_of(tiny_recipe, tiny_run, peft=LORA)) / "ppo"
    model, _ = load_policy(stage)
    assert isinstance(model, PeftModel)
    assert list(model.peft_config) == ["default"]
    names = {path.name for path in (stage / "critic").iterdir()}
    assert {"adapter_model.safetensors", "value_head.safetensors"} <= names


def test_an_adapter_is_trained_on_against_its_frozen_copy(run_recipe: Run, tiny_recipe: Recipe, tiny_run: Path) -> None:
    """The reference is the adapter at its start and not the base: their KL is 0 at first, and not later."""
    first = run_recipe(
        tiny_recipe("sft", sft={"model": str(tiny_run / "base"), "peft": LORA, "train": {"learning_rate": 0.05}})
    )
    stage = run_recipe(recipe_of(tiny_recipe, tiny_run, model=str(first / "sft"))) / "ppo"
    kl = [line["objective/kl"] for line in log_of(stage)]
    assert kl[0] == pytest.approx(0.0, abs=1e-4)
    assert abs(kl[-1]) > 1e-3
    before = load_file(first / "sft" / "adapter_model.safetensors")
    after = load_file(stage / "adapter_model.safetensors")
    assert before.keys() == after.keys()
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_a_reward_model_on_the_same_weights_shares_the_base(
    run_recipe: Run, tiny_recipe: Recipe, tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Policy, critic, reference and reward model on one base: the scores are those of the reward model alone."""
    start = {"model": str(tiny_run / "sft"), "peft": LORA | {"r": 2}, "train": {"learning_rate": 0.05}}
    reward = run_recipe(tiny_recipe("reward", reward=start)) / "reward"
    rewards = [{"name": "rm", "model": str(reward), "normalize": "none"}]
    stage = run_recipe(recipe_of(tiny_recipe, tiny_run, peft=LORA, rewards=rewards), tmp_path) / "ppo"
    assert "an adapter on the policy's base, which it shares" in capfd.readouterr().out
    own = load_rewards(
        [Reward(name="rm", model=str(reward), normalize="none")], path_of=Path, dtype=torch.float32, device="cpu",
        batch_size=4, template=None,
    )[0]  # fmt: skip
    samples = log_of(stage)[0]["samples"]
    rows = [{"prompt": [{"role": "user", "content": sample["prompt"]}]} for sample in samples]
    scores = own.score(rows, [sample["reply"] for sample in samples], [sample["finished"] for sample in samples])
    assert np.ptp(scores) > 1e-3
    assert scores == pytest.approx([sample["score"] for sample in samples], abs=2e-4)
    assert list(load_policy(stage)[0].peft_config) == ["default"]


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
def test_a_stopped_stage_goes_on_to_the_same_weights_and_log(
    peft: Any, run_recipe: Run, tiny_recipe: Recipe, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of(tiny_recipe, tiny_run, **({"peft": peft} if peft else {}))
    whole = run_recipe(recipe) / "ppo"
    from alignment.training.ppo import PPOTrainer

    own = PPOTrainer.rollout

    def killed(self: PPOTrainer, *args: Any) -> Any:
        if self.state.global_step == 3:
            raise RuntimeError("killed")
        return own(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "rollout", killed)
        run_recipe(recipe, tmp_path, expect=ExitCode.FAILED)
    again = run_recipe(recipe, tmp_path) / "ppo"
    name = "adapter_model.safetensors" if peft else "model.safetensors"
    for key, tensor in load_file(whole / name).items():
        assert torch.equal(load_file(again / name)[key], tensor), key

    def plain(stage: Path) -> list[dict[str, Any]]:
        return [{key: value for key, value in line.items() if key != "time"} for line in log_of(stage)]

    assert plain(again) == plain(whole)


def test_every_rule_on_ppo_reads_what_is_logged(run_recipe: Run, tiny_recipe: Recipe, tiny_run: Path) -> None:
    """A metric that is renamed must not silence a rule."""
    from alignment.evaluation.diagnose import judge
    from alignment.evaluation.rules import RULES
    from alignment.evaluation.series import read

    stage = run_recipe(recipe_of(tiny_recipe, tiny_run, train={"max_steps": 20})) / "ppo"
    judged = judge("ppo", read(stage / "log.jsonl"))
    wanted = {rule.name for rule in RULES if any(key.startswith(("objective/", "completions/", "policy/", "val/"))
                                                 for key in rule.reads)}  # fmt: skip
    assert wanted
    assert wanted <= set(judged.rules)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"critic_init": "reward"}}, "train.critic_init: reward needs a reward model"),
        ({"train": {"num_mini_batches": 3}}, "num_mini_batches 3 does not divide the 8 episodes"),
        ({"batch": {"global": 64, "per_device": 4}}, "48 prompts are fewer than the 64 episodes of one update"),
    ],
)
def test_what_cannot_work_is_one_line(
    changes: dict[str, Any], words: str, run_recipe: Run, tiny_recipe: Recipe, tiny_run: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    run_recipe(recipe_of(tiny_recipe, tiny_run, **changes), expect=2)
    error = capfd.readouterr().err
    assert words in error
    assert "Traceback" not in error
