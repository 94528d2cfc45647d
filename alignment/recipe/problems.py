"""Where a problem of a recipe stands, and how it is told: one line each, in file order.

A place in a recipe is a tuple of keys and list positions, `("stages", "sft", "data", "train", 0, "path")`, written
`stages.sft.data.train[0].path`.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterable, Mapping

Place = tuple[str | int, ...]
SET = 0  # the line of a value that comes from the command line
SHOWN = 60  # characters of a value that a message repeats


def dotted(place: Place) -> str:
    """Write a place as `--set` and the messages do."""
    text = ""
    for part in place:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def shown(value: object) -> str:
    """Write a value as it would stand in a recipe, cut to one short line."""
    if isinstance(value, float) and not math.isfinite(value):
        text = {math.inf: ".inf", -math.inf: "-.inf"}.get(value, ".nan")
    elif isinstance(value, Mapping | list):
        text = json.dumps(value, ensure_ascii=False, default=str)
    else:
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool | None) else repr(value)
    return text if len(text) <= SHOWN else text[: SHOWN - 3] + "..."


def one_line(text: str) -> str:
    """Spell out line breaks and control characters, so that a message is one line and no terminal obeys it."""
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


def nearest(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The known name closest to a mistyped one, or None where none is as close as `cutoff` (1 is equal).

    A name cut short counts as close (`adam` for `adamw_torch`).
    """
    known, text = list(known), str(name)
    longer = [other for other in known if len(text) >= 4 and other.startswith(text)]
    found = longer or difflib.get_close_matches(text, known, n=1, cutoff=cutoff)
    return found[0] if found else None


def did_you_mean(name: object, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """` (did you mean beta?)`, or nothing where no known name is close."""
    close = nearest(name, known, cutoff=cutoff)
    return f" (did you mean {close}?)" if close else ""


class Problems:
    """The problems found so far in one recipe.

    A place in `muted` had its problem told: what a later check says about it, or about anything inside it, is a
    consequence and left out.
    """

    def __init__(self, file: str, lines: dict[Place, int]):
        self.file = file
        self.lines = lines
        self.muted: set[Place] = set()
        self._found: dict[tuple[float, str], None] = {}

    def line_of(self, place: Place) -> int:
        """The line of a place or of what encloses it; `SET` where it comes from the command line."""
        for end in range(len(place), -1, -1):
            if place[:end] in self.lines:
                return self.lines[place[:end]]
        return 1

    def add(self, place: Place, message: str, *, line: int | None = None) -> None:
        """Note a problem, unless its place is muted; the line is that of the place where none is given."""
        if any(place[:end] in self.muted for end in range(len(place) + 1)):
            return
        line = self.line_of(place) if line is None else line
        where = f"{dotted(place)}: " if place else ""
        origin = "--set" if line == SET else f"{self.file}:{line}"
        rank = math.inf if line == SET else line
        self._found[(rank, one_line(f"{origin}: {where}{message}"))] = None

    def from_command_line(self, place: Place) -> bool:
        """Tell whether a value was given by `--set`."""
        return self.line_of(place) == SET

    def in_order(self) -> list[str]:
        """All problems, those of the file first and by line, those of the command line last."""
        return [text for _, text in sorted(self._found, key=lambda found: found[0])]
