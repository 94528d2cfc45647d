"""What kind of model a folder holds, told from its configuration alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from alignment.errors import ModelError
from alignment.models.load import ADAPTER_CONFIG, is_adapter

Kind = Literal["causal-lm", "sequence-classification"]

_BY_TASK: dict[str, Kind] = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification"}
_BY_CLASS: dict[str, Kind] = {
    "ForCausalLM": "causal-lm",
    "LMHeadModel": "causal-lm",
    "ForSequenceClassification": "sequence-classification",
}


def kind_of(folder: Path) -> Kind:
    """Causal LM or sequence classifier.

    Loading cannot tell them apart: with tied embeddings, a reward model loads as a causal LM without a missing tensor.

    Raises:
        ModelError: no such folder, no model in it, or one of another kind.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    if is_adapter(folder):
        task = str(_read(folder / ADAPTER_CONFIG).get("task_type"))
        if task in _BY_TASK:
            return _BY_TASK[task]
        raise ModelError(f"{folder}: an adapter for {task}; expected {' or '.join(_BY_TASK)}")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder}: holds no model (neither config.json nor {ADAPTER_CONFIG})")
    names = [str(name) for name in _read(folder / "config.json").get("architectures") or []]
    for name in names:
        for ending, kind in _BY_CLASS.items():
            if name.endswith(ending):
                return kind
    found = ", ".join(names) or "no architecture named in config.json"
    raise ModelError(f"{folder}: neither a causal LM nor a reward model ({found})")


def _read(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{path}: cannot be read as JSON: a mapping was expected")
    return value
