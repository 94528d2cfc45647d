"""What a stage may follow: every model that it links to, held against what that model says of itself.

    spec = admit(spec, force=False)     # raises ChainError for a wrong chain, with the key and the remedy
    cautions(recipe, "ppo")             # what is allowed, and rarely meant

A finished stage speaks through its manifest, any other folder through its configuration. `--force` goes on in spite of
what is found; the stage then begins with it in `forced`, and its manifest keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.errors import ChainError, DataError, ModelError
from alignment.pipeline import folders, hub
from alignment.pipeline.files import fault, file_hash
from alignment.pipeline.fingerprint import is_local
from alignment.pipeline.plan import StageSpec
from alignment.pipeline.runs import MANIFEST, STAGE, read_manifest
from alignment.pipeline.seals import SEALED
from alignment.recipe.algorithms import ALGORITHMS, Kind
from alignment.recipe.checks import KIND_IN_WORDS
from alignment.recipe.load import resolve
from alignment.recipe.schema import Recipe, Stage, is_commit, linked, pinned

FORCE = "or go on all the same: --stage {stage} --force"
REFERENCED = ("preference", "unpaired", "prompts")  # schemas of algorithms that start where an earlier one ended


@dataclass(frozen=True)
class Link:
    """One model that a stage starts from or uses.

    Attributes:
        key: where the recipe names it, within the stage.
        folder: where it is.
        wanted: the kind of model that is needed.
        manifest: what its stage recorded; None for a folder that no stage made.
        deep: contents are compared, not only sizes (a dry run reads no weights).
    """

    key: str
    folder: Path
    wanted: Kind
    manifest: dict[str, Any] | None
    deep: bool = True


def admit(spec: StageSpec, *, force: bool = False, deep: bool = True) -> StageSpec:
    """The stage, allowed to run: with `force`, what is wrong about its links is added to `forced`.

    Raises:
        ChainError: a link is wrong and was not forced before; one line for each, with key and remedy.
    """
    found = [line for line in problems(spec, deep=deep) if line not in spec.forced]
    if found and not force:
        remedy = FORCE.format(stage=spec.stage)
        raise ChainError("\n".join(f"{line}; {remedy}" for line in found))
    return replace(spec, forced=(*spec.forced, *found))


def problems(spec: StageSpec, *, deep: bool = True) -> list[str]:
    """One line for each thing that is wrong about the models a stage links to, `stages.dpo.model: ...`."""
    found = []
    for key, place, wanted in _links(spec.config):
        name = linked(place)
        folder = spec.parents[name] if name is not None else Path(place)
        if name is None and not (is_local(place) and folder.is_dir()):
            continue  # a hub name, or a folder that is told to be missing elsewhere
        try:
            link = Link(key, folder, wanted, read_manifest(folder), deep)
            lines = list(_wrong(spec, link))
        except (ChainError, ModelError, DataError) as error:
            lines = [f"{key}: {error}"]
        found += [f"stages.{spec.stage}.{line}" for line in lines]
    return list(dict.fromkeys(found))


def _links(stage: Stage) -> Iterator[tuple[str, str, Kind]]:
    """Every model that a stage names: its key, the link or path, and the kind that is needed."""
    row = ALGORITHMS[stage.algorithm]
    if "model" in row.sections and stage.model is not None:
        place = f"stage:{stage.model.stage}" if stage.model.stage is not None else stage.model.path
        if place is not None:
            yield "model", place, row.starts_from
    for index, place in enumerate(stage.models or ()):
        yield f"models[{index}]", place, "causal-lm"
    for index, place in enumerate(stage.scorers):
        yield f"scorers[{index}]", place, "sequence-classification"
    for index, reward in enumerate(stage.rewards):
        if reward.model is not None:
            yield f"rewards[{index}].model", reward.model, "sequence-classification"


def _wrong(spec: StageSpec, link: Link) -> Iterator[str]:
    """What is wrong about one link, each line beginning with the key that the remedy changes."""
    checks: tuple[Callable[[StageSpec, Link], Iterator[str]], ...] = (
        _unfinished, _altered, _kind, _base, _vocabulary, _template
    )  # fmt: skip
    for check in checks:
        lines = list(check(spec, link))
        yield from lines
        if lines and check in (_unfinished, _kind):
            return  # what else is found would only follow from it


def _unfinished(spec: StageSpec, link: Link) -> Iterator[str]:
    """A folder by path that is a checkpoint, or a stage that did not end."""
    if link.manifest is not None:
        return
    if (link.folder / SEALED).exists():
        yield f"{link.key}: {link.folder} is a checkpoint of an unfinished stage; name the stage's own folder"
    elif (link.folder / STAGE).exists():
        yield f"{link.key}: {link.folder} is a stage that is not finished (no {MANIFEST}); run it first"


def _altered(spec: StageSpec, link: Link) -> Iterator[str]:
    """Files that are not those of the manifest."""
    if link.manifest is None:
        return
    reason = fault(link.folder, link.manifest["files"], deep=link.deep, hash_of=lambda path: file_hash(path, spec.runs))
    if reason is not None:
        ours = link.folder in spec.parents.values()
        again = f"run it again, --stage {link.manifest['stage']} --force" if ours else "restore it, or make it again"
        yield f"{link.key}: {link.folder}/{reason}; it was altered after its manifest was written: {again}"


def _kind(spec: StageSpec, link: Link) -> Iterator[str]:
    """A reward model where a language model is needed, or the reverse. Loading cannot tell them apart."""
    found = link.manifest["kind"] if link.manifest is not None else folders.kind_of(link.folder)
    known = link.manifest is not None or found is not None
    if known and found != link.wanted:
        yield f"{link.key}: {link.folder} is {KIND_IN_WORDS[found]}, and {KIND_IN_WORDS[link.wanted]} is needed"


def _base(spec: StageSpec, link: Link) -> Iterator[str]:
    """An adapter whose base is missing, not merged, or not the one it was trained on."""
    if not (link.folder / folders.ADAPTER_CONFIG).is_file():
        return
    described = (link.manifest or {}).get("model") or {}
    reason = folders.adapter_fault(link.folder, described.get("adapter"), spec.runs, deep=link.deep)
    if reason is not None:
        yield f"{link.key}: {link.folder}: {reason}"


def _vocabulary(spec: StageSpec, link: Link) -> Iterator[str]:
    """A critic that starts as the reward model reads the policy's tokens: the ids and the template must be the same.

    Rewards alone go by text, so there a reward model may have a tokenizer and a template of its own.
    """
    stage = spec.config
    if not link.key.startswith("rewards[") or stage.train.get("critic_init") != "reward" or stage.model is None:
        return
    start = spec.parents.get(stage.model.stage or "") or Path(stage.model.path or "")
    theirs, ours = folders.vocabulary(link.folder), folders.vocabulary(start)
    if theirs is None or ours is None:
        return
    remedy = "train the reward model from the policy's start, or set critic_init: policy"
    if theirs.sha256 != ours.sha256:
        yield (
            f"train.critic_init: reward needs a reward model with the policy's tokenizer; {link.folder} has "
            f"{theirs.size} ids of its own, the policy {ours.size}; {remedy}"
        )
    elif ours.template_sha256 is not None and theirs.template_sha256 != ours.template_sha256:
        yield (
            f"train.critic_init: reward needs a reward model with the policy's chat template; {link.folder} was "
            f"trained with another; {remedy}"
        )


def _template(spec: StageSpec, link: Link) -> Iterator[str]:
    """A policy that goes on in another template than it was trained with: its reference never saw that one."""
    if link.key != "model" or link.manifest is None or ALGORITHMS[spec.config.algorithm].schema not in REFERENCED:
        return
    ours, theirs = spec.fingerprint.get("chat_template"), _spoken(link.manifest)
    if ours is not None and theirs is not None and ours != theirs:
        yield (
            f"chat_template: {_named(ours)}, but {link.folder} was trained with {_named(theirs)}; leave the key out "
            f"(a model keeps its template), or run an sft stage with {_named(ours)} between the two"
        )


def _spoken(manifest: dict[str, Any] | None) -> str | None:
    """The template of a stage: its own, or that of the stage it started from; by name, or by the file's hash."""
    spoken = (one["fingerprint"].get("chat_template") for one in _lineage(manifest))
    return next((str(template) for template in spoken if template is not None), None)


