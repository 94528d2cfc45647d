"""One rollout: what the policy said to a batch of prompts, and what everyone thought of it.

Shapes: B episodes of one process, T the longest completion. Rows are in the order of the prompts; token tensors are
padded on the right, where `mask` is false. The stop token belongs to a completion; nothing is recognised by the pad id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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

    def batch(self, indices: Sequence[int], pad: int, device: torch.device) -> Batch:
        """Some episodes side by side."""
        chosen = [(self.prompts[index], self.completions[index]) for index in indices]
        width = max(len(prompt) + len(reply) for prompt, reply in chosen)
        ids = [[*prompt, *reply] + [pad] * (width - len(prompt) - len(reply)) for prompt, reply in chosen]
        starts = torch.tensor([len(prompt) - 1 for prompt, _ in chosen], device=device)
        mask = completion_mask([reply for _, reply in chosen], device)
        return Batch(torch.tensor(ids, device=device), starts, mask)


class Batch(NamedTuple):
    """Some episodes as a pass reads them: b rows of prompt and completion, padded on the right.

    There is no attention mask: in a causal model nothing reaches back from the padding, and nobody reads what is said
    of it. So attention takes its fastest form, and rows of like lengths carry next to no padding.
    """

    ids: Tensor  # (b, S)
    starts: Tensor  # (b,) where the last token of the prompt stands: the state before the first drawn token
    mask: Tensor  # (b, T) bool: a drawn token stands here

    def drawn(self) -> tuple[Tensor, Tensor]:
        """Row and column of the states (n,) before each of the n drawn tokens, row by row."""
        rows, steps = self.mask.nonzero(as_tuple=True)
        return rows, self.starts[rows] + steps

    def states(self) -> Tensor:
        """Columns (b, T + 1) of the states before each token, and after the last; clamped where a row has ended."""
        steps = torch.arange(self.mask.shape[1] + 1, device=self.ids.device)
        return (self.starts[:, None] + steps).clamp(max=self.ids.shape[1] - 1)


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

    def parts(self) -> dict[str, Tensor]:
        """What the update learns from, by the words of a message; each after what it follows from."""
        return {
            "log-probabilities": self.log_probs, "the reference's log-probabilities": self.reference,
            "values": self.values, "scores": self.scores, "returns": self.returns, "advantages": self.advantages,
        }  # fmt: skip


def completion_mask(completions: Sequence[Ids], device: torch.device) -> Tensor:
    """True where a completion has a token: (B, T)."""
    lengths = torch.tensor([len(ids) for ids in completions], device=device)
    return torch.arange(int(lengths.max()), device=device)[None] < lengths[:, None]


def chunks(lengths: Sequence[int], size: int, indices: Sequence[int] | None = None) -> list[list[int]]:
    """Indices in groups of at most `size` and of like lengths, the longest first."""
    order = sorted(range(len(lengths)) if indices is None else indices, key=lambda index: (-lengths[index], index))
    return [order[start : start + size] for start in range(0, len(order), size)]
