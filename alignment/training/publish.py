"""From a trained model to a finished stage: write, read back, and only then the manifest.

Files are written beside, read back by another process, made durable, and renamed into the stage's folder one by one;
`manifest.json` comes last and names them all, so a folder without it is not finished, whatever lies in it.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedModel, Trainer

from alignment.data import templates
from alignment.errors import ModelError
from alignment.evaluation.generate import batches
from alignment.models.generation import pad_id
from alignment.models.load import adapter_base, base_revision, is_adapter
from alignment.models.tokenizer import describe
from alignment.pipeline import runs
from alignment.pipeline.plan import StageSpec
from alignment.recipe.credentials import mask
from alignment.training import readback
from alignment.training.arguments import is_main
from alignment.training.card import card
from alignment.training.context import Context
from alignment.training.probe import log_probability
from alignment.training.remembered import Trained, remember

PUBLISHING = ".publishing"
SAMPLE = ".sample.safetensors"  # what is remembered of the trained model, beside the folder while it is read back
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
        readback.start()  # it imports while the weights are written
        shutil.rmtree(beside, ignore_errors=True)
    probe = readback.probe(ctx.tokenizer)
    trained = _logits(trainer, probe)
    if trainer.is_deepspeed_enabled:
        # ZeRO-3 is still fetching what it expects next, where only a part of the module was used (PPO's policy).
        trainer.model_wrapped.empty_partition_cache()
    remembered = remember(_published(trainer), keep=is_main())
    scale = _score_scale(ctx, trainer) if ctx.row.publishes == "sequence-classification" else {}
    trainer.save_model(str(beside))
    if not is_main():
        return None
    (beside / "training_args.bin").unlink(missing_ok=True)  # holds tokens in clear; nothing reads it
    # TRL's frozen copy of the parent's adapter, its reference, is saved beside the trained one; it is not this model.
    shutil.rmtree(beside / "ref", ignore_errors=True)
    _save_tokenizer(ctx, beside)
    _check_weights(beside)
    model = _describe(ctx, trainer, beside) | scale | _said_of_probe(ctx, trained, probe)
    runs.write_text(beside / "README.md", mask(card(ctx.spec, model, metrics)))
    _read_back(beside, ctx, trained, remembered)
    return {"files": _move(beside, ctx.spec.output), "model": model, "tokenizer": describe(ctx.tokenizer)}


def versions() -> dict[str, str]:
    """The installed version of each package that decides the result."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _said_of_probe(ctx: Context, logits: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    """The mean log-probability of the probe's tokens: the stages that start from here compare theirs with it."""
    if ctx.row.publishes != "causal-lm":
        return {}
    exact = ctx.compute == torch.float32 and ctx.spec.config.precision.weights == "float32"
    return {
        "probe_log_prob": log_probability(logits, ids),
        "probe_dtype": "float32" if exact and ctx.model.quantization is None else "bfloat16",
    }


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
    model = _published(trainer)
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    adapter = None
    if is_adapter(folder):
        base = adapter_base(folder)
        adapter = {
            "base_path": base, "base_sha256": weights_of(Path(base)), "base_revision": base_revision(folder)
        }  # fmt: skip
    inner: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    merged = ctx.start is not None and Path(ctx.start) == ctx.spec.output / "base"
    return {
        "start": _start(ctx) | {"merged": merged},
        "base": None if adapter is None else {"path": adapter["base_path"], "weights_sha256": adapter["base_sha256"]},
        "adapters": [] if adapter is None else ["."],
        "architecture": type(inner).__name__,
        "parameters": sum(size for size, _ in sizes),
        "trained_parameters": sum(size for size, trained in sizes if trained),
        "adapter": adapter,
    }


def _start(ctx: Context) -> dict[str, Any]:
    """What the stage started from: as the recipe names it, and by its weights where they are files of ours."""
    model = ctx.model
    if model.stage is not None:
        theirs = runs.read_manifest(ctx.spec.parents[model.stage]) or {}
        return {"from": f"stage:{model.stage}", "weights_sha256": theirs.get("weights_sha256")}
    if model.path is None:
        return {"from": "random weights", "weights_sha256": None}
    asked = ctx.spec.config.model
    return {
        "from": model.path, "revision": asked and asked.revision, "commit": ctx.commit,
        "weights_sha256": weights_of(Path(model.path)),
    }  # fmt: skip


def _published(trainer: Trainer) -> Any:
    """The model that is published: of PPO the policy, which trains in one module with its critic."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    return getattr(model, "policy", model)


def weights_of(folder: Path) -> str | None:
    """The identity of the weights in a local folder; None for a hub name."""
    if not folder.is_dir():
        return None
    files = {path.name: {"sha256": runs.file_hash(path, folder.parent)} for path in folder.glob("*.safetensors")}
    return runs.weights_sha256(files)


def _read_back(folder: Path, ctx: Context, trained: torch.Tensor, remembered: Trained) -> None:
    """Let another process load the written folder, and compare what it found with the model in memory.

    Weights that went through bfloat16 on their way (ZeRO gathers 16 bits, a bfloat16 base) may differ by its rounding.
    The base of a quantized model is quantized again where that needs no room on a GPU; elsewhere its adapter alone is
    compared.
    """
    scorer = ctx.row.publishes == "sequence-classification"
    exact = ctx.compute == torch.float32 and ctx.spec.config.precision.weights == "float32"
    quantized = ctx.model.quantization is not None
    alike = not quantized or not torch.cuda.is_available()
    tolerance = 1e-4 if exact else 0.05
    sample = folder.with_name(folder.name + SAMPLE)
    try:
        remembered.save(sample)
        found = readback.read(
            folder, scorer=scorer, attention=ctx.model.attention, remembered=sample, tolerance=tolerance,
            frozen=not quantized, quantization=ctx.model.quantization if alike else None,
            compute=str(ctx.compute).removeprefix("torch."),
        )  # fmt: skip
    finally:
        sample.unlink(missing_ok=True)
    stage, tokenizer = ctx.spec.output, ctx.tokenizer
    described = describe(ctx.tokenizer)
    if found["probe_ids"] != described["probe_ids"]:
        raise ModelError(f"{stage}: the saved tokenizer gives other ids than the trained one; nothing was published")
    if found["template"] != described["template_sha256"]:
        raise ModelError(f"{stage}: the saved chat template is not the trained one; nothing was published")
    stops = described["eos_ids"]
    if found["stop_ids"] != stops or (not scorer and sorted(found["generation_eos"] or []) != stops):
        raise ModelError(
            f"{stage}: the saved model stops at {found['generation_eos'] or found['stop_ids']}, trained were {stops} "
            f"({', '.join(tokenizer.convert_ids_to_tokens(stops))}); nothing was published"
        )
    for line in found["differences"]:
        raise ModelError(f"{stage}: the saved model is not the trained one: {line}; nothing was published")
    scale = max(1.0, float(trained.abs().max()))
    error = float((torch.from_numpy(found["logits"]) - trained).abs().max()) / scale
    if alike and not error <= tolerance:
        raise ModelError(
            f"{stage}: the saved model is not the trained one: its output on a probe differs by {error:.2g} "
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
        theirs = runs.read_manifest(folder) or {}  # its files were verified when the stage began
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
