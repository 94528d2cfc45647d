"""What must be true of PPO's first rollout, looked at before the first update.

Each of these has been wrong in a published trainer while the loss curve looked normal. A failed check stops the run
with what was expected, what was found and the usual cause.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignment.errors import UserError
from alignment.training.objectives import masked_mean
from alignment.training.rewards import round_trip
from alignment.training.rollout import Rollout, chunks

if TYPE_CHECKING:
    from alignment.training.ppo import PPOTrainer

EXACT, ROUNDED = 2e-4, 0.1  # nats at one token: float32; bfloat16 has 8 bits


class CheckError(UserError):
    """The first rollout shows that the run would train something else than it says."""


def check_first_rollout(trainer: PPOTrainer, model: torch.nn.Module, rollout: Rollout) -> None:
    """Raise if anything that must hold before the first update does not; every rank takes part.

    Raises:
        CheckError: with one line for each check that failed.
    """
    problems = [
        *_same_weights(trainer),
        *_training_pass(trainer, model, rollout),
        *_padding(trainer, model, rollout),
        *_reference(trainer, rollout),
        *_round_trip(trainer, rollout),
    ]
    if problems:
        raise CheckError("the first rollout is not what it must be:" + "".join(f"\n  - {text}" for text in problems))


def _tolerance(trainer: PPOTrainer) -> float:
    return ROUNDED if trainer.args.bf16 or trainer.args.fp16 else EXACT


def _same_weights(trainer: PPOTrainer) -> Iterator[str]:
    """Policy and reference are different objects: no tensor of the reference is one that is trained."""
    if trainer.ref_model is None:
        return
    trained = {p.data_ptr() for p in trainer.model.parameters() if p.requires_grad and p.numel()}
    shared = [name for name, p in trainer.ref_model.named_parameters() if p.numel() and p.data_ptr() in trained]
    if shared:
        yield (
            f"reference: it must not share weights with the policy, found {len(shared)} shared tensors "
            f"({shared[0]}); it would move with the policy and the KL would stay 0. Pass a second copy as ref_model"
        )


def _first_part(trainer: PPOTrainer, rollout: Rollout) -> list[int]:
    """The first micro-batch: a few episodes of different lengths."""
    size = trainer.settings.per_device_train_batch_size
    return chunks(rollout.episodes.lengths(), size, range(min(size, len(rollout.episodes))))[0]


def _largest(difference: Tensor, mask: Tensor) -> float:
    return float(torch.where(mask, difference.abs(), torch.zeros_like(difference)).max())


def _training_pass(trainer: PPOTrainer, model: torch.nn.Module, rollout: Rollout) -> Iterator[str]:
    """The pass that trains gives the log-probabilities of the rollout (ratio 1, KL 0), and gives them twice."""
    part = _first_part(trainer, rollout)
    batch = trainer._batch(rollout.episodes, part)
    mask, old = batch.mask, rollout.log_probs[part, : batch.mask.shape[1]]
    with torch.no_grad():
        first, second = (trainer.run(model, batch) for _ in range(2))
    again = max(
        _largest(first.log_probs - second.log_probs, mask), _largest((first.values - second.values)[:, :-1], mask)
    )
    if not again <= _tolerance(trainer) / 10:
        yield (
            f"dropout: two passes over the same episodes must agree, they differ by {again:.2g}; something in the "
            "model is random in training mode. Set its dropout to 0"
        )
        return
    ratio = float(masked_mean((first.log_probs - old).exp(), mask))
    worst = _largest(first.log_probs - old, mask)
    if not worst <= _tolerance(trainer):
        yield (
            f"ratio: before the first update it must be 1 and the approximate KL 0, found a mean ratio of {ratio:.4g} "
            f"and log-probabilities that differ by up to {worst:.2g}. Usual causes: another temperature in "
            "the rollout than in training, padding that is seen, dropout"
        )


def _padding(trainer: PPOTrainer, model: torch.nn.Module, rollout: Rollout) -> Iterator[str]:
    """An episode says the same alone as among longer ones, where it is padded."""
    lengths = rollout.episodes.lengths()
    shortest = min(range(len(lengths)), key=lambda index: lengths[index])
    batch = trainer._batch(rollout.episodes, [shortest])
    padding = batch.ids.new_full((1, 5), int(batch.ids[0, -1]))  # a real token: it is only its place that hides it
    with torch.no_grad():
        alone = trainer.run(model, batch)
        among = trainer.run(model, batch._replace(ids=torch.cat([batch.ids, padding], 1)))
    error = max(
        _largest(alone.log_probs - among.log_probs, batch.mask), float((alone.values - among.values).abs().max())
    )
    if not error <= _tolerance(trainer):
        yield (
            f"padding: a padded and an unpadded copy of one episode must give the same numbers, they differ by "
            f"{error:.2g}. Usual causes: a model that is not causal, a layer that mixes the rows of a batch"
        )


def _reference(trainer: PPOTrainer, rollout: Rollout) -> Iterator[str]:
    """Before the first update the policy is its reference, if it starts from it."""
    if trainer.state.global_step > 0 or not trainer.starts_at_reference:
        return
    worst = _largest(rollout.log_probs - rollout.reference, rollout.mask)
    if not worst <= _tolerance(trainer):
        mean = float(masked_mean(rollout.log_probs - rollout.reference, rollout.mask))
        yield (
            f"reference: policy and reference are the same weights, so their KL must be 0, found {mean:.3g} nats per "
            f"token and up to {worst:.2g} at one. Usual causes: the base model as reference instead of the policy's "
            "start, embeddings resized in one of them, weights stored in another precision"
        )


def _round_trip(trainer: PPOTrainer, rollout: Rollout) -> Iterator[str]:
    """Every reward model reads the replies that the policy wrote."""
    replies = [text for text in rollout.episodes.texts if text.strip()][:8]
    for source in trainer.sources:
        problem = round_trip(trainer.tokenizer, source, replies)
        if problem is not None:
            yield problem
