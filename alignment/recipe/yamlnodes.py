"""YAML read safely, with the line of every key.

The node tree is composed and walked here instead of constructed by PyYAML: no tag makes an object, a duplicate key is
an error, and a bomb of aliases, depth or size is refused before it costs anything. Scalars mean what they look like:
`5e-7` is a number (YAML 1.2), and what YAML 1.1 reads other than written (`12:30` as 750, `0010` as 8, `no` as false,
`2024-01-01` as a date) is refused with the way to write it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from alignment.errors import RecipeError
from alignment.recipe.problems import Place, one_line, shown

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_VALUES = 20_000  # aliases counted each time they are used

NULL = re.compile(r"~|null|Null|NULL|")
TRUTH = re.compile(r"true|True|TRUE|false|False|FALSE")
WORD_TRUTH = re.compile(r"yes|Yes|YES|no|No|NO|on|On|ON|off|Off|OFF")
WHOLE = re.compile(r"[-+]?(0|[1-9][0-9]*)")
NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
NOT_FINITE = re.compile(r"([-+]?)\.(inf|Inf|INF|nan|NaN|NAN)")


@dataclass(frozen=True)
class Flaw:
    """Something wrong in the text at one place; `value` tells whether the value read there is worthless, too."""

    place: Place
    line: int
    message: str
    value: bool = True


@dataclass
class Document:
    """A YAML document as plain values, the line of every place in it, and what was wrong with its text."""

    value: Any
    lines: dict[Place, int] = field(default_factory=dict)
    flaws: list[Flaw] = field(default_factory=list)


class Unreadable(Exception):
    """A text that is no YAML document at all: the line (counted from 1) and what is wrong."""

    def __init__(self, line: int, message: str):
        super().__init__(message)
        self.line, self.message = line, one_line(message)


def read_document(path: str | Path) -> Document:
    """Read a YAML file; raises `RecipeError` where nothing of it can be used."""
    try:
        with open(path, "rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise RecipeError(f"{path}: is a folder; name the recipe's .yaml file") from None
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path}: is larger than {MAX_BYTES // 1_000_000} MB; this is no recipe")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(
            f"{path}:{line}: is not UTF-8 text (byte {raw[error.start]:#04x}); save it as UTF-8"
        ) from None
    try:
        return parse_document(text)
    except Unreadable as error:
        raise RecipeError(f"{path}:{error.line}: {error.message}") from None


def parse_document(text: str) -> Document:
    """Parse one YAML document; raises `Unreadable` for text that is none, or that is too deep or too large."""
    try:
        _refuse_depth(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise Unreadable(line, f"holds a control character ({error.character:#04x}); this is no text file") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        reason = "; ".join(part for part in (error.context, error.problem) if part)
        raise Unreadable(mark.line + 1 if mark else 1, f"is not valid YAML: {' '.join(reason.split())}") from None
    document = Document(None)
    if node is not None:
        document.value = _Walk(document).value(node, ())
    return document


def _refuse_depth(text: str) -> None:
    """Count nesting on the event stream, which is flat: composing a deep tree would exhaust the stack."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            mark = event.start_mark
            raise Unreadable(mark.line + 1 if mark else 1, f"is nested deeper than {MAX_DEPTH} levels")


class _Walk:
    """Turns the nodes of one document into plain values, noting lines and flaws on the way."""

    def __init__(self, document: Document):
        self.document = document
        self.left = MAX_VALUES

    def value(self, node: yaml.Node, place: Place) -> Any:
        self.left -= 1
        line = node.start_mark.line + 1
        if self.left < 0:
            raise Unreadable(line, f"holds more than {MAX_VALUES} values, aliases expanded")
        if len(place) > MAX_DEPTH:
            raise Unreadable(line, f"is nested deeper than {MAX_DEPTH} levels (an alias inside itself?)")
        self.document.lines.setdefault(place, line)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None
        if node.tag != _RESOLVER.resolve(type(node), node.value, (plain, not plain)):
            tag = node.tag.replace("tag:yaml.org,2002:", "!!")
            self._flaw(place, node, f"has the tag {tag}: a recipe holds plain values; remove the tag")
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*place, index)) for index, item in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, place)

    def _flaw(self, place: Place, node: yaml.Node, message: str, *, value: bool = True) -> None:
        self.document.flaws.append(Flaw(place, node.start_mark.line + 1, message, value))

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._flaw(place, key_node, "has a key that is not text; a key is one word", value=False)
                continue
            key, plain = key_node.value, key_node.style is None
            inside = (*place, key)
            if key == "<<" and plain:
                self._flaw(place, key_node, "merge keys (<<) are not read; write the keys out", value=False)
            elif key in result:
                self._flaw(inside, key_node, "stands twice in the same mapping; keep one of the two", value=False)
            else:
                if plain and not isinstance(_plain(key), str):
                    self._flaw(inside, key_node, f'is a key that YAML does not read as text; write "{key}"')
                self.document.lines[inside] = key_node.start_mark.line + 1
                result[key] = self.value(value_node, inside)
        return result

    def _scalar(self, node: yaml.ScalarNode, place: Place) -> Any:
        value = _plain(node.value) if node.style is None else node.value
        if isinstance(value, _Surprise):
            self._flaw(place, node, value.message)
        return value


@dataclass(frozen=True)
class _Surprise:
    """A plain scalar that YAML 1.1 reads other than written."""

    message: str


_RESOLVER = yaml.SafeLoader("")


def _plain(text: str) -> Any:
    """The meaning of an unquoted scalar: null, bool, int, float, str, or a `_Surprise`."""
    if NULL.fullmatch(text):
        return None
    if TRUTH.fullmatch(text):
        return text.lower() == "true"
    if WORD_TRUTH.fullmatch(text):
        truth = "true" if text.lower() in ("yes", "on") else "false"
        return _Surprise(f'{text} is read as {truth} by YAML 1.1; write {truth}, or "{text}" to mean text')
    if WHOLE.fullmatch(text):
        # Python refuses to read an integer of more than 4300 digits, and nothing here needs more than 19.
        return int(text) if len(text) < 20 else _Surprise(f"{shown(text)} is out of range")
    if NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "", 1))
    tag = _RESOLVER.resolve(yaml.ScalarNode, text, (True, False)).rpartition(":")[2]
    if tag == "int" and len(text) < 20 and text[-1].isalnum():  # PyYAML itself stumbles over `0x_`
        read = yaml.safe_load(text)
        meant = f"{int(text)} or {read}" if text.lstrip("+-").isdecimal() else str(read)
        return _Surprise(f'{text} is read as {read} by YAML 1.1; write {meant}, or "{text}" to mean text')
    if NUMBER.fullmatch(text):
        return float(text)
    if tag in ("int", "float", "timestamp"):
        kind = "a date" if tag == "timestamp" else "another number"
        return _Surprise(f'{text[:40]} is read as {kind} by YAML 1.1; write "..." around it to mean text')
    return text
