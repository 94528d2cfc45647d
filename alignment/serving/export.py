"""A finished stage as one plain model folder: `alignment export runs/x/dpo OUT`.

The folder holds whole weights in float32, the tokenizer with the trained template, and the ids that end an answer.
Nothing in it refers to the run. It is written beside OUT, read back, compared with the model that was loaded, and only
then renamed: OUT is whole or absent.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from alignment.data import templates
from alignment.errors import ModelError
from alignment.models.adapters import merge
from alignment.models.generation import Policy
from alignment.models.load import adapter_base, load_policy, load_scorer
from alignment.pipeline.files import storage, sync_folder
from alignment.pipeline.runs import MANIFEST, read_manifest, verify_parent
from alignment.serving import manifest
from alignment.serving.kind import kind_of

SCALE = ("score_mean", "score_std")  # what PPO normalises a reward model's scores by
TOLERANCE = 1e-4  # of a logit, relative to the largest one where that is above 1
PLAIN_PROBE = "The capital of France is Paris."


@dataclass(frozen=True)
class Exported:
    """A model in memory that is about to be written."""

    kind: Literal["causal-lm", "sequence-classification"]
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    origin: str  # what was done to get it, for the reader


def export(stage: Path, out: Path) -> Path:
    """Write the model of a stage, or of any adapter or model folder, to `out` as one whole model; returns `out`.

    Prints what was done. An adapter is merged into its base in float32, also where it was trained on a quantized one.

    Raises:
        ModelError: `out` is not empty; `stage` holds no model; merged or read back, it computes something else.
        ChainError: the stage's files differ from its manifest.
        StorageError: `out` cannot be written.
    """
    _require_empty(out)
    if (stage / MANIFEST).exists():
        verify_parent(stage, deep=True)
    exported = _load_whole(stage)
    probe = _probe(exported.tokenizer)
    expected = _logits(exported.model, probe)
    beside = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with storage(out):
            beside.mkdir(parents=True)
            _save(exported, beside)
            manifest.write(beside, stage, exported.kind, exported.model, exported.tokenizer)
        error = _read_back(exported, beside, probe, expected)
        with storage(out):
            os.replace(beside, out)  # an empty folder may stand there
            sync_folder(out.resolve().parent)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    parameters = sum(weights.numel() for weights in exported.model.parameters())
    print(f"{exported.kind}, {parameters:,} parameters in float32: {exported.origin}")
    print(
        f"read back: the same probe ids, logits within {error:.1g}; answers end with {_stop_text(exported.tokenizer)}"
    )
    return out


def _require_empty(out: Path) -> None:
    if out.is_dir() and not any(out.iterdir()):
        return
    if out.exists() or out.is_symlink():
        raise ModelError(f"{out}: exists already; nothing is overwritten, name another folder")


def _load_whole(stage: Path) -> Exported:
    """The stage's model in float32, its adapter merged."""
    kind = kind_of(stage)
    load = load_policy if kind == "causal-lm" else load_scorer
    model, tokenizer = load(stage, dtype=torch.float32)
    if getattr(model.config, "quantization_config", None) is not None:
        base = adapter_base(stage) if isinstance(model, PeftModel) else stage
        raise ModelError(
            f"{base}: its weights are stored quantized, and merging into those would lose the change; make "
            "`base_model_name_or_path` name the unquantized model"
        )
    if not isinstance(model, PeftModel):
        return Exported(kind, model, tokenizer, "whole weights")
    scale = float(_logits(model, _probe(tokenizer)).abs().max())
    merged = merge(model, tolerance=TOLERANCE * max(1.0, scale))
    # A whole reward model has its scale in config.json; an adapter's stands in the manifest only.
    described = (read_manifest(stage) or {}).get("model") or {}
    merged.config.update({key: described[key] for key in SCALE if key in described})
    return Exported(kind, merged, tokenizer, f"adapter merged into {adapter_base(stage)}")


def _save(exported: Exported, folder: Path) -> None:
    """Weights, tokenizer with its template, and for a policy what ends an answer.

    The generation config holds the ids only: how to sample is the caller's choice, not a base model's leftover (and
    Transformers refuses to save some of those: a temperature without `do_sample`).
    """
    tokenizer, model = exported.tokenizer, exported.model
    if exported.kind == "causal-lm":
        model.generation_config = GenerationConfig(
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=templates.stop_ids(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _read_back(exported: Exported, folder: Path, probe: torch.Tensor, expected: torch.Tensor) -> float:
    """Load the folder afresh and compare; returns the largest difference of a logit."""
    load = load_policy if exported.kind == "causal-lm" else load_scorer
    model, tokenizer = load(folder, dtype=torch.float32)
    if not torch.equal(_probe(tokenizer), probe):
        raise ModelError(f"{folder}: its tokenizer reads back with other ids for the same conversation")
    error = float((_logits(model, probe) - expected).abs().max())
    if not error <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ModelError(f"{folder}: reads back as another model, logits differ by {error:.2g}")
    return error


def _probe(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids (1, S) of a fixed conversation, or of plain text where there is no template."""
    if tokenizer.chat_template is None:
        return torch.tensor([tokenizer(PLAIN_PROBE)["input_ids"]])
    return torch.tensor([templates.encode_prompt(tokenizer, templates.PROBE)])


@torch.no_grad()
def _logits(model: Policy, probe: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=probe, attention_mask=torch.ones_like(probe), use_cache=False).logits
    return logits.float()


def _stop_text(tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(tokenizer.convert_ids_to_tokens(templates.stop_ids(tokenizer)))
