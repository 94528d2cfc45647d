"""One row as the model sees it: `alignment data show`.

The tokens come from the code that makes the training table, and are decoded one run at a time: what is trained, what is
only read, what `train.max_length` cuts. Labels say it without colours, colours say it again on a terminal. The two
answers of a pair stand side by side, the words in which they differ between braces (or underlined).
"""

from __future__ import annotations

import difflib
import itertools
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignment.data.checks import Defect
from alignment.data.dialect import Dialect
from alignment.data.shorten import Changes, neutralized
from alignment.data.tokens import ANSWERS, BATCH, IGNORED, Item, Settings, encode, fit, tables
from alignment.errors import DataError

WIDTH = 110
LABEL = 13
NEWLINE = "⏎"
_PIECE = re.compile(r"\n|<[^<>\s]{1,40}>|[^\S\n]*[^\s⏎<]+|⏎|<|[^\S\n]+")
COLORS = {"trained": "\033[32m", "not trained": "\033[2m", "cut": "\033[31m", "marked": "\033[1;4m", "off": "\033[0m"}


@dataclass(frozen=True)
class Run:
    """Tokens of one kind in a row: `trained`, `not trained` or `cut`."""

    kind: str
    ids: tuple[int, ...]


def runs(full: Sequence[int], left: Sequence[int], trained: Sequence[bool]) -> list[Run]:
    """What is left of a sequence as runs of one kind, and between them the tokens of the whole that are cut.

    Args:
        trained: of each token that is left.
    """
    head = _common(full, left)
    tail = _common(full[head:][::-1], left[head:][::-1])
    kinds = ["trained" if flag else "not trained" for flag in trained]
    gone = [("cut", token) for token in full[head : len(full) - tail]]
    kept = list(zip(kinds, left, strict=True))
    parts = itertools.groupby([*kept[:head], *gone, *kept[head:]], key=lambda pair: pair[0])
    return [Run(kind, tuple(token for _, token in part)) for kind, part in parts]


