"""Model folders with the right names and shapes and nothing in them, for runs that are only to be measured.

    blank_tokenizer(4096, folder)                                    a tokenizer of so many ids
    blank_model(config, tokenizer, folder, scorer=False, name=...)   loads with `from_pretrained`, every weight 0
    blank_adapter(base, peft, tokenizer, folder, scorer=False)       an adapter on it

The weights are a hole in a file: 140 GB of them take no room on the disk. They are float16, which no stage computes
in, so that loading converts them into memory of its own instead of mapping the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from alignment.data import templates
from alignment.models.adapters import lora_config
from alignment.models.load import ROWS_MULTIPLE, load_config
from alignment.models.tokenizer import train_tokenizer
from alignment.recipe.algorithms import PEFT_OWNED

FLOAT16 = 2


def blank_tokenizer(ids: int, chat_template: str | None) -> PreTrainedTokenizerBase:
    """A tokenizer of exactly `ids` ids, where a stage would train one: bytes, the template's tokens, and fillers."""
    special = templates.template(chat_template).special_tokens if chat_template else ()
    tokenizer = train_tokenizer([" a" * 100], ids, special)
    tokenizer.add_tokens([AddedToken(f"<filler {index}>") for index in range(len(tokenizer), ids)])
    return tokenizer


def blank_model(
    config: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path, *, scorer: bool, name: str
) -> Path:
    """A folder with a language model or a reward model; it has a row for each id of its tokenizer.

    Args:
        config: the content of a config.json.
        name: of the weights; two models of the same shape are two by their names, as they would be by their weights.
    """
    folder.mkdir(parents=True)
    content = {key: value for key, value in config.items() if key not in ("quantization_config", "auto_map")}
    if len(tokenizer) > content.get("vocab_size", len(tokenizer)):  # as `resize_embeddings` does
        content["vocab_size"] = -(-len(tokenizer) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    if scorer:  # `normalize: stored` divides by a deviation
        content |= {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id, "score_mean": 0.0, "score_std": 1.0}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    model = _on_no_device(folder, scorer=scorer)
    persistent = model.state_dict()
    tensors = dict(model.named_parameters()) | {k: v for k, v in model.named_buffers() if k in persistent}
    _write_hole(folder / "model.safetensors", tensors, name)
    tokenizer.save_pretrained(folder)
    return folder


def blank_adapter(
    base: Path, peft: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, folder: Path, *, scorer: bool
) -> Path:
    """A folder with an adapter on the model in `base`."""
    model = _on_no_device(base, scorer=scorer)
    known = LoraConfig.__dataclass_fields__.keys() - PEFT_OWNED.keys()
    keys = {key: value for key, value in peft.items() if value is not None and key in known}
    config = lora_config(keys, scorer=scorer, added_tokens=(), tied=bool(model.config.tie_word_embeddings))
    with torch.device("meta"):
        adapted = get_peft_model(model, config)
    config.base_model_name_or_path = str(base)
    config.save_pretrained(str(folder))
    tensors = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    _write_hole(folder / "adapter_model.safetensors", tensors, f"adapter on {base}")
    tokenizer.save_pretrained(folder)
    return folder


def _on_no_device(folder: Path, *, scorer: bool) -> PreTrainedModel:
    """The model of a folder's config.json, of which only the shapes exist."""
    kind = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    config = load_config(str(folder))
    if scorer:
        config.num_labels = 1
    with torch.device("meta"):
        return kind.from_config(config)


def _write_hole(file: Path, tensors: Mapping[str, torch.Tensor], name: str) -> None:
    """A safetensors file whose header is all that is written; what follows reads as zeros."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "name": name}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * FLOAT16
        header[key] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.truncate(8 + len(text) + end)
