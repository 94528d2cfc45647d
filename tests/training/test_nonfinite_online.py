"""PPO, RLOO, GRPO: a number that is not finite stops before the update, names the prompts, and the state is kept."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.errors import ExitCode, NonFiniteError
from alignment.pipeline import runs, seals
from alignment.training import nonfinite, ppo, rewards, trainers

KINDS = ("ppo", "rloo", "grpo")
PROMPTS = 6  # of which a step of RLOO or GRPO has two: step 4 begins the second epoch
Run = Callable[..., Path]
Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def recipe(tiny_run: Path, tiny_recipe: Callable[..., dict[str, Any]], tmp_path_factory: Any, write_jsonl: Any) -> Make:
    """A function that makes a recipe of one stage, a checkpoint every two steps; keywords go to its `train`."""
    texts = [f"Tell me about the {word}." for word in "cat dog sun moon red blue".split()]
    rows = [{"prompt": [{"role": "user", "content": text}]} for text in texts]
    path = write_jsonl(tmp_path_factory.mktemp("few") / "prompts.jsonl", rows)

    def make(kind: str, **train: Any) -> dict[str, Any]:
        own = {"response_length": 8, "num_ppo_epochs": 1, "num_mini_batches": 2}
        if kind != "ppo":
            own = {"max_completion_length": 8, "num_generations": 4, "gradient_checkpointing": False}
        batch = {"global": 4, "per_device": 2} if kind == "ppo" else {"global": 8, "per_device": 4}
        change = {
            "algorithm": kind, "model": str(tiny_run / "sft"), "data": {"train": [{"path": str(path)}]}, "batch": batch,
            "rewards": [{"name": "letters", "regex": "[a-e]", "normalize": "running"}],
        }  # fmt: skip
        found = tiny_recipe("ppo", ppo=change)
        found["stages"]["ppo"]["train"] = {"max_steps": 6, "learning_rate": 1e-3, "logging_steps": 2, **own, **train}
        return found

    return make


@pytest.fixture(scope="module")
def whole(run_recipe: Run, recipe: Make) -> Callable[[str], Path]:
    """A function that gives the folder of an undisturbed run of a kind."""
    done: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in done:
            done[kind] = run_recipe(recipe(kind)) / "ppo"
        return done[kind]

    return of


def plant(fault: str, kind: str, patch: pytest.MonkeyPatch, step: int = 4) -> None:
    """NaN in a loss, a gradient, or (in the update itself) a weight."""
    owner, name = (ppo.PPOTrainer, "_micro_batch") if kind == "ppo" else (
        {"rloo": trainers.RLOOTrainer, "grpo": trainers.GRPOTrainer}[kind], "compute_loss"
    )  # fmt: skip
    original, look = getattr(owner, name), nonfinite.Finite.on_pre_optimizer_step

    def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        if self.state.global_step != step - 1 or not torch.is_grad_enabled():
            return found
        return (found[0] * float("nan"), *found[1:]) if kind == "ppo" else found * float("nan")

    def before_update(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        first = next(p for p in self.trainer.model.parameters() if p.grad is not None)
        if state.global_step == step - 1 and fault == "gradient":
            first.grad[0] = float("inf")
        look(self, args, state, control, **kwargs)
        if state.global_step == step - 1 and fault == "weight" and getattr(self.trainer, "taken", 1) == 1:
            with torch.no_grad():
                first[-1] = float("nan")

    if fault == "loss":
        patch.setattr(owner, name, loss)
    else:
        patch.setattr(nonfinite.Finite, "on_pre_optimizer_step", before_update)


def names(stage: Path) -> list[str]:
    found = seals.checkpoints(stage)
    assert all(seals.seal_fault(path) is None for path in found)
    return [path.name for path in found]


def log_of(stage: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def require_same(stage: Path, other: Path) -> None:
    """Weights and log, bit for bit."""
    ours, theirs = load_file(stage / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert log_of(stage) == log_of(other)


@pytest.mark.parametrize("fault", ["loss", "gradient"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_stops_before_the_update_and_the_state_that_is_kept_goes_on_to_the_bit(
    kind: str, fault: str, recipe: Make, run_recipe: Run, whole: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        plant(fault, kind, patch)
        stage = run_recipe(recipe(kind), tmp_path, expect=ExitCode.NON_FINITE) / "ppo"
    said = capsys.readouterr().err
    assert ("step 4: the loss is nan;" if fault == "loss" else "step 4: a gradient is not finite") in said
    assert "nothing was updated. It was in rows " in said
    assert "The state before it is in checkpoint-3" in said  # the running scale of its reward is put back
    assert names(stage) == ["checkpoint-3", "checkpoint-2"]
    assert not (stage / runs.MANIFEST).exists()
    record = json.loads((stage / nonfinite.RECORD).read_text())
    rows = record["ranks"][0]["rows"]
    assert record["step"] == 4
    assert (
        len(rows)
        == {"ppo": {"loss": 2, "gradient": 2}, "rloo": {"loss": 4, "gradient": 8}}.get(
            kind, {"loss": 4, "gradient": 8}
        )[fault]
    )  # of the forward pass, or of all of the optimizer step
    assert set(rows) <= set(range(PROMPTS))
    for path in (stage / "checkpoint-3").rglob("*.safetensors"):
        assert all(bool(t.isfinite().all()) for t in load_file(path).values())
    require_same(run_recipe(recipe(kind), tmp_path) / "ppo", whole(kind))


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_the_replies_of_a_cycle_are_kept_too(
    kind: str, recipe: Make, run_recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 4 trains on replies that were drawn in step 3."""
    train = {"num_iterations": 2, "max_steps": 4, "logging_steps": 1}
    (tmp_path / "whole").mkdir()
    undisturbed = run_recipe(recipe(kind, **train), tmp_path / "whole") / "ppo"
    with monkeypatch.context() as patch:
        plant("gradient", kind, patch)
        stage = run_recipe(recipe(kind, **train), tmp_path, expect=ExitCode.NON_FINITE) / "ppo"
    assert names(stage)[0] == "checkpoint-3"
    require_same(run_recipe(recipe(kind, **train), tmp_path) / "ppo", undisturbed)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broken_weight_is_named_before_replies_are_drawn_from_it(
    kind: str, recipe: Make, run_recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    plant("weight", kind, monkeypatch, step=3)
    stage = run_recipe(recipe(kind), tmp_path, expect=ExitCode.NON_FINITE) / "ppo"
    said = capsys.readouterr().err
    assert "step 3: 1 weights are not finite (" in said
    assert "The last good checkpoint is checkpoint-2" in said
    assert names(stage) == ["checkpoint-2"]


def test_ppo_says_when_the_update_was_half_done(
    recipe: Make, run_recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its second minibatch: the weights are no longer those of the step's beginning, and none are kept."""
    original = ppo.PPOTrainer._micro_batch

    def loss(self: Any, *args: Any) -> Any:
        found = original(self, *args)
        return (found[0] * float("nan"), *found[1:]) if self.state.global_step == 3 and self.taken == 1 else found

    monkeypatch.setattr(ppo.PPOTrainer, "_micro_batch", loss)
    stage = run_recipe(recipe("ppo"), tmp_path, expect=ExitCode.NON_FINITE) / "ppo"
    said = capsys.readouterr().err
    assert "step 4: the loss is nan; 1 optimizer steps of it were made before. It was in rows " in said
    assert "The last good checkpoint is checkpoint-2" in said
    assert names(stage) == ["checkpoint-2"]


def test_ppo_names_the_prompt_of_the_reply_that_does_it(
    recipe: Make, run_recipe: Run, whole: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One value of one episode; whitening would spread it to the advantages of all."""
    original = ppo.PPOTrainer._judge
    guilty: list[int] = []

    def judge(self: Any, model: Any, episodes: Any, mask: Any) -> Any:
        log_probs, reference, values, entropy = original(self, model, episodes, mask)
        if self.state.global_step == 3:
            guilty.append(episodes.rows[1]["row"])
            values[1, 0] = float("nan")
        return log_probs, reference, values, entropy

    with monkeypatch.context() as patch:
        patch.setattr(ppo.PPOTrainer, "_judge", judge)
        run_recipe(recipe("ppo"), tmp_path, expect=ExitCode.NON_FINITE)
    said = capsys.readouterr().err
    assert f"step 4: values of a reply are not finite; nothing was updated. It was in rows {guilty[0]} (" in said
    assert "The state before it is in checkpoint-3" in said
    require_same(run_recipe(recipe("ppo"), tmp_path) / "ppo", whole("ppo"))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_that_is_not_finite_keeps_the_state_before_it(
    kind: str, recipe: Make, run_recipe: Run, whole: Callable[[str], Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """One rank finds it while it scores; the replies are drawn again, the same ones."""
    asked: list[Any] = []

    def judge(judge: Any, rows: Any, replies: Any, finished: Any) -> Any:
        asked.append(rows[0])
        if len(asked) == 4:
            raise NonFiniteError(f"rewards: letters gave nan for {rewards.row_name(rows, 0)}; see it")
        return original(judge, rows, replies, finished)

    original = rewards.judge_replies
    with monkeypatch.context() as patch:
        patch.setattr(rewards, "judge_replies", judge)
        stage = run_recipe(recipe(kind), tmp_path, expect=ExitCode.NON_FINITE) / "ppo"
    said = capsys.readouterr().err
    named = f"row {asked[3]['row']} ({asked[3]['prompt'][-1]['content']!r})"
    assert f"step 4: rewards: letters gave nan for {named}; see it; nothing was updated." in said
    assert "The state before it is in checkpoint-3" in said
    assert names(stage)[0] == "checkpoint-3"
    require_same(run_recipe(recipe(kind), tmp_path) / "ppo", whole(kind))


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_the_single_prompt_is_named(
    kind: str, recipe: Make, run_recipe: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Of the replies of a forward pass, the one that does it."""
    owner = {"rloo": trainers.RLOOTrainer, "grpo": trainers.GRPOTrainer}[kind]
    original, guilty = owner.compute_loss, []

    def loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 2 and self.model.training and not guilty:
            guilty.append(inputs["completion_ids"][2].clone())
        found = original(self, model, inputs, *args, **kwargs)
        return found * float("inf") if guilty and any(torch.equal(ids, guilty[0]) for ids in inputs["completion_ids"]) \
            else found  # fmt: skip

    monkeypatch.setattr(owner, "compute_loss", loss)
    stage = run_recipe(recipe(kind), tmp_path, expect=ExitCode.NON_FINITE) / "ppo"
    record = json.loads((stage / nonfinite.RECORD).read_text())["ranks"][0]
    assert record["alone"] == [record["rows"][2]]
    assert f"alone, row {record['alone'][0]} gives it too ('user" in capsys.readouterr().err
