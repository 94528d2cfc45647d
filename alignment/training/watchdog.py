"""A run whose ranks wait for each other for ever: found, explained and ended with exit code 7.

A rank that hangs cannot say so, and the others wait inside a collective. So each rank has a thread that writes every
few seconds how far its training has come and where in the code it stands (`heartbeat/rank-<n>.json` in the stage's
folder), and reads what the others write. Where nothing has moved for `launch.timeout` seconds, the survivors name the
rank that no longer answers, or that came least far, print its last stack, and leave.

Only steps have that limit: preparing, checking, evaluating, saving and publishing may take hours, as long as each
process still answers. A process that does not answer at all (stopped, or gone with its machine) is noticed everywhere.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.errors import ExitCode

FOLDER = "heartbeat"
LONG = 6 * 3600.0  # seconds: as long as the preparation of data may take (`handoff.py`)
POLL = 5.0  # seconds between two heartbeats
STEPS = "training"  # the phase whose beats have the short limit
FRAMES = 16  # of a stack, the innermost ones

Tell = Callable[[str, int], None]


@dataclass
class Peer:
    """What this rank knows of a rank, itself included; moments are of this rank's clock."""

    record: Mapping[str, Any] = field(default_factory=dict)
    heard: float = 0.0  # when its heartbeat last changed
    left: bool = False  # its file was there and is gone: it has finished

    @property
    def way(self) -> tuple[int, int]:
        """How far it has come."""
        return int(self.record.get("step", 0)), int(self.record.get("beats", 0))


