"""A model out of a checkpoint: `alignment export --from-checkpoint runs/x/dpo/checkpoint-500 OUT`.

For a run that was killed and will not go on. A checkpoint of plain training holds a model as it is. One that DeepSpeed
wrote holds it too, rounded to 16 bits where it computes in those, and in float32 in the shares of its ranks: those are
put together. They are pickles, which run code when they are read, so a checkpoint is read only when it is sealed, its
contents are what was sealed, and its files are the user's own.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from alignment.errors import CheckpointError, ModelError
from alignment.models.load import is_adapter, load_policy, load_scorer
from alignment.pipeline.files import storage
from alignment.pipeline.seals import seal_fault
from alignment.serving.export import export
from alignment.serving.kind import kind_of

BESIDE = ("critic.", "value_head.")  # what PPO trains beside its policy


def export_checkpoint(checkpoint: Path, out: Path) -> Path:
    """Write the model that a sealed checkpoint holds to `out` as one whole model; returns `out`.

    Raises:
        CheckpointError: not a checkpoint of ours, or damaged.
        ModelError: the shares are not this model's; or as `export`.
    """
    require_ours(checkpoint)
    engine = sorted(path.name for path in checkpoint.glob("global_step*") if path.is_dir())
    if not engine:
        return export(checkpoint, out)
    beside = out.with_name(f".{out.name}.{os.getpid()}.checkpoint")
    try:
        with storage(out):
            beside.mkdir(parents=True)
        _consolidate(checkpoint, engine[-1], beside)
        return export(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def require_ours(checkpoint: Path) -> None:
    """Raise CheckpointError unless a checkpoint is sealed, whole to the byte, and written by this user."""
    if not checkpoint.is_dir():
        raise CheckpointError(f"{checkpoint}: no such folder; name a checkpoint, such as runs/x/dpo/checkpoint-500")
    reason = seal_fault(checkpoint)
    if reason is not None:
        raise CheckpointError(f"{checkpoint}: {reason}; only whole checkpoints that a run has sealed are read")
    for path in (checkpoint, *checkpoint.rglob("*")):
        if path.lstat().st_uid != os.getuid():
            raise CheckpointError(
                f"{path}: belongs to another user; reading a sharded checkpoint runs what is in it, so only your own "
                "are read. Let its owner export it"
            )


def _consolidate(checkpoint: Path, tag: str, folder: Path) -> None:
    """The checkpoint's model with the float32 weights of the shares, as a plain folder."""
    load = load_policy if kind_of(checkpoint) == "causal-lm" else load_scorer
    model, tokenizer = load(checkpoint, dtype=torch.float32)
    shares = _shares(checkpoint, tag)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    foreign = sorted(shares.keys() - parameters.keys())
    wanted = {name for name in parameters if not is_adapter(checkpoint) or _adapted(name)}
    absent = sorted(wanted - shares.keys() - _tied(model))
    if foreign or absent:
        name = (foreign or absent)[0]
        raise ModelError(f"{checkpoint}/{tag}: its shares are not this model's weights: {name}")
    with torch.no_grad():
        for name, tensor in shares.items():
            if parameters[name].shape != tensor.shape:
                raise ModelError(f"{checkpoint}/{tag}: {name} has the shape {tuple(tensor.shape)} in the shares")
            parameters[name].copy_(tensor)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{checkpoint}: {len(shares)} trained tensors put together from the shares in {tag}, in float32")


def _shares(checkpoint: Path, tag: str) -> dict[str, Tensor]:
    """The trained tensors in float32, by the names of the model that is published."""
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):  # it tells of every file
        state: dict[str, Any] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint), tag, exclude_frozen_parameters=True
        )
    return {name.removeprefix("policy."): tensor for name, tensor in state.items() if not _beside(name)}


def _beside(name: str) -> bool:
    return name.startswith(BESIDE) or ".critic." in name


def _adapted(name: str) -> bool:
    """Whether a parameter is trained with an adapter."""
    return ".default." in name


def _tied(model: Any) -> set[str]:
    return set(getattr(model, "all_tied_weights_keys", None) or {})
