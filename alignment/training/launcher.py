"""`accelerate launch`, with its arguments, that says in one line which rank ended the launch.

    python -m alignment.training.launcher --num_processes 8 ... -m alignment.train runs/x/sft/stage.yaml

Where a rank fails, upstream's launcher prints a traceback of itself and a table of all ranks. A rank that failed has
said why, and `status.json` holds it; a rank that was killed could not, so this process says it for that rank, here and
in `status.json`. What fails because another rank is gone is a consequence, and passed over.
"""

from __future__ import annotations

import logging
import signal
import socket
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from alignment.errors import ChainError, ExitCode, UserError
from alignment.pipeline import runs
from alignment.pipeline.plan import StageSpec, read_stage
from alignment.training.failing import LOST_CONTACT, LOST_LOG

WAIT_FOR_CAUSE = 20.0  # seconds for the node whose rank failed to say so, before a consequence is taken for the cause


def main(argv: list[str]) -> int:
    """Launch, and return 0, 85 where the ranks left on a signal, else 1."""
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    for name in logging.root.manager.loggerDict:
        if name.startswith(("torch.distributed.elastic", "torch.distributed.run")):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # who closed whom; we say who was first
    arguments = launch.launch_command_parser().parse_args(argv)
    try:
        launch.launch_command(arguments)
    except SignalException:
        return int(ExitCode.FAILED)
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        if ExitCode.PREEMPTED in codes.values():
            return int(ExitCode.PREEMPTED)
        words = arguments.training_script_args
        if arguments.training_script == "alignment.train" and "--stage" not in words:
            try:
                explain(read_stage(Path(words[0])), codes)
            except UserError as gone:  # the folder itself
                print(f"alignment: {gone}", file=sys.stderr)
        return int(ExitCode.FAILED)
    return int(ExitCode.DONE)


def explain(spec: StageSpec, codes: Mapping[int, int], wait: float = WAIT_FOR_CAUSE) -> None:
    """Say which rank ended the launch, unless a rank has said it.

    Args:
        codes: the exit codes of this node's failed ranks (negative: a signal), in the order in which they were seen.
        wait: seconds for another node to name its rank, where all of this node's only lost contact.
    """
    if set(codes.values()) == {-signal.SIGTERM}:
        return  # told to stop before it could listen
    own = {rank: code for rank, code in codes.items() if code not in (LOST_CONTACT, -signal.SIGTERM)}
    rank, code = next(iter((own or codes).items()))
    end = time.monotonic() + (0.0 if own else wait)
    while not (spoken := _spoken(spec)) and time.monotonic() < end:
        time.sleep(0.2)
    if spoken:
        return
    where = f"rank {rank} on {socket.gethostname()}"
    if code == LOST_CONTACT:
        what = f"lost contact with the other ranks; {spec.output / LOST_LOG} says where"
    elif code < 0:
        killed = signal.Signals(-code)
        guess = " (out of memory?)" if killed == signal.SIGKILL else ""
        what = f"was killed by {killed.name}{guess}; the same command continues the stage"
    else:  # it has said why, but could not write it down: another process holds the stage
        return
    print(f"alignment: stage {spec.stage}: {where} {what}", file=sys.stderr, flush=True)
    last = runs.read_status(spec.output) or {}
    at = {key: last.get(key) for key in ("step", "steps")} if last.get("attempt") == spec.attempt else {}
    runs.write_status(
        spec.output, attempt=spec.attempt, state="failed", code=ExitCode.FAILED, message=f"{where} {what}", rank=rank,
        **at,
    )  # fmt: skip


def _spoken(spec: StageSpec) -> bool:
    """Whether a rank, or another node's launcher, has said how this attempt ended."""
    try:
        status = runs.read_status(spec.output)
    except ChainError:
        return False
    return status is not None and status["attempt"] == spec.attempt and status["state"] != "running"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
