"""How a stage ends: exactly one status, one line on what went wrong, one exit code, whatever happened on which rank."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from alignment.errors import ExitCode, Preempted, StorageError, UserError
from alignment.pipeline import runs
from alignment.pipeline.plan import StageSpec
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.credentials import mask
from alignment.training import failing, watchdog
from alignment.training.arguments import is_main, world_size


def of(spec: StageSpec, work: Callable[[watchdog.Watchdog], None], *, say: Callable[[str], None]) -> int:
    """Do a stage's work under its lock and its watchdog; the exit code, and a line on standard error if it failed."""
    rank = int(os.environ.get("RANK", "0"))
    ended: dict[str, Any] = {"state": "failed", "code": ExitCode.FAILED, "message": ""}
    try:
        with runs.lock_stage(spec.output, spec.attempt, say=say) if is_main() else nullcontext():
            write_status(spec, state="running", code=0)
            failing.clear(spec) if is_main() else None
            try:
                with watched(spec) as dog:
                    work(dog)
                ended = {"state": "done", "code": ExitCode.DONE, "message": ""}
            except Preempted as left:
                ended = {"state": "preempted", "code": left.code, "message": str(left)}
            except Exception as error:
                ended = _failed(spec, error)
            except BaseException as error:
                ended["message"] = f"{type(error).__name__}: {error}"
                raise
            finally:
                with suppress(StorageError) if ended["message"] else nullcontext():  # the first reason is the better
                    write_status(spec, rank=rank, **ended)
    except UserError as error:  # the lock, or a status that could not be written
        ended = {"state": "failed", "code": error.code, "message": str(error)}
        if isinstance(error, StorageError):
            with suppress(UserError):  # the disk may have failed for a moment only
                write_status(spec, rank=rank, **ended)
    if ended["message"]:
        where = f" (rank {rank} on {socket.gethostname()})" if world_size() > 1 else ""
        print(f"alignment: stage {spec.stage}: {mask(ended['message'])}{where}", file=sys.stderr)
    return int(ended["code"])


def _failed(spec: StageSpec, error: Exception) -> dict[str, Any]:
    """What this rank says of its failure; nothing where another rank's is the cause."""
    if failing.consequence(spec, error):
        return {"state": "lost", "code": failing.LOST_CONTACT, "message": ""}
    if isinstance(error, UserError):
        return {"state": "failed", "code": error.code, "message": str(error)}
    if isinstance(error, OSError):
        return _storage(error)
    traceback.print_exc()  # our bug or upstream's
    return {"state": "failed", "code": ExitCode.FAILED, "message": f"{type(error).__name__}: {error}"}


def _storage(error: OSError) -> dict[str, Any]:
    """A full disk or a lost mount is the user's to mend: one line."""
    text = f"{error.filename or 'storage'}: {error.strerror or error}; make room or mend it, then run again"
    return {"state": "failed", "code": StorageError.code, "message": text}


@contextmanager
def watched(spec: StageSpec) -> Iterator[watchdog.Watchdog]:
    """A watchdog while a stage that trains runs; a hang ends this process from within its thread."""

    def tell(message: str, rank: int) -> None:
        print(f"alignment: stage {spec.stage}: {message}", file=sys.stderr, flush=True)
        runs.write_status(
            spec.output, attempt=spec.attempt, state="failed", code=ExitCode.HANG, message=message, rank=rank
        )

    trains = ALGORITHMS[spec.config.algorithm].config is not None
    rank = int(os.environ.get("RANK", "0"))
    timeout = spec.config.launch.timeout if trains else 0
    dog = watchdog.Watchdog(
        spec.output, attempt=spec.attempt, rank=rank, ranks=world_size(), timeout=timeout, tell=tell
    )
    dog.start()
    try:
        yield dog
    finally:
        dog.stop()


def write_status(spec: StageSpec, **fields: Any) -> None:
    """Write `status.json`: rank 0 always, another rank only to report its own failure; who lost contact, never.

    The first failure stands: the ranks that lose their neighbour fail too, of nothing that helps.
    """
    state = fields["state"]
    if state == "failed":
        with suppress(UserError):  # a damaged file is written anew
            found = runs.read_status(spec.output)
            if found is not None and found["attempt"] == spec.attempt and found["state"] in ("failed", "preempted"):
                return
    if state == "failed" or (is_main() and state != "lost"):
        runs.write_status(spec.output, attempt=spec.attempt, **fields)
