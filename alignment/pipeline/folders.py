"""Model folders, looked at before anything of them is loaded: their files by name and their JSON, never their weights.

A folder may come from anywhere. What is refused here is what a loader would follow or run without a word: weights that
an index names outside the folder, pickles in place of weights, an adapter on a base that is not there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from alignment.errors import ModelError
from alignment.pipeline.files import digest, file_hash
from alignment.pipeline.fingerprint import is_local
from alignment.pipeline.runs import weights_sha256

CONFIG, ADAPTER_CONFIG, TOKENIZER = "config.json", "adapter_config.json", "tokenizer.json"
MAX_JSON = 16 * 2**20  # bytes of a configuration; a tokenizer may be larger
MAX_TOKENIZER = 256 * 2**20
PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle")

Kind = Literal["causal-lm", "sequence-classification"]
BY_TASK: dict[str, Kind] = {"CAUSAL_LM": "causal-lm", "SEQ_CLS": "sequence-classification"}
_BY_CLASS: dict[str, Kind] = {
    "ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm", "ForSequenceClassification": "sequence-classification"
}  # fmt: skip


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer's file says: the hash of its table of ids, how many there are, and of its chat template."""

    sha256: str
    size: int
    template_sha256: str | None


def read_object(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        ModelError: cannot be read, too large, too deep, no JSON object; one line.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise ModelError(f"{path}: {size:,} bytes; more than {limit:,} is no configuration")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: cannot be read: {error.strerror}") from None
    except RecursionError:
        raise ModelError(f"{path}: nested too deeply") from None
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ModelError(f"{path}: a JSON object was expected, found {type(value).__name__}")
    return value


def require_sound(folder: Path) -> None:
    """Refuse a model folder that would be loaded from elsewhere, from pickles, or not at all.

    Raises:
        ModelError: one line, with the file and what to do.
    """
    if (folder / ADAPTER_CONFIG).is_file():
        read_object(folder / ADAPTER_CONFIG)
        _require_weights(folder, "adapter_model.safetensors", "adapter")
        return
    if not (folder / CONFIG).is_file():
        raise ModelError(f"{folder}: no model folder ({CONFIG} is not in it)")
    read_object(folder / CONFIG)
    indexes = sorted(folder.glob("*.index.json"))
    for index in indexes:
        _require_inside(index)
    if not indexes:
        _require_weights(folder, "*.safetensors", "model")


def _require_weights(folder: Path, pattern: str, what: str) -> None:
    """Weights as safetensors; a pickle in their place is named and not opened."""
    if any(folder.glob(pattern)):
        return
    pickles = sorted(path.name for pickle in PICKLES for path in folder.glob(pickle))
    if pickles:
        raise ModelError(
            f"{folder}: its weights are a pickle ({pickles[0]}), which can run code and is not opened; convert it to "
            "safetensors where you trust it"
        )
    raise ModelError(f"{folder}: {what} without weights ({pattern} is not in it)")


def _require_inside(index: Path) -> None:
    """Every file that an index of shards names is one beside it."""
    table = read_object(index, MAX_TOKENIZER).get("weight_map")
    if not isinstance(table, dict):
        raise ModelError(f"{index}: no weight_map in it")
    for tensor, name in table.items():
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name:
            raise ModelError(f"{index}: weight_map: {tensor} is in {name!r}, which leads out of the folder")
    missing = sorted({str(name) for name in table.values() if not (index.parent / str(name)).is_file()})
    if missing and not index.name.endswith(".bin.index.json"):
        raise ModelError(f"{index}: weight_map: {missing[0]} is missing")


def kind_of(folder: Path) -> Kind | None:
    """What a folder's configuration says it is; None where it says nothing that we know."""
    if (folder / ADAPTER_CONFIG).is_file():
        return BY_TASK.get(str(read_object(folder / ADAPTER_CONFIG).get("task_type")))
    if not (folder / CONFIG).is_file():
        return None
    names = [str(name) for name in read_object(folder / CONFIG).get("architectures") or []]
    return next((kind for name in names for ending, kind in _BY_CLASS.items() if name.endswith(ending)), None)


def weights_of(folder: Path, runs: Path | None) -> str | None:
    """The identity of the weights in a local folder, as manifests record it; None for what is no folder.

    Args:
        runs: where hashes are memoised; None reads every byte.
    """
    if not folder.is_dir():
        return None
    hashes = {
        path.name: {"sha256": file_sha256(path) if runs is None else file_hash(path, runs)}
        for path in folder.glob("*.safetensors")
    }
    return weights_sha256(hashes)


def adapter_fault(folder: Path, recorded: dict[str, Any] | None, runs: Path | None, *, deep: bool = True) -> str | None:
    """What is wrong with the base that the adapter in `folder` stands on; None where it is right, or on the hub.

    Args:
        recorded: the manifest's `model.adapter`; None for an adapter that no stage of ours made.
        runs: where hashes are memoised; None reads every byte.
        deep: the base's weights are compared, too.
    """
    named = read_object(folder / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        return f"{ADAPTER_CONFIG} names no base (base_model_name_or_path)"
    base = Path(named)
    if not is_local(named):
        return None
    if not base.is_dir():
        return f"its base {named} is not there; put it back, or run the adapter's stage again"
    if (base / ADAPTER_CONFIG).is_file():
        return (
            f"its base {named} is itself an adapter that was not merged; write it as a whole model first "
            f"(alignment export {named} OUT) and let base_model_name_or_path name that"
        )
    if recorded is None:
        return (
            f"{ADAPTER_CONFIG} names its base by a path ({named}) and no manifest says which weights those were; "
            "if they are the right ones, merge it first (alignment export)"
        )
    was = recorded.get("base_sha256")
    found = weights_of(base, runs) if deep else was
    if was is not None and was != found:
        return (
            f"its base {named} holds other weights than the adapter was trained on ({_short(found)}, recorded "
            f"{_short(was)}); put those back, or run the adapter's stage again"
        )
    return None


def _short(sha256: str | None) -> str:
    return (sha256 or "none")[:12]


def vocabulary(folder: Path) -> Vocabulary | None:
    """The vocabulary and the template of the tokenizer in a folder; None where there is no `tokenizer.json`."""
    path = folder / TOKENIZER
    if not path.is_file():
        return None
    stat = path.stat()
    ids = _ids(path, stat.st_mtime_ns, stat.st_size)
    return Vocabulary(ids[0], ids[1], _template(folder))


@lru_cache(maxsize=8)
def _ids(path: Path, mtime: int, size: int) -> tuple[str, int]:
    """Hash and number of the ids, added ones included; the arguments tell a changed file."""
    content = read_object(path, MAX_TOKENIZER)
    model = content.get("model") or {}
    stored = model.get("vocab")
    table = dict(stored) if isinstance(stored, dict) else {str(row[0]): i for i, row in enumerate(stored or [])}
    for token in content.get("added_tokens") or []:
        table[str(token["content"])] = int(token["id"])
    return digest(table), len(table)


def _template(folder: Path) -> str | None:
    """SHA-256 of the chat template's text."""
    beside = folder / "chat_template.jinja"
    if beside.is_file():
        return digest(beside.read_text(encoding="utf-8"))
    config = folder / "tokenizer_config.json"
    template = read_object(config, MAX_TOKENIZER).get("chat_template") if config.is_file() else None
    return digest(template) if isinstance(template, str) else None


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, read now."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
