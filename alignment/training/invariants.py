"""The checks that every training run makes before and at its first step, one function for each row of the table.

Each has been wrong in a published trainer while its loss curve looked normal. A check either holds, or cannot hold for
this combination (`Skip`, with the reason), or yields what it found. The worker adds one callback, `FirstBatch`; a run
that was resumed is checked again, but for what is true of unchanged weights only.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.errors import UserError
from alignment.pipeline import runs
from alignment.pipeline.files import read_json
from alignment.recipe.algorithms import POLICY_AND_REFERENCE
from alignment.recipe.invariants import INVARIANTS, SKIPPABLE
from alignment.training import pass_checks, probe, weight_checks
from alignment.training.context import Context
from alignment.training.subject import Skip, Subject

RECORD = "checks.json"  # in the stage's folder, until the manifest holds it
Check = Callable[[Subject], Iterator[str]]

CHECKS: dict[str, Check] = {
    "embeddings": weight_checks.embeddings,
    "unused-rows": weight_checks.unused_rows,
    "trained-tokens": weight_checks.trained_tokens,
    "trainable": weight_checks.trainable,
    "precision": weight_checks.precision,
    "dropout": pass_checks.dropout,
    "padding": pass_checks.padding,
    "row-alone": pass_checks.row_alone,
    "accumulation": pass_checks.accumulation,
    "reference": pass_checks.reference,
    "stage": weight_checks.stage,
    "first-loss": pass_checks.first_loss,
    "gradients": pass_checks.gradients,
    "optimizer": pass_checks.optimizer,
}


class InvariantError(UserError):
    """The run would train something else than it says."""


@dataclass
class Outcome:
    """What the checks of a run came to; `skipped` and `broken` hold a text for each name."""

    passed: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)


# --- running them -----------------------------------------------------------------------------------------------------


def applies(name: str, ctx: Context) -> bool:
    """Whether a check is about this algorithm at all."""
    row = INVARIANTS[name]
    online = ctx.row.schema == "prompts"
    if name == "reference":
        return ctx.row.roles == POLICY_AND_REFERENCE and not online
    if name == "stage":
        return ctx.row.publishes == "causal-lm" and ctx.start is not None
    if name == "trained-tokens":
        return ctx.row.publishes == "causal-lm" and not online
    return row.kind == "all" or (row.kind == "online") == online


def look(subject: Subject, wanted: list[str], outcome: Outcome) -> None:
    """Make some checks and add to the outcome."""
    for name in wanted:
        note(name, CHECKS[name], subject, outcome)


def note(name: str, check: Check, subject: Subject, outcome: Outcome) -> None:
    """Make one check and add to the outcome."""
    try:
        found = list(check(subject))
    except Skip as reason:
        outcome.skipped[name] = str(reason)
        return
    if found:
        outcome.broken[name] = f"{'; '.join(found)}. Usual causes: {INVARIANTS[name].cause}"
    else:
        outcome.passed.append(name)


def require(outcome: Outcome) -> None:
    """Stop if a check did not hold.

    Raises:
        InvariantError: one line for each.
    """
    if outcome.broken:
        lines = "".join(f"\n  - {name}: {text}" for name, text in outcome.broken.items())
        off = ", ".join(name for name in outcome.broken if name in SKIPPABLE)
        hint = f"\n  (where you know better: skip_checks: [{off}] in the stage)" if off else ""
        raise InvariantError(f"the run would not train what it says:{lines}{hint}")


class FirstBatch(TrainerCallback):
    """Makes the checks before the first step, at it and after it; says and records what they came to."""

    def __init__(self, ctx: Context, trainer: Trainer, say: Callable[[str], None], *, count: int = 2):
        self.subject, self.say = Subject(ctx, trainer, count=count), say
        self.outcome = Outcome()
        self.hooks: list[Any] = []
        self.seconds = 0.0
        self.off = [name for name in ctx.spec.config.skip_checks if applies(name, ctx)]

    def _look(self, when: str, *wanted: str) -> None:
        """Make the checks of one moment that are wanted, and stop if one does not hold."""
        started = time.monotonic()
        chosen = [
            name for name, row in INVARIANTS.items()
            if row.when == when and name not in self.off and applies(name, self.subject.ctx)
            and (not wanted or name in wanted)
        ]  # fmt: skip
        look(self.subject, chosen, self.outcome)
        self.seconds += time.monotonic() - started
        for note in self.subject.notes:
            self.say(f"  {note}")
        self.subject.notes.clear()
        require(self.outcome)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the first step: everything that costs no step."""
        with probe.untouched(self.subject.trainer):
            self._look("start")
        if state.global_step == 0 and not args.torch_compile:
            self._listen()
        self._record()

    def _listen(self) -> None:
        """Note which trained weights a gradient reaches: an engine takes gradients away before a callback is called."""
        for name, parameter in self.subject.trainer.model.named_parameters():
            if parameter.requires_grad:
                self.hooks.append(parameter.register_hook(self._heard(name)))

    def _heard(self, name: str) -> Callable[[torch.Tensor], None]:
        def note(gradient: torch.Tensor) -> None:
            self.subject.received.add(name)
            self.subject.seen_dtypes.add(gradient.dtype)

        return note

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the weights change for the first time."""
        if state.global_step > 0 or not self.hooks:
            return
        for hook in self.hooks:
            hook.remove()
        self.hooks.clear()
        self._look("first step", "first-loss", "gradients")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the first update: what the optimizer keeps."""
        if state.global_step == 1 and "optimizer" not in self.outcome.passed:
            self._look("first step", "optimizer")
            self._record()
            self._tell()

    def _record(self) -> None:
        """Write what holds; a check that a resumed run cannot repeat keeps the word of the run before it."""
        spec, outcome = self.subject.ctx.spec, self.outcome
        path = spec.output / RECORD
        fresh = self.subject.trainer.state.global_step <= 1
        before = None if fresh else read_json(path, schema=1, error=UserError)
        earlier = [name for name in (before or {}).get("passed", ()) if name not in outcome.passed]
        record = {
            "schema": 1,
            "passed": [*outcome.passed, *earlier],
            "skipped": {name: why for name, why in outcome.skipped.items() if name not in earlier},
            "off": self.off,
            "seconds": round(self.seconds, 2),
        }
        if self.subject.trainer.state.is_world_process_zero:
            runs.write_json(path, record)

    def _tell(self) -> None:
        self.say(f"  checks     {len(self.outcome.passed)} hold, in {self.seconds:.1f} s")
        for name, why in self.outcome.skipped.items():
            self.say(f"  skipped    {name}: {why}")
        for name in self.off:
            self.say(f"  skipped    {name}: skip_checks names it")


def recorded(stage: Path) -> dict[str, Any] | None:
    """What the checks of a stage came to, for its manifest."""
    record = read_json(stage / RECORD, schema=1, error=UserError)
    return None if record is None else {key: value for key, value in record.items() if key != "schema"}
