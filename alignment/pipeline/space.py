"""Room on the disk: what a stage will write, what is free, and in words what a refusal of the disk means.

`refuse_if_full` compares the plan with the disk before a stage is launched: a stage that trains for a day and cannot
save is the most expensive way to learn it.
"""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from alignment.errors import StorageError
from alignment.pipeline.files import storage
from alignment.pipeline.memory import source
from alignment.pipeline.memory.peak import estimate
from alignment.pipeline.memory.plan import amount
from alignment.pipeline.memory.source import Machine, NotKnownError
from alignment.pipeline.seals import checkpoints
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import resolve
from alignment.recipe.schema import Recipe

FULL = (errno.ENOSPC, errno.EDQUOT)
FLOAT32, BFLOAT16 = 4, 2
SMALL = 16 * 2**20  # tokenizer, states, logs: what comes on top of weights and moments
PROBE = 64 * 1024


def checkpoint_bytes(saved: int, trained: int, *, state: float = 8.0, engine: bool = False) -> float:
    """About how many bytes a checkpoint takes.

    Args:
        saved, trained: parameters whose weights are written, and those with optimizer states.
        state: bytes of optimizer state for a parameter.
        engine: DeepSpeed writes its own copy of the weights, and float32 masters.
    """
    return saved * FLOAT32 + trained * (state + (BFLOAT16 + FLOAT32 if engine else 0)) + SMALL


def refuse_if_full(recipe: Recipe, name: str, folder: Path, machine: Machine) -> None:
    """Raise StorageError if the disk has no room for the checkpoints and the model of a stage.

    What is not known (a model whose size is not on this machine) is not refused.

    Args:
        folder: the run's; the stage's own checkpoints in it are written over.
    """
    stage = resolve(recipe, name)
    if ALGORITHMS[stage.algorithm].config is None:
        return
    try:
        situation = source.source(recipe, name, machine, run=folder).situation
    except NotKnownError:
        return
    trained = sum(one.parameters for one in estimate(situation).standing if one.trained)
    each = checkpoint_bytes(trained, trained, state=situation.state, engine=situation.engine)
    keep = stage.checkpoints.keep
    there = min(len(checkpoints(folder / name)), keep + 1)
    needed = (keep + 1 - there) * each + trained * FLOAT32
    with storage(folder, "read"):
        left = shutil.disk_usage(folder).free
    if left < needed:
        raise StorageError(
            f"stages.{name}: {folder} has {amount(left)} free, and this stage writes about {amount(needed)}: "
            f"{keep + 1 - there} checkpoints of {amount(each)} (checkpoints.keep {keep}, and one while it is written) "
            "and the model; free some space, keep fewer, or name another place with --runs DIR"
        )


def told(folder: Path, reason: str, *, full: bool, needed: float | None = None) -> str:
    """One line on a disk that refused, with what a checkpoint takes, and what to do."""
    if not full:
        return f"{folder}: {reason}: the storage failed; once it works, the same command goes on"
    takes = f"a checkpoint takes about {amount(needed)}, " if needed is not None else ""
    try:
        free = f"{amount(shutil.disk_usage(folder).free)} are free"
    except OSError:
        free = "nothing more can be read there"
    return f"{folder}: {reason}: {takes}{free}; free some space, and the same command goes on"


def refusal(folder: Path) -> str | None:
    """Try whether `folder` takes a file: None if it does, else what stands in the way, in one line.

    Asked when a worker ended without a word: a full disk takes no `status.json` either.
    """
    path = folder / ".probe.tmp"
    try:
        with open(path, "wb") as file:
            file.write(bytes(PROBE))
            file.flush()
            os.fsync(file.fileno())
        path.unlink()
    except FileNotFoundError:  # nothing began
        return None
    except OSError as error:
        return told(folder, error.strerror or str(error), full=error.errno in FULL)
    return None
