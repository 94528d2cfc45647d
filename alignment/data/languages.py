"""Which language a text is in, by `py3langid` (139 languages, its model is in the package: nothing is downloaded).

On a line of twenty letters it is right most of the time, on less it guesses; so shorter texts have no language here.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from alignment.errors import DataError

LETTERS = 20  # below which no language is claimed
NONE = "zxx"  # ISO 639: no linguistic content
LOOKED_AT = 1000  # characters: more would not change the answer


@cache
def _identifier() -> Any:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def known() -> frozenset[str]:
    """The codes of all languages that are told apart."""
    return frozenset(_identifier().labels) - {NONE}


def of(text: str) -> str | None:
    """The language of a text as its ISO 639 code; None where there are too few letters to tell, and for code."""
    head = text[:LOOKED_AT]
    if sum(map(str.isalpha, head)) < LETTERS:
        return None
    code: str = _identifier().classify(head)[0]
    return None if code == NONE else code


def require(codes: Sequence[str]) -> None:
    """Refuse a code that is none of those told apart.

    Raises:
        DataError: one is not; the line names all that are.
    """
    for code in codes:
        if code not in known():
            raise DataError(f"data.filter.languages: {code} is not told apart; known are {', '.join(sorted(known()))}")
