"""`alignment check --probe`: what is measured, and the plan beside it; in a process of its own, as a launch is."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from alignment.cli import main
from alignment.errors import ModelError, UserError
from alignment.models.blank import blank_adapter, blank_model, blank_tokenizer
from alignment.models.load import load_policy, load_scorer
from alignment.pipeline.memory import plan as memory_plan
from alignment.pipeline.memory.peak import Estimate, estimate
from alignment.pipeline.memory.situation import Situation
from alignment.pipeline.plan import StageSpec
from alignment.recipe.load import load_recipe, resolve
from alignment.training import probe_memory
from alignment.training.publish import weights_of

CONFIG = {
    "model_type": "llama", "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
LORA = {"r": 16, "target_modules": "all-linear"}
IDS = 2048


def stage(algorithm: str, model: Any, **changes: Any) -> dict[str, Any]:
    """A stage whose rows are nowhere."""
    train = {"max_length": 128, "gradient_checkpointing": False} | changes.pop("train", {})
    if algorithm == "ppo":
        del train["max_length"]
    batch = {"global": 8, "per_device": 2}
    return {"algorithm": algorithm, "model": model, "data": {"train": [{"path": "nowhere.jsonl"}]}, "batch": batch,
            "train": train, **changes}  # fmt: skip


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of which nothing has run: no rows, no weights, and one model of which config and tokenizer are there."""
    folder = tmp_path / "model"
    tokenizer = blank_tokenizer(IDS, "chatml")
    tokenizer.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": IDS}))
    init = {"init": {"config": CONFIG, "tokenizer": {"train": {"vocab_size": IDS}}}}
    ppo = {
        "response_length": 48, "prompt_length": 48, "num_ppo_epochs": 3, "local_rollout_forward_batch_size": 4,
    }  # fmt: skip
    stages = {
        "base": stage("pretrain", init),
        "sft": stage("sft", "stage:base"),
        "lora": stage("sft", "stage:base", peft=LORA, batch={"global": 2, "per_device": 2}),
        "dpo": stage("dpo", str(folder)),
        "continued": stage("dpo", "stage:lora"),
        "reward": stage("reward", "stage:sft"),
        "ppo": stage("ppo", "stage:sft", train=ppo, rewards=[{"name": "judge", "model": "stage:reward"}]),
        "adapters": stage("ppo", "stage:sft", train=ppo, rewards=[{"name": "a", "regex": "a"}], peft=LORA),
        "qlora": stage("sft", {"stage": "base", "quantization": {"bits": 4}}, peft=LORA),
        "kto": stage("kto", "stage:sft"),
        "grpo": stage("grpo", "stage:sft", rewards=[{"name": "judge", "model": "stage:reward"}],
                      train={"max_completion_length": 48, "num_generations": 4}),
        "hub": stage("sft", "nobody/has-this"),
        "evaluate": {"algorithm": "evaluate", "models": ["stage:sft"], "prompts": [{"path": "nowhere.jsonl"}],
                     "rewards": [{"name": "a", "regex": "a"}]},
    }  # fmt: skip
    del stages["grpo"]["train"]["max_length"]
    path = tmp_path / "probe.yaml"
    content = {"name": "probe", "chat_template": "chatml", "precision": {"compute": "float32"}, "stages": stages}
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def in_child(spec: StageSpec) -> None:
    """What the launcher starts."""
    from accelerate.state import AcceleratorState, GradientState

    from alignment.training.worker import run_stage

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        run_stage(spec, probe_memory.measure)
    except Exception:
        (spec.output / "output.log").write_text(traceback.format_exc())


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker is forked from this process, in which everything is imported."""
    import deepspeed  # noqa: F401

    import alignment.training.ppo
    import alignment.training.worker  # noqa: F401

    def launch(spec: StageSpec, stage_yaml: Path) -> None:
        child = multiprocessing.get_context("fork").Process(target=in_child, args=(spec,))
        child.start()
        child.join()

    monkeypatch.setattr(probe_memory, "_launch", launch)


def probed(recipe: Path, name: str, said: list[str] | None = None) -> probe_memory.Probed:
    say = (lambda text: None) if said is None else said.append
    (found,) = probe_memory.probe(load_recipe(recipe), [name], run=recipe.parent / "runs" / "probe", say=say)
    return found


# --- measured against planned -----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    "name",
    ["base", "sft", "lora", "dpo", "continued", "reward", "kto", "ppo",
     *(pytest.param(name, marks=pytest.mark.slow) for name in ("adapters", "grpo", "qlora"))],
)  # fmt: skip
def test_the_plan_is_what_is_measured(name: str, recipe: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    found = probed(recipe, name)
    assert found.problem is None
    assert found.measured is not None
    assert found.planned / found.measured == pytest.approx(1, abs=0.15)
    assert sorted(recipe.parent.rglob("*")) == before


@pytest.mark.usefixtures("forked")
def test_a_plan_that_says_too_little_fails(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def half(situation: Situation) -> Estimate:
        found = estimate(situation)
        moments = {name: {term: value / 2 for term, value in terms.items()} for name, terms in found.moments.items()}
        return replace(found, moments=moments)

    monkeypatch.setattr(memory_plan, "estimate", half)
    assert main(["check", str(recipe), "--probe", "--stage", "sft", "--runs", str(recipe.parent / "runs")]) == 1
    told, line = capsys.readouterr().out.splitlines()
    assert told == (
        "sft: 2 steps; passes a step: 2 of the recipe's 4, rows a pass: 2, tokens a row: up to 128, processes: 1"
    )
    assert line.startswith("sft: planned ") and "(0.50), at the loss; that is " in line
    assert line.endswith("% above the plan, and 15% is allowed")


# --- what goes wrong --------------------------------------------------------------------------------------------------


def ran_out_while_loading(spec: StageSpec) -> None:
    try:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    except RuntimeError as error:
        raise ModelError("model: cannot be loaded as a model (CUDA out of memory)") from error


def no_host_memory(spec: StageSpec) -> None:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp:132] DefaultCPUAllocator: can't allocate memory: you tried")


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("fault", [ran_out_while_loading, no_host_memory])
def test_out_of_memory_is_told(
    fault: Any, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe_memory, "_steps", fault)
    assert main(["check", str(recipe), "--probe", "--stage", "sft", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["code"] == 1
    assert found["probe"]["sft"]["measured"] is None
    assert found["probe"]["sft"]["problem"].startswith("does not fit: out of memory with ")


def wrong(spec: StageSpec) -> None:
    raise UserError("this is wrong")


def broken(spec: StageSpec) -> None:
    raise KeyError("a bug")


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize(
    ("fault", "text"), [(wrong, "stages.sft: this is wrong"), (broken, "stages.sft: KeyError: 'a bug'")]
)
def test_another_failure_is_no_lack_of_memory(
    fault: Any, text: str, recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(probe_memory, "_steps", fault)
    assert main(["check", str(recipe), "--probe", "--stage", "sft"]) == 1
    error = capsys.readouterr().err
    assert text in error
    assert "does not fit" not in error


def test_a_killed_worker_does_not_fit(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignment.pipeline import runs

    def killed(spec: StageSpec, stage_yaml: Path) -> None:
        runs.write_status(spec.output, attempt=spec.attempt, state="running", code=0)

    monkeypatch.setattr(probe_memory, "_launch", killed)
    found = probed(recipe, "sft")
    assert found.line.startswith("sft: planned ") and "; does not fit: killed" in found.line


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--probe", "--stage", "sfd"], "no stage is named sfd (did you mean sft?)"),
        (["--probe", "--stage", "hub"], "stages.hub: memory not known: nobody/has-this is not on this machine"),
        (["--stage", "sft"], "--stage goes with --probe"),
        (["--probe", "--memory", "80"], "--gpus and --memory do not"),
    ],
)
def test_bad_input(arguments: list[str], text: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe), *arguments]) == 2
    assert text in capsys.readouterr().err


def test_a_stage_that_trains_nothing_is_passed_over(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(recipe), "--probe", "--stage", "evaluate"]) == 0
    assert capsys.readouterr().out == "evaluate: not probed: it trains nothing\n"


# --- fewer passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "passes"),
    [
        ("dpo", ["batch.global=2"], 1),
        ("dpo", ["batch.global=4"], 2),
        ("dpo", ["batch.global=64"], 2),
        ("grpo", ["batch.global=64"], 32),  # replies are drawn for all of them
        ("ppo", ["batch.global=64"], 2),  # 4 are drawn at once
        ("ppo", ["batch.global=64", "train.local_rollout_forward_batch_size=16"], 8),
        ("ppo", ["batch.global=64", "train.local_rollout_forward_batch_size=512"], 32),
        ("ppo", ["batch.global=64", "train.num_mini_batches=4"], 8),  # each of 16 episodes, which 2 passes begin
        ("ppo", ["batch.global=8", "train.num_mini_batches=4"], 4),  # each of one pass
    ],
)
def test_passes(name: str, changes: list[str], passes: int, recipe: Path) -> None:
    loaded = load_recipe(recipe, [f"stages.{name}.{change}" for change in changes])
    assert probe_memory._passes(resolve(loaded, name), 1) == passes


# --- blank models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config",
    [
        CONFIG | {"vocab_size": 300},
        CONFIG | {"vocab_size": 512, "tie_word_embeddings": False, "model_type": "qwen2"},
        {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 300},
    ],
    ids=["tied", "untied", "gpt2"],
)
def test_a_blank_model_loads_and_takes_no_room(config: dict[str, Any], tmp_path: Path) -> None:
    tokenizer = blank_tokenizer(320, "chatml")
    assert len(tokenizer) == 320
    folder = blank_model(config, tokenizer, tmp_path / "a", scorer=False, name="a")
    model, _ = load_policy(folder)  # refuses missing tensors
    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    assert model.get_input_embeddings().weight.shape[0] == max(320, config["vocab_size"])
    assert all(parameter.dtype == torch.float32 and not parameter.any() for parameter in model.parameters())
    file = folder / "model.safetensors"
    assert file.stat().st_size > 2 * sum(shape.numel() for shape in wanted.values())
    assert file.stat().st_blocks * 512 < 64 * 1024
    scorer, _ = load_scorer(blank_model(config, tokenizer, tmp_path / "b", scorer=True, name="a"))
    assert scorer.config.num_labels == 1
    other = blank_model(config, tokenizer, tmp_path / "c", scorer=False, name="c")
    assert weights_of(other) != weights_of(folder)


@pytest.mark.parametrize(("scorer", "load"), [(False, load_policy), (True, load_scorer)])
def test_a_blank_adapter_loads(scorer: bool, load: Callable[..., Any], tmp_path: Path) -> None:
    tokenizer = blank_tokenizer(320, "chatml")
    base = blank_model(CONFIG | {"vocab_size": 320}, tokenizer, tmp_path / "base", scorer=False, name="a")
    keys = LORA | {"bias": "none", "inference_mode": True, "lora_dropout": None}  # as an adapter_config.json has them
    folder = blank_adapter(base, keys, tokenizer, tmp_path / "adapter", scorer=scorer)
    model, _ = load(folder)
    assert model.peft_config["default"].r == 16
    assert any("lora_A" in name for name, _ in model.named_parameters())


# --- launched ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "deepspeed", [None, pytest.param("zero3", marks=pytest.mark.skipif(not shutil.which("g++"), reason="needs g++"))]
)
def test_two_ranks_are_measured_through_the_launcher(
    deepspeed: str | None, recipe: Path, root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    overrides = ["--set", "stages.sft.launch.processes=2"]
    if deepspeed is not None:
        overrides += ["--set", f"stages.sft.launch.deepspeed={root / 'ds_configs' / deepspeed}.json"]
    assert main(["check", str(recipe), *overrides, "--probe", "--stage", "sft", "--json"]) == 0
    found = json.loads(capfd.readouterr().out.splitlines()[-1])["probe"]["sft"]
    assert found["planned"] / found["measured"] == pytest.approx(1, abs=0.15)
