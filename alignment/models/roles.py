"""Several roles on one base: which LoRA adapter each block of rows of a batch passes through.

PEFT's own ways do not serve two trained adapters in one pass. `set_adapter` between two forwards freezes the first
adapter before its gradient is there; leaving `disable_adapter()` freezes all but the active one; a mixed batch
(`adapter_names`) is refused in training, goes through the adapters in the order of a set, which differs between ranks,
and is wrong in silence when activations are recomputed. `Roles` replaces the forward of each LoRA layer: rows come in
equal blocks, block i takes adapter i, and no `requires_grad` is ever touched. The blocks stay set until they are set
anew, so a layer that is recomputed in the backward pass does what it did in the forward one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor

from alignment.errors import RecipeError

POLICY = "default"  # PEFT's name for the adapter that is saved at the root of a folder


class Roles:
    """The blocks of rows of the next passes through a PEFT model, by the names of their adapters.

    Raises:
        RecipeError: a layer whose adapter is not plain LoRA on a linear layer (DoRA, embeddings, whole modules).
    """

    def __init__(self, model: PeftModel):
        self.blocks: tuple[str | None, ...] = (POLICY,)
        self.layers: list[Any] = []
        self.adopt(model)
        for name, part in model.named_modules():
            if isinstance(part, AuxiliaryTrainingWrapper):
                raise RecipeError(
                    f"peft: {name} is trained beside its adapter (modules_to_save, trainable_token_indices), and "
                    "policy and reference share one base here; leave that out, or train without `peft:`"
                )

    def adopt(self, model: PeftModel) -> None:
        """Take over the layers of a model; again after an adapter was added that has layers of its own."""
        for name, layer in model.named_modules():
            if isinstance(layer, LoraLayer):
                _require_plain(name, layer)
                if layer not in self.layers:
                    layer.forward = partial(self._forward, layer)
                    self.layers.append(layer)

    def copy(self, source: str, target: str) -> None:
        """Give one adapter the weights of another."""
        for layer in self.layers:
            for part in (layer.lora_A, layer.lora_B):
                if source in part:
                    part[target].load_state_dict(part[source].state_dict())

    def set(self, *adapters: str | None) -> None:
        """Rows come in so many equal blocks from now on; None is the base alone."""
        self.blocks = adapters

    @contextmanager
    def rows(self, *adapters: str | None) -> Iterator[None]:
        """As `set`, for a while."""
        before, self.blocks = self.blocks, adapters
        try:
            yield
        finally:
            self.blocks = before

    def _forward(self, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result: Tensor = layer.base_layer(x, *args, **kwargs)
        if not any(name in layer.lora_A for name in self.blocks):
            return result
        size = x.shape[0] // len(self.blocks)
        assert size * len(self.blocks) == x.shape[0], (x.shape, self.blocks)
        parts = []
        for number, name in enumerate(self.blocks):
            rows = slice(number * size, (number + 1) * size)
            part = result[rows]
            if name in layer.lora_A:
                down, up = layer.lora_A[name], layer.lora_B[name]
                change = up(down(x[rows].to(down.weight.dtype))) * layer.scaling[name]
                part = part + change.to(part.dtype)
            parts.append(part)
        return torch.cat(parts)


def _require_plain(name: str, layer: Any) -> None:
    if getattr(layer, "lora_variant", None) or not hasattr(layer.get_base_layer(), "weight"):
        raise RecipeError(f"peft: {name} has a variant of LoRA (DoRA, ...) that several roles cannot share; remove it")
    if len(layer.lora_embedding_A):
        raise RecipeError(f"peft.target_modules: {name} is an embedding; roles share adapters of linear layers only")
