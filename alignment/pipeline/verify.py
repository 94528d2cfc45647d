"""`alignment verify PATH`: is this still what was written? A run, a stage, an exported model or a checkpoint, offline.

Every byte that a manifest or a seal names is read and compared, and what the records say of each other is held
together. Nothing is loaded, nothing of it is run, no torch is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignment.errors import ChainError, CheckpointError, ModelError
from alignment.pipeline import folders
from alignment.pipeline.files import digest, fault, read_json
from alignment.pipeline.runs import MANIFEST, RECIPE, STAGE, read_manifest, weights_sha256
from alignment.pipeline.seals import SCHEMA as SEAL_SCHEMA
from alignment.pipeline.seals import SEALED, seal_fault
from alignment.recipe.algorithms import ALGORITHMS

# What a manifest holds: the contract between stages. A stage that publishes no model has None where a model is meant.
CONTRACT: Mapping[str, type | tuple[type, ...]] = {
    "stage": str, "algorithm": str, "kind": (str, type(None)), "created": str, "fingerprint": dict,
    "fingerprint_sha256": str, "weights_sha256": str, "files": dict, "model": (dict, type(None)),
    "tokenizer": (dict, type(None)), "data": (dict, type(None)), "batch": (dict, type(None)), "versions": dict,
    "seed": (int, type(None)), "metrics": dict, "parents": dict, "forced": list,
}  # fmt: skip
OF_A_MODEL = ("architecture", "parameters", "start", "base", "adapters")
OF_A_TOKENIZER = ("sha256", "vocabulary_sha256", "template_sha256", "eos_ids", "pad_id", "probe_ids")
LOADED = (".safetensors", ".bin", ".pt", ".pth", ".py", ".json", ".jinja", ".model")  # endings that loaders look for
RECORDS = frozenset({"manifest.json", "metrics.json", "status.json", "prepared.json", "checks.json", "nonfinite.json"})


@dataclass
class Verdict:
    """What was found under one path; `problems` make the command fail, `notes` say what was not compared."""

    path: Path
    checked: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(path: Path) -> Verdict:
    """Check a run folder, a stage, an exported model or a checkpoint against its records.

    Raises:
        ChainError: there is nothing to check against.
    """
    verdict = Verdict(path)
    if (path / SEALED).exists():
        _checkpoint(path, verdict)
    elif (path / MANIFEST).exists():
        _manifest(path, verdict)
    elif (path / RECIPE).is_file():
        stages = sorted(place.parent for place in path.glob(f"*/{MANIFEST}"))
        if not stages:
            raise ChainError(f"{path}: no stage of this run is finished; there is nothing to verify")
        for stage in stages:
            _manifest(stage, verdict)
    elif (path / STAGE).is_file():
        raise ChainError(f"{path}: not finished (no {MANIFEST}); `alignment status` says how it stands")
    elif path.is_dir() and path.name.startswith("checkpoint-"):
        raise ChainError(f"{path}: not sealed (its writer was stopped), so it counts as absent")
    elif path.is_dir():
        raise ChainError(f"{path}: holds neither {MANIFEST} nor {SEALED}: nothing says what it should be")
    else:
        raise ChainError(f"{path}: no such folder")
    return verdict


def _checkpoint(path: Path, verdict: Verdict) -> None:
    """A checkpoint against its seal."""
    reason = seal_fault(path)
    if reason is not None:
        verdict.problems.append(f"{path}: {reason}")
        return
    record = read_json(path / SEALED, schema=SEAL_SCHEMA, error=CheckpointError) or {}
    verdict.checked.append(f"{path}: {_files(record['files'])}, sealed at step {record.get('step')}")


def _manifest(path: Path, verdict: Verdict) -> None:
    """A stage or an exported model against its manifest."""
    try:
        manifest = read_manifest(path)
    except ChainError as error:
        verdict.problems.append(str(error))
        return
    assert manifest is not None  # its file is there
    before = len(verdict.problems)
    checks: tuple[Callable[[Path, dict[str, Any]], Iterator[str]], ...] = (
        _complete, _consistent, _whole, _unnamed, _sound, _speaks
    )  # fmt: skip
    for check in checks:
        found = list(check(path, manifest))
        verdict.problems += found
        if found and check is _complete:
            return  # the others would stumble over what is missing
    _parents(path, manifest, verdict)
    if len(verdict.problems) == before:
        what, weights = manifest["kind"] or "no model", manifest["weights_sha256"][:12]
        verdict.checked.append(f"{path}: {what}, {_files(manifest['files'])}, weights {weights}")


def _complete(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Every field of the contract, each of its type."""
    place = path / MANIFEST
    for key, kind in CONTRACT.items():
        if key not in manifest:
            yield f"{place}: without {key}"
        elif not isinstance(manifest[key], kind):
            yield f"{place}: {key} is {type(manifest[key]).__name__}"
    trains = manifest.get("algorithm") in ALGORITHMS and ALGORITHMS[str(manifest["algorithm"])].config is not None
    for section, keys in (("model", OF_A_MODEL), ("tokenizer", OF_A_TOKENIZER)) if trains else ():
        content = manifest.get(section) or {}
        yield from (f"{place}: {section} without {key}" for key in keys if key not in content)
    for name, entry in (manifest.get("files") or {}).items():
        if not isinstance(entry, dict) or not {"size", "sha256"} <= entry.keys():
            yield f"{place}: files: {name} without size or sha256"


