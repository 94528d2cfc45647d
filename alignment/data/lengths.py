"""What a token table holds, in numbers: lengths, what is trained, where answers end, what padding costs.

The table is the one that training reads (see `tokens`); it is gone through in batches, so memory stays flat.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from alignment.data import languages
from alignment.data.findings import PLACES, Finding, Limit
from alignment.data.templates import tokenize
from alignment.data.tokens import ANSWERS, BATCH, IGNORED

GROUP = 50  # batches that Transformers sorts together for `group_by_length`
RARE = 0.01  # share of the characters below which a language is one of the others
OTHERS, UNCLEAR = "others", "unclear"  # the latter: too short to tell, or no language
Ints = np.ndarray[Any, np.dtype[np.int64]]
Sizes = np.ndarray[Any, np.dtype[np.int32]]
Flags = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass
class Counts:
    """What was counted in a token table.

    Attributes:
        lengths: (N,) tokens of the longest sequence of each row; sequences: of all of them, padded together.
        rows: how many there are.
        tokens, trained: of all rows.
        answers, stopped: trained runs of tokens, and those that end with a stop token.
        unstopped, untrained, doubled: rows with an answer without stop, without a trained token, with two BOS first.
        bos: how many rows hold how many BOS tokens.
    """

    lengths: list[Sizes] = field(default_factory=list)
    sequences: list[Sizes] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    trained: int = 0
    answers: int = 0
    stopped: int = 0
    unstopped: list[int] = field(default_factory=list)
    untrained: list[int] = field(default_factory=list)
    doubled: list[int] = field(default_factory=list)
    bos: Counter[int] = field(default_factory=Counter)


def count(table: datasets.Dataset, stops: Sequence[int], bos: int | None) -> Counts:
    """Count a token table of any schema.

    Args:
        stops: ids that end an answer.
        bos: the id of the BOS token, if the tokenizer has one that is no turn mark.
    """
    counts = Counts()
    for batch in table.with_format("arrow").iter(BATCH):
        columns = {name: batch.column(name).combine_chunks() for name in batch.column_names}
        rows = columns["row"].to_numpy()
        counts.rows += len(rows)
        first = columns["input_ids" if "input_ids" in columns else "prompt_ids"]
        if "labels" in columns:
            _count_labels(columns, rows, np.asarray(stops), counts)
        else:
            _count_answers(columns, rows, np.asarray(stops), counts)
        if bos is not None:
            _count_bos(first, rows, bos, counts)
    return counts


def _flat(column: pa.Array) -> tuple[Ints, Ints]:
    """The values of a list column and where each list begins, its end included."""
    sizes = column.value_lengths().to_numpy(zero_copy_only=False)
    return column.flatten().to_numpy(), np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)


def _count_labels(columns: Mapping[str, pa.Array], rows: Ints, stops: Ints, counts: Counts) -> None:
    labels, starts = _flat(columns["labels"])
    sizes = np.diff(starts)
    owner: Ints = np.repeat(np.arange(len(rows)), sizes)
    trained = labels != IGNORED
    # A run of trained tokens ends where the next token is not trained or belongs to another row.
    ends = trained & np.append(~trained[1:] | (owner[1:] != owner[:-1]), True)
    stopped = np.isin(labels[ends], stops)
    per_row = np.bincount(owner[trained], minlength=len(rows))
    counts.lengths.append(sizes.astype(np.int32))
    counts.sequences.append(counts.lengths[-1][:, None])
    counts.tokens += len(labels)
    counts.trained += int(trained.sum())
    counts.answers += len(stopped)
    counts.stopped += int(stopped.sum())
    counts.unstopped += rows[np.unique(owner[ends][~stopped])].tolist()
    counts.untrained += rows[per_row == 0].tolist()


def _count_answers(columns: Mapping[str, pa.Array], rows: Ints, stops: Ints, counts: Counts) -> None:
    prompts = columns["prompt_ids"].value_lengths().to_numpy(zero_copy_only=False).astype(np.int64)
    answers = [columns[name] for name in ANSWERS if name in columns]
    sizes = [answer.value_lengths().to_numpy(zero_copy_only=False).astype(np.int64) for answer in answers]
    counts.sequences.append(np.stack([prompts + size for size in sizes] or [prompts], axis=1).astype(np.int32))
    counts.lengths.append(counts.sequences[-1].max(axis=1))
    counts.tokens += int(prompts.sum() + sum(int(size.sum()) for size in sizes))
    counts.trained += sum(int(size.sum()) for size in sizes)
    open_: Flags = np.zeros(len(rows), np.bool_)
    empty: Flags = np.zeros(len(rows), np.bool_)
    for answer, size in zip(answers, sizes, strict=True):
        values, starts = _flat(answer)
        stopped: Flags = np.zeros(len(rows), np.bool_)
        stopped[size > 0] = np.isin(values[starts[1:][size > 0] - 1], stops)
        counts.answers += len(rows)
        counts.stopped += int(stopped.sum())
        open_ |= ~stopped
        empty |= size == 0
    counts.unstopped += rows[open_].tolist()
    counts.untrained += rows[empty].tolist()


def _count_bos(column: pa.Array, rows: Ints, bos: int, counts: Counts) -> None:
    values, starts = _flat(column)
    owner: Ints = np.repeat(np.arange(len(rows)), np.diff(starts))
    held = np.bincount(owner[values == bos], minlength=len(rows))
    counts.bos.update(held.tolist())
    long = np.flatnonzero(np.diff(starts) > 1)
    begin = starts[long]
    counts.doubled += rows[long[(values[begin] == bos) & (values[begin + 1] == bos)]].tolist()


# --- what it costs --------------------------------------------------------------------------------------------------


def padding(sequences: Ints | Sizes, per_device: int, seed: int, *, grouped: bool) -> float:
    """The share of the positions that is padding, when rows are drawn in random order and padded per forward pass.

    Args:
        sequences: (N, K) lengths of the sequences that each row gives.
        grouped: the trainer sorts by length within `GROUP` batches.
    """
    order = np.random.default_rng(seed).permutation(len(sequences))
    shuffled = sequences[order]
    if grouped:
        size = per_device * GROUP
        pieces = [shuffled[begin : begin + size] for begin in range(0, len(shuffled), size)]
        shuffled = np.concatenate([piece[np.argsort(-piece.max(axis=1), kind="stable")] for piece in pieces])
    longest = np.maximum.reduceat(shuffled.max(axis=1), np.arange(0, len(shuffled), per_device))
    rows: Ints = np.diff(np.append(np.arange(0, len(shuffled), per_device), len(shuffled)))
    return float(1 - shuffled.sum(dtype=np.int64) / (longest * rows * sequences.shape[1]).sum())


def packed(lengths: Iterable[int], size: int) -> int:
    """How many blocks of `size` tokens hold rows of these lengths: the longest first, each into the fullest block in
    which there is room (best fit decreasing, as TRL's `packing_strategy: bfd`)."""
    room: list[int] = []  # different amounts of free room, sorted
    blocks: dict[int, int] = defaultdict(int)  # room -> blocks that have it
    total = 0
    for length in sorted(lengths, reverse=True):
        at = bisect_left(room, length)
        if at == len(room):
            total += 1
            left = size - min(length, size)
        else:
            left = room[at] - length
            blocks[room[at]] -= 1
            if not blocks[room[at]]:
                room.pop(at)
        if not blocks[left]:
            insort(room, left)
        blocks[left] += 1
    return total


def per_character(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Tokens per character of the texts of some rows, by language, the one with most characters first.

    Languages of less than a hundredth of the characters are counted together: of that few, some are wrongly found.
    """
    texts = [text for row in rows for text in row if text]
    tokens: Counter[str] = Counter()
    characters: Counter[str] = Counter()
    for text, encoding in zip(texts, tokenize(tokenizer, texts), strict=True):
        language = languages.of(text) or UNCLEAR
        tokens[language] += len(encoding.ids)
        characters[language] += len(text)
    for language in [name for name, count in characters.items() if count < RARE * characters.total()]:
        for counter in (tokens, characters):
            counter[OTHERS] += counter.pop(language)
    rates = {name: tokens[name] / count for name, count in characters.most_common()}
    return {"rows": len(rows), "languages": rates}


# --- what is said ---------------------------------------------------------------------------------------------------


def summary(
    counts: Counts, schema: str, *, per_device: int, seed: int, grouped: bool, size: int | None
) -> dict[str, Any]:
    """The numbers of a table, for JSON and for the page; `size` is the block that packing would fill."""
    if not counts.rows:
        return {"rows": 0}
    lengths = np.concatenate(counts.lengths)
    quantiles = np.quantile(lengths, [0.05, 0.5, 0.95, 0.99], method="inverted_cdf")
    found: dict[str, Any] = {
        "rows": len(lengths),
        "tokens": counts.tokens,
        "trained": counts.trained,
        "trained_share": counts.trained / counts.tokens if counts.tokens else 0.0,
        "length": dict(zip(("p5", "p50", "p95", "p99"), map(int, quantiles), strict=True))
        | {"max": int(lengths.max())},
        "untrained_rows": len(counts.untrained),
    }
    if schema in ("messages", "preference", "unpaired"):
        found["answers"] = counts.answers
        found["stop_trained"] = counts.stopped / counts.answers if counts.answers else 0.0
    if counts.bos:
        found["bos"] = {str(held): rows for held, rows in sorted(counts.bos.items())}
    if schema != "text":
        found["padding"] = padding(np.concatenate(counts.sequences), per_device, seed, grouped=grouped)
    if schema == "messages" and size is not None:
        blocks = packed(lengths.tolist(), size)
        used = float(lengths.sum())
        found["packing"] = {
            "blocks": blocks, "of": size, "filled": used / (blocks * size),
            "saves": 1 - blocks * size / (used / (1 - found["padding"])),
        }  # fmt: skip
    return found


def findings(counts: Counts, schema: str, where: Sequence[str], limit: Limit) -> Iterator[Finding]:
    """What is wrong with a table; `where` says where each row stands."""
    total = counts.rows

    def of(check: str, rows: Sequence[int], says: str) -> Finding:
        return Finding(check, len(rows), total, says, tuple(where[row] for row in rows[:PLACES]), {}, limit(check))

    if schema in ("messages", "preference", "unpaired"):
        if counts.unstopped:
            yield of(
                "unstopped", counts.unstopped, "hold an answer whose stop token is not trained: cut, or never written"
            )
        if counts.untrained:
            yield of("untrained", counts.untrained, "have no trained token in an answer")
    if counts.doubled:
        yield of(
            "double-bos", counts.doubled, "begin with two BOS tokens: the template and the tokenizer both write one"
        )
