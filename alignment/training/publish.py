"""From a trained model to a finished stage: write, read back, and only then the manifest.

Files are written beside, made durable, and renamed into the stage's folder one by one; `manifest.json` comes last and
names them all, so a folder without it is not finished, whatever lies in it.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from alignment.data import templates
from alignment.errors import ModelError
from alignment.evaluation.generate import batches
from alignment.models.generation import pad_id
from alignment.models.load import adapter_base, is_adapter, load_policy, load_scorer
from alignment.pipeline import runs
from alignment.pipeline.plan import StageSpec
from alignment.training.arguments import is_main
from alignment.training.card import card
from alignment.training.context import Context

PUBLISHING = ".publishing"
SCALE_ROWS = 512  # pairs on which the scale of a reward model's scores is measured
PACKAGES = ("alignment-toolkit", "trl", "transformers", "peft", "accelerate", "deepspeed", "datasets", "torch")


def publish(ctx: Context, trainer: Trainer, metrics: dict[str, float]) -> dict[str, Any] | None:
    """Publish the trained model in the stage's folder; returns what the manifest says of it (rank 0), else None.

    Every rank calls it: under ZeRO-3 the weights are gathered.

    Raises:
        ModelError: what was written reads back as another model.
    """
    beside = ctx.spec.output / PUBLISHING
    if is_main():
        shutil.rmtree(beside, ignore_errors=True)
    probe = _probe(ctx.tokenizer)
    trained = _logits(trainer, probe)
    scale = _score_scale(ctx, trainer) if ctx.row.publishes == "sequence-classification" else {}
    trainer.save_model(str(beside))
    if not is_main():
        return None
    (beside / "training_args.bin").unlink(missing_ok=True)  # holds tokens in clear; nothing reads it
    # TRL's frozen copy of the parent's adapter, its reference, is saved beside the trained one; it is not this model.
    shutil.rmtree(beside / "ref", ignore_errors=True)
    _save_tokenizer(ctx, beside)
    _check_weights(beside)
    model = _describe(ctx, trainer, beside) | scale
    runs.write_text(beside / "README.md", card(ctx.spec, model, metrics))
    _read_back(beside, ctx, probe, trained)
    return {"files": _move(beside, ctx.spec.output), "model": model, "tokenizer": _describe_tokenizer(ctx)}


def versions() -> dict[str, str]:
    """The installed version of each package that decides the result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _probe(tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Token ids (1, S) on which two models are compared: a fixed conversation, or plain text without a template."""
    if tokenizer.chat_template is not None:
        ids = templates.encode_messages(tokenizer, templates.PROBE).ids
    else:
        ids = tokenizer("The capital of France is Paris.")["input_ids"]
    return torch.tensor([ids])


def _logits(trainer: Trainer, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What the trained model says on ids (B, S), in float32: (B, S, V), or (B, 1) for a scorer. Every rank calls it."""
    model = trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model
    device = trainer.args.device
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = _forward(model, ids.to(device), None if mask is None else mask.to(device))
    model.train(was_training)
    return logits


def _forward(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    mask = torch.ones_like(ids) if mask is None else mask
    logits: torch.Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits.float().cpu()


def _score_scale(ctx: Context, trainer: Trainer) -> dict[str, float]:
    """`score_mean` and `score_std` of a reward model over the chosen and rejected answers of up to 512 pairs.

    The pairs are the held-out ones where there are any, else the training rows, drawn with the recipe's seed. The
    deviation is the population's. Both are written into the model's configuration, which a whole model is saved with:
    reinforcement learning puts the scores on a common scale by them. Every rank computes the same, since under ZeRO-3
    none can alone.
    """
    rows = ctx.rows.train if ctx.rows.eval is None else ctx.rows.eval
    drawn = np.random.default_rng(ctx.spec.config.seed).permutation(len(rows))[:SCALE_ROWS]
    conversations = [
        row["prompt_ids"] + row[side] for row in rows.select(np.sort(drawn)) for side in ("chosen_ids", "rejected_ids")
    ]
    scores = np.zeros(len(conversations))
    pad = pad_id(ctx.tokenizer)
    for indices in batches([len(ids) for ids in conversations], trainer.args.per_device_eval_batch_size):
        part = [conversations[index] for index in indices]
        width = max(map(len, part))
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in part])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in part])
        scores[indices] = _logits(trainer, ids, mask)[:, 0].numpy()
    scale = {"score_mean": float(scores.mean()), "score_std": float(scores.std())}
    trainer.accelerator.unwrap_model(trainer.model).config.update(scale)
    return scale


def _save_tokenizer(ctx: Context, folder: Path) -> None:
    """The tokenizer with the trained template, and a generation config that stops where training stopped."""
    tokenizer = ctx.tokenizer
    tokenizer.save_pretrained(folder)
    if ctx.row.publishes == "causal-lm":
        stops = templates.stop_ids(tokenizer) if tokenizer.chat_template else [tokenizer.eos_token_id]
        GenerationConfig(eos_token_id=stops, pad_token_id=tokenizer.pad_token_id).save_pretrained(folder)


