"""The sharding matrix: a few combinations in `make test`, all of them in `make test-all`, and its record.

The combinations run in a program of their own (`matrix.py`), whose processes are forked: pytest's is full of threads.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parent))

import cells
import forks
import verdicts
from cells import Cell

from alignment.pipeline import plan as planning
from alignment.recipe.load import load_recipe

MATRIX = Path(__file__).with_name("matrix.py")
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="DeepSpeed compiles its kernels with g++")


def run(folder: Path, *only: str, timeout: float) -> dict[str, Any]:
    """Measure some combinations afresh."""
    done = subprocess.run(
        [sys.executable, str(MATRIX), "--folder", str(folder / "bench"), "--out", str(folder / "found.json"),
         "--only", *only],
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert (folder / "found.json").exists(), done.stdout + done.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def require(cell: Cell, found: dict[str, Any]) -> None:
    """Every action is proven, but for those that must be refused, with a reason and a way out."""
    for action in verdicts.asked(cell):
        if action in verdicts.must_refuse(cell):
            assert "alignment export --from-checkpoint" in found[action]["refused"]
        else:
            assert verdicts.faults(cell, found, action) == [], (cell.name, action)


@needs_compiler
def test_a_few_combinations(tmp_path: Path) -> None:
    """Two ranks against one process, shares, saving, resuming: ZeRO-3 in full, an adapter under ZeRO-2."""
    some = [Cell("sft", "full", "zero3"), Cell("dpo", "lora", "zero2")]
    found = run(tmp_path, *(cell.name for cell in some), timeout=400)
    assert set(found) == {cell.name for cell in some}
    for cell in some:
        require(cell, found[cell.name])


@pytest.mark.ci_slow
@needs_compiler
def test_bfloat16_under_zero3_with_weights_that_were_made_after_loading(tmp_path: Path) -> None:
    """Beside weights that were cut, a fresh head or grown embeddings in float32 could not be computed with."""
    some = [Cell("reward", "lora", "zero3", compute="bfloat16", weights="bfloat16"),
            Cell("sft", "full", "zero3", added=True, compute="bfloat16", weights="bfloat16")]  # fmt: skip
    found = run(tmp_path, *(cell.name for cell in some), timeout=400)
    for cell in some:
        require(cell, found[cell.name])


@pytest.mark.slow
@needs_compiler
def test_every_combination(tmp_path: Path) -> None:
    found = run(tmp_path, "*", timeout=3 * 3600)
    assert set(found) == {cell.name for cell in (*cells.all_cells(), *cells.more_cells())}
    for cell in (*cells.all_cells(), *cells.more_cells()):
        require(cell, found[cell.name])


def test_the_record_says_of_nearly_all_and_the_page_shows_it() -> None:
    """At most a tenth may be unknown; what is known is proven, or refused where it must be."""
    recorded = verdicts.read()
    page = verdicts.PAGE.read_text(encoding="utf-8")
    assert verdicts.written_into(page, recorded) == page
    told = [
        (verdicts.verdict(cell, recorded["cells"].get(cell.name, {}), action), cell, action)
        for cell in (*cells.all_cells(), *cells.more_cells())
        for action in cells.ACTIONS
    ]
    assert [(cell.name, action) for word, cell, action in told if word == "wrong"] == []
    assert sum(word == "unknown" for word, _, _ in told) <= len(cells.all_cells()) * len(cells.ACTIONS) / 10
    for word, cell, action in told:
        assert word == "unknown" or (word == "refused") is (action in verdicts.must_refuse(cell)), (cell.name, action)


def test_a_verdict_sees_what_is_wrong() -> None:
    """Each planted fault is named: an engine that fell back to plain DDP, whole states, another loss."""
    cell = Cell("sft", "full", "zero3")
    sound = verdicts.read()["cells"][cell.name]
    assert verdicts.faults(cell, sound, "train") == []

    def with_rank(**changes: Any) -> dict[str, Any]:
        ranks = [{**sound["train"]["ranks"][0], **changes}, sound["train"]["ranks"][1]]
        return {**sound, "train": {**sound["train"], "ranks": ranks}}

    rank = sound["train"]["ranks"][0]
    planted = {
        "stage 0": with_rank(stage=0),
        "MULTI_CPU": with_rank(distributed="MULTI_CPU"),
        "optimizer states": with_rank(states=2 * rank["states"]),
        "100% of the weights": with_rank(weights=rank["weights_whole"]),
        "loss differs": {**sound, "train": {**sound["train"], "loss": 2e-5}},
        "grad_norm differs": {**sound, "train": {**sound["train"], "grad_norm": float("nan")}},
    }
    for text, result in planted.items():
        (line,) = verdicts.faults(cell, result, "train")
        assert text in line
    assert verdicts.faults(cell, {**sound, "save": {"weights": 0.0, "files": []}}, "save") == [
        "no weights were published"
    ]
    began_anew = {**sound["resume"], "resumed": False}
    assert verdicts.faults(cell, {**sound, "resume": began_anew}, "resume") == ["it began anew"]


@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_a_verdict_in_bfloat16_has_limits_too(algorithm: str) -> None:
    cell = Cell(algorithm, "full", "zero3", compute="bfloat16", weights="bfloat16")
    sound = verdicts.read()["cells"][cell.name]
    planted = (
        ("train", "loss", 0.06, "loss differs by 0.06"), ("save", "weights", 0.03, "weights differ by 0.03"),
        ("export", "weights", 0.006, "the shares differ from the saved model by 0.006"),
        ("resume", "weights", 2e-6, "weights differ by 2e-06"), ("resume", "code", 1, "exit code 1: "),
    )  # fmt: skip
    for action, key, value, said in planted:
        assert verdicts.faults(cell, sound, action) == []
        assert verdicts.faults(cell, {**sound, action: {**sound[action], key: value}}, action) == [said]


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("sharding", ["none", "zero2"])
def test_forked_ranks_get_the_environment_of_a_launch(sharding: str, root: Path, tmp_path: Path) -> None:
    """What the launcher's own processes see, by their own word."""
    cells.world(tmp_path)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(yaml.safe_dump(cells.recipe(Cell("sft", "full", sharding), tmp_path, processes=2, per_device=2)))
    spec = planning.prepare(load_recipe(recipe), "cell", runs=tmp_path, run="r", recipe_path=recipe).spec
    script = tmp_path / "rank.py"
    script.write_text(
        "import json, os, pathlib\n"
        f"pathlib.Path({str(tmp_path)!r}, 'rank-' + os.environ['RANK']).write_text(json.dumps(dict(os.environ)))\n"
    )
    from alignment.pipeline import launch

    argv = launch.command(spec, tmp_path / "stage.yaml")
    at = argv.index("alignment.train")
    environment = {**os.environ, **launch.settings(spec)}
    subprocess.run([*argv[: at - 1], str(script)], env=environment, check=True, timeout=300, cwd=root)
    shared = forks.environment(spec, tmp_path / "stage.yaml")
    for rank in ("0", "1"):
        real = json.loads((tmp_path / f"rank-{rank}").read_text())
        told = {key: value for key, value in real.items() if key.startswith(("ACCELERATE_", "DS_", "OMP_"))}
        ours = {key: value for key, value in shared.items() if key.startswith(("ACCELERATE_", "DS_", "OMP_"))}
        assert told == ours
        assert (real["RANK"], real["WORLD_SIZE"]) == (rank, "2")
