"""How ranks agree without a process group: each way in which rank 0 may not get ready ends in one line, in time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed import HashStore

from alignment.errors import ChainError, UserError
from alignment.pipeline import plan as planning
from alignment.pipeline import runs
from alignment.recipe.load import load_recipe
from alignment.training import handoff
from alignment.training.failing import LOST_CONTACT

Recipe = Callable[..., dict[str, Any]]


@pytest.fixture
def recipe(tiny_recipe: Recipe, tiny_policy: Path, tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe("sft", sft={"model": str(tiny_policy)}), sort_keys=False))
    return path


@pytest.fixture
def spec(recipe: Path, tmp_path: Path) -> planning.StageSpec:
    """A planned stage, not started."""
    return planning.prepare(load_recipe(recipe), "sft", runs=tmp_path / "runs", run="x", recipe_path=recipe).spec


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handoff, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(handoff, "PLAN_SECONDS", 0.2)
    monkeypatch.delenv("RANK", raising=False)


# --- prepared ---------------------------------------------------------------------------------------------------------


def test_the_others_get_what_rank_0_prepared_in_this_attempt(spec: planning.StageSpec) -> None:
    spec.output.mkdir(parents=True)
    handoff.ready(replace(spec, attempt="an earlier one"), {"start": "old"})

    def rank_0() -> None:
        time.sleep(0.1)
        handoff.ready(spec, {"start": "new"})

    thread = threading.Thread(target=rank_0)
    thread.start()
    assert handoff.wait(spec, limit=20)["start"] == "new"
    thread.join()


def test_nobody_waits_for_a_rank_0_that_failed(spec: planning.StageSpec) -> None:
    spec.output.mkdir(parents=True)
    runs.write_status(spec.output, attempt=spec.attempt, state="failed", code=2, message="no rows")
    with pytest.raises(UserError, match="rank 0 failed while it prepared the stage; its message says why"):
        handoff.wait(spec, limit=20)


def test_the_failure_of_an_earlier_attempt_is_not_this_ones(spec: planning.StageSpec) -> None:
    spec.output.mkdir(parents=True)
    runs.write_status(spec.output, attempt="an earlier one", state="failed", code=2, message="no rows")
    with pytest.raises(UserError, match="rank 0 did not prepare the stage within 0 s"):
        handoff.wait(spec, limit=0.1)


def test_a_damaged_record_is_named(spec: planning.StageSpec) -> None:
    spec.output.mkdir(parents=True)
    (spec.output / handoff.READY).write_text('{"schema": 1, "att')
    with pytest.raises(ChainError, match=r"prepared\.json: damaged: not JSON"):
        handoff.wait(spec, limit=20)


# --- planned by hand --------------------------------------------------------------------------------------------------


def by_hand(recipe: Path, stage: str, tmp_path: Path) -> planning.StageSpec:
    return handoff.plan_by_hand(recipe, stage, overrides=[], run="x", runs_folder=tmp_path / "runs")


def test_rank_0_plans_and_another_rank_of_the_same_launch_reads_it(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = by_hand(recipe, "sft", tmp_path)
    monkeypatch.setenv("RANK", "1")
    assert by_hand(recipe, "sft", tmp_path) == first


def test_a_plan_of_another_launch_is_not_taken(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    by_hand(recipe, "sft", tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "1")
    with pytest.raises(UserError, match=r"not what rank 0 planned, after 0\.2 s; is this folder shared by all nodes"):
        by_hand(recipe, "sft", tmp_path)


def test_a_stage_that_the_recipe_lacks_is_one_line(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ChainError, match="--stage dpo: the recipe has no such stage; it has sft"):
        by_hand(recipe, "dpo", tmp_path)


def test_rank_0_that_cannot_plan_tells_the_others(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of somebody else: rank 0 says so, the others leave without a line of their own."""
    store = HashStore()
    monkeypatch.setattr(handoff, "_launcher_store", lambda: store)
    (tmp_path / "runs" / "x" / "sft").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "sft" / "thesis.tex").touch()
    with pytest.raises(ChainError, match=r"stage sft: changed: .*holds thesis\.tex but no stage\.yaml"):
        by_hand(recipe, "sft", tmp_path)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as left:
        by_hand(recipe, "sft", tmp_path)
    assert left.value.code == LOST_CONTACT


def test_the_launchers_store_names_the_attempt(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On another host the launch has another name; the store is what both see."""
    store = HashStore()
    monkeypatch.setattr(handoff, "_launcher_store", lambda: store)
    first = by_hand(recipe, "sft", tmp_path)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert by_hand(recipe, "sft", tmp_path) == first