def _check_weights(folder: Path) -> None:
    """A folder without weights, or with an adapter of zero bytes, must not be called a model."""
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ModelError(
            f"{folder.parent}: saving wrote no *.safetensors file; under ZeRO-3 set "
            "`stage3_gather_16bit_weights_on_model_save: true` in the DeepSpeed file"
        )
    for path in weights:
        if path.stat().st_size < 1024:
            raise ModelError(f"{folder.parent}: {path.name} has {path.stat().st_size} bytes; the adapter is empty")


def _describe(ctx: Context, trainer: Trainer, folder: Path) -> dict[str, Any]:
    """The manifest's `model`."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = getattr(model, "policy", model)  # PPO trains its critic in the same module
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    adapter = None
    if is_adapter(folder):
        base = adapter_base(folder)
        adapter = {"base_path": base, "base_sha256": weights_of(Path(base))}
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return {
        "architecture": type(inner).__name__,
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
        "adapter": adapter,
    }


def weights_of(folder: Path) -> str | None:
    """The identity of the weights in a local folder; None for a hub name."""
    if not folder.is_dir():
        return None
    files = {path.name: {"sha256": runs.file_hash(path, folder.parent)} for path in folder.glob("*.safetensors")}
    return runs.weights_sha256(files)


def _describe_tokenizer(ctx: Context) -> dict[str, Any]:
    """The manifest's `tokenizer`."""
    tokenizer = ctx.tokenizer
    template = tokenizer.chat_template
    return {
        "sha256": templates.digest(tokenizer),
        "template_sha256": None if template is None else runs.digest(template),
        "eos_ids": templates.stop_ids(tokenizer) if template else [tokenizer.eos_token_id],
        "pad_id": tokenizer.pad_token_id,
        "probe_ids": _probe(tokenizer)[0].tolist(),
    }


def _read_back(folder: Path, ctx: Context, probe: torch.Tensor, trained: torch.Tensor) -> None:
    """Load the written folder afresh and compare it with the model in memory on the probe.

    Weights that went through bfloat16 on their way (ZeRO gathers 16 bits, a bfloat16 base) may differ by its rounding.
    """
    # Rank 0 loads alone: with ZeRO-3 still declared, from_pretrained would shard and wait for the other ranks.
    unset_hf_deepspeed_config()
    loader = load_scorer if ctx.row.publishes == "sequence-classification" else load_policy
    model, tokenizer = loader(folder, attention=ctx.model.attention)
    if _probe(tokenizer).tolist() != probe.tolist():
        raise ModelError(f"{ctx.spec.output}: the saved tokenizer gives other ids than the trained one")
    with torch.no_grad():
        read = _forward(model, probe)
    exact = ctx.compute == torch.float32 and ctx.spec.config.precision.weights == "float32"
    quantized = ctx.model.quantization is not None
    tolerance = 1e-4 if exact and not quantized else 0.05
    scale = max(1.0, float(trained.abs().max()))
    error = float((read - trained).abs().max()) / scale
    if not error <= tolerance and not quantized:
        raise ModelError(
            f"{ctx.spec.output}: the saved model is not the trained one: its output on a probe differs by {error:.2g} "
            f"(allowed {tolerance:g}); nothing was published"
        )


def _move(beside: Path, output: Path) -> dict[str, dict[str, Any]]:
    """Rename every published file into the stage's folder; returns the manifest's table of files."""
    table = runs.settle(beside)
    for name in table:
        target = output / name
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(beside / name, target)
    shutil.rmtree(beside)
    runs.sync_folder(output)
    return table


def manifest(
    spec: StageSpec,
    published: dict[str, Any],
    *,
    kind: str | None,
    data: dict[str, Any] | None,
    batch: dict[str, int] | None,
    metrics: dict[str, float],
) -> dict[str, Any]:
    """The whole manifest of a finished stage (see `pipeline/runs.py`)."""
    parents = {}
    for name, folder in spec.parents.items():
        theirs = runs.verify_parent(folder)
        parents[name] = {key: theirs.get(key) for key in ("weights_sha256", "fingerprint_sha256")} | {
            "path": str(folder)
        }
    files = published.get("files", {})
    return {
        "run": spec.run,
        "stage": spec.stage,
        "algorithm": spec.config.algorithm,
        "kind": kind,
        "created": runs.now(),
        "attempt": spec.attempt,
        "fingerprint": spec.fingerprint,
        "fingerprint_sha256": spec.fingerprint_sha256,
        "weights_sha256": runs.weights_sha256(files),
        "files": files,
        "model": published.get("model"),
        "tokenizer": published.get("tokenizer"),
        "data": data,
        "batch": batch,
        "versions": versions(),
        "seed": spec.config.seed,
        "metrics": metrics,
        "parents": parents,
        "forced": list(spec.forced),
    }
