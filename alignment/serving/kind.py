"""What kind of model a folder holds, told from its configuration alone."""

from __future__ import annotations

from pathlib import Path

from alignment.errors import ModelError
from alignment.models.load import is_adapter
from alignment.pipeline import folders
from alignment.pipeline.folders import Kind

__all__ = ["Kind", "kind_of"]


def kind_of(folder: Path) -> Kind:
    """Causal LM or sequence classifier.

    Loading cannot tell them apart: with tied embeddings, a reward model loads as a causal LM without a missing tensor.

    Raises:
        ModelError: no such folder, no model in it, or one of another kind.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder")
    found = folders.kind_of(folder)
    if found is not None:
        return found
    if is_adapter(folder):
        task = folders.read_object(folder / folders.ADAPTER_CONFIG).get("task_type")
        raise ModelError(f"{folder}: an adapter for {task}; expected {' or '.join(folders.BY_TASK)}")
    if not (folder / folders.CONFIG).is_file():
        raise ModelError(f"{folder}: holds no model (neither {folders.CONFIG} nor {folders.ADAPTER_CONFIG})")
    names = [str(name) for name in folders.read_object(folder / folders.CONFIG).get("architectures") or []]
    says = ", ".join(names) or "no architecture named in config.json"
    raise ModelError(f"{folder}: neither a causal LM nor a reward model ({says})")
