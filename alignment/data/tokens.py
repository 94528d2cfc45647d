"""Token tables: normalised rows of a schema to columns of token ids, in batches, with every loss accounted for.

    text        input_ids, labels             documents (BOS if the tokenizer sets one, EOS) packed into blocks
    messages    input_ids, labels             labels are -100 outside the assistant's turns
    preference  prompt_ids, chosen_ids, rejected_ids [, margin]
    unpaired    prompt_ids, completion_ids, label
    prompts     prompt_ids, prompt, other columns

Each table also has `row`, the index of the row it was made from (of the first document, for packed text).
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias, TypeVar

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from alignment.data.checks import Defect
from alignment.data.dialect import Dialect, Span, sets_bos
from alignment.data.sources import generator
from alignment.data.templates import split, tokenize, trained_tokens
from alignment.errors import DataError

BATCH = 1000  # rows rendered, tokenized and written at once: bounds memory
IGNORED = -100  # the label that PyTorch's cross entropy skips
ANSWERS = ("chosen_ids", "rejected_ids", "completion_ids")

Row = dict[str, Any]
Ids: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"  # one sequence
T = TypeVar("T")
U = TypeVar("U")
Change = Callable[[Sequence[Row]], Sequence[Row]]  # what is done to a batch of rows before it is tokenized


@dataclass
class Stats:
    """What tokenization did to the rows; `dropped` and `details` go to the tally of each row's source."""

    rows: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    truncated: int = 0
    boundary_mismatches: int = 0
    neutralized: int = 0
    dropped: dict[str, list[int]] = field(default_factory=dict)  # reason -> indices of rows
    details: dict[str, str] = field(default_factory=dict)
    length: dict[str, int] = field(default_factory=dict)  # p50, p95, max
    notes: list[str] = field(default_factory=list)  # what a person should know about the template

    def drop(self, defect: Defect, index: int) -> None:
        self.dropped.setdefault(defect.reason, []).append(index)
        self.details.setdefault(defect.reason, defect.detail)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Settings:
    """How rows become tokens; all of it is part of the cache key."""

    schema: str
    max_length: int | None
    on_overlong: str
    seed: int
    on_special: str = "drop"


@dataclass(frozen=True)
class Item:
    """The token columns of one row, and whether its answer changed the tokens of its prompt."""

    ids: dict[str, Ids]
    mismatch: bool = False

    @property
    def length(self) -> int:
        """Tokens of the longest sequence that this row makes."""
        if "input_ids" in self.ids:
            return len(self.ids["input_ids"])
        return len(self.ids["prompt_ids"]) + max(
            (len(self.ids[name]) for name in ANSWERS if name in self.ids), default=0
        )

    @property
    def trained(self) -> int:
        """Tokens that carry loss."""
        if "labels" in self.ids:
            return int((self.ids["labels"] != IGNORED).sum())
        return sum(len(self.ids[name]) for name in ANSWERS if name in self.ids)


def _array(ids: Sequence[int]) -> Ids:
    return np.asarray(ids, dtype=np.int32)


# --- one batch of rows to items -------------------------------------------------------------------------------------


def _guarded(function: Callable[[T], U], value: T) -> U | Defect:
    """The result for a row, or the defect that makes it unusable."""
    try:
        return function(value)
    except Defect as defect:
        return defect


def _encode_messages(rows: Sequence[Row], dialect: Dialect, tokenizer: PreTrainedTokenizerBase) -> list[Item | Defect]:
    def render(row: Row) -> tuple[str, list[Span]]:
        dialect.check_content(row["messages"], row.get("tools"))
        return dialect.render(row["messages"], row.get("tools"))

    rendered = [_guarded(render, row) for row in rows]
    encodings = tokenize(tokenizer, [found[0] for found in rendered if not isinstance(found, Defect)])
    items: list[Item | Defect] = []
    for found in rendered:
        if isinstance(found, Defect):
            items.append(found)
            continue
        text, spans = found
        encoding = next(encodings)
        ids = _array(encoding.ids)
        labels = np.full_like(ids, IGNORED)
        for start, end in trained_tokens(encoding, text, spans):
            labels[start:end] = ids[start:end]
        mismatch = any(_straddles(encoding, start) for start, _ in spans)
        items.append(Item({"input_ids": ids, "labels": labels}, mismatch))
    return items


