"""The upstream arguments of a stage: the recipe's `train:` plus everything the recipe owns elsewhere.

This is the one place where a recipe meets upstream's config class; the planner checked the keys against its source,
the class checks them again here.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import torch
from transformers import TrainingArguments

from alignment.errors import RecipeError
from alignment.pipeline.plan import StageSpec
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import full_train
from alignment.recipe.schema import Stage

# Upstream's fields that this toolkit always decides. Which recipe key each belongs to: `algorithms.OWNED`.
ALWAYS: dict[str, Any] = {
    "remove_unused_columns": True,
    "disable_tqdm": True,  # our own progress line
    "logging_nan_inf_filter": False,  # upstream's default logs a NaN loss as 0.0
    "save_total_limit": None,  # our own rotation, after sealing
    "push_to_hub": False,
    "dataloader_pin_memory": torch.cuda.is_available(),
}
# ... and those that exist only in some of TRL's classes.
WHERE_PRESENT: dict[str, Any] = {"shuffle_dataset": False, "dataset_num_proc": None}


def resolve_import(path: str) -> Any:
    """The object behind `package.module:name`."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def world_size() -> int:
    """Processes of this launch, from the launcher's environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def accumulation(stage: Stage, processes: int) -> int:
    """Forward passes per optimizer step and process, so that a step sees `batch.global` rows.

    Raises:
        RecipeError: the global batch cannot be divided so.
    """
    per_step = stage.batch.per_device * processes
    steps, rest = divmod(stage.batch.global_, per_step)
    if rest or not steps:
        nearest = sorted({max(1, steps) * per_step, (steps + 1) * per_step})
        raise RecipeError(
            f"batch.global: {stage.batch.global_} rows cannot be split over {processes} processes x "
            f"{stage.batch.per_device} rows (batch.per_device); the nearest legal values are "
            f"{' and '.join(map(str, nearest))}"
        )
    return steps


def build_arguments(spec: StageSpec, *, compute: torch.dtype, has_eval: bool) -> TrainingArguments:
    """The instance of the row's config class for this stage and this world size.

    Making it sets up the process group and DeepSpeed, so it comes before the model is loaded.

    Raises:
        RecipeError: the class refuses a value.
    """
    stage = spec.config
    row = ALGORITHMS[stage.algorithm]
    assert row.config is not None
    config = resolve_import(row.config)
    values = full_train(stage) | ALWAYS | _owned(spec, compute)
    values |= {key: value for key, value in WHERE_PRESENT.items() if key in config.__dataclass_fields__}
    if not has_eval:
        values["eval_strategy"] = "no"
    elif "eval_strategy" not in stage.train:
        values["eval_strategy"] = "epoch" if stage.checkpoints.every == "epoch" else "no"
    known = {key: value for key, value in values.items() if key in config.__dataclass_fields__}
    try:
        return config(**known)
    except (ValueError, TypeError) as error:
        raise RecipeError(f"stages.{spec.stage}.train: {' '.join(str(error).split())}") from error


def _owned(spec: StageSpec, compute: torch.dtype) -> dict[str, Any]:
    """The fields that follow from other sections of the recipe."""
    stage, processes = spec.config, world_size()
    by_epoch = stage.checkpoints.every == "epoch"
    on_cpu = not torch.cuda.is_available()
    sharded = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    owned = {
        "output_dir": str(spec.output),
        "seed": stage.seed,
        "data_seed": stage.seed,
        "per_device_train_batch_size": stage.batch.per_device,
        "per_device_eval_batch_size": stage.batch.per_device_eval or stage.batch.per_device,
        "gradient_accumulation_steps": accumulation(stage, processes),
        "bf16": compute == torch.bfloat16,
        "fp16": False,
        "save_strategy": "epoch" if by_epoch else "steps",
        "save_steps": 500 if by_epoch else stage.checkpoints.every,
        "report_to": list(stage.report_to or []) or "none",
        "run_name": f"{spec.run}/{spec.stage}",
    }
    if "ddp_timeout" not in stage.train:  # ours speaks first: a collective's only says that it waited
        owned["ddp_timeout"] = max(1800, stage.launch.timeout + 600)
    if on_cpu:
        # `use_cpu` would silently turn DeepSpeed into plain DDP, so a sharded run says gloo and nothing else.
        owned |= {"ddp_backend": "gloo"} if processes > 1 or sharded else {}
        owned["use_cpu"] = not sharded
    return owned


def is_main() -> bool:
    """Is this the process that writes (global rank 0)?"""
    return int(os.environ.get("RANK", "0")) == 0


def token_cache(spec: StageSpec) -> Path:
    """Where tokenised rows are kept, shared by all runs of a `runs/` folder."""
    return spec.runs / ".cache"
