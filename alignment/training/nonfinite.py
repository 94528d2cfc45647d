"""A loss, a gradient or a weight that is not finite: stop before the update, and keep what is needed to find out why.

Upstream logs a NaN loss as 0 and trains on. Here every rank stops at the same place with exit code 6, whichever rank
saw it; `nonfinite.json` in the stage's folder names the rows of the batch, and a checkpoint holds the state before it.

A trainer that draws its own replies (PPO, RLOO, GRPO) says which prompts they answer (`step_rows`), how many optimizer
steps it has taken in this step of the Trainer (`taken`), and what one row of the last batch does (`loss_alone`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.errors import NonFiniteError
from alignment.pipeline import runs, seals
from alignment.training import probe
from alignment.training.ranks import largest
from alignment.training.rewind import Beginning, Drawn

ROW = "row"  # the column of the token table with the number of a row, as `alignment data show --row` takes it
ROWS = "rows"  # in a batch: those of its rows
RECORD = "nonfinite.json"
SHOWN = 8  # rows in a message; the record has all
TEXT = 60  # characters of a row's text in a message
CAUSES = "a learning rate that is too high, rows without a trained token, a division by an empty mask"


# --- which rows -------------------------------------------------------------------------------------------------------


class Numbered:
    """A collator that also says which rows a batch holds."""

    def __init__(self, collator: Any):
        self.collator = collator

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        batch = self.collator(examples)
        if ROW in examples[0]:
            batch[ROWS] = torch.tensor([example[ROW] for example in examples])
        return batch


def follow_rows(trainer: Trainer) -> None:
    """Let each training batch say which rows it holds (not where rows were packed: those are of many)."""
    columns = trainer.train_dataset.column_names
    if ROW in columns and "prompt" not in columns:  # prompts stay rows, and are never a batch of tensors
        trainer.data_collator = Numbered(trainer.data_collator)


def numbers(rows: Sequence[Mapping[str, Any]]) -> list[int]:
    """Which rows of the training table these are; none where it does not number them."""
    return [row[ROW] for row in rows if ROW in row]


# --- what is looked at ------------------------------------------------------------------------------------------------


def require_finite_loss(trainer: Trainer, loss: Tensor) -> None:
    """Stop all ranks if the loss of one is not finite; called before the backward pass, in which DeepSpeed updates.

    Raises:
        NonFiniteError: with the rows of the batch.
    """
    if largest((~torch.isfinite(loss.detach())).any().float()).item():
        _stop(trainer, f"the loss is {float(loss.detach()):g}", float(loss.detach()), last_batch=True)


def require_finite_gradients(trainer: Trainer) -> None:
    """Stop before the update if a gradient is not finite; gradients are the same on all ranks by now.

    DeepSpeed's engine has stepped already: it leaves out an update that is not finite, and would go on.

    Raises:
        NonFiniteError: with the rows of the step.
    """
    if trainer.is_deepspeed_enabled:
        engine = trainer.model_wrapped
        norm = engine.get_global_grad_norm()
        left_out = bool(getattr(engine.optimizer, "overflow", False))
        finite = norm is None or bool(torch.isfinite(torch.as_tensor(float(norm))))
        if left_out or not finite:
            _stop(trainer, "a gradient is not finite though the loss is", updated=not left_out)
        return
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    if gradients and not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        _stop(trainer, "a gradient is not finite though the loss is")


def require_finite_rollout(trainer: Trainer, parts: Mapping[str, Tensor]) -> None:
    """Stop all ranks before they learn from replies of which a number is not finite.

    Args:
        parts: by name, the numbers (B, ...) of the replies to the rows that `step_rows` ends with; what follows from
            others stands after them, for the first that is not finite is named.

    Raises:
        NonFiniteError: with the rows.
    """
    broken = [(~torch.isfinite(part)).reshape(len(part), -1).any(dim=1) for part in parts.values()]
    found = largest(torch.stack([rows.any() for rows in broken]).float()).nonzero()
    if len(found):
        first = int(found[0])
        rows = trainer.step_rows[-1] if trainer.step_rows else []
        hit = [row for row, bad in zip(rows, broken[first].tolist(), strict=True) if bad] if rows else []
        _stop(trainer, f"{list(parts)[first]} of a reply are not finite", rows=hit)


@contextmanager
def together(trainer: Trainer) -> Iterator[None]:
    """What one rank finds to be not finite while it scores stops all; every rank enters and leaves.

    Raises:
        NonFiniteError: with what the rank said.
    """
    said = ""
    try:
        yield
    except NonFiniteError as error:
        said = str(error)
    if largest(torch.tensor(float(bool(said)), device=trainer.args.device)).item():
        _stop(trainer, said, rows=[], causes="a reward model that was trained at too high a learning rate")


def require_finite_weights(trainer: Trainer) -> None:
    """Stop before anything is saved if a weight is not finite, also one that no row has used (an embedding's).

    And before replies are drawn: from such a model that fails in words of its own, on a device without a line.

    Raises:
        NonFiniteError: naming the weights.
    """
    bad = broken_weights(trainer)
    if largest(torch.tensor(float(bool(bad)), device=trainer.args.device)).item():
        everyone = _gathered(trainer, {"weights": bad})
        rank, names = next((rank, one["weights"]) for rank, one in enumerate(everyone) if one["weights"])
        where = f" of rank {rank}" if len(everyone) > 1 else ""
        raise NonFiniteError(
            f"step {trainer.state.global_step}: {len(names)} weights{where} are not finite "
            f"({', '.join(names[:3])}{' ...' * (len(names) > 3)}); nothing was saved. Usual causes: a learning rate "
            f"that is too high, a fault of the memory. {_last_good(trainer)}"
        )


def broken_weights(trainer: Trainer) -> list[str]:
    """The names of weights with a number that is not finite (under ZeRO-3: in this rank's part)."""
    named = [(name, getattr(p, "ds_tensor", p.data)) for name, p in trainer.model.named_parameters()]
    flags = [torch.isfinite(data).all() for _, data in named if data.is_floating_point()]
    if not flags or bool(torch.stack([flag.to(flags[0].device) for flag in flags]).all()):
        return []
    floating = [name for name, data in named if data.is_floating_point()]
    return [name for name, flag in zip(floating, flags, strict=True) if not flag]


# --- stopping ---------------------------------------------------------------------------------------------------------


def _stop(
    trainer: Trainer, what: str, loss: float | None = None, *, last_batch: bool = False, updated: bool = False,
    rows: Sequence[int] | None = None, causes: str = CAUSES,
) -> NoReturn:  # fmt: skip
    """Find out which rows it was, keep a checkpoint, and leave; every rank is here.

    Args:
        what: this rank's; empty where only another has seen it.
        loss: this rank's.
        last_batch: only the rows of the last forward pass matter, not all of the step.
        updated: the weights have changed already.
        rows: those of this rank that are to blame, where that is known.
    """
    broken = broken_weights(trainer)
    seen = list(getattr(trainer, "step_rows", ()))
    mine: dict[str, Any] = {"rank": trainer.args.process_index, "loss": loss, "what": what}
    mine[ROWS] = [row for part in (seen[-1:] if last_batch else seen) for row in part] if rows is None else list(rows)
    if last_batch and not broken:
        mine["alone"] = _alone(trainer, mine[ROWS])
    everyone = _gathered(trainer, mine | {"weights": broken})
    guilty = [one for one in everyone if one["what"] and (one["loss"] is None or not np.isfinite(one["loss"]))]
    what = f"the loss is {guilty[0]['loss']:g}" if last_batch and guilty else guilty[0]["what"] if guilty else what
    taken = getattr(trainer, "taken", 0)
    kept = "" if broken or updated or taken else _keep_checkpoint(trainer)
    step, finite = trainer.state.global_step, _callback(trainer)
    inside = finite is None or finite.beginning is not None
    if trainer.args.process_index == 0:
        record = {"schema": 1, "step": step + inside, "what": what, "ranks": everyone}
        runs.write_json(_folder(trainer) / RECORD, record)
    done = f"{taken} optimizer steps of it were made before" if taken else "nothing was updated"
    raise NonFiniteError(
        f"{'step' if inside else 'evaluation after step'} {step + inside}: {what}; "
        f"{'the update was made' if updated else done}. "
        f"{_where(trainer, guilty, broken)}{RECORD} has all. {kept or _last_good(trainer)} Usual causes: {causes}"
    )


def _where(trainer: Trainer, ranks: Sequence[Mapping[str, Any]], broken: Sequence[str]) -> str:
    """The rows, as far as they are known; or the weights, where those are the fault."""
    if broken:
        named = f"{broken[0]}{' ...' * (len(broken) > 1)}"
        return f"{len(broken)} weights are not finite already ({named}): no row is to blame, an earlier update is. "
    parts = []
    for one in ranks:
        if not one[ROWS]:
            continue
        rank = f" of rank {one['rank']}" if trainer.args.world_size > 1 else ""
        rows = list(dict.fromkeys(one[ROWS]))  # a prompt may have several replies
        shown = ", ".join(map(str, rows[:SHOWN])) + " ..." * (len(rows) > SHOWN)
        alone = one.get("alone") or []
        single = f"; alone, row {alone[0]} gives it too ({_text(trainer, alone[0])})" if alone else ""
        parts.append(f"rows {shown}{rank}{single}")
    return f"It was in {'; '.join(parts)} (alignment data show RECIPE --row N). " if parts else ""


def _alone(trainer: Trainer, rows: Sequence[int]) -> list[int]:
    """The rows whose loss is not finite by itself. Ranks measure alike often, since the loss gathers over them."""
    plugin = trainer.accelerator.state.deepspeed_plugin
    if not rows or (plugin is not None and plugin.zero_stage == 3):
        return []

    def of_table(index: int) -> float:
        return probe.measure(trainer, [trainer.train_dataset[_place(trainer, rows[index])]])["loss"]

    loss_of: Callable[[int], float] = getattr(trainer, "loss_alone", of_table)
    count = int(largest(torch.tensor(float(len(rows)), device=trainer.args.device)).item())
    found = []
    with probe.untouched(trainer):
        for index in range(count):
            loss = loss_of(min(index, len(rows) - 1))
            if index < len(rows) and not np.isfinite(loss):
                found.append(int(rows[index]))
    return found


def _place(trainer: Trainer, row: int) -> int:
    """Where a row of the table is in the data set that is trained on, which may be shuffled."""
    order = np.asarray(trainer.train_dataset[ROW])
    return int(np.flatnonzero(order == row)[0])


def _text(trainer: Trainer, row: int) -> str:
    """The beginning of a row, for a person to search for."""
    found = trainer.train_dataset[_place(trainer, row)]
    ids = next(value for key, value in found.items() if key.endswith("ids"))
    text = " ".join(trainer.processing_class.decode(ids, skip_special_tokens=True).split())
    return repr(text if len(text) <= TEXT else f"{text[:TEXT]} ...")


def _gathered(trainer: Trainer, mine: dict[str, Any]) -> list[dict[str, Any]]:
    if trainer.args.world_size == 1:
        return [mine]
    everyone: list[Any] = [None] * trainer.args.world_size
    torch.distributed.all_gather_object(everyone, mine)
    return everyone


def _folder(trainer: Trainer) -> Path:
    return Path(trainer.args.output_dir)


def _last_good(trainer: Trainer) -> str:
    found = [path.name for path in seals.checkpoints(_folder(trainer)) if (path / seals.SEALED).is_file()]
    return f"The last good checkpoint is {found[0]}." if found else "There is no checkpoint yet."


def _keep_checkpoint(trainer: Trainer) -> str:
    """Save the state before the step, if there is one and no checkpoint has it; returns what to say of it."""
    from alignment.training.callbacks import Seal

    step, finite = trainer.state.global_step, _callback(trainer)
    path = _folder(trainer) / f"checkpoint-{step}"
    if step == 0 or finite is None or finite.beginning is None or (path / seals.SEALED).is_file():
        return ""
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, Seal):
            callback.keep += 1  # an older one may be the better one: this update made the next loss what it is
    finite.beginning.restore()
    trainer._save_checkpoint(trainer.model, trial=None)
    trainer.control = trainer.callback_handler.on_save(trainer.args, trainer.state, trainer.control)
    return f"The state before it is in {path.name}."


def _callback(trainer: Trainer) -> Finite | None:
    return next((item for item in trainer.callback_handler.callbacks if isinstance(item, Finite)), None)


class Finite(TrainerCallback):
    """Looks at the gradients of every step, and remembers where the run stood when it began."""

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.beginning: Beginning | None = None  # of the step in progress
        self.epoch: Drawn | None = None

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A run that goes on from the end of an epoch draws from here; a loader draws when it begins."""
        between = state.epoch is not None and float(state.epoch).is_integer()
        self.epoch = Drawn.now() if between else None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A new step: no rows yet."""
        self.trainer.step_rows = []
        self.beginning = Beginning(self.trainer, self.epoch or Drawn.now())
        self.epoch = None

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Before the weights change."""
        require_finite_gradients(self.trainer)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What comes now (an evaluation) is no part of a step."""
        self.beginning = None
