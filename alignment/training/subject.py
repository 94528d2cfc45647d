"""What the checks of the first batch look at: a stage, its trainer as it is about to train, and two of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from transformers import Trainer

from alignment.training import probe
from alignment.training.context import Context

# Of a number's size: float32; bfloat16, sums over tokens; bfloat16, a single score.
EXACT, ROUNDED, ROUNDED_SCORE = 1e-4, 1e-2, 5e-2
FEW = 5  # names in a message


class Skip(Exception):
    """The check cannot hold for this combination; the text says why."""


@dataclass
class Subject:
    """What the checks look at: the stage, and its trainer as it is about to train."""

    ctx: Context
    trainer: Trainer
    received: set[str] = field(default_factory=set)  # trained weights that a gradient has reached
    seen_dtypes: set[torch.dtype] = field(default_factory=set)  # of their gradients
    notes: list[str] = field(default_factory=list)  # what is no fault, and worth a line
    count: int = 2

    @cached_property
    def rows(self) -> list[probe.Row]:
        """A short and a long training row; more where `count` says so."""
        return probe.probe_rows(self.trainer, self.count)

    @cached_property
    def core(self) -> Any:
        """The Transformers model."""
        return probe.core_of(self.trainer)

    @cached_property
    def tolerance(self) -> float:
        """The relative difference that rounding may make."""
        if not probe.rounded(self.trainer, self.ctx):
            return EXACT
        return ROUNDED_SCORE if self.algorithm == "reward" else ROUNDED

    @cached_property
    def alone(self) -> list[probe.Numbers]:
        """What is measured of each probe row by itself."""
        return [probe.measure(self.trainer, [row]) for row in self.rows]

    @property
    def algorithm(self) -> str:
        """`sft`, `dpo`, `kto` or `reward`: by what it is built with."""
        name = self.ctx.row.build.rpartition(":")[2]
        return "sft" if name == "pretrain" else name

    @property
    def sharded(self) -> bool:
        """ZeRO-3: a rank holds a part of each weight."""
        plugin = self.trainer.accelerator.state.deepspeed_plugin
        return plugin is not None and plugin.zero_stage == 3

    @property
    def keys(self) -> tuple[str, ...]:
        """The numbers that tell a row apart."""
        return {"sft": ("loss",), "reward": (*probe.SCORES, "loss")}.get(self.algorithm, probe.LOG_PROBS)

    def auxiliary(self) -> None:
        """Skip where the router's own loss, which looks at a whole batch, is part of the loss that is compared."""
        if self.algorithm == "sft" and getattr(self.trainer, "aux_loss_enabled", False):
            raise Skip("the router's auxiliary loss looks at the whole batch")

    def differ(self, one: probe.Numbers, other: probe.Numbers, keys: tuple[str, ...] | None = None) -> Iterator[str]:
        """The numbers of two measurements that are not the same."""
        for key in keys or self.keys:
            if key in one and key in other:
                size = max(abs(one[key]), abs(other[key]), 1.0)
                if not abs(one[key] - other[key]) <= self.tolerance * size:
                    yield f"{key} {one[key]:.5g} against {other[key]:.5g}"


def names(found: list[str]) -> str:
    """A few names, and how many more there are."""
    return ", ".join(found[:FEW]) + (f" and {len(found) - FEW} more" if len(found) > FEW else "")


def dtype_name(dtype: Any) -> str:
    """`bfloat16`."""
    return str(dtype).removeprefix("torch.")
