"""Stopped from outside, as a user or a scheduler does it: `alignment run`, real launchers, real signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from alignment.pipeline import runs, seals

pytestmark = pytest.mark.slow
Recipe = Callable[..., dict[str, Any]]
STEPS = 40


def begin(recipe: dict[str, Any], folder: Path, root: Path) -> subprocess.Popen[str]:
    """Start `alignment run`; returns when a few steps are in the log."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "alignment", "run", str(path), "--runs", str(folder)], cwd=root,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    return process


def wait_for_steps(process: subprocess.Popen[str], stage: Path, steps: int) -> None:
    """Wait until the stage has logged so many steps."""
    end = time.monotonic() + 240
    while not (stage / "log.jsonl").exists() or len((stage / "log.jsonl").read_text().splitlines()) < steps:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "it does not get going"
        time.sleep(0.01)


def alive(folder: Path) -> list[str]:
    """The command lines of living processes that name the folder."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            found += [line] if str(folder) in line else []
    return found


def plain_log(stage: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


@pytest.mark.parametrize(
    ("processes", "numbers"),
    [(1, [signal.SIGTERM]), (2, [signal.SIGUSR1]), (1, [signal.SIGINT, signal.SIGINT]), (1, [signal.SIGKILL])],
    ids=["term", "usr1-two-ranks", "int-twice", "kill"],
)
def test_a_stopped_run_leaves_no_process_and_goes_on_exactly(
    processes: int, numbers: list[signal.Signals], root: Path, tiny_run: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    change = {"model": str(tiny_run / "base"), "train": {"max_steps": STEPS}, "batch": {"global": 8, "per_device": 2}}
    recipe = tiny_recipe("sft", sft=change) | {"launch": {"processes": processes}}
    (tmp_path / "whole").mkdir()
    (tmp_path / "stopped").mkdir()
    whole = begin(recipe, tmp_path / "whole", root)
    printed, _ = whole.communicate(timeout=400)
    assert whole.returncode == 0, printed
    stage = tmp_path / "stopped" / "tiny" / "sft"
    process = begin(recipe, tmp_path / "stopped", root)
    wait_for_steps(process, stage, 5)
    started = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.2)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == (85 if numbers[0] != signal.SIGKILL else -9), printed
    while alive(tmp_path / "stopped") and time.monotonic() - started < 30:
        time.sleep(0.1)
    assert alive(tmp_path / "stopped") == []
    assert not (stage / "manifest.json").exists()
    if len(numbers) == 1 and numbers[0] != signal.SIGKILL:
        status = runs.read_status(stage)
        assert status is not None
        assert (status["state"], status["code"]) == ("preempted", 85)
        assert seals.seal_fault(seals.checkpoints(stage)[0]) is None
    again = begin(recipe, tmp_path / "stopped", root)
    printed, _ = again.communicate(timeout=400)
    assert again.returncode == 0, printed
    ours, theirs = (load_file(tmp_path / name / "tiny" / "sft" / "model.safetensors") for name in ("stopped", "whole"))
    assert all((ours[name] == theirs[name]).all() for name in theirs)
    assert plain_log(stage) == plain_log(tmp_path / "whole" / "tiny" / "sft")


def test_of_two_runs_one_runs_and_the_other_says_who(
    root: Path, tiny_run: Path, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base"), "train": {"max_steps": STEPS}})
    first = begin(recipe, tmp_path, root)
    wait_for_steps(first, tmp_path / "tiny" / "sft", 1)
    second = begin(recipe, tmp_path, root)
    printed, _ = second.communicate(timeout=60)
    assert second.returncode == 5
    assert f"in use by process {first.pid} on " in printed
    printed, _ = first.communicate(timeout=400)
    assert first.returncode == 0, printed
