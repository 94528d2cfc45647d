"""How the ranks of one launch agree without a process group: through a file, bounded in time.

A collective has a time-out that a long tokenisation runs into; a file has none of that.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed import DistError, PrefixStore, Store, TCPStore

from alignment.errors import ChainError, UserError
from alignment.pipeline import runs
from alignment.pipeline.files import read_json
from alignment.pipeline.plan import StageSpec, prepare, read_stage, write_stage
from alignment.recipe.load import load_recipe
from alignment.training.arguments import is_main
from alignment.training.failing import LOST_CONTACT

READY = "prepared.json"
LIMIT_SECONDS = 6 * 3600.0  # preparing the largest data sets takes hours, never days
POLL_SECONDS = 0.2
PLAN_SECONDS = 600  # rank 0 hashes the data first
_PLANNED = "planned"


def ready(spec: StageSpec, record: dict[str, Any]) -> None:
    """Rank 0: everything is prepared."""
    runs.write_json(spec.output / READY, {"schema": 1, "attempt": spec.attempt, **record})


def wait(spec: StageSpec, limit: float = LIMIT_SECONDS) -> dict[str, Any]:
    """The other ranks: wait for `ready` of this attempt.

    Raises:
        UserError: rank 0 failed, or did not get ready in time.
    """
    end = time.monotonic() + limit
    while time.monotonic() < end:
        record = read_json(spec.output / READY, schema=1, error=ChainError)
        if record is not None and record["attempt"] == spec.attempt:
            return record
        status = runs.read_status(spec.output)
        if status is not None and status["attempt"] == spec.attempt and status["state"] == "failed":
            raise UserError("rank 0 failed while it prepared the stage; its message says why")
        time.sleep(POLL_SECONDS)
    raise UserError(f"rank 0 did not prepare the stage within {limit:.0f} s")


def launch_id() -> str:
    """A name that all processes of one launch on one host share, and no other launch has."""
    parts = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID")]
    return hashlib.sha256("|".join([*parts, str(os.getppid())]).encode()).hexdigest()[:12]


def plan_by_hand(
    recipe_path: Path, stage: str, *, overrides: list[str], run: str | None, runs_folder: Path
) -> StageSpec:
    """`accelerate launch -m alignment.train RECIPE --stage S`: rank 0 plans, the others wait for its stage.yaml.

    They know it by the name of this start, which rank 0 leaves in the launcher's store; a launcher without one has
    all its ranks on one host, where they can tell by themselves.

    Raises:
        UserError: the stage is done already, cannot run, or was not planned in time.
    """
    recipe = load_recipe(recipe_path, overrides)
    if stage not in recipe.stages:
        raise ChainError(f"--stage {stage}: the recipe has no such stage; it has {', '.join(recipe.stages)}")
    path = runs_folder.absolute() / (run or recipe.name) / stage / runs.STAGE
    store = _launcher_store()
    attempt = f"hand-{launch_id()}"
    if is_main():
        try:
            plan = prepare(
                recipe, stage, runs=runs_folder.absolute(), run=run or recipe.name, recipe_path=recipe_path.absolute()
            )
            if plan.status not in ("fresh", "resume"):
                why = "; ".join((*plan.difference, *(f"{name} must finish first" for name in plan.waiting_for)))
                raise ChainError(f"stage {stage}: {plan.status}: {why or 'nothing to run'}")
            spec = replace(plan.spec, attempt=attempt)
            write_stage(spec)
        except UserError:
            if store is not None:
                store.set(_PLANNED, "")
            raise
        if store is not None:
            store.set(_PLANNED, attempt)
        return spec
    return _planned(path, attempt, store)


def _planned(path: Path, attempt: str, store: Store | None) -> StageSpec:
    """What rank 0 planned, for the other ranks."""
    if store is not None:
        try:
            attempt = store.get(_PLANNED).decode()
        except DistError:
            raise UserError(f"{path}: rank 0 did not plan the stage within {PLAN_SECONDS} s") from None
        if not attempt:
            sys.exit(LOST_CONTACT)  # rank 0 has said why
    end = time.monotonic() + PLAN_SECONDS
    while time.monotonic() < end:
        if path.exists() and read_stage(path).attempt == attempt:
            return read_stage(path)
        time.sleep(POLL_SECONDS)
    raise UserError(f"{path}: not what rank 0 planned, after {PLAN_SECONDS} s; is this folder shared by all nodes?")


def _launcher_store() -> Store | None:
    """The key-value store that torchrun and `accelerate launch` keep for the ranks of all nodes, where there is one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    limit = timedelta(seconds=PLAN_SECONDS)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # The client's own name for its keys: a second attempt of the launcher is not answered by the first.
    start = f"alignment/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return PrefixStore(start, TCPStore(address, port, is_master=False, timeout=limit))
