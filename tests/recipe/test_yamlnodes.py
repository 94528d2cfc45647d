"""YAML: what is refused before it costs anything, and what a plain scalar means."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.errors import RecipeError
from alignment.recipe.load import load_recipe
from alignment.recipe.yamlnodes import MAX_BYTES, parse_document

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "r.yaml:1: is empty; a recipe has `name:` and `stages:`"),
        ("# only a comment\n", "r.yaml:1: is empty; a recipe has `name:` and `stages:`"),
        ("- a\n- b\n", "r.yaml:1: is not a mapping; a recipe has `name:` and `stages:`"),
        ("just text", "r.yaml:1: is not a mapping; a recipe has `name:` and `stages:`"),
        (b"\x89PNG\r\n\x1a\n\x00\x00", "r.yaml:1: is not UTF-8 text (byte 0x89); save it as UTF-8"),
        (b"name: a\nseed: \xff\n", "r.yaml:2: is not UTF-8 text (byte 0xff); save it as UTF-8"),
        (b"name: a\nseed: \x00\n", "r.yaml:2: holds a control character (0x00); this is no text file"),
        ("name: [a\n", "r.yaml:2: is not valid YAML: while parsing a flow sequence; expected ',' or ']', but got"),
        ("name: a\n\tseed: 1\n", "r.yaml:2: is not valid YAML: while scanning for the next token; found character"),
        ("name: a\n---\nname: b\n", "r.yaml:2: is not valid YAML: expected a single document in the stream"),
        ("name: *x\n", "r.yaml:1: is not valid YAML: found undefined alias 'x'"),
        ("a: &a [*a]\n", "r.yaml:1: is nested deeper than 20 levels (an alias inside itself?)"),
        ("[" * 5000, "r.yaml:1: is nested deeper than 20 levels"),
        (BOMB, "r.yaml:1: holds more than 20000 values, aliases expanded"),
        ("x" * (MAX_BYTES + 1), "r.yaml: is larger than 1 MB; this is no recipe"),
    ],
)
def test_unusable_file(text: str | bytes, expected: str, problems: Callable[..., list[str]]) -> None:
    start = time.monotonic()
    found = problems(text)
    assert time.monotonic() - start < 2
    assert len(found) == 1
    assert found[0].startswith(expected)
    assert "\n" not in found[0]


def test_missing_file_and_folder(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"gone\.yaml: no such file"):
        load_recipe(tmp_path / "gone.yaml")
    with pytest.raises(RecipeError, match=r"is a folder; name the recipe's \.yaml file"):
        load_recipe(tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5e-7", 5e-7), ("1e5", 1e5), ("2.0e-4", 2e-4), (".5", 0.5), ("-3", -3), ("+3", 3), ("0", 0),
        ("08:00:00", "08:00:00"), ("true", True), ("False", False), ("null", None), ("~", None), ("", None),
        ("-.inf", float("-inf")), ("'no'", "no"), ('"12:30"', "12:30"), ("nope", "nope"),
        ("1.2.3", "1.2.3"), ("3 apples", "3 apples"),
    ],
)  # fmt: skip
def test_plain_scalars_mean_what_they_look_like(text: str, value: object) -> None:
    document = parse_document(f"key: {text}")
    assert document.flaws == []
    assert document.value == {"key": value}
    assert type(document.value["key"]) is type(value)


@pytest.mark.parametrize(
    "text",
    ["12:30", "1:30.5", "0010", "0x1F", "0b11", "1_000", "yes", "No", "on", "OFF", "2024-01-01", "0x_", "9" * 5000],
)
def test_surprises_are_refused_and_quotes_help(text: str) -> None:
    (flaw,) = parse_document(f"a: 1\nkey: {text}").flaws
    assert (flaw.place, flaw.line) == (("key",), 2)
    assert parse_document(f'key: "{text}"').flaws == []


def test_lines_of_keys_and_items() -> None:
    document = parse_document("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n")
    assert {place: line for place, line in document.lines.items() if place} == {
        ("a",): 1, ("a", "b"): 2, ("a", "c"): 3, ("a", "c", 0): 4, ("a", "c", 1): 5, ("a", "c", 1, "d"): 5,
    }  # fmt: skip


def test_an_alias_is_the_value_it_names(good: str, problems: Callable[..., list[str]]) -> None:
    text = good.replace("eval: [{path: c.jsonl}]", "eval: &rows [{path: c.jsonl}]")
    assert problems(text.replace("pairs: [{path: p.jsonl}]", "pairs: *rows")) == []


def test_byte_order_mark_and_windows_line_ends_are_harmless(good: str, problems: Callable[..., list[str]]) -> None:
    assert problems(b"\xef\xbb\xbf" + good.replace("\n", "\r\n").encode()) == []