class Watchdog:
    """The thread of one rank.

    Args:
        stage: the stage's folder, which all ranks see.
        attempt: the name of this start; heartbeats of others are not read.
        timeout: seconds; 0 switches it off.
        tell: is given the message and the rank that hangs, before the process ends.
        leave: ends this process.
    """

    def __init__(
        self, stage: Path, *, attempt: str, rank: int, ranks: int, timeout: float, tell: Tell,
        poll: float = POLL, leave: Callable[[int], None] = os._exit,
    ):  # fmt: skip
        self.folder, self.attempt, self.rank, self.timeout = stage / FOLDER, attempt, rank, timeout
        self.poll = min(poll, max(timeout / 4, 0.05))
        self.tell, self.leave = tell, leave
        self.peers = {number: Peer() for number in range(ranks)}
        self.phase, self.step, self.beats, self.hearts = "preparing", 0, 0, 0
        self.moved = time.monotonic()  # of this rank's own training
        self.main = threading.get_ident()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    # --- told by the training ---------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to watch."""
        if self.timeout > 0:
            self._reset()
            self._thread.start()

    def stop(self) -> None:
        """The rank has finished; it takes its file away, so that the others do not wait for its heartbeat."""
        self._end.set()
        if self._thread.is_alive() and threading.current_thread() is not self._thread:
            self._thread.join(timeout=2 * self.poll)
        with contextlib.suppress(OSError):
            self._path(self.rank).unlink(missing_ok=True)
            self.folder.rmdir()  # by the last one

    def beat(self, phase: str | None = None, step: int | None = None) -> None:
        """The training has moved."""
        self.phase, self.step = phase or self.phase, self.step if step is None else step
        self.beats += 1
        self.moved = time.monotonic()

    @contextlib.contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """A part of the training that may take long."""
        before = self.phase
        self.beat(phase)
        try:
            yield
        finally:
            self.beat(before)

    def follow(self, trainer: Trainer) -> None:
        """Beat with the trainer's steps; logging, evaluating and saving may take long."""
        trainer.add_callback(Beats(self))
        inner = trainer._maybe_log_save_evaluate

        def unhurried(*args: Any, **kwargs: Any) -> Any:
            with self.during("evaluating or saving"):
                return inner(*args, **kwargs)

        trainer._maybe_log_save_evaluate = unhurried

    # --- the thread -------------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._end.wait(self.poll):
            now = time.monotonic()
            if now - last > self.poll + max(5.0, self.poll):
                self._reset()  # this process was stopped itself: what it measured means nothing
            last = now
            self._write()
            self._read(now)
            if (found := self._verdict(now)) is not None and not self._end.is_set():
                self._finish(*found)
                return

    def _reset(self) -> None:
        self.moved = time.monotonic()
        for peer in self.peers.values():
            peer.heard = self.moved

    def _path(self, rank: int) -> Path:
        return self.folder / f"rank-{rank}.json"

    def _write(self) -> None:
        """Whole or not at all, and without fsync: it is worth nothing after a crash."""
        self.hearts += 1
        record = {
            "attempt": self.attempt, "rank": self.rank, "host": socket.gethostname(), "pid": os.getpid(),
            "born": _born(os.getpid()), "heart": self.hearts, "beats": self.beats, "phase": self.phase,
            "step": self.step, "stack": self._stack(),
        }  # fmt: skip
        beside = self._path(self.rank).with_suffix(".tmp")
        with contextlib.suppress(OSError):
            self.folder.mkdir(exist_ok=True)
            beside.write_text(json.dumps(record), encoding="utf-8")
            os.replace(beside, self._path(self.rank))

    def _stack(self) -> list[str]:
        frame = sys._current_frames().get(self.main)
        return traceback.format_stack(frame)[-FRAMES:] if frame is not None else []

    def _read(self, now: float) -> None:
        for rank, peer in self.peers.items():
            try:
                record = json.loads(self._path(rank).read_text(encoding="utf-8"))
            except FileNotFoundError:
                peer.left = bool(peer.record)
                continue
            except (OSError, ValueError):
                continue
            if record.get("attempt") != self.attempt:
                continue
            if record.get("heart") != peer.record.get("heart"):
                peer.heard = now
            peer.record, peer.left = record, False

    def _verdict(self, now: float) -> tuple[list[int], bool] | None:
        """The ranks that hang, and whether they do not answer at all; None while there is nothing to say."""
        still = now - self.moved
        if still <= self.timeout:
            return None
        known = {rank: peer for rank, peer in self.peers.items() if peer.record and not peer.left}
        silent = [rank for rank, peer in known.items() if rank != self.rank and now - peer.heard > self.timeout]
        if silent:
            return silent, True
        alive = {rank: peer for rank, peer in known.items() if now - peer.heard <= self.timeout}
        hurried = self.phase == STEPS and all(peer.record["phase"] == STEPS for peer in alive.values())
        if still <= (self.timeout if hurried else LONG):
            return None
        if gone := [rank for rank, peer in self.peers.items() if peer.left]:
            return gone, False
        least = min((peer.way for peer in alive.values()), default=(0, 0))
        return [rank for rank, peer in alive.items() if peer.way == least], False

    def _finish(self, ranks: list[int], silent: bool) -> None:
        """Say it once, end what does not answer, and leave."""
        alive = [rank for rank, peer in self.peers.items() if rank not in ranks or not silent]
        if self.rank == min(alive, default=self.rank):
            message = self._message(ranks, silent)
            sys.stderr.write(self._stacks(ranks))
            sys.stderr.flush()
            self.tell(message, ranks[0])
            for rank in ranks if silent else ():
                _kill(self.peers[rank].record)
        else:
            time.sleep(2 * self.poll)  # the one that speaks needs its time
        self.leave(int(ExitCode.HANG))

    def _message(self, ranks: list[int], silent: bool) -> str:
        first = self.peers[ranks[0]]
        record = first.record
        who = f"rank {ranks[0]} on {record.get('host')} (pid {record.get('pid')})"
        more = f" and {len(ranks) - 1} more" if len(ranks) > 1 else ""
        where = f"after step {record.get('step', 0)}, {record.get('phase', '')}"
        waited = f"nothing has moved for {self.timeout:g} s (launch.timeout)"
        last = (record.get("stack") or ["nowhere"])[-1].strip().splitlines()[0]
        if silent:
            what = "does not answer: stopped, swapped out, or gone with its machine"
        elif first.left:
            what = "has left without the others"
        elif len(ranks) == len(self.peers) > 1:
            who, more = "all ranks", ""
            what = "wait at the same place: the network, or a collective that not all of them call"
        else:
            what = "hangs, and the others wait for it" if len(self.peers) > 1 else "hangs"
        return f"{waited}: {who}{more} {what}; {where}, last seen at {last}. The same command goes on from the last \
checkpoint"

    def _stacks(self, ranks: list[int]) -> str:
        """The last stack of the ranks that hang (a stopped process shows where it was stopped)."""
        lines = []
        for rank in ranks[:4]:
            stack = "".join(self.peers[rank].record.get("stack") or ())
            lines.append(f"alignment: the last stack of rank {rank}, innermost last:\n{stack}")
        return "".join(lines)


def _born(pid: int) -> str:
    """When a process started, in the kernel's ticks: its number may have been given to another since."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _kill(record: Mapping[str, Any]) -> None:
    """End a rank on this host that does not answer: SIGTERM waits for ever in a stopped process, SIGKILL does not."""
    if record.get("host") == socket.gethostname() and record["born"] and _born(int(record["pid"])) == record["born"]:
        with contextlib.suppress(OSError):
            os.kill(int(record["pid"]), signal.SIGKILL)


class Beats(TrainerCallback):
    """Tells the watchdog that the training moves."""

    def __init__(self, dog: Watchdog):
        self.dog = dog

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Checks of the first batch, and kernels that are built, may take long."""
        self.dog.beat("starting", state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step."""
        self.dog.beat(STEPS, state.global_step)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One of its forward passes."""
        self.dog.beat()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """One of an update's steps."""
        self.dog.beat()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """It is done."""
        self.dog.beat(step=state.global_step)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A batch of an evaluation."""
        self.dog.beat()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What follows is evaluated, written and read back."""
        self.dog.beat("publishing")
