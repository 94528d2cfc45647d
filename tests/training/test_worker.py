"""One stage from start to manifest: what it writes, how it resumes, what stops it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from alignment.errors import ExitCode
from alignment.models.load import load_policy, load_scorer
from alignment.pipeline import runs, seals
from alignment.training import callbacks, nonfinite, trainers, worker

Recipe = Callable[..., dict[str, Any]]
Run = Callable[..., Path]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def weights(stage: Path) -> dict[str, torch.Tensor]:
    name = "adapter_model.safetensors" if (stage / "adapter_config.json").exists() else "model.safetensors"
    return load_file(stage / name)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps_of(stage: Path) -> list[int]:
    lines = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "loss" in line]


class At(TrainerCallback):
    """Does something at the end of one step."""

    def __init__(self, step: int, action: Callable[[], None]):
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """Let something happen at the end of one step of the next stage, after all other callbacks of that step."""

    def plant(step: int, action: Callable[[], None]) -> None:
        original = worker._instrument

        def instrument(ctx: Any, trainer: Any) -> Any:
            preemption = original(ctx, trainer)
            # In front of the preemption callback, which looks at the end of the same step.
            trainer.callback_handler.callbacks.insert(0, At(step, action))
            return preemption

        monkeypatch.setattr(worker, "_instrument", instrument)

    return plant


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def die() -> None:
    raise Killed


# --- output -------------------------------------------------------------------------------------------------------


def test_a_stage_leaves_a_plain_folder_and_a_manifest(tiny_run: Path) -> None:
    stage = tiny_run / "sft"
    manifest = runs.verify_parent(stage, deep=True)
    assert manifest["kind"] == "causal-lm"
    assert manifest["weights_sha256"] == runs.weights_sha256(manifest["files"])
    assert manifest["batch"] == {"global": 8, "per_device": 4, "processes": 1, "accumulation": 2}
    assert manifest["parents"]["base"]["weights_sha256"] == runs.read_manifest(tiny_run / "base")["weights_sha256"]
    assert manifest["data"]["train"]["kept"] == 48
    assert runs.read_status(stage)["state"] == "done"
    tokenizer = AutoTokenizer.from_pretrained(stage)
    model = AutoModelForCausalLM.from_pretrained(stage)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert set(model.generation_config.eos_token_id) >= {tokenizer.eos_token_id}
    assert "<|im_start|>" in tokenizer.chat_template
    assert model.get_input_embeddings().weight.shape[0] % 64 == 0
    card = (stage / "README.md").read_text()
    assert "stage `base`" in card
    assert "learning_rate: 0.001" in card


def test_nothing_keeps_upstreams_pickle_of_arguments(tiny_run: Path) -> None:
    assert list(tiny_run.rglob("training_args.bin")) == []


def test_checkpoints_are_sealed_and_rotated(tiny_run: Path) -> None:
    found = seals.checkpoints(tiny_run / "sft")
    assert [path.name for path in found] == ["checkpoint-6", "checkpoint-4"]
    assert [seals.seal_fault(path) for path in found] == [None, None]


def test_the_log_keeps_durations_apart(tiny_run: Path) -> None:
    lines = [json.loads(line) for line in (tiny_run / "sft" / "log.jsonl").read_text().splitlines()]
    assert steps_of(tiny_run / "sft") == [1, 2, 3, 4, 5, 6]
    assert all("seconds" in line["time"] for line in lines)
    assert not any(key.endswith(callbacks.UNDER_TIME) for line in lines for key in line)


def test_a_reward_model_keeps_its_head_full_and_as_adapter(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    start = {"model": str(tiny_run / "sft"), "train": {"learning_rate": 1e-2}}
    recipe = tiny_recipe("reward", reward=start)
    recipe["stages"]["adapter"] = recipe["stages"]["reward"] | {"peft": LORA}
    run = run_recipe(recipe, tmp_path)
    for name in ("reward", "adapter"):
        model, _ = load_scorer(run / name)
        (head,) = [p for key, p in model.named_parameters() if "score" in key and "original_module" not in key]
        assert head.shape == (1, 32)
        assert float(head.detach().abs().max()) > 0
        assert runs.read_manifest(run / name)["kind"] == "sequence-classification"
    manifest = runs.read_manifest(run / "adapter")
    assert manifest["model"]["adapter"]["base_path"] == str(tiny_run / "sft")
    assert manifest["model"]["adapter"]["base_sha256"] == runs.read_manifest(tiny_run / "sft")["weights_sha256"]


def test_the_best_checkpoint_is_what_is_published(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, data_folder: Path
) -> None:
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base")})
    recipe["stages"]["sft"]["data"]["eval"] = [{"path": str(data_folder / "sft-eval.jsonl")}]
    # So high a rate that the first evaluation is the best.
    recipe["stages"]["sft"]["train"] |= {
        "load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1.0,
    }  # fmt: skip
    recipe["checkpoints"]["keep"] = 1
    run = run_recipe(recipe, tmp_path)
    best = min(
        (json.loads(line) for line in (run / "sft" / "log.jsonl").read_text().splitlines() if "eval_loss" in line),
        key=lambda entry: entry["eval_loss"],
    )
    kept = [path.name for path in seals.checkpoints(run / "sft")]
    assert f"checkpoint-{best['step']}" in kept
    assert same(weights(run / "sft"), load_file(run / "sft" / f"checkpoint-{best['step']}" / "model.safetensors"))
    assert runs.read_manifest(run / "sft")["metrics"]["eval_loss"] == pytest.approx(best["eval_loss"], rel=1e-5)


def test_an_added_template_grows_the_embeddings_once(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe("base", "sft", "dpo")
    recipe["chat_template"] = None  # the base gets a tokenizer without ChatML's tokens
    for name in ("sft", "dpo"):
        recipe["stages"][name]["chat_template"] = "chatml"
    run = run_recipe(recipe, tmp_path)
    ids = {name: AutoTokenizer.from_pretrained(run / name) for name in ("base", "sft", "dpo")}
    assert "<|im_end|>" not in ids["base"].get_vocab()
    assert len(ids["sft"]) == len(ids["base"]) + 2 == len(ids["dpo"])
    assert ids["sft"].convert_tokens_to_ids("<|im_end|>") == ids["dpo"].convert_tokens_to_ids("<|im_end|>")
    rows = AutoModelForCausalLM.from_pretrained(run / "dpo").get_input_embeddings().weight.shape[0]
    assert rows >= len(ids["dpo"])
    assert rows % 64 == 0


def test_an_adapter_that_would_not_train_the_new_tokens_is_refused(
    run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe("base", "sft", sft={"peft": LORA, "chat_template": "chatml"})
    recipe["chat_template"] = None
    run_recipe(recipe, tmp_path, expect=ExitCode.BAD_INPUT)
    assert "peft: the chat template adds 2 tokens" in capsys.readouterr().err
    recipe["stages"]["sft"]["peft"] = LORA | {"modules_to_save": ["embed_tokens"]}
    recipe["name"] = "mended"
    recipe["stages"]["sft"]["train"]["learning_rate"] = 1e-2
    run = run_recipe(recipe, tmp_path)
    model, tokenizer = load_policy(run / "sft")
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    said = float(model.get_output_embeddings()(torch.ones(1, 32))[0, stop])
    # The embedding is tied, so the row by which the model says the stop token is the one that was trained.
    assert said == pytest.approx(float(model.get_input_embeddings().weight[stop].sum()), abs=1e-5)
    untrained = AutoModelForCausalLM.from_pretrained(run / "base").get_input_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight[: len(untrained)], untrained)


# --- precision ----------------------------------------------------------------------------------------------------


def test_a_small_learning_rate_moves_the_weights(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """AdamW's first step moves every weight by the learning rate; in bfloat16 nearly all would stay where they are."""
    train = {"learning_rate": 5e-7, "max_steps": 1, "lr_scheduler_type": "constant", "weight_decay": 0.0}
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base"), "train": train})
    recipe["precision"] = {"compute": "bfloat16", "weights": "bfloat16"}
    run = run_recipe(recipe, tmp_path)
    before, after = weights(tiny_run / "base"), weights(run / "sft")
    seen = [name for name in before if "embed" not in name]  # rows of tokens that do not occur have no gradient
    moved = sum(int((before[name] != after[name]).sum()) for name in seen)
    assert moved / sum(before[name].numel() for name in seen) > 0.99
    as_bfloat16 = sum(int((before[n].bfloat16() != after[n].bfloat16()).sum()) for n in seen)
    assert as_bfloat16 / moved < 0.1


