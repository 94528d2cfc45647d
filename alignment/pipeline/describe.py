"""A plan in words: for each stage where its settings come from, what stands in memory, and how it is started."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

from alignment.pipeline import chains
from alignment.pipeline.plan import StagePlan
from alignment.recipe.algorithms import ALGORITHMS, Algorithm
from alignment.recipe.load import full_train
from alignment.recipe.schema import Recipe, Section, Stage

MATTERS = (
    "learning_rate", "beta", "label_smoothing", "num_train_epochs", "max_steps", "max_length", "lr_scheduler_type",
    "warmup_steps", "weight_decay", "max_grad_norm", "optim",
)  # fmt: skip
_INHERITED = ("seed", "precision", "chat_template", "launch", "checkpoints", "report_to")
_MEANING = {
    "fresh": "to run",
    "resume": "unfinished: goes on from its newest sealed checkpoint",
    "done": "done",
    "changed": "changed",
    "waiting": "to run",
}
_FIRST = ("win_rate", "gold", "accuracy", "eval_loss", "eval_accuracy", "eval_rewards/accuracies", "loss")


def title(recipe: Recipe, name: str) -> str:
    """`[2/5] sft (sft on stage:base)`."""
    names = list(recipe.stages)
    stage = recipe.stages[name]
    row = ALGORITHMS[stage.algorithm]
    on = f" on {source(stage if stage.model else recipe)}" if "model" in row.sections else ""
    return f"[{names.index(name) + 1}/{len(names)}] {name} ({stage.algorithm}{on})"


def status(plan: StagePlan) -> str:
    """A stage's status in words."""
    after = f", after {' and '.join(plan.waiting_for)}" if plan.status == "waiting" else ""
    return _MEANING[plan.status] + after


def details(recipe: Recipe, plan: StagePlan) -> list[str]:
    """What is decided for one stage: models, trainer keys, batch, what is inherited and overridden."""
    stage = plan.spec.config
    row = ALGORITHMS[stage.algorithm]
    entries = {"models": ", ".join(f"{role.name} ({_trained(role.trained)})" for role in row.roles)}
    if row.config is not None:
        entries |= {"train": _train(stage, row), "batch": _batch(stage)}
    inherited, overridden = _origins(recipe, recipe.stages[plan.spec.stage], row)
    entries |= {"inherits": ", ".join(inherited), "overrides": ", ".join(overridden)}
    lines = [line for label, text in entries.items() if text for line in _entry(label, text)]
    lines += [line for hook in hooks(stage) for line in _entry("runs code", hook)]
    lines += [line for caution in chains.cautions(recipe, plan.spec.stage) for line in _entry("note", caution)]
    lines += [line for change in plan.spec.forced for line in _entry("allowed", change)]
    return lines + [f"  {key} not hashed yet" for key in plan.unhashed if not key.startswith("parents.")]


def hooks(stage: Stage) -> list[str]:
    """The Python of the user's that a stage imports and runs with all rights of its process, and by which key."""
    named = [(f"rewards.{reward.name}", reward.function) for reward in stage.rewards if reward.function is not None]
    named += [(f"data.augment[{index}]", hook) for index, hook in enumerate(stage.data.augment if stage.data else ())]
    return [f"{hook} (plain Python, unrestricted; {key})" for key, hook in named]


def _entry(label: str, text: str) -> list[str]:
    """A label and its text, wrapped under itself at 110 columns."""
    wrapped = textwrap.wrap(text, 97, break_on_hyphens=False)
    return [f"  {label if not number else '':<10} {line}" for number, line in enumerate(wrapped)]


def key_metrics(metrics: Mapping[str, Any], limit: int = 4) -> str:
    """The metrics that tell most, `eval_loss 1.23, eval_accuracy 0.71`."""
    shown = [key for first in _FIRST for key in metrics if key == first or key.startswith(f"{first}/")]
    shown = [key for key in shown if isinstance(metrics[key], (int, float))]
    return ", ".join(f"{key} {metrics[key]:.4g}" for key in shown[:limit])


def duration(seconds: float) -> str:
    """`45 s`, `12 min 5 s`, `3 h 20 min`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def table(rows: list[list[str]]) -> list[str]:
    """Rows as aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def source(holder: Stage | Recipe) -> str:
    """Where weights come from: `stage:sft`, a path, or `random weights`."""
    model = holder.model
    if model is None:
        return "nothing"
    if model.stage is not None:
        return f"stage:{model.stage}"
    return model.path if model.path is not None else "random weights"


def _trained(trained: bool) -> str:
    return "trained" if trained else "frozen"


def _train(stage: Stage, row: Algorithm) -> str:
    """The keys that matter; one that the recipe does not set is marked."""
    train = full_train(stage)
    parts = []
    ignored = "max_steps" if train.get("max_steps", -1) <= 0 else "num_train_epochs"
    for key in dict.fromkeys((*MATTERS, *stage.train)):
        if train.get(key) is not None and key != ignored:
            parts.append(f"{key} {train[key]}{'' if key in stage.train or key in row.fixed else ' (default)'}")
    return ", ".join(parts)


def _batch(stage: Stage) -> str:
    batch = stage.batch
    assert stage.launch is not None
    if stage.launch.accelerate is not None:
        return f"{batch.global_} rows per step, {batch.per_device} per forward pass"
    per_step = batch.per_device * stage.launch.processes
    accumulated = max(1, batch.global_ // per_step)
    return (
        f"{batch.global_} rows per step = {stage.launch.processes} x {batch.per_device} x {accumulated} "
        "(processes x per_device x accumulation)"
    )


def _origins(recipe: Recipe, stage: Stage, row: Algorithm) -> tuple[list[str], list[str]]:
    """What the recipe decides for a stage, and what the stage decides against it."""
    inherited, overridden = [], []
    for key in _INHERITED:
        own, general = getattr(stage, key), getattr(recipe, key)
        if key not in row.sections | {"seed", "launch"}:
            continue
        if own is None:
            inherited += [f"{key} {_brief(key, general)}"] if general not in (None, []) else []
        elif general is not None and own != general and key in recipe.model_fields_set | {"seed"}:
            overridden.append(f"{key} {_brief(key, own)} (recipe: {_brief(key, general)})")
    return inherited, overridden


def _brief(key: str, value: Any) -> str:
    if isinstance(value, Section):
        content = value.model_dump(by_alias=True, exclude_none=True, exclude={"slurm"})
        return " ".join(f"{name}={item}" for name, item in content.items() if item not in ({}, None))
    return ", ".join(value) if isinstance(value, list) else str(value)
