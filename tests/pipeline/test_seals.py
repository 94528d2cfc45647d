"""A checkpoint counts when it is sealed and whole; planted damage is named and passed over."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.errors import CheckpointError
from alignment.pipeline.seals import checkpoints, latest_sealed, remove, seal, seal_fault


def checkpoint(stage: Path, step: int, *, sealed: bool = True, fingerprint: str = "f" * 64) -> Path:
    folder = stage / f"checkpoint-{step}"
    (folder / "inner").mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights" * 100)
    (folder / "inner" / "optimizer.pt").write_bytes(b"moments" * 100)
    if sealed:
        seal(folder, step=step, world_size=2, fingerprint_sha256=fingerprint)
    return folder


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda f: (f / "model.safetensors").write_bytes(b"we"), "model.safetensors: 2 bytes, recorded were"),
    "flipped": (lambda f: flip(f / "model.safetensors"), "model.safetensors: content differs"),
    "deep": (lambda f: flip(f / "inner" / "optimizer.pt"), "inner/optimizer.pt: content differs"),
    "missing": (lambda f: (f / "inner" / "optimizer.pt").unlink(), "inner/optimizer.pt: missing"),
    "schema": (lambda f: (f / "SEALED.json").write_text('{"schema": 2}'), "SEALED.json: schema 2"),
    "half a seal": (lambda f: (f / "SEALED.json").write_text('{"schema": 1, "fi'), "SEALED.json: damaged: not JSON"),
    "fields": (lambda f: (f / "SEALED.json").write_text('{"schema": 1}'), "SEALED.json: damaged: fields"),
}


def test_the_seal_says_what_is_there(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    record = json.loads((folder / "SEALED.json").read_text())
    assert (record["schema"], record["step"], record["world_size"]) == (1, 4, 2)
    assert record["files"]["model.safetensors"]["size"] == 700
    assert sorted(record["files"]) == ["inner/optimizer.pt", "model.safetensors"]
    assert seal_fault(folder) is None


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_to_the_newest_falls_back_to_the_one_before(tmp_path: Path, kind: str) -> None:
    damage, says = DAMAGE[kind]
    good, newest = checkpoint(tmp_path, 4), checkpoint(tmp_path, 12)
    damage(newest)
    found, passed_over = latest_sealed(tmp_path, "f" * 64)
    assert found == good
    assert len(passed_over) == 1
    assert passed_over[0].startswith(f"checkpoint-12: {says}")


@pytest.mark.parametrize("kind", DAMAGE)
def test_when_all_are_damaged_the_stage_stops(tmp_path: Path, kind: str) -> None:
    damage, says = DAMAGE[kind]
    damage(checkpoint(tmp_path, 4))
    checkpoint(tmp_path, 8, sealed=False)
    with pytest.raises(CheckpointError) as caught:
        latest_sealed(tmp_path, "f" * 64)
    assert caught.value.code == 3
    assert f"checkpoint-8: not sealed (its writer was stopped); checkpoint-4: {says}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_was_never_sealed_is_absent(tmp_path: Path) -> None:
    assert latest_sealed(tmp_path, "f" * 64) == (None, [])
    checkpoint(tmp_path, 4, sealed=False)
    (tmp_path / "checkpoint-9").mkdir()
    (tmp_path / "checkpoint-12.bak").mkdir()
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-4"]
    found, passed_over = latest_sealed(tmp_path, "f" * 64)
    assert found is None
    assert len(passed_over) == 2


def test_a_checkpoint_of_another_recipe_is_not_loaded(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4, fingerprint="a" * 64)
    with pytest.raises(CheckpointError, match="made by another recipe"):
        latest_sealed(tmp_path, "f" * 64)
    good = checkpoint(tmp_path, 2)
    assert latest_sealed(tmp_path, "f" * 64)[0] == good


def test_a_shallow_look_compares_sizes_only(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    flip(folder / "model.safetensors")
    assert seal_fault(folder, deep=False) is None
    assert seal_fault(folder) is not None


def test_everything_is_on_the_disk_before_the_seal_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut allows: every file, then its folders, then the seal, its rename, and the folder once more."""
    done: list[str] = []
    fsync, replace = os.fsync, os.replace

    def synced(descriptor: int) -> None:
        done.append(f"fsync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).relative_to(tmp_path)}")
        fsync(descriptor)

    def renamed(source: Path, target: Path) -> None:
        done.append(f"rename {Path(target).relative_to(tmp_path)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    checkpoint(tmp_path, 4)
    temporary = f".SEALED.json.{os.getpid()}.tmp"
    assert done == [
        "fsync checkpoint-4/inner/optimizer.pt", "fsync checkpoint-4/model.safetensors", "fsync checkpoint-4/inner",
        "fsync checkpoint-4", f"fsync checkpoint-4/{temporary}", "rename checkpoint-4/SEALED.json",
        "fsync checkpoint-4",
    ]  # fmt: skip


@pytest.mark.parametrize("after", ["seal", "some files"])
def test_a_removal_that_is_killed_leaves_nothing_half_good(
    after: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good, old = checkpoint(tmp_path, 8), checkpoint(tmp_path, 4)

    class Killed(BaseException):
        pass

    def tree(folder: Path) -> None:
        if after == "some files":
            (folder / "model.safetensors").unlink()
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", tree)
        with pytest.raises(Killed):
            remove(old)
    assert seal_fault(old) == "not sealed (its writer was stopped)"
    assert latest_sealed(tmp_path, "f" * 64)[0] == good
    remove(old)
    assert checkpoints(tmp_path) == [good]