def _lineage(manifest: dict[str, Any] | None) -> Iterator[dict[str, Any]]:
    """A stage's manifest, that of the stage it started from, and so on, as far as they are there."""
    for _ in range(64):  # no chain is longer, and a record may be forged into a circle
        if manifest is None:
            return
        yield manifest
        start = _start(manifest)
        manifest = None if start is None else read_manifest(start)


def _start(manifest: dict[str, Any]) -> Path | None:
    """The folder of the stage that a stage started from."""
    name = (manifest["fingerprint"].get("model") or {}).get("stage")
    entry = (manifest.get("parents") or {}).get(name) or {}
    return Path(entry["path"]) if "path" in entry else None


def _named(template: str) -> str:
    """A template as a message names it; one from a file is known by its hash."""
    return template if len(template) != 64 else f"a file ({template[:12]})"


# -- what is allowed, and rarely meant ---------------------------------------------------------------------------------


def cautions(recipe: Recipe, name: str) -> list[str]:
    """What of a stage's links is legal and rarely meant; one line each, `stages.ppo.model: ...`."""
    stage = resolve(recipe, name)
    row = ALGORITHMS[stage.algorithm]
    lines = []
    if row.schema == "prompts" and stage.model is not None and _instructed(recipe, stage) is False:
        lines.append(
            f"stages.{name}.model: {stage.algorithm} starts from a base that was never instruction-tuned: its replies "
            "go on with the text and seldom end; put an sft stage before it"
        )
    return lines + list(_unpinned(name, stage))


