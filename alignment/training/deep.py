"""`alignment check RECIPE --deep`: the checks that cost steps, on the real models and rows, without touching a run.

Each stage that learns from rows is built as its run would build it, but in this one process, without DeepSpeed, and in
a folder that is removed: all checks of the first batch on more rows, a step at learning rate 0 after which every weight
must be what it was, the gradient of a batch cut in two ways, and the start against its stage's folder loaded afresh.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from alignment.errors import UserError
from alignment.models.load import compute_dtype, load_policy
from alignment.pipeline import plan as planning
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import batch_dependent
from alignment.recipe.schema import Launch, Recipe
from alignment.training import invariants, probe
from alignment.training.context import Context
from alignment.training.invariants import Outcome
from alignment.training.pass_checks import declared
from alignment.training.subject import Skip, Subject, names

ROWS = 8  # of each stage


@dataclass
class Deep:
    """What was found, as lines for `alignment check`."""

    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def deep(recipe: Recipe, *, runs: Path, run: str, recipe_path: Path) -> Deep:
    """Check every stage of a recipe whose parents are finished in `runs/run`."""
    found = Deep()
    for name, stage in recipe.stages.items():
        row = ALGORITHMS[stage.algorithm]
        if row.config is None:
            continue
        if row.schema == "prompts":
            found.unchecked.append(f"stages.{name}: {stage.algorithm} is checked on its first rollout, in the run")
            continue
        plan = planning.prepare(recipe, name, runs=runs.absolute(), run=run, recipe_path=recipe_path.absolute())
        if plan.waiting_for:
            found.unchecked.append(f"stages.{name}: {', '.join(plan.waiting_for)} must be finished first")
            continue
        try:
            outcome = check_stage(plan.spec)
        except UserError as error:
            found.problems.append(f"stages.{name}: {error}")
            continue
        found.unchecked += _launched(name, plan.spec.config.launch)
        found.checked.append(f"stages.{name}: {len(outcome.passed)} hold: {', '.join(outcome.passed)}")
        found.unchecked += [f"stages.{name}: {check}: {why}" for check, why in outcome.skipped.items()]
        found.problems += [f"stages.{name}: {check}: {text}" for check, text in outcome.broken.items()]
    return found


def _launched(name: str, launch: Launch) -> list[str]:
    """What one process without an engine cannot show."""
    if launch.accelerate is None and launch.deepspeed is None and launch.processes == 1:
        return []
    how = launch.accelerate or launch.deepspeed or f"{launch.processes} processes"
    return [f"stages.{name}: checked in one process, not under {how}: the run checks its first batch there"]


def check_stage(spec: planning.StageSpec) -> Outcome:
    """All checks of one stage.

    Raises:
        UserError: it cannot be built; or a check of the first batch does not hold.
    """
    from accelerate.state import AcceleratorState, GradientState

    from alignment.training.assemble import assembled
    from alignment.training.quiet import quiet

    quiet()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with tempfile.TemporaryDirectory(prefix="alignment-deep-") as folder:
        train = {**spec.config.train, "learning_rate": 0.0, "max_steps": 1, "eval_strategy": "no", "logging_steps": 1,
                 "load_best_model_at_end": False}  # fmt: skip
        config = spec.config.model_copy(update={"train": train, "launch": Launch(), "report_to": []})
        spec = replace(spec, output=Path(folder) / spec.stage, config=config, attempt="deep")
        spec.output.mkdir()
        compute = compute_dtype(config.precision.compute)
        ctx, trainer = assembled(Context(spec=spec, say=_silent, compute=compute))
        trainer.remove_callback(PrinterCallback)
        trainer.remove_callback(ProgressCallback)
        first = invariants.FirstBatch(ctx, trainer, _silent, count=ROWS)
        trainer.add_callback(first)
        deeper = DeepChecks(first.subject)
        trainer.add_callback(deeper)
        trainer._save_checkpoint = _nothing
        trainer.train()
        one, other = first.outcome, deeper.outcome
        return Outcome(one.passed + other.passed, one.skipped | other.skipped, one.broken | other.broken)


def _silent(text: str) -> None:
    pass


def _nothing(*args: Any, **kwargs: Any) -> None:
    """In place of writing a checkpoint."""


class DeepChecks(TrainerCallback):
    """Makes the deep checks around one step at learning rate 0."""

    def __init__(self, subject: Subject):
        self.subject, self.outcome = subject, Outcome()
        self.before: dict[str, str] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """What costs a backward pass; then how the weights stand."""
        with probe.untouched(self.subject.trainer):
            for name, check in (("accumulated-gradients", accumulated_gradients), ("stage-rows", stage_rows)):
                if invariants.applies(name, self.subject.ctx):
                    invariants.note(name, check, self.subject, self.outcome)
        self.before = weights(self.subject.trainer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """After the step nothing may have changed."""
        after = weights(self.subject.trainer)

        def unchanged(subject: Subject) -> Iterator[str]:
            if moved := [name for name, digest in after.items() if digest != self.before[name]]:
                yield f"a step at learning rate 0 changed {len(moved)} of {len(after)} weights: {names(moved)}"

        invariants.note("learning-rate-zero", unchanged, self.subject, self.outcome)


def weights(trainer: Trainer) -> dict[str, str]:
    """A digest of every weight and of every buffer that is saved."""
    return {
        name: hashlib.sha256(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()
        for name, tensor in trainer.model.state_dict().items()
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    }


def accumulated_gradients(subject: Subject) -> Iterator[str]:
    """The gradient of a batch, whole and row by row, through the trainer's own training step."""
    subject.auxiliary()
    if batch_dependent(subject.ctx.spec.config):
        raise Skip("the loss of a row depends on the other rows of its forward pass")
    if subject.trainer.args.neftune_noise_alpha or declared(subject):
        raise Skip("passes differ: dropout or noise is declared")
    whole = _gradient(subject, [subject.rows])
    parts = _gradient(subject, [[row] for row in subject.rows])
    difference = torch.sqrt(sum((whole[name] - parts[name]).square().sum() for name in whole))
    size = torch.sqrt(sum(gradient.square().sum() for gradient in whole.values()))
    ratio = float(torch.sqrt(sum(g.square().sum() for g in parts.values())) / size)
    if not float(difference / size) <= subject.tolerance:
        yield (
            f"{len(subject.rows)} rows x 1 pass and 1 row x {len(subject.rows)} passes differ by "
            f"{float(difference / size):.2g} of the gradient's norm (the norms are as 1 to {ratio:.3g})"
        )


