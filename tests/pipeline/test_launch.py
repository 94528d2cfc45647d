"""Command lines, and what the end of a launch means."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.errors import RecipeError
from alignment.pipeline import launch, runs
from alignment.pipeline.plan import StageSpec, read_stage, write_stage


@pytest.fixture
def spec(load: Callable, look: Callable) -> Callable[..., StageSpec]:
    """The spec of `sft` under overrides."""
    return lambda *overrides: look(load(*overrides), "sft").spec


@pytest.fixture
def with_gpus(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend that this machine has some GPUs."""

    def pretend(count: int) -> None:
        real = Path.glob

        def glob(path: Path, pattern: str) -> object:
            if path == Path("/dev"):
                return iter([Path(f"/dev/nvidia{index}") for index in range(count)])
            return iter([]) if str(path).startswith("/sys/class/kfd") else real(path, pattern)

        monkeypatch.setattr(Path, "glob", glob)

    return pretend


def flags(spec: StageSpec, env: dict[str, str] | None = None) -> list[str]:
    """The command without what all have in common."""
    command = launch.command(spec, Path("s.yaml"), env or {})
    assert command[:3] == [sys.executable, "-m", "alignment.training.launcher"]
    assert command[-3:] == ["-m", "alignment.train", "s.yaml"]
    common = ["--quiet", "--config_file", str(launch.NEUTRAL), "--mixed_precision", "no"]
    assert command[3:8] == common
    return command[8:-3]


