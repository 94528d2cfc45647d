"""Every formula of PPO against numbers worked out by hand, for-loops in float64 and `gradcheck`."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from alignment.training import objectives as o

NAN = float("nan")


def random_case(rows: int = 5, tokens: int = 7, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values (B, T) in float64 and a mask of at least one token per row."""
    draw = torch.Generator().manual_seed(seed)
    rewards, values = (torch.randn(rows, tokens, generator=draw, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(1, tokens + 1, (rows,), generator=draw)
    lengths[0] = tokens
    return rewards, values, torch.arange(tokens)[None] < lengths[:, None]


# --- masked reductions ------------------------------------------------------------------------------------------------


def test_masked_mean_and_variance_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    assert float(o.masked_mean(values, mask)) == 3.0
    assert float(o.masked_variance(values, mask)) == 7.0  # (4 + 1 + 9) / 2
    assert float(o.masked_sum(values, mask)) == 9.0


def test_an_empty_mask_gives_zero_and_not_nan() -> None:
    values, mask = torch.tensor([[NAN]]), torch.tensor([[False]])
    assert float(o.masked_mean(values, mask)) == 0.0
    assert float(o.masked_variance(values, mask)) == 0.0
    assert float(o.masked_whiten(values, mask)) == 0.0


@pytest.mark.parametrize("shift", [True, False])
def test_whitened_values_have_deviation_one(shift: bool) -> None:
    values, _, mask = random_case()
    white = o.masked_whiten(values, mask, shift_mean=shift)
    kept = values[mask]
    expected = (kept - kept.mean()) / (kept.var() + 1e-8).sqrt() + (0 if shift else kept.mean())
    torch.testing.assert_close(white[mask], expected)
    assert float(white[~mask].abs().sum()) == 0.0


def test_statistics_do_not_depend_on_how_rows_are_split_over_ranks() -> None:
    """Two ranks as threads that add up what they are asked to total: each gets its part of the whole's result."""
    values, _, mask = random_case(rows=6)
    whole = o.masked_whiten(values, mask)
    meeting, shared = threading.Barrier(2), [torch.zeros(()), torch.zeros(())]

    def rank(number: int) -> Tensor:
        def total(value: Tensor) -> Tensor:
            shared[number] = value
            meeting.wait(10)
            result = shared[0] + shared[1]
            meeting.wait(10)
            return result

        rows = slice(3 * number, 3 * number + 3)
        return o.masked_whiten(values[rows], mask[rows], total=total)

    with ThreadPoolExecutor(2) as pool:
        torch.testing.assert_close(torch.cat(list(pool.map(rank, range(2)))), whole)


# --- what the policy said ---------------------------------------------------------------------------------------------


def test_log_probabilities_and_entropy_by_hand() -> None:
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, -math.inf]]])  # (1, 2, 2): p = (1/4, 3/4) and (1, 0)
    tokens = torch.tensor([[1, 0]])
    torch.testing.assert_close(o.log_probabilities(logits, tokens), torch.tensor([[math.log(0.75), 0.0]]))
    expected = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(o.entropy(logits), torch.tensor([[expected, 0.0]]))


def test_kl_estimates_by_hand() -> None:
    log_probs, reference = torch.tensor([[math.log(0.5)]]), torch.tensor([[math.log(0.25)]])  # r = 1/2
    assert float(o.kl_estimate(log_probs, reference, "k1")) == pytest.approx(math.log(2))
    assert float(o.kl_estimate(log_probs, reference, "k2")) == pytest.approx(math.log(2) ** 2 / 2)
    assert float(o.kl_estimate(log_probs, reference, "k3")) == pytest.approx(0.5 - 1 + math.log(2))


