"""What logs show: every rule on a run with its fault planted, and none of them on healthy ones."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import DataError
from alignment.evaluation.diagnose import Diagnosis, diagnose, judge, text
from alignment.evaluation.rules import RULES
from alignment.evaluation.series import LINES, Series, change, rank_correlation, read, spearman
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.upstream import fields

Entry = dict[str, Any]
Curve = Callable[[float], float]  # of progress, 0 to 1

# Value and deviation of each key over a run in which nothing is wrong.
HEALTHY: dict[str, dict[str, tuple[Curve, float]]] = {
    "sft": {
        "loss": (lambda t: 1.1 + 0.9 * math.exp(-6 * t), 0.05),
        "grad_norm": (lambda t: 0.5 + 2 * math.exp(-20 * t), 0.1),
        "mean_token_accuracy": (lambda t: 0.7 - 0.2 * math.exp(-6 * t), 0.01),
    },
    "reward": {
        "loss": (lambda t: 0.55 + 0.14 * math.exp(-5 * t), 0.02),
        "grad_norm": (lambda t: 1.0, 0.3),
        "accuracy": (lambda t: 0.72 - 0.22 * math.exp(-5 * t), 0.03),
        "margin": (lambda t: 0.6 * t, 0.05),
    },
    "dpo": {
        "loss": (lambda t: 0.5 + 0.19 * math.exp(-4 * t), 0.02),
        "grad_norm": (lambda t: 3.0, 0.5),
        "rewards/chosen": (lambda t: -0.3 * t, 0.05),
        "rewards/rejected": (lambda t: -1.6 * t, 0.08),
        "rewards/margins": (lambda t: 1.3 * t, 0.08),
        "rewards/accuracies": (lambda t: 0.75 - 0.25 * math.exp(-5 * t), 0.03),
    },
    "kto": {
        "loss": (lambda t: 0.42 + 0.08 * math.exp(-4 * t), 0.01),
        "grad_norm": (lambda t: 2.0, 0.4),
        "rewards/chosen": (lambda t: 0.3 * t, 0.05),
        "rewards/rejected": (lambda t: -0.5 * t, 0.05),
        "rewards/margins": (lambda t: 0.8 * t, 0.08),
    },
    "ppo": {
        "loss": (lambda t: 0.02 + 0.05 * t, 0.02),
        "grad_norm": (lambda t: 1.0, 0.2),
        "objective/kl": (lambda t: 6 * (1 - math.exp(-3 * t)), 0.3),
        "objective/scores": (lambda t: -0.2 + 1.5 * (1 - math.exp(-3 * t)), 0.15),
        "objective/scores_std": (lambda t: 0.8, 0.05),
        "rewards/gold": (lambda t: 1 + 3 * (1 - math.exp(-3 * t)), 0.3),
        "rewards/gold_std": (lambda t: 0.8, 0.05),
        "policy/approxkl_avg": (lambda t: 0.01, 0.002),
        "policy/clipfrac_avg": (lambda t: 0.08, 0.01),
        "policy/entropy_avg": (lambda t: 1.8 - 0.6 * t, 0.05),
        "val/ratio": (lambda t: 1.0, 0.01),
        "val/ratio_max": (lambda t: 1.8, 0.2),
        "val/explained_variance": (lambda t: 0.6 - 0.9 * math.exp(-8 * t), 0.05),
        "completions/mean_length": (lambda t: 40.0, 2.0),
        "completions/eos_share": (lambda t: 0.95, 0.02),
        "completions/truncated_share": (lambda t: 0.05, 0.02),
        "completions/repeated_ngrams": (lambda t: 0.05, 0.01),
    },
}


def log(kind: str, lines: int = 60, seed: int = 0, **planted: tuple[Curve, float]) -> list[Entry]:
    """The entries of a log: healthy but for what is planted; the step is 1 to `lines`."""
    draw = random.Random(seed)
    curves = HEALTHY[kind] | planted
    entries: list[Entry] = []
    for index in range(lines):
        values = {key: curve(index / (lines - 1)) + draw.gauss(0, noise) for key, (curve, noise) in curves.items()}
        entries.append({"step": index + 1, "time": {"seconds": index * 1.5}, **values})
    return entries


def plant(
    run: Path, entries: list[Entry], write_jsonl: Callable[..., Path], stage: str = "stage", summary: bool = True
) -> Diagnosis:
    """Write the log of a stage as a worker does, and have it judged."""
    last = {"step": entries[-1]["step"], "train_loss": 1.0, "time": {"train_runtime": 1.0}, "total_flos": 1e9}
    write_jsonl(run / stage / "log.jsonl", [*entries, *[last] * summary])
    return diagnose(run, [stage])[0]


@pytest.mark.parametrize("lines", [20, 60, 300])
@pytest.mark.parametrize("kind", HEALTHY)
def test_nothing_is_found_in_a_healthy_log(
    kind: str, lines: int, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    looking = {"sft": 7, "reward": 7, "dpo": 8, "kto": 7, "ppo": 16}[kind]
    for seed in range(8):
        found = plant(tmp_path, log(kind, lines, seed), write_jsonl)
        assert found.findings == (), (seed, found.findings)
        assert text(found) == [
            f"stage: {looking} rules looked at {lines} logged lines, steps 1 to {lines}: nothing wrong"
        ]


def flat(value: float, noise: float = 0.0) -> tuple[Curve, float]:
    return (lambda t: value), noise


def line(start: float, end: float, noise: float = 0.0) -> tuple[Curve, float]:
    return (lambda t: start + (end - start) * t), noise


NO_SCORE = {"objective/scores": flat(0.3, 0.1), "rewards/gold": flat(1.2, 0.2)}
FAULTS: list[tuple[str, str, dict[str, tuple[Curve, float]], str]] = [
    ("loss-zero", "kto", {"loss": ((lambda t: 0.5 if t < 0.3 else 0.0), 0.0)}, "loss is exactly 0 in 42 of 60 lines"),
    ("gradient-zero", "reward", {"grad_norm": flat(0.0)}, "grad_norm is exactly 0 in 60 of 60 lines"),
    ("accuracy-one", "dpo", {"rewards/accuracies": ((lambda t: 0.0 if t == 0 else 1.0), 0.0)}, "is 1 from step 2 on"),
    ("accuracy-one", "reward", {"accuracy": flat(1.0)}, "accuracy is 1 from step 2 on"),
    ("accuracy-one", "sft", {"mean_token_accuracy": flat(1.0)}, "mean_token_accuracy is 1 from step 2 on"),
    ("gradient-spikes", "sft", {"grad_norm": ((lambda t: 40.0 if 0.5 < t < 0.52 else 0.5), 0.05)}, "at step 31"),
    ("gradient-spikes", "ppo", {"grad_norm": ((lambda t: 90.0 if t > 0.7 else 0.5), 0.05)}, "at step 43"),
    ("loss-rises", "sft", {"loss": line(1.2, 1.9, 0.05)}, "loss 1."),
    ("loss-rises", "dpo", {"loss": line(0.65, 0.9, 0.02)}, "loss 0."),
    ("loss-flat", "sft", {"loss": flat(2.345)}, "loss 2.35 in the first fifth, 2.35 in the last"),
    ("accuracy-at-chance", "reward", {"accuracy": flat(0.505, 0.02), "loss": flat(0.693, 0.003)}, "accuracy 0.5"),
    ("likelihood-displacement", "dpo", {
        "rewards/chosen": line(0, -4, 0.1), "rewards/rejected": line(0, -6, 0.1), "rewards/margins": line(0, 2, 0.1),
    }, "rewards/chosen -0.3"),
    ("margins-flat", "dpo", {
        "rewards/chosen": flat(0, 0.02), "rewards/rejected": flat(0, 0.02), "rewards/margins": flat(0, 0.03),
        "rewards/accuracies": flat(0.5, 0.03), "loss": flat(0.693, 0.002),
    }, "above 0 in "),
    ("margins-flat", "kto", {"rewards/margins": line(1e-4, 1e-3, 1e-5), "loss": flat(0.5, 1e-4)}, "in 60 of 60 lines"),
    ("kl-without-reward", "ppo", {"objective/kl": line(0, 8, 0.3), **NO_SCORE}, "objective/kl 0."),
    ("kl-without-reward", "ppo", {
        "objective/kl": line(0, 8, 0.3), "objective/scores": line(0.5, -1, 0.1), "rewards/gold": line(1, 0, 0.1)
    }, "objective/scores 0."),
    ("kl-too-large", "ppo", {"objective/kl": line(0, 60, 1)}, "in the last (noise"),
    ("kl-too-large", "ppo", {"objective/kl": ((lambda t: 0.1 * math.exp(5.4 * t)), 0.02)}, "objective/kl 0.1"),
    ("score-constant", "ppo", {
        "objective/scores": flat(0.5), "objective/scores_std": flat(0.0), "rewards/gold": flat(0.5),
        "objective/kl": flat(0.4, 0.05),
    }, "objective/scores_std is 0 in 60 of 60 lines"),
    ("reward-flat", "ppo", {"objective/kl": flat(0.5, 0.1), **NO_SCORE}, "objective/scores 0."),
    ("critic-not-learning", "ppo", {"val/explained_variance": flat(-0.05, 0.05)}, "val/explained_variance is -0.0"),
    ("eos-falling", "ppo", {
        "completions/eos_share": line(0.98, 0.7, 0.02), "completions/truncated_share": line(0.02, 0.3, 0.02)
    }, "completions/eos_share 0.9"),
    ("length-with-score", "ppo", {
        "completions/mean_length": line(30, 70, 2), "objective/scores": line(0, 2, 0.1)
    }, "rank correlation of the two 0.9"),
    ("entropy-collapse", "ppo", {"policy/entropy_avg": ((lambda t: 1.8 * math.exp(-4 * t)), 0.01)},
     "policy/entropy_avg 1."),
    ("entropy-collapse", "ppo", {"policy/entropy_avg": line(0.12, 0.03, 0.002)}, "policy/entropy_avg 0.1"),
    ("ratio-out-of-range", "ppo", {"val/ratio_max": flat(25, 5)}, "val/ratio_max above 10 in 60 of 60 lines"),
    ("ratio-out-of-range", "ppo", {"val/ratio": line(1, 0.5, 0.01)}, "val/ratio over 0.2 away from 1 in "),
    ("ratio-out-of-range", "ppo", {"policy/clipfrac_avg": flat(0.45, 0.02)}, "policy/clipfrac_avg above 0.3"),
    ("approxkl-large", "ppo", {"policy/approxkl_avg": line(0.02, 0.4, 0.01)}, "policy/approxkl_avg above 0.1 in "),
    ("repetition", "ppo", {"completions/repeated_ngrams": line(0.05, 0.6, 0.03)}, "completions/repeated_ngrams 0.1"),
    ("truncated", "ppo", {"completions/truncated_share": flat(0.7, 0.05)}, "completions/truncated_share 0."),
]  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "kind", "planted", "says"), FAULTS, ids=[f"{rule}-{kind}-{n}" for n, (rule, kind, *_) in enumerate(FAULTS)]
)
def test_a_planted_fault_is_found_by_its_rule_alone(
    rule: str,
    kind: str,
    planted: dict[str, tuple[Curve, float]],
    says: str,
    tmp_path: Path,
    write_jsonl: Callable[..., Path],
) -> None:
    found = plant(tmp_path, log(kind, **planted), write_jsonl)
    assert [finding.rule for finding in found.findings] == [rule]
    finding = found.findings[0]
    assert says in finding.shows
    assert 1 <= finding.steps[0] <= finding.steps[1] <= 60
    assert finding.cause
    assert finding.keys
    assert all(key in finding.remedy for key in finding.keys)
    printed = text(found)
    assert printed[0] == f"stage: {len(found.rules)} rules looked at 60 logged lines, steps 1 to 60: 1 finding"
    assert f"{finding.severity}  {rule}, steps {finding.steps[0]} to {finding.steps[1]}" in printed[2]
    assert [row.split()[0] for row in printed if re.match(r"    \S", row)] == ["shows", "cause", "change"]
    assert max(map(len, printed)) <= 120


def test_a_number_that_is_not_finite_is_found(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    entries = log("dpo")
    entries[41] |= {"loss": math.nan, "grad_norm": math.inf}
    entries[43] |= {"loss": math.nan}
    finding, *others = plant(tmp_path, entries, write_jsonl).findings
    assert not others
    assert (finding.rule, finding.severity, finding.steps) == ("non-finite", "error", (42, 44))
    assert finding.shows == "not finite: grad_norm at 1 step, loss at 2 steps"


def test_the_ratio_is_judged_without_its_largest_value() -> None:
    entries = log("ppo", **{"val/ratio": line(1, 0.5, 0.01)})
    for entry in entries:
        del entry["val/ratio_max"]
    assert [item.rule for item in judge("ppo", Series(tuple(entries))).findings] == ["ratio-out-of-range"]


def test_every_rule_is_planted() -> None:
    assert {rule.name for rule in RULES} == {rule for rule, *_ in FAULTS} | {"non-finite"}
    assert len({rule.name for rule in RULES}) == len(RULES)


@pytest.mark.parametrize(
    ("planted", "why"),
    [
        ({"objective/kl": line(0, 8, 0.3), "objective/scores": flat(0, 0.05)}, "normalised while it runs: gold rises"),
        ({"grad_norm": ((lambda t: 50 * math.exp(-8 * t)), 0.01)}, "norms that shrink are no spikes"),
        ({"val/ratio_max": ((lambda t: 30.0 if 0.5 < t < 0.52 else 1.8), 0.1)}, "one update of sixty"),
        ({"completions/repeated_ngrams": flat(0.4, 0.02)}, "repeated from the start: nothing has risen"),
        ({"completions/mean_length": line(30, 70, 2), "objective/scores": ((lambda t: 4 * t * (1 - t)), 0.02),
          "rewards/gold": line(0, 3, 0.1)}, "longer, and the score comes back down"),
        ({"completions/eos_share": line(0.98, 0.90, 0.01)}, "falls by less than what matters"),
        ({"objective/kl": line(0, 25, 0.5)}, "grows evenly with the score, below the limit"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_only_looks_like_a_fault_is_not_found(
    planted: dict[str, tuple[Curve, float]], why: str, tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    assert plant(tmp_path, log("ppo", **planted), write_jsonl).findings == (), why


def test_pure_noise_is_no_change() -> None:
    draw = random.Random(1)
    logs = [Series(tuple({"step": n, "x": draw.gauss(0, 1)} for n in range(40))) for _ in range(500)]
    changes = [change(series, "x") for series in logs]
    assert sum(item.rises or item.falls for item in changes) <= 2  # 4 standard errors, and an estimated deviation
    assert sum(item.may_rise for item in changes) <= 25  # 2 standard errors on one side: 2.3 % of 500, and some


def test_a_change_by_hand() -> None:
    values = [0, 2, 1, 3, 2, 4, 3, 5, 4, 6]
    found = change(Series(tuple({"step": 10 * n, "x": value} for n, value in enumerate(values))), "x")
    assert (found.first, found.last, found.steps) == (1.0, 5.0, (0, 90))
    # Differences 2 and 1 in turn, five 2s of nine: the median is 2. Fifths of 2 values: sqrt(2 / 2) is 1.
    assert found.noise == pytest.approx(4 * 1.2533 * 1.4826 / math.sqrt(2) * 2)
    assert not found.rises
    assert found.may_rise
    assert str(found) == "x 1 in the first fifth, 5 in the last (noise 11)"


def test_rank_correlation_by_hand() -> None:
    assert spearman([1, 2, 3, 4], [1, 4, 9, 16]) == pytest.approx(1)
    assert spearman([1, 2, 3, 4], [4, 3, 2, 1]) == pytest.approx(-1)
    assert spearman([1, 2, 2, 4], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # ties share rank 1.5
    assert spearman([1, 1, 1], [1, 2, 3]) == 0
    entries = ({"step": 1, "a": 1, "b": 3}, {"step": 2, "a": 2}, {"step": 3, "a": 3, "b": 1})
    assert rank_correlation(Series(entries), "a", "b") == pytest.approx(-1)


def test_too_few_lines_are_not_judged(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    entries = log("sft", LINES - 1, loss=line(1, 9))
    found = plant(tmp_path, entries, write_jsonl, "sft")
    assert found.rules == ("non-finite", "accuracy-one")  # which finds nothing in so few
    assert text(found) == [
        "sft: too few logged steps (9) to judge, 10 are needed: lower stages.sft.train.logging_steps; "
        "its numbers are finite"
    ]
    entries[3]["loss"] = math.nan
    assert [item.rule for item in plant(tmp_path, entries, write_jsonl, "sft").findings] == ["non-finite"]
    found = plant(tmp_path, log("sft", LINES, loss=line(1, 9)), write_jsonl, "sft", summary=False)
    assert [item.rule for item in found.findings] == ["loss-rises"]


def test_a_log_is_read_while_it_is_written(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    path = write_jsonl(tmp_path / "dpo" / "log.jsonl", log("dpo"))
    whole = path.read_text()
    path.write_text(whole[:-30])
    found = diagnose(tmp_path, ["dpo"])[0]
    assert (found.cut, found.lines, found.steps) == (True, 59, (1, 59))
    assert text(found)[0].endswith("nothing wrong; the last line is cut and left out")
    path.write_text(whole.replace('{"step": 7,', '{"step": 7', 1))
    with pytest.raises(DataError, match=r"dpo/log\.jsonl:7: damaged: no JSON object with a step"):
        read(path)


def test_without_a_log_there_is_nothing_to_judge(tmp_path: Path) -> None:
    assert text(diagnose(tmp_path, ["evaluate"])[0]) == ["evaluate: no log.jsonl: nothing to judge"]
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "log.jsonl").touch()
    assert text(diagnose(tmp_path, ["sft"])[0]) == ["sft: no step is logged: nothing to judge"]


@pytest.mark.parametrize("kind", HEALTHY)
def test_the_keys_to_change_are_keys_of_the_recipe(kind: str) -> None:
    config = "alignment.training.ppo_config:PPOConfig" if kind == "ppo" else ALGORITHMS[kind].config
    assert config is not None
    names = judge("x", Series(tuple(log(kind)))).rules
    assert len(names) >= 4
    for rule in (rule for rule in RULES if rule.name in names):
        for key in re.findall(r"\{(.+?)\}", rule.remedy):
            section, _, name = key.partition(".")
            assert section in ("train", "data", "batch", "rewards", "peft"), (rule.name, key)
            assert section != "train" or name in fields(config), (rule.name, key)


def test_a_page_is_called_as_the_evaluation_calls_it() -> None:
    from alignment.evaluation import diagnose as module
    from alignment.evaluation import evaluate

    assert module.REPORT == evaluate.REPORT


def test_findings_are_plain_json(tmp_path: Path, write_jsonl: Callable[..., Path]) -> None:
    from dataclasses import asdict

    entries = log("ppo", **{"objective/kl": line(0, 60, 1)})
    entries[0]["samples"] = [{"prompt": "a", "reply": "b", "score": 1.0, "finished": True}]
    entries[5]["val/explained_variance"] = math.nan
    found = json.loads(json.dumps(asdict(plant(tmp_path, entries, write_jsonl)), allow_nan=False))
    assert [item["rule"] for item in found["findings"]] == ["non-finite", "kl-too-large"]
    assert found["findings"][1]["keys"] == [f"stages.stage.train.{key}" for key in ("kl_coef", "kl_target", "max_kl")]
