"""What single rows hold that a person should know of: they are trained on all the same, and reported.

`look` gives the checks that a normalised row trips. What it finds in a text is named by its kind only: a report that
printed a key or an address would spread it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from alignment.data.checks import Message, strings
from alignment.recipe.credentials import PATTERNS

SAYS: dict[str, str] = {
    "control-character": "hold control characters ({kinds})",
    "damaged-text": "hold traces of a wrong encoding ({kinds})",
    "special-token-in-content": "hold text that looks like a control token of some chat template ({kinds}); with a "
    "tokenizer, rows that hold its own are dropped",
    "tool-call-without-answer": "go on after a tool call without its result",
    "secret": "hold what looks like a credential ({kinds}); a model repeats what it was trained on: remove them, and "
    "have the keys withdrawn",
    "personal-data": "hold what looks like personal data ({kinds})",
}  # fmt: skip
ORDER = tuple(SAYS)

# --- characters -----------------------------------------------------------------------------------------------------

_C0 = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
_BEYOND = re.compile(
    "[\x80-\x9f\u202a-\u202e\u2066-\u2069\ufeff\ufffd]|\u00e2\u20ac|\u00c3[\u0080-\u00bf\u2018-\u2122]"
)


def _characters(text: str) -> Iterator[tuple[str, str]]:
    if found := _C0.search(text):
        yield "control-character", f"U+{ord(found.group()):04X}"
    if text.isascii():
        return
    for match in set(_BEYOND.findall(text)):
        if match == "\ufffd":
            yield "damaged-text", "U+FFFD"
        elif len(match) > 1:
            yield "damaged-text", "UTF-8 read as Windows-1252"
        else:
            yield "control-character", f"U+{ord(match):04X}"


# --- control tokens of other people's templates -----------------------------------------------------------------------

_TOKEN = re.compile(
    r"<\|[a-z][a-z_]{1,30}\|>|<｜[^｜<>\n]{1,40}｜>|\[/?INST\]|<<?/?SYS>>|<(?:start|end)_of_turn>", re.IGNORECASE
)


def _control_tokens(text: str) -> Iterator[tuple[str, str]]:
    if "<" in text or "INST]" in text:
        for match in set(_TOKEN.findall(text)):
            yield "special-token-in-content", match


# --- credentials ------------------------------------------------------------------------------------------------------


def _secrets(text: str) -> Iterator[tuple[str, str]]:
    for kind, literal, pattern in PATTERNS:
        if literal in text and pattern.search(text):
            yield "secret", kind


# --- personal data ----------------------------------------------------------------------------------------------------

_EMAIL = re.compile(r"[\w.+-]+@([\w-]+(?:\.[\w-]+)*\.[A-Za-z]{2,})\b")
_NO_ADDRESS = re.compile(
    r"(?:^|\.)(?:example|test|invalid|localhost|domain|email)\.|\.(?:example|test|invalid|png|jpg)$"
)
_DIGITS = re.compile(r"\d[\d ().-]{7,}\d")
_PHONE = re.compile(
    r"(?<![\w.-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-]|\.\d)"
    r"|(?<!\w)\+\d{1,3}(?:[ .-]?\d{2,4}){3,4}\b"
)
_SSN = re.compile(r"(?<![\w.-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")
_CARD = re.compile(r"(?<![\w.-])[3-6]\d{3}([ -]?)\d{4}\1\d{4}\1\d{1,4}(?![\w.-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}(?: ?[A-Z0-9]{1,3})?\b")


def luhn(number: str) -> bool:
    """Whether the last digit of a card number is the check digit of the others (ISO/IEC 7812-1)."""
    digits = [int(digit) for digit in reversed(number) if digit.isdigit()]
    doubled = [2 * digit - 9 * (digit > 4) for digit in digits[1::2]]
    return (sum(digits[::2]) + sum(doubled)) % 10 == 0 and len(set(digits)) > 1


def iban(number: str) -> bool:
    """Whether the check digits of an IBAN are right (ISO 13616)."""
    plain = number.replace(" ", "")
    turned = plain[4:] + plain[:4]
    return 15 <= len(plain) <= 34 and int("".join(str(int(character, 36)) for character in turned)) % 97 == 1


def _personal(text: str) -> Iterator[tuple[str, str]]:
    if "@" in text and any(not _NO_ADDRESS.search(match.lower()) for match in _EMAIL.findall(text)):
        yield "personal-data", "e-mail address"
    if not _DIGITS.search(text):
        return
    if any("555" not in match.group() for match in _PHONE.finditer(text)):  # 555 is for films
        yield "personal-data", "telephone number"
    if _SSN.search(text):
        yield "personal-data", "social security number"
    if any(luhn(match.group()) for match in _CARD.finditer(text)):
        yield "personal-data", "card number"
    if any(iban(match.group()) for match in _IBAN.finditer(text)):
        yield "personal-data", "bank account (IBAN)"


# --- rows -------------------------------------------------------------------------------------------------------------


def _unanswered(messages: Sequence[Message]) -> bool:
    """Whether a tool call, other than the last turn, has fewer results than calls."""
    for index, message in enumerate(messages[:-1]):
        calls = message.get("tool_calls")
        if calls and message["role"] == "assistant":
            after = 0
            while index + 1 + after < len(messages) and messages[index + 1 + after]["role"] == "tool":
                after += 1
            if after < len(calls) and index + 1 + after < len(messages):
                return True
    return False


def turns(row: Mapping[str, Any]) -> Iterator[Sequence[Message]]:
    """The conversations of a row: one, or the prompt with each answer."""
    if "messages" in row:
        yield row["messages"]
    elif "prompt" in row:
        answers = [row[name] for name in ("chosen", "rejected", "completion") if name in row]
        for answer in answers or [[]]:
            yield [*row["prompt"], *answer]


def texts(row: Mapping[str, Any]) -> list[str]:
    """Every text of a row that a model may read, each once; other columns are not looked at."""
    if "text" in row:
        return [row["text"]]
    parts = [row.get(name) for name in ("messages", "prompt", "chosen", "rejected", "completion")]
    fields = [{key: value for key, value in turn.items() if key != "role"} for part in parts if part for turn in part]
    return list(dict.fromkeys(strings(fields)))


def look(row: Mapping[str, Any], *, tokens: bool) -> dict[str, list[str]]:
    """The checks that a normalised row trips, and the kinds of what they saw in it.

    Args:
        tokens: also look for control tokens of other templates; not needed where a tokenizer will drop such rows.
    """
    found: dict[str, list[str]] = {}
    for text in texts(row):
        for look_at in (_characters, _secrets, _personal, *((_control_tokens,) if tokens else ())):
            for check, kind in look_at(text):
                found.setdefault(check, []).append(kind)
    if any(_unanswered(conversation) for conversation in turns(row)):
        found["tool-call-without-answer"] = []
    return found