def test_commands_without_a_gpu(workplace: Path, spec: Callable, with_gpus: Callable) -> None:
    with_gpus(0)
    (workplace / "zero2.json").write_text("{}")
    cores = len(os.sched_getaffinity(0))
    one, two = spec(), spec("launch.processes=2")
    assert flags(one) == ["--num_processes", "1", "--cpu"]
    assert launch.settings(one, {}) == {"PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(cores)}
    assert flags(two) == ["--num_processes", "2", "--multi_gpu", "--main_process_port", "0"]
    assert launch.settings(two, {}) == {
        "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(max(1, cores // 2)), "ACCELERATE_USE_CPU": "true",
    }  # fmt: skip
    sharded = spec("launch={processes: 2, deepspeed: zero2.json}")
    assert flags(sharded) == ["--num_processes", "2", "--use_deepspeed", "--deepspeed_config_file",
                              f"{workplace}/zero2.json", "--main_process_port", "0"]  # fmt: skip
    settings = launch.settings(sharded, {})
    assert settings["DS_ACCELERATOR"] == "cpu"
    assert "ACCELERATE_USE_CPU" not in settings  # would make it plain DDP


def test_commands_with_gpus(spec: Callable, with_gpus: Callable) -> None:
    with_gpus(4)
    one, two = spec(), spec("launch.processes=2")
    assert flags(one) == ["--num_processes", "1"]
    assert launch.settings(one, {})["CUDA_VISIBLE_DEVICES"] == "0"
    assert launch.settings(one, {"CUDA_VISIBLE_DEVICES": "3,1"})["CUDA_VISIBLE_DEVICES"] == "3"
    assert "CUDA_VISIBLE_DEVICES" not in launch.settings(one, {"CUDA_VISIBLE_DEVICES": "2"})
    assert flags(two) == ["--num_processes", "2", "--multi_gpu", "--main_process_port", "0"]
    assert not {"ACCELERATE_USE_CPU", "CUDA_VISIBLE_DEVICES"} & launch.settings(two, {}).keys()
    assert flags(one, {"CUDA_VISIBLE_DEVICES": ""}) == ["--num_processes", "1", "--cpu"]
    with pytest.raises(RecipeError, match=r"stages\.sft\.launch\.processes: 5, but 4 GPUs are visible"):
        launch.refuse_impossible(spec("stages.sft.launch.processes=5", "stages.sft.batch.global=20"), {})
    launch.refuse_impossible(two, {})


def test_an_own_accelerate_file_decides_everything(workplace: Path, spec: Callable) -> None:
    (workplace / "own.yaml").write_text("num_processes: 1\n")
    own = spec("launch={accelerate: own.yaml, env: {NCCL_DEBUG: INFO}}")
    assert read_stage(write_stage(own)) == own
    assert launch.command(own, Path("s.yaml"))[3:] == [
        "--config_file", f"{workplace}/own.yaml", "-m", "alignment.train", "s.yaml",
    ]  # fmt: skip
    assert launch.settings(own, {}) == {"PYTHONUNBUFFERED": "1", "NCCL_DEBUG": "INFO"}


def test_what_the_user_sets_stays(spec: Callable, with_gpus: Callable) -> None:
    with_gpus(0)
    assert "OMP_NUM_THREADS" not in launch.settings(spec(), {"OMP_NUM_THREADS": "7"})
    assert launch.settings(spec("launch.env={OMP_NUM_THREADS: '3'}"), {})["OMP_NUM_THREADS"] == "3"


def test_what_is_shown_can_be_typed(spec: Callable, with_gpus: Callable) -> None:
    with_gpus(0)
    shown = launch.shown(spec("launch.env={A: 'b c'}"), Path("a b/stage.yaml"), {"OMP_NUM_THREADS": "1"})
    assert shown.startswith(f"A='b c' PYTHONUNBUFFERED=1 {sys.executable} -m alignment.training.launcher ")
    assert shown.endswith("-m alignment.train 'a b/stage.yaml'")


@pytest.mark.parametrize(("state", "code"), [("failed", 6), ("failed", 2), ("preempted", 85)])
def test_the_workers_own_code_counts(spec: Callable, state: str, code: int) -> None:
    stage = spec()
    write_stage(stage)
    runs.write_status(stage.output, attempt=stage.attempt, state=state, code=code, message="why")  # type: ignore[arg-type]
    assert launch.outcome(stage) == (code, "why")


def test_a_worker_that_could_not_speak_was_killed(spec: Callable, finish: Callable) -> None:
    stage = spec()
    write_stage(stage)
    assert launch.outcome(stage) == (1, "the worker ended before it could say why")
    runs.write_status(stage.output, attempt="an earlier one", state="done", code=0)
    assert launch.outcome(stage)[0] == 1
    runs.write_status(stage.output, attempt=stage.attempt, state="running", code=0, step=3)
    assert launch.outcome(stage) == (
        1, "the worker was killed after step 3 (out of memory?); the same command continues it",
    )  # fmt: skip
    runs.write_status(stage.output, attempt=stage.attempt, state="done", code=0)
    assert launch.outcome(stage) == (1, "the worker said that it is done, but wrote no manifest.json")
    finish(stage)
    assert launch.outcome(stage) == (0, "")
    (stage.output / "status.json").write_text("{")
    assert launch.outcome(stage)[0] == 1


PROBE = """
import json, os, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
several = int(os.environ.get("WORLD_SIZE", "1")) > 1
args = TrainingArguments(output_dir=sys.argv[1] + ".out", per_device_train_batch_size=2, max_steps=2, report_to="none",
    disable_tqdm=True, save_strategy="no", use_cpu=not sharded, ddp_backend="gloo" if sharded or several else None)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2))
rows = [{"input_ids": list(range(8)), "labels": list(range(8))} for _ in range(8)]
trainer = Trainer(model=model, args=args, train_dataset=rows)
trainer.train()
engine = trainer.model_wrapped
with open(f"{sys.argv[1]}.{args.process_index}", "w") as file:
    json.dump({
        "world": torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1,
        "backend": torch.distributed.get_backend() if torch.distributed.is_initialized() else None,
        "type": trainer.accelerator.distributed_type.value,
        "engine": type(engine).__name__,
        "zero": engine.zero_optimization_stage() if hasattr(engine, "zero_optimization_stage") else None,
    }, file)
"""
STARTS = {
    "one": (["launch.processes=1"], 1, {"backend": None, "type": "NO", "engine": "LlamaForCausalLM", "zero": None}),
    "ddp": (["launch.processes=2"], 2,
            {"backend": "gloo", "type": "MULTI_CPU", "engine": "DistributedDataParallel", "zero": None}),
    "zero2": (["launch={processes: 2, deepspeed: zero2.json}"], 2,
              {"backend": "gloo", "type": "DEEPSPEED", "engine": "DeepSpeedEngine", "zero": 2}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(bool(launch.gpus(os.environ)), reason="the machine has GPUs: this is about the CPU")
@pytest.mark.parametrize("kind", STARTS)
def test_ranks_really_work_together_on_the_cpu(workplace: Path, root: Path, spec: Callable, kind: str) -> None:
    overrides, world, expected = STARTS[kind]
    (workplace / "zero2.json").write_text((root / "ds_configs" / "zero2.json").read_text())
    (workplace / "probe.py").write_text(PROBE)
    stage = spec(*overrides)
    command = launch.command(stage, workplace / "seen")
    where = command.index("alignment.train")
    command[where - 1 : where + 1] = ["probe.py"]
    done = subprocess.run(
        command, env={**os.environ, **launch.settings(stage)}, timeout=240, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(world):
        assert json.loads((workplace / f"seen.{rank}").read_text()) == {"world": world, **expected}
