"""Data sets that another tool's file describes: LLaMA-Factory's `dataset_info.json`, and Axolotl's YAML.

A source whose `path` is such a file stands for the data set that the file names: `described` returns the source itself,
with path, columns, names of roles and format filled in. `subset` picks the entry where the file has several. A setting
of the entry that would change what is trained and that is not read here is refused, never skipped.

    {path: LLaMA-Factory/data/dataset_info.json, subset: alpaca_en_demo}
    {path: axolotl.yaml, subset: mlabonne/FineTome-100k}
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from alignment.errors import DataError
from alignment.recipe.problems import did_you_mean, shown
from alignment.recipe.schema import Source

FACTORY = "dataset_info.json"
_FACTORY_ROLES = {
    "user_tag": ("human", "user"), "assistant_tag": ("gpt", "assistant"), "observation_tag": ("observation", "tool"),
    "function_tag": ("function_call", "function_call"), "system_tag": ("system", "system"),
}  # fmt: skip
_FACTORY_COLUMNS = {
    "alpaca": {"prompt": "instruction", "query": "input", "response": "output", "history": "history"},
    "sharegpt": {"messages": "conversations"},
}
_FACTORY_SHARED = {
    "system": "system", "tools": "tools", "chosen": "chosen", "rejected": "rejected", "kto_tag": "label"
}  # fmt: skip
_FACTORY_KEYS = frozenset(
    "hf_hub_url ms_hub_url om_hub_url script_url file_name cloud_file_name formatting ranking subset split folder "
    "num_samples columns tags".split()
)
# Axolotl's prompt strategies for pairs, without the name of their template: our columns and the format.
_AXOLOTL_PAIRS: dict[str, tuple[dict[str, str], str]] = {
    "default": ({"conversations": "messages"}, "sharegpt-pairs"),
    "argilla": (
        {"instruction": "instruction", "chosen": "chosen_response", "rejected": "rejected_response"}, "alpaca-pairs"),
    "argilla_chat": ({}, "implicit-prompt"),
    "intel": ({}, "orca-pairs"),
    "prompt_pairs": ({}, "prompt-chosen-rejected"),
    "icr": ({"prompt": "input"}, "prompt-chosen-rejected"),
    "ultra": ({}, "ultrafeedback"),
}  # fmt: skip
_AXOLOTL_TEMPLATES = ("chat_template", "chatml", "llama3", "zephyr", "gemma", "passthrough")
_AXOLOTL_KEYS = frozenset(
    "path name subset split revision data_files data_dir ds_type type field field_messages field_system field_tools "
    "field_chosen field_rejected message_property_mappings message_field_role message_field_content roles "
    "roles_to_train train_on_eos chat_template chat_template_jinja message_field_training conversation "
    "trust_remote_code".split()
)


def is_description(path: str) -> bool:
    """Whether a path is that of a file which describes data sets, rather than of one."""
    return os.path.basename(path) == FACTORY or path.endswith((".yaml", ".yml"))


def described(source: Source) -> Source:
    """The data set that a source stands for; any other source as it is.

    Raises:
        DataError: the file cannot be read, or has no such entry, or one that cannot be followed; one line.
    """
    path = os.path.expanduser(source.path)
    if not is_description(path) or os.path.isdir(path):
        return source
    factory = os.path.basename(path) == FACTORY
    entry = (_factory_entry if factory else _axolotl_entry)(path, source.subset)
    found = (_from_factory if factory else _from_axolotl)(entry, path)
    given = source.model_dump(exclude={"path", "subset"}, exclude_defaults=True, exclude_none=True)
    merged = {**found, **given, "columns": {**found.get("columns", {}), **given.get("columns", {})}}
    try:
        return Source.model_validate({key: value for key, value in merged.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise DataError(f"{path}: {place}: {first['msg']}, found {shown(first['input'])}") from None


def _document(path: str) -> Any:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        return json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, ValueError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise DataError(f"{path}: cannot be read: {reason}") from None


def _pick(path: str, entries: Mapping[str, Any], wanted: str | None) -> Any:
    """The entry that `subset` names; the only one where it names none."""
    if wanted is None and len(entries) == 1:
        return next(iter(entries.values()))
    if wanted is not None and wanted in entries:
        return entries[wanted]
    some = ", ".join(list(entries)[:20]) + (" ..." if len(entries) > 20 else "")
    if wanted is None:
        raise DataError(f"{path}: describes {len(entries)} data sets: name one with `subset`: {some}")
    hint = did_you_mean(wanted, entries) or f"; it has {some}"
    raise DataError(f"{path}: describes no data set {shown(wanted)}{hint}")


def _refuse_unknown(path: str, entry: Mapping[str, Any], known: frozenset[str]) -> None:
    for key in entry:
        if key not in known:
            raise DataError(f"{path}: {key}: is not followed here; write the source itself into the recipe")


# --- LLaMA-Factory --------------------------------------------------------------------------------------------------


def _factory_entry(path: str, name: str | None) -> Mapping[str, Any]:
    content = _document(path)
    if not isinstance(content, Mapping) or not all(isinstance(entry, Mapping) for entry in content.values()):
        raise DataError(f"{path}: is not LLaMA-Factory's list of data sets, name: {{file_name: ...}}")
    entry: Mapping[str, Any] = _pick(path, content, name)
    return entry


def _from_factory(entry: Mapping[str, Any], path: str) -> dict[str, Any]:
    _refuse_unknown(path, entry, _FACTORY_KEYS)
    formatting = entry.get("formatting", "alpaca")
    columns, tags = dict(entry.get("columns") or {}), dict(entry.get("tags") or {})
    if formatting == "openai":
        formatting, columns = "sharegpt", {"messages": "messages", **columns}
        tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant",
                "observation_tag": "tool", **tags}  # fmt: skip
    if formatting not in _FACTORY_COLUMNS:
        raise DataError(f"{path}: formatting: {shown(formatting)} is unknown; known are alpaca, sharegpt, openai")
    ours = _FACTORY_COLUMNS[formatting] | _FACTORY_SHARED
    for column in columns:
        if column not in ours:
            raise DataError(f"{path}: columns: {column}: only text is read here")
    kind = "-label" if "kto_tag" in columns else "-pairs" if entry.get("ranking") else ""
    if formatting == "alpaca" and kind == "-pairs" and "chosen" not in columns:
        kind = "-ranked"  # the older way: a list of two answers, the better one first
    turns = None
    if formatting == "sharegpt":
        roles = {tags.get(tag, usual): role for tag, (usual, role) in _FACTORY_ROLES.items()}
        turns = {"role": tags.get("role_tag", "from"), "content": tags.get("content_tag", "value"), "roles": roles}
    return {
        "path": _factory_path(entry, path),
        "subset": entry.get("subset"),
        "split": entry.get("split"),
        "folder": entry.get("folder"),
        "rows": entry.get("num_samples"),
        "columns": {ours[column]: theirs for column, theirs in columns.items()},
        "turns": turns,
        "format": formatting + kind,
    }


def _factory_path(entry: Mapping[str, Any], path: str) -> str:
    if isinstance(entry.get("file_name"), str):
        return os.path.join(os.path.dirname(path), entry["file_name"])
    if isinstance(entry.get("hf_hub_url"), str):
        return str(entry["hf_hub_url"])
    raise DataError(f"{path}: names neither file_name nor hf_hub_url for this data set")


# --- Axolotl --------------------------------------------------------------------------------------------------------


def _axolotl_entry(path: str, name: str | None) -> Mapping[str, Any]:
    content = _document(path)
    listed = content.get("datasets") if isinstance(content, Mapping) else None
    if not isinstance(listed, list) or not all(isinstance(entry, Mapping) and "path" in entry for entry in listed):
        raise DataError(f"{path}: is not an Axolotl file with `datasets: [{{path: ..., type: ...}}]`")
    paths = [str(entry["path"]) for entry in listed]
    names = [text if paths.count(text) == 1 else f"{text}[{index}]" for index, text in enumerate(paths)]
    entry: Mapping[str, Any] = _pick(path, dict(zip(names, listed, strict=True)), name)
    return entry


def _from_axolotl(entry: Mapping[str, Any], path: str) -> dict[str, Any]:
    _refuse_unknown(path, entry, _AXOLOTL_KEYS)
    _refuse_other_training(entry, path)
    columns, format_ = _axolotl_type(entry, path)
    for key, ours in (("field_system", "system"), ("field_tools", "tools"), ("field_chosen", "chosen"),
                      ("field_rejected", "rejected")):  # fmt: skip
        if key in entry:
            columns[ours] = entry[key]
    roles = {theirs: ours for ours, names in (entry.get("roles") or {}).items() for theirs in names}
    mapped = entry.get("message_property_mappings") or {}
    turns = {
        "role": mapped.get("role", entry.get("message_field_role")),
        "content": mapped.get("content", entry.get("message_field_content")),
        "roles": roles,
    }
    files = entry.get("data_files")
    files = files[0] if isinstance(files, list) and len(files) == 1 else files
    if isinstance(files, list):
        raise DataError(f"{path}: data_files: name one file, or a pattern with *; the recipe may have more sources")
    return {
        "path": files or entry["path"],
        "subset": entry.get("name", entry.get("subset")),
        "split": entry.get("split"),
        "revision": entry.get("revision"),
        "folder": entry.get("data_dir"),
        "columns": {ours: theirs for ours, theirs in columns.items() if ours != theirs},
        "turns": turns if any(turns.values()) else None,
        "format": format_,
    }


def _axolotl_type(entry: Mapping[str, Any], path: str) -> tuple[dict[str, str], str]:
    """Our columns, and the format, of a prompt strategy."""
    kind = entry.get("type", "chat_template")
    if isinstance(kind, Mapping):
        known = {"field_instruction": "instruction", "field_input": "input", "field_output": "output",
                 "field_system": "system"}  # fmt: skip
        for key in kind:
            if key not in known:
                raise DataError(f"{path}: type: {key}: is not followed here; a chat template writes the prompt")
        return {known[key]: theirs for key, theirs in kind.items()}, "alpaca"
    if kind == "chat_template":
        return {"messages": entry.get("field_messages", "messages")}, "messages"
    if kind == "sharegpt":
        return {"conversations": entry.get("field_messages", "conversations")}, "sharegpt"
    if kind == "completion":
        return {"text": entry.get("field", "text")}, "text"
    if kind == "alpaca":
        return {}, "alpaca"
    if kind == "alpaca_chat.load_qa":
        return {"prompt": "question", "completion": "answer"}, "prompt-completion"
    template, _, strategy = str(kind).partition(".")
    if template in _AXOLOTL_TEMPLATES and strategy in _AXOLOTL_PAIRS:
        columns, format_ = _AXOLOTL_PAIRS[strategy]
        if "field_messages" in entry:
            columns = {**columns, "conversations": entry["field_messages"]}
        return dict(columns), format_
    raise DataError(f"{path}: type: {shown(kind)} is not followed here; write the source itself into the recipe")


def _refuse_other_training(entry: Mapping[str, Any], path: str) -> None:
    """Here the loss is on every answer of a conversation, and on its stop token; nothing else is pretended."""
    answering = {"assistant", *(entry.get("roles") or {}).get("assistant", ("gpt",))}
    if not set(entry.get("roles_to_train") or ["assistant"]) <= answering:
        raise DataError(f"{path}: roles_to_train: the loss is on the assistant's turns here")
    if entry.get("train_on_eos", "turn") != "turn":
        raise DataError(f"{path}: train_on_eos: every answer's stop token is trained here (turn)")
    if entry.get("message_field_training", "training") not in ("train", "training", "weight"):
        raise DataError(f"{path}: message_field_training: is not followed here; rows are dropped that mark an answer "
                        "as not to be trained by `train`, `training` or `weight`")  # fmt: skip
