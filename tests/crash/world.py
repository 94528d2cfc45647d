"""Runs of a recipe that can be killed: a fork server, so that an attempt costs a second and not an import of torch.

    world = World(folder)                      imports the trainers once, compiles the faults
    reference = world.attempt(case)            one `alignment run` in processes of its own, to its end
    world.attempt(case, Fault(...))            the same, killed on its way

An attempt is `pipeline.execute.execute` in a forked child. Only the launcher is stood in for: the ranks are forks of
that child with the environment that accelerate gives them, ended as torchrun ends them. A kill takes them all at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import hashlib
import importlib
import json
import os
import random
import select
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
import yaml
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

from alignment.pipeline import execute, launch, supervise
from alignment.pipeline.plan import read_stage
from alignment.recipe import trainer_keys, upstream
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import load_recipe
from alignment.training import builders, exact, ppo, readback, trainers, worker
from alignment.training.smoke import in_process

IMPORTED = (builders, ppo, trainers, worker)  # in the server, so that no fork imports them
LIMIT = 600.0  # seconds after which an attempt counts as hung
PR_SET_CHILD_SUBREAPER = 36

When = Literal["time", "before", "middle", "after", "once", "on"]
PLANTS = ("random-states", "log")
MODES = {"before": 1, "middle": 2, "after": 3, "once": 4, "on": 5}


@dataclass(frozen=True)
class Fault:
    """What happens to an attempt.

    Attributes:
        when: `time`: SIGKILL after `at` seconds. `before`, `middle`, `after`: SIGKILL around the `at`-th call that
            changes something in the run's folder. `once`, `on`: that call fails with `error`, alone or with all later.
        signal: with `time`: this one to the ranks instead, as `alignment run` passes it on.
    """

    when: When
    at: float
    error: int = errno.ENOSPC
    signal: int = signal.SIGKILL

    def __str__(self) -> str:
        if self.when == "time":
            return f"{signal.Signals(self.signal).name} after {self.at:.2f} s"
        if self.when in ("once", "on"):
            return f"{errno.errorcode[self.error]} {'at' if self.when == 'once' else 'from'} call {self.at:.0f}"
        return f"SIGKILL {self.when} call {self.at:.0f}"


@dataclass(frozen=True)
class Attempt:
    """How an attempt ended.

    Attributes:
        code: the exit code of the command; negative: killed.
        fired: what the fault hit, or None if it did not come to it.
        calls: calls that changed something in the folder.
        seconds: how long it took.
        output: what it printed.
    """

    code: int
    fired: str | None
    calls: int
    seconds: float
    output: str


class World:
    """The server. `folder` holds everything; runs lie in `folder/<name>/runs`.

    `plant` breaks resuming on purpose: the random states or the log's sums of a checkpoint are not taken up.
    """

    def __init__(self, folder: Path, *, plant: str = ""):
        self.folder, self.plant = folder.resolve(), plant
        self.shim = ctypes.CDLL(os.environ["LD_PRELOAD"])
        self.shim.crash_arm.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_long, ctypes.c_int]
        self.shim.crash_count.restype = self.shim.crash_fired.restype = ctypes.c_long
        self.shim.crash_what.restype = ctypes.c_char_p
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        _warm()

    def attempt(self, name: str, recipe: Mapping[str, Any], fault: Fault | None = None) -> Attempt:
        """Run a recipe once in `folder/<name>`, as `alignment run` does."""
        place = self.folder / name
        place.mkdir(parents=True, exist_ok=True)
        (place / "recipe.yaml").write_text(yaml.safe_dump(dict(recipe), sort_keys=False), encoding="utf-8")
        injected = fault is not None and fault.when != "time"
        self.shim.crash_arm(
            os.fsencode(place / "runs"), MODES[fault.when] if fault and injected else 0,
            round(fault.at) if fault and injected else 0, fault.error if fault else 0,
        )  # fmt: skip
        printed = place / "output.txt"
        started = time.monotonic()
        child = os.fork()
        if child == 0:
            _break(self.plant)
            _child(place, printed)
        sent = _watch(child, started, fault)
        code, hung = _wait(child, started)
        output = printed.read_text(errors="replace")
        if hung:
            return Attempt(1, None, 0, LIMIT, f"{output}\nhung for {LIMIT:.0f} s, and was killed")
        fired = None
        if injected and self.shim.crash_fired():
            fired = self.shim.crash_what().decode()
        elif sent and fault is not None and (fault.signal != signal.SIGKILL or code == -signal.SIGKILL):
            fired = str(fault)
        return Attempt(code, fired, self.shim.crash_count(), time.monotonic() - started, output)


def _warm() -> None:
    """Do once what every fork would do again: imports, and reading upstream's source. Half of an attempt."""
    for name in ("deepspeed", "accelerate.commands.launch", "alignment.evaluation.evaluate"):
        importlib.import_module(name)
    for row in ALGORITHMS.values():
        if row.config is not None:
            upstream.fields(row.config)
    upstream.fields(trainer_keys.LORA)
    upstream.model_config("llama")
    get_checkpoint_conversion_mapping("llama")
    gc.freeze()  # a collection in a fork walks what it made, and not all of torch


