"""One golden row per format: what is detected, and what becomes of the row."""

from __future__ import annotations

from typing import Any

import pytest

from alignment.data import formats, ranked
from alignment.data.checks import Defect
from alignment.errors import DataError

U, A, S = "user", "assistant", "system"


def turns(*pairs: tuple[str, str]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def sharegpt(*pairs: tuple[str, str]) -> list[dict[str, str]]:
    return [{"from": role, "value": content} for role, content in pairs]


def call(**fields: Any) -> dict[str, Any]:
    function = {"name": "f", "arguments": {"x": 1}}
    return {"role": A, "content": "", "tool_calls": [{"type": "function", "function": function, **fields}]}


CALL = call()
OPENAI_CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
QA = turns((U, "Q"), (A, "A"))
PAIR = {"prompt": turns((U, "Q")), "chosen": turns((A, "good")), "rejected": turns((A, "bad"))}
HH = {"chosen": "\n\nHuman: Hi\n\nAssistant: Yo.\n\nHuman: Q\n\nAssistant: good"}
HH_PROMPT = turns((U, "Hi"), (A, "Yo."), (U, "Q"))


def scores(chosen: float, rejected: float) -> dict[str, float]:
    return {"score_chosen": chosen, "score_rejected": rejected}


def rated(response: str, *ratings: str, overall: float = 0) -> dict[str, Any]:
    aspects = {f"aspect {index}": {"Rating": rating, "Rationale": "x"} for index, rating in enumerate(ratings)}
    return {"model": "m", "response": response, "annotations": aspects, "overall_score": overall}


ULTRA = {
    "source": "x", "instruction": "Q", "models": ["m", "n", "o"],
    "completions": [rated("bad", "1", "2", overall=10), rated("good", "5", "4", overall=1),
                    rated("fair", "3", "N/A", "3", overall=2)],
    "correct_answers": ["None"],
}  # fmt: skip

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
    # Calls of tools: OpenAI's write the arguments as JSON in text, and an older way had one call without a list.
    ("messages", "messages",
     {"messages": [QA[0], {"role": A, "content": None, "tool_calls": [OPENAI_CALL]},
                   {"role": "tool", "content": "7", "tool_call_id": "c1"}, QA[1]],
      "tools": [{"type": "function", "function": {"name": "f"}}], "parallel_tool_calls": True},
     {"messages": [QA[0], call(id="c1"), {"role": "tool", "content": "7", "tool_call_id": "c1"}, QA[1]],
      "tools": [{"type": "function", "function": {"name": "f"}}]}),
    ("messages", "messages",
     {"messages": [QA[0], {"role": A, "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
                   {"role": "function", "name": "f", "content": "7"}, QA[1]], "functions": [{"name": "f"}]},
     {"messages": [QA[0], CALL, {"role": "tool", "content": "7", "name": "f"}, QA[1]], "tools": [{"name": "f"}]}),
    # ShareGPT writes a text and the calls after it as turns of their own.
    ("sharegpt", "messages",
     {"conversations": sharegpt(("Human", "Q"), ("gpt", "Let me see."),
                                ("function_call", '{"name": "f", "arguments": "{\\"x\\": 1}"}'),
                                ("function_call", '[{"name": "g"}]'), ("observation", "7"), ("observation", "8"),
                                ("gpt", "A"))},
     {"messages": [QA[0], {**CALL, "content": "Let me see.",
                           "tool_calls": [*CALL["tool_calls"],
                                          {"type": "function", "function": {"name": "g", "arguments": {}}}]},
                   {"role": "tool", "content": "7"}, {"role": "tool", "content": "8"}, QA[1]]}),
    ("sharegpt", "messages", {"conversations": [{"from": "human", "text": "Q"}, {"role": "bot", "content": "A"}]},
     {"messages": QA}),
    ("prompt-completion", "messages", {"prompt": "Q", "completion": "A", "system": "Be kind."},
     {"messages": [*turns((S, "Be kind.")), *QA]}),
    ("prompt-chosen-rejected", "preference", {"prompt": "Q", "chosen": "good", "rejected": "bad", "system": "Be kind."},
     {**PAIR, "prompt": turns((S, "Be kind."), (U, "Q"))}),
    ("orca-pairs", "preference", {"question": "Q", "chosen": "good", "rejected": "bad", "system": ""}, PAIR),
    ("openai-pairs", "preference",
     {"input": {"messages": QA[:1], "tools": [{"name": "f"}]}, "preferred_output": turns((A, "good")),
      "non_preferred_output": turns((A, "bad"))}, {**PAIR, "tools": [{"name": "f"}]}),
    ("ultrafeedback", "preference",
     {"prompt": "Q", "chosen": turns((U, "Q"), (A, "good")), "rejected": turns((U, "Q"), (A, "bad")),
      "messages": turns((U, "Q"), (A, "good"))}, {**PAIR, "messages": turns((U, "Q"), (A, "good"))}),
    ("ultrafeedback-rated", "preference", ULTRA, {**PAIR, **scores(4.5, 1.5), "source": "x"}),
    ("rated-answers", "preference",
     {"prompt": "Q", "responses": ["bad", "good", "fair"], "scores": [-1, 2.5, 0], "id": 3},
     {**PAIR, **scores(2.5, -1.0), "id": 3}),
    ("rated-answers", "preference",
     {"prompt": QA[:1], "completions": [{"text": "bad", "rating": "1"}, {"text": "good", "rating": "5"}]},
     {**PAIR, **scores(5.0, 1.0)}),
    ("ranked-answers", "preference",
     {"prompt": "\n\nHuman: Hi\n\nAssistant: Yo.\n\nHuman: Q\n\nAssistant: ", "turns": 2,
      "answers": [{"answer": "bad", "model": "m", "rank": 7.0}, {"answer": "good", "model": "n", "rank": 1.0}]},
     {**PAIR, "prompt": HH_PROMPT, "rank_chosen": 1.0, "rank_rejected": 7.0, "turns": 2}),
    ("alpaca-ranked", "preference", {"instruction": "Q", "input": "", "output": ["good", "bad"]},
     {**PAIR, "rank_chosen": 1.0, "rank_rejected": 2.0}),
    ("two-answers", "preference",
     {"history": "Q", "human_ref_A": "bad", "human_ref_B": "good", "score_A": 3, "score_B": 12, "labels": 0,
      "domain": "ask"}, {**PAIR, **scores(12.0, 3.0), "domain": "ask"}),
    ("two-answers", "preference", {"prompt": "Q", "response_0": "good", "response_1": "bad", "better_response_id": 0},
     {**PAIR, **scores(1.0, 0.0)}),
    ("alpaca-label", "unpaired", {"instruction": "Q", "input": "", "output": "A", "kto_tag": False},
     {"prompt": QA[:1], "completion": QA[1:], "label": False}),
    ("ultrafeedback-rated", "messages", ULTRA, {"messages": turns((U, "Q"), (A, "good"))}),
    ("ultrafeedback-rated", "prompts", ULTRA, {"prompt": QA[:1], "source": "x"}),
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
    assert formats.detect([both], "messages", named="prompt-completion", source="x").name == "prompt-completion"
    with pytest.raises(DataError, match=r"x: format: 'alpacka' is unknown for messages rows; known are messages, sh"):
        formats.detect([both], "messages", named="alpacka", source="x")


@pytest.mark.parametrize(
    ("record", "schema", "choices"),
    [
        ({"messages": QA, "prompt": "P", "completion": "C"}, "messages", ["messages", "prompt-completion"]),
        ({"messages": QA, "conversations": QA}, "messages", ["messages", "sharegpt"]),
        ({"prompt": "Q", "instruction": "I", "chosen": "A", "rejected": "B"}, "preference",
         ["alpaca-pairs", "prompt-chosen-rejected"]),
        ({"prompt": "Q", "answers": [{"text": "A", "rank": 1, "score": 3}]}, "preference",
         ["rated-answers", "ranked-answers"]),
        ({"messages": QA, "prompt": "Q", "completion": "A", "label": True}, "unpaired",
         ["prompt-completion-label", "messages-label"]),
    ],
)  # fmt: skip
def test_ambiguity_lists_the_choices(record: dict[str, Any], schema: Any, choices: list[str]) -> None:
    with pytest.raises(DataError) as error:
        formats.detect([record] * 3, schema, named=None, source="x")
    text = str(error.value)
    assert text.startswith(f"x: all of the first 3 rows fit several formats of {schema} rows: {choices[0]} (")
    assert f"; {choices[1]} (" in text
    assert text.endswith("Name the one that is meant with `format`")
    assert formats.detect([record], schema, named=choices[1], source="x").name == choices[1]


def test_the_format_says_by_what_it_was_recognised() -> None:
    sample = [{"messages": "broken"}, {"messages": QA}, {"messages": QA}]
    known = formats.detect(sample, "messages", named=None, source="x")
    assert formats.why(known, sample) == "messages (list of role, content) in 2 of the first 3 rows"


@pytest.mark.parametrize(
    ("record", "name", "schema"),
    [
        ({"messages": QA}, "messages", "messages"),
        ({"messages": QA, "label": True}, "messages-label", "unpaired"),
        ({"prompt": "Q", "completion": "A"}, "prompt-completion", "messages"),
        ({"prompt": "Q", "completion": "A", "label": 1}, "prompt-completion-label", "unpaired"),
        ({"prompt": "Q", "answer": 4}, "prompt", "prompts"),
        ({"instruction": "Q", "output": "A", "text": "Q A"}, "alpaca", "messages"),
        ({**PAIR, "messages": QA}, "prompt-chosen-rejected", "preference"),
        (ULTRA, "ultrafeedback-rated", "preference"),
        ({"text": "Once."}, "text", "text"),
    ],
)
def test_a_format_without_a_wish(record: dict[str, Any], name: str, schema: str) -> None:
    found = formats.recognise([record], named=None, source="x")
    assert (found[0].name, found[1]) == (name, schema)
    assert formats.recognise([{}], named=name, source="x") == found


def test_rows_of_another_format_are_told_apart_from_broken_ones() -> None:
    known = formats.detect([{"messages": QA}], "messages", named=None, source="x")
    with pytest.raises(Defect, match="another format than most rows of its file: alpaca"):
        formats.convert({"instruction": "Q", "output": "A"}, known, "messages")
    with pytest.raises(Defect, match="another type"):
        formats.convert({"messages": 3}, known, "messages")


def test_bad_answers_are_not_taught_by_oversight() -> None:
    rows = [{"messages": QA, "label": True}, {"messages": QA, "label": False}]
    with pytest.raises(DataError, match="x: 1 of the first 2 rows are labelled false: bad answers, which messages"):
        formats.detect(rows, "messages", named=None, source="x")
    assert formats.detect(rows, "messages", named="messages", source="x").name == "messages"
    topics = [{"messages": QA, "label": "sports"}, {"messages": QA, "label": 0}]
    assert formats.detect(topics, "messages", named=None, source="x").name == "messages"


# --- pairs of several answers ---

LIST = {"prompt": "Q", "responses": ["c", "a", "b", "b2"], "scores": [1, 3, 2, 2]}


def made(record: dict[str, Any], **reading: Any) -> list[tuple[str, str]]:
    known = formats.detect([record], "preference", named=None, source="x")
    rows = formats.convert(record, known, "preference", formats.Reading(**reading))
    return [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in rows]


def test_which_pairs_are_made_of_several_answers() -> None:
    assert made(LIST) == [("a", "c")]
    assert made(LIST, pairs="adjacent") == [("a", "b"), ("b2", "c")]  # equals are never paired
    assert made(LIST, pairs="all") == [("a", "b"), ("a", "b2"), ("a", "c"), ("b", "c"), ("b2", "c")]
    ranks = {"prompt": "Q", "answers": ["c", "a", "b"], "ranks": [3, 1, 2]}
    assert made(ranks, pairs="all") == [("a", "b"), ("a", "c"), ("b", "c")]
    assert made(ULTRA, score="overall_score") == [("bad", "good")]
    assert made(ULTRA, score="annotations.aspect 0.Rating", pairs="all") == [
        ("good", "fair"), ("good", "bad"), ("fair", "bad")
    ]  # fmt: skip
    assert made({**LIST, "helpful": [9, 1, 5, 5]}, score="helpful") == [("c", "a")]


def test_all_pairs_of_an_order_against_a_loop() -> None:
    values = [2, 5, 1, 5, 3, 2, 4]
    record = {"prompt": "Q", "responses": [f"r{index}" for index in range(7)], "scores": values}
    wanted = {(f"r{i}", f"r{j}") for i in range(7) for j in range(7) if values[i] > values[j]}
    found = made(record, pairs="all")
    assert set(found) == wanted
    assert len(found) == len(wanted) == 19


def test_what_is_said_of_several_answers() -> None:
    known = formats.detect([LIST], "preference", named=None, source="x")
    assert formats.says(known, "preference") == "rated-answers, pairs best-worst"
    assert formats.says(known, "preference", formats.Reading("all")) == "rated-answers, pairs all"
    assert formats.says(known, "unpaired") == "rated-answers, pairs best-worst, each as two rows"
    assert formats.says(known, "messages") == "rated-answers, best answers only"
    rows = formats.convert(LIST, known, "unpaired")
    assert [(row["completion"][0]["content"], row["label"]) for row in rows] == [("a", True), ("c", False)]


SHP = {"history": "Q", "human_ref_A": "A", "human_ref_B": "B", "score_A": 1, "score_B": 2}


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
        ("messages", {"messages": [{"role": A, "content": "", "tool_calls": [{"type": "function"}]}]}, "wrong-type"),
        ("messages", {"messages": [{"role": A, "tool_calls": [{"name": "f", "arguments": "x=1"}]}]}, "wrong-type"),
        ("messages", {"messages": [{"role": A, "tool_calls": [{"name": "f", "arguments": [1]}]}]}, "wrong-type"),
        ("messages", {"messages": [QA[0], {**QA[1], "weight": 0}]}, "untrained-turn"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": "A", "train": False}]}, "untrained-turn"),
        ("openai-pairs", {"input": "Q", "preferred_output": "A", "non_preferred_output": "B"}, "wrong-type"),
        ("rated-answers", {**LIST, "scores": [1, 1, 1, 1]}, "tied-scores"),
        ("rated-answers", {**LIST, "scores": [1, 2, None, 3]}, "no-score"),
        ("rated-answers", {**LIST, "scores": [1, 2, float("nan"), 3]}, "no-score"),
        ("rated-answers", {**LIST, "scores": [1, 2]}, "no-score"),
        ("rated-answers", {**LIST, "responses": ["c"], "scores": [1]}, "too-few-answers"),
        ("rated-answers", {**LIST, "responses": "c"}, "missing-column"),
        ("ultrafeedback-rated", {"instruction": "Q", "completions": [rated("a", "N/A"), rated("b", "1")]}, "no-score"),
        ("ultrafeedback-rated", {"instruction": "Q", "completions": ["a", "b"]}, "wrong-type"),
        ("two-answers", {**SHP, "labels": 1}, "wrong-label"),
        ("two-answers", {**SHP, "score_B": 1}, "tied-scores"),
        ("two-answers", {"prompt": "Q", "answer_a": "A", "answer_b": "B", "winner": "tie (bothbad)"}, "tied-scores"),
        ("two-answers", {"prompt": "Q", "answer_a": "A", "answer_b": "B", "winner": "model_c"}, "wrong-label"),
    ],
)  # fmt: skip
def test_defects(name: str, record: dict[str, Any], reason: str) -> None:
    known = next(known for known in formats.FORMATS if known.name == name)
    with pytest.raises(Defect) as error:
        ranked.pairs(known.convert(record), "all") if known.gives == "ranked" else known.convert(record)
    assert error.value.reason == reason


def test_a_labelled_turn_that_is_no_answer_does_not_matter() -> None:
    known = formats.detect([{"messages": QA}], "messages", named=None, source="x")
    record = {"messages": [{**QA[0], "weight": 0}, {**QA[1], "weight": 1, "train": True}]}
    assert formats.convert(record, known, "messages") == [{"messages": QA}]
