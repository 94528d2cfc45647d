"""How stages stand, and which folder a name means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.errors import ChainError
from alignment.pipeline import overview, runs
from alignment.pipeline.locks import lock
from alignment.pipeline.plan import write_recipe, write_stage


@pytest.fixture
def run(workplace: Path, load: Callable, look: Callable, finish: Callable) -> Path:
    """A run whose stages `sft` and `dpo` are finished."""
    folder = workplace / "runs" / "small"
    write_recipe(load(), folder, origin=Path("recipe.yaml"))
    finish(look(load(), "sft").spec)
    finish(look(load(), "dpo").spec)
    return folder


def test_states(run: Path, load: Callable, look: Callable) -> None:
    spec = look(load(), "kto").spec

    def state() -> tuple[str, int]:
        found = overview.stage_state(spec.output)
        return found.state, found.code

    assert state() == ("not started", 0)
    write_stage(spec)
    runs.write_status(spec.output, attempt=spec.attempt, state="running", code=0, step=3, steps=9)
    assert state() == ("killed", 1)
    with lock(spec.output):
        assert state() == ("running", 0)
        assert overview.stage_state(spec.output).step == 3
    runs.write_status(spec.output, attempt=spec.attempt, state="preempted", code=85)
    assert state() == ("preempted", 85)
    (spec.output / "status.json").write_text("{")
    assert state() == ("damaged", 2)
    done = overview.stage_state(run / "sft")
    assert (done.state, done.code, done.metrics) == ("done", 0, {"eval_loss": 1.25})


def test_names(run: Path) -> None:
    runs_folder = run.parent
    for name in ("small", str(run), "runs/small"):
        assert overview.find(name, runs_folder)[1] is None
    for name in ("small:dpo", "small/dpo", f"{run}/dpo", "runs/small/dpo"):
        found, stage = overview.find(name, runs_folder)
        assert (found.resolve(), stage) == (run, "dpo")
    with pytest.raises(ChainError, match=r"other: no such run in .*runs \(there are small\)"):
        overview.find("other", runs_folder)
    with pytest.raises(ChainError, match="small: no stage pdo; its stages are sft, dpo, kto, evaluate"):
        overview.find("small:pdo", runs_folder)


def test_which_model_is_meant(run: Path, workplace: Path) -> None:
    assert overview.model_folder("small", run.parent) == run / "dpo"
    assert overview.model_folder("small:sft", run.parent) == run / "sft"
    assert overview.model_folder(str(workplace / "base"), run.parent) == workplace / "base"
    with pytest.raises(ChainError, match=r"not finished \(not started\)"):
        overview.model_folder("small:kto", run.parent)


def test_runs_are_found_by_their_recipe(run: Path) -> None:
    (run.parent / ".cache").mkdir(exist_ok=True)
    (run / "dpo.20260101-000000").mkdir()
    assert overview.runs_in(run.parent) == [run]
    assert overview.stage_names(run) == ["sft", "dpo", "kto", "evaluate"]
    (run / "recipe.yaml").write_text("stages: [")
    with pytest.raises(ChainError, match="damaged"):
        overview.stage_names(run)
