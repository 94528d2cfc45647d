"""Every finding that a report can make: planted and found where it stands, and silent on rows that look alike.

One table. `test_every_name_has_its_case` fails when a name of the code has no case here or no line in the
documentation; each case is run through the whole report.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from made_rows import pair, prose, talk
from transformers import PreTrainedTokenizerFast

from alignment.data.checks import REASONS
from alignment.data.findings import CHECKS
from alignment.data.report import Subject, examine
from alignment.recipe.schema import ReportLimits, Source, Stage

Row = dict[str, Any]
Build = Callable[..., PreTrainedTokenizerFast]


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def assistant(text: str, **keys: Any) -> Row:
    return {"role": "assistant", "content": text, **keys}


def system(text: str) -> Row:
    return {"role": "system", "content": text}


def tool(text: str) -> Row:
    return {"role": "tool", "content": text}


def said(*turns: Row) -> Row:
    return {"messages": list(turns)}


def transcript(*texts: str) -> str:
    return "".join(f"\n\n{'Assistant' if index % 2 else 'Human'}: {text}" for index, text in enumerate(texts))


def hh(seed: int) -> Row:
    return {name: transcript(prose(3 * seed), prose(3 * seed + at)) for name, at in (("chosen", 1), ("rejected", 2))}


def implicit(chosen: Sequence[Row], rejected: Sequence[Row]) -> Row:
    return {"chosen": list(chosen), "rejected": list(rejected)}


def rated(seed: int, *scores: Any) -> Row:
    answers = [prose(100 * seed + at) for at in range(1, len(scores) + 1)]
    return {"prompt": prose(100 * seed), "responses": answers, "scores": list(scores)}


def judged(seed: int, label: Any) -> Row:
    return {"prompt": prose(2 * seed), "completion": prose(2 * seed + 1), "label": label}


def swapped(row: Row) -> Row:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


# Clean rows of each kind; the words of `bases` and of what is planted have no seeds in common.
BASES: dict[str, tuple[str, list[Row]]] = {
    "messages": ("messages", [talk(prose(2 * seed), prose(2 * seed + 1)) for seed in range(60)]),
    "preference": ("preference", [pair(seed) for seed in range(60)]),
    "hh": ("preference", [hh(seed) for seed in range(60)]),
    "implicit": ("preference", [
        implicit([user(prose(3 * seed)), assistant(prose(3 * seed + 1))],
                 [user(prose(3 * seed)), assistant(prose(3 * seed + 2))]) for seed in range(60)
    ]),
    "rated": ("preference", [rated(seed, 1, 2, 3) for seed in range(1, 61)]),
    "unpaired": ("unpaired", [judged(seed, seed % 2 == 0) for seed in range(60)]),
    "prompts": ("prompts", [{"prompt": [user(prose(seed))]} for seed in range(60)]),
    "text": ("text", [{"text": prose(seed, 60)} for seed in range(60)]),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A finding, planted among clean rows and not.

    Attributes:
        check, base: its name, and the rows that it is planted among.
        planted: rows that have it, appended to the base; at: the places of those that are found, of `planted`, from 0
            (None: all; empty: the finding names no rows); count: how many are counted (default: as many as `at`).
        alike: rows that look alike and do not have it.
        template: a named chat template, or the text of one; None looks at text alone. bos: the tokenizer has a BOS
            token. merges: a token that it adds.
        data: keys of the section `data`; max_length: of rows in tokens.
        held, exam: held-out rows, and rows of an evaluation set: they are what is counted.
    """

    check: str
    base: str
    planted: Sequence[Row]
    alike: Sequence[Row]
    at: Sequence[int] | None = None
    count: int | None = None
    template: str | None = None
    bos: bool = False
    merges: str | None = None
    data: dict[str, Any] = field(default_factory=dict)
    max_length: int | None = None
    held: Sequence[Row] = ()
    exam: Sequence[Row] = ()

    @property
    def of(self) -> str:
        """Which file its places are in."""
        return "held" if self.held else "exam" if self.exam else "rows"


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
STOCK = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
NO_SYSTEM = STOCK.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
PICKY = "{% for m in messages if 'refuse' in m['content'] %}{{ raise_exception('no such word') }}{% endfor %}" + STOCK
MUTE = STOCK.replace("m['content'] +", "m['content'] | replace('mangled', '...') +")
BACKWARDS = (  # writes the number of turns first, so that a prompt is no prefix of prompt and answer
    "{% for m in messages %}{% if '#' in m['content'] %}{{ messages | length }}{% endif %}{% endfor %}"
    + STOCK.replace(
        "{{ '<|im_start|>' + m",
        "{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
        "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m",
        1,
    ).replace("{% endfor %}", "{% endif %}{% endfor %}", 1)
)
STOPLESS = (  # does not end an empty answer, which a call of a tool is
    "{# tool_calls #}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}{% if m['content'] %}{{ '<|im_end|>' }}{% endif %}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TWICE = (  # a BOS token of its own before a system turn
    "{% if messages[0]['role'] == 'system' %}{{ bos_token }}{% endif %}{{ bos_token }}" + STOCK
)
TIGHT = (  # nothing between the mark of a turn and its text
    "{% for m in messages %}{{ m['role'] + ':' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
GREEDY = (  # trains the mark of the turn, which the model does not write
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% else %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MANY = [pair(seed) for seed in range(1000, 1200)]
FORMS = ["- one\n- two\n", "**bold** "]


def changed(rows: Sequence[Row], change: Callable[[int, Row], Row]) -> list[Row]:
    return [{**row, **change(index, row)} for index, row in enumerate(rows)]


def one(check: str, base: str, bad: Row, good: Row, **keys: Any) -> Case:
    return Case(check, base, [bad], [good], **keys)


REASON_CASES = [
    one("missing-column", "preference", {**pair(900), "rejected": None}, {**pair(900), "margin": None}),
    one("wrong-type", "preference", {**pair(900), "rejected": 3}, {**pair(900), "rejected": "3"}),
    one("no-messages", "messages", said(), said(user("Q"), assistant("A"))),
    one("unknown-role", "messages", said(user("Q"), {"role": "asistant", "content": "A"}),
        said({"role": "human", "content": "Q"}, {"role": "GPT", "content": "A"})),
    one("content-not-text", "messages", said(user("Q"), {"role": "assistant", "content": [{"type": "image"}]}),
        said(user("Q"), {"role": "assistant", "content": [{"type": "text", "text": "A"}]})),
    one("not-a-transcript", "hh", {"chosen": "Good day", "rejected": "Go"},
        {name: "  " + text for name, text in hh(900).items()}),
    one("empty-content", "messages", talk(" \n", "A"), said(user("Q"), assistant("", tool_calls=[CALL]), tool(""),
                                                           assistant("A"))),
    one("empty-answer", "messages", talk("Q", "\t"), said(user("Q"), assistant("", tool_calls=[CALL]))),
    one("empty-text", "text", {"text": " \n"}, {"text": "x"}),
    one("nul-character", "messages", talk("Q", "a\0b"), talk("Q", "a\\0b\\u0000")),
    one("invalid-unicode", "messages", talk("Q", "half \ud83d"), talk("Q", "whole \U0001f600")),
    one("system-not-first", "messages", said(user("Q"), system("S"), assistant("A")),
        said(system("S"), user("Q"), assistant("A"))),
    one("repeated-role", "messages", said(user("Q"), user("R"), assistant("A")),
        said(user("Q"), assistant("", tool_calls=[CALL, CALL]), tool("7"), tool("8"), assistant("A"))),
    one("starts-with-assistant", "messages", said(assistant("A"), user("Q"), assistant("A")),
        said(system("S"), user("Q"), assistant("A"))),
    one("stray-tool-turn", "messages", said(user("Q"), tool("7"), assistant("A")),
        said(user("Q"), assistant("", tool_calls=[CALL]), tool("7"), assistant("A"))),
    one("no-assistant", "messages", said(user("Q")), talk("Q", "A")),
    one("ends-with-user", "messages", talk("Q", "A", "R"), talk("Q", "A", "R", "B")),
    one("ends-with-assistant", "prompts", {"prompt": [user("Q"), assistant("A")]},
        {"prompt": [user("Q"), assistant("A"), user("R")]}),
    one("answer-not-one-turn", "preference",
        {"prompt": [user("Q")], "chosen": [assistant("A"), user("R"), assistant("B")], "rejected": [assistant("C")]},
        {"prompt": [user("Q")], "chosen": [assistant("A")], "rejected": [assistant("C")]}),
    one("different-prompts", "implicit", implicit([user("Q"), assistant("A")], [user("R"), assistant("B")]),
        implicit([user("Q"), assistant("A"), user("R"), assistant("B")],
                 [user("Q"), assistant("A"), user("R"), assistant("C")])),
    one("equal-answers", "preference", {**pair(900), "rejected": pair(900)["chosen"] + " "},
        {**pair(900), "rejected": pair(900)["chosen"] + "."}),
    one("wrong-label", "unpaired", judged(900, 5), judged(900, "true")),
    one("special-token-in-content", "messages", talk("x<|im_end|>", "A"), talk("x<|im_end| > im_end", "A"),
        template="chatml"),
    one("system-turn-refused", "messages", said(system("S"), user("Q"), assistant("A")), talk("system: S", "A"),
        template=NO_SYSTEM),
    one("template-refused", "messages", talk("refuse", "A"), talk("re-fuse", "A"), template=PICKY),
    one("answer-not-found", "messages", talk("Q", "mangled"), talk("mangled", "A"), template=MUTE),
    one("prompt-not-prefix", "preference", {**pair(900), "prompt": "# " + prose(900)}, pair(900), template=BACKWARDS),
    one("overlong", "messages", talk("Q", prose(900, 200)), talk("Q", prose(900, 40)), template="chatml",
        max_length=300),
    one("emptied-by-truncation", "messages", talk(prose(900, 200), "A"), talk(prose(900, 40), "A"), template="chatml",
        max_length=300, data={"on_overlong": "truncate_right"}),
    one("equal-after-truncation", "preference",
        {"prompt": "Q", "chosen": prose(900, 200) + " yes", "rejected": prose(900, 200) + " no"},
        {"prompt": "Q", "chosen": "yes " + prose(900, 200), "rejected": "no " + prose(900, 200)}, template="chatml",
        max_length=300, data={"on_overlong": "truncate_right"}),
    one("too-few-answers", "rated", rated(900, 1), rated(900, 1, 2)),
    one("tied-scores", "rated", rated(900, 2, 2), rated(900, 2, 2, 1)),
    one("no-score", "rated", rated(900, "N/A", 1), rated(900, "4", 1)),
    one("untrained-turn", "messages", said(user("Q"), assistant("A", weight=0)),
        said(user("Q"), assistant("A", weight=1))),
    one("other-format", "messages", {"instruction": "Q", "output": "A"}, {**talk("Q", "A"), "id": "x-1"}),
]  # fmt: skip

CHECK_CASES = [
    Case("dropped", "messages", [talk("Q", " ")] * 2, [talk("Q", "A"), talk("R", "B")], at=()),
    one("duplicate", "messages", talk(prose(0), prose(1)), talk(prose(0), prose(901))),
    one("near-duplicate", "messages", talk(prose(0), prose(1) + " x"), talk(prose(0) + " x", prose(1)[:60])),
    Case("leak", "messages", [], [], held=[talk(prose(0).upper() + "!", prose(901)), talk(prose(902), prose(903))],
         at=[0]),
    Case("leak-ngram", "messages", [], [], held=[talk(prose(900), prose(1)), talk(prose(902), prose(903))], at=[0]),
    Case("contaminated", "messages", [], [], exam=[{"question": prose(0)}, {"question": prose(900)}], at=[0]),
    one("control-character", "messages", talk("Q", "a\x07b"), talk("Q", "a\tb\r\nc")),
    one("damaged-text", "messages", talk("Q", "donâ€™t"), talk("Q", "don’t, â alone")),
    one("special-token-in-content", "messages", talk("x<|im_end|>", "A"), talk("a <| b |> c, [INSTANCE]", "A")),
    one("tool-call-without-answer", "messages", said(user("Q"), assistant("", tool_calls=[CALL]), user("?"),
                                                    assistant("A")),
        said(user("Q"), assistant("", tool_calls=[CALL]), tool("7"), assistant("A"))),
    one("secret", "messages", talk("Q", "AKIA" + "ABCDEFGHIJ123456"), talk("Q", "AKIA is a prefix")),
    one("personal-data", "messages", talk("Q", "to ann.lee@mail.org"), talk("Q", "to you@example.com")),
    one("near-equal-answers", "preference", {**pair(900), "rejected": pair(900)["chosen"] + " x"},
        {**pair(900), "rejected": pair(900)["chosen"][:60]}),
    Case("contradictory", "preference", [pair(900), swapped(pair(900))],
         [pair(900), {**swapped(pair(900)), "prompt": prose(1)}]),
    Case("negative-margin", "preference", [{**pair(900), "margin": -1.0}], [{**pair(900), "margin": 0.1}]),
    Case("zero-margin", "preference", [{**pair(900), "score_chosen": 2, "score_rejected": 2}],
         [{**pair(900), "score_chosen": 2, "score_rejected": 1.9}]),
    Case("length-bias", "preference", changed(MANY, lambda at, row: {"chosen": row["chosen"] + " so on"}),
         changed(MANY, lambda at, row: {("chosen", "rejected")[at % 2]: row["chosen"] + " so on"}), at=(), count=-1),
    Case("separable", "preference", changed(MANY * 3, lambda at, row: {
             "prompt": prose(2000 + at), "chosen": prose(3000 + at), "rejected": "sorry " + prose(4000 + at)}),
         changed(MANY, lambda at, row: {"rejected": ("sorry " if at % 3 == 0 else "") + row["rejected"]}), at=(),
         count=-1),
    Case("first-words-bias", "preference",
         changed(MANY, lambda at, row: {"rejected": "I am sorry, " + row["rejected"]}),
         changed(MANY, lambda at, row: {name: "I am sorry, " + row[name] for name in ("chosen", "rejected")}), at=(),
         count=200),
    Case("formatting-bias", "preference", changed(MANY, lambda at, row: {"chosen": FORMS[0] + row["chosen"]}),
         changed(MANY, lambda at, row: {name: FORMS[at % 2] + row[name] for name in ("chosen", "rejected")}), at=(),
         count=200),
    one("truncated", "messages", talk("Q", prose(900, 200)), talk("Q", prose(900, 40)), template="chatml",
        max_length=300, data={"on_overlong": "truncate_right"}, at=(), count=1),
    one("unstopped", "messages", talk("Q", prose(900, 200)), talk("Q", prose(900, 40)), template="chatml",
        max_length=300, data={"on_overlong": "truncate_right"}),
    one("untrained", "messages", said(user("Q"), assistant("", tool_calls=[CALL])), talk("Q", "A"), template=STOPLESS),
    one("double-bos", "messages", said(system("S"), user("Q"), assistant("A")), talk("Q", "A"), template=TWICE,
        bos=True),
    one("prompt-boundary", "messages", talk("Q", "abc"), talk("Q", "bac"), template=TIGHT, merges=":a", at=(), count=1),
    Case("template-proof", "messages", [], [], template=GREEDY, at=(), count=1),
]  # fmt: skip
CASES = [*REASON_CASES, *CHECK_CASES]
IDS = [case.check for case in CASES]


@pytest.fixture
def report(tmp_path: Path, lines: Callable[..., Path], build_tokenizer: Build) -> Callable[..., dict[str, Row]]:
    """The findings of a report on some rows, by name."""

    def look(case: Case, rows: Sequence[Row], held: Sequence[Row], exam: Sequence[Row], template: str | None) -> Any:
        schema, base = BASES[case.base]
        data: Row = {"train": [{"path": str(lines([*base, *rows], "rows.jsonl"))}], **case.data}
        if held:
            data["eval"] = [{"path": str(lines(held, "held.jsonl"))}]
        against = [Source(path=str(lines(exam, "exam.jsonl")))] if exam else []
        stage = Stage.model_validate({"algorithm": "sft", "seed": 7, "data": data})
        subject = Subject(
            case.check, schema, stage, against=against, tokenizer=_tokenizer(case, template, build_tokenizer),
            max_length=case.max_length,
        )  # fmt: skip
        found = examine(subject, cache=tmp_path / "cache", say=lambda text: None)["findings"]
        return {finding["check"]: finding for finding in found}

    return look


def _tokenizer(case: Case, template: str | None, build: Build) -> PreTrainedTokenizerFast | None:
    if template is None:
        return None
    tokenizer = build("chatml", bos=case.bos)
    if template != "chatml":
        tokenizer.chat_template = template
    if case.merges is not None:
        tokenizer.add_tokens([case.merges])
    return tokenizer


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_planted_it_is_found_where_it_stands(case: Case, report: Any, tmp_path: Path) -> None:
    found = report(case, case.planted, case.held, case.exam, case.template)
    assert case.check in found, sorted(found)
    finding = found[case.check]
    at = range(len(case.planted)) if case.at is None else case.at
    first = 1 if case.of != "rows" else len(BASES[case.base][1]) + 1
    places = [f"{tmp_path / case.of}.jsonl:{first + index}" for index in at]
    assert [place.split(" (")[0] for place in finding["rows"]] == places
    if case.count != -1:
        assert finding["count"] == (len(places) or 2 if case.count is None else case.count)
    assert finding["says"] and "\n" not in finding["says"]


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_rows_that_look_alike_do_not_have_it(case: Case, report: Any) -> None:
    """The clean rows of the base with those that look alike; what is counted of other files without the row that is."""
    held = [row for index, row in enumerate(case.held) if index not in (case.at or ())]
    exam = [row for index, row in enumerate(case.exam) if index not in (case.at or ())]
    assert not (case.held and not held) and not (case.exam and not exam)
    template = STOCK if case.check == "template-proof" else case.template
    assert case.check not in report(case, case.alike, held, exam, template)


def test_every_name_has_its_case(root: Path) -> None:
    assert {case.check for case in REASON_CASES} == REASONS.keys()
    assert {case.check for case in CHECK_CASES} == set(CHECKS)
    limits = {name.replace("_", "-") for name in ReportLimits.model_fields}
    assert limits <= set(CHECKS), "a limit is of a check"
    table = (root / "recipes" / "README.md").read_text().partition("| finding | what it saw |")[2].partition("\n\n")[0]
    named = {name for line in table.splitlines()[2:] for name in re.findall(r"`([a-z-]+)`", line.split("|")[1])}
    assert set(CHECKS) - named == {"dropped"}, "the documentation has a line for each"
    assert named - set(CHECKS) <= REASONS.keys()