def _common(one: Sequence[int], two: Sequence[int]) -> int:
    """How many tokens two sequences begin with alike."""
    return next((at for at, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def view(full: Item, short: Item, settings: Settings) -> tuple[dict[str, list[Run]], str]:
    """The runs of each sequence of a row (`row`, or `prompt` and the answers), and why it is dropped, if it is.

    Args:
        full: the row as it is read; short: as it goes to tokenization, which `truncate_left` makes shorter.
    """
    try:
        left, why = fit(short, settings)[0], ""
    except Defect as defect:
        left, why = full, f"dropped: {defect}"
    except DataError as error:
        left, why = full, f"stops the run: {error}"

    def of(name: str, trained: Sequence[bool]) -> list[Run]:
        return runs(full.ids[name].tolist(), left.ids[name].tolist(), trained)

    if "labels" in left.ids:
        return {"row": of("input_ids", (left.ids["labels"] != IGNORED).tolist())}, why
    found = {"prompt": of("prompt_ids", [False] * len(left.ids["prompt_ids"]))}
    for name in ANSWERS:
        if name in left.ids:
            found[name.removesuffix("_ids")] = of(name, [True] * len(left.ids[name]))
    return found, why


# --- which row --------------------------------------------------------------------------------------------------------


def place(wanted: str, where: Sequence[str]) -> int:
    """The index of a row that is given by its number, or by where it stands.

    Raises:
        DataError: there is no such row.
    """
    if wanted.isdecimal():
        if int(wanted) < len(where):
            return int(wanted)
        raise DataError(f"--row {wanted}: the stage has rows 0 to {len(where) - 1:,}")
    found = [index for index, text in enumerate(where) if text == wanted] or [
        index for index, text in enumerate(where) if text.endswith(f"/{wanted}")
    ]
    if not found:
        raise DataError(f"--row {wanted}: no usable row stands there; the first one stands at {where[0]}")
    return found[0]


def longest(
    rows: Sequence[dict[str, Any]], settings: Settings, tokenizer: PreTrainedTokenizerBase, *, cut_only: bool
) -> int:
    """The row with the most tokens; with `cut_only` it must be longer than `max_length`.

    Raises:
        DataError: none is.
    """
    best, most = -1, settings.max_length or 0 if cut_only else -1
    dialect = Dialect.of(tokenizer)
    for begin in range(0, len(rows), BATCH):
        batch: Sequence[dict[str, Any]] = rows[begin : begin + BATCH]
        if settings.on_special == "neutralize":
            batch = [neutralized(row, dialect) for row in batch]
        for index, item in enumerate(encode(batch, settings.schema, dialect, tokenizer), begin):
            if not isinstance(item, Defect) and item.length > most:
                best, most = index, item.length
    if best < 0:
        raise DataError(f"--worst truncation: no row is longer than train.max_length ({settings.max_length})")
    return best


# --- text -------------------------------------------------------------------------------------------------------------


def page(
    row: Mapping[str, Any],
    title: str,
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    *,
    ids: bool,
    color: bool,
) -> str:
    """A row as text for a terminal."""
    changes, dialect = Changes(settings, tokenizer), Dialect.of(tokenizer)
    made, settings = changes([dict(row)]), changes.settings
    whole = neutralized(dict(row), dialect) if settings.on_special == "neutralize" else dict(row)
    item, short = encode([whole, *made], settings.schema, dialect, tokenizer)
    if isinstance(item, Defect):
        return f"{title}\ndropped: {item}"
    if isinstance(short, Defect):
        return f"{title}\ndropped: {short}"
    parts, why = view(item, short, settings)
    trained = sum(len(run.ids) for part in parts.values() for run in part if run.kind == "trained")
    cut = sum(len(run.ids) for part in parts.values() for run in part if run.kind == "cut")
    limit = f" of at most {settings.max_length:,}" if settings.max_length is not None else ""
    head = f"{item.length:,} tokens{limit}, {trained:,} trained" + (f", {cut:,} cut" if cut else "")
    lines = [title, head, *([why] if why else []), ""]
    if "chosen" in parts:
        lines += _blocks(parts["prompt"], tokenizer, ids=ids, color=color)
        lines += _beside(parts["chosen"], parts["rejected"], tokenizer, ids=ids, color=color)
    else:
        lines += _blocks([run for part in parts.values() for run in part], tokenizer, ids=ids, color=color)
    return "\n".join(lines)


def block(
    rows: Sequence[dict[str, Any]], number: int, settings: Settings, tokenizer: PreTrainedTokenizerBase,
    *, ids: bool, color: bool,
) -> str:  # fmt: skip
    """A block of documents, packed as they are trained.

    Raises:
        DataError: there are not so many.
    """
    pieces, _ = tables(rows, [], settings, tokenizer, Changes(settings, tokenizer))
    seen = 0
    for piece in pieces:
        if number < seen + len(piece):
            tokens = piece.column("input_ids")[number - seen].as_py()
            title = f"block {number:,}, begins in document {piece.column('row')[number - seen].as_py():,}"
            head = f"{len(tokens):,} tokens, all trained"
            run = Run("trained", tuple(tokens))
            return "\n".join([title, head, "", *_blocks([run], tokenizer, ids=ids, color=color)])
        seen += len(piece)
    raise DataError(f"--row {number}: the stage has blocks 0 to {seen - 1:,}")


def _text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Decoded tokens, special ones and control characters visible."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
    text = text.replace("\n", f"{NEWLINE}\n")
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: f"\\x{ord(match.group()):02x}", text)


def _paint(text: str, kind: str, color: bool) -> str:
    return f"{COLORS[kind]}{text}{COLORS['off']}" if color and text else text


def _blocks(parts: Iterable[Run], tokenizer: PreTrainedTokenizerBase, *, ids: bool, color: bool) -> Iterator[str]:
    """Every run under its label; lines are broken where the text has its own, and at the width of the page."""
    for run in parts:
        label = run.kind
        for line in _wrapped(_text(tokenizer, run.ids), WIDTH - LABEL - 2):
            yield f"{label:<{LABEL}}| {_paint(line, run.kind, color)}"
            label = ""
        if ids:
            for line in _wrapped(" ".join(map(str, run.ids)), WIDTH - LABEL - 2):
                yield f"{'':<{LABEL}}# {line}"


def _wrapped(text: str, width: int) -> Iterator[str]:
    for line in text.removesuffix("\n").split("\n"):
        yield from textwrap.wrap(
            line, width, drop_whitespace=False, replace_whitespace=False, expand_tabs=False, break_on_hyphens=False
        ) or [""]


def _beside(
    chosen: Sequence[Run], rejected: Sequence[Run], tokenizer: PreTrainedTokenizerBase, *, ids: bool, color: bool
) -> Iterator[str]:
    """Two answers side by side, the words in which they differ marked."""
    width = (WIDTH - LABEL - 5) // 2
    sides = [[(run.kind, _text(tokenizer, run.ids)) for run in side] for side in (chosen, rejected)]
    pieces = [[piece for kind, text in side for piece in _pieces(kind, text)] for side in sides]
    ours, theirs = ([text for _, text in side] for side in pieces)
    same = difflib.SequenceMatcher(None, ours, theirs, autojunk=False)
    equal: tuple[set[int], set[int]] = (set(), set())
    for match in same.get_matching_blocks():
        equal[0].update(range(match.a, match.a + match.size))
        equal[1].update(range(match.b, match.b + match.size))
    yield f"{'':<{LABEL}}| {'chosen':<{width}} | rejected"
    for kind in ("trained", "cut"):
        columns = [
            _column(
                [(text, index not in known) for index, (of, text) in enumerate(side) if of == kind], width, kind, color
            )
            for side, known in zip(pieces, equal, strict=True)
        ]
        label = kind
        for left, right in itertools.zip_longest(*columns, fillvalue=("", 0)):
            yield f"{label:<{LABEL}}| {left[0]}{' ' * (width - left[1])} | {right[0]}".rstrip()
            label = ""
    if ids:
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            for line in _wrapped(" ".join(str(token) for run in side for token in run.ids), WIDTH - LABEL - 2):
                yield f"{name:<{LABEL}}# {line}"
                name = ""


def _pieces(kind: str, text: str) -> list[tuple[str, str]]:
    """A text as words, each with the white space before it, tokens in angle brackets, and line ends."""
    return [(kind, piece) for piece in _PIECE.findall(text)]


def _column(words: Iterable[tuple[str, bool]], width: int, kind: str, color: bool) -> list[tuple[str, int]]:
    """Words broken into lines of a width, each with the number of characters that it shows."""
    lines: list[tuple[str, int]] = []
    line, shown, open_ = "", 0, False

    def brace(text: str) -> str:
        return "" if color else text

    for text, differs in [*words, ("\n", False)]:
        ends = text == "\n"
        if open_ and (not differs or ends):
            line, shown, open_ = line + brace("}"), shown + len(brace("}")), False
        if ends or shown + len(text) + 2 > width:
            if open_:
                line, shown = line + brace("}"), shown + len(brace("}"))
            lines.append((line, shown))
            line, shown, open_, text = "", 0, False, text.lstrip()
        while len(text) > width - 2:  # a word longer than a line, which is empty now
            lines.append((_paint(text[: width - 2], kind, color), width - 2))
            text = text[width - 2 :]
        if text and not ends:
            if differs and not open_:
                lead = text[: len(text) - len(text.lstrip())]
                line, shown, text, open_ = (
                    line + lead + brace("{"),
                    shown + len(lead) + len(brace("{")),
                    text.lstrip(),
                    True,
                )
            line, shown = line + _paint(text, "marked" if differs and color else kind, color), shown + len(text)
    return lines if any(count for _, count in lines) else []
