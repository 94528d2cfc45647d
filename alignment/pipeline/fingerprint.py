"""The fingerprint of a stage: what decides its result, and nothing else.

It is a nested mapping that a person can read: algorithm, model, data (by content), the trainer's keys, the adapter,
the global batch, precision, seed, template, rewards, and the fingerprints of the parents. Two stages with equal
fingerprints are the same stage, wherever their files lie and however many processes run them. What only moves work
about is left out: launch, rows per device (unless the row's loss depends on them), logging, evaluation and save
frequency, reporting.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from alignment.errors import ChainError, DataError
from alignment.pipeline.files import canonical, digest
from alignment.pipeline.runs import read_manifest
from alignment.recipe.algorithms import ALGORITHMS, OWNED
from alignment.recipe.load import batch_dependent, full_train
from alignment.recipe.schema import Data, Model, Reward, Source, Stage, linked

NOT_HASHED = "not hashed yet"  # stands for a content hash in a dry run; equal to any
ABSENT = "(absent)"

# Trainer keys that do not change the weights that come out.
_NO_RESULT = frozenset({
    "overwrite_output_dir", "log_level", "log_level_replica", "log_on_each_node", "log_completions", "disable_tqdm",
    "logging_dir", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id",
    "eval_accumulation_steps", "eval_do_concat_batches", "batch_eval_metrics", "prediction_loss_only",
    "include_for_metrics",
    "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch_factor",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "torch_empty_cache_steps", "ddp_timeout",
    "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_broadcast_buffers", "skip_memory_metrics", "debug",
    "include_num_input_tokens_seen", "precompute_ref_batch_size", "num_completions_to_print",
})  # fmt: skip
# When they look and save: without a result, unless the best checkpoint is what the stage publishes.
_FREQUENCY = ("logging_", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_")
# The files of a model folder that are loaded from it.
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model", ".txt", ".jinja")
_RECORDS = frozenset({"manifest.json", "metrics.json", "status.json", "SEALED.json", "trainer_state.json"})

HashOf = Callable[[Path], str | None]


def fingerprint(stage: Stage, *, parents: Mapping[str, str], hash_of: HashOf) -> dict[str, Any]:
    """What decides the result of a resolved stage.

    Args:
        stage: the resolved stage, with absolute local paths (see `located.locate`).
        parents: the fingerprint hash of each stage it links to, or NOT_HASHED.
        hash_of: a file's content hash, or None where it is not known and must not be computed.

    Raises:
        DataError: a file that the recipe names does not exist.
    """
    row = ALGORITHMS[stage.algorithm]
    content: dict[str, Any] = {"algorithm": stage.algorithm, "seed": stage.seed}
    content["precision"] = stage.precision.model_dump() if stage.precision else None
    content["model"] = _model(stage.model, hash_of) if stage.model else None
    content["chat_template"] = _template(stage.chat_template, hash_of)
    content["data"] = _data(stage.data, hash_of) if stage.data else None
    content["batch"] = {"global": stage.batch.global_}
    if batch_dependent(stage):
        content["batch"]["per_device"] = stage.batch.per_device
    if row.config is not None:
        content["train"] = _train(stage)
    content["peft"] = stage.peft
    for key in ("prompts", "pairs"):
        content[key] = [_source(source, hash_of) for source in getattr(stage, key) or ()] or None
    content["rewards"] = [_reward(reward, hash_of) for reward in stage.rewards] or None
    content["sampling"] = stage.sampling.model_dump() if stage.sampling else None
    content["limits"] = stage.limits.model_dump() if stage.limits else None
    content["models"] = [_link(link, hash_of) for link in stage.models or ()] or None
    content["baseline"] = _link(stage.baseline, hash_of) if stage.baseline else None
    content["scorers"] = [_link(link, hash_of) for link in stage.scorers] or None
    content["parents"] = dict(parents) or None
    # Through JSON, so that what is compared later is what was written: lists, not tuples; text keys.
    plain: dict[str, Any] = json.loads(canonical({key: value for key, value in content.items() if value is not None}))
    return plain


def flatten(content: Any, prefix: str = "") -> dict[str, Any]:
    """A nested fingerprint as `{"train.beta": 0.1, "data.train[0].content": "3fa2..."}`; empty containers stay."""
    if isinstance(content, Mapping) and content:
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in content.items()]
    elif isinstance(content, (list, tuple)) and content:
        items = [(f"{prefix}[{index}]", value) for index, value in enumerate(content)]
    else:
        return {prefix: content}
    return {path: leaf for key, value in items for path, leaf in flatten(value, key).items()}


def difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What changed between two fingerprints, one line for each key: `train.beta: 0.1 -> 0.05`.

    Contents that are not hashed yet count as equal.
    """
    before, after = flatten(old), flatten(new)
    lines = []
    for key in sorted(before.keys() | after.keys()):
        was, is_ = before.get(key, ABSENT), after.get(key, ABSENT)
        if was != is_ and NOT_HASHED not in (was, is_):
            lines.append(f"{key}: {_show(was)} -> {_show(is_)}")
    return lines


def _show(value: Any) -> str:
    text = "none" if value is None else str(value)
    is_hash = len(text) == 64 and set(text) <= set("0123456789abcdef")
    return text[:12] if is_hash else text


