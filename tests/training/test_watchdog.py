"""Ranks that hang: named with their stack, and everything ends in time; what only takes long is left alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.errors import ExitCode
from alignment.pipeline import runs
from alignment.training.watchdog import FOLDER, STEPS, Watchdog

TIMEOUT = 0.6


class Rank:
    """A rank whose training is moved by hand; its thread is real."""

    def __init__(self, folder: Path, rank: int, ranks: int):
        self.said: list[tuple[str, int]] = []
        self.left = threading.Event()
        self.codes: list[int] = []
        self.dog = Watchdog(
            folder, attempt="a", rank=rank, ranks=ranks, timeout=TIMEOUT, poll=0.05, leave=self._leave,
            tell=lambda message, guilty: self.said.append((message, guilty)),
        )  # fmt: skip
        self.dog.start()

    def _leave(self, code: int) -> None:
        self.codes.append(code)
        self.left.set()


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Callable[[int], list[Rank]]]:
    """A function that starts some ranks in this process."""
    made: list[Rank] = []

    def start(count: int) -> list[Rank]:
        made.extend(Rank(tmp_path, rank, count) for rank in range(count))
        return made

    yield start
    for rank in made:
        rank.dog.stop()


def test_the_rank_that_came_least_far_is_named(
    ranks: Callable[[int], list[Rank]], capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = ranks(2)
    for step in range(3):
        for rank in (first, second):
            rank.dog.beat(STEPS, step)
    first.dog.beat(STEPS, 3)  # the second never gets there
    assert first.left.wait(5 * TIMEOUT)
    assert second.left.wait(5 * TIMEOUT)
    assert (first.codes, second.codes) == ([ExitCode.HANG], [ExitCode.HANG])
    ((message, guilty),) = first.said
    assert second.said == []
    assert guilty == 1
    assert "rank 1 on" in message
    assert "hangs, and the others wait for it; after step 2, training, last seen at" in message
    said = capsys.readouterr().err
    assert "the last stack of rank 1, innermost last" in said
    assert "test_watchdog.py" in said


def test_all_at_one_place_is_the_networks(ranks: Callable[[int], list[Rank]]) -> None:
    first, second = ranks(2)
    for rank in (first, second):
        rank.dog.beat(STEPS, 1)
    assert first.left.wait(5 * TIMEOUT)
    assert "all ranks wait at the same place" in first.said[0][0]


def test_a_process_that_does_not_answer_is_named_in_any_phase(
    ranks: Callable[[int], list[Rank]], tmp_path: Path
) -> None:
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        (first,) = ranks(1)
        first.dog.peers[1] = type(first.dog.peers[0])(heard=time.monotonic())
        record = {"attempt": "a", "rank": 1, "host": os.uname().nodename, "pid": sleeper.pid, "heart": 1, "beats": 3,
                  "phase": "evaluating or saving", "step": 2, "stack": ["  File \"here\", line 1\n"]}  # fmt: skip
        born = Path(f"/proc/{sleeper.pid}/stat").read_text().rpartition(")")[2].split()[19]
        (tmp_path / FOLDER).mkdir(exist_ok=True)
        (tmp_path / FOLDER / "rank-1.json").write_text(json.dumps(record | {"born": born}))
        first.dog.beat("evaluating or saving", 2)
        assert first.left.wait(6 * TIMEOUT)
        assert "rank 1 on" in first.said[0][0]
        assert "does not answer" in first.said[0][0]
        assert sleeper.wait(5) == -signal.SIGKILL  # it would not have died of anything less
    finally:
        sleeper.kill()


@pytest.mark.parametrize("phase", ["preparing", "starting", "evaluating or saving", "publishing"])
def test_what_may_take_long_is_left_alone(phase: str, ranks: Callable[[int], list[Rank]]) -> None:
    first, second = ranks(2)
    first.dog.beat(STEPS, 1)  # waits in a barrier
    second.dog.beat(phase, 1)  # works
    assert not first.left.wait(4 * TIMEOUT)
    assert not second.left.is_set()


def test_steps_and_a_finished_rank_are_left_alone(ranks: Callable[[int], list[Rank]], tmp_path: Path) -> None:
    first, second = ranks(2)
    end = time.monotonic() + 4 * TIMEOUT
    step = 0
    while time.monotonic() < end:
        step += 1
        for rank in (first, second):
            rank.dog.beat(STEPS, step)
        time.sleep(TIMEOUT / 4)
    second.dog.stop()
    assert sorted(path.name for path in (tmp_path / FOLDER).iterdir()) == ["rank-0.json"]
    first.dog.beat("publishing")
    assert not first.left.wait(3 * TIMEOUT)
    first.dog.stop()
    assert not (tmp_path / FOLDER).exists()


def test_a_job_that_was_suspended_does_not_accuse_itself(
    ranks: Callable[[int], list[Rank]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (first,) = ranks(1)
    first.dog.beat(STEPS, 1)
    clock = time.monotonic
    start = clock()
    # As after Ctrl-Z and fg: the clock has gone on for an hour in which no thread ran.
    monkeypatch.setattr(time, "monotonic", lambda: clock() + (3600 if clock() - start > 0.2 else 0))
    assert not first.left.wait(TIMEOUT * 0.8)
    monkeypatch.undo()


def test_zero_switches_it_off(tmp_path: Path) -> None:
    dog = Watchdog(tmp_path, attempt="a", rank=0, ranks=1, timeout=0, tell=lambda message, rank: None)
    dog.start()
    assert not dog._thread.is_alive()
    dog.stop()


def test_a_hang_stays_the_cause(tmp_path: Path) -> None:
    """The rank that finds its peer's socket closed fails a moment later, and must not overwrite why."""
    from types import SimpleNamespace

    from alignment.training.outcome import write_status

    spec: Any = SimpleNamespace(output=tmp_path, attempt="a")
    runs.write_status(tmp_path, attempt="a", state="failed", code=ExitCode.HANG, message="rank 1", rank=1)
    write_status(spec, state="failed", code=ExitCode.FAILED, message="Connection closed by peer")
    assert runs.read_status(tmp_path)["code"] == ExitCode.HANG
    write_status(spec, state="running", code=0)
    assert runs.read_status(tmp_path)["state"] == "running"