def _consistent(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """The hashes that a manifest holds of its own parts."""
    if digest(manifest["fingerprint"]) != manifest["fingerprint_sha256"]:
        yield f"{path / MANIFEST}: fingerprint does not match fingerprint_sha256: it was edited"
    if weights_sha256(manifest["files"]) != manifest["weights_sha256"]:
        yield f"{path / MANIFEST}: files do not match weights_sha256: it was edited"


def _whole(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Every file, byte by byte, each fault on its own line."""
    for name, entry in manifest["files"].items():
        reason = fault(path, {name: entry}, deep=True)
        if reason is not None:
            yield f"{path}/{reason}"


def _unnamed(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Files beside the published ones that a loader would take up."""
    if manifest["kind"] is None:
        return
    for entry in sorted(path.iterdir()):
        if entry.suffix in LOADED and entry.name not in RECORDS and entry.name not in manifest["files"]:
            yield f"{path}/{entry.name}: not named in its manifest, and a loader may take it up; remove it"


def _sound(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """What a model folder must not do, and the base of an adapter."""
    if manifest["kind"] is None:
        return
    try:
        folders.require_sound(path)
        if (path / folders.ADAPTER_CONFIG).is_file():
            reason = folders.adapter_fault(path, (manifest["model"] or {}).get("adapter"), None)
            if reason is not None:
                yield f"{path}: {reason}"
    except ModelError as error:
        yield str(error)


def _speaks(path: Path, manifest: dict[str, Any]) -> Iterator[str]:
    """Template, vocabulary and stop tokens are the recorded ones."""
    recorded = manifest["tokenizer"]
    if recorded is None:
        return
    try:
        found = folders.vocabulary(path)
        settings = path / "generation_config.json"
        stops = folders.read_object(settings).get("eos_token_id") if settings.is_file() else None
    except ModelError as error:
        yield str(error)
        return
    if found is None:
        yield f"{path}: {folders.TOKENIZER}: missing"
        return
    if found.sha256 != recorded["vocabulary_sha256"]:
        yield f"{path}: its tokenizer has another vocabulary than the manifest records"
    if found.template_sha256 != recorded["template_sha256"]:
        yield f"{path}: its chat template is not the recorded one"
    if stops is not None and sorted(stops if isinstance(stops, list) else [stops]) != recorded["eos_ids"]:
        yield f"{path}: generation_config.json stops at {stops}, recorded are {recorded['eos_ids']}"


def _parents(path: Path, manifest: dict[str, Any], verdict: Verdict) -> None:
    """Parents that ran again since, where they are at hand."""
    for name, entry in manifest["parents"].items():
        folder = Path(str(entry.get("path") or ""))
        try:
            current = read_manifest(folder) if folder.is_dir() and entry.get("path") else None
        except ChainError as error:
            verdict.notes.append(f"{path}: its parent {name}: {error}")
            continue
        if current is None:
            verdict.notes.append(f"{path}: its parent {name} is not at {folder}: not compared")
        elif current.get("weights_sha256") != entry.get("weights_sha256"):
            verdict.problems.append(f"{path}: its parent {name} holds other weights now; it ran again since")
    if manifest["forced"]:
        verdict.notes += [f"{path}: forced: {line}" for line in manifest["forced"]]


def _files(table: Mapping[str, Mapping[str, Any]]) -> str:
    """`12 files, 3.4 MB`."""
    size = sum(int(entry["size"]) for entry in table.values())
    return f"{len(table)} file{'' if len(table) == 1 else 's'}, {size / 1e6:,.1f} MB"
