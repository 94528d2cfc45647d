"""Drawing replies from a causal LM with Transformers' `generate`, every setting explicit.

`generate` fills each setting that it is not given from the model folder's `generation_config.json`: two models that
are compared would be sampled differently, in silence. Here the sampling is the recipe's and nothing else's.
"""

from __future__ import annotations

import gc
from collections.abc import Collection, Sequence
from typing import Any, TypeAlias

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from alignment.errors import ModelError
from alignment.recipe.schema import Sampling

Policy: TypeAlias = PreTrainedModel | PeftModel


def draw(
    model: Policy,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    stops: Collection[int],
    *,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """One reply for each of a batch of prompts, from torch's current seed.

    Args:
        prompts: token ids, ending where the reply begins.
        stops: ids that end a reply.
        streamer: is given the new tokens while they are drawn (one prompt only).

    Returns:
        The ids of each reply, up to and with its stop token; without one if `max_new_tokens` cut it.

    Raises:
        ModelError: prompt and reply need more positions than the model has.
    """
    require_room(model, max(map(len, prompts)), sampling.max_new_tokens)
    pad = pad_id(tokenizer)
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    # LoRA lives inside the base's layers, so the base generates with the adapter.
    core: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    own, core.generation_config = core.generation_config, GenerationConfig()
    try:
        with torch.inference_mode():
            drawn = core.generate(
                input_ids=ids,  # (B, P), left-padded
                attention_mask=mask,
                generation_config=_settings(model, tokenizer, sampling, stops, pad),
                streamer=streamer,
            )
    finally:
        core.generation_config = own
    return [_until_stop(row, stops) for row in drawn[:, width:].tolist()]


def require_room(model: Policy, prompt: int, new: int) -> None:
    """Refuse lengths that need positions which the model was not made for.

    Raises:
        ModelError: with the lengths and the limit.
    """
    limit = positions(model)
    if limit is not None and prompt + new > limit:
        raise ModelError(
            f"{model.config.name_or_path or 'the model'}: a prompt of {prompt} tokens and max_new_tokens {new} exceed "
            f"its {limit} positions; lower max_new_tokens (in ppo: response_length) or leave out the longest prompts"
        )


def positions(model: Policy) -> int | None:
    """How many tokens the model can read, where its configuration says so."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if limit is None else int(limit)


def vocabulary_size(tokenizer: PreTrainedTokenizerBase) -> int:
    """One more than the largest id: the logits beyond it belong to embedding rows that only pad the matrix."""
    return max(tokenizer.get_vocab().values()) + 1


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills batches. Padding is masked by position, so any id would do."""
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)


def placed(model: Policy) -> Policy:
    """The model on this machine's device."""
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def release_memory() -> None:
    """Give the memory of models that went out of scope back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _settings(
    model: Policy, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, stops: Collection[int], pad: int
) -> GenerationConfig:
    """The recipe's sampling as a complete `GenerationConfig`."""
    rows = int(model.config.get_text_config().vocab_size)
    settings: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        settings = {"do_sample": True, "temperature": sampling.temperature}
        settings |= {"top_p": sampling.top_p, "top_k": sampling.top_k}
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        eos_token_id=sorted(stops),
        pad_token_id=pad,
        suppress_tokens=list(range(vocabulary_size(tokenizer), rows)) or None,
        **settings,
    )


def _until_stop(ids: list[int], stops: Collection[int]) -> list[int]:
    """Cut what `generate` fills in after a reply's end."""
    end = next((position for position, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]
