"""Read a recipe: YAML and `--set` in, a checked `Recipe` out, or every problem at once.

    recipe = load_recipe("recipes/quickstart.yaml", ["stages.dpo.train.beta=0.05"])
    stage = resolve(recipe, "dpo")

A problem is one line: where (file and line, or `--set`), what was found, what to do. Nothing is imported that costs
more than a tenth of a second, and no data is opened: what a trainer accepts is read from its source (`upstream.py`).

Checking goes on behind an error: the faulty part is cut out, and what is left is checked, so that a typo in one stage
does not hide a wrong link in another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from alignment.errors import RecipeError
from alignment.recipe.checks import check_stages
from alignment.recipe.credentials import in_recipe
from alignment.recipe.overrides import apply_overrides
from alignment.recipe.problems import Place, Problems, nearest
from alignment.recipe.resolve import batch_dependent, full_train, max_length, parents, resolve
from alignment.recipe.schema import Recipe
from alignment.recipe.wording import complaint
from alignment.recipe.yamlnodes import read_document

__all__ = ["batch_dependent", "full_train", "load_recipe", "max_length", "parents", "resolve"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: the YAML file; messages repeat it as it is typed.
        overrides: what `--set` gives, `place=value`, with the place from the recipe's root, as messages write it
            (`stages.sft.data.train[0].path=my.jsonl`) and the value in YAML (`0.05`, `[1, 2]`, `{a: 1}`). The last
            of several for one place counts.

    Raises:
        RecipeError: the file cannot be read, or the recipe has problems; `problems` holds one line for each.
    """
    document = read_document(path)
    problems = Problems(str(path), document.lines)
    for flaw in document.flaws:
        problems.add(flaw.place, flaw.message, line=flaw.line)
        if flaw.value:
            problems.muted.add(flaw.place)
    if not isinstance(document.value, Mapping):
        reason = "is empty" if document.value is None else "is not a mapping"
        problems.add((), f"{reason}; a recipe has `name:` and `stages:`")
        raise RecipeError(problems.in_order())
    raw: dict[str, Any] = dict(document.value)
    apply_overrides(raw, overrides, problems)
    for place, message in in_recipe(raw):
        problems.add(place, message)
    stages = raw.get("stages")
    names = list(stages) if isinstance(stages, Mapping) else []
    recipe = _validated(raw, problems)
    if recipe is not None:
        check_stages(recipe, names, problems)
    found = problems.in_order()
    if recipe is None or found:
        raise RecipeError(found)
    return recipe


def _validated(raw: dict[str, Any], problems: Problems) -> Recipe | None:
    """The recipe that is left when everything faulty is cut out; None where nothing is."""
    gone: set[Place] = set()
    while True:  # each round cuts something out
        try:
            return Recipe.model_validate(raw, by_alias=True, by_name=False)
        except ValidationError as error:
            found: dict[Place, list[ErrorDetails]] = {}
            for detail in error.errors(include_url=False):
                found.setdefault(_place(detail, raw), []).append(detail)
        slips = {place for place, details in found.items() if details[0]["type"] == "extra_forbidden"}
        for place, details in found.items():
            # `pth: a.jsonl` is one mistake, not an unknown key and a missing one.
            rivals = [slip for slip in slips if slip[:-1] == place[:-1] and nearest(slip[-1], [str(place[-1])])]
            a_slip = details[0]["type"] == "missing" and bool(rivals)
            a_consequence = any(cut[: len(place)] == place for cut in gone)
            if not a_slip and not a_consequence:
                problems.add(place, complaint(place, details))
        for place, details in found.items():
            cut = _cut(raw, place[:-1] if details[0]["type"] == "missing" else place)
            if cut is None:
                return None
            gone.add(cut)
            problems.muted |= {place, cut}


def _place(detail: ErrorDetails, raw: Any) -> Place:
    """Where pydantic found an error; its location also names union members, which are no keys of the recipe."""
    place: Place = ()
    for part in detail["loc"]:
        inside = part in raw if isinstance(raw, dict) else isinstance(raw, list) and part in range(len(raw))
        if inside:
            raw = raw[part]
        elif detail["type"] == "missing":
            return (*place, part)
        else:
            return place
        place = (*place, part)
    return place


def _cut(raw: dict[str, Any], place: Place) -> Place | None:
    """Remove a faulty part in place and return what went; None where no recipe is left.

    A list goes as a whole, so that the positions of its items keep their meaning; the recipe's name is replaced.
    """
    indexes = [index for index, part in enumerate(place) if isinstance(part, int)]
    place = place[: indexes[0]] if indexes else place
    if place == ("name",) or (place == () and not isinstance(raw.get("name"), str)):
        raw["name"] = "unnamed"
        return ("name",)
    if place in ((), ("stages",)):
        return None
    holder: Any = raw
    for part in place[:-1]:
        holder = holder.get(part) if isinstance(holder, dict) else None
    if not isinstance(holder, dict) or place[-1] not in holder:
        return _cut(raw, place[:-1])
    del holder[place[-1]]
    return place if raw.get("stages") else None
