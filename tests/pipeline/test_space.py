"""Room on the disk is compared with the plan before a stage starts; a full disk is told in one line."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from alignment.errors import StorageError
from alignment.pipeline import launch, space
from alignment.pipeline.memory.source import Machine
from alignment.recipe.schema import Recipe

MIB = 2**20
CPU = Machine(1, cuda=False)
LLAMA = (
    '{"model_type": "llama", "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, '
    '"num_attention_heads": 8, "vocab_size": 8192, "tie_word_embeddings": true}'
)


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture
def with_room(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Make the disk have so many bytes free."""

    def leave(free: float) -> None:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, round(free)))

    return leave


def parameters() -> int:
    """Of LLAMA: embedding, per layer four square projections, three of the gated block, two norms; one norm behind."""
    layer = 4 * 512 * 512 + 3 * 512 * 1024 + 2 * 512
    return 8192 * 512 + 4 * layer + 512


def test_a_checkpoint_is_weights_and_moments() -> None:
    assert space.checkpoint_bytes(10**9, 10**9) == pytest.approx(12e9, rel=0.01)
    assert space.checkpoint_bytes(10**9, 10**9, engine=True) == pytest.approx(18e9, rel=0.01)
    assert space.checkpoint_bytes(4 * 10**7, 4 * 10**7) == pytest.approx(48e7, rel=0.04)


def test_a_stage_without_room_is_refused_before_it_starts(
    workplace: Path, load: Callable[..., Recipe], with_room: Callable[[float], None]
) -> None:
    (workplace / "base" / "config.json").write_text(LLAMA)
    recipe, folder = load("checkpoints.keep=2"), workplace / "runs"
    folder.mkdir()
    each = 12 * parameters() + 16 * MIB
    needed = 3 * each + 4 * parameters()
    with_room(needed + MIB)
    space.refuse_if_full(recipe, "sft", folder, CPU)
    with_room(needed - MIB)
    with pytest.raises(StorageError) as caught:
        space.refuse_if_full(recipe, "sft", folder, CPU)
    assert caught.value.code == 4
    assert f"stages.sft: {folder} has " in str(caught.value)
    assert f"3 checkpoints of {each / MIB:.0f} MB (checkpoints.keep 2" in str(caught.value)
    for step in (2, 4):  # a resumed stage writes over what is there
        (folder / "sft" / f"checkpoint-{step}").mkdir(parents=True)
    with_room(each + 4 * parameters() + MIB)
    space.refuse_if_full(recipe, "sft", folder, CPU)


def test_what_is_not_known_is_not_refused(
    workplace: Path, load: Callable[..., Recipe], with_room: Callable[[float], None]
) -> None:
    (workplace / "base" / "config.json").write_text('{"model_type": "of another world"}')
    with_room(0)
    space.refuse_if_full(load(), "sft", workplace, CPU)
    space.refuse_if_full(load(), "evaluate", workplace, CPU)


def test_a_worker_without_a_word_on_a_full_disk_is_code_4(
    workplace: Path, look: Callable, load: Callable, start: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk takes no status.json: the launcher finds out by trying."""
    spec = look(load(), "sft").spec
    start(spec)
    assert launch.outcome(spec)[0] == 1
    real = open

    def full(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if "w" in mode:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", full)
    code, message = launch.outcome(spec)
    assert code == 4
    assert message.startswith(f"{spec.output}: No space left on device: ")
    assert " are free; free some space" in message


def test_the_probe_leaves_nothing(tmp_path: Path) -> None:
    assert space.refusal(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    assert space.refusal(tmp_path / "nothing there") is None
