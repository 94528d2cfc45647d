"""Each reason for dropping a row, planted; clean rows pass; the tally counts and stops."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest

from alignment.data import checks
from alignment.data.checks import Defect, Tally, check_row
from alignment.errors import DataError, ExitCode


def turns(text: str) -> list[dict[str, Any]]:
    """`u:Q a:A` as messages; `_` is a blank."""
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}
    return [
        {"role": roles[role], "content": content.replace("_", " ")}
        for role, _, content in (word.partition(":") for word in text.split())
    ]


@pytest.mark.parametrize("text", ["u:Q a:A", "s:S u:Q a:A u:Q a:A", "u:Q a:A t:7 t:8 a:A", "u:Q a:A t: a:A u:Q a:A"])
def test_clean_conversations_pass(text: str) -> None:
    check_row({"messages": turns(text)}, "messages")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no-messages"),
        ("u:Q a:", "empty-answer"),
        ("u:Q a:__", "empty-answer"),
        ("u:_ a:A", "empty-content"),
        ("s: u:Q a:A", "empty-content"),
        ("u:Q s:S a:A", "system-not-first"),
        ("u:Q u:Q a:A", "repeated-role"),
        ("u:Q a:A a:A", "repeated-role"),
        ("a:A", "starts-with-assistant"),
        ("s:S a:A", "starts-with-assistant"),
        ("t:7 a:A", "stray-tool-turn"),
        ("u:Q t:7 a:A", "stray-tool-turn"),
        ("u:Q", "no-assistant"),
        ("u:Q a:A u:Q", "ends-with-user"),
        ("u:Q a:A t:7", "ends-with-user"),
        ("u:Q a:\0", "nul-character"),
        ("u:\ud800 a:A", "invalid-unicode"),
    ],
)
def test_defective_conversations(text: str, reason: str) -> None:
    with pytest.raises(Defect) as error:
        check_row({"messages": turns(text)}, "messages")
    assert error.value.reason == reason


@pytest.mark.parametrize(
    ("schema", "row", "reason"),
    [
        ("text", {"text": " \n"}, "empty-text"),
        ("prompts", {"prompt": turns("u:Q a:A")}, "ends-with-assistant"),
        ("prompts", {"prompt": turns("s:S")}, "missing-column"),
        ("prompts", {"prompt": []}, "no-messages"),
        ("prompts", {"prompt": turns("u:Q"), "answer": ["x\0"]}, "nul-character"),
        ("unpaired", {"prompt": turns("u:Q"), "completion": turns("a:_")}, "empty-answer"),
        ("unpaired", {"prompt": turns("u:Q"), "completion": turns("u:A")}, "answer-not-one-turn"),
        ("preference", {"prompt": turns("u:Q"), "chosen": turns("a:A"), "rejected": turns("a:A_")}, "equal-answers"),
        ("preference", {"prompt": turns("u:Q"), "chosen": turns("a:A"), "rejected": turns("a:")}, "empty-answer"),
        ("preference", {"prompt": turns("u:Q"), "chosen": turns("a:A u:Q a:A"), "rejected": turns("a:B")},
         "answer-not-one-turn"),
    ],
)  # fmt: skip
def test_defects_of_other_schemas(schema: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(Defect) as error:
        check_row(row, schema)
    assert error.value.reason == reason


def test_every_reason_is_raised_somewhere() -> None:
    source = "".join(path.read_text() for path in Path(checks.__file__).parent.glob("*.py"))
    table = inspect.getsource(checks).partition("REASONS")[2].partition("}")[0]
    assert [reason for reason in checks.REASONS if f'"{reason}"' not in source.replace(table, "")] == []


def test_tally_stops_above_the_limit_with_one_line() -> None:
    tally = Tally("x.jsonl", "messages", rows_in=200)
    tally.drop("equal-answers", "x.jsonl:3")
    tally.drop("equal-answers", "x.jsonl:9")
    tally.enforce(0.01, strict=False)
    tally.drop("unknown-role", "x.jsonl:4", "'asistant'")
    with pytest.raises(DataError) as error:
        tally.enforce(0.01, strict=False)
    assert str(error.value) == (
        "x.jsonl: 3 of 200 rows are defective (1.5%, data.limits.dropped is 1.0%): "
        "equal-answers 2 (:3, :9), unknown-role 1 (:4; 'asistant')"
    )
    assert error.value.code == ExitCode.BAD_INPUT


def test_strict_allows_none_and_what_the_user_chose_is_no_defect() -> None:
    tally = Tally("x.jsonl", "messages", rows_in=10)
    for index in range(9):
        tally.drop("overlong", f"x.jsonl:{index}")
    tally.enforce(0.0, strict=True)
    assert tally.examples["overlong"] == [f"x.jsonl:{index}" for index in range(5)]
    tally.drop("empty-answer", "x.jsonl:9")
    with pytest.raises(DataError, match=r"x.jsonl: 1 of 10 rows are defective \(10.0%, data.strict allows none\): "):
        tally.enforce(1.0, strict=True)