def wait_for(path: Path, limit: float = 120) -> dict[str, Any]:
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            record = json.loads(path.read_text())
            if record["step"] >= 3:
                return dict(record)
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.1)
    raise AssertionError(f"{path} did not come")


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_stopped_rank_ends_the_run_in_time(
    number: int, root: Path, tiny_run: Path, tiny_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    timeout = 10
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base"), "train": {"max_steps": 100000}})
    recipe |= {"launch": {"processes": 2, "timeout": timeout}, "checkpoints": {"every": 100000, "keep": 1}}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    process = subprocess.Popen(
        [sys.executable, "-m", "alignment", "run", str(path), "--runs", str(tmp_path)], cwd=root, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    stage = tmp_path / "tiny" / "sft"
    pids = [wait_for(stage / FOLDER / f"rank-{rank}.json")["pid"] for rank in (0, 1)]
    os.kill(pids[number], signal.SIGSTOP)
    stopped = time.monotonic()
    try:
        out, err = process.communicate(timeout=timeout + 60)
        took = time.monotonic() - stopped
    finally:
        for pid in pids:
            if Path(f"/proc/{pid}").exists():
                os.kill(pid, signal.SIGKILL)
        process.kill()
    assert process.returncode == ExitCode.HANG, out + err
    assert took < timeout + 15
    status = runs.read_status(stage)
    assert (status["code"], status["rank"]) == (ExitCode.HANG, number)
    assert f"rank {number} on" in status["message"]
    assert "does not answer" in status["message"]
    assert f"the last stack of rank {number}" in err
    assert "File " in err.partition("the last stack of rank")[2]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
