"""Replies of one model to all prompts, and the passes that read finished replies: KL to a baseline, pair scores.

All models see the prompts in the same batches, each batch seeded by its place, so that a difference between two
models is never a difference in the draw: with one seed, equal models give equal replies.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignment.evaluation.metrics import Floats, sequence_kl
from alignment.models.generation import Policy, draw, pad_id, require_room, vocabulary_size
from alignment.models.load import HEAD
from alignment.pipeline.memory.situation import LOGITS_AT_ONCE
from alignment.recipe.schema import Sampling

Ids = Sequence[int]


@dataclass(frozen=True)
class Reply:
    """What a model answered: its ids with the stop token, its text without."""

    ids: tuple[int, ...]
    text: str
    finished: bool


def batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices of rows in batches of like lengths, the longest first: too little memory shows in the first batch."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + size] for start in range(0, len(order), size)]


def generate(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    plan: Sequence[Sequence[int]],
    sampling: Sampling,
    stops: Collection[int],
    *,
    seed: int,
) -> list[Reply]:
    """One reply to every prompt, in the prompts' order.

    Args:
        prompts: token ids, ending where the reply begins.
        plan: batches of indices into `prompts` (`batches`); with the same plan and seed, the draws are the same.
        stops: ids that end a reply.

    Raises:
        ModelError: the longest prompt and `max_new_tokens` exceed the model's positions.
    """
    require_room(model, max(map(len, prompts)), sampling.max_new_tokens)
    replies: dict[int, Reply] = {}
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        for place, indices in enumerate(plan):
            torch.manual_seed((seed + place) % 2**32)
            drawn = draw(model, tokenizer, [prompts[index] for index in indices], sampling, stops)
            for index, ids in zip(indices, drawn, strict=True):
                text = tokenizer.decode(ids, skip_special_tokens=True)
                replies[index] = Reply(tuple(ids), text, finished=ids[-1] in stops)
    return [replies[index] for index in range(len(prompts))]


def kl_to(
    baseline: Policy,
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Ids],
    replies: Sequence[Reply],
    *,
    batch_size: int,
) -> Floats:
    """KL(model || baseline) in nats along each of the model's own replies (N,); see `metrics.sequence_kl`.

    Both models read the same ids. Ids beyond the tokenizer's are left out, as they are when replies are drawn.
    """
    values = np.zeros(len(prompts))
    size = vocabulary_size(tokenizer)
    lengths = [len(prompt) + len(reply.ids) for prompt, reply in zip(prompts, replies, strict=True)]
    # One unfinished reply would make its whole batch as long as itself, so like lengths go together here too.
    for indices in batches(lengths, batch_size):
        longest = max(len(replies[index].ids) for index in indices)
        rows = max(1, LOGITS_AT_ONCE // ((longest + 1) * size))
        for start in range(0, len(indices), rows):
            part = indices[start : start + rows]
            pairs = [(prompts[index], replies[index].ids) for index in part]
            ours, mask = _reply_logits(model, pairs, pad_id(tokenizer))
            theirs, _ = _reply_logits(baseline, pairs, pad_id(tokenizer))
            values[part] = sequence_kl(ours[..., :size], theirs[..., :size], mask).cpu().numpy()
    return values


@torch.inference_mode()
def _reply_logits(model: Policy, pairs: Sequence[tuple[Ids, Ids]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits that predict each reply token, and where there is one: (B, T, V), (B, T).

    Prompts are padded on the left and replies on the right, so that all replies begin at one column.
    """
    before = max(len(prompt) for prompt, _ in pairs)
    after = max(len(reply) for _, reply in pairs)
    ids, mask = [], []
    for prompt, reply in pairs:
        left, right = before - len(prompt), after - len(reply)
        ids.append([pad] * left + [*prompt, *reply] + [pad] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(reply)) + [0] * right)
    inputs = torch.tensor(ids, device=model.device)  # (B, S)
    attention = torch.tensor(mask, device=model.device)
    logits = model(
        input_ids=inputs,
        attention_mask=attention,
        position_ids=(attention.cumsum(-1) - 1).clamp(min=0),
        logits_to_keep=after + 1,
        use_cache=False,
    ).logits
    return logits[:, :-1], attention[:, before:]


@torch.inference_mode()
def score(
    scorer: Policy, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Ids], *, batch_size: int
) -> Floats:
    """The reward model's score of each conversation (N,), given as the ids of prompt and completion."""
    values = np.zeros(len(conversations))
    pad = pad_id(tokenizer)
    with _float32_head(scorer):
        for indices in batches([len(ids) for ids in conversations], batch_size):
            width = max(len(conversations[index]) for index in indices)
            rows = [list(conversations[index]) for index in indices]
            ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], device=scorer.device)
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=scorer.device)
            logits = scorer(input_ids=ids, attention_mask=mask, use_cache=False).logits  # (B, 1)
            values[indices] = logits[:, 0].float().cpu().numpy()
    return values


@contextmanager
def _float32_head(scorer: Policy) -> Any:
    """Compute the score itself in float32: in bfloat16 it has 8 bits, and near pairs become ties."""
    core: PreTrainedModel = scorer.get_base_model() if hasattr(scorer, "get_base_model") else scorer
    head = getattr(core, HEAD)
    dtype = next(head.parameters()).dtype
    hook = head.register_forward_pre_hook(lambda module, inputs: (inputs[0].float(),))
    head.float()
    try:
        yield
    finally:
        hook.remove()
        head.to(dtype)
