"""What the processes of a launch share: sums, gathered values, draws that do not depend on each other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; the tensor itself is not changed."""
    if not _several():
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value


def largest(value: Tensor) -> Tensor:
    """The largest of a scalar tensor over all ranks."""
    if not _several():
        return value
    value = value.clone()
    torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return value


def gather(values: np.ndarray[Any, np.dtype[np.float64]]) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The values (B,) of all ranks, in the order of the ranks."""
    if not _several():
        return values
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, values)
    return np.concatenate(parts)


def _several() -> bool:
    return torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1


@contextmanager
def seeded(*numbers: int, device: torch.device) -> Iterator[None]:
    """Draws that depend on nothing but these numbers; the streams from outside go on as if nothing had been drawn."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        digest = np.random.SeedSequence(numbers).generate_state(1)
        torch.manual_seed(int(digest[0]))
        yield


def match_engine(accelerator: Accelerator, *, rows: int, micro_batch: int) -> None:
    """Tell DeepSpeed how many backward passes make a step: its CPU offload accumulates by that number.

    Args:
        rows: of one optimizer step and process.
        micro_batch: of one backward pass.
    """
    plugin = accelerator.state.deepspeed_plugin
    if plugin is None:
        return
    passes = math.ceil(rows / micro_batch)
    plugin.deepspeed_config["gradient_accumulation_steps"] = passes
    plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = micro_batch
    plugin.deepspeed_config["train_batch_size"] = micro_batch * passes * accelerator.num_processes
    accelerator.gradient_accumulation_steps = passes


def with_own_rate(optimizer: torch.optim.Optimizer, parameters: Iterator[torch.nn.Parameter], rate: float) -> None:
    """Give some of an optimizer's parameters a learning rate of their own, before it has taken a step."""
    chosen = {id(parameter) for parameter in parameters}
    for group in list(optimizer.param_groups):
        own = [parameter for parameter in group["params"] if id(parameter) in chosen]
        if own:
            group["params"] = [parameter for parameter in group["params"] if id(parameter) not in chosen]
            optimizer.add_param_group({**group, "params": own, "lr": rate})
