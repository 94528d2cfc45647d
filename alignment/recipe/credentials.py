"""Credentials: found in a recipe they are refused, found in a text that is printed or kept they are masked.

Everything that a recipe says stands in the records of its run, which others read. So a token belongs in the
environment, which the workers inherit, and nowhere else.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from alignment.recipe.problems import Place

# Kind, a literal that is looked for first because that is fast, and the pattern.
PATTERNS: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    ("AWS key", "AKIA", re.compile(r"\bAKIA[0-9A-Z]{16}\b")),
    ("GitHub token", "gh", re.compile(r"\bgh[pousr]_[A-Za-z0-9]{36,}\b")),
    ("GitHub token", "github_pat_", re.compile(r"\bgithub_pat_[A-Za-z0-9_]{40,}\b")),
    ("API key (sk-)", "sk-", re.compile(r"\bsk-(?=[A-Za-z0-9_-]*\d)[A-Za-z0-9_-]{32,}")),
    ("Hugging Face token", "hf_", re.compile(r"\bhf_[A-Za-z0-9]{30,}\b")),
    ("Google key", "AIza", re.compile(r"\bAIza[0-9A-Za-z_-]{35}\b")),
    ("Slack token", "xox", re.compile(r"\bxox[abprs]-[0-9A-Za-z-]{20,}")),
    ("private key", "PRIVATE KEY", re.compile(r"-----BEGIN (?:[A-Z]+ )*PRIVATE KEY-----")),
    ("web token", "eyJ", re.compile(r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}")),
)  # fmt: skip
# What only its surroundings tell: the password of an address, a header, an assignment to a variable of such a name.
_SURROUNDED: tuple[tuple[str, str, re.Pattern[str]], ...] = (
    ("password in an address", "://", re.compile(r"(?<=://)[^\s/@'\"]+(?=@)")),
    ("access token", "earer ", re.compile(r"(?<=[Bb]earer )[A-Za-z0-9._~+/=-]{8,}")),
    ("key", "=", re.compile(r"(?:(?<=TOKEN=)|(?<=_KEY=)|(?<=SECRET=)|(?<=PASSWORD=))[^\s'\",;]{8,}")),
)  # fmt: skip
_NAME = re.compile(r"(TOKEN|API_?KEY|ACCESS_KEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
_SHORTEST = 8  # characters of a variable's value below which masking it would hit harmless text


def find(text: str) -> str | None:
    """The kind of credential that a text holds, or None."""
    for kind, literal, pattern in (*PATTERNS, *_SURROUNDED):
        if literal in text and pattern.search(text):
            return kind
    return None


def mask(text: str, env: Mapping[str, str] = os.environ) -> str:
    """A text with every credential replaced by `[its kind]`, the values of secret variables of `env` included."""
    for kind, literal, pattern in (*PATTERNS, *_SURROUNDED):
        if literal in text:
            text = pattern.sub(f"[{kind}]", text)
    for name, value in env.items():
        if len(value) >= _SHORTEST and value in text and _NAME.search(name):
            text = text.replace(value, f"[{name}]")
    return text


class Masked:
    """A text stream that masks what is written to it; everything else is the stream's own."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text, masked."""
        self._stream.write(mask(text))
        return len(text)

    def writelines(self, lines: Any) -> None:
        """Write texts, masked."""
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def in_recipe(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    """Each place of a raw recipe that holds a credential, and what is wrong with that."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            inside = (*place, str(key))
            named = place[-2:] == ("launch", "env") and _NAME.search(str(key)) and item not in (None, "")
            if named:
                yield inside, _remedy("the value of a secret")
            else:
                yield from in_recipe(item, inside)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from in_recipe(item, (*place, index))
    elif isinstance(value, str) and (kind := find(value)):
        yield place, _remedy(kind)


def _remedy(kind: str) -> str:
    return (
        f"holds a credential ({kind}), and everything a recipe says is kept with its runs; remove it, and export it "
        "in your shell: the workers inherit the environment"
    )