def _gradient(subject: Subject, parts: Sequence[list[probe.Row]]) -> dict[str, torch.Tensor]:
    """The gradients of a step that is cut into parts."""
    trainer, model = subject.trainer, subject.trainer.model_wrapped
    model.zero_grad()
    batches = [probe.collate(trainer, part) for part in parts]
    items = trainer._get_num_items_in_batch(batches, trainer.args.device)
    trainer.current_gradient_accumulation_steps = len(batches)
    with torch.enable_grad():
        for number, batch in enumerate(batches, start=1):
            trainer.accelerator.gradient_state._set_sync_gradients(number == len(batches))
            trainer.training_step(model, batch, items)
    parameters = trainer.model.named_parameters()
    found = {name: p.grad.detach().float().clone() for name, p in parameters if p.grad is not None}
    model.zero_grad()
    trainer._first, trainer.first_loss = None, None  # of the step that is to come
    return found


def stage_rows(subject: Subject) -> Iterator[str]:
    """The start on training rows, against the folder of the stage it came from."""
    ctx = subject.ctx
    if ctx.row.publishes != "causal-lm" or ctx.start is None:
        raise Skip("there is no start that gives log-probabilities")
    if ctx.model.quantization is not None or ctx.added_tokens:
        raise Skip("the start was changed on loading: quantized, or new tokens")
    folder = ctx.spec.parents.get(ctx.model.stage or "", ctx.start)
    model, _ = load_policy(folder, revision=ctx.model.revision, attention=ctx.model.attention)
    model.to(ctx.args.device)
    for row, ours in zip(subject.rows, subject.alone, strict=True):
        if subject.algorithm == "sft":
            theirs = {"loss": -_log_prob(model, row["input_ids"], row["labels"], mean=True)}
        else:
            sides = {"chosen": "chosen_ids", "rejected": "rejected_ids"}
            if "completion_ids" in row:
                sides = {"chosen" if row["label"] else "rejected": "completion_ids"}
            theirs = {
                f"logps/{side}": _log_prob(
                    model, row["prompt_ids"] + row[key], [-100] * len(row["prompt_ids"]) + row[key]
                )
                for side, key in sides.items()
            }
        found = list(subject.differ(ours, theirs, tuple(theirs)))
        if found:
            yield f"a training row under the start against {folder}: {'; '.join(found)}"
            return


def _log_prob(model: Any, ids: list[int], labels: list[int], *, mean: bool = False) -> float:
    """The log-probability of the labelled tokens of one sequence: written out, with nothing of a trainer."""
    device = model.device
    tokens, wanted = torch.tensor([ids], device=device), torch.tensor(labels, device=device)[1:]
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    trained = wanted != -100
    found = torch.log_softmax(logits, -1).gather(1, wanted.clamp(min=0)[:, None])[:, 0][trained]
    return float(found.mean() if mean else found.sum())
