"""The commit of a hub model from which a stage starts: found once, the same for each load, rank and restart.

Policy, reference, critic and tokenizer are loaded one after the other, by every rank, and again after a stop: a name
that is looked up each time could be several models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file, extract_commit_hash

from alignment.errors import ChainError, UserError
from alignment.pipeline import runs, seals
from alignment.pipeline.files import read_json
from alignment.pipeline.fingerprint import is_local
from alignment.pipeline.plan import StageSpec
from alignment.recipe.schema import is_commit
from alignment.training.handoff import READY


def commit(spec: StageSpec, say: Callable[[str], None]) -> str | None:
    """The commit to load from, on rank 0; None for a local folder, random weights, or where nobody knows.

    A stage that goes on from a checkpoint goes on from the commit with which it began.

    Raises:
        ChainError: that commit is not to be had any more.
    """
    model = spec.config.model
    if model is None or model.path is None or is_local(model.path):
        return None
    now, began = _resolved(model.path, model.revision), _began(spec)
    if began is not None and began != now:
        say(f"  {model.path} is at another commit now ({now or 'unknown'}); this stage goes on from {began}")
        if _resolved(model.path, began) is None:
            raise ChainError(
                f"model: {model.path}: this stage began from commit {began}, which is neither in the cache nor to be "
                f"had from the hub; fetch it (hf download {model.path} --revision {began}), or start the stage again: "
                f"--stage {spec.stage} --force"
            )
        now = began
    elif now is not None and not is_commit(model.revision):
        say(f"  {model.path} is not pinned; for a result that can be repeated write `{model.path}@{now}`")
    for name, theirs in _neighbours(spec, model.path):
        if now is not None and theirs != now:
            say(f"  {model.path}: stage {name} of this run began from another commit, {theirs}")
    return now


def _resolved(name: str, revision: str | None) -> str | None:
    """The commit of a revision, from the hub or from the cache; what is wrong with the model is told by its loader."""
    with suppress(OSError, ValueError):
        return extract_commit_hash(cached_file(name, "config.json", revision=revision), None)
    return None


def _began(spec: StageSpec) -> str | None:
    """The commit with which an unfinished stage began, if there is a checkpoint to go on from."""
    if not any((path / seals.SEALED).is_file() for path in seals.checkpoints(spec.output)):
        return None
    record = read_json(spec.output / READY, schema=1, error=ChainError) or {}
    found = record.get("commit")
    return str(found) if found else None


def _neighbours(spec: StageSpec, path: str) -> Iterator[tuple[str, str]]:
    """Finished stages of this run that started from the same hub name, and from which commit."""
    for file in sorted(Path(spec.output).parent.glob(f"*/{runs.MANIFEST}")):
        with suppress(UserError):  # a damaged one is told where it is used
            start: dict[str, Any] = ((runs.read_manifest(file.parent) or {}).get("model") or {}).get("start") or {}
            if start.get("from") == path and start.get("commit"):
                yield file.parent.name, str(start["commit"])