# --- the processes of one attempt -------------------------------------------------------------------------------------


def _child(place: Path, printed: Path) -> None:
    """The child: `alignment run` on `place/recipe.yaml`. Never returns."""
    code = 1
    try:
        os.setsid()
        descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
        code = _command(place)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _break(plant: str) -> None:
    """Plant a fault in resuming."""
    if plant == "random-states":
        transformers.Trainer._load_rng_state = lambda self, checkpoint: None  # type: ignore[method-assign]
    elif plant == "log":
        exact.Exact.on_train_begin = lambda self, *args, **kwargs: None  # type: ignore[method-assign]


def _command(place: Path) -> int:
    """What `alignment run recipe.yaml` does after it has parsed its arguments."""
    from alignment.errors import UserError

    launch.run = _forked  # type: ignore[assignment]
    recipe = load_recipe(place / "recipe.yaml")
    request = execute.Request(recipe, place / "recipe.yaml", (), place / "runs", recipe.name)
    try:
        return int(execute.execute(request, print)["code"])
    except UserError as error:
        print(f"alignment: {error}", file=sys.stderr)
        return int(error.code)


def _forked(
    command: Sequence[str], env: Mapping[str, str], *, output: Path | None = None, grace: float = 0.0,
    say: Callable[[str], None] = print,
) -> supervise.Ended:  # fmt: skip
    """Stands in for the launcher: forks the ranks, ends all when one fails, passes signals on."""
    environment = _environment(command, env)
    stage = Path(command[-1])
    size = int(environment["WORLD_SIZE"])
    with supervise._signals() as pending:
        left: dict[int, int] = {}
        for rank in range(size):
            pid = os.fork()
            if pid == 0:
                _rank(rank, environment, stage)
            left[pid] = rank
        stopped_by, failed, deadline = None, 0, None
        while left:
            for pid in list(left):
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    del left[pid]
                    code = os.waitstatus_to_exitcode(status)
                    failed = failed or code
                    if code and left and deadline is None:
                        supervise._signal(list(left), signal.SIGTERM)  # torchrun
                        deadline = time.monotonic() + 30
            if pending and stopped_by is None:
                stopped_by = signal.Signals(pending.pop(0))
                supervise._signal(list(left), signal.SIGTERM)
            if deadline is not None and time.monotonic() > deadline:
                supervise._signal(list(left), signal.SIGKILL)
            time.sleep(0.03)
    return supervise.Ended(1 if failed else 0, stopped_by)


def _environment(command: Sequence[str], env: Mapping[str, str]) -> dict[str, str]:
    """The environment that accelerate's launcher gives its ranks, from accelerate itself."""
    from accelerate.commands import launch as theirs
    from accelerate.utils import launch as preparing

    args, *_ = theirs._validate_launch_command(theirs.launch_command_parser().parse_args(list(command[3:])))
    os.environ.clear()
    os.environ.update(env)
    size = args.num_processes
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""  # as `launch_command` has it where no file names any
        _, given = preparing.prepare_deepspeed_cmd_env(args)
    elif size > 1:
        given = preparing.prepare_multi_gpu_env(args)
    else:
        _, given = preparing.prepare_simple_launcher_cmd_env(args)
    given = {**env, **given}
    if size > 1 or args.use_deepspeed:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": str(size)}
    return given | {"WORLD_SIZE": str(size)}


