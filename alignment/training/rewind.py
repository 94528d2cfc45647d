"""Where a run stood when a step began, beside its weights: for the checkpoint that is kept when the step goes wrong.

Until its update a step changes no weight, but it draws random numbers, adds to the sums of the next log line and, where
it trains on its own replies, moves the scales of the rewards. A checkpoint that kept those would go on to another
result than a run in which nothing had gone wrong.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import Trainer

COUNTERS = ("current_flos", "_total_train_tokens")


@dataclass(frozen=True)
class Drawn:
    """The states of all random streams of this process."""

    states: tuple[Any, ...]

    @classmethod
    def now(cls) -> Drawn:
        """Where they stand."""
        device = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
        return cls((random.getstate(), np.random.get_state(), torch.get_rng_state(), device))

    def restore(self) -> None:
        """Draw from here again."""
        python, numpy, host, device = self.states
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(host)
        if device is not None:
            torch.cuda.set_rng_state(device)


class Beginning:
    """What a step changes before its update.

    Args:
        drawn: where the random streams stood; a run that goes on from a checkpoint begins to draw there.
    """

    def __init__(self, trainer: Trainer, drawn: Drawn):
        own: Any = trainer
        self.trainer, self.drawn = trainer, drawn
        self.loss = own._tr_loss.detach().clone()
        self.tokens_seen = own.state.num_input_tokens_seen
        self.counters = {name: _copy(getattr(own, name)) for name in COUNTERS if hasattr(own, name)}
        self.metrics = {name: list(values) for name, values in _metrics(own).items()}
        self.controllers = own.controllers() if hasattr(own, "controllers") else None

    def restore(self) -> None:
        """Put it back."""
        own: Any = self.trainer
        self.drawn.restore()
        own._tr_loss = self.loss
        own.state.num_input_tokens_seen = self.tokens_seen
        for name, value in self.counters.items():
            setattr(own, name, value)
        metrics = _metrics(own)
        metrics.clear()
        metrics.update(self.metrics)
        if self.controllers is not None:
            own._restore(self.controllers)


def _metrics(trainer: Any) -> Any:
    """TRL's sums of the next log line."""
    return getattr(trainer, "_metrics", {"train": {}})["train"]


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value
