"""The manifest of an exported model, so that `alignment verify` can tell years later whether it is still the same."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from alignment.models.tokenizer import describe
from alignment.pipeline.files import digest, settle
from alignment.pipeline.runs import now, read_manifest, weights_sha256, write_manifest

PACKAGES = ("alignment-toolkit", "transformers", "peft", "torch")


def write(folder: Path, stage: Path, kind: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make an exported folder durable and write its manifest, which names its origin by hashes and no path of the run.

    Args:
        folder: what was exported.
        stage: what it was exported from.
    """
    files = settle(folder)
    origin = read_manifest(stage) or {}
    came_from = {
        "run": origin.get("run"), "stage": origin.get("stage"), "weights_sha256": origin.get("weights_sha256"),
        "fingerprint_sha256": origin.get("fingerprint_sha256"),
    }  # fmt: skip
    fingerprint: dict[str, Any] = {"algorithm": "export", "kind": kind, "origin": came_from}
    write_manifest(folder, {
        "stage": origin.get("stage") or folder.name,
        "algorithm": "export",
        "kind": kind,
        "created": now(),
        "fingerprint": fingerprint,
        "fingerprint_sha256": digest(fingerprint),
        "weights_sha256": weights_sha256(files),
        "files": files,
        "model": {
            "architecture": type(model).__name__,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "start": {"from": "export", **came_from},
            "base": None,
            "adapters": [],
        },
        "tokenizer": describe(tokenizer),
        "data": None,
        "batch": None,
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "seed": None,
        "metrics": {},
        "parents": {},
        "forced": list(origin.get("forced") or []),
    })  # fmt: skip
