"""Whatever is done to a recipe, loading it ends in a recipe or in a `RecipeError` with lines; and nothing is lost."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from alignment.errors import RecipeError
from alignment.recipe.load import load_recipe

VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 2.5, float("nan"), float("inf"), "", "text", "stage:", "stage:dpo", "1e-4", [],
    [1], ["a"], [[]], {}, {"a": 1}, {"path": 1}, {"stage": "sft"}, 10**18, "x" * 300, "é\u2028", {"": None},
]  # fmt: skip


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """All places of a tree but its root."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*place, key)
        yield from places(inner, (*place, key))


def damage(tree: dict[str, Any], draw: Any) -> tuple[str, tuple[Any, ...]]:
    """Drop, rename or replace one part of the tree, in place; returns what was done and where."""
    place = draw(st.sampled_from(list(places(tree))))
    kind = draw(st.sampled_from(["drop", "typo", "swap"]))
    holder: Any = tree
    for part in place[:-1]:
        holder = holder[part]
    last = place[-1]
    if kind == "typo" and isinstance(holder, dict):
        position = draw(st.integers(0, len(last)))
        holder[last[:position] + "q" + last[position:]] = holder.pop(last)
    elif kind == "drop":
        del holder[last]
    else:
        kind = "swap"
        holder[last] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return kind, place


def load(path: Path, overrides: tuple[str, ...] = ()) -> list[str]:
    try:
        load_recipe(path, overrides)
    except RecipeError as error:
        found = error.problems
    else:
        return []
    assert found
    assert all(line and len(line.splitlines()) == 1 for line in found)
    assert len(set(found)) == len(found)
    return found


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "r.yaml"


LIMITS = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@LIMITS
@given(data=st.data())
def test_damaged_recipes_end_in_lines_or_in_a_recipe(data: st.DataObject, good: str, path: Path) -> None:
    tree = yaml.safe_load(good.replace("1e-5", "1.0e-5").replace("2e-4", "2.0e-4"))
    done = [damage(tree, data.draw) for _ in range(data.draw(st.integers(1, 3))) if any(places(tree))]
    path.write_text(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True), encoding="utf-8")
    found = load(path)
    if len(done) == 1 and done[0][0] == "typo" and len(done[0][1]) != 2 and "env" not in done[0][1]:
        assert found, "a mistyped key was taken in silence"


@LIMITS
@given(text=st.text(max_size=80))
def test_any_text_is_refused_in_lines(text: str, path: Path) -> None:
    path.write_text(text, encoding="utf-8", errors="replace")
    assert load(path)


@LIMITS
@given(data=st.data())
def test_damaged_text_is_refused_in_lines(data: st.DataObject, good: str, path: Path) -> None:
    start = data.draw(st.integers(0, len(good) - 1))
    end = data.draw(st.integers(start, min(len(good), start + 40)))
    path.write_text(good[:start] + data.draw(st.text("{}[]:,-&*!|>'\"%@`#?\t\n ab01.", max_size=6)) + good[end:])
    load(path)


@LIMITS
@given(
    place=st.lists(st.sampled_from("stages sft dpo train data [0] model beta x seed".split()), max_size=5),
    value=st.text(max_size=12),
)
def test_any_override_ends_in_lines_or_in_a_recipe(place: list[str], value: str, good: str, path: Path) -> None:
    path.write_text(good)
    load(path, (".".join(place).replace(".[", "[") + "=" + value,))
