"""No process is left behind: a stand-in launcher with a stand-in worker, stopped in every way."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

# The launcher waits for its worker, as accelerate does, and dies at once of SIGTERM.
LAUNCHER = """
import subprocess, sys
worker = subprocess.Popen([sys.executable, "worker.py", *sys.argv[2:]], start_new_session=sys.argv[1] == "own-session")
sys.exit(1 if worker.wait() else 0)
"""
# The worker saves for a moment when told to stop; `deaf` ignores it.
WORKER = """
import os, signal, sys, time
from pathlib import Path
signals = []
def note(number, frame):
    signals.append(number)
    with open("signals", "a") as file:
        file.write(signal.Signals(number).name + "\\n")
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
    signal.signal(number, note)
Path("worker.tmp").write_text(f"{os.getpid()} {os.getsid(0)}")
os.rename("worker.tmp", "worker.pid")
print("worker says hello", flush=True)
while not signals or "deaf" in sys.argv:
    time.sleep(0.02)
time.sleep(0.5)
Path("saved").write_text("yes")
sys.exit(85)
"""
SUPERVISOR = """
import os, sys
from pathlib import Path
from alignment.pipeline.supervise import run
output = Path("output.log") if "output" in sys.argv else None
ended = run([sys.executable, "launcher.py", *sys.argv[1:]], os.environ, output=output,
    grace=1.5 if "short" in sys.argv else 60.0)
Path("code").write_text(f"{ended.code} {ended.stopped_by and ended.stopped_by.name}")
"""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., tuple[subprocess.Popen[str], int]]:
    """Start a supervisor with its launcher and worker; returns the supervisor and the worker's pid."""
    for name, text in (("launcher.py", LAUNCHER), ("worker.py", WORKER)):
        (tmp_path / name).write_text(text)

    def begin(*words: str) -> tuple[subprocess.Popen[str], int]:
        process = subprocess.Popen(
            [sys.executable, "-c", SUPERVISOR, *words], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )  # fmt: skip
        wait_for(lambda: (tmp_path / "worker.pid").exists())
        return process, int((tmp_path / "worker.pid").read_text().split()[0])

    return begin


def wait_for(condition: Callable[[], object], seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("session", ["same-session", "own-session"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_reaches_the_worker_once_which_may_save(
    tmp_path: Path, start: Callable, number: signal.Signals, session: str
) -> None:
    supervisor, worker = start(session)
    supervisor.send_signal(number)
    said, _ = supervisor.communicate(timeout=30)
    assert supervisor.returncode == 0
    assert f"{number.name}: stopping" in said
    assert (tmp_path / "signals").read_text() == "SIGTERM\n"
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "code").read_text() == f"1 {number.name}"  # launchers lose the 85
    assert not alive(worker)


def test_the_launch_has_a_session_of_its_own(start: Callable, tmp_path: Path) -> None:
    supervisor, worker = start("same-session")
    session = int((tmp_path / "worker.pid").read_text().split()[1])
    assert session != os.getsid(0)
    assert session != worker
    supervisor.terminate()
    supervisor.communicate(timeout=30)


def test_a_second_signal_kills_at_once(tmp_path: Path, start: Callable) -> None:
    supervisor, worker = start("own-session", "deaf")
    supervisor.send_signal(signal.SIGINT)
    wait_for(lambda: (tmp_path / "signals").exists())
    assert alive(worker)
    supervisor.send_signal(signal.SIGINT)
    started = time.monotonic()
    supervisor.communicate(timeout=30)
    assert time.monotonic() - started < 5
    assert not alive(worker)
    assert not (tmp_path / "saved").exists()


def test_a_deaf_worker_is_killed_when_the_time_is_up(tmp_path: Path, start: Callable) -> None:
    supervisor, worker = start("own-session", "deaf", "short")
    supervisor.send_signal(signal.SIGTERM)
    supervisor.communicate(timeout=30)
    assert (tmp_path / "signals").exists()
    assert not alive(worker)
    assert (tmp_path / "code").read_text() == "-9 SIGTERM"


def test_a_worker_whose_launcher_is_killed_is_stopped_and_waited_for(tmp_path: Path, start: Callable) -> None:
    """What `accelerate launch` does to its child on SIGTERM."""
    supervisor, worker = start("same-session")
    launcher = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(launcher, signal.SIGKILL)
    supervisor.communicate(timeout=30)
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "code").read_text() == "-9 None"
    assert not alive(worker)


def test_the_launcher_dies_with_the_supervisor(start: Callable) -> None:
    supervisor, worker = start("same-session")
    launcher = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    supervisor.kill()
    supervisor.wait(30)
    try:
        wait_for(lambda: not alive(launcher))
    finally:
        os.kill(worker, signal.SIGKILL)  # a real worker asks to die with its launcher


@pytest.mark.parametrize("kept", [True, False])
def test_output_goes_through_or_to_a_file(tmp_path: Path, start: Callable, kept: bool) -> None:
    supervisor, _ = start("same-session", *(["output"] if kept else []))
    supervisor.terminate()
    said, _ = supervisor.communicate(timeout=30)
    assert ("worker says hello" in said) is not kept
    assert (tmp_path / "output.log").exists() is kept
    if kept:
        assert (tmp_path / "output.log").read_text() == "worker says hello\n"
