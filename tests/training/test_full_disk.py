"""A file system that is really full: a small tmpfs, on which a checkpoint does not fit any more.

Needs the right to mount one; without it (an ordinary user) the tests say that they were left out. The many places at
which a write can fail are `make crash-test`'s, by faults injected at system calls.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.errors import ExitCode
from alignment.pipeline import runs, seals
from alignment.training import trainers

Run = Callable[..., Path]
Recipe = Callable[..., dict[str, Any]]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """The root of a file system of 32 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        pytest.skip("no `mount` here")
    if done.returncode != 0:
        pytest.skip(f"no right to mount a tmpfs: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], timeout=30, check=True)


def fill(disk: Path, *, but: int) -> None:
    """Leave so many bytes free."""
    found = os.statvfs(disk)
    with (disk / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - but)


@pytest.mark.parametrize("free", [0, 64, 256], ids=lambda kilobytes: f"{kilobytes}-kB-left")
def test_a_checkpoint_that_does_not_fit_ends_in_one_line_and_the_run_goes_on_when_there_is_room(
    free: int, disk: Path, tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Nothing, a few small files, or the weights and not the optimizer get onto the disk."""
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base")})
    (tmp_path / "whole").mkdir()
    whole = run_recipe(recipe, tmp_path / "whole") / "sft"
    save = trainers.SFT._save_checkpoint

    def crowded(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step == 4:
            fill(disk, but=free * 1024)
        save(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainers.SFT, "_save_checkpoint", crowded)
        stage = run_recipe(recipe, disk, expect=ExitCode.STORAGE) / "sft"
    said = capsys.readouterr()
    assert "Traceback" not in said.out + said.err
    lines = [line for line in said.err.splitlines() if line.startswith("alignment: stage sft: ")]
    assert len(lines) == 1
    what = "No space left on device|a file could not be written"  # torch's archives lose the reason
    assert re.search(rf"/tiny/sft: ({what}): a checkpoint takes about .+ are free; free some space", lines[0])
    sealed = [path for path in seals.checkpoints(stage) if (path / seals.SEALED).is_file()]
    assert [path.name for path in sealed] == ["checkpoint-2"]
    assert seals.seal_fault(sealed[0]) is None
    assert not (stage / runs.MANIFEST).exists()
    (disk / "ballast").unlink()
    run_recipe(recipe, disk)
    ours, theirs = load_file(stage / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
