"""Findings about rows: which rows cannot be trained on, why, and how many of them there may be.

A row that cannot be trained on raises `Defect` with one of the `REASONS`. A `Tally` counts the defects of one source,
remembers a few places where each was seen, and stops when they are more than the recipe allows: nothing is dropped in
silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.errors import DataError

Message = dict[str, Any]

# Every reason for which a row is dropped; the report and the log use these words.
REASONS: dict[str, str] = {
    "missing-column": "a column that the format needs is absent or null in this row",
    "wrong-type": "a field holds another type than the format says (a number where text belongs)",
    "no-messages": "the conversation is an empty list",
    "unknown-role": "a role other than system, user, assistant, tool (or a known alias)",
    "content-not-text": "a message holds parts other than text (images, audio)",
    "not-a-transcript": "text that does not start with `Human:`, in a file of HH-RLHF transcripts",
    "empty-content": "a user or system turn of white space only",
    "empty-answer": "an assistant turn of white space only",
    "empty-text": "a document of white space only",
    "nul-character": "a NUL character in the text",
    "invalid-unicode": "a lone surrogate: half of a character",
    "system-not-first": "a system turn after the first message",
    "repeated-role": "two user or two assistant turns in a row",
    "starts-with-assistant": "no user turn before the first assistant turn",
    "stray-tool-turn": "a tool result that follows no assistant turn",
    "no-assistant": "a conversation without an assistant turn",
    "ends-with-user": "a user or tool turn where the answer is needed",
    "ends-with-assistant": "a prompt whose last turn is an answer",
    "answer-not-one-turn": "chosen, rejected or completion is not exactly one assistant turn",
    "different-prompts": "chosen and rejected do not share the turns before the answer",
    "equal-answers": "chosen and rejected are the same text",
    "wrong-label": "a label that is neither true nor false",
    "special-token-in-content": "content that holds a control token of the tokenizer or the template (forges a turn)",
    "system-turn-refused": "a system turn, and the chat template refuses or ignores the system role",
    "template-refused": "the chat template failed on this row",
    "answer-not-found": "the chat template changed the answer: its tokens cannot be told from the prompt's",
    "prompt-not-prefix": "the tokens of the prompt alone and of prompt and answer differ before the answer",
    "overlong": "more tokens than train.max_length: data.on_overlong is drop, or could not shorten it enough",
    "emptied-by-truncation": "nothing of the answer is left within train.max_length",
    "equal-after-truncation": "chosen and rejected are the same tokens within train.max_length",
    "too-few-answers": "fewer than two answers to compare",
    "tied-scores": "no answer is rated above another",
    "no-score": "an answer without the rating that the others have",
    "untrained-turn": "an answer marked `weight: 0` or `train: false`: a turn that must not be learned from",
    "other-format": "a row of another format than most rows of its file",
}
# What the user asked for with `data.on_overlong`: counted and shown, but not defects of the source.
CHOSEN_BY_USER = frozenset({"overlong", "emptied-by-truncation", "equal-after-truncation"})
EXAMPLES = 5


class Defect(DataError):
    """A row that cannot be trained on; `reason` is a key of `REASONS`, `detail` says what was found."""

    def __init__(self, reason: str, detail: str = ""):
        assert reason in REASONS, reason
        self.reason = reason
        self.detail = " ".join(detail.split())[:200]
        super().__init__(f"{REASONS[reason]}: {self.detail}" if detail else REASONS[reason])


@dataclass
class Tally:
    """What became of the rows of one source."""

    source: str
    format: str = ""
    rows_in: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[str]] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)

    def drop(self, reason: str, where: str, detail: str = "", count: int = 1) -> None:
        """Count a row dropped for `reason`, and remember where the first few were."""
        self.dropped[reason] += count
        places = self.examples.setdefault(reason, [])
        if len(places) < EXAMPLES and where not in places:
            places.append(where)
        if detail:
            self.details.setdefault(reason, detail)

    @property
    def defective(self) -> int:
        """Dropped rows that are the fault of the data."""
        return sum(count for reason, count in self.dropped.items() if reason not in CHOSEN_BY_USER)

    def summary(self) -> str:
        """`equal-answers 7 (:3, :9), empty-answer 1 (:4)`, the most frequent first; places are within the source."""
        parts = []
        for reason, count in self.dropped.most_common():
            places = ", ".join(place.removeprefix(self.source) for place in self.examples.get(reason, []))
            detail = f"; {self.details[reason]}" if reason in self.details else ""
            parts.append(f"{reason} {count:,} ({places}{detail})")
        return ", ".join(parts)

    def enforce(self, limit: float, strict: bool) -> None:
        """Stop when more than the share `limit` of the rows is defective.

        Raises:
            DataError: one line with the share, the limit and the reasons.
        """
        allowed = 0.0 if strict else limit
        if self.rows_in and self.defective > allowed * self.rows_in:
            rule = "data.strict allows none" if strict else f"data.limits.dropped is {allowed:.1%}"
            share = self.defective / self.rows_in
            raise DataError(
                f"{self.source}: {self.defective:,} of {self.rows_in:,} rows are defective ({share:.1%}, {rule}): "
                f"{self.summary()}"
            )


def strings(value: Any) -> Iterator[str]:
    """Every string inside a row: values of dicts and items of lists, at any depth."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from strings(item)


