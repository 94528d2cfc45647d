"""One rollout: what the policy said to a batch of prompts, and what everyone thought of it.

Shapes: B episodes of one process, T the longest completion. Rows are in the order of the prompts; token tensors are
padded on the right, where `mask` is false. The stop token belongs to a completion; nothing is recognised by the pad id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

Ids = Sequence[int]


@dataclass(frozen=True)
class Episodes:
    """Prompts and the completions that were drawn for them."""

    rows: Sequence[dict[str, Any]]  # of the prompts' table
    prompts: Sequence[Ids]
    completions: Sequence[Ids]  # at least one token each, up to and with the stop token
    texts: Sequence[str]  # of the completions, without special tokens
    finished: Sequence[bool]  # ended with a stop token

    def __len__(self) -> int:
        return len(self.prompts)

    def lengths(self) -> list[int]:
        """Tokens of each prompt with its completion."""
        return [len(prompt) + len(reply) for prompt, reply in zip(self.prompts, self.completions, strict=True)]

    def tensors(self, indices: Sequence[int], pad: int, device: torch.device) -> tuple[Tensor, Tensor, int]:
        """Input ids and attention mask (b, S) of some episodes, and T: the last T columns are their completions.

        Prompts are padded on the left, completions on the right.
        """
        before = max(len(self.prompts[index]) for index in indices)
        after = max(len(self.completions[index]) for index in indices)
        ids, mask = [], []
        for index in indices:
            prompt, reply = self.prompts[index], self.completions[index]
            left, right = before - len(prompt), after - len(reply)
            ids.append([pad] * left + [*prompt, *reply] + [pad] * right)
            mask.append([0] * left + [1] * (len(prompt) + len(reply)) + [0] * right)
        return torch.tensor(ids, device=device), torch.tensor(mask, device=device), after


@dataclass(frozen=True)
class Scores:
    """The reward of each episode, (B,) float64, and what each source gave, NaN where it does not apply."""

    combined: np.ndarray[Any, np.dtype[np.float64]]
    raw: Mapping[str, np.ndarray[Any, np.dtype[np.float64]]]


@dataclass(frozen=True)
class Rollout:
    """Episodes with all that the update needs; nothing in it changes while the update runs."""

    episodes: Episodes
    mask: Tensor  # (B, T) bool: a drawn token stands here
    log_probs: Tensor  # (B, T) of the policy that drew it
    reference: Tensor  # (B, T) log-probabilities of the reference
    values: Tensor  # (B, T) of the state before each token
    entropy: Tensor  # (B, T) nats
    scores: Tensor  # (B,) combined and normalised, penalties included
    kl: Tensor  # (B, T) estimate of KL(policy || reference)
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)
    raw_advantages: Tensor  # (B, T) before whitening


def completion_mask(completions: Sequence[Ids], device: torch.device) -> Tensor:
    """True where a completion has a token: (B, T)."""
    lengths = torch.tensor([len(ids) for ids in completions], device=device)
    return torch.arange(int(lengths.max()), device=device)[None] < lengths[:, None]


def chunks(lengths: Sequence[int], size: int, indices: Sequence[int] | None = None) -> list[list[int]]:
    """Indices in groups of at most `size` and of like lengths, the longest first."""
    order = sorted(range(len(lengths)) if indices is None else indices, key=lambda index: (-lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]
