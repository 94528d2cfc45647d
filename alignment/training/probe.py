"""What the loss of a trainer says of chosen rows, measured without leaving a trace.

    with untouched(trainer):
        alone = measure(trainer, [row])
        padded = measure(trainer, [row], extra=7)

The numbers come from the trainer's own collator and `compute_loss`, not from a second implementation of them: what is
checked is what trains. Every rank measures the same rows, so that collectives inside the loss meet.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor
from transformers import Trainer

from alignment.models.generation import pad_id

Row: TypeAlias = dict[str, Any]
Batch: TypeAlias = dict[str, Any]
Numbers: TypeAlias = dict[str, float]
LOOKED_AT = 64  # training rows among which the probe rows are chosen
# The numbers of a row that do not depend on how far training has come, by trainer; the loss stands beside them.
LOG_PROBS = ("logps/chosen", "logps/rejected")
SCORES = ("mean_reward", "margin")


def core_of(trainer: Trainer) -> Any:
    """The Transformers model under engines, adapters, and PPO's pair of policy and critic."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "policy", model) if hasattr(model, "as_policy") else model
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def probe_rows(trainer: Trainer, count: int = 2) -> list[Row]:
    """Some of the first training rows, the shortest and the longest among them (a table of one row: that one twice)."""
    table = trainer.train_dataset
    rows = [dict(row) for row in table.select(range(min(LOOKED_AT, len(table))))]
    rows.sort(key=length)
    return [rows[index * (len(rows) - 1) // (count - 1)] for index in range(count)]


def length(row: Row) -> int:
    """Tokens of a row, over all its columns of ids."""
    return sum(len(value) for key, value in row.items() if key.endswith("ids"))


@contextmanager
def untouched(trainer: Trainer) -> Iterator[None]:
    """Forget afterwards what was drawn, logged and counted: training goes on as if nothing had been measured."""
    device = trainer.args.device
    metrics = copy.deepcopy(getattr(trainer, "_metrics", None))
    counted = getattr(trainer, "_total_train_tokens", None)
    modes = [(module, module.training) for module in trainer.model.modules()]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
        try:
            yield
        finally:
            for module, training in modes:
                module.training = training
            if metrics is not None:
                trainer._metrics = metrics
            if counted is not None:
                trainer._total_train_tokens = counted


def collate(trainer: Trainer, rows: Sequence[Row], *, extra: int = 0, left: bool = False) -> Batch:
    """A batch from the trainer's own collator, with `extra` more columns of padding, on the left if asked."""
    batch = dict(trainer.data_collator([dict(row) for row in rows]))
    if extra:
        fill = {"labels": -100, "input_ids": pad_id(trainer.processing_class)}
        for key, value in batch.items():
            if isinstance(value, Tensor) and value.dim() == 2:
                name = key.removeprefix("KL_")
                column = value.new_full((len(value), extra), fill.get(name, 0))
                if left and name == "labels":  # nothing precedes the first token, so padding must not predict it
                    value = torch.cat([value.new_full((len(value), 1), -100), value[:, 1:]], dim=1)
                batch[key] = torch.cat([column, value] if left else [value, column], dim=1)
    if left:  # as `generate` does: positions count what is not padding
        batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    return batch


def measure(
    trainer: Trainer, rows: Sequence[Row], *, extra: int = 0, left: bool = False, training: bool = False,
    items: Any = None,
) -> Numbers:  # fmt: skip
    """The loss of some rows, and what the trainer would log of them."""
    return measure_batch(trainer, collate(trainer, rows, extra=extra, left=left), training=training, items=items)


def measure_batch(trainer: Trainer, batch: Batch, *, training: bool = False, items: Any = None) -> Numbers:
    """As `measure`, of a collated batch."""
    trainer.model.train(training)
    inputs = trainer._prepare_inputs(batch)
    metrics: Any = getattr(trainer, "_metrics", None)
    mode = "train" if training else "eval"
    if metrics is not None:
        metrics[mode].clear()
    model = trainer.model_wrapped
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(trainer.compute_loss_context_manager())
        if hasattr(core_of(trainer), "score"):
            stack.enter_context(_random_head(core_of(trainer)))
        loss = trainer.compute_loss(model, inputs, num_items_in_batch=items)
    numbers = {} if metrics is None else {key: float(values[-1]) for key, values in metrics[mode].items() if values}
    return numbers | {"loss": float(loss)}


@contextmanager
def _random_head(scorer: Any) -> Iterator[None]:
    """A score head that tells hidden states apart: the trained one starts at zero, and would say 0 of everything."""
    head = scorer.score
    size = scorer.config.get_text_config().hidden_size
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0)) / size**0.5

    def replace(module: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        hidden = args[0]
        return (hidden.float() @ weight.to(hidden.device)).unsqueeze(-1).to(output.dtype)

    handle = head.register_forward_hook(replace)
    try:
        yield
    finally:
        handle.remove()


def log_probability(logits: Tensor, ids: Tensor) -> float:
    """The mean log-probability of the tokens (1, S) after the first, in nats, under logits (1, S, V)."""
    found = torch.log_softmax(logits[:, :-1].float(), dim=-1).gather(2, ids[:, 1:, None].to(logits.device))
    return float(found.mean())


def rounded(trainer: Trainer, ctx: Any) -> bool:
    """Whether anything computes or is stored in less than float32, so that equal numbers are only nearly equal."""
    own = ctx.compute != torch.float32 or trainer.args.bf16 or trainer.args.fp16
    return own or any(p.is_floating_point() and p.dtype != torch.float32 for p in trainer.model.parameters())