def _straddles(encoding: Any, position: int) -> bool:
    """Whether one token holds characters from both sides of a position."""
    if position == 0:
        return False
    before, after = encoding.char_to_token(position - 1), encoding.char_to_token(position)
    return before is not None and before == after


def _encode_answers(
    rows: Sequence[Row], dialect: Dialect, tokenizer: PreTrainedTokenizerBase, answers: Sequence[str]
) -> list[Item | Defect]:
    """Prompt and answers of each row, all parted at one place: the answers share the tokens of their prompt."""

    def render(row: Row) -> list[str]:
        tools = row.get("tools")
        dialect.check_content([*row["prompt"], *(turn for name in answers for turn in row[name])], tools)
        wholes = [dialect.render([*row["prompt"], *row[name]], tools)[0] for name in answers]
        return [dialect.text(row["prompt"], tools, True), *wholes]

    def part(row_ids: list[list[int]]) -> Item:
        prompt, *wholes = row_ids
        at = split(prompt, *wholes) if wholes else len(prompt)
        ids = {"prompt_ids": _array((wholes or [prompt])[0][:at])}
        ids |= {f"{name}_ids": _array(whole[at:]) for name, whole in zip(answers, wholes, strict=True)}
        return Item(ids, mismatch=at < len(prompt))

    rendered = [_guarded(render, row) for row in rows]
    encodings = tokenize(tokenizer, [text for found in rendered if not isinstance(found, Defect) for text in found])
    return [
        found if isinstance(found, Defect) else _guarded(part, [next(encodings).ids for _ in found])
        for found in rendered
    ]


def encode(
    rows: Sequence[Row], schema: str, dialect: Dialect, tokenizer: PreTrainedTokenizerBase
) -> list[Item | Defect]:
    """The whole tokens of rows of any schema but `text`, before `fit`; a defect in place of a row that has none."""
    if schema == "messages":
        return _encode_messages(rows, dialect, tokenizer)
    answers = {"preference": ("chosen", "rejected"), "unpaired": ("completion",), "prompts": ()}[schema]
    return _encode_answers(rows, dialect, tokenizer, answers)


# --- lengths --------------------------------------------------------------------------------------------------------


def fit(item: Item, settings: Settings) -> tuple[Item, bool]:
    """A row within `max_length`, and whether its end was cut; a cut answer has no stop token.

    Raises:
        Defect: the row is dropped, because it is too long (a prompt alone is never cut) or because nothing is left.
        DataError: it is too long, and `on_overlong` is error.
    """
    limit = settings.max_length
    if limit is None or item.length <= limit:
        return item, False
    if settings.on_overlong == "error":
        raise DataError(f"{item.length:,} tokens, max_length is {limit:,} and data.on_overlong is error")
    if settings.on_overlong == "drop" or settings.schema == "prompts":
        raise Defect("overlong")
    if "labels" in item.ids:
        cut = Item({name: ids[:limit] for name, ids in item.ids.items()}, item.mismatch)
        if not cut.trained:
            raise Defect("emptied-by-truncation")
        return cut, True
    room = limit - len(item.ids["prompt_ids"])
    if room <= 0:
        raise Defect("emptied-by-truncation")
    cut = Item({name: ids[:room] if name in ANSWERS else ids for name, ids in item.ids.items()}, item.mismatch)
    if "chosen_ids" in cut.ids and np.array_equal(cut.ids["chosen_ids"], cut.ids["rejected_ids"]):
        raise Defect("equal-after-truncation")
    return cut, True


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(
    rows: Sequence[Row],
    where: Sequence[str],
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    change: Change | None = None,
) -> tuple[Iterator[pa.Table], Stats]:
    """The token table of `rows` piece by piece, and the statistics, which are complete once the pieces are read.

    Args:
        rows: read in batches; of no batch anything is kept but a few bytes a row.
        change: what is done to each batch first.

    Raises:
        DataError: the template ends no answer with a special token; a row too long under `on_overlong: error`.
    """
    stats = Stats()
    dialect = Dialect.of(tokenizer)
    if settings.schema == "text":
        return _packed(rows, settings, tokenizer, dialect, stats, change), stats
    if settings.schema != "prompts" and not dialect.stop:
        raise DataError(
            "the chat template ends no answer with a special token (EOS or an end-of-turn token): a model trained on "
            "it would never stop; set chat_template, for example chatml"
        )
    return _rows(rows, where, settings, tokenizer, dialect, stats, change), stats


