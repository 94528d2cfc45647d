"""What a run will do: each stage of a recipe compared with what its folder holds.

`prepare` turns one stage of a recipe into a `StageSpec`, which is all that a worker needs, and says how it stands:

    fresh     nothing there yet, or nothing sealed    -> run
    resume    the same stage, unfinished              -> run, from its newest sealed checkpoint
    done      the same stage, finished                -> skip
    changed   another stage than the recipe's         -> refuse, and print the difference
    waiting   a stage that it links to is unfinished  -> run that first

A difference that was allowed (`--allow-change`) is kept, line by line, in `forced`: the stage keeps the fingerprint
with which it began, and the same difference is not refused again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import yaml

from alignment.errors import ChainError
from alignment.pipeline import sharding
from alignment.pipeline.files import digest, file_hash, known_hash, storage, write_text
from alignment.pipeline.fingerprint import (
    ABSENT,
    NOT_HASHED,
    difference,
    fingerprint,
    flatten,
)
from alignment.pipeline.located import locate, plain
from alignment.pipeline.locks import refuse_if_held
from alignment.pipeline.runs import RECIPE, STAGE, new_attempt, read_manifest, verify_parent, write_manifest
from alignment.pipeline.seals import SEALED, checkpoints
from alignment.recipe.load import parents, resolve
from alignment.recipe.schema import Recipe, Resolved, Stage

SCHEMA = 1  # of stage.yaml

Status = Literal["fresh", "resume", "done", "changed", "waiting"]


@dataclass(frozen=True)
class StageSpec:
    """One stage as the worker gets it.

    Attributes:
        run, stage: their names.
        output: the stage's folder.
        config: the resolved stage; local paths are absolute, `stage:x` links stay as written.
        parents: the folder of each stage it links to.
        fingerprint: what decides its result, as recorded when the stage began.
        attempt: the name of this start.
        recipe_path, runs: where the recipe came from, and where runs are kept.
        forced: the differences and the wrong links that were allowed since the stage began.
        parent_weights: the weights of each finished parent when this start was planned.
    """

    run: str
    stage: str
    output: Path
    config: Resolved
    parents: dict[str, Path]
    fingerprint: dict[str, Any]
    attempt: str
    recipe_path: Path
    runs: Path
    forced: tuple[str, ...] = ()
    parent_weights: dict[str, str] = field(default_factory=dict)

    @property
    def fingerprint_sha256(self) -> str:
        """The identity of the stage; checkpoints, manifest and dependants refer to it."""
        return digest(self.fingerprint)


@dataclass(frozen=True)
class StagePlan:
    """How one stage stands.

    Attributes:
        spec: the stage.
        status: see the module's docstring.
        difference: what changed or is damaged, one line each, when the status is `changed`.
        waiting_for: the stages that must finish first.
        unhashed: the keys of the fingerprint whose content was not hashed (dry run).
        altered: it finished, and its files are not those of its manifest.
    """

    spec: StageSpec
    status: Status
    difference: tuple[str, ...] = ()
    waiting_for: tuple[str, ...] = ()
    unhashed: tuple[str, ...] = ()
    altered: bool = False


def plan(
    recipe: Recipe,
    *,
    runs: Path,
    run: str,
    recipe_path: Path,
    hash_files: bool = True,
    allow: Sequence[str] = (),
    names: Sequence[str] | None = None,
) -> dict[str, StagePlan]:
    """Prepare stages (all of the recipe's, or `names`) and those they link to, in the recipe's order.

    Args:
        hash_files: False leaves files that were not hashed before as `not hashed yet` (a dry run).
        allow: keys whose change is accepted, `stages.dpo.train.beta` or a section such as `stages.dpo.train`.

    Raises:
        DataError: a file that a stage names is missing.
    """
    known: dict[str, StagePlan] = {}
    at: dict[str, Any] = {
        "runs": Path(os.path.abspath(runs)),
        "run": run,
        "recipe_path": Path(os.path.abspath(recipe_path)),
    }
    for name in recipe.stages if names is None else names:
        _prepare(recipe, name, known, allow=tuple(allow), hash_files=hash_files, **at)
    return {name: known[name] for name in recipe.stages if name in known}


def prepare(
    recipe: Recipe,
    name: str,
    *,
    runs: Path,
    run: str,
    recipe_path: Path,
    hash_files: bool = True,
    allow: Sequence[str] = (),
) -> StagePlan:
    """Prepare one stage; nothing is written but the memo of hashes.

    Raises:
        DataError: a file that the stage names is missing.
    """
    at: dict[str, Any] = {"runs": runs, "run": run, "recipe_path": recipe_path}
    return plan(recipe, hash_files=hash_files, allow=allow, names=[name], **at)[name]


def _prepare(
    recipe: Recipe,
    name: str,
    known: dict[str, StagePlan],
    *,
    runs: Path,
    run: str,
    recipe_path: Path,
    hash_files: bool,
    allow: tuple[str, ...],
) -> StagePlan:
    """`prepare`, its parents first; `known` holds what is prepared already."""
    if name in known:
        return known[name]
    at: dict[str, Any] = {"runs": runs, "run": run, "recipe_path": recipe_path}
    stage = locate(resolve(recipe, name))
    before = {
        parent: _prepare(recipe, parent, known, hash_files=hash_files, allow=allow, **at) for parent in parents(stage)
    }
    content = fingerprint(
        stage,
        parents={parent: _identity(entry.spec) for parent, entry in before.items()},
        hash_of=lambda path: file_hash(path, runs) if hash_files else known_hash(path, runs),
    )
    folders = {parent: entry.spec.output for parent, entry in before.items()}
    output = runs / run / name
    spec = StageSpec(stage=name, output=output, config=stage, parents=folders, fingerprint=content,
                     attempt=new_attempt(), parent_weights=_weights(folders), **at)  # fmt: skip
    unhashed = tuple(key for key, value in flatten(content).items() if value == NOT_HASHED)
    # A parent that was altered is no reason to wait: it is told, with the key, where links are checked (chains.admit).
    waiting_for = tuple(parent for parent, entry in before.items() if entry.status != "done" and not entry.altered)
    known[name] = replace(_compare(spec, allow), waiting_for=waiting_for, unhashed=unhashed)
    if waiting_for and known[name].status in ("fresh", "resume"):
        known[name] = replace(known[name], status="waiting")
    return known[name]


def _identity(spec: StageSpec) -> str:
    """The fingerprint hash of a parent, where it is known."""
    return NOT_HASHED if NOT_HASHED in flatten(spec.fingerprint).values() else spec.fingerprint_sha256


def _compare(spec: StageSpec, allow: tuple[str, ...]) -> StagePlan:
    """Compare a stage with what its folder holds."""
    try:
        recorded = _recorded(spec.output)
    except ChainError as damage:
        return StagePlan(spec, "changed", difference=(str(damage),), altered=_readable(spec.output))
    if recorded is None:
        foreign = _foreign(spec.output)
        return StagePlan(spec, "changed", difference=(foreign,)) if foreign else StagePlan(spec, "fresh")
    was, forced, finished = recorded
    if not finished and not any((path / SEALED).exists() for path in checkpoints(spec.output)):
        return StagePlan(spec, "fresh")  # started, with nothing to lose yet: a corrected recipe may simply start again
    found = [line for line in difference(was, spec.fingerprint) if not _by_version(line, spec.config)]
    lines = [f"stages.{spec.stage}.{line}" for line in [*found, *_other_parents(spec)]]
    lines = [line for line in lines if line not in forced]
    allowed = [line for line in lines if any(_covers(key, line) for key in allow)]
    refused = tuple(line for line in lines if line not in allowed)
    if refused:
        return StagePlan(spec, "changed", difference=refused)
    spec = replace(spec, fingerprint=was, forced=(*forced, *allowed))
    if finished:
        return StagePlan(spec, "done")
    problem = _other_engine(spec)
    return StagePlan(spec, "changed", difference=(problem,)) if problem else StagePlan(spec, "resume")


def _other_engine(spec: StageSpec) -> str | None:
    """Why this launch cannot read the newest checkpoint; an own `accelerate` configuration is judged by the worker."""
    launch, newest = spec.config.launch, sharding.newest_sealed(spec.output)
    if newest is None or launch.accelerate is not None:
        return None
    now = sharding.Engine(sharding.zero_stage(launch.deepspeed), launch.processes)
    problem = sharding.resume_problem(newest, now, spec.config.algorithm)
    return None if problem is None else f"stages.{spec.stage}.{problem}"


def _recorded(output: Path) -> tuple[dict[str, Any], tuple[str, ...], bool] | None:
    """Fingerprint and allowed changes of a stage that was started, and whether it finished."""
    manifest = read_manifest(output)
    if manifest is not None:
        verify_parent(output)
        return manifest["fingerprint"], tuple(manifest.get("forced") or ()), True
    if not (output / STAGE).exists():
        return None
    spec = read_stage(output / STAGE)
    return spec.fingerprint, spec.forced, False


def _readable(output: Path) -> bool:
    try:
        return read_manifest(output) is not None
    except ChainError:
        return False


def _foreign(output: Path) -> str | None:
    """A folder with files and no record is somebody else's, which is never written to: a line that says so."""
    ours = {"lock", "output.log", "status.json", "slurm"}
    if not output.is_dir():
        return None
    found = sorted(entry.name for entry in output.iterdir() if entry.name not in ours and entry.name[0] != ".")
    return f"{output}: holds {found[0]} but no {STAGE}: it was not made by a run" if found else None


def _by_version(line: str, stage: Stage) -> bool:
    """Whether a difference is a trainer key that only one of two upstream versions has, and the recipe does not set."""
    key, _, change = line.partition(": ")
    section, _, name = key.partition(".")
    return section == "train" and ABSENT in change.split(" -> ") and name.split(".")[0] not in stage.train


def _other_parents(spec: StageSpec) -> list[str]:
    """Lines for parents that ran again since: the same fingerprint, other weights."""
    manifest = read_manifest(spec.output)
    if manifest is not None:
        began = {name: entry.get("weights_sha256") for name, entry in (manifest.get("parents") or {}).items()}
    else:  # unfinished: policy and reference would not start from the same weights
        began = dict(read_stage(spec.output / STAGE).parent_weights)
    lines = []
    for name, was in began.items():
        is_ = spec.parent_weights.get(name)
        if was and is_ and was != is_:
            lines.append(f"parents.{name}.weights: {was[:12]} -> {is_[:12]}")
    return lines


def _weights(folders: dict[str, Path]) -> dict[str, str]:
    """The recorded weights of each parent that is finished; a damaged record is told where it is compared."""
    found = {}
    for name, folder in folders.items():
        with suppress(ChainError):
            found[name] = str((read_manifest(folder) or {}).get("weights_sha256") or "")
    return {name: value for name, value in found.items() if value}


def _covers(allowed: str, line: str) -> bool:
    """Whether `--allow-change` with this key covers a line of the difference: the key itself or a section of it."""
    key = line.partition(": ")[0]
    return key == allowed or key.startswith((f"{allowed}.", f"{allowed}["))


# -- stage.yaml --------------------------------------------------------------------------------------------------------


def write_stage(spec: StageSpec) -> Path:
    """Write the stage's `stage.yaml`, and return its path. Raises StorageError."""
    content = {
        "schema": SCHEMA,
        "run": spec.run,
        "stage": spec.stage,
        "attempt": spec.attempt,
        "output": str(spec.output),
        "runs": str(spec.runs),
        "recipe": str(spec.recipe_path),
        "parents": {name: str(path) for name, path in spec.parents.items()},
        "config": plain(spec.config),
        "fingerprint": spec.fingerprint,
        "forced": list(spec.forced),
        "parent_weights": dict(spec.parent_weights),
    }
    with storage(spec.output):
        spec.output.mkdir(parents=True, exist_ok=True)
    write_text(spec.output / STAGE, yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
    return spec.output / STAGE


def read_stage(path: Path) -> StageSpec:
    """Read a `stage.yaml`. Raises ChainError when it is missing, damaged or of an unknown schema."""
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise ChainError(f"{path}: cannot read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ChainError(f"{path}: damaged: not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        found = content.get("schema") if isinstance(content, dict) else None
        raise ChainError(f"{path}: schema {found!r}: this version of alignment reads schema {SCHEMA}")
    try:
        return StageSpec(
            run=content["run"],
            stage=content["stage"],
            output=Path(content["output"]),
            config=Resolved.model_validate(content["config"]),
            parents={name: Path(folder) for name, folder in content["parents"].items()},
            fingerprint=content["fingerprint"],
            attempt=content["attempt"],
            recipe_path=Path(content["recipe"]),
            runs=Path(content["runs"]),
            forced=tuple(content["forced"]),
            parent_weights=dict(content.get("parent_weights") or {}),
        )
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise ChainError(f"{path}: damaged: {' '.join(str(error).split())}") from error


def write_recipe(recipe: Recipe, folder: Path, *, origin: Path, overrides: Sequence[str] = ()) -> Path:
    """Keep the recipe of a run, overrides included, as `recipe.yaml` in its folder."""
    with storage(folder):
        folder.mkdir(parents=True, exist_ok=True)
    head = f"# {origin}" + "".join(f" --set {override}" for override in overrides) + "\n"
    content = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
    write_text(folder / RECIPE, head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=120))
    return folder / RECIPE


# -- what --allow-change and --force do --------------------------------------------------------------------------------


def record_forced(spec: StageSpec) -> None:
    """Add the allowed changes of a finished stage to its manifest."""
    manifest = read_manifest(spec.output)
    if manifest is not None and tuple(manifest.get("forced") or ()) != spec.forced:
        write_manifest(spec.output, manifest | {"forced": list(spec.forced)})


def dependants(recipe: Recipe, name: str) -> list[str]:
    """The stages that link to `name`, directly or not, in the recipe's order."""
    found = {name}
    for other in recipe.stages:  # parents come before their children
        if found & set(parents(resolve(recipe, other))):
            found.add(other)
    return [other for other in recipe.stages if other in found and other != name]


def archive(output: Path) -> Path | None:
    """Move a stage's folder aside, `dpo` to `dpo.20260102-030405`; None if there is none. Nothing is ever deleted.

    Raises:
        LockedError: a live worker holds it.
        StorageError: it cannot be renamed.
    """
    if not output.exists():
        return None
    refuse_if_held(output)
    target = output.with_name(f"{output.name}.{time.strftime('%Y%m%d-%H%M%S')}")
    count = 1
    while target.exists():
        count += 1
        target = output.with_name(f"{output.name}.{time.strftime('%Y%m%d-%H%M%S')}-{count}")
    with storage(output, "rename"):
        output.rename(target)
    return target
