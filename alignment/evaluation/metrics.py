"""The numbers of an evaluation, as pure functions on arrays.

NaN means "not applicable" (a judge of facts on small talk) and is left out of every mean and interval.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

Floats: TypeAlias = NDArray[np.float64]

RESAMPLES = 2000
LEVEL = 0.95
_BLOCK = 4_000_000  # drawn indices held at a time


@dataclass(frozen=True)
class Estimate:
    """A mean with its bootstrap interval; NaN where there was nothing to average."""

    value: float
    low: float
    high: float


def mean(values: ArrayLike) -> float:
    """The mean of what is not NaN; NaN if nothing is left."""
    kept = _applicable(values)
    return float(kept.mean()) if kept.size else float("nan")


def bootstrap_interval(
    values: ArrayLike, *, seed: int, resamples: int = RESAMPLES, level: float = LEVEL
) -> tuple[float, float]:
    """The percentile bootstrap interval of the mean of `values` (N,).

    Rows are resampled with replacement; the interval holds the middle `level` of the resampled means. Two calls with
    one seed and as many values draw the same rows, so intervals of models on the same prompts are comparable.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, section 13.3.
    """
    kept = _applicable(values)
    if not kept.size:
        return float("nan"), float("nan")
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    block = max(1, _BLOCK // kept.size)
    for start in range(0, resamples, block):
        count = min(block, resamples - start)
        means[start : start + count] = kept[generator.integers(kept.size, size=(count, kept.size))].mean(axis=1)
    tail = (1 - level) / 2
    bounds: Floats = np.quantile(means, [tail, 1 - tail])
    return float(bounds[0]), float(bounds[1])


def estimate(values: ArrayLike, *, seed: int) -> Estimate:
    """The mean of `values` with its 95 % bootstrap interval."""
    return Estimate(mean(values), *bootstrap_interval(values, seed=seed))


def wins(ours: ArrayLike, theirs: ArrayLike) -> Floats:
    """Per prompt 1 where ours is strictly higher, 0.5 for a tie, 0 where it is lower; NaN where either is NaN.

    The mean is the win rate, or the accuracy of a scorer on pairs (chosen, rejected). Resampling these values keeps
    the two replies to a prompt together: the statistic is paired.
    """
    left, right = np.asarray(ours, dtype=np.float64), np.asarray(theirs, dtype=np.float64)
    won = np.where(left > right, 1.0, np.where(left == right, 0.5, 0.0))
    won[np.isnan(left) | np.isnan(right)] = np.nan
    return won


def sequence_kl(policy_logits: torch.Tensor, baseline_logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """KL(policy || baseline) in nats along each sampled reply: (B, T, V), (B, T, V), (B, T) -> (B,).

    At every token of a reply that the policy drew, the divergence of the two next-token distributions is summed over
    the whole vocabulary; the reply's sum is returned. For replies drawn at temperature 1 its mean is an unbiased
    estimate of the KL between the two distributions of whole replies, by the chain rule. The usual estimators see the
    drawn token only: k1 = log p/q has the same mean, a larger variance, and is negative on many replies; k3 = r - 1 -
    log r (Schulman 2020) is non-negative, but heavy-tailed where q > p. Both logits are at hand here, so the token is
    averaged out exactly: non-negative, and exactly zero for equal logits.

    Source: Amini et al. 2025 (arXiv:2504.10637), the Rao-Blackwellized estimator.
    """
    log_p = policy_logits.float().log_softmax(-1)
    log_q = baseline_logits.float().log_softmax(-1)
    per_token = (log_p.exp() * (log_p - log_q)).sum(-1)  # (B, T)
    return (per_token * mask).sum(-1)


def _applicable(values: ArrayLike) -> Floats:
    array = np.asarray(values, dtype=np.float64)
    return array[~np.isnan(array)]