def _unpinned(name: str, stage: Stage) -> Iterator[str]:
    """What a stage loads from the hub at no commit of its own."""
    model, data = stage.model, stage.data
    if model is not None and model.path is not None and not is_local(model.path) and not is_commit(model.revision):
        yield f"stages.{name}.model: {hub.advice(model.path, model.revision)}"
    for key, place, _ in _links(stage):
        if key != "model" and linked(place) is None and not is_local(place) and pinned(place)[1] is None:
            yield f"stages.{name}.{key}: {hub.advice(place)}"
    rows = {"data.train": data.train, "data.eval": data.eval or ()} if data is not None else {}
    rows |= {"prompts": stage.prompts or (), "pairs": stage.pairs or ()}
    moving: dict[str, str] = {}  # the first place of each
    for key, sources in rows.items():
        for index, source in enumerate(sources):
            if not is_local(source.path) and not is_commit(source.revision):
                moving.setdefault(source.path, f"{key}[{index}]")
    for path, key in moving.items():
        yield (
            f"stages.{name}.{key}: {path} is not pinned: its rows may change; for a result that can be repeated "
            "set `revision`"
        )


def _instructed(recipe: Recipe, stage: Stage) -> bool | None:
    """Whether a stage starts from a model that learned to answer; None where nobody knows (a hub name)."""
    seen = 0
    while stage.model is not None and stage.model.stage is not None and seen < len(recipe.stages):
        stage, seen = resolve(recipe, stage.model.stage), seen + 1
        if ALGORITHMS[stage.algorithm].schema != "text":
            return True
    if stage.model is None or stage.model.init is not None:
        return False
    folder = Path(stage.model.path or "")
    if not (is_local(stage.model.path or "") and folder.is_dir()):
        return None
    return _folder_instructed(folder)


def _folder_instructed(folder: Path) -> bool | None:
    """The same of a model folder: from its manifest and its parents', else whether its tokenizer has a template."""
    try:
        lineage = list(_lineage(read_manifest(folder)))
        if lineage:
            rows = (ALGORITHMS.get(str(manifest.get("algorithm"))) for manifest in lineage)
            learned = any(row is not None and row.schema != "text" for row in rows)
            return True if learned else None if _start(lineage[-1]) else False
        found = folders.vocabulary(folder)
    except (ChainError, ModelError):
        return None  # told where the link is checked
    return None if found is None else found.template_sha256 is not None
