"""The flight recorder of PPO: what each update showed, for log.jsonl.

Numbers of several updates between two log lines are averaged; of maxima the largest counts; seconds and tokens are
added up. Names are those that
TRL's trainer had, where it had one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from alignment.training import objectives
from alignment.training.objectives import Total, masked_mean, masked_sum, masked_variance
from alignment.training.ranks import largest
from alignment.training.rollout import Rollout, Scores

MAXIMA = ("val/ratio_max", "completions/max_length")
SUMMED = ("time/generate", "time/score", "time/update", "tokens")


class Recorder:
    """Collects numbers until a line of the log is written; its state is part of a checkpoint."""

    def __init__(self) -> None:
        self.numbers: dict[str, list[float]] = defaultdict(list)

    def add(self, numbers: Mapping[str, float]) -> None:
        """Remember numbers that are the same on every rank (seconds: this rank's)."""
        for name, value in numbers.items():
            self.numbers[name].append(float(value))

    def take(self) -> dict[str, float]:
        """The line of all that was added since the last one."""
        line = {}
        for name, values in self.numbers.items():
            line[name] = max(values) if name in MAXIMA else sum(values) / (1 if name in SUMMED else len(values))
        tokens = line.pop("tokens", 0.0)
        seconds = sum(line.get(name, 0.0) for name in SUMMED)
        if seconds > 0:
            line["time/tokens_per_second"] = tokens / seconds
        self.numbers.clear()
        return line

    def state_dict(self) -> dict[str, list[float]]:
        """What was added and not yet written."""
        return {name: list(values) for name, values in self.numbers.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Go on from `state_dict`."""
        self.numbers = defaultdict(list, {name: list(values) for name, values in state.items()})


def rollout_numbers(rollout: Rollout, scores: Scores, *, kl_coef: float, total: Total) -> dict[str, float]:
    """What a rollout shows, over all ranks."""
    mask, episodes = rollout.mask, rollout.episodes
    finished = rollout.scores.new_tensor([float(done) for done in episodes.finished])
    lengths = mask.sum(-1).float()
    count = total(rollout.scores.new_tensor(float(len(episodes))))
    everyone = finished >= 0  # (B,) true

    def mean(values: Any) -> float:
        return float(total(values.sum()) / count)

    def per_episode(values: Any) -> float:
        return float(total(masked_sum(values, mask)) / count)

    k1 = objectives.kl_estimate(rollout.log_probs, rollout.reference, "k1")
    non_score = -kl_coef * per_episode(rollout.kl)
    repeated = objectives.repeated_ngrams([list(ids) for ids in episodes.completions])
    numbers = {
        "objective/kl": per_episode(k1),
        "objective/kl_per_token": float(masked_mean(k1, mask, total)),
        "objective/entropy": per_episode(-rollout.log_probs),
        "objective/non_score_reward": non_score,
        "objective/scores": mean(rollout.scores),
        "objective/scores_std": float(masked_variance(rollout.scores, everyone, total).sqrt()),
        "objective/rlhf_reward": non_score + mean(rollout.scores),
        "objective/kl_coef": kl_coef,
        "policy/entropy_avg": float(masked_mean(rollout.entropy, mask, total)),
        "val/explained_variance": float(objectives.explained_variance(rollout.values, rollout.returns, mask, total)),
        "val/num_eos_tokens": float(total(finished.sum())),
        "advantages/mean": float(masked_mean(rollout.raw_advantages, mask, total)),
        "advantages/std": float(masked_variance(rollout.raw_advantages, mask, total).sqrt()),
        "completions/mean_length": mean(lengths),
        "completions/max_length": float(largest(lengths.max())),
        "completions/eos_share": mean(finished),
        "completions/truncated_share": 1 - mean(finished),
        "completions/repeated_ngrams": mean(finished.new_full(finished.shape, repeated)),
    }
    for name, values in scores.raw.items():
        known = finished.new_tensor(values)
        applies = ~known.isnan()
        numbers[f"rewards/{name}"] = float(masked_mean(known, applies, total))
        numbers[f"rewards/{name}_std"] = float(masked_variance(known, applies, total).sqrt())
    return numbers


def conversations(rollout: Rollout, count: int) -> list[dict[str, Any]]:
    """The first episodes, for a person to read."""
    shown = []
    for row, text, score, done in zip(
        rollout.episodes.rows[:count], rollout.episodes.texts, rollout.scores.tolist(), rollout.episodes.finished,
        strict=False,
    ):  # fmt: skip
        prompt = row.get("prompt", "")
        asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        shown.append({"prompt": asked, "reply": text, "score": round(score, 4), "finished": done})
    return shown
