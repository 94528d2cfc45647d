"""One golden row per format: what is detected, and what becomes of the row."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.data import formats
from alignment.data.checks import Defect
from alignment.errors import DataError

U, A, S = "user", "assistant", "system"


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def sharegpt(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": content} for role, content in pairs]


CALL = {
    "role": A,
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}],
}
QA = turns((U, "Q"), (A, "A"))
PAIR = {"prompt": turns((U, "Q")), "chosen": turns((A, "good")), "rejected": turns((A, "bad"))}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yo.\n\nHuman: Q\n\nAssistant: good"}
HH_PROMPT = turns((U, "Hi"), (A, "Yo."), (U, "Q"))

GOLDEN: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("messages", "messages", {"messages": QA, "id": 1}, {"messages": QA}),
    ("messages", "messages", {"messages": [{"role": U, "content": [{"type": "text", "text": "Q"}]}, QA[1]]},
     {"messages": QA}),
    ("messages", "messages", {"messages": [QA[0], {"role": A, "content": None, "tool_calls": CALL["tool_calls"]},
                                           {"role": "ipython", "content": "7", "name": "f"}, QA[1]]},
     {"messages": [QA[0], CALL, {"role": "tool", "content": "7", "name": "f"}, QA[1]]}),
    ("sharegpt", "messages", {"conversations": sharegpt(("human", "Q"), ("gpt", "A")), "system": "Be kind."},
     {"messages": [*turns((S, "Be kind.")), *QA]}),
    ("sharegpt", "messages",
     {"conversations": sharegpt(("human", "Q"), ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
                                ("observation", "7"), ("gpt", "A")), "tools": '[{"name": "f"}]'},
     {"messages": [QA[0], CALL, {"role": "tool", "content": "7"}, QA[1]], "tools": [{"name": "f"}]}),
    ("alpaca", "messages", {"instruction": "Q", "input": "", "output": "A"}, {"messages": QA}),
    ("alpaca", "messages",
     {"instruction": "Add", "input": "1 2", "output": "3", "system": "Count.", "history": [["Hi", "Yo."]]},
     {"messages": turns((S, "Count."), (U, "Hi"), (A, "Yo."), (U, "Add\n1 2"), (A, "3"))}),
    ("prompt-completion", "messages", {"prompt": "Q", "completion": "A"}, {"messages": QA}),
    ("prompt-completion", "messages", {"prompt": QA[:1], "completion": QA[1:]}, {"messages": QA}),
    ("hh-rlhf", "preference", {**HH, "rejected": HH["chosen"].replace("good", "bad\n\nHumans: are")},
     {**PAIR, "prompt": HH_PROMPT, "rejected": turns((A, "bad\n\nHumans: are"))}),
    ("hh-rlhf-prompt", "preference",
     {"prompt": "\n\nHuman: Hi\n\nAssistant: Yo.\n\nHuman: Q\n\nAssistant:", "chosen": " good", "rejected": " bad"},
     {**PAIR, "prompt": HH_PROMPT}),
    ("sharegpt-pairs", "preference",
     {"conversations": sharegpt(("human", "Q")), "chosen": {"from": "gpt", "value": "good"},
      "rejected": {"from": "gpt", "value": "bad"}}, PAIR),
    ("alpaca-pairs", "preference", {"instruction": "Q", "input": "", "chosen": "good", "rejected": "bad"}, PAIR),
    ("ultrafeedback", "preference",
     {"prompt": "Q", "chosen": turns((U, "Q"), (A, "good")), "rejected": turns((U, "Q"), (A, "bad")),
      "score_chosen": 8.5}, {**PAIR, "score_chosen": 8.5}),
    ("implicit-prompt", "preference", {"chosen": turns((U, "Q"), (A, "good")), "rejected": turns((U, "Q"), (A, "bad"))},
     PAIR),
    ("prompt-chosen-rejected", "preference", {"prompt": "Q", "chosen": "good", "rejected": "bad", "margin": 2.0},
     {**PAIR, "margin": 2.0}),
    ("prompt-chosen-rejected", "preference", dict(PAIR), PAIR),
    ("prompt-completion-label", "unpaired", {"prompt": "Q", "completion": "A", "label": "False"},
     {"prompt": QA[:1], "completion": QA[1:], "label": False}),
    ("messages-label", "unpaired", {"messages": QA, "label": True},
     {"prompt": QA[:1], "completion": QA[1:], "label": True}),
    ("sharegpt-label", "unpaired", {"conversations": sharegpt(("human", "Q"), ("gpt", "A")), "kto_tag": 1},
     {"prompt": QA[:1], "completion": QA[1:], "label": True}),
    ("text", "text", {"text": "Once.", "source": "x"}, {"text": "Once."}),
    ("prompt", "prompts", {"prompt": "Q", "answer": 4}, {"prompt": QA[:1], "answer": 4}),
    ("prompt", "prompts", {"prompt": QA[:1], "answer": 4}, {"prompt": QA[:1], "answer": 4}),
    ("sharegpt", "prompts", {"conversations": sharegpt(("human", "Q"), ("gpt", "A"))}, {"prompt": QA[:1]}),
    ("alpaca", "prompts", {"instruction": "Q", "output": "A"}, {"prompt": QA[:1]}),
    ("hh-rlhf", "prompts", {**HH, "rejected": HH["chosen"].replace("good", "bad")}, {"prompt": HH_PROMPT}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "schema", "record", "row"), GOLDEN)
def test_golden(name: str, schema: Any, record: dict[str, Any], row: dict[str, Any]) -> None:
    found = formats.detect([record], schema, named=None, source="x.jsonl")
    assert found.name == name
    assert formats.convert(record, found, schema) == [row]


def test_every_format_has_a_golden_row() -> None:
    assert {name for name, *_ in GOLDEN} == {known.name for known in formats.FORMATS}


def test_pairs_become_two_unpaired_rows() -> None:
    found = formats.detect([PAIR], "unpaired", named=None, source="x")
    assert formats.says(found, "unpaired") == "prompt-chosen-rejected, each pair as two rows"
    assert formats.convert(dict(PAIR), found, "unpaired") == [
        {"prompt": PAIR["prompt"], "completion": PAIR["chosen"], "label": True},
        {"prompt": PAIR["prompt"], "completion": PAIR["rejected"], "label": False},
    ]


def test_the_chosen_answers_of_pairs_are_demonstrations() -> None:
    found = formats.detect([PAIR], "messages", named=None, source="x")
    assert formats.says(found, "messages") == "prompt-chosen-rejected, chosen answers only"
    assert formats.convert(dict(PAIR), found, "messages") == [{"messages": [*PAIR["prompt"], *PAIR["chosen"]]}]


def test_the_format_of_most_rows_wins_over_one_odd_row() -> None:
    sample = [{"messages": "broken"}, {"messages": QA}, {"messages": QA}]
    assert formats.detect(sample, "messages", named=None, source="x").name == "messages"


def test_unknown_columns_name_what_was_found_and_what_was_wanted() -> None:
    with pytest.raises(DataError) as error:
        formats.detect([{"question": "Q", "answer": "A"}], "messages", named=None, source="x.jsonl")
    text = str(error.value)
    assert text.startswith("x.jsonl: columns answer, question fit no format of messages rows; wanted: messages (list")
    assert "prompt, completion [prompt-completion]" in text
    assert "\n" not in text


def test_a_format_may_be_named() -> None:
    both = {"messages": QA, "prompt": "P", "completion": "C"}
    assert formats.detect([both], "messages", named=None, source="x").name == "messages"
    assert formats.detect([both], "messages", named="prompt-completion", source="x").name == "prompt-completion"
    with pytest.raises(DataError, match=r"x: format: 'alpacka' is unknown for messages rows; known are messages, sh"):
        formats.detect([both], "messages", named="alpacka", source="x")


@pytest.mark.parametrize(
    ("name", "record", "reason"),
    [
        ("messages", {"messages": None}, "missing-column"),
        ("messages", {"messages": "Q"}, "wrong-type"),
        ("messages", {"messages": ["Q"]}, "wrong-type"),
        ("messages", {"messages": turns(("asistant", "A"))}, "unknown-role"),
        ("messages", {"messages": [{"role": U}]}, "missing-column"),
        ("messages", {"messages": [{"role": U, "content": 3}]}, "wrong-type"),
        ("messages", {"messages": [{"role": U, "content": [{"type": "image", "url": "x"}]}]}, "content-not-text"),
        ("messages", {"messages": QA, "tools": "not json"}, "wrong-type"),
        ("sharegpt", {"conversations": sharegpt(("function_call", "f(1)"))}, "wrong-type"),
        ("alpaca", {"instruction": "Q", "output": None}, "missing-column"),
        ("alpaca", {"instruction": "Q", "output": "A", "history": ["Hi"]}, "wrong-type"),
        ("hh-rlhf", {"chosen": "Hello", "rejected": HH["chosen"]}, "not-a-transcript"),
        ("hh-rlhf", {"chosen": HH["chosen"], "rejected": "\n\nHuman: P\n\nAssistant: x"}, "different-prompts"),
        ("hh-rlhf", {"chosen": HH["chosen"] + "\n\nHuman: x", "rejected": HH["chosen"] + "\n\nHuman: y"},
         "ends-with-user"),
        ("implicit-prompt", {"chosen": QA[:1], "rejected": QA[:1]}, "ends-with-user"),
        ("implicit-prompt", {"chosen": [], "rejected": QA}, "no-messages"),
        ("prompt-completion-label", {"prompt": "Q", "completion": "A", "label": "maybe"}, "wrong-label"),
        ("prompt-completion-label", {"prompt": "Q", "completion": "A", "label": 2}, "wrong-label"),
    ],
)  # fmt: skip
def test_defects(name: str, record: dict[str, Any], reason: str) -> None:
    known = next(known for known in formats.FORMATS if known.name == name)
    with pytest.raises(Defect) as error:
        known.convert(record)
    assert error.value.reason == reason
