"""Every formula of PPO as a pure function of tensors.

Letters: B episodes, T completion tokens. `mask` (B, T) is true at the tokens that the policy drew, its stop token
included; what stands elsewhere may be anything, also NaN, and reaches neither a result nor a gradient. Reductions take
`total`, which adds a tensor up over all ranks (the identity on one), so that no number depends on how a batch is cut.

Papers: Schulman et al. 2015 (GAE, arXiv:1506.02438); Schulman et al. 2017 (PPO, arXiv:1707.06347); Ziegler et al. 2019
(KL in the reward, adaptive coefficient, arXiv:1909.08593); Schulman 2020, "Approximating KL divergence" (k1, k2, k3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]
Total: TypeAlias = Callable[[Tensor], Tensor]


def here(value: Tensor) -> Tensor:
    """The total over one rank."""
    return value


# --- masked reductions ------------------------------------------------------------------------------------------------


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Sum of the values where the mask is true, a scalar."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def masked_mean(values: Tensor, mask: Tensor, total: Total = here) -> Tensor:
    """Mean of the values where the mask is true, over all ranks; 0 where the mask is empty everywhere."""
    return total(masked_sum(values, mask)) / total(mask.sum()).clamp(min=1)


def masked_variance(values: Tensor, mask: Tensor, total: Total = here) -> Tensor:
    """Unbiased variance (Bessel) of the values where the mask is true, over all ranks; 0 below two values."""
    mean = masked_mean(values, mask, total)
    count = total(mask.sum())
    return total(masked_sum((values - mean) ** 2, mask)) / (count - 1).clamp(min=1)


def masked_whiten(values: Tensor, mask: Tensor, *, shift_mean: bool = True, total: Total = here) -> Tensor:
    """Values with variance 1 where the mask is true, and with mean 0 unless `shift_mean` is false; 0 elsewhere."""
    mean, variance = masked_mean(values, mask, total), masked_variance(values, mask, total)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(values))


# --- what the policy said ---------------------------------------------------------------------------------------------


def log_probabilities(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token (B, T) under logits (B, T, V), in float32."""
    logits = logits.float()
    return logits.gather(-1, tokens[..., None]).squeeze(-1) - torch.logsumexp(logits, dim=-1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats (B, T) of the distributions with these logits (B, T, V); an impossible token has logit -inf."""
    logits = logits.float()
    log_probs = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    return -(log_probs.exp() * log_probs.clamp(min=torch.finfo(log_probs.dtype).min)).sum(-1)


def kl_estimate(log_probs: Tensor, reference: Tensor, kind: KLEstimator = "k1") -> Tensor:
    """Estimate of KL(policy || reference) at each drawn token (B, T), in nats.

    With r = reference(token) / policy(token): k1 = -ln r (unbiased), k2 = (ln r)^2 / 2 (biased, never negative),
    k3 = r - 1 - ln r (unbiased, never negative). Schulman 2020.
    """
    log_ratio = reference - log_probs
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    return torch.expm1(log_ratio) - log_ratio


# --- rewards and advantages -------------------------------------------------------------------------------------------


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """The reward of each token (B, T): the KL penalty everywhere, the reply's score (B,) at its last token.

    Ziegler et al. 2019, equation 2, spread over the tokens. An episode without a token gets nothing.
    """
    rewards = torch.where(mask, -kl_coef * kl, torch.zeros_like(kl))
    return rewards + torch.where(last_token(mask), scores[:, None], torch.zeros_like(kl))


def last_token(mask: Tensor) -> Tensor:
    """True at the last token of each episode (B, T)."""
    count = mask.cumsum(-1)
    return mask & (count == count[:, -1:])


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float,
    lam: float,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalized advantage estimates and the returns that the critic learns, both (B, T) and 0 where masked.

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; R_t = A_t + V_t. Schulman et al. 2015,
    equations 11 to 16. `values` (B, T) are of the states before each token. After an episode's last token the value is
    0, or `last_values` (B,): the value of the state in which an episode was cut that had not ended.
    """
    after = torch.zeros_like(values[:, 0]) if last_values is None else last_values
    ends = last_token(mask)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(after)  # A_{t+1}
    for t in range(values.shape[1] - 1, -1, -1):
        is_end, is_token = ends[:, t], mask[:, t]
        # Selected, not multiplied: what stands outside of the mask may not be finite.
        next_value = after if t + 1 == values.shape[1] else torch.where(is_end, after, values[:, t + 1])
        carried = torch.where(is_end, torch.zeros_like(following), following)
        advantage = rewards[:, t] + gamma * next_value - values[:, t] + gamma * lam * carried
        following = torch.where(is_token, advantage, torch.zeros_like(advantage))
        advantages[:, t] = following
    returns = torch.where(mask, advantages + values, torch.zeros_like(values))
    return advantages, returns


# --- losses -----------------------------------------------------------------------------------------------------------


class Clipped(NamedTuple):
    """A clipped loss at each token (B, T), and where the clipped branch was the larger one (B, T)."""

    loss: Tensor
    clipped: Tensor


def policy_loss(log_probs: Tensor, old: Tensor, advantages: Tensor, *, cliprange: float) -> Clipped:
    """The clipped surrogate at each token: max(-A rho, -A clip(rho, 1 - eps, 1 + eps)), rho = exp(new - old).

    Schulman et al. 2017, equation 7, with the sign of a loss.
    """
    ratio = torch.exp(log_probs - old)
    plain, clipped = -advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange)
    return Clipped(torch.maximum(plain, clipped), clipped > plain)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, *, cliprange: float | None) -> Clipped:
    """Half the squared error of each value, or of the value clipped to `cliprange` around the old one if larger.

    Schulman et al. 2017's implementation (openai/baselines, ppo2). None switches the clipping off.
    """
    plain = (values - returns).square()
    if cliprange is None:
        return Clipped(plain / 2, torch.zeros_like(plain, dtype=torch.bool))
    near = old + (values - old).clamp(-cliprange, cliprange)
    clipped = (near - returns).square()
    return Clipped(torch.maximum(plain, clipped) / 2, clipped > plain)


# --- controllers and diagnostics --------------------------------------------------------------------------------------


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: int, episodes: int) -> float:
    """The coefficient after an update of `episodes` whose mean KL was `kl`.

    beta <- beta (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon). Ziegler et al. 2019, section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * episodes / horizon)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor, total: Total = here) -> Tensor:
    """1 - Var(returns - values) / Var(returns): 1 is a perfect critic, 0 one that says a constant."""
    error = masked_variance(returns - values, mask, total)
    return 1 - error / masked_variance(returns, mask, total).clamp(min=1e-8)


def repeated_ngrams(replies: list[list[int]], n: int = 4) -> float:
    """Mean share of the n-grams of a reply that stood in it before; replies shorter than n + 1 tokens count as 0."""
    shares = []
    for reply in replies:
        grams = [tuple(reply[i : i + n]) for i in range(len(reply) - n + 1)]
        shares.append(1 - len(set(grams)) / len(grams) if len(grams) > 1 else 0.0)
    return sum(shares) / len(shares) if shares else 0.0
