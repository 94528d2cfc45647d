"""What is done to the text of rows before the template is applied: `data.on_overlong: truncate_left`, prompts that lose
their beginning, and `data.on_special_token: neutralize`, content that would forge a turn.

A token sequence that is cut at its left end loses what the template wrote there: the start token, the system turn, the
head of a turn. So a row that is too long loses its oldest turns, a user's and the answer to it at a time, while the
system turn and the last question stay; if that does not do, the last question loses its first characters. Answers
that are compared are never shortened: a row whose answers alone are too long is dropped as `overlong`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignment.data.checks import Defect, Message
from alignment.data.dialect import Dialect
from alignment.data.templates import tokenize
from alignment.data.tokens import Settings

Row = dict[str, Any]

ANSWERS = ("chosen", "rejected", "completion")
TALK = ("messages", "prompt", *ANSWERS)
ROUNDS = 8  # how often the cut of a question is corrected: tokens at a new edge may differ


@dataclass
class Changes:
    """What is done to each batch of rows before it is tokenized (see `tokens.tables`), and how many rows it changed.

    Attributes:
        settings: those for what could not be changed: what could not be shortened is dropped.
    """

    wanted: Settings
    tokenizer: PreTrainedTokenizerBase
    shortened: int = 0
    neutralized: int = 0
    settings: Settings = field(init=False)

    def __post_init__(self) -> None:
        wanted = self.wanted
        self._shortens = (
            wanted.on_overlong == "truncate_left" and wanted.max_length is not None and wanted.schema != "text"
        )
        self.settings = replace(wanted, on_overlong="drop") if self._shortens else wanted

    def __call__(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows of a batch as they are tokenized."""
        if self.wanted.on_special == "neutralize":
            dialect = Dialect.of(self.tokenizer)
            made = [neutralized(row, dialect) for row in rows]
            self.neutralized += sum(new is not old for new, old in zip(made, rows, strict=True))
            rows = made
        if self._shortens:
            assert self.wanted.max_length is not None
            rows, count = shorten(rows, self.wanted.max_length, self.tokenizer)
            self.shortened += count
        return rows


def neutralized(row: Row, dialect: Dialect) -> Row:
    """The row with every control string in its texts broken; itself where there is none."""
    if "text" in row:
        text = dialect.neutral(row["text"], document=True)
        return row if text == row["text"] else {**row, "text": text}
    changed = {}
    for name in (*TALK, "tools"):
        if name in row:
            value = _neutral(row[name], dialect)
            if value != row[name]:
                changed[name] = value
    return {**row, **changed} if changed else row


def _neutral(value: Any, dialect: Dialect) -> Any:
    if isinstance(value, str):
        return dialect.neutral(value)
    if isinstance(value, list):
        return [_neutral(item, dialect) for item in value]
    if isinstance(value, dict):
        return {name: item if name == "role" else _neutral(item, dialect) for name, item in value.items()}
    return value


def shorten(rows: Sequence[Row], limit: int, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Row], int]:
    """The rows with prompts short enough for `limit` tokens where that can be done, and how many were shortened."""
    dialect = Dialect.of(tokenizer)
    made, count = [], 0
    for row in rows:
        shorter = _shorter(row, limit, dialect, tokenizer)
        count += shorter is not row
        made.append(shorter)
    return made, count


def _shorter(row: Row, limit: int, dialect: Dialect, tokenizer: PreTrainedTokenizerBase) -> Row:
    """The row itself where it fits, or where nothing helps."""

    def excess(candidate: Row) -> int:
        texts = _texts(candidate, dialect)
        if max(len(text.encode()) for text in texts) <= limit:
            return 0  # a token is at least one byte
        return max(len(encoding.ids) for encoding in tokenize(tokenizer, texts)) - limit

    try:
        if excess(row) <= 0:
            return row
        column = "messages" if "messages" in row else "prompt"
        turns: list[Message] = row[column]
        system, talk = (turns[:1], turns[1:]) if turns[0]["role"] == "system" else ([], turns)
        last = max(index for index, turn in enumerate(talk) if turn["role"] == "user")
        for start in [index for index, turn in enumerate(talk) if turn["role"] == "user" and 0 < index <= last]:
            shorter = {**row, column: [*system, *talk[start:]]}
            if excess(shorter) <= 0:
                return shorter
        return _cut_question(row, column, system, talk[last:], excess, tokenizer)
    except Defect:
        return row  # the template refuses it, which is counted where it is tokenized


def _cut_question(
    row: Row, column: str, system: list[Message], talk: list[Message], excess: Any, tokenizer: PreTrainedTokenizerBase
) -> Row:
    """The row with the last question cut from the left, by as many tokens as are too many."""
    question, rest = talk[0], talk[1:]
    (encoding,) = tokenize(tokenizer, [question["content"]])
    gone = 0
    for _ in range(ROUNDS):
        text = question["content"][encoding.offsets[gone][0] :] if gone else question["content"]
        shorter = {**row, column: [*system, {**question, "content": text}, *rest]}
        over = excess(shorter)
        if over <= 0:
            return shorter
        gone += over
        if gone >= len(encoding.ids):
            break
    return row


def _texts(row: Row, dialect: Dialect) -> list[str]:
    tools = row.get("tools")
    if "messages" in row:
        return [dialect.render(row["messages"], tools)[0]]
    answers = [row[name] for name in ANSWERS if name in row]
    if not answers:
        return [dialect.text(row["prompt"], tools, True)]
    return [dialect.render([*row["prompt"], *answer], tools)[0] for answer in answers]
