"""What a written model must have in common with the trained one: names, shapes, and a sample of its tensors.

The forward pass that `publish.py` compares sees that something is wrong; this says what, and sees what a forward pass
on few tokens does not: an embedding without its added rows, a head that was left out, an adapter of another size. What
is remembered goes to a small file, because another process reads the saved model back (`readback.py`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

SAMPLED = 8  # tensors
PIECE = 1 << 22  # numbers
NUMBERS = 65_536  # of each, evenly spread, both ends included
PUBLISHED = "default"  # PEFT's name for the adapter that is saved; others are references, critics, reward models


@dataclass(frozen=True)
class Trained:
    """What is remembered of a trained model: shapes of what is published, norms of what was trained, some numbers."""

    shapes: dict[str, tuple[int, ...]]
    norms: dict[str, float]  # of each trained tensor
    sample: dict[str, Tensor]  # (n,) each, on the host, float32

    def save(self, path: Path) -> None:
        """Write it down."""
        about = {"shapes": json.dumps(self.shapes), "norms": json.dumps(self.norms)}
        save_file(self.sample, path, metadata=about)

    @classmethod
    def load(cls, path: Path) -> Trained:
        """Read what `save` wrote."""
        with safe_open(path, framework="pt") as file:
            about = file.metadata()
            shapes = {name: tuple(shape) for name, shape in json.loads(about["shapes"]).items()}
            sample = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, an object of safetensors
        return cls(shapes, json.loads(about["norms"]), sample)


def remember(model: nn.Module, *, keep: bool) -> Trained:
    """Look at a trained model before it is saved; every rank calls it, under ZeRO-3 each trained tensor is gathered.

    The sample holds the first and the last trained tensors (embeddings, heads) and some between.

    Args:
        keep: whether this rank will compare; the others only take part.
    """
    named = _published(model)
    trained = [name for name, parameter in named.items() if parameter.requires_grad]
    count = min(SAMPLED, len(trained))
    chosen = {trained[round(index * (len(trained) - 1) / max(1, count - 1))] for index in range(count)}
    norms: dict[str, float] = {}
    sample: dict[str, Tensor] = {}
    for name in trained:
        with _gathered(named[name]) as whole:
            if keep:
                norms[name] = _norm(whole)
                sample |= {name: _numbers(whole)} if name in chosen else {}
    shapes = {name: tuple(getattr(parameter, "ds_shape", parameter.shape)) for name, parameter in named.items()}
    return Trained(shapes, norms, sample)


def differences(read: nn.Module, trained: Trained, *, tolerance: float, frozen: bool = True) -> Iterator[str]:
    """Lines on what the model that was read back has otherwise than the trained one.

    Args:
        tolerance: relative to the norm of a tensor, and to its largest number.
        frozen: whether the frozen weights were loaded in the form in which they were trained on.
    """
    found = _published(read)
    wanted = trained.shapes if frozen else {name: trained.shapes[name] for name in trained.norms}
    for name, shape in wanted.items():
        if name not in found:
            yield f"{name} is missing"
        elif tuple(found[name].shape) != shape:
            yield f"{name} has the shape {tuple(found[name].shape)}, trained was {shape}"
        elif name in trained.norms:
            there, here = _norm(found[name]), trained.norms[name]
            if not abs(there - here) <= tolerance * here:
                yield f"{name} has the norm {there:.4g}, in memory it has {here:.4g}"
            elif name in trained.sample:
                ours, theirs = _numbers(found[name]), trained.sample[name]
                error = float((ours - theirs).abs().max()) / max(float(theirs.abs().max()), 1e-6)
                if not error <= tolerance:
                    yield f"{name} differs by {error:.2g} of its largest number (allowed {tolerance:g})"


def _published(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model, without those of adapters that are not published with it."""
    adapters: dict[str, Any] = getattr(model, "peft_config", None) or {}
    others = [f".{name}." for name in adapters if name != PUBLISHED]
    return {name: part for name, part in model.named_parameters() if not any(other in name for other in others)}


@contextmanager
def _gathered(parameter: Any) -> Iterator[Tensor]:
    """The whole tensor; one that ZeRO-3 has cut is put together first, which every rank takes part in."""
    if not hasattr(parameter, "ds_id"):
        yield parameter
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter


def _norm(tensor: Tensor) -> float:
    """Euclidean; in pieces of float64: one float32 sum over 300 million numbers is 4 % too small on a CPU."""
    pieces = tensor.detach().flatten().split(PIECE)
    return math.hypot(*(float(torch.linalg.vector_norm(piece, dtype=torch.float64)) for piece in pieces))


def _numbers(tensor: Tensor) -> Tensor:
    """Numbers of a tensor, evenly spread: (n,) on the host, float32."""
    flat = tensor.detach().flatten()
    if len(flat) > NUMBERS:
        flat = flat[torch.linspace(0, len(flat) - 1, NUMBERS, dtype=torch.float64, device=flat.device).long()]
    return flat.to(device="cpu", dtype=torch.float32, copy=True)
