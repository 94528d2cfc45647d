"""What a checkpoint needs beyond upstream's to go on as if nothing had happened.

Upstream keeps weights, optimizer, schedule and random states. Not the sums of a log line that is not yet written, nor
how many tokens were seen, nor a reference that moves (`sync_ref_model`), nor where the log stood: after a resume the
weights would be the same and the log another. Each rank adds its part to the checkpoint before it is sealed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.errors import CheckpointError
from alignment.pipeline import runs

REFERENCE = "reference.safetensors"


class Exact(TrainerCallback):
    """Adds the missing state to each checkpoint, and takes it from the one that a run goes on from.

    It stands in front of the callbacks that write the log and seal the checkpoint.

    Args:
        log: the stage's `log.jsonl`, which a resumed run takes up where its checkpoint was made.
        checkpoint: the one that the run goes on from, or None.
    """

    def __init__(self, trainer: Trainer, log: Path, checkpoint: Path | None):
        self.trainer, self.log, self.checkpoint = trainer, log, checkpoint

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Write this rank's part; on rank 0 the log up to here is on the disk, too."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder.mkdir(exist_ok=True)
        content = self._sums()
        if state.is_world_process_zero:
            content["log_lines"] = _settled_lines(self.log)
            if _reference_moves(self.trainer) and (reference := _reference(self.trainer)):
                save_file(reference, folder / REFERENCE)
        runs.write_json(folder / _name(args), {"schema": 1, **content})

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take up the state of the checkpoint; one of another number of processes has other parts, and is not exact."""
        if self.checkpoint is None or not (self.checkpoint / _name(args)).exists():
            return
        content = json.loads((self.checkpoint / _name(args)).read_text(encoding="utf-8"))
        trainer: Any = self.trainer
        trainer._tr_loss += content["loss_sum"]
        trainer._total_loss_scalar = content["loss_total"]
        trainer._globalstep_last_logged = content["last_logged"]
        if content["tokens"] is not None:
            trainer._total_train_tokens = content["tokens"]
        for name, values in content["metrics"].items():
            trainer._metrics["train"][name] = values
        if state.is_world_process_zero:
            _cut(self.log, content["log_lines"])
        if _reference_moves(self.trainer):
            _restore_reference(self.trainer, self.checkpoint / REFERENCE)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """The mean loss of the whole run: upstream divides by the steps since the last start."""
        if logs is None or "train_loss" not in logs:
            return
        logs["train_loss"] = self.trainer._total_loss_scalar / max(state.global_step, 1)
        if _sharded(self.trainer.model):
            # Upstream counts the parameters that happen to be gathered: another number after each start, all wrong.
            logs.pop("total_flos", None)

    def _sums(self) -> dict[str, Any]:
        trainer: Any = self.trainer
        metrics = getattr(trainer, "_metrics", {"train": {}})["train"]
        return {
            "loss_sum": float(trainer._tr_loss),
            "loss_total": trainer._total_loss_scalar,
            "last_logged": trainer._globalstep_last_logged,
            "tokens": getattr(trainer, "_total_train_tokens", None),
            "metrics": {name: [float(value) for value in values] for name, values in metrics.items()},
        }


def refuse_inexact(trainer: Trainer, checkpoint: Path | None, say: Any) -> None:
    """Say, or refuse, what cannot go on exactly from this checkpoint.

    Raises:
        CheckpointError: a moving reference that is sharded: it is in no checkpoint.
    """
    if checkpoint is None:
        return
    if _reference_moves(trainer) and not (checkpoint / REFERENCE).exists():
        raise CheckpointError(
            f"{checkpoint}: does not hold the reference that train.sync_ref_model moves (ZeRO-3 shards it); to start "
            "this stage again, add --force, or train with ZeRO-2"
        )
    if not (checkpoint / _name(trainer.args)).exists():
        say(
            f"  {checkpoint.name} was made by another number of processes: the result will not be bit for bit that of "
            "an uninterrupted run (sums are rounded otherwise, random draws differ)"
        )


def _name(args: TrainingArguments) -> str:
    """This rank's file in a checkpoint."""
    return f"exact-{args.process_index}-of-{args.world_size}.json"


def _settled_lines(log: Path) -> int:
    """Make the log durable, and count its lines."""
    if not log.exists():
        return 0
    with log.open("rb") as file:
        os.fsync(file.fileno())
        return sum(1 for _ in file)


def _cut(log: Path, lines: int) -> None:
    """Keep the first lines of the log: what came later is made again, step by step."""
    if log.exists():
        kept = log.read_bytes().splitlines(keepends=True)[:lines]
        runs.write_text(log, b"".join(kept).decode("utf-8"))


def _reference_moves(trainer: Trainer) -> bool:
    return bool(getattr(trainer.args, "sync_ref_model", False)) and getattr(trainer, "ref_model", None) is not None


def _reference(trainer: Any) -> dict[str, torch.Tensor]:
    """The parameters of the reference by name; tied ones once. Empty where ZeRO-3 shards them."""
    model = trainer.accelerator.unwrap_model(trainer.ref_model)
    found = dict(model.named_parameters())
    if _sharded(model):
        return {}
    return {name: parameter.detach().cpu().contiguous() for name, parameter in found.items()}


def _sharded(model: Any) -> bool:
    """Whether ZeRO-3 holds the parameters."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def _restore_reference(trainer: Any, path: Path) -> None:
    model = trainer.accelerator.unwrap_model(trainer.ref_model)
    saved = load_file(path)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(saved[name])
