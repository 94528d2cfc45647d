"""One failure, told once: the first rank that fails says why, and what falls over it stays silent.

A rank that is gone breaks the collectives of all others, and a mistake in the recipe meets every rank at once. The
first to fail claims the launch's failure with a file that only one process can make; the rest leave with
`LOST_CONTACT`. A rank whose partner vanished without a word claims nothing: the launcher saw who was killed.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
import traceback

import torch

from alignment.pipeline.plan import StageSpec
from alignment.pipeline.runs import read_status
from alignment.training.arguments import is_main, world_size

LOST_CONTACT = 76  # the exit code of a rank that left because another one was gone
LOST_LOG = "lost-contact.log"  # in the stage's folder: the tracebacks of such ranks, for a network that really failed
WAIT_FOR_MAIN = 60.0  # seconds that a rank which failed at once gives rank 0 to begin
_CLAIM = ".failed-"
# What gloo, NCCL and torch's store say when a partner has gone; a time-out is another matter.
_GONE = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|remote process exited|connection to .*failed|"
    r"failed to (recv|send)|recvvalue failed|sendbytes failed|socket (closed|error)|unhandled system error|"
    r"remote error|connection aborted",
    re.IGNORECASE,
)
_FROM_TRANSPORT = re.compile(r"gloo|nccl|tcpstore|c10d|distributed|socket|peer", re.IGNORECASE)


def lost_contact(error: BaseException) -> bool:
    """Whether an error of a collective says that another rank is gone."""
    text = str(error)
    transport = isinstance(error, torch.distributed.DistNetworkError) or _FROM_TRANSPORT.search(text)
    return isinstance(error, RuntimeError) and bool(_GONE.search(text)) and bool(transport)


def consequence(spec: StageSpec, error: BaseException) -> bool:
    """Whether this rank fails because another has: then it stays silent. In a launch of one process nothing is."""
    if world_size() == 1:
        return False
    if lost_contact(error):
        _note(spec, error)
        return True
    return not _claim(spec)


def clear(spec: StageSpec) -> None:
    """Remove the claims of earlier starts (rank 0, at the start of one)."""
    for path in spec.output.glob(f"{_CLAIM}*"):
        if path.name != f"{_CLAIM}{spec.attempt}":
            path.unlink(missing_ok=True)


def _claim(spec: StageSpec) -> bool:
    """Be the rank that tells; False where another one is. Without a folder to write to, everybody tells."""
    end = time.monotonic() + WAIT_FOR_MAIN
    while not is_main() and not _begun(spec) and time.monotonic() < end:
        time.sleep(0.1)  # else rank 0 would write that it starts over what this rank says
    try:
        os.close(os.open(spec.output / f"{_CLAIM}{spec.attempt}", os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    except FileExistsError:
        return False
    except OSError:
        return True
    return True


def _begun(spec: StageSpec) -> bool:
    status = read_status(spec.output)
    return status is not None and status["attempt"] == spec.attempt


def _note(spec: StageSpec, error: BaseException) -> None:
    head = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} rank {os.environ.get('RANK')} on {socket.gethostname()}"
    text = "".join(traceback.format_exception(error))
    with contextlib.suppress(OSError), open(spec.output / LOST_LOG, "a", encoding="utf-8") as file:
        file.write(f"{head}, attempt {spec.attempt}\n{text}\n")
