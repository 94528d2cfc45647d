"""What the processes of a launch share: sums, gathered values, meetings, draws that do not depend on each other."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from alignment.errors import UserError


def total(value: Tensor) -> Tensor:
    """The sum of a tensor over all ranks; the tensor itself is not changed."""
    if not _several():
        return value
    value = value.clone()
    torch.distributed.all_reduce(value)
    return value


def largest(value: Tensor) -> Tensor:
    """The largest over all ranks, number by number."""
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


PATIENCE = 6 * 3600.0  # hashing, writing and reading back the largest models takes hours on slow storage, never days


def meeting(name: str, limit: float = PATIENCE) -> Callable[[], None]:
    """A barrier for work that one rank does alone (sealing a checkpoint, publishing): all ranks call it.

    A collective would time out while that rank works (NCCL after ten minutes); this one is kept in the key-value store
    through which the launch met, where nothing runs on a device and nothing times out before `limit` seconds.

    Args:
        name: of its own in a launch; the function that is returned may be called again and again.

    Raises:
        UserError: the others did not come in time.
    """
    numbers = itertools.count()

    def meet() -> None:
        if not _several():
            return
        store, key = torch.distributed.distributed_c10d._get_default_store(), f"{name}/{next(numbers)}"
        ranks, end = torch.distributed.get_world_size(), time.monotonic() + limit
        store.add(key, 1)
        _await(lambda: store.add(key, 0) >= ranks, end)
        # Without torchrun rank 0 keeps the store: it leaves when all others have seen that everyone is there.
        if torch.distributed.get_rank() == 0:
            _await(lambda: store.add(f"{key}/left", 0) >= ranks - 1, end)
        else:
            store.add(f"{key}/left", 1)

    return meet


def _await(reached: Callable[[], bool], end: float) -> None:
    pause = 0.005
    while not reached():
        if time.monotonic() > end:
            raise UserError("the other processes did not finish their part in time; the message of one says why")
        time.sleep(pause)
        pause = min(2 * pause, 1.0)


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
