"""Keys of `train:` that must fit each other, whatever the algorithm: what the Trainer refuses late or in silence.

Source: transformers/training_args.py `_validate_args`, transformers/optimization.py.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from alignment.recipe.schema import Stage

# Schedulers that do not start without arguments in `lr_scheduler_kwargs`: one of the names.
SCHEDULER_ARGUMENTS = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
SCHEDULERS_THAT_WATCH = ("reduce_lr_on_plateau", "greedy")  # they act on the evaluations


def schedule_problems(stage: Stage, train: Mapping[str, Any], given: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield (key, what is wrong and what to do).

    Args:
        stage: the resolved stage; its data and checkpoints count.
        train: all arguments of the trainer, upstream's defaults included.
        given: the keys that the recipe itself sets.
    """
    assert stage.checkpoints is not None
    every = stage.checkpoints.every
    has_data = stage.data is not None and bool(stage.data.eval or stage.data.eval_fraction)
    strategy = train["eval_strategy"]
    if strategy == "no" and "eval_strategy" not in given and every == "epoch" and has_data:
        strategy = "epoch"  # what the worker makes of it
    if stage.data is not None and not has_data:
        for key, off in (("eval_strategy", "no"), ("eval_on_start", False)):
            if train[key] != off:
                yield key, "needs rows to evaluate on; give `data.eval` or `data.eval_fraction`"
    if "eval_steps" in given and strategy != "steps":
        yield "eval_steps", "is not read; set `eval_strategy: steps`, or remove it"
    for key in ("logging_steps", "eval_steps"):
        if train[key] is not None and train[key] > 1 and train[key] != int(train[key]):
            yield key, "above 1 must be a whole number of steps; below 1 it is a share of all steps"
    if train["dataloader_prefetch_factor"] is not None and not train["dataloader_num_workers"]:
        yield "dataloader_prefetch_factor", "needs workers; set `dataloader_num_workers`, or remove it"
    scheduler, arguments = train["lr_scheduler_type"], train["lr_scheduler_kwargs"] or {}
    wanted = SCHEDULER_ARGUMENTS.get(scheduler, ())
    if wanted and not any(name in arguments for name in wanted):
        yield "lr_scheduler_type", f"needs `lr_scheduler_kwargs` with {' or '.join(wanted)}"
    if scheduler in SCHEDULERS_THAT_WATCH and strategy == "no":
        yield "lr_scheduler_type", f"{scheduler} follows the evaluations; set `eval_strategy`"
    if train["load_best_model_at_end"]:
        reason = _no_best_checkpoint(every, strategy, train)
        if reason:
            yield "load_best_model_at_end", reason


def _no_best_checkpoint(every: int | str, strategy: str, train: Mapping[str, Any]) -> str | None:
    """Why no checkpoint would stand at the best evaluation; None where one does."""
    if strategy == "no":
        return "needs evaluations to compare; set `eval_strategy`"
    if (strategy == "epoch") != (every == "epoch"):
        wanted = "epoch" if strategy == "epoch" else "a number of steps"
        return f"needs a checkpoint at each evaluation; set `checkpoints.every: {wanted}`"
    steps = train["eval_steps"] or train["logging_steps"]  # upstream's rule
    if isinstance(every, int) and (steps < 1 or every % steps):
        return (
            f"needs an evaluation at each checkpoint: `checkpoints.every` is {every}, and evaluations come every "
            f"{steps:g} steps; make the first a multiple of `eval_steps`"
        )
    return None