# --- stopping -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_what_is_not_finite_stops_before_the_update(
    where: str,
    tiny_run: Path,
    run_recipe: Run,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if where == "loss":
        original = trainers.SFTTrainer.compute_loss

        def broken(self: Any, *args: Any, **kwargs: Any) -> Any:
            loss = original(self, *args, **kwargs)
            return loss * float("nan") if self.state.global_step == 3 else loss

        monkeypatch.setattr(trainers.SFTTrainer, "compute_loss", broken)
    else:

        def plant(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 3:
                next(self.trainer.model.parameters()).grad[0] = float("inf")

        check = nonfinite.Finite.on_pre_optimizer_step
        monkeypatch.setattr(
            nonfinite.Finite,
            "on_pre_optimizer_step",
            lambda self, *args, **kwargs: (plant(self, *args, **kwargs), check(self, *args, **kwargs))[1],
        )
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base")})
    run = run_recipe(recipe, tmp_path, expect=ExitCode.NON_FINITE)
    assert f"step 4: {'the loss is nan' if where == 'loss' else 'a gradient is not finite'}" in capsys.readouterr().err
    # The state before the step is kept beside the last regular one.
    assert [path.name for path in seals.checkpoints(run / "sft")] == ["checkpoint-3", "checkpoint-2"]
    assert not (run / "sft" / "manifest.json").exists()
    status = runs.read_status(run / "sft")
    assert (status["state"], status["code"]) == ("failed", 6)


# --- resuming -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "kto"])
def test_a_killed_stage_resumes_to_the_same_weights(
    name: str, tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, at_step: Callable[..., None]
) -> None:
    change = {name: {"model": str(tiny_run / ("base" if name == "sft" else "sft"))}}
    (tmp_path / "whole").mkdir()
    whole = run_recipe(tiny_recipe(name, **change), tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        original = worker._instrument

        def instrument(ctx: Any, trainer: Any) -> Any:
            preemption = original(ctx, trainer)
            trainer.add_callback(At(5, die))
            return preemption

        patch.setattr(worker, "_instrument", instrument)
        with pytest.raises(Killed):
            run_recipe(tiny_recipe(name, **change), tmp_path)
    assert not (tmp_path / "tiny" / name / "manifest.json").exists()
    assert steps_of(tmp_path / "tiny" / name) == [1, 2, 3, 4]
    run = run_recipe(tiny_recipe(name, **change), tmp_path)
    assert same(weights(run / name), weights(whole / name))
    assert steps_of(run / name) == [1, 2, 3, 4, 5, 6]


def test_a_stage_killed_before_its_manifest_trains_no_further_step(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A constant rate, so that one step too many would show.
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base"), "train": {"lr_scheduler_type": "constant"}})
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_finish", lambda *args: die())
        with pytest.raises(Killed):
            run_recipe(recipe, tmp_path)
    before = weights(tmp_path / "tiny" / "sft")
    run = run_recipe(recipe, tmp_path)
    assert same(weights(run / "sft"), before)
    assert [path.name for path in seals.checkpoints(run / "sft")] == ["checkpoint-6", "checkpoint-4"]


def test_a_damaged_checkpoint_is_passed_over(
    tiny_run: Path,
    run_recipe: Run,
    tiny_recipe: Recipe,
    tmp_path: Path,
    at_step: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base")})
    with monkeypatch.context() as patch:
        patch.setattr(worker, "_finish", lambda *args: die())
        with pytest.raises(Killed):
            run_recipe(recipe, tmp_path)
    whole = weights(tmp_path / "tiny" / "sft")
    (tmp_path / "tiny" / "sft" / "checkpoint-6" / "optimizer.pt").unlink()
    run = run_recipe(recipe, tmp_path)
    said = capsys.readouterr().out
    assert "passed over checkpoint-6: optimizer.pt: missing" in said
    assert "resuming from checkpoint-4" in said
    assert same(weights(run / "sft"), whole)


def test_a_signal_saves_and_leaves_and_the_same_command_goes_on(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, at_step: Callable[..., None]
) -> None:
    change = {"sft": {"model": str(tiny_run / "base")}}
    (tmp_path / "whole").mkdir()
    whole = run_recipe(tiny_recipe("sft", **change), tmp_path / "whole")
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGUSR1))
    recipe = tiny_recipe("sft", **change)
    run_recipe(recipe, tmp_path, expect=ExitCode.PREEMPTED)
    stage = tmp_path / "tiny" / "sft"
    status = runs.read_status(stage)
    assert (status["state"], status["code"]) == ("preempted", 85)
    assert not (stage / "model.safetensors").exists()
    assert seals.checkpoints(stage)[0].name == "checkpoint-3"
    run = run_recipe(recipe, tmp_path)
    assert same(weights(run / "sft"), weights(whole / "sft"))


# --- reading back -------------------------------------------------------------------------------------------------


def test_a_model_that_reads_back_differently_is_not_published(
    tiny_run: Path,
    run_recipe: Run,
    tiny_recipe: Recipe,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from safetensors.torch import save_file

    from alignment.training import publish

    original = publish._check_weights

    def damage(folder: Path) -> None:
        original(folder)
        tensors = load_file(folder / "model.safetensors")
        tensors["model.layers.0.mlp.up_proj.weight"] *= 0.5
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(publish, "_check_weights", damage)
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base")})
    run = run_recipe(recipe, tmp_path, expect=ExitCode.BAD_INPUT)
    assert "the saved model is not the trained one" in capsys.readouterr().err
    assert not (run / "sft" / "model.safetensors").exists()
    assert not (run / "sft" / "manifest.json").exists()


@pytest.mark.parametrize("size", [0, 40])
def test_an_empty_weights_file_is_not_published(size: int, tmp_path: Path) -> None:
    from alignment.errors import ModelError
    from alignment.training.publish import _check_weights

    with pytest.raises(ModelError, match=r"wrote no \*\.safetensors"):
        _check_weights(tmp_path)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x" * size)
    with pytest.raises(ModelError, match=f"adapter_model.safetensors has {size} bytes"):
        _check_weights(tmp_path)


def test_a_stage_gives_the_signals_back(tiny_run: Path, run_recipe: Callable[..., Path], tiny_recipe: Any) -> None:
    before = [signal.getsignal(number) for number in callbacks.STOPPING]
    run_recipe(tiny_recipe("sft", sft={"model": str(tiny_run / "base"), "train": {"max_steps": 1}}))
    assert [signal.getsignal(number) for number in callbacks.STOPPING] == before
