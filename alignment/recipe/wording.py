"""The schema's errors in the words of a recipe: what was found, what to do."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Any, Union, get_args, get_origin

from pydantic_core import ErrorDetails

from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.problems import Place, did_you_mean, nearest, shown
from alignment.recipe.schema import Recipe, Section, Stage
from alignment.recipe.spellings import today
from alignment.recipe.upstream import fields

_EXPECTED = {
    "bool_type": "true or false",
    "dict_type": "a mapping",
    "float_type": "a number",
    "finite_number": "a finite number",
    "int_type": "a whole number",
    "list_type": "a list",
    "model_type": "a mapping",
    "string_type": "text",
}


def complaint(place: Place, details: Sequence[ErrorDetails]) -> str:
    """Say what is wrong at a place; several errors there come from the members of a union."""
    first = details[0]
    kind, value, context = first["type"], first["input"], first.get("ctx", {})
    if kind == "missing":
        return f"is missing{_meaning(place)}"
    if kind == "extra_forbidden":
        return f"unknown key{unknown_key(place)}"
    if kind == "value_error":
        return str(context["error"])
    if kind == "too_short":
        return f"is empty; give at least {context['min_length']}"
    if kind == "string_pattern_mismatch":
        letters = ": letters, digits, ., - and _" if "._-" in context["pattern"] else ": letters, digits, - and _"
        return f"{shown(value)} is not allowed here{_meaning(place) or letters}"
    return f"expected {' or '.join(_expected(detail) for detail in details)}, found {shown(value)}"


def _expected(detail: ErrorDetails) -> str:
    kind, context = detail["type"], detail.get("ctx", {})
    if context.get("class_name") == "Model":
        return "text or a mapping"
    bounds = {
        "greater_than": "gt", "greater_than_equal": "ge", "less_than": "lt", "less_than_equal": "le"
    }  # fmt: skip
    words = {"gt": "a number above", "ge": "at least", "lt": "a number below", "le": "at most"}
    if kind in bounds:
        return f"{words[bounds[kind]]} {context[bounds[kind]]:g}"
    if kind == "literal_error":
        return str(context["expected"]).replace("'", "")
    return _EXPECTED.get(kind, detail["msg"].removeprefix("Input should be "))


def _meaning(place: Place) -> str:
    """`: a row of the table`, the description of a key of the schema; an item of a list has that of the list."""
    while place and isinstance(place[-1], int):
        place = place[:-1]
    section = section_at(place[:-1])
    for name, field in section.model_fields.items() if section is not None else ():
        if (field.alias or name) == place[-1] and field.description:
            return f": {field.description}"
    return ""


def unknown_key(place: Place) -> str:
    """What a key that the schema does not know was meant to be: a typo, a foreign spelling, another section's key."""
    section, key = section_at(place[:-1]), str(place[-1])
    known = list(_keys(section)) if section is not None else []
    slip = nearest(key, known, cutoff=0.85)
    if slip is not None:
        return f" (did you mean {slip}?)"
    advice = today(key)
    if advice is not None:
        return f": {advice}"
    if any(key in fields(row.config) for row in ALGORITHMS.values() if row.config):
        return f"; it belongs in `stages.<name>.train.{key}`"
    return elsewhere(key) or did_you_mean(key, known) or f"; known are {', '.join(known)}"


def elsewhere(key: str) -> str:
    """The section of a stage in which a key stands that is right in itself."""
    if key in _keys(Stage):
        return f"; it belongs in `stages.<name>.{key}`"
    for section, field in Stage.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None and key in _keys(inner):
            return f"; it belongs in `stages.<name>.{section}.{key}`"
    return ""


def _keys(section: type[Section]) -> Iterator[str]:
    return (field.alias or name for name, field in section.model_fields.items())


def section_at(place: Place) -> type[Section] | None:
    """The section of the schema at a place; None inside upstream's own mappings and for what is no section."""
    annotation: Any = Recipe
    for part in place:
        section = _section_of(annotation)
        if section is not None:
            found = [field for name, field in section.model_fields.items() if (field.alias or name) == part]
            if not found:
                return None
            annotation = found[0].annotation
        else:
            arguments = [argument for argument in get_args(_not_none(annotation)) if argument is not type(None)]
            annotation = arguments[-1] if arguments else None
    return _section_of(annotation)


def _not_none(annotation: Any) -> Any:
    """`X` of `X | None`."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return members[0]
    return annotation


def _section_of(annotation: Any) -> type[Section] | None:
    annotation = _not_none(annotation)
    return annotation if isinstance(annotation, type) and issubclass(annotation, Section) else None
