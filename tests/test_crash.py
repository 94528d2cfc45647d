"""A sample of the crash test (`make crash-test`), on every change with other kills."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = 20
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="the faults are compiled with cc")


def crash_test(root: Path, folder: Path, *arguments: str) -> tuple[int, list[str]]:
    """Run the crash test; its exit code and what it printed."""
    done = subprocess.run(
        [sys.executable, "tests/crash", "--folder", str(folder), *arguments], cwd=root, env=dict(os.environ),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=900,
    )  # fmt: skip
    return done.returncode, done.stdout.splitlines()


@needs_compiler
def test_twenty_kills_lose_nothing_and_change_nothing(root: Path, tmp_path: Path) -> None:
    code, printed = crash_test(root, tmp_path, "--sample", "--kills", str(KILLS))
    assert code == 0, "\n".join(printed)
    numbers = json.loads(printed[-1])
    assert numbers["kills"] >= KILLS
    assert {key: numbers[key] for key in ("lost", "different", "parents", "wrong")} == {
        "lost": 0, "different": 0, "parents": 0, "wrong": 0,
    }  # fmt: skip


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(("plant", "says"), [("random-states", "model.safetensors differs"), ("log", "log.jsonl: ")])
def test_a_resume_that_is_not_exact_is_seen(plant: str, says: str, root: Path, tmp_path: Path) -> None:
    """The test of the test: with a fault in resuming the same kills end in other runs, and each is told."""
    code, printed = crash_test(root, tmp_path, "--sample", "--kills", "2", "--seed", "1", "--plant", plant)
    assert code == 1
    assert any(line.startswith("different: ") and says in line for line in printed), "\n".join(printed)
