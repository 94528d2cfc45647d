"""What is in a runs folder: runs, their stages, how each stands, and which folder a name on the command line means."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import ChainError, ExitCode
from alignment.pipeline.locks import holder
from alignment.pipeline.runs import RECIPE, STAGE, read_manifest, read_status


@dataclass(frozen=True)
class StageState:
    """How one stage of a run stands.

    Attributes:
        stage: its name; `folder`: where it is.
        state: `not started`, `running`, `killed`, `failed`, `preempted`, `done` or `damaged`; of a stage that was
            submitted to Slurm also `queued` or `cancelled`.
        code: the exit code that says so; 0 also for `running` and `not started`.
        message: what its worker said last.
        kind: what it published.
        step, steps: how far it came, where that is known.
        seconds: how long its last attempt took, where that is known.
        job: its latest Slurm job, where it was submitted and is not done.
    """

    stage: str
    folder: Path
    state: str
    code: int
    message: str = ""
    kind: str | None = None
    step: int | None = None
    steps: int | None = None
    seconds: float | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    job: str | None = None


def runs_in(folder: Path) -> list[Path]:
    """The run directories in a runs folder, the latest touched first."""
    found = [path.parent for path in folder.glob(f"*/{RECIPE}")]
    return sorted(found, key=lambda run: run.stat().st_mtime, reverse=True)


def stage_names(run: Path) -> list[str]:
    """The stages of a run in the order of its recipe. Raises ChainError when its recipe cannot be read."""
    try:
        stages = yaml.load((run / RECIPE).read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))["stages"]
        return [str(name) for name in stages]
    except OSError as error:
        raise ChainError(f"{run / RECIPE}: cannot read: {error.strerror}") from error
    except (yaml.YAMLError, KeyError, TypeError) as error:
        raise ChainError(f"{run / RECIPE}: damaged: no list of stages") from error


def stage_state(folder: Path) -> StageState:
    """How a stage stands, from its records and its lock."""
    name = folder.name
    try:
        manifest, status = read_manifest(folder), read_status(folder)
    except ChainError as error:
        return StageState(name, folder, "damaged", int(error.code), str(error))
    if manifest is not None:
        seconds = (manifest.get("time") or {}).get("seconds")
        return StageState(name, folder, "done", 0, kind=manifest["kind"], seconds=seconds,
                          metrics=dict(manifest.get("metrics") or {}))  # fmt: skip
    if status is None:
        return StageState(name, folder, "running" if holder(folder) else "not started", 0)
    at: dict[str, Any] = {"step": status.get("step"), "steps": status.get("steps")}
    if holder(folder) is not None:
        return StageState(name, folder, "running", 0, **at)
    if status.get("state") in ("running", "done"):
        # No manifest and no holder: whatever it was about to say, it was stopped before.
        return StageState(name, folder, "killed", int(ExitCode.FAILED), "the worker was killed", **at)
    state, code = str(status.get("state")), int(status.get("code", ExitCode.FAILED))
    return StageState(name, folder, state, code, str(status.get("message") or ""), **at)


def find(name: str, runs: Path) -> tuple[Path, str | None]:
    """The run directory and the stage (or None) behind `RUN`, `RUN:STAGE`, `RUN/STAGE`, or a path to either.

    Raises:
        ChainError: there is no such run or stage.
    """
    readings = [(name, "")]
    readings += [(run, stage) for run, cut, stage in (name.partition(":"), name.rstrip("/").rpartition("/")) if cut]
    for path, stage in readings:
        for place in (runs / path, Path(path)):
            if path and (place / RECIPE).is_file():
                return place, _known(place, stage) if stage else None
    there = ", ".join(run.name for run in runs_in(runs)[:8])
    raise ChainError(f"{name}: no such run in {runs}{f' (there are {there})' if there else ''}; see `alignment runs`")


def _known(run: Path, stage: str) -> str:
    names = stage_names(run)
    if stage not in names:
        raise ChainError(f"{run.name}: no stage {stage}; its stages are {', '.join(names)}")
    return stage


def model_folder(name: str, runs: Path) -> Path:
    """The folder with the model that `RUN[:STAGE]` or a path means; without a stage: the last finished language model.

    Raises:
        ChainError: no such run or stage, not finished, or without a language model.
    """
    place = Path(name)
    if place.is_dir() and not (place / RECIPE).is_file() and not (place / STAGE).is_file():
        return place  # a plain model folder
    run, stage = find(name, runs)
    if stage is not None:
        state = stage_state(run / stage)
        if state.state != "done":
            raise ChainError(f"{name}: this stage is not finished ({state.state})")
        if state.kind != "causal-lm":
            raise ChainError(f"{name}: this stage has published {state.kind or 'no model'}, not a language model")
        return run / stage
    for candidate in reversed(stage_names(run)):
        if stage_state(run / candidate).kind == "causal-lm":
            return run / candidate
    raise ChainError(f"{name}: no stage with a language model is finished; see `alignment status {run.name}`")