def _rows(
    rows: Sequence[Row],
    where: Sequence[str],
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    dialect: Dialect,
    stats: Stats,
    change: Change | None,
) -> Iterator[pa.Table]:
    types, lengths, has_tools = _types(rows, settings.schema), array("q"), False
    for first in range(0, len(rows), BATCH):
        kept: dict[int, Item] = {}
        batch = rows[first : first + BATCH] if change is None else change(rows[first : first + BATCH])
        has_tools = has_tools or any(row.get("tools") for row in batch)
        for index, item in enumerate(encode(batch, settings.schema, dialect, tokenizer), first):
            try:
                if isinstance(item, Defect):
                    raise item
                kept[index], cut = fit(item, settings)
            except Defect as defect:
                stats.drop(defect, index)
                continue
            except DataError as error:
                raise DataError(f"{where[index]}: {error}") from None
            stats.truncated += cut
            stats.boundary_mismatches += item.mismatch
            stats.tokens += _tokens(kept[index])
            stats.trained_tokens += kept[index].trained
            lengths.append(kept[index].length)
        if kept:
            yield _table(list(kept.values()), list(kept), _others([batch[index - first] for index in kept], types))
    if has_tools and "tools" not in dialect.jinja:
        stats.notes.append("the chat template does not write the `tools` column: the model learns calls without them")
    if "strftime_now" in dialect.jinja:
        stats.notes.append("the chat template writes the date of today into the prompts")
    _finish(stats, lengths)


def _tokens(item: Item) -> int:
    return sum(len(ids) for name, ids in item.ids.items() if name != "labels")


def _finish(stats: Stats, lengths: Sequence[int]) -> None:
    stats.rows = len(lengths)
    if lengths:
        ordered = np.sort(np.asarray(lengths))
        p50, p95 = (int(ordered[math.ceil(share * len(ordered)) - 1]) for share in (0.50, 0.95))
        stats.length = {"p50": p50, "p95": p95, "max": int(ordered[-1])}


def _table(items: Sequence[Item], indices: Sequence[int], others: dict[str, pa.Array]) -> pa.Table:
    columns: dict[str, Any] = {name: _lists([item.ids[name] for item in items]) for name in items[0].ids}
    return pa.table({**columns, **others, "row": pa.array(indices, pa.int64())})


def _lists(sequences: Sequence[Ids]) -> pa.Array:
    offsets = np.cumsum([0, *map(len, sequences)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate(sequences)))


TURNS = pa.list_(pa.struct({"role": pa.string(), "content": pa.string()}))
TOKENS = frozenset({"prompt", "prompt_ids", "row"})  # names of columns that are ours


def _types(rows: Sequence[Row], schema: str) -> dict[str, pa.DataType]:
    """The columns that are kept beside the tokens, and the type of each over all rows, so that every piece of the
    table has the same.

    Raises:
        DataError: the values of a column are not of one type.
    """
    if schema == "messages":
        return {}
    if schema == "unpaired":
        return {"label": pa.bool_()}
    if schema == "preference":
        return {"margin": pa.float64()} if any(row.get("margin") is not None for row in rows) else {}
    found: dict[str, pa.DataType] = {}
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        for name in sorted({name for row in batch for name in row} - TOKENS):
            inferred = pa.string() if name == "tools" else _column(name, [row.get(name) for row in batch]).type
            try:
                pair = [pa.schema({name: kind}) for kind in (found.get(name, pa.null()), inferred)]
                found[name] = pa.unify_schemas(pair, promote_options="permissive").field(name).type
            except pa.ArrowException as error:
                raise _not_one_type(name, error) from None
    return {"prompt": TURNS, **found}