def test_k1_and_k3_are_unbiased() -> None:
    """Their expectation under the policy is the KL itself, summed over all tokens of a small vocabulary."""
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.2, 0.6], dtype=torch.float64)
    truth = float((p * (p / q).log()).sum())
    for kind in ("k1", "k3"):
        assert float((p * o.kl_estimate(p.log(), q.log(), kind)).sum()) == pytest.approx(truth, abs=1e-12)
    assert bool((o.kl_estimate(p.log(), q.log(), "k3") >= 0).all())


# --- rewards and advantages -------------------------------------------------------------------------------------------


def test_the_score_stands_at_the_last_token_and_the_penalty_at_every_one() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    kl = torch.tensor([[1.0, 2.0, NAN], [0.0, -1.0, 4.0]])
    rewards = o.token_rewards(torch.tensor([10.0, 20.0]), kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 9.0, 0.0], [0.0, 0.5, 18.0]]


def test_gae_by_hand() -> None:
    """gamma 0.5, lambda 0.5: deltas 1 + 0.5*4 - 2 = 1, 3 - 4 = -1; advantages 1 - 0.25 = 0.75, -1."""
    rewards, values = torch.tensor([[1.0, 3.0, NAN]]), torch.tensor([[2.0, 4.0, NAN]])
    mask = torch.tensor([[True, True, False]])
    advantages, returns = o.gae(rewards, values, mask, gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[0.75, -1.0, 0.0]]
    assert returns.tolist() == [[2.75, 3.0, 0.0]]


def test_a_cut_episode_goes_on_from_the_value_of_its_last_state() -> None:
    rewards, values = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 1.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    ended, _ = o.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    cut, returns = o.gae(rewards, values, mask, gamma=1.0, lam=1.0, last_values=torch.tensor([5.0]))
    assert ended.tolist() == [[-1.0, -1.0]]
    assert cut.tolist() == [[4.0, 4.0]]
    assert returns.tolist() == [[5.0, 5.0]]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.99, 1.0), (1.0, 0.0)])
def test_gae_is_the_sum_of_discounted_errors(gamma: float, lam: float, seed: int) -> None:
    """Against the definition (equation 16): A_t = sum_l (gamma lambda)^l delta_{t+l}, one episode at a time."""
    rewards, values, mask = random_case(seed=seed)
    last = torch.randn(len(mask), dtype=torch.float64)
    poisoned = [torch.where(mask, x, torch.full_like(x, NAN)) for x in (rewards, values)]
    advantages, returns = o.gae(*poisoned, mask, gamma=gamma, lam=lam, last_values=last)
    for row in range(len(mask)):
        length = int(mask[row].sum())
        after = [*values[row, 1:length].tolist(), float(last[row])]
        deltas = [float(rewards[row, t]) + gamma * after[t] - float(values[row, t]) for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length))
            assert float(advantages[row, t]) == pytest.approx(expected, abs=1e-12)
            assert float(returns[row, t]) == pytest.approx(expected + float(values[row, t]), abs=1e-12)
        assert float(advantages[row, length:].abs().sum()) == 0.0


def test_gae_does_not_depend_on_padding() -> None:
    rewards, values, mask = random_case()
    advantages, _ = o.gae(rewards, values, mask, gamma=0.9, lam=0.8)
    wide = [torch.cat([x, torch.full_like(x, NAN)], 1) for x in (rewards, values)]
    padded, _ = o.gae(*wide, torch.cat([mask, torch.zeros_like(mask)], 1), gamma=0.9, lam=0.8)
    assert torch.equal(padded[:, : mask.shape[1]], advantages)


def test_with_lambda_one_the_return_is_the_sum_of_rewards() -> None:
    rewards, values, mask = random_case()
    _, returns = o.gae(rewards, values, mask, gamma=1.0, lam=1.0)
    left = torch.where(mask, rewards, torch.zeros_like(rewards)).flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(returns[mask], left[mask])


