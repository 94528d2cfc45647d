"""TRL's trainers with what this toolkit adds to each of them, in one mixin.

The mixin is the only place that touches upstream's private names; `tests/training/test_upstream.py` fails the day one
of them changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import Trainer
from trl import DPOTrainer, GRPOTrainer, KTOTrainer, RewardTrainer, RLOOTrainer, SFTTrainer

from alignment.errors import NonFiniteError
from alignment.training.online import Online


class Checked:
    """Trains on the rows as they are given, and stops before an update that is not finite."""

    first_loss: float | None = None  # mean loss of the first optimizer step, over its micro-batches; this rank's
    _first: torch.Tensor | None = None

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # Rows are tokenised by alignment.data: what was checked and shown is what is trained.
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        # The sampler that groups rows by length sees only the columns that are kept; no collator passes this one on.
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        columns: list[str] = self._signature_columns  # type: ignore[has-type]
        if self.args.length_column_name not in columns:  # type: ignore[attr-defined]
            self._signature_columns = [*columns, self.args.length_column_name]  # type: ignore[attr-defined]

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Upstream's loss, refused if it is not finite.

        Checked here and not in a callback: DeepSpeed's engine updates inside `backward`.
        """
        result = super().compute_loss(model, *args, **kwargs)  # type: ignore[misc]
        loss = result[0] if isinstance(result, tuple) else result
        if model.training and not torch.isfinite(loss):
            raise NonFiniteError(
                f"step {self.state.global_step + 1}: the loss is {loss.item()}; nothing was updated. Usual causes: "  # type: ignore[attr-defined]
                "a learning rate that is too high, rows without a trained token, a division by an empty mask"
            )
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


def check_gradients(trainer: Trainer) -> None:
    """Stop before the update if a gradient is not finite.

    Under DeepSpeed the engine holds the gradients and has already stepped; a non-finite one shows in the next loss.

    Raises:
        NonFiniteError: naming the step.
    """
    gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    if trainer.is_deepspeed_enabled or not gradients:
        return
    if not torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
        step = trainer.state.global_step + 1
        raise NonFiniteError(f"step {step}: a gradient is not finite though the loss is; nothing was updated")


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
