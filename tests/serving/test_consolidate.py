"""A model out of a checkpoint: the float32 weights of the shares, and nothing read that we did not write.

Shares as DeepSpeed really leaves them are exported in `tests/sharding`; here they are made by hand, with known numbers.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from alignment.errors import CheckpointError, ModelError
from alignment.models.load import load_policy
from alignment.pipeline import runs
from alignment.serving.consolidate import export_checkpoint

SHARES = 2


def write_shares(checkpoint: Path, weights: dict[str, torch.Tensor]) -> None:
    """What ZeRO-2 leaves of these trained weights on two ranks: one flat vector, cut in two."""
    folder = checkpoint / "global_step5"
    folder.mkdir()
    shapes: list[Any] = [{name: tensor.shape for name, tensor in weights.items()}]
    torch.save(
        {"buffer_names": [], "param_shapes": shapes, "module": {}, "shared_params": {}, "ds_version": "0.19.8"},
        folder / "mp_rank_00_model_states.pt",
    )
    flat = torch.cat([tensor.flatten() for tensor in weights.values()])
    flat = torch.nn.functional.pad(flat, (0, -len(flat) % (2 * SHARES)))
    for rank, part in enumerate(flat.chunk(SHARES)):
        state = {"zero_stage": 2, "partition_count": SHARES, "single_partition_of_fp32_groups": [part.clone()]}
        torch.save({"optimizer_state_dict": state}, folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")


@pytest.fixture
def checkpoint(tiny_policy: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a sealed checkpoint: a model rounded to bfloat16, and shares with other numbers."""

    def make(change: Callable[[dict[str, torch.Tensor]], None] = lambda weights: None, *, prefix: str = "") -> Path:
        folder = tmp_path / "checkpoint-5"
        shutil.copytree(tiny_policy, folder)
        model, _ = load_policy(tiny_policy)
        torch.manual_seed(1)
        weights = {prefix + name: torch.randn_like(tensor) for name, tensor in model.named_parameters()}
        change(weights)
        write_shares(folder, weights)
        torch.save(weights, tmp_path / "wanted.pt")
        runs.seal(folder, step=5, world_size=SHARES, fingerprint_sha256="x")
        return folder

    return make


def wanted(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(folder / "wanted.pt", weights_only=True)
    return found


def test_the_weights_are_those_of_the_shares(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = export_checkpoint(checkpoint(), tmp_path / "out")
    written = load_file(out / "model.safetensors")
    for name, tensor in wanted(tmp_path).items():
        assert torch.equal(written[name], tensor), name
    assert (out / "tokenizer.json").exists()
    assert "put together from the shares in global_step5" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-5", "out", "wanted.pt"]


def test_ppo_trains_a_critic_beside_its_policy(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def add_critic(weights: dict[str, torch.Tensor]) -> None:
        weights["critic.score.weight"] = torch.ones(1, 32)

    out = export_checkpoint(checkpoint(add_critic, prefix="policy."), tmp_path / "out")
    written = load_file(out / "model.safetensors")
    for name, tensor in wanted(tmp_path).items():
        assert name.startswith("critic.") or torch.equal(written[name.removeprefix("policy.")], tensor), name
    assert not any("critic" in name for name in written)


def test_a_checkpoint_without_shares_is_exported_as_it_is(tiny_policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-5"
    shutil.copytree(tiny_policy, folder)
    runs.seal(folder, step=5, world_size=2, fingerprint_sha256="x")
    written = load_file(export_checkpoint(folder, tmp_path / "out") / "model.safetensors")
    for name, tensor in load_file(tiny_policy / "model.safetensors").items():
        assert torch.equal(written[name], tensor), name


def test_shares_of_another_model_are_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    def lose_one(weights: dict[str, torch.Tensor]) -> None:
        del weights["model.norm.weight"]

    with pytest.raises(ModelError, match=r"global_step5: its shares are not this model's weights: model\.norm\.weight"):
        export_checkpoint(checkpoint(lose_one), tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Payload:
    """A pickle that makes a file when it is read."""

    def __init__(self, canary: Path):
        self.canary = canary

    def __reduce__(self) -> Any:
        return open, (str(self.canary), "w")


@pytest.mark.parametrize("sealed", [True, False])
def test_a_foreign_pickle_is_never_read(sealed: bool, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder, canary = checkpoint(), tmp_path / "canary"
    torch.save(Payload(canary), folder / "global_step5" / "zero_pp_rank_1_mp_rank_00_optim_states.pt")
    if not sealed:
        (folder / "SEALED.json").unlink()
    with pytest.raises(CheckpointError, match="only whole checkpoints that a run has sealed are read"):
        export_checkpoint(folder, tmp_path / "out")
    assert not canary.exists()
    runs.seal(folder, step=5, world_size=2, fingerprint_sha256="x")
    with pytest.raises(TypeError):
        export_checkpoint(folder, tmp_path / "out")
    assert canary.exists()  # so the canary works, and the seal is what kept it from being read


def test_a_checkpoint_of_another_user_is_not_read(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint()
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(CheckpointError, match="belongs to another user"):
        export_checkpoint(folder, tmp_path / "out")


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        export_checkpoint(tmp_path / "gone", tmp_path / "out")


def test_the_command(checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from alignment.cli import main

    out = tmp_path / "out"
    assert main(["export", "--from-checkpoint", str(checkpoint()), str(out)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(out)
    assert main(["export", str(out)]) == 2
    assert "one of them" in capsys.readouterr().err
