"""What happens around the steps: sealing checkpoints, the log, the progress line, preemption."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.pipeline import runs, seals

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
UNDER_TIME = ("runtime", "per_second", "epoch_time", "tokens_per_second")  # durations and rates, kept apart in the log


class Seal(TrainerCallback):
    """Makes each checkpoint whole or absent, and rotates old ones after the new one is sealed."""

    def __init__(self, *, fingerprint_sha256: str, keep: int, wait: Callable[[], None]):
        self.fingerprint_sha256, self.keep, self.wait = fingerprint_sha256, keep, wait

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remove what a kill left half made or half removed, and what lies beyond the step at which this run begins.

        The latter is damaged, and made again from here. Left there it would be counted as good by the rotation, which
        would then remove the one that is.
        """
        if state.is_world_process_zero:
            for folder in seals.checkpoints(Path(args.output_dir)):
                beyond = int(folder.name.partition("-")[2]) > state.global_step
                if beyond or not (folder / seals.SEALED).is_file():
                    seals.remove(folder)
            self._rotate(Path(args.output_dir), best=state.best_model_checkpoint)  # one may have been cut short
        self.wait()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Seal the checkpoint of this step once every rank has written its part."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        self.wait()
        if state.is_world_process_zero and folder.is_dir():
            # It holds tokens in clear, and nothing reads it.
            (folder / "training_args.bin").unlink(missing_ok=True)
            runs.seal(
                folder,
                step=state.global_step,
                world_size=args.world_size,
                fingerprint_sha256=self.fingerprint_sha256,
            )
            self._rotate(folder.parent, best=state.best_model_checkpoint)
        self.wait()

    def _rotate(self, stage: Path, best: str | None) -> None:
        """Remove all but the newest `keep` sealed checkpoints; the best one stays."""
        sealed = [path for path in seals.checkpoints(stage) if (path / seals.SEALED).is_file()]  # newest first
        for path in sealed[self.keep :]:
            if best is None or path.resolve() != Path(best).resolve():
                seals.remove(path)


class Log(TrainerCallback):
    """`log.jsonl`: one line per logging step; durations and rates stand under `time`.

    Args:
        more: entries that are no numbers, for the lines of training steps.
    """

    def __init__(self, path: Path, more: Callable[[], dict[str, Any]] = dict):
        self.path, self.more, self.started = path, more, time.monotonic()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A resumed run continues the log where its checkpoint was made: no step stands in it twice."""
        if not state.is_world_process_zero:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [line for line in lines if _step_of(line) is not None and (_step_of(line) or 0) <= state.global_step]
        runs.write_text(self.path, "".join(f"{line}\n" for line in kept if state.global_step > 0))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The last step is always logged, however few there are."""
        if state.global_step >= state.max_steps:
            control.should_log = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append what upstream logged."""
        if not state.is_world_process_zero or not logs:
            return
        entry: dict[str, Any] = {"step": state.global_step, "time": {"seconds": time.monotonic() - self.started}}
        for key, value in logs.items():
            place = entry["time"] if key.endswith(UNDER_TIME) or key.startswith("time/") else entry
            place[key.removeprefix("time/")] = value
        if "loss" in logs:
            entry |= self.more()
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, sort_keys=True) + "\n")


def _step_of(line: str) -> int | None:
    """The step of a log line; None for a line that was cut by a kill."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return None


class Progress(TrainerCallback):
    """One progress line: step, loss, the stage's key metric, speed, time left.

    On a terminal it is redrawn in place; elsewhere (a Slurm log) it is one line per logging step.
    """

    def __init__(self, name: str, metric: tuple[str, str] | None, out: TextIO | None = None):
        self.name, self.metric, self.out = name, metric, out or sys.stdout
        self.live = self.out.isatty()
        self.shown: dict[str, float] = {}
        self.started, self.first_step, self.drawn = time.monotonic(), 0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Speed counts from here, so a resumed run is not credited with old steps."""
        self.started, self.first_step = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Redraw, at most four times a second."""
        if self.live and state.is_world_process_zero and time.monotonic() - self.drawn > 0.25:
            self._draw(state, end="")

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Remember the numbers of the line."""
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        labels = {"loss": "loss", "eval_loss": "eval loss"}
        if self.metric is not None:
            labels |= {self.metric[1]: self.metric[0], f"eval_{self.metric[1]}": f"eval {self.metric[0]}"}
        self.shown |= {label: float(logs[key]) for key, label in labels.items() if key in logs}
        self._draw(state, end="" if self.live else "\n")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the last line standing."""
        if self.live and state.is_world_process_zero:
            self._draw(state, end="\n")

    def _draw(self, state: TrainerState, end: str) -> None:
        self.drawn = time.monotonic()
        done, total = state.global_step, max(state.max_steps, 1)
        elapsed = self.drawn - self.started
        speed = (done - self.first_step) / elapsed if elapsed > 0 else 0.0
        left = (total - done) / speed if speed > 0 else 0.0
        filled = round(20 * done / total)
        numbers = "  ".join(f"{label} {value:.4g}" for label, value in self.shown.items())
        rate = f"{speed:.2f} steps/s" if speed >= 1 or speed == 0 else f"{1 / speed:.1f} s/step"
        bar = f"[{'#' * filled}{'.' * (20 - filled)}] " if self.live else ""
        line = f"  {self.name} {bar}{done}/{total}  {numbers}  {rate}  {_clock(left)} left"
        if self.live:
            width = shutil.get_terminal_size().columns - 1
            line = "\r" + line[:width].ljust(width)
        self.out.write(line + end)
        self.out.flush()


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class Preemption(TrainerCallback):
    """On SIGTERM, SIGINT or SIGUSR1: save after the step in progress, then leave; a second SIGINT leaves at once."""

    def __init__(self, device: torch.device):
        self.received: int | None = None
        self.left: int | None = None  # the signal on which all ranks agreed to leave
        self.device = device
        for number in STOPPING:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        if number == signal.SIGINT and self.received == signal.SIGINT:
            os._exit(128 + number)
        self.received = number

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """All ranks decide alike: a signal that reached one reached all."""
        flag = torch.tensor(float(self.received or 0), device=self.device)
        if args.world_size > 1:
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
        if flag.item() and state.global_step < state.max_steps:
            self.left = int(flag.item())
            control.should_save = True
            control.should_training_stop = True
        elif flag.item():
            self.received = None  # it was the last step: finishing is quicker than coming back
