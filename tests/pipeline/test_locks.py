"""One writer at a time, with real processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from alignment.errors import LockedError
from alignment.pipeline.locks import holder, lock, refuse_if_held

HOLDER = """
import sys, time
from pathlib import Path
from alignment.pipeline.locks import lock
with lock(Path(sys.argv[1]), "attempt-1"):
    print("held", flush=True)
    time.sleep(60)
"""
RACER = """
import sys, time
from pathlib import Path
from alignment.errors import LockedError
from alignment.pipeline.locks import lock
time.sleep(max(0, float(sys.argv[2]) - time.time()))
try:
    with lock(Path(sys.argv[1])):
        time.sleep(3)
except LockedError as error:
    sys.exit(int(error.code))
"""


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_live_holder_is_named_and_a_killed_one_is_taken_over(tmp_path: Path) -> None:
    process = hold(tmp_path)
    try:
        started = time.monotonic()
        with pytest.raises(LockedError, match=f"in use by process {process.pid} on ") as caught, lock(tmp_path):
            pytest.fail("two holders")
        assert time.monotonic() - started < 2
        assert caught.value.code == 5
        found = holder(tmp_path)
        assert found is not None
        assert (found["pid"], found["attempt"]) == (process.pid, "attempt-1")
        with pytest.raises(LockedError):
            refuse_if_held(tmp_path)
    finally:
        process.send_signal(signal.SIGKILL)
        assert process.wait(10) == -9
    assert holder(tmp_path) is None
    said: list[str] = []
    (tmp_path / ".status.json.1.tmp").write_text("left by the killed one")
    with lock(tmp_path, say=said.append):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        assert not (tmp_path / ".status.json.1.tmp").exists()
    assert len(said) == 1
    assert f"taken over from process {process.pid} on " in said[0]


def test_an_orderly_end_leaves_nothing_to_take_over(tmp_path: Path) -> None:
    with pytest.raises(KeyError), lock(tmp_path):
        raise KeyError
    said: list[str] = []
    with lock(tmp_path, say=said.append):
        pass
    assert said == []
    assert (tmp_path / "lock").read_text() == ""
    assert holder(tmp_path / "never") is None


def test_of_six_that_start_together_one_wins(tmp_path: Path) -> None:
    at = str(time.time() + 1.5)
    racers = [subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), at]) for _ in range(6)]
    assert sorted(racer.wait(30) for racer in racers) == [0, 5, 5, 5, 5, 5]
