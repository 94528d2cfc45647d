"""Runs one launcher with everything it starts, and leaves no process behind.

A launcher is a poor parent: `accelerate launch` with one process dies at SIGTERM and leaves its child training;
torchrun gives each rank a session of its own and kills it 30 s after a signal, whatever it is saving. So the ranks are
signalled directly, the launcher is left to notice that they are gone, and whatever it leaves behind becomes our child
(Linux's child subreaper) and is waited for.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import NamedTuple

GRACE = 600.0  # seconds to save and leave after a signal
ORPHAN_GRACE = 30.0  # seconds for ranks to leave when their launcher is gone
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_LIBC = ctypes.CDLL(None, use_errno=True)


class Ended(NamedTuple):
    """How a command ended: its exit code (negative: a signal), and the first signal that asked us to stop it."""

    code: int
    stopped_by: signal.Signals | None


def run(
    command: Sequence[str],
    env: Mapping[str, str],
    *,
    output: Path | None = None,
    grace: float = GRACE,
    say: Callable[[str], None] = print,
) -> Ended:
    """Run a command until it and all that it started have ended.

    It has a session of its own, no stdin, and our stdout and stderr, unless `output` names a file to append to.
    SIGINT, SIGTERM, SIGUSR1 and SIGHUP become one SIGTERM to each rank (the launcher's children), which has `grace`
    seconds to save and leave; a second signal, or the end of the time, kills all. If this process is killed, so is the
    launcher.
    """
    with _signals() as pending, _subreaper(), contextlib.ExitStack() as stack:
        sink = stack.enter_context(open(output, "ab")) if output is not None else None
        others = set(_children(os.getpid()))
        process = subprocess.Popen(
            command, env=dict(env), stdin=subprocess.DEVNULL, stdout=sink, stderr=sink, start_new_session=True,
            preexec_fn=_die_with_parent,
        )  # fmt: skip
        deadline: float | None = None
        stopped_by: signal.Signals | None = None
        told: set[int] = set()
        while True:
            ended = process.poll() is not None
            left = [pid for pid in _children(os.getpid()) if pid not in others | {process.pid}] if ended else []
            left = [pid for pid in left if not _reap(pid)]
            if ended and not left:
                return Ended(process.returncode, stopped_by)
            if ended and set(left) - told:  # orphans of the launcher
                _signal(set(left) - told, signal.SIGTERM)
                told.update(left)
                deadline = deadline or time.monotonic() + ORPHAN_GRACE
            if pending and stopped_by is None:
                stopped_by = signal.Signals(pending.pop(0))
                say(f"{stopped_by.name}: stopping; again kills at once")
                ranks = _children(process.pid)
                _signal(ranks or [process.pid], signal.SIGTERM)
                told.update(ranks)
                deadline = time.monotonic() + grace
            elif pending or (deadline is not None and time.monotonic() > deadline):
                pending.clear()
                _signal([process.pid, *_descendants(process.pid), *left], signal.SIGKILL)
            time.sleep(0.05)


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals meant for us instead of dying of them."""
    pending: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        pending.append(number)

    previous = {number: signal.signal(number, note) for number in _SIGNALS}
    try:
        yield pending
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _subreaper() -> Iterator[None]:
    """Become the parent of processes whose own parent died."""
    _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    try:
        yield
    finally:
        _LIBC.prctl(_PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


def _die_with_parent() -> None:
    """Between fork and exec: be told when `alignment run` is killed with kill -9.

    Slurm sends SIGUSR1 to every process of a step, and launchers die of it; ours is passed on to the ranks as SIGTERM.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def _children(parent: int) -> list[int]:
    """The direct children of a process, zombies included."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                # The command name, in brackets, may hold anything; the parent is the second field behind it.
                fields = Path(f"/proc/{entry}/stat").read_text(errors="replace").rpartition(")")[2].split()
                if int(fields[1]) == parent:
                    found.append(int(entry))
    return found


def _descendants(parent: int) -> list[int]:
    children = _children(parent)
    return [*children, *(pid for child in children for pid in _descendants(child))]


def _reap(pid: int) -> bool:
    """Collect a child that has ended; whether it has."""
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _signal(pids: set[int] | list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)
