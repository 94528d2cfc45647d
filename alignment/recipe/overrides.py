"""`--set place=value`: one grammar, the place as messages write it, the value in YAML.

    --set seed=43
    --set stages.dpo.train.beta=0.05
    --set 'stages.sft.data.train[0].path=my.jsonl'
    --set 'stages.dpo.train.loss_type=[sigmoid, sft]'

A key may be new (`train.beta` where `train:` was not given), a stage or a list item may not.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from alignment.recipe.problems import SET, Place, Problems, did_you_mean, dotted, shown
from alignment.recipe.yamlnodes import Flaw, Unreadable, parse_document

_PART = re.compile(r"([^.\[\]=]+)((?:\[[0-9]+\])*)")


def apply_overrides(raw: dict[str, Any], overrides: Sequence[str], problems: Problems) -> None:
    """Write the overrides into the plain values of a recipe, in place; `problems` learns where each value came from."""
    for text in overrides:
        left, equals, right = text.partition("=")
        place = _parse(left.strip())
        if not equals or place is None:
            _refuse(problems, f"{shown(text)} is not place=value (stages.sft.train.max_steps=10, seed=43)")
            continue
        reason = _set(raw, place, right, problems)
        if reason:
            _refuse(problems, f"{dotted(place)}: {reason}")


def _refuse(problems: Problems, message: str) -> None:
    problems.add((), message, line=SET)


def _parse(text: str) -> Place | None:
    """`a.b[0]` as a place; None where it is none."""
    place: list[str | int] = []
    for part in text.split("."):
        match = _PART.fullmatch(part)
        if match is None:
            return None
        place += [match[1], *(int(index) for index in re.findall(r"[0-9]+", match[2]))]
    return tuple(place)


def _set(raw: dict[str, Any], place: Place, text: str, problems: Problems) -> str | None:
    """Set one value; returns why it cannot be set."""
    if not text.strip():
        return "has no value; write null for none"
    try:
        document = parse_document(text)
    except Unreadable as error:
        return f"{shown(text)} {error.message}"
    if len(place) > 1 and place[0] == "stages":
        stages = raw.get("stages")
        if isinstance(stages, dict) and place[1] not in stages:
            return f"no stage is named {place[1]}{did_you_mean(place[1], stages)}"
    holder: Any = raw
    for depth, part in enumerate(place):
        reason = _no_entry(holder, part, dotted(place[:depth]))
        if reason:
            return reason
        if depth == len(place) - 1:
            holder[part] = document.value
        else:
            if isinstance(part, str) and isinstance(place[depth + 1], str) and holder.get(part) is None:
                holder[part] = {}
                problems.lines[place[: depth + 1]] = SET
            holder = holder[part] if isinstance(part, int) else holder.get(part)
    _note_origin(place, document.flaws, problems)
    return None


def _no_entry(holder: object, part: str | int, name: str) -> str | None:
    """Why a value has no part of that name or position; None where it has, or can get one."""
    if isinstance(part, int):
        if not isinstance(holder, list):
            return f"{name} is not a list"
        return f"{name} has {len(holder)} items, counted from 0" if part >= len(holder) else None
    if isinstance(holder, list):
        return f"{name} is a list; name an item, {name}[0]"
    return None if isinstance(holder, dict) else f"{name} is {shown(holder)}, not a mapping; set it as a whole"


def _note_origin(place: Place, flaws: Sequence[Flaw], problems: Problems) -> None:
    """From here on, the place and all inside it come from the command line."""
    for known in [known for known in problems.lines if known[: len(place)] == place]:
        del problems.lines[known]
    problems.lines[place] = SET
    problems.muted -= {muted for muted in problems.muted if muted[: len(place)] == place}
    for flaw in flaws:
        problems.add((*place, *flaw.place), flaw.message)
        problems.muted.add((*place, *flaw.place))
