"""TRL's trainers with what this toolkit adds to each of them, in one mixin.

The mixin is the only place that touches upstream's private names; `tests/training/test_upstream.py` fails the day one
of them changes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer

from alignment.training import nonfinite
from alignment.training.online import Online


class Checked:
    """Trains on the rows as they are given, and stops before an update that is not finite."""

    first_loss: float | None = None  # mean loss of the first optimizer step, over its micro-batches; this rank's
    _first: torch.Tensor | None = None
    step_rows: Sequence[Sequence[int]] = ()  # of the step's forward passes: places in the training table

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # Rows are tokenised by alignment.data: what was checked and shown is what is trained.
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        # The sampler that groups rows by length sees only the columns that are kept; no collator passes these on.
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        own = [self.args.length_column_name, nonfinite.ROW]  # type: ignore[attr-defined]
        self._signature_columns = [*columns, *(name for name in own if name not in columns)]

    def _prepare_inputs(self, inputs: Any) -> Any:
        # Which rows these are is for us; no model takes it.
        if isinstance(inputs, Mapping) and nonfinite.ROWS in inputs:
            rows = inputs[nonfinite.ROWS].tolist()
            self.step_rows = [*self.step_rows, rows]
            inputs = {key: value for key, value in inputs.items() if key != nonfinite.ROWS}
        return super()._prepare_inputs(inputs)  # type: ignore[misc]

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Upstream's loss, refused if it is not finite.

        Checked here and not in a callback: DeepSpeed's engine updates inside `backward`.
        """
        result = super().compute_loss(model, *args, **kwargs)  # type: ignore[misc]
        if model.training:
            nonfinite.require_finite_loss(self, result[0] if isinstance(result, tuple) else result)
        return result

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Upstream's step; adds up the losses of the first step (each is already divided by their number)."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        if self.state.global_step == 0:  # type: ignore[attr-defined]
            value = loss.detach().float()
            self._first = value if self._first is None else self._first + value
            self.first_loss = float(self._first)
        return loss

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        # Upstream trains one more step each time a finished run is resumed.
        if self.state.global_step >= self.state.max_steps:  # type: ignore[attr-defined]
            self.control.should_training_stop = True  # type: ignore[attr-defined]
            return None
        return super()._run_epoch(*args, **kwargs)  # type: ignore[misc]

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        nonfinite.require_finite_weights(self)
        super()._save_checkpoint(*args, **kwargs)  # type: ignore[misc]

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, torch.Tensor] | None = None) -> None:
        if state_dict is not None:
            state_dict = without_tied(self.model, state_dict)  # type: ignore[attr-defined]
        super()._save(output_dir, state_dict)  # type: ignore[misc]

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No card in checkpoints: the stage writes its own when it is finished."""


def without_tied(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict without the second name of each tied tensor: one gathered from ZeRO holds copies of both.

    `save_pretrained` recognises tied tensors by their memory, and would write the embedding twice.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return {name: tensor for name, tensor in state.items() if name not in tied or tied[name] not in state}


class SFT(Checked, SFTTrainer):
    """TRL's SFTTrainer on our token table."""


class Reward(Checked, RewardTrainer):
    """TRL's RewardTrainer on our token table."""


class DPO(Checked, DPOTrainer):
    """TRL's DPOTrainer on our token table."""


class KTO(Checked, KTOTrainer):
    """TRL's KTOTrainer on our token table."""


class RLOO(Online, Checked, RLOOTrainer):
    """TRL's RLOOTrainer on our prompts, rewards and reference."""


class GRPO(Online, Checked, GRPOTrainer):
    """TRL's GRPOTrainer on our prompts, rewards and reference."""
