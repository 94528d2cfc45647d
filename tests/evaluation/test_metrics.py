"""The numbers of an evaluation against values by hand, known distributions and exact enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from alignment.evaluation.metrics import bootstrap_interval, estimate, mean, sequence_kl, wins

NAN = float("nan")


def test_wins_are_strict_and_ties_count_half() -> None:
    assert wins([2.0, 1.0, 0.0, 3.0], [1.0, 1.0, 1.0, 3.0]).tolist() == [1.0, 0.5, 0.0, 0.5]


def test_a_pair_that_was_not_judged_is_neither_won_nor_lost() -> None:
    won = wins([NAN, 1.0, 5.0], [0.0, NAN, 1.0])
    assert np.isnan(won[:2]).all()
    assert mean(won) == 1.0


def test_mean_leaves_out_nan_and_is_nan_of_nothing() -> None:
    assert mean([1.0, NAN, 3.0]) == 2.0
    assert math.isnan(mean([]))
    assert math.isnan(mean([NAN]))


def test_interval_is_the_normal_one_for_many_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, size=4000)
    low, high = bootstrap_interval(values, seed=0, resamples=4000)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert low == pytest.approx(values.mean() - half, abs=0.006)
    assert high == pytest.approx(values.mean() + half, abs=0.006)


def test_interval_by_hand() -> None:
    """Two values: the mean of a resample is 0, 1/2 or 1 with probability 1/4, 1/2, 1/4."""
    assert bootstrap_interval([0.0, 1.0], seed=3) == (0.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], seed=3, level=0.2) == (0.5, 0.5)


def test_interval_covers_the_true_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(5)
    covered = 0
    for trial in range(300):
        low, high = bootstrap_interval(generator.exponential(1.0, size=80), seed=trial, resamples=400)
        covered += low <= 1.0 <= high
    assert 0.90 <= covered / 300 <= 0.98


def test_interval_depends_on_the_seed_alone_and_not_on_the_block_size(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=50)
    whole = bootstrap_interval(values, seed=7)
    assert bootstrap_interval(values, seed=7) == whole
    assert bootstrap_interval(values, seed=8) != whole
    monkeypatch.setattr("alignment.evaluation.metrics._BLOCK", 50 * 7)
    assert bootstrap_interval(values, seed=7) == whole


def test_interval_ignores_nan_and_is_nan_of_nothing() -> None:
    assert bootstrap_interval([1.0, NAN, 2.0], seed=0) == bootstrap_interval([1.0, 2.0], seed=0)
    assert all(math.isnan(bound) for bound in bootstrap_interval([NAN], seed=0))


def test_estimate_of_a_constant() -> None:
    constant = estimate([4.0, 4.0], seed=0)
    assert (constant.value, constant.low, constant.high) == (4.0, 4.0, 4.0)


# -- KL ----------------------------------------------------------------------------------------------------------------

V, T = 3, 3


def _tables(seed: int) -> torch.Tensor:
    """Random next-token logits for each previous token: (V + 1, V), the last row for the first token."""
    return torch.randn(V + 1, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _logits(table: torch.Tensor, sequence: tuple[int, ...]) -> torch.Tensor:
    """What the table predicts at each position of a sequence: (T, V)."""
    return torch.stack([table[previous] for previous in (V, *sequence[:-1])])


def _log_probability(table: torch.Tensor, sequence: tuple[int, ...]) -> float:
    steps = _logits(table, sequence).log_softmax(-1)
    return float(sum(step[token] for step, token in zip(steps, sequence, strict=True)))


def test_mean_over_replies_is_the_kl_of_whole_replies() -> None:
    """Every sequence, weighted by its probability under the policy, against the definition."""
    policy, baseline = _tables(0), _tables(1)
    exact = estimated = 0.0
    for sequence in itertools.product(range(V), repeat=T):
        log_p = _log_probability(policy, sequence)
        exact += math.exp(log_p) * (log_p - _log_probability(baseline, sequence))
        value = sequence_kl(_logits(policy, sequence)[None], _logits(baseline, sequence)[None], torch.ones(1, T))
        assert value.item() >= 0
        estimated += math.exp(log_p) * value.item()
    assert estimated == pytest.approx(exact, rel=1e-6)
    assert exact > 0.3


def test_kl_by_hand_and_padding_does_not_count() -> None:
    policy = torch.tensor([[[0.9, 0.1], [0.5, 0.5]]]).log()
    baseline = torch.tensor([[[0.5, 0.5], [0.1, 0.9]]]).log()
    first = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    second = 0.5 * math.log(0.5 / 0.1) + 0.5 * math.log(0.5 / 0.9)
    assert sequence_kl(policy, baseline, torch.tensor([[1, 1]])).item() == pytest.approx(first + second, rel=1e-6)
    assert sequence_kl(policy, baseline, torch.tensor([[1, 0]])).item() == pytest.approx(first, rel=1e-6)


def test_kl_of_equal_models_is_exactly_zero() -> None:
    logits = torch.randn(2, 4, 50, generator=torch.Generator().manual_seed(0))
    assert sequence_kl(logits, logits.clone(), torch.ones(2, 4)).tolist() == [0.0, 0.0]