# --- losses -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "clipped"),
    [
        (1.0, 2.0, -2.0, False),
        (1.5, 2.0, -2.4, True),  # gains beyond 1 + 0.2 count no further
        (0.5, 2.0, -1.0, False),  # losses do
        (0.5, -2.0, 1.6, True),
        (1.5, -2.0, 3.0, False),
    ],
)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, clipped: bool) -> None:
    new, old = torch.tensor([math.log(ratio)]), torch.zeros(1)
    found = o.policy_loss(new, old, torch.tensor([advantage]), cliprange=0.2)
    assert float(found.loss) == pytest.approx(loss)
    assert bool(found.clipped) is clipped


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "clipped"),
    [
        (1.0, 1.0, 3.0, 2.0, False),
        (2.0, 1.0, 3.0, (1.2 - 3.0) ** 2 / 2, True),  # moved too far: judged where it may be
        (0.0, 1.0, 3.0, 4.5, False),
    ],
)
def test_value_loss_by_hand(value: float, old: float, target: float, loss: float, clipped: bool) -> None:
    found = o.value_loss(torch.tensor([value]), torch.tensor([old]), torch.tensor([target]), cliprange=0.2)
    assert float(found.loss) == pytest.approx(loss)
    assert bool(found.clipped) is clipped
    plain = o.value_loss(torch.tensor([value]), torch.tensor([old]), torch.tensor([target]), cliprange=None)
    assert float(plain.loss) == pytest.approx((value - target) ** 2 / 2)


def test_gradients() -> None:
    """`gradcheck` in float64, away from the kinks; what is masked gets no gradient though it is not finite."""
    draw = torch.Generator().manual_seed(1)
    new, old, advantages, values, targets = (
        0.3 * torch.randn(3, 4, generator=draw, dtype=torch.float64) for _ in range(5)
    )
    new.requires_grad_(), values.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: o.policy_loss(x, old, advantages, cliprange=0.2).loss, new)
    assert torch.autograd.gradcheck(lambda x: o.value_loss(x, old, targets, cliprange=0.2).loss, values)
    mask = torch.tensor([[True, False, True, False]] * 3)
    bad = torch.where(mask, new, torch.full_like(new, NAN))
    o.masked_mean(o.policy_loss(bad, old, advantages, cliprange=0.2).loss, mask).backward()
    assert new.grad is not None
    assert bool(torch.isfinite(new.grad).all())
    assert float(new.grad[~mask].abs().sum()) == 0.0


# --- controllers and diagnostics --------------------------------------------------------------------------------------


def test_the_coefficient_follows_the_target() -> None:
    """Ziegler et al. 2019: the error is cut at 0.2, the change is in proportion to episodes / horizon."""
    settings = {"target": 6.0, "horizon": 1000, "episodes": 100}
    assert o.adapted_kl_coef(0.1, 6.0, **settings) == pytest.approx(0.1)
    assert o.adapted_kl_coef(0.1, 6.6, **settings) == pytest.approx(0.1 * 1.01)
    assert o.adapted_kl_coef(0.1, 60.0, **settings) == pytest.approx(0.1 * 1.02)
    assert o.adapted_kl_coef(0.1, 0.0, **settings) == pytest.approx(0.1 * 0.98)


def test_explained_variance() -> None:
    returns = torch.tensor([[1.0, 2.0, 3.0, NAN]])
    mask = torch.tensor([[True, True, True, False]])
    assert float(o.explained_variance(returns, returns, mask)) == 1.0
    assert float(o.explained_variance(torch.zeros_like(returns), returns, mask)) == 0.0
    assert float(o.explained_variance(torch.tensor([[3.0, 2.0, 1.0, 0.0]]), returns, mask)) == -3.0


def test_repeated_ngrams() -> None:
    assert o.repeated_ngrams([[1, 2, 3, 4, 5, 6]]) == 0.0
    assert o.repeated_ngrams([[7] * 8]) == pytest.approx(0.8)  # 5 four-grams, one kind
    assert o.repeated_ngrams([[7] * 8, [1, 2]]) == pytest.approx(0.4)
    assert o.repeated_ngrams([]) == 0.0
