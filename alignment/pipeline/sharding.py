"""What a checkpoint was written by, and whether the next launch can go on from it: refused before anything starts.

Without DeepSpeed one file holds the optimizer's states and any number of processes reads it. DeepSpeed's files hold
one share per rank: they are read by as many ranks, under the same engine. Both mistakes are quiet or late upstream: a
sharded checkpoint without DeepSpeed resumes with a fresh optimizer (Transformers reads `optimizer.pt` where there is
one), and another number of ranks fails after the model was loaded on all of them.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from alignment.errors import CheckpointError
from alignment.pipeline.files import read_json
from alignment.pipeline.seals import SCHEMA, SEALED, checkpoints
from alignment.recipe.algorithms import ALGORITHMS

STATES = re.compile(r"global_step\d+/(bf16_)?zero_pp_rank_\d+_mp_rank_\d+_optim_states\.pt")
WEIGHTS = re.compile(r"global_step\d+/zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
FAMILY = {0: 0, 1: 2, 2: 2, 3: 3}  # ZeRO-1 and ZeRO-2 write the same files and read each other's
UNDER = {0: "without DeepSpeed", 2: "under ZeRO-1 or ZeRO-2", 3: "under ZeRO-3"}


@dataclass(frozen=True)
class Engine:
    """Who keeps the states of a training: `stage` 0 is training without DeepSpeed, 1 to 3 ZeRO, on so many `ranks`."""

    stage: int
    ranks: int


def zero_stage(file: str | Path | None) -> int:
    """The ZeRO stage that a DeepSpeed file asks for; 0 without one, and for one that cannot be read."""
    if file is None:
        return 0
    try:
        return int((json.loads(Path(file).read_bytes()).get("zero_optimization") or {}).get("stage", 0))
    except (OSError, ValueError, TypeError, AttributeError):
        return 0


def written_by(checkpoint: Path) -> Engine | None:
    """The engine that wrote a sealed checkpoint, by its files (ZeRO-1 is 2 here); None if its seal cannot be read."""
    try:
        record = read_json(checkpoint / SEALED, schema=SCHEMA, error=CheckpointError)
        names = list(record["files"]) if record else None
        ranks = int(record["world_size"]) if record else 0
    except (CheckpointError, KeyError, TypeError, ValueError):
        return None
    if names is None:
        return None
    if any(map(WEIGHTS.fullmatch, names)):
        return Engine(3, ranks)
    return Engine(2 if any(map(STATES.fullmatch, names)) else 0, ranks)


def resume_problem(checkpoint: Path, now: Engine, algorithm: str) -> str | None:
    """Why a launch cannot go on from a checkpoint, with the ways out; None if it can."""
    then = written_by(checkpoint)
    if then is None:
        return None
    if then.stage != FAMILY[now.stage]:
        reason = "the one cannot read the other's states"
    elif then.ranks == now.ranks:
        return None
    elif then.stage:
        reason = "its states are cut into as many shares"
    elif ALGORITHMS[algorithm].across_ranks:
        reason = f"the loss of {algorithm} depends on the rows of all processes' forward passes"
    else:
        return None
    written = f"{_processes(then.ranks)} {UNDER[then.stage]}"
    return (
        f"launch: {checkpoint.name} was written by {written}, and this launch is {_processes(now.ranks)} "
        f"{UNDER[FAMILY[now.stage]]}: {reason}; launch it as then, or make a model of what it holds with "
        f"`alignment export --from-checkpoint {checkpoint} OUT`"
    )


def _processes(count: int) -> str:
    return "1 process" if count == 1 else f"{count} processes"


def newest_sealed(stage: Path) -> Path | None:
    """The newest checkpoint with a seal, whole or not."""
    return next((path for path in checkpoints(stage) if (path / SEALED).exists()), None)
