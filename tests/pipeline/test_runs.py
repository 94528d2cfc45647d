"""Status and manifest: what a stage leaves behind, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.errors import ChainError
from alignment.pipeline import runs
from alignment.pipeline.plan import StageSpec


@pytest.fixture
def stage(load: Callable, look: Callable, finish: Callable) -> Path:
    """The folder of a finished stage."""
    spec: StageSpec = look(load(), "sft").spec
    finish(spec)
    return spec.output


def test_status_round_trip(tmp_path: Path) -> None:
    assert runs.read_status(tmp_path) is None
    runs.write_status(tmp_path, attempt="a", state="preempted", code=85, message="saved", step=3, steps=9)
    status = runs.read_status(tmp_path)
    assert status is not None
    assert {key: status[key] for key in ("attempt", "state", "code", "message", "step", "steps", "rank")} == {
        "attempt": "a", "state": "preempted", "code": 85, "message": "saved", "step": 3, "steps": 9, "rank": 0,
    }  # fmt: skip
    assert {"host", "pid", "time", "schema"} <= status.keys()


def test_attempts_have_names_of_their_own() -> None:
    assert len({runs.new_attempt() for _ in range(100)}) == 100


def test_a_whole_stage_verifies(stage: Path) -> None:
    manifest = runs.verify_parent(stage, deep=True)
    assert manifest["kind"] == "causal-lm"
    assert manifest["weights_sha256"] == runs.weights_sha256(manifest["files"])


def test_weights_have_one_identity_wherever_they_lie() -> None:
    table = {"model.safetensors": {"size": 1, "sha256": "a"}, "config.json": {"size": 1, "sha256": "b"}}
    assert runs.weights_sha256(table) == runs.weights_sha256(table | {"README.md": {"size": 1, "sha256": "c"}})
    assert runs.weights_sha256(table) != runs.weights_sha256({"model.safetensors": {"size": 1, "sha256": "d"}})


def edit(stage: Path, **changes: object) -> None:
    path = stage / runs.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "absent": (lambda s: (s / "manifest.json").unlink(), "not finished (no manifest.json); run this stage first"),
    "half": (lambda s: (s / "manifest.json").write_text('{"schema": 1, "st'), "manifest.json: damaged: not JSON"),
    "schema": (lambda s: edit(s, schema=7), "manifest.json: schema 7: this version of alignment reads schema 1"),
    "fields": (lambda s: (s / "manifest.json").write_text('{"schema": 1}'), "damaged: without stage, kind"),
    "fingerprint": (lambda s: edit(s, fingerprint={"seed": 1}), "its fingerprint does not match its hash"),
    "table": (lambda s: edit(s, files={"config.json": {}}), "its table of files is incomplete"),
    "missing": (lambda s: (s / "model.safetensors").unlink(), "model.safetensors: missing"),
    "truncated": (lambda s: (s / "model.safetensors").write_bytes(b"t"), "model.safetensors: 1 bytes, recorded were 7"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_in_one_line(stage: Path, kind: str) -> None:
    damage, says = DAMAGE[kind]
    damage(stage)
    with pytest.raises(ChainError) as caught:
        runs.verify_parent(stage)
    assert says in str(caught.value)
    assert str(stage) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_flipped_byte_is_found_by_a_deep_look(stage: Path) -> None:
    (stage / "model.safetensors").write_bytes(b"trainee")
    runs.verify_parent(stage)
    with pytest.raises(ChainError, match="content differs"):
        runs.verify_parent(stage, deep=True)