def _train(stage: Stage) -> dict[str, Any]:
    """The trainer's keys that decide the result, upstream's defaults included."""
    train = full_train(stage)
    best = bool(train.get("load_best_model_at_end"))
    kept = {
        key: value
        for key, value in train.items()
        if key not in OWNED and key not in _NO_RESULT and (best or not key.startswith(_FREQUENCY))
    }
    if best and stage.checkpoints is not None:
        kept["checkpoints.every"] = stage.checkpoints.every
    return kept


def _data(data: Data, hash_of: HashOf) -> dict[str, Any]:
    """Rows and their selection; `limits` and `strict` only decide whether the stage stops."""
    content: dict[str, Any] = {"train": [_source(source, hash_of) for source in data.train]}
    if data.eval:
        content["eval"] = [_source(source, hash_of) for source in data.eval]
    if data.eval_fraction is not None:
        content["eval_fraction"] = data.eval_fraction
        content["held_out_by"] = "prompt"  # the rule: rows of one prompt are never parted
    known = ("train", "eval", "eval_fraction", "against", "limits", "strict")
    remedies = data.model_dump(exclude={*known, "on_overlong", "augment"}, exclude_defaults=True)
    if data.augment:
        remedies["augment"] = [_function(hook, hash_of) for hook in data.augment]
    return {**content, "on_overlong": data.on_overlong, **remedies}


def _source(source: Source, hash_of: HashOf) -> dict[str, Any]:
    # Defaults are left out, so that a field that a later version adds changes no fingerprint.
    selection = source.model_dump(exclude={"path"}, exclude_defaults=True)
    files = local_files(source.path)
    if files is None:
        return {"hub": source.path, **selection}
    return {"content": _contents({str(index): path for index, path in enumerate(files)}, hash_of), **selection}


def _model(model: Model, hash_of: HashOf) -> dict[str, Any]:
    content = model.model_dump(exclude={"path"}, exclude_defaults=True)
    if model.init is not None and model.init.tokenizer.path is not None:
        content["init"]["tokenizer"] = {"path": _folder(model.init.tokenizer.path, hash_of)}
    return {**content, "path": _folder(model.path, hash_of)} if model.path is not None else content


def _link(link: str, hash_of: HashOf) -> str:
    return link if linked(link) else _folder(link, hash_of)


def _folder(path: str, hash_of: HashOf) -> str:
    """A local model folder by the content of what is loaded from it; a hub name as it is."""
    if not is_local(path):
        return path
    folder = Path(path)
    if not folder.is_dir():
        raise DataError(f"{path}: no such folder")
    try:
        manifest = read_manifest(folder)
    except ChainError:
        manifest = None  # not one of ours after all; what counts is the files
    names = list(manifest["files"]) if manifest else [entry.name for entry in folder.iterdir() if entry.is_file()]
    loaded = [name for name in names if name.endswith(_MODEL_FILES) and Path(name).name not in _RECORDS]
    return _contents({name: folder / name for name in sorted(loaded)}, hash_of)


def _template(template: str | None, hash_of: HashOf) -> str | None:
    if template is None or not is_template_file(template):
        return template
    return _contents({"0": Path(template)}, hash_of)


def _reward(reward: Reward, hash_of: HashOf) -> dict[str, Any]:
    """A reward by its content; defaults are left out, as in `_source`."""
    content = reward.model_dump(exclude_defaults=True)
    if reward.function is not None:
        content["function"] = _function(reward.function, hash_of)
    if reward.model is not None:
        content["model"] = _link(reward.model, hash_of)
    return content


def _function(hook: str, hash_of: HashOf) -> str | dict[str, str]:
    """`path/file.py:fn` by the file's content and the name, `pkg.mod:fn` as it is."""
    file, _, name = hook.rpartition(":")
    return {"content": _contents({"0": Path(file)}, hash_of), "name": name} if file.endswith(".py") else hook


def _contents(files: Mapping[str, Path], hash_of: HashOf) -> str:
    """One file's hash, or the hash of the table of several."""
    for path in files.values():
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    hashes = {name: hash_of(path) for name, path in files.items()}
    if None in hashes.values():
        return NOT_HASHED
    return next(iter(hashes.values())) or "" if len(hashes) == 1 else digest(hashes)


# -- what a path means -------------------------------------------------------------------------------------------------

_DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst")


def is_local(path: str) -> bool:
    """Whether a path of a recipe is a local one: it exists, looks like a path, or ends like a data file. Else: hub."""
    looks_local = path.startswith(("/", ".", "~")) or path.endswith((*_DATA_SUFFIXES, ".yaml", ".yml"))
    looks_local = looks_local or glob.has_magic(path)
    return looks_local or Path(path).exists()


def is_template_file(template: str | None) -> bool:
    """Whether a `chat_template:` is a file, not the name of a template."""
    return template is not None and (template.endswith(".jinja") or "/" in template)


def local_files(path: str) -> list[Path] | None:
    """The files behind a source: the file, the sorted matches of a glob, a folder's data files; None for a hub name.

    Raises:
        DataError: a local path behind which there is no file.
    """
    if not is_local(path):
        return None
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        found = sorted(file for file in place.rglob("*") if file.is_file() and file.name.endswith(_DATA_SUFFIXES))
    else:
        found = sorted(Path(match) for match in glob.glob(path, recursive=True) if Path(match).is_file())
    if not found:
        raise DataError(f"{path}: no such file" if not glob.has_magic(path) else f"{path}: matches no file")
    return found
