"""The sharding matrix, measured: every combination on two real ranks.

    python tests/sharding/matrix.py --folder /tmp/matrix --record            all of it, into the page and its JSON
    python tests/sharding/matrix.py --folder /tmp/matrix --only 'dpo-*'      some of it

A combination is trained for 10 steps on two ranks, compared with one process, published and read back; then brought
back to its checkpoint of step 5 and resumed, once on two ranks and once on one. See `recipes/sharding.md`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read once, when deepspeed is imported
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cells
import forks
import verdicts
import witness
import yaml
from cells import MIDDLE, ROWS, Cell

from alignment.errors import ChainError, RecipeError
from alignment.pipeline import plan as planning
from alignment.pipeline import runs as files
from alignment.recipe.load import load_recipe


def warm() -> None:
    """Import what workers need, in the process that they are forked from."""
    import deepspeed  # noqa: F401
    import torch

    torch.set_num_threads(1)
    import trl  # noqa: F401

    import alignment.training.builders
    import alignment.training.ppo
    import alignment.training.worker  # noqa: F401


class Bench:
    """A folder with models, rows and runs."""

    def __init__(self, folder: Path):
        self.folder, self.runs, self.seen = folder, folder / "runs", folder / "seen"
        self.single: dict[str, Path] = {}
        cells.world(folder)

    def run(
        self, cell: Cell, *, processes: int = 2, per_device: int = 2, name: str = "", pairs: int | None = None
    ) -> tuple[int, Path, Any]:
        """Train (or go on with) a cell; exit code, stage folder, and what its ranks said."""
        content = cells.recipe(cell, self.folder, processes=processes, per_device=per_device)
        run = name or content["name"]
        path = self.folder / f"{run}.yaml"
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        plan = planning.prepare(load_recipe(path), "cell", runs=self.runs, run=run, recipe_path=path)
        if plan.status == "changed":
            raise ChainError("; ".join(plan.difference))
        assert plan.status in ("fresh", "resume"), plan.status
        code = forks.launch(plan.spec, witness.inside(self.seen, pairs))
        said = [json.loads(file.read_text()) for file in sorted(self.seen.glob(f"{run}-{plan.spec.attempt}-*.json"))]
        return code, plan.spec.output, said

    def alone(self, cell: Cell) -> Path:
        """The same training in one process, without DeepSpeed, in one backward pass per step.

        kto's loss is a mean over what all ranks pass forward at once: here the 4 rows of 2 ranks, paired by 2.
        """
        plain = replace(cell, sharding="none")
        if plain.name not in self.single:
            alone: dict[str, int] = {"per_device": 4, "pairs": 2} if cell.algorithm == "kto" else {"per_device": ROWS}
            code, stage, _ = self.run(plain, processes=1, **alone)
            assert code == 0, tail(stage)
            self.single[plain.name] = stage
        return self.single[plain.name]


def tail(stage: Path, lines: int = 12) -> str:
    """The end of what a launch printed."""
    return "\n".join((stage / "output.log").read_text().splitlines()[-lines:])


def log(stage: Path) -> list[dict[str, float]]:
    """The lines of training steps."""
    lines = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def weights(stage: Path) -> dict[str, Any]:
    """The published tensors, a critic's included; not the unused copies that PEFT keeps beside whole modules."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted([*stage.glob("*.safetensors"), *stage.glob("critic/*.safetensors")]):
        found |= {f"{path.relative_to(stage)}:{key}": value.float() for key, value in load_file(path).items()}
    return {key: value for key, value in found.items() if ".original_module." not in key}


