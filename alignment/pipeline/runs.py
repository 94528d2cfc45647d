"""The run directory: which files a stage leaves behind, and how they are read.

    runs/<run>/recipe.yaml                  the recipe as it was run, overrides included
    runs/<run>/lock                         held by `alignment run`
    runs/<run>/<stage>/stage.yaml           what the worker is told (plan.write_stage)
                       lock                 held by rank 0 of the worker
                       status.json          the worker's last word: its state and exit code
                       log.jsonl            one line per logged step
                       checkpoint-<n>/      counts when SEALED.json in it is whole
                       metrics.json
                       manifest.json        written last: the stage is finished, and this is what it made
                       model files

Every record carries `schema`. A record of an unknown schema is refused by name, never guessed at.
"""

from __future__ import annotations

import os
import secrets
import socket
import time
from pathlib import Path
from typing import Any, Literal

from alignment.errors import ChainError
from alignment.pipeline.files import digest, fault, file_hash, read_json, settle, sync_folder, write_json, write_text
from alignment.pipeline.locks import lock as lock_stage
from alignment.pipeline.seals import latest_sealed, seal, seal_fault
from alignment.recipe.credentials import mask

__all__ = [
    "digest", "file_hash", "latest_sealed", "lock_stage", "new_attempt", "now", "read_manifest", "read_status", "seal",
    "seal_fault", "settle", "sync_folder", "verify_parent", "weights_sha256", "write_json", "write_manifest",
    "write_status", "write_text",
]  # fmt: skip

RECIPE, STAGE, STATUS, LOG, METRICS, MANIFEST, OUTPUT = (
    "recipe.yaml", "stage.yaml", "status.json", "log.jsonl", "metrics.json", "manifest.json", "output.log",
)  # fmt: skip
SCHEMA = 1  # of manifest.json and of status.json

State = Literal["running", "done", "failed", "preempted"]


def now() -> str:
    """The local time with its offset, to the second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def new_attempt() -> str:
    """A name for one start of one stage; sorts by time."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"


# -- status: the worker's last word ------------------------------------------------------------------------------------


def write_status(
    stage: Path,
    *,
    attempt: str,
    state: State,
    code: int,
    message: str = "",
    rank: int = 0,
    step: int | None = None,
    steps: int | None = None,
) -> None:
    """Write `status.json`: launchers lose a worker's exit code (accelerate turns 85 into 1), this file does not."""
    who = {"rank": rank, "host": socket.gethostname(), "pid": os.getpid(), "time": now()}
    what = {
        "attempt": attempt,
        "state": state,
        "code": int(code),
        "message": mask(message),
        "step": step,
        "steps": steps,
    }
    write_json(stage / STATUS, {"schema": SCHEMA, **what, **who})


def read_status(stage: Path) -> dict[str, Any] | None:
    """Read `status.json`; None if the stage never started. Raises ChainError when it is damaged."""
    return read_json(stage / STATUS, schema=SCHEMA, error=ChainError)


# -- manifest: the contract between stages -----------------------------------------------------------------------------


def write_manifest(stage: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json`, which finishes a stage: everything it names must be on the disk (see `settle`)."""
    write_json(stage / MANIFEST, {"schema": SCHEMA, **manifest})


def read_manifest(stage: Path) -> dict[str, Any] | None:
    """Read the manifest of a stage; None if the stage is not finished.

    Raises:
        ChainError: it is damaged, or of a schema that this version does not know.
    """
    manifest = read_json(stage / MANIFEST, schema=SCHEMA, error=ChainError)
    if manifest is None:
        return None
    missing = [key for key in ("stage", "kind", "fingerprint", "fingerprint_sha256", "files") if key not in manifest]
    if missing:
        raise ChainError(f"{stage / MANIFEST}: damaged: without {', '.join(missing)}")
    return manifest


def verify_parent(stage: Path, *, deep: bool = False) -> dict[str, Any]:
    """Check that a finished stage still holds what its manifest names, and return the manifest.

    `deep` compares contents (every byte is read), otherwise sizes.

    Raises:
        ChainError: not finished, damaged, or changed since; the text names the file and the remedy.
    """
    manifest = read_manifest(stage)
    if manifest is None:
        raise ChainError(f"{stage}: not finished (no {MANIFEST}); run this stage first: --stage {stage.name}")
    again = f"run it again: --stage {stage.name} --force"
    if digest(manifest["fingerprint"]) != manifest["fingerprint_sha256"]:
        raise ChainError(f"{stage / MANIFEST}: damaged: its fingerprint does not match its hash; {again}")
    try:
        reason = fault(stage, manifest["files"], deep=deep)
    except (KeyError, TypeError, AttributeError) as error:
        raise ChainError(f"{stage / MANIFEST}: damaged: its table of files is incomplete; {again}") from error
    if reason is not None:
        raise ChainError(f"{stage}/{reason}; the stage was damaged or edited after it finished; {again}")
    return manifest


def weights_sha256(files: dict[str, dict[str, Any]]) -> str:
    """The identity of a model: the hash of the table of its `*.safetensors` files, whatever folder they lie in."""
    return digest({name: entry["sha256"] for name, entry in files.items() if name.endswith(".safetensors")})