def check_characters(row: Mapping[str, Any]) -> None:
    """Refuse characters that tokenizers and Arrow cannot hold."""
    for text in strings(row):
        if "\0" in text:
            raise Defect("nul-character")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise Defect("invalid-unicode", f"{text[error.start]!r}") from None


def _check_content(message: Message) -> None:
    role, blank = message["role"], not message["content"].strip()
    if role == "assistant" and blank and not message.get("tool_calls"):
        raise Defect("empty-answer")
    if role in ("user", "system") and blank:
        raise Defect("empty-content", role)


def check_turns(messages: Sequence[Message]) -> None:
    """Refuse an empty conversation, empty turns, and roles out of order.

    The order is: one system turn at most, at the start; then user and assistant in turn, where tool results stand
    between two assistant turns.
    """
    if not messages:
        raise Defect("no-messages")
    before = ""
    for index, message in enumerate(messages):
        _check_content(message)
        role = message["role"]
        if role == "system" and index:
            raise Defect("system-not-first")
        if role == before and role != "tool":
            raise Defect("repeated-role", role)
        if role == "assistant" and before in ("", "system"):
            raise Defect("starts-with-assistant")
        if role == "tool" and before not in ("assistant", "tool"):
            raise Defect("stray-tool-turn")
        before = role


def check_prompt(prompt: Sequence[Message]) -> None:
    """Refuse a prompt that does not end where an answer is due."""
    check_turns(prompt)
    if prompt[-1]["role"] == "assistant":
        raise Defect("ends-with-assistant")
    if prompt[-1]["role"] == "system":
        raise Defect("missing-column", "no user turn")


def check_answer(prompt: Sequence[Message], answer: Sequence[Message]) -> None:
    """Refuse an answer that is not one assistant turn with text in it."""
    if len(answer) != 1 or answer[0]["role"] != "assistant":
        raise Defect("answer-not-one-turn", f"roles: {', '.join(message['role'] for message in answer) or 'none'}")
    _check_content(answer[0])


def check_row(row: Mapping[str, Any], schema: str) -> None:
    """Refuse a normalised row of `schema` that cannot be trained on.

    Raises:
        Defect: with the first reason found.
    """
    check_characters(row)
    if schema == "text":
        if not row["text"].strip():
            raise Defect("empty-text")
    elif schema == "messages":
        check_turns(row["messages"])
        if all(message["role"] != "assistant" for message in row["messages"]):
            raise Defect("no-assistant")
        if row["messages"][-1]["role"] != "assistant":
            raise Defect("ends-with-user")
    else:
        check_prompt(row["prompt"])
    if schema == "unpaired":
        check_answer(row["prompt"], row["completion"])
    if schema == "preference":
        check_answer(row["prompt"], row["chosen"])
        check_answer(row["prompt"], row["rejected"])
        chosen, rejected = row["chosen"][0], row["rejected"][0]
        if chosen["content"].strip() == rejected["content"].strip() and all(
            chosen.get(key) == rejected.get(key) for key in ("tool_calls", "reasoning_content")
        ):
            raise Defect("equal-answers")
