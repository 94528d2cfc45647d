"""A stage as plain values for `stage.yaml`, with every local path absolute: the worker may be started anywhere."""

from __future__ import annotations

import os
from typing import Any

from alignment.pipeline.fingerprint import is_local, is_template_file
from alignment.recipe.described import described
from alignment.recipe.schema import Resolved, Section, Source, Stage, linked


def locate(stage: Resolved) -> Resolved:
    """The stage with every local path absolute, from the folder in which the command is typed."""

    def absolute(path: str) -> str:
        return os.path.abspath(os.path.expanduser(path)) if is_local(path) else path

    def hook(function: str) -> str:
        file, _, name = function.rpartition(":")
        return f"{os.path.abspath(os.path.expanduser(file))}:{name}" if file.endswith(".py") else function

    content = plain(stage)
    data = content.get("data", {})
    of_data = [data.get(name, []) for name in ("train", "eval", "against")]
    listed = [*of_data, content.get("prompts", []), content.get("pairs", [])]
    for rows in listed:
        # What is hashed and read is the data set, not the file of another tool that describes it.
        rows[:] = [_dumped(described(Source.model_validate(source))) for source in rows]
    for holder in (*(source for rows in listed for source in rows), content.get("model", {}),
                   content.get("model", {}).get("init", {}).get("tokenizer", {})):  # fmt: skip
        if "path" in holder:
            holder["path"] = absolute(holder["path"])
    for key in ("models", "scorers"):
        if key in content:
            content[key] = [link if linked(link) else absolute(link) for link in content[key]]
    if "baseline" in content and not linked(content["baseline"]):
        content["baseline"] = absolute(content["baseline"])
    if "augment" in data:
        data["augment"] = [hook(function) for function in data["augment"]]
    for reward in content.get("rewards", ()):
        if "function" in reward:
            reward["function"] = hook(reward["function"])
        if "model" in reward and not linked(reward["model"]):
            reward["model"] = absolute(reward["model"])
    if is_template_file(content.get("chat_template")):
        content["chat_template"] = os.path.abspath(os.path.expanduser(content["chat_template"]))
    for key in {"deepspeed", "accelerate"} & content.get("launch", {}).keys():
        content["launch"][key] = os.path.abspath(os.path.expanduser(content["launch"][key]))
    return Resolved.model_validate(content)


def _dumped(section: Section) -> dict[str, Any]:
    """A section as plain values, without nulls but for those that say something: where null is not the default."""
    content: dict[str, Any] = section.model_dump(mode="json", by_alias=True, exclude_none=True)
    for name, info in type(section).model_fields.items():
        key, value = info.alias or name, getattr(section, name)
        if value is None and info.default is not None and not info.is_required():
            content[key] = None
        elif isinstance(value, Section):
            content[key] = _dumped(value)
        elif isinstance(value, list | tuple):
            parts = zip(value, content[key], strict=True)
            content[key] = [_dumped(part) if isinstance(part, Section) else plain for part, plain in parts]
    return content


def plain(stage: Stage) -> dict[str, Any]:
    """A stage as plain values, defaults written out, that `Resolved.model_validate` takes back."""
    content = _dumped(stage)
    if "accelerate" in content.get("launch", {}):
        content["launch"].pop("processes", None)  # a default, which the schema would take for the user's
    return content
