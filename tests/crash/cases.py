"""What the crash test runs: every algorithm, full and LoRA, alone and on two ranks, and the whole chain.

Made from `recipes/tiny/chain.yaml`, with what makes a resume hard: dropout, accumulation, several epochs, a log that is
not in step with the checkpoints, evaluation in between.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"}
ALGORITHMS = ("pretrain", "sft", "reward", "dpo", "kto", "ppo")
LAUNCHES = ("one", "ddp", "zero2", "zero3")
PARENT = {"sft": "base", "reward": "sft", "dpo": "sft", "kto": "sft", "ppo": "sft"}
STEPS = 6


def chain(rows: Path) -> dict[str, Any]:
    """The whole chain as one recipe: `recipes/tiny/chain.yaml` and a DPO stage, a checkpoint every two steps.

    `rows` takes the first rows of each data file: reading twelve thousand would be most of an attempt.
    """
    recipe: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "tiny" / "chain.yaml").read_text(encoding="utf-8"))
    recipe |= {"name": "chain", "seed": 11, "checkpoints": {"every": 2, "keep": 2}}
    stages = recipe["stages"]
    stages["base"]["model"]["init"]["config"]["attention_dropout"] = 0.1
    dpo = {key: stages["kto"][key] for key in ("model", "data", "batch")} | {
        "algorithm": "dpo", "train": stages["kto"]["train"] | {"learning_rate": 1.0e-3},
    }  # fmt: skip
    evaluate = stages.pop("evaluate")
    recipe["stages"] = stages | {"dpo": dpo, "evaluate": evaluate | {"models": ["stage:sft", "stage:dpo", "stage:ppo"]}}
    for stage in recipe["stages"].values():
        for source in _sources(stage):
            source["path"] = str(_first(ROOT / source["path"], rows, source["rows"]))
        for reward in stage.get("rewards", ()):
            if "function" in reward:
                reward["function"] = str(ROOT / reward["function"])
        if "train" in stage:
            stage["train"] |= {"max_steps": 4, "logging_steps": 1}
            stage["data"]["limits"] = {
                "leak": None,
                "duplicate": None,
                "contaminated": None,
            }  # few rows of a small world
    return recipe


def _first(file: Path, folder: Path, count: int) -> Path:
    """A file with the first rows of another, made once."""
    target = folder / f"{count}-{file.name}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        lines = file.read_text(encoding="utf-8").splitlines(keepends=True)[:count]
        target.write_text("".join(lines), encoding="utf-8")
    return target


def _sources(stage: dict[str, Any]) -> list[dict[str, Any]]:
    data = stage.get("data", {})
    return [*data.get("train", ()), *data.get("eval", ()), *stage.get("prompts", ()), *stage.get("pairs", ())]


def one(name: str, parents: Path, rows: Path) -> dict[str, Any]:
    """A recipe of one stage: `sft`, `dpo-lora`, `ppo-lora-zero3`; its parents are finished stages in `parents`."""
    algorithm, *how = name.split("-")
    recipe = chain(rows)
    stage = recipe["stages"]["base" if algorithm == "pretrain" else algorithm]
    if algorithm in PARENT:
        stage["model"] = str(parents / PARENT[algorithm])
    train = {"max_steps": STEPS, "logging_steps": 3 if algorithm in ("sft", "dpo") else 1}
    if algorithm == "sft":
        train |= {"eval_steps": 3}
    if algorithm in ("reward", "kto"):
        stage["data"]["train"][0]["rows"] = 20  # the steps cross the ends of epochs
    if algorithm == "ppo":
        stage["rewards"] = [
            {"name": "scorer", "model": str(parents / "reward")}, {"name": "ends", "regex": "[.!?]$", "weight": 0.5},
        ]  # fmt: skip
        train |= {"max_steps": 4}
    if "lora" in how:
        stage["peft"] = LORA
    if "sync" in how:
        train |= {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    stage["train"] |= train
    stage["batch"] = {"global": 8, "per_device": 2 if "one" not in how and len(set(LAUNCHES) & set(how)) else 4}
    launch = next((word for word in how if word in LAUNCHES), "one")
    recipe |= {"name": "stage", "stages": {algorithm: stage}}
    if launch != "one":
        recipe["launch"] = {"processes": 2}
    if launch.startswith("zero"):
        recipe["launch"]["deepspeed"] = str(ROOT / "ds_configs" / f"{launch}.json")
    return recipe


def names(launches: tuple[str, ...]) -> list[str]:
    """All that a stage can be: algorithm, full or LoRA (not `pretrain`), launch."""
    kinds = [*ALGORITHMS, *(f"{algorithm}-lora" for algorithm in ALGORITHMS if algorithm != "pretrain")]
    found = [f"{kind}-{launch}" for launch in launches for kind in kinds]
    return found + (["dpo-sync-one"] if "one" in launches else [])
