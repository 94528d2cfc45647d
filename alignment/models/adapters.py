"""Adapters: the PEFT configuration of a stage, and merging an adapter into its base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import PreTrainedModel

from alignment.errors import ModelError, RecipeError
from alignment.models.load import HEAD, load_policy, resize_embeddings
from alignment.pipeline.files import settle


def lora_config(keys: Mapping[str, Any], *, scorer: bool, added_tokens: Sequence[str], tied: bool) -> LoraConfig:
    """The `LoraConfig` of a recipe's `peft:` section.

    A scorer's head is trained in full and saved with the adapter. Tokens that the template added need rows that are
    trained, in the embedding and in the output: without them the model would never learn to end a turn.

    Args:
        tied: the model's output shares its embedding's weights, so one module stands for both.

    Raises:
        RecipeError: tokens were added and the adapter would not train their rows.
    """
    settings = dict(keys)
    kept = list(settings.get("modules_to_save") or [])
    if scorer and HEAD not in kept:
        kept.append(HEAD)
    rows = ["embed_tokens"] if tied or scorer else ["embed_tokens", "lm_head"]
    untrained = [module for module in rows if module not in kept]
    if added_tokens and untrained and not settings.get("trainable_token_indices"):
        raise RecipeError(
            f"peft: the chat template adds {len(added_tokens)} tokens ({', '.join(added_tokens)}) that this adapter "
            f"would not train; set `peft.modules_to_save: [{', '.join(rows)}]`, or use the model's own template"
        )
    if tied and "embed_tokens" in kept and not scorer:
        # Else PEFT trains a copy of the embedding, and the output keeps the old rows.
        settings.setdefault("ensure_weight_tying", True)
    settings["modules_to_save"] = kept or None
    settings["task_type"] = "SEQ_CLS" if scorer else "CAUSAL_LM"
    try:
        return LoraConfig(**settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"peft: {error}") from error


def merge_to_folder(adapter: Path, out: Path) -> None:
    """Merge an adapter into its base in float32 and write the whole model with its tokenizer to `out`."""
    model, tokenizer = load_policy(adapter, dtype=torch.float32)
    merged = merge(model)
    resize_embeddings(merged, tokenizer)
    merged.save_pretrained(out)
    tokenizer.save_pretrained(out)
    settle(out)  # the next user may be another one


def merge(model: PeftModel | PreTrainedModel, *, tolerance: float = 1e-3) -> PreTrainedModel:
    """The base with the adapter's change added to its weights.

    Raises:
        ModelError: the merged model computes something else. PEFT merges wrongly where embeddings are tied and the
            adapter targets one of the two (transformers#45127, peft#2972).
    """
    if not isinstance(model, PeftModel):
        return model
    probe = torch.arange(1, 17, device=model.device)[None] % int(model.config.get_text_config().vocab_size)
    with torch.no_grad():
        before = model(input_ids=probe).logits.float()
        merged: PreTrainedModel = model.merge_and_unload(safe_merge=True)
        after = merged(input_ids=probe).logits.float()
    error = float((before - after).abs().max())
    if not error <= tolerance:
        raise ModelError(
            f"merging the adapter changes its output by {error:.2g} (allowed {tolerance:g}); where embeddings are "
            "tied, an adapter on embed_tokens or lm_head cannot be merged: leave those out of `peft.target_modules`"
        )
    return merged
