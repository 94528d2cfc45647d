"""The quickstart as a user runs it: the whole chain, and the numbers that it must reach.

`benchmarks/quickstart.py` runs the same on other seeds.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from alignment.evaluation.metrics import bootstrap_interval, wins

pytestmark = pytest.mark.ci_slow
STAGES = ["base", "sft", "reward", "dpo", "ppo", "evaluate"]


def alignment(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    return subprocess.run(
        [sys.executable, "-m", "alignment", *arguments], cwd=cwd, env=environment, capture_output=True, text=True,
        timeout=2400,
    )  # fmt: skip


@pytest.fixture(scope="module")
def finished(root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run's folder and what was printed."""
    runs = tmp_path_factory.mktemp("runs")
    done = alignment("run", "recipes/quickstart.yaml", "--runs", str(runs), cwd=root)
    assert done.returncode == 0, done.stdout + done.stderr
    return runs / "quickstart", done.stdout


@pytest.fixture(scope="module")
def metrics(finished: tuple[Path, str]) -> dict[str, float]:
    return json.loads((finished[0] / "evaluate" / "metrics.json").read_text())


@pytest.fixture(scope="module")
def samples(finished: tuple[Path, str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (finished[0] / "evaluate" / "samples.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def gold(root: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("gold", root / "data" / "quickstart" / "gold.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_run_ends_with_the_table_and_its_path(finished: tuple[Path, str]) -> None:
    folder, printed = finished
    assert printed.rstrip().splitlines()[-1] == str(folder)
    assert "win rate" in printed
    assert [name for name in STAGES if (folder / name / "manifest.json").exists()] == STAGES


def test_dpo_wins_against_sft(metrics: dict[str, float]) -> None:
    assert metrics["win_rate/dpo"] >= 0.70
    assert metrics["win_rate_low/dpo"] > 0.60
    assert metrics["win_rate/sft"] == 0.5


def test_ppo_wins_against_sft(metrics: dict[str, float]) -> None:
    assert metrics["win_rate/ppo"] >= 0.70
    assert metrics["win_rate_low/ppo"] > 0.60


def test_alignment_costs_no_facts(metrics: dict[str, float]) -> None:
    assert metrics["facts/dpo"] >= metrics["facts/sft"]


def test_the_reward_model_is_near_the_best_possible(metrics: dict[str, float]) -> None:
    assert metrics["accuracy/best_possible"] - metrics["accuracy/reward"] <= 0.03


def test_sft_is_better_than_base(metrics: dict[str, float]) -> None:
    assert metrics["gold_low/sft"] > metrics["gold_high/base"]


def test_the_evaluation_is_large_enough(samples: list[dict[str, Any]], root: Path) -> None:
    assert len(samples) >= 400
    pairs = (root / "data" / "quickstart" / "preferences-eval.jsonl").read_text().splitlines()
    assert len(pairs) >= 3000


def test_replies_without_a_model_lose_to_sft(samples: list[dict[str, Any]], gold: ModuleType) -> None:
    """Constants, among them the one with the best mean, and a copy of the prompt."""
    columns = {name: [row[name] for row in samples] for name in ("kind", "subject", "answer", "style")}
    prompts = [row["prompt"] for row in samples]
    sft = [row["replies"]["sft"]["rewards"]["gold"] for row in samples]

    def rewards(replies: list[str]) -> list[float]:
        return gold.score(prompts, replies, **columns)

    said = {reply["text"] for row in samples for reply in row["replies"].values()} | {"", "Yes.", "I do not know."}
    constants = {text: rewards([text] * len(samples)) for text in said}
    best = max(constants, key=lambda text: np.mean(constants[text]))
    copy = rewards([row["prompt"][-1]["content"] for row in samples])
    for name, cheap in ((f"always {best!r}", constants[best]), ("a copy of the prompt", copy)):
        _, high = bootstrap_interval(wins(cheap, sft), seed=0)
        assert high < 0.5, name
        assert np.mean(cheap) < np.mean(sft), name


def test_a_second_run_does_nothing(finished: tuple[Path, str], root: Path) -> None:
    folder = finished[0]
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")}
    again = alignment("run", "recipes/quickstart.yaml", "--runs", str(folder.parent), cwd=root)
    assert again.returncode == 0
    assert "nothing to do" in again.stdout
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("manifest.json")} == before


def test_a_changed_recipe_is_refused_with_the_difference(finished: tuple[Path, str], root: Path) -> None:
    changed = alignment(
        "run", "recipes/quickstart.yaml", "--runs", str(finished[0].parent), "--set", "stages.dpo.train.beta=0.5",
        cwd=root,
    )  # fmt: skip
    assert changed.returncode == 2
    assert "stages.dpo.train.beta: " in changed.stderr
    assert " -> 0.5" in changed.stderr


def test_chat_with_the_result(finished: tuple[Path, str], root: Path) -> None:
    talk = subprocess.run(
        [sys.executable, "-m", "alignment", "chat", str(finished[0] / "dpo"), "--temperature", "0"],
        input="What is the capital of France?\n", cwd=root, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert talk.returncode == 0, talk.stderr
    assert "Paris" in talk.stdout
