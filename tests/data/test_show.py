"""`alignment data show`: what is trained, read and cut, as labelled text; which row."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignment import cli
from alignment.data import show
from alignment.data.tokens import Settings
from alignment.errors import DataError

TALK = [
    {"role": "user", "content": "Hi\nyou"}, {"role": "assistant", "content": "Good day."},
    {"role": "user", "content": "More"}, {"role": "assistant", "content": "Yes, perhaps; one two three four."},
]  # fmt: skip
PAIR = {
    "prompt": TALK[:1],
    "chosen": [{"role": "assistant", "content": "The fox said good day."}],
    "rejected": [{"role": "assistant", "content": "The hen said good night."}],
}


def settings(schema: str, max_length: int | None = None, on_overlong: str = "truncate_right") -> Settings:
    return Settings(schema, max_length, on_overlong, 0)


def shown(row: dict[str, Any], known: Settings, tokenizer: PreTrainedTokenizerFast, **keys: Any) -> list[str]:
    return show.page(row, "title", known, tokenizer, **{"ids": False, "color": False, **keys}).splitlines()


def test_a_conversation_by_what_is_trained(tokenizer: PreTrainedTokenizerFast) -> None:
    lines = shown({"messages": TALK}, settings("messages"), tokenizer)
    assert re.fullmatch(r"\d+ tokens, \d+ trained", lines[1])
    assert lines[3:] == [
        "not trained  | <|im_start|>user⏎",
        "             | Hi⏎",
        "             | you<|im_end|>⏎",
        "             | <|im_start|>assistant⏎",
        "trained      | Good day.<|im_end|>",
        "not trained  | ⏎",
        "             | <|im_start|>user⏎",
        "             | More<|im_end|>⏎",
        "             | <|im_start|>assistant⏎",
        "trained      | Yes, perhaps; one two three four.<|im_end|>",
    ]


def test_what_is_cut_and_why_a_row_is_dropped(tokenizer: PreTrainedTokenizerFast) -> None:
    whole = shown({"messages": TALK}, settings("messages"), tokenizer)
    count = int(whole[1].split()[0])
    lines = shown({"messages": TALK}, settings("messages", count - 2), tokenizer)
    assert lines[1].endswith("2 cut")
    assert lines[-2:] == ["trained      | Yes, perhaps; one two three four", "cut          | .<|im_end|>"]
    lines = shown({"messages": TALK}, settings("messages", 3, "drop"), tokenizer)
    assert lines[2].startswith("dropped: more tokens than train.max_length: data.on_overlong is drop")
    lines = shown({"messages": [{"role": "user", "content": "a</s>"}, TALK[1]]}, settings("messages"), tokenizer)
    assert lines[1].startswith("dropped: content that holds a control token")


def test_a_pair_side_by_side(tokenizer: PreTrainedTokenizerFast) -> None:
    lines = shown(PAIR, settings("preference"), tokenizer)
    chosen, rejected = (cell.strip() for cell in lines[-1].split("|", 1)[1].split(" | "))
    assert [cell.strip() for cell in lines[-2].split("|")] == ["", "chosen", "rejected"]
    assert chosen == "The {fox} said good {day.}<|im_end|>"
    assert rejected == "The {hen} said good {night.}<|im_end|>"
    assert all(len(line) <= show.WIDTH for line in lines)


def test_a_cut_pair_and_its_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = len(
        tokenizer(tokenizer.apply_chat_template(TALK[:1], tokenize=False, add_generation_prompt=True))["input_ids"]
    )
    lines = shown(PAIR, settings("preference", prompt + 2), tokenizer, ids=True)
    labels = [line[:12].strip() for line in lines]
    assert labels.index("trained") < labels.index("cut") < labels.index("chosen") < labels.index("rejected")
    ids = [token for line in lines if line.startswith("chosen") for token in map(int, line.partition("# ")[2].split())]
    assert tokenizer.decode(ids) == "The fox said good day.<|im_end|>"
    assert "The" in lines[labels.index("trained")]


def test_long_answers_are_wrapped_and_no_word_is_lost(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [f"word{i}" for i in range(60)] + ["x" * 150]
    row = {**PAIR, "chosen": [{"role": "assistant", "content": " ".join(words)}]}
    lines = shown(row, settings("preference"), tokenizer)
    begin = next(index for index, line in enumerate(lines) if line.startswith("trained"))
    left = "".join(line.split("|", 1)[1][1:48].strip() for line in lines[begin:])
    assert re.sub(r"[{} ]", "", left).removesuffix("<|im_end|>") == "".join(words)
    assert all(len(line) <= show.WIDTH for line in lines)


def test_colours_only_where_asked(tokenizer: PreTrainedTokenizerFast) -> None:
    for row, schema in (({"messages": TALK}, "messages"), (PAIR, "preference")):
        plain = "\n".join(shown(row, settings(schema), tokenizer))
        colored = "\n".join(shown(row, settings(schema), tokenizer, color=True))
        assert "\033[" not in plain
        assert "\033[32m" in colored and "\033[2m" in colored
        stripped = re.sub(r"\033\[[\d;]*m", "", colored)
        assert stripped.split() == re.sub(r"[{}]", "", plain).split()


def test_control_characters_are_made_visible(tokenizer: PreTrainedTokenizerFast) -> None:
    talk = [{"role": "user", "content": "a\x1b[31mb"}, TALK[1]]
    assert "a\\x1b[31mb" in "\n".join(shown({"messages": talk}, settings("messages"), tokenizer))


@pytest.mark.parametrize(
    ("full", "left", "expected"),
    [
        ([0, 1, 2, 3], [0, 1, 2, 3], [("not trained", (0, 1)), ("trained", (2, 3))]),
        ([0, 1, 2, 3], [0, 1, 2], [("not trained", (0,)), ("trained", (1, 2)), ("cut", (3,))]),
        ([0, 1, 2, 3], [1, 2, 3], [("cut", (0,)), ("not trained", (1,)), ("trained", (2, 3))]),
        ([7, 0, 1, 8, 2, 3], [7, 8, 2, 3],
         [("not trained", (7,)), ("cut", (0, 1)), ("not trained", (8,)), ("trained", (2, 3))]),
        # The token at the new edge is another one than in the whole row: what is left is shown as it is trained.
        ([7, 0, 1, 2, 3], [7, 9, 2, 3], [("not trained", (7,)), ("cut", (0, 1)), ("not trained", (9,)),
                                         ("trained", (2, 3))]),
    ],
)  # fmt: skip
def test_runs_of_what_is_left_and_what_is_cut(full: list[int], left: list[int], expected: list[Any]) -> None:
    trained = [index >= len(left) - 2 for index in range(len(left))]
    found = show.runs(full, left, trained)
    assert [(run.kind, run.ids) for run in found] == expected
    assert [token for run in found if run.kind != "cut" for token in run.ids] == left


def test_a_prompt_that_lost_its_oldest_turns(tokenizer: PreTrainedTokenizerFast) -> None:
    """`truncate_left` works on text: the start of the sequence and the system turn stay, old turns go."""
    row = {**PAIR, "prompt": [{"role": "system", "content": "Be kind."}, *TALK]}
    row["prompt"] = row["prompt"][:4]
    whole = shown(row, settings("preference"), tokenizer)
    count = int(whole[1].split()[0])
    lines = shown(row, settings("preference", count - 1, "truncate_left"), tokenizer)
    text = "\n".join(lines)
    cut = text[text.index("cut  ") : text.index("not trained", text.index("cut  "))]
    assert "Hi" in cut and "Good day." in cut and "More" not in cut and "Be kind." not in cut
    assert re.search(r" of at most \d+, \d+ trained, \d+ cut", lines[1])
    chosen = lines[-1].split("|", 1)[1].split(" | ")[0].strip()
    assert chosen == "The {fox} said good {day.}<|im_end|>"
    short = shown(row, settings("preference", 5, "truncate_left"), tokenizer)
    assert short[2].startswith("dropped: more tokens than train.max_length")


def test_which_row() -> None:
    where = ["data/a.jsonl:1", "data/a.jsonl:3", "data/b.json[0]"]
    assert [show.place(text, where) for text in ("1", "data/a.jsonl:3", "a.jsonl:3", "b.json[0]")] == [1, 1, 1, 2]
    with pytest.raises(DataError, match="--row 3: the stage has rows 0 to 2"):
        show.place("3", where)
    with pytest.raises(DataError, match=r"--row a\.jsonl:2: no usable row stands there; the first one stands at"):
        show.place("a.jsonl:2", where)


def test_the_worst_rows(tokenizer: PreTrainedTokenizerFast) -> None:
    talks = [{"messages": [TALK[0], {"role": "assistant", "content": "a b c " * n}]} for n in (1, 9, 30, 4)]
    known = settings("messages", 40)
    assert show.longest(talks, known, tokenizer, cut_only=True) == 2
    assert show.longest(talks[:1], known, tokenizer, cut_only=False) == 0
    with pytest.raises(DataError, match=r"no row is longer than train.max_length \(40\)"):
        show.longest(talks[:1], known, tokenizer, cut_only=True)


def test_the_command(
    tmp_path: Path,
    data_folder: Path,
    tiny_policy: Path,
    capsys: pytest.CaptureFixture[str],
    write_jsonl: Callable[..., Path],
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: x\nchat_template: chatml\nmodel: {tiny_policy}\nstages:\n"
        f"  base:\n    algorithm: pretrain\n    data: {{train: [{{path: {data_folder}/corpus.jsonl}}]}}\n"
        f"    train: {{max_length: 16}}\n"
        f"  sft:\n    algorithm: sft\n    model: stage:base\n"
        f"    data: {{train: [{{path: {data_folder}/sft.jsonl}}]}}\n"
        f"  dpo:\n    algorithm: dpo\n    model: stage:sft\n"
        f"    data: {{train: [{{path: {data_folder}/preferences.jsonl}}]}}\n"
        f"  ppo:\n    algorithm: ppo\n    model: stage:sft\n    rewards: [{{name: a, regex: a}}]\n"
        f"    data: {{train: [{{path: {data_folder}/prompts.jsonl}}]}}\n"
    )
    for stage, row, text in (
        ("sft", "sft.jsonl:3", "Tell me about the sun 2."), ("dpo", "2", "Tell me about the sun 2."),
        ("ppo", "2", "Tell me about the sun 2."), ("base", "0", "block 0, begins in document"),
    ):  # fmt: skip
        assert cli.main(["data", "show", str(recipe), "--stage", stage, "--row", row]) == 0
        out = capsys.readouterr().out
        assert text in out
        assert "\033[" not in out
    assert cli.main(["data", "show", str(recipe), "--stage", "sft", "--worst", "length"]) == 0
    capsys.readouterr()
    for words, says in (
        (["--stage", "sft", "--row", "48"], "--row 48: the stage has rows 0 to 47"),
        (["--stage", "nope"], "no stage is named nope"),
        (["--stage", "base", "--worst", "truncation"], "give --row and a number"),
        (["--stage", "base", "--row", "9999"], "the stage has blocks 0 to"),
    ):
        assert cli.main(["data", "show", str(recipe), *words]) == 2
        assert says in capsys.readouterr().err
