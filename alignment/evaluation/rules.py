"""The faults that a training log can show: the table `RULES`, and the function that sees each of them.

A rule looks wherever the numbers that it reads are logged, whatever the algorithm is called. A new fault is a row here,
and a planted log in the tests.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from alignment.evaluation.series import LINES, Change, Series, change, is_number, rank_correlation

# What counts as a fault, and why there.
OFTEN = 0.05  # share of lines: a single update out of range is the clipping's business, one in twenty is a setting's
KL_GROWN = 2.0  # nats per reply: below it the replies are nearly the reference's, and their score may well stay
KL_TOO_LARGE = 30.0  # nats per reply: e^30 times likelier than under the reference, where no reward model has seen text
KL_RUNAWAY = 10.0  # nats per reply: a KL that doubles over the second half is not yet a worry where it is small
CRITIC_UPDATES = 20  # updates: a value head starts at random, and its first explained variances are at or below zero
CRITIC_EXPLAINS = 0.05  # share of the returns' variance: with less, the critic is no better than their mean
EOS_FALL = 0.15  # share of replies: one in seven has stopped to end
LENGTH_GROWTH = 0.30  # of the length: a better reply may need some more words
LENGTH_RANK = 0.7  # rank correlation of length and score over the updates: half of the ranks' variance
ENTROPY_LEFT = 0.20  # of the first entropy: samples of one prompt become near copies, and advantages vanish
ENTROPY_LEAST = 0.05  # nats per token: the likeliest token has about 99 % of the probability
RATIO_MAX = 10.0  # a single token ten times likelier than when it was drawn
RATIO_MEAN = 0.2  # distance from 1: the usual clip range, as a mean over all tokens
CLIPPED = 0.3  # share of tokens: those give no gradient, and the update is no longer the one that was computed
APPROXKL = 0.1  # nats per token within one update; implementations that stop early do so at 0.01 to 0.05
REPEATED = 0.3  # share of 4-grams that stood before: plain prose has a few per cent
TRUNCATED = 0.5  # share of replies: most scores are then of unfinished replies
LOSS_RISE = 0.10  # of the first loss: data in another order may move it by some per cent
LOSS_FLAT = 0.005  # of the first loss: any learning moves it further
GRADIENT_SPIKE = 20.0  # times the median norm: clipping hides it from the weights, not from Adam's second moment
CHANCE = 0.55  # accuracy on training pairs: a coin gives 0.5
DISPLACED = 1.0  # of the implicit reward: with beta 0.1 both answers are e^10 times less likely than at the start
MARGIN = 0.01  # of the implicit reward: a margin of this size takes less than 1 % off the sigmoid loss
SEPARABLE = 0.999  # accuracy on training rows: nothing that has to be learned is right at once, every time
POSITIVE = 0.75  # share of lines: margins that are only noise are positive in half of them

Severity = Literal["warning", "error"]


@dataclass(frozen=True)
class Seen:
    """What a rule saw: between which steps, and the numbers."""

    steps: tuple[int, int]
    shows: str


@dataclass(frozen=True)
class Rule:
    """One fault that a log can show.

    Attributes:
        name: what it is called.
        reads: the keys without which it cannot look.
        look: what it sees in a log, or None.
        cause: the usual one.
        remedy: what to change; keys of the stage stand in braces.
        unless: keys with which it does not look: another rule says it better there.
        lines: it looks where each of `reads` has so many values.
    """

    name: str
    reads: tuple[str, ...]
    look: Callable[[Series], Seen | None]
    cause: str
    remedy: str
    severity: Severity = "warning"
    unless: tuple[str, ...] = ()
    lines: int = LINES

    def looks(self, series: Series) -> bool:
        """Whether this log has what the rule reads."""
        enough = all(len(series.points(key)) >= self.lines for key in self.reads)
        return enough and not any(series.points(key) for key in self.unless)


def _seen(fault: bool, *changes: Change) -> Seen | None:
    """The changes, if they are the fault."""
    return Seen(changes[0].steps, "; ".join(map(str, changes))) if fault else None


def _often(series: Series, key: str, limit: float, origin: float = 0.0) -> Seen | None:
    """The lines whose value is further than `limit` from `origin`, if they are more than a few."""
    points = series.points(key)
    found = [(step, value) for step, value in points if abs(value - origin) > limit]
    if len(found) < max(2, OFTEN * len(points)):
        return None
    _, worst = max(found, key=lambda point: abs(point[1] - origin))
    beyond = f"over {limit:g} away from {origin:g}" if origin else f"above {limit:g}"
    shows = f"{key} {beyond} in {len(found)} of {len(points)} lines, at worst {worst:.3g}"
    return Seen((found[0][0], found[-1][0]), shows)


# -- rules of PPO ------------------------------------------------------------------------------------------------------


def _score(series: Series) -> tuple[Change, bool]:
    """The score, and whether it or a source of it may rise: under running normalisation its own mean stays near 0."""
    raw = {key for entry in series.entries for key in entry if key.startswith("rewards/") and not key.endswith("_std")}
    score = change(series, "objective/scores")
    sources = [change(series, key) for key in sorted(raw) if len(series.points(key)) >= LINES]
    return score, any(item.may_rise for item in (score, *sources))


def _kl_grows(kl: Change) -> bool:
    return kl.rises and kl.last > KL_GROWN


def _kl_without_reward(series: Series) -> Seen | None:
    kl, (score, rises) = change(series, "objective/kl"), _score(series)
    return _seen(_kl_grows(kl) and not rises, kl, score)


def _kl_too_large(series: Series) -> Seen | None:
    kl = change(series, "objective/kl")
    runaway = kl.rises and kl.last > KL_RUNAWAY and kl.last > 2 * kl.middle
    return _seen(kl.last > KL_TOO_LARGE or runaway, kl)


def _score_constant(series: Series) -> Seen | None:
    points = series.points("objective/scores_std")
    zero = [step for step, value in points if value <= 0]
    shows = f"objective/scores_std is 0 in {len(zero)} of {len(points)} lines: every reply gets the same score"
    return Seen((zero[0], zero[-1]), shows) if len(zero) > len(points) / 2 else None


def _reward_flat(series: Series) -> Seen | None:
    score, rises = _score(series)
    said = _kl_grows(change(series, "objective/kl")) or _score_constant(series) is not None  # by rules of their own
    return _seen(not rises and not said, score)


def _critic(series: Series) -> Seen | None:
    points = series.points("val/explained_variance")
    later = points[len(points) // 2 :]
    median = statistics.median(value for _, value in later)
    steps = (later[0][0], later[-1][0])
    shows = f"val/explained_variance is {median:.3g} (median of the last half)"
    return Seen(steps, shows) if median < CRITIC_EXPLAINS and steps[1] >= CRITIC_UPDATES else None


def _eos_falling(series: Series) -> Seen | None:
    share = change(series, "completions/eos_share")
    return _seen(share.falls and share.first - share.last >= EOS_FALL, share)


def _length_with_score(series: Series) -> Seen | None:
    length, score = change(series, "completions/mean_length"), change(series, "objective/scores")
    rank = rank_correlation(series, length.key, score.key)
    if not (length.rises and length.last > (1 + LENGTH_GROWTH) * length.first and rank > LENGTH_RANK):
        return None
    return Seen(length.steps, f"{length}; {score}; rank correlation of the two {rank:.2f}")


def _entropy_collapse(series: Series) -> Seen | None:
    entropy = change(series, "policy/entropy_avg")
    least = max(ENTROPY_LEFT * entropy.first, ENTROPY_LEAST)
    return _seen(entropy.falls and entropy.first >= ENTROPY_LEAST and entropy.last < least, entropy)


def _ratio(series: Series) -> Seen | None:
    seen = [
        _often(series, "val/ratio_max", RATIO_MAX),
        _often(series, "val/ratio", RATIO_MEAN, origin=1.0),
        _often(series, "policy/clipfrac_avg", CLIPPED),
    ]
    found = [item for item in seen if item is not None]
    if not found:
        return None
    steps = (min(item.steps[0] for item in found), max(item.steps[1] for item in found))
    return Seen(steps, "; ".join(item.shows for item in found))


def _approxkl(series: Series) -> Seen | None:
    return _often(series, "policy/approxkl_avg", APPROXKL)


def _repetition(series: Series) -> Seen | None:
    share = change(series, "completions/repeated_ngrams")
    return _seen(share.rises and share.last > REPEATED, share)


def _truncated(series: Series) -> Seen | None:
    share = change(series, "completions/truncated_share")
    return _seen(share.last > TRUNCATED, share)


# -- rules of every training, of reward models, of the DPO family ------------------------------------------------------


def _non_finite(series: Series) -> Seen | None:
    found = {key: [entry["step"] for entry in series.entries if _not_finite(entry.get(key))]
             for key in sorted({key for entry in series.entries for key in entry})}  # fmt: skip
    bad = {key: steps for key, steps in found.items() if steps}
    if not bad:
        return None
    shows = ", ".join(f"{key} at {len(steps)} step{'s' * (len(steps) > 1)}" for key, steps in bad.items())
    every = [step for steps in bad.values() for step in steps]
    return Seen((min(every), max(every)), f"not finite: {shows}")


def _not_finite(value: Any) -> bool:
    return is_number(value) and not math.isfinite(value)


def _loss_rises(series: Series) -> Seen | None:
    loss = change(series, "loss")
    return _seen(loss.rises and loss.last - loss.first > LOSS_RISE * abs(loss.first), loss)


def _loss_flat(series: Series) -> Seen | None:
    loss = change(series, "loss")
    limit = LOSS_FLAT * abs(loss.first)
    doubtful = loss.noise > limit and (loss.may_rise or loss.may_fall)
    return _seen(abs(loss.last - loss.first) <= limit and not doubtful, loss)


def _zero(series: Series, key: str) -> Seen | None:
    points = series.points(key)
    zero = [step for step, value in points if value == 0]
    shows = f"{key} is exactly 0 in {len(zero)} of {len(points)} lines"
    return Seen((zero[0], zero[-1]), shows) if len(zero) > len(points) / 2 else None


def _loss_zero(series: Series) -> Seen | None:
    return _zero(series, "loss")


def _gradient_zero(series: Series) -> Seen | None:
    return _zero(series, "grad_norm")


def _accuracy_one(series: Series) -> Seen | None:
    for key in ("accuracy", "rewards/accuracies", "mean_token_accuracy"):
        points = series.points(key)
        # The first line may be of the first step, before which policy and reference are equal.
        first = points[1 : max(LINES // 2, len(points) // 5) + 1]
        if len(points) >= LINES and all(value >= SEPARABLE for _, value in first):
            return Seen((first[0][0], first[-1][0]), f"{key} is {first[0][1]:.4g} from step {first[0][0]} on")
    return None


def _gradient_spikes(series: Series) -> Seen | None:
    points = series.points("grad_norm")
    norms = [norm for _, norm in points]
    usual = statistics.median(norms)
    # Also against what came just before: norms that shrink over the run are large at its start, all of them.
    before = [statistics.median(norms[max(0, at - 25) : at] or norms[:1]) for at in range(len(norms))]
    spikes = [point for point, near in zip(points, before, strict=True) if point[1] > GRADIENT_SPIKE * max(usual, near)]
    if not spikes:
        return None
    at = ", ".join(f"{norm:.3g} at step {step}" for step, norm in spikes[:3]) + ", ..." * (len(spikes) > 3)
    return Seen((spikes[0][0], spikes[-1][0]), f"grad_norm {at}; its median is {usual:.3g}")


def _chance(series: Series) -> Seen | None:
    accuracy = change(series, "accuracy")
    return _seen(accuracy.last < CHANCE, accuracy)


def _displacement(series: Series) -> Seen | None:
    chosen, rejected = change(series, "rewards/chosen"), change(series, "rewards/rejected")
    accuracy = change(series, "rewards/accuracies")
    both = all(item.falls and item.first - item.last > DISPLACED for item in (chosen, rejected))
    return _seen(both and accuracy.last > accuracy.first, chosen, rejected, accuracy)


def _margins_flat(series: Series) -> Seen | None:
    margins = change(series, "rewards/margins")
    values = [value for _, value in series.points(margins.key)]
    positive = sum(value > 0 for value in values)
    # They begin at 0: those that are above it from the first line on have grown before it.
    if margins.last >= MARGIN and (margins.may_rise or positive >= POSITIVE * len(values)):
        return None
    return Seen(margins.steps, f"{margins}; above 0 in {positive} of {len(values)} lines")


# -- the table ---------------------------------------------------------------------------------------------------------

PPO = ("objective/kl", "objective/scores")
RULES: tuple[Rule, ...] = (
    Rule(
        "non-finite", (), _non_finite,
        cause="numbers that overflow: a rate that is too high, or rows that are broken",
        remedy="lower {train.learning_rate} or {train.max_grad_norm}; look at the rows in {data}",
        severity="error", lines=1,
    ),
    Rule(
        "loss-zero", ("loss",), _loss_zero, unless=(*PPO, "reward"),  # GRPO's is 0 wherever advantages cancel out
        cause="no token carries loss (rows cut at their answers, a mask that is all zeros), or policy and reference "
        "move together",
        remedy="look at the trained tokens in {data.train} (alignment data show), and at {train.max_length}",
        severity="error",
    ),
    Rule(
        "gradient-zero", ("grad_norm",), _gradient_zero,
        cause="nothing reaches the trained weights: a frozen model, a loss that is constant, or equal rewards in every "
        "group",
        remedy="look at {peft.target_modules} and {train.gradient_checkpointing}; with rewards, whether they differ",
        severity="error",
    ),
    Rule(
        "accuracy-one", (), _accuracy_one,
        cause="what tells the answers apart is trivial (an end that is missing, a name, a format), or the answer "
        "stands in the prompt",
        remedy="look at the pairs in {data.train} with `alignment data check`, which tries to tell them apart by "
        "length and by single words",
    ),
    Rule(
        "gradient-spikes", ("grad_norm",), _gradient_spikes,
        cause="single rows unlike all others (very long, broken, another language), or too few rows per step",
        remedy="lower {train.max_grad_norm}, raise {batch.global}, lengthen {train.warmup_steps}; look at the rows",
    ),
    Rule(
        "loss-rises", ("loss",), _loss_rises, unless=PPO,  # whose loss has no direction: returns grow as it learns
        cause="the learning rate is too high, or harder rows come later",
        remedy="lower {train.learning_rate}, lengthen {train.warmup_steps}",
    ),
    Rule(
        "loss-flat", ("loss",), _loss_flat, unless=(*PPO, "rewards/margins", "margin"),
        cause="the learning rate is too small, what should learn is frozen, or the model knew these rows before",
        remedy="raise {train.learning_rate}; with an adapter look at {peft.r} and {peft.target_modules}",
    ),
    Rule(
        "accuracy-at-chance", ("accuracy", "margin"), _chance,
        cause="the learning rate is too small, chosen and rejected are mixed up in a part of the rows, or what tells "
        "them apart was cut",
        remedy="raise {train.learning_rate}; look at the pairs in {data.train}, and at {train.max_length}",
    ),
    Rule(
        "likelihood-displacement", ("rewards/chosen", "rewards/rejected", "rewards/accuracies"), _displacement,
        cause="chosen and rejected are much alike, or too many steps are taken: the loss sees their difference alone, "
        "and the probability goes to replies that nobody compared",
        remedy="add a term that holds the chosen answers (sft in {train.loss_type}, with {train.loss_weights}), raise "
        "{train.beta}, or lower {train.learning_rate}",
    ),
    Rule(
        "margins-flat", ("rewards/margins", "rewards/chosen"), _margins_flat,
        cause="the learning rate is too small, what should learn is frozen, or the labels are noise",
        remedy="raise {train.learning_rate}, or lower {train.beta}; look at the pairs in {data.train}",
    ),
    Rule(
        "kl-without-reward", PPO, _kl_without_reward,
        cause="the policy drifts: noise in the advantages moves it, and nothing pulls it back",
        remedy="raise {train.kl_coef}, or lower {train.learning_rate}",
    ),
    Rule(
        "kl-too-large", PPO, _kl_too_large,
        cause="reward hacking: the policy is where the reward was never fitted, and a score there means little",
        remedy="raise {train.kl_coef}, or set {train.kl_target}; {train.max_kl} ends the run in time",
    ),
    Rule(
        "score-constant", (*PPO, "objective/scores_std"), _score_constant,
        cause="the reward does not look at the reply, or cannot tell these replies apart",
        remedy="call the reward on a good and on a bad reply; correct {rewards}", severity="error",
    ),
    Rule(
        "reward-flat", PPO, _reward_flat,
        cause="too few updates, a rate that is too small or a price of KL that is too high; or the reward is above "
        "what sampling finds",
        remedy="look whether objective/kl moves at all: if not, raise {train.learning_rate} or lower {train.kl_coef}; "
        "if so, raise {batch.global} or look at {rewards}",
    ),
    Rule(
        "critic-not-learning", (*PPO, "val/explained_variance"), _critic,
        cause="the critic learns too slowly, starts badly, or its clip range is too narrow for the returns: advantages "
        "are then as noisy as the returns",
        remedy="raise {train.critic_learning_rate} or {train.vf_coef}, try another {train.critic_init}, widen "
        "{train.cliprange_value}",
    ),
    Rule(
        "eos-falling", ("completions/eos_share",), _eos_falling,
        cause="the reward does not care whether a reply ends, or likes long ones",
        remedy="set {train.missing_eos_penalty}; look whether {train.response_length} leaves room to end",
    ),
    Rule(
        "length-with-score", ("completions/mean_length", "objective/scores"), _length_with_score,
        cause="length bias of the reward: longer replies score higher, and the policy has found out",
        remedy="add a length reward to {rewards}, set {train.missing_eos_penalty}, or balance the lengths in the pairs "
        "of the reward model",
    ),
    Rule(
        "entropy-collapse", ("policy/entropy_avg",), _entropy_collapse,
        cause="the steps are too large or the reference pulls too little: the policy has settled on a few replies and "
        "explores no more",
        remedy="lower {train.learning_rate}, raise {train.kl_coef}, or look at {train.temperature}",
    ),
    Rule(
        "ratio-out-of-range", ("val/ratio", "policy/clipfrac_avg"), _ratio,  # and val/ratio_max where it is logged
        cause="the policy moves too far within one update: replies are learned from that it would no longer give",
        remedy="lower {train.learning_rate} or {train.num_ppo_epochs}, or narrow {train.cliprange}",
    ),
    Rule(
        "approxkl-large", ("policy/approxkl_avg",), _approxkl,
        cause="too many or too large steps on the replies of one update",
        remedy="lower {train.num_ppo_epochs} or {train.learning_rate}, or set {train.target_kl}",
    ),
    Rule(
        "repetition", ("completions/repeated_ngrams",), _repetition,
        cause="the reward does not punish repetition, or the policy has left where it was fitted",
        remedy="raise {train.kl_coef}; add a reward against repetition to {rewards}",
    ),
    Rule(
        "truncated", ("completions/truncated_share",), _truncated,
        cause="replies are longer than there is room for, or never end",
        remedy="raise {train.response_length}, or set {train.missing_eos_penalty}",
    ),
)  # fmt: skip