def _others(rows: Sequence[Row], types: dict[str, pa.DataType]) -> dict[str, pa.Array]:
    """Those columns, of some rows."""
    made = {}
    for name, kind in types.items():
        values: list[Any]
        if name == "prompt":
            values = [[{key: turn[key] for key in ("role", "content")} for turn in row["prompt"]] for row in rows]
        elif name == "tools":
            values = [json.dumps(row["tools"]) if "tools" in row else None for row in rows]
        else:
            values = [row.get(name) for row in rows]
        made[name] = _column(name, values, kind)
    return made


def _column(name: str, values: list[Any], kind: pa.DataType | None = None) -> pa.Array:
    try:
        return pa.array(values, kind)
    except (pa.ArrowException, OverflowError) as error:
        raise _not_one_type(name, error) from None


def _not_one_type(name: str, error: Exception) -> DataError:
    return DataError(f"column {name}: its values are not of one type: {str(error).splitlines()[0]}")


def _packed(
    rows: Sequence[Row],
    settings: Settings,
    tokenizer: PreTrainedTokenizerBase,
    dialect: Dialect,
    stats: Stats,
    change: Change | None,
) -> Iterator[pa.Table]:
    """Documents in seeded random order, joined and cut into blocks of `max_length`; the last may be shorter."""
    order = array("q", range(len(rows)))
    generator(settings.seed, "documents").shuffle(order)
    lengths = array("q")
    ids: Ids = np.empty(0, np.int32)  # tokens not yet in a block
    starts: np.ndarray[Any, np.dtype[np.int64]] = np.empty(0, np.int64)  # the document of each
    for first in range(0, len(order), BATCH):
        kept: dict[int, str] = {}
        batch: Sequence[Row] = [rows[index] for index in order[first : first + BATCH]]
        for index, row in zip(order[first : first + BATCH], change(batch) if change else batch, strict=True):
            try:
                dialect.check_text(row["text"])
                kept[index] = row["text"]
            except Defect as defect:
                stats.drop(defect, index)
        documents = list(documents_ids(tokenizer, list(kept.values())))
        ids = np.concatenate([ids, *documents])
        starts = np.concatenate([starts, *(np.full(len(doc), i) for doc, i in zip(documents, kept, strict=True))])
        last = first + BATCH >= len(order)
        if settings.max_length is None:
            blocks, ends = documents, list(np.cumsum([len(document) for document in documents], dtype=int))
        else:
            size = settings.max_length
            ends = list(range(size, len(ids) + 1, size))
            if last and (not ends or ends[-1] < len(ids)) and len(ids):
                ends.append(len(ids))
            blocks = [ids[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
        if blocks:
            lengths.extend(map(len, blocks))
            origins = [int(starts[begin]) for begin in [0, *ends[:-1]]]
            yield _table([Item({"input_ids": block, "labels": block}) for block in blocks], origins, {})
            ids, starts = ids[ends[-1] :], starts[ends[-1] :]
    stats.tokens = stats.trained_tokens = sum(lengths)
    _finish(stats, lengths)


def documents_ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[Ids]:
    """Each document between BOS (if the tokenizer sets one itself) and EOS, neither ever twice."""
    if tokenizer.eos_token_id is None:
        raise DataError("the tokenizer has no EOS token: documents cannot be told apart")
    bos = [tokenizer.bos_token_id] if sets_bos(tokenizer) else []
    for encoding in tokenize(tokenizer, texts):
        yield _array([*bos, *encoding.ids, tokenizer.eos_token_id])
