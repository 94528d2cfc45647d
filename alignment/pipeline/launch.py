"""How a stage is started: one `accelerate launch` command line, and what its end means.

| recipe                    | machine | how it starts                                                         |
|---------------------------|---------|-----------------------------------------------------------------------|
| one process               | GPU     | accelerate's simple launcher, one visible GPU                         |
| one process               | CPU     | the same with `--cpu`                                                 |
| several                   | GPU     | `--multi_gpu` (torchrun, NCCL)                                        |
| several                   | CPU     | `--multi_gpu` with ACCELERATE_USE_CPU=true: torchrun, gloo, DDP       |
| `launch.deepspeed: FILE`  | GPU     | `--use_deepspeed --deepspeed_config_file FILE`                        |
| `launch.deepspeed: FILE`  | CPU     | the same with DS_ACCELERATOR=cpu; the worker asks for gloo            |
| `launch.accelerate: FILE` | any     | `--config_file FILE`, and nothing else is decided here                |
| several nodes             | any     | `--num_machines`, `--machine_rank` and where rank 0 listens, on each  |

`alignment.training.launcher` stands for `accelerate launch` and takes its arguments; where a rank was killed, it says
in one line which, instead of a traceback.

Never `use_cpu` or `--cpu` with DeepSpeed: accelerate then falls back to plain DDP and says nothing. On the CPU the
worker must also leave `TrainingArguments.deepspeed` unset (the file comes through the environment): with it,
Transformers does not hand `ddp_backend` on, and every rank believes to be alone.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alignment.errors import ChainError, ExitCode, RecipeError
from alignment.pipeline import space
from alignment.pipeline.plan import StageSpec
from alignment.pipeline.runs import read_manifest, read_status
from alignment.pipeline.supervise import run
from alignment.recipe.schema import Launch

NEUTRAL = Path(__file__).with_name("accelerate.yaml")


class Node(NamedTuple):
    """One of several nodes: its number from 0, and where node 0 listens."""

    rank: str
    address: str
    port: str


ANY_NODE = Node("NODE", "FIRST_HOST", "29500")  # what stands in a command line that is only shown


def command(
    spec: StageSpec,
    stage_yaml: Path,
    env: Mapping[str, str] = os.environ,
    *,
    node: Node = ANY_NODE,
    logs: Path | None = None,
) -> list[str]:
    """The argument vector that runs one stage, on several nodes: the part of one node.

    Args:
        env: the user's environment (see `settings` for what the child gets on top).
        logs: a folder for the output of each rank but 0; without it, all share ours.
    """
    launch = _launch(spec)
    start = [sys.executable, "-m", "alignment.training.launcher"]
    worker = ["-m", "alignment.train", str(stage_yaml), *(() if logs is None else ("--logs", str(logs)))]
    several = ["--num_machines", str(launch.machines), "--machine_rank", node.rank, "--main_process_ip", node.address]
    where = [*several, "--main_process_port", node.port] if launch.machines > 1 else ["--main_process_port", "0"]
    if launch.accelerate is not None:
        return [*start, "--config_file", launch.accelerate, *(where if launch.machines > 1 else ()), *worker]
    # --quiet: the worker has said what went wrong; the launcher's own traceback would only hide it.
    start += ["--quiet", "--config_file", str(NEUTRAL), "--mixed_precision", "no"]
    start += ["--num_processes", str(launch.processes)]
    if launch.deepspeed is not None:
        start += ["--use_deepspeed", "--deepspeed_config_file", launch.deepspeed, *where]
        # accelerate's default starts the other nodes itself, with pdsh.
        start += ["--deepspeed_multinode_launcher", "standard"] if launch.machines > 1 else []
    elif launch.processes > 1:
        start += ["--multi_gpu", *where]
    elif not gpus({**env, **launch.env}):
        start += ["--cpu"]
    return [*start, *worker]


def settings(spec: StageSpec, env: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment variables that a launch sets on top of the user's environment."""
    launch = _launch(spec)
    user = {**env, **launch.env}
    content = {"PYTHONUNBUFFERED": "1", **launch.env}
    if launch.accelerate is not None:
        return content
    if "OMP_NUM_THREADS" not in user:
        # accelerate and torchrun would say 1, and leave the other cores idle.
        content["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // launch.processes_per_node))
    found = gpus(user)
    if not found and launch.deepspeed is not None:
        content["DS_ACCELERATOR"] = "cpu"
    elif not found and launch.processes > 1:
        content["ACCELERATE_USE_CPU"] = "true"
    elif len(found) > 1 and launch.processes == 1:
        # Else the Trainer wraps the model in DataParallel over all of them.
        content["CUDA_VISIBLE_DEVICES"] = found[0]
    return content


def shown(spec: StageSpec, stage_yaml: Path, env: Mapping[str, str] = os.environ) -> str:
    """The command line with its settings, as a shell would take it."""
    variables = [f"{key}={shlex.quote(value)}" for key, value in sorted(settings(spec, env).items())]
    return " ".join([*variables, shlex.join(command(spec, stage_yaml, env))])


def refuse_impossible(spec: StageSpec, env: Mapping[str, str] = os.environ) -> None:
    """Raise RecipeError when this machine cannot be a node of the stage: it has GPUs, but fewer than processes."""
    launch = _launch(spec)
    found = gpus({**env, **launch.env})
    if launch.accelerate is None and found and launch.processes_per_node > len(found):
        raise RecipeError(
            f"stages.{spec.stage}.launch.processes: {launch.processes_per_node}, but {len(found)} GPUs are visible "
            "here; take fewer processes, or hide the GPUs with launch.env.CUDA_VISIBLE_DEVICES"
        )


def refuse_several_nodes(spec: StageSpec) -> None:
    """Raise RecipeError for a stage on several nodes: from here only one of them can be started."""
    if (nodes := _launch(spec).machines) > 1:
        raise RecipeError(
            f"stages.{spec.stage}.launch.nodes: {nodes}, and `alignment run` starts what runs on this machine; submit "
            "it with --slurm, or start each node by hand (recipes/cluster.md); --set launch.nodes=1 stays here"
        )


def gpus(env: Mapping[str, str]) -> list[str]:
    """The GPUs that a process with this environment sees, found without torch; empty: it computes on the CPU."""
    if env.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return []
    visible = env.get("CUDA_VISIBLE_DEVICES")
    present = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    if not present:
        present = [str(index) for index, _ in enumerate(Path("/sys/class/kfd/kfd/topology/nodes").glob("*/gpu_id"))]
    if visible is None or not present:
        return sorted(present, key=int)
    return [name for name in visible.split(",") if name.strip() and name != "-1"]


def cpu_has_amx() -> bool:
    """Whether this CPU multiplies bfloat16 much faster than float32."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def run_stage(
    spec: StageSpec, stage_yaml: Path, *, output: Path | None = None, say: Callable[[str], None] = print
) -> int:
    """Run one planned stage through its launcher and return its exit code; what the worker could not say, `say` gets.

    A signal to this process ends in 85 however the worker took it: saved, killed before it could, or done just then,
    which says that it is time to stop.

    Args:
        output: a file that takes what the worker prints; without it, it goes where ours goes.
    """
    ended = run(command(spec, stage_yaml), {**os.environ, **settings(spec)}, output=output, say=say)
    code, message = outcome(spec)
    spoke = last_word(spec) is not None
    if ended.stopped_by is not None and (code == ExitCode.DONE or not spoke):
        if not spoke:
            say(f"stopped by {ended.stopped_by.name}; the same command goes on")
        return int(ExitCode.PREEMPTED)
    if not spoke:
        say(message)
    return code


def last_word(spec: StageSpec) -> dict[str, Any] | None:
    """The status with which the worker of this attempt left; None if it left without one."""
    try:
        status = read_status(spec.output)
    except ChainError:
        return None
    known = status is not None and status.get("attempt") == spec.attempt and status.get("state") != "running"
    return status if known else None


def outcome(spec: StageSpec) -> tuple[int, str]:
    """Exit code and message of a launch that has ended, from what its worker left behind.

    Launchers lose the worker's exit code, so `status.json` of this attempt decides; without one the worker was killed.
    """
    try:
        status = read_status(spec.output)
    except ChainError as damage:
        return ExitCode.FAILED, str(damage)
    without_word = status is None or status.get("attempt") != spec.attempt or status.get("state") == "running"
    if without_word and (refused := space.refusal(spec.output)) is not None:
        return ExitCode.STORAGE, refused
    if status is None or status.get("attempt") != spec.attempt:
        return ExitCode.FAILED, "the worker ended before it could say why"
    if status.get("state") == "running":
        step = f" after step {status['step']}" if status.get("step") is not None else ""
        return ExitCode.FAILED, f"the worker was killed{step} (out of memory?); the same command continues it"
    code, message = int(status.get("code", ExitCode.FAILED)), str(status.get("message") or "")
    if code == ExitCode.DONE and read_manifest(spec.output) is None:
        return ExitCode.FAILED, "the worker said that it is done, but wrote no manifest.json"
    return code, message


def _launch(spec: StageSpec) -> Launch:
    assert spec.config.launch is not None, "a planned stage is resolved"
    return spec.config.launch
