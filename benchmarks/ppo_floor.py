"""The least time that one PPO update can take on this machine: its arithmetic at the rate of matrix products, its
bytes at the rate of memory, both measured here and now.

Counted are the real tokens, not padding; logits only where a token was drawn; a backward pass as two forward ones; for
each step of generation one read of the policy's weights. Everything else (norms, softmax, the reward's text, Python)
counts nothing: that is what stands between the floor and the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Counts:
    """Tokens of one update."""

    episodes: int
    prompts: float  # tokens of all prompts
    drawn: float  # tokens of all completions
    steps: float  # tokens of the longest completion
    passes: int  # over the episodes, each with forward and backward
    optimizer_steps: int


@dataclass(frozen=True)
class Rates:
    """What the machine does per second."""

    flops: float
    bytes: float


def measured_rates(config: Any, dtype: torch.dtype, device: str) -> Rates:
    """Products of the model's own shapes with 512 rows; sums over 256 MB."""
    rows = torch.randn(512, config.hidden_size, dtype=dtype, device=device)
    matrix = torch.randn(config.hidden_size, config.intermediate_size, dtype=dtype, device=device)
    block = torch.ones(64 * 2**20, device=device)
    return Rates(
        flops=2 * rows.numel() * config.intermediate_size / seconds(lambda: rows @ matrix, device, calls=50),
        bytes=block.numel() * 4 / seconds(block.sum, device, calls=3),
    )


def seconds(function: Callable[[], Any], device: str, *, calls: int) -> float:
    """Median of five measurements of one call."""
    found = []
    for _ in range(6):
        started = time.perf_counter()
        for _ in range(calls):
            function()
        if device == "cuda":
            torch.cuda.synchronize()
        found.append((time.perf_counter() - started) / calls)
    return statistics.median(found[1:])


def floor(config: Any, counts: Counts, rates: Rates, *, one_trunk: bool, bytes_per_weight: int = 4) -> dict[str, float]:
    """Seconds of generating, scoring and updating (Llama's shapes, as many key as query heads)."""
    layers = config.num_hidden_layers * (4 * config.hidden_size**2 + 3 * config.hidden_size * config.intermediate_size)
    head = config.hidden_size * config.vocab_size
    tokens = counts.prompts + counts.drawn
    length = tokens / counts.episodes
    attention = 2 * tokens * length * config.hidden_size * config.num_hidden_layers  # causal: half of the square
    trunk, logits = 2 * tokens * layers + attention, 2 * counts.drawn * head
    policy_and_critic = trunk * (1 if one_trunk else 2) + logits
    weights = layers + head
    trained = weights + config.vocab_size * config.hidden_size + (0 if one_trunk else weights)
    step = 9 * 4 * trained  # gradients written, read for the norm; AdamW reads four numbers and writes three
    drawing = 2 * counts.drawn * weights / rates.flops
    reading = counts.steps * weights * bytes_per_weight / rates.bytes
    return {
        "generate": (2 * counts.prompts * layers) / rates.flops + max(drawing, reading),
        "score": (policy_and_critic + trunk + logits + trunk) / rates.flops,
        "update": counts.passes * 3 * policy_and_critic / rates.flops + counts.optimizer_steps * step / rates.bytes,
    }
