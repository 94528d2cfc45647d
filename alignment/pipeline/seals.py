"""Sealed checkpoints: a checkpoint counts when `SEALED.json` in it says what it holds, and it holds just that.

A trainer's own save is a row of plain writes; a kill in between leaves a folder that looks like a checkpoint. The seal
is written last, after everything else is on the disk and was read back. What is not sealed is absent.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from alignment.errors import CheckpointError
from alignment.pipeline.files import fault, read_json, settle, write_json

SEALED = "SEALED.json"
SCHEMA = 1


def seal(folder: Path, *, step: int, world_size: int, fingerprint_sha256: str) -> None:
    """Make a checkpoint durable and seal it. Call it on one rank, when all ranks have written their files.

    Raises:
        StorageError: the disk refuses.
    """
    table = {name: entry for name, entry in settle(folder).items() if name != SEALED}
    record = {"step": step, "world_size": world_size, "fingerprint_sha256": fingerprint_sha256, "files": table}
    write_json(folder / SEALED, {"schema": SCHEMA, **record})


def seal_fault(folder: Path, *, deep: bool = True) -> str | None:
    """Why this checkpoint must not be loaded, or None when it is whole. `deep` compares contents, not only sizes.

    Upstream opens every file with the right name, pickles among them: one that the seal does not name is refused too.
    """
    if folder.is_symlink():
        return "is a link, which leads out of the stage"
    try:
        record = read_json(folder / SEALED, schema=SCHEMA, error=CheckpointError)
    except CheckpointError as error:
        return str(error).removeprefix(f"{folder}/")
    if record is None:
        return "not sealed (its writer was stopped)"
    try:
        return fault(folder, record["files"], deep=deep) or _unnamed(folder, record["files"])
    except (KeyError, TypeError, AttributeError):
        return f"{SEALED}: damaged: fields are missing"


def _unnamed(folder: Path, table: dict[str, dict[str, Any]]) -> str | None:
    """A reason that names a file which was put there after sealing, or None."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if (path.is_symlink() or not path.is_dir()) and name not in table and name != SEALED and path.name[0] != ".":
            return f"{name}: not named in {SEALED}"
    return None


def remove(folder: Path) -> None:
    """Remove a checkpoint, its seal first: a kill in the middle leaves one that is absent, and none that is half."""
    (folder / SEALED).unlink(missing_ok=True)
    shutil.rmtree(folder)


def checkpoints(stage: Path) -> list[Path]:
    """The `checkpoint-<step>` folders of a stage, newest first, sealed or not."""
    found = [path for path in stage.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.partition("-")[2]), reverse=True)


def latest_sealed(stage: Path, fingerprint_sha256: str) -> tuple[Path | None, list[str]]:
    """The newest whole checkpoint of a stage, and one line for each newer one that was passed over.

    No checkpoint at all, or only such as were never sealed, is (None, lines): the stage starts anew.

    Raises:
        CheckpointError: there are sealed checkpoints and none can be used; the text gives every reason.
    """
    passed_over: list[str] = []
    sealed = False
    for folder in checkpoints(stage):
        reason = seal_fault(folder)
        if reason is None:
            found = (read_json(folder / SEALED, schema=SCHEMA, error=CheckpointError) or {})["fingerprint_sha256"]
            if found == fingerprint_sha256:
                return folder, passed_over
            reason = f"made by another recipe (fingerprint {found[:12]}, wanted {fingerprint_sha256[:12]})"
        sealed = sealed or (folder / SEALED).exists()
        passed_over.append(f"{folder.name}: {reason}")
    if sealed:
        raise CheckpointError(
            f"{stage}: no checkpoint can be used: {'; '.join(passed_over)}. To start this stage again, add --force"
        )
    return None, passed_over