def _rank(rank: int, environment: Mapping[str, str], stage: Path) -> None:
    """One rank of a stage. Never returns."""
    code = 1
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if environment["WORLD_SIZE"] != "1" or "MASTER_PORT" in environment:
            environment = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        if rank == 0:
            readback._readers.append(_Reader())
        os.environ.clear()
        os.environ.update(environment)
        worker.die_with_parent()
        spec = read_stage(stage)
        _note_samples(spec.runs.parent / f"samples-{spec.stage}-{rank}.jsonl")
        code = in_process(spec)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


class _Reader(readback.Reader):
    """The process that reads saved models back, as a fork of what is imported already."""

    def __init__(self) -> None:
        theirs, ours = os.pipe()
        answers, back = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(ours)
            os.close(answers)
            kept = readback.environment()
            os.environ.clear()
            os.environ.update(kept)
            readback.main([str(theirs), str(back)])
            os._exit(0)
        os.close(theirs)
        os.close(back)
        self.process = _Process(pid)  # type: ignore[assignment]
        self.questions = os.fdopen(ours, "w", encoding="utf-8")
        self.answers = os.fdopen(answers, encoding="utf-8")


class _Process:
    """What `Reader` asks of a process, for one that was forked."""

    def __init__(self, pid: int):
        self.pid = pid
        self.code: int | None = None

    def poll(self) -> int | None:
        """Its exit code, if it has ended."""
        if self.code is None:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if found else None
        return self.code

    def wait(self, timeout: float | None = None) -> int:
        """Until it has ended."""
        while self.poll() is None:
            time.sleep(0.01)
        assert self.code is not None
        return self.code


def _note_samples(path: Path) -> None:
    """Write down which rows every step of training saw: outside the run's folder, one write each."""
    original = transformers.Trainer.get_batch_samples

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        seen = [_identity(batch) for batch in found[0]]
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.state.global_step + 1, "rows": seen}) + "\n")
        return found

    transformers.Trainer.get_batch_samples = noted  # type: ignore[method-assign]


def _identity(batch: Any) -> str:
    """A digest of all that a batch holds."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        value = batch[name]
        content = value.cpu().numpy().tobytes() if isinstance(value, torch.Tensor) else repr(value).encode()
        digest.update(name.encode() + content)
    return digest.hexdigest()[:16]


# --- the server's side ------------------------------------------------------------------------------------------------


def _watch(child: int, started: float, fault: Fault | None) -> bool:
    """Send what `fault` says at its time; whether the attempt was still there."""
    if fault is None or fault.when != "time":
        return False
    handle = os.pidfd_open(child)
    try:
        ended, _, _ = select.select([handle], [], [], max(0.0, started + fault.at - time.monotonic()))
    finally:
        os.close(handle)
    if ended:
        return False
    if fault.signal == signal.SIGKILL:
        os.killpg(child, signal.SIGKILL)
    else:
        os.kill(child, fault.signal)
    return True


def _wait(child: int, started: float) -> tuple[int, bool]:
    """The child's exit code when all processes of the attempt are gone; and whether they had to be killed for it."""
    code, hung = 1, False
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)  # all are ours: the server is a subreaper
        except ChildProcessError:
            return code, hung
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
        if pid == 0:
            if time.monotonic() - started > LIMIT and not hung:
                hung = True
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(child, signal.SIGKILL)
            time.sleep(0.01)


def copied(source: Path, target: Path) -> None:
    """A copy of a run's folder."""
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(source, target, symlinks=True)


def seeded(seed: int, *names: Any) -> random.Random:
    """A generator for one purpose, so that leaving out a case does not change the others."""
    return random.Random(f"{seed}:{':'.join(map(str, names))}")