def distance(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """The largest difference of a weight; infinite where names or shapes differ."""
    shapes = [{key: value.shape for key, value in tensors.items()} for tensors in (ours, theirs)]
    if shapes[0] != shapes[1]:
        return float("inf")
    return max(float((value - theirs[key]).abs().max()) for key, value in ours.items())


def apart(ours: list[dict[str, float]], theirs: list[dict[str, float]], key: str) -> float:
    """The largest relative difference of a logged number over the steps."""
    if [line["step"] for line in ours] != [line["step"] for line in theirs]:
        return float("inf")
    pairs = [(a[key], b[key]) for a, b in zip(ours, theirs, strict=True)]
    return max(abs(a - b) / max(1.0, abs(b)) for a, b in pairs)


def back_to_the_middle(stage: Path) -> None:
    """Leave of a finished stage what a killed one would have left after its first checkpoint."""
    for path in stage.iterdir():
        if path.name not in ("stage.yaml", "prepared", "log.jsonl", f"checkpoint-{MIDDLE}"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def measure(bench: Bench, cell: Cell) -> dict[str, Any]:
    """One row of the table."""
    started = time.monotonic()
    result: dict[str, Any] = {}
    try:
        code, stage, said = bench.run(cell)
    except RecipeError as refused:
        line = str(refused).replace(str(bench.folder), "...")
        return {action: {"code": int(refused.code), "refused": line} for action in verdicts.asked(cell)}
    if code:
        return {"train": {"code": code, "said": tail(stage)}}
    alone = bench.alone(cell)
    result["train"] = {
        "code": code, "ranks": said,
        "loss": apart(log(stage), log(alone), "loss"), "grad_norm": apart(log(stage), log(alone), "grad_norm"),
    }  # fmt: skip
    trained, lines = weights(stage), log(stage)
    manifest = files.read_manifest(stage) or {}
    result["save"] = {"weights": distance(trained, weights(alone)), "files": sorted(manifest["files"])}
    kept = stage.with_name("kept")
    back_to_the_middle(stage)
    shutil.copytree(stage, kept)
    if cell.sharding == "none":
        result["accumulate"] = accumulated(bench, cell, alone)
    else:
        result["export"] = exported(bench, cell, kept / f"checkpoint-{MIDDLE}")
    for action, processes in (("resume", 2), ("other_ranks", 1)):
        shutil.rmtree(stage)
        shutil.copytree(kept, stage)
        try:
            code, stage, _ = bench.run(cell, processes=processes, name=stage.parent.name)
        except ChainError as refused:
            result[action] = {"code": int(refused.code), "refused": str(refused).replace(str(bench.folder), "...")}
            continue
        result[action] = {"code": code, "resumed": "resuming from" in (stage / "output.log").read_text()}
        if code:
            result[action]["said"] = tail(stage)
        else:
            result[action] |= {"weights": distance(weights(stage), trained), "loss": apart(log(stage), lines, "loss")}
    result["seconds"] = round(time.monotonic() - started, 1)
    return result


def accumulated(bench: Bench, cell: Cell, alone: Path) -> dict[str, float]:
    """One process, 8 passes of a row each, against one pass of 8 rows; kto, whose loss depends on it, 4 of 2."""
    code, stage, _ = bench.run(cell, processes=1, per_device=2 if cell.algorithm == "kto" else 1)
    assert code == 0, tail(stage)
    return {key: apart(log(stage), log(alone), key) for key in ("loss", "grad_norm")}


def exported(bench: Bench, cell: Cell, checkpoint: Path) -> dict[str, float]:
    """A checkpoint's shares as a model, against the model that the checkpoint holds beside them."""
    from alignment.serving.consolidate import export_checkpoint
    from alignment.serving.export import export

    folder = bench.folder / "exported" / cell.name
    folder.mkdir(parents=True)
    shares, saved = (weights(make(checkpoint, folder / make.__name__)) for make in (export_checkpoint, export))
    return {"weights": distance(shares, saved)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="cells by name, or patterns such as sft-*")
    parser.add_argument("--folder", type=Path, required=True, help="where models, rows and runs go; must not exist")
    parser.add_argument("--out", type=Path, help="a JSON file for what was found")
    parser.add_argument("--record", action="store_true", help="write it into ds_configs/ and recipes/ too")
    arguments = parser.parse_args()
    warm()
    bench = Bench(arguments.folder)
    found: dict[str, Any] = {}
    wrong = 0
    for cell in (*cells.all_cells(), *cells.more_cells()):
        if not any(fnmatch(cell.name, name) for name in arguments.only):
            continue
        try:
            found[cell.name] = measure(bench, cell)
        except Exception as error:
            traceback.print_exc()
            found[cell.name] = {"error": str(error)[-2000:]}
        told = {action: verdicts.verdict(cell, found[cell.name], action) for action in verdicts.asked(cell)}
        for action in [action for action, word in told.items() if word == "wrong"]:
            wrong += 1
            print(f"{cell.name} {action}: {verdicts.faults(cell, found[cell.name], action)}", flush=True)
        print(cell.name, " ".join(told.values()), found[cell.name].get("seconds"), flush=True)
        if arguments.out:
            forks.write(arguments.out, found)
        if arguments.record:
            from alignment.training.publish import versions

            verdicts.record(found, versions())
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
