"""`data.on_overlong: truncate_left`: prompts that lose their beginning, as text and before the template is applied.

A token sequence that is cut at its left end loses what the template wrote there: the start token, the system turn, the
head of a turn. So a row that is too long loses its oldest turns, a user's and the answer to it at a time, while the
system turn and the last question stay; if that does not do, the last question loses its first characters. Answers
that are compared are never shortened: a row whose answers alone are too long is dropped as `overlong`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignment.data.checks import Defect, Message
from alignment.data.dialect import Dialect
from alignment.data.templates import tokenize
from alignment.data.tokens import Settings

Row = dict[str, Any]

ANSWERS = ("chosen", "rejected", "completion")
ROUNDS = 8  # how often the cut of a question is corrected: tokens at a new edge may differ


def shortened(
    rows: Sequence[Row], settings: Settings, tokenizer: PreTrainedTokenizerBase
) -> tuple[Sequence[Row], int, Settings]:
    """Rows as they go to tokenization, how many were shortened, and the settings for what could not be shortened.

    Without `truncate_left`, and of documents, nothing is shortened.
    """
    if settings.on_overlong != "truncate_left" or settings.max_length is None or settings.schema == "text":
        return rows, 0, settings
    made, count = shorten(rows, settings.max_length, tokenizer)
    return made, count, replace(settings, on_overlong="drop")


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
