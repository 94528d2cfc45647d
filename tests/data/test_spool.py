"""Rows and numbers that memory need not hold."""

from __future__ import annotations

import gc
import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from transformers import PreTrainedTokenizerFast

from alignment.data import spool
from alignment.data.prepare import prepare
from alignment.data.remedies import Found, Rows
from alignment.data.spool import Numbers, Spool, View
from alignment.data.tokens import _others, _types
from alignment.errors import DataError, StorageError
from alignment.recipe.schema import Stage


@pytest.mark.parametrize("held", [0, 100, 10**6])
def test_what_goes_in_comes_out(monkeypatch: pytest.MonkeyPatch, held: int) -> None:
    monkeypatch.setattr(spool, "HELD", held)
    items: list[Any] = [{"a": [index, None, "ü" * index]} for index in range(50)]
    kept: Spool[Any] = Spool(items[:20])
    assert kept[3] == items[3]  # a read between writes
    kept.extend(items[20:])
    assert list(kept) == items
    assert kept[-1] == items[-1]
    assert kept[10:40:7] == items[10:40:7]
    with pytest.raises(IndexError):
        kept[50]


def test_numbers() -> None:
    numbers = Numbers(np.uint16, 2)
    assert numbers.array.shape == (0, 2)
    numbers.add([[1, 2]])
    first = numbers.array
    numbers.add(np.array([[3, 4], [5, 6]]))
    assert numbers.array.tolist() == [[1, 2], [3, 4], [5, 6]]
    assert (first.tolist(), len(numbers)) == ([[1, 2]], 3)


def test_a_view_shows_when_asked() -> None:
    shown: list[int] = []

    def double(value: int) -> int:
        shown.append(value)
        return 2 * value

    view = View([1, 2, 3], double)
    assert (len(view), shown) == (3, [])
    assert (view[1], view[1:], list(view)) == (4, [4, 6], [2, 4, 6])


def test_rows_that_are_chosen() -> None:
    rows = Rows.of(Found({"text": str(index)}, f"f:{index}", index % 3, {"c": index}) for index in range(10))
    some = rows.pick([7, 2, 2])
    assert [(one.row["text"], one.where, one.source, one.columns) for one in some] == [
        ("7", "f:7", 1, {"c": 7}), ("2", "f:2", 2, {"c": 2}), ("2", "f:2", 2, {"c": 2}),
    ]  # fmt: skip
    assert some.sources.tolist() == [1, 2, 2]
    assert [one.where for one in rows[2:5].pick([0, 2])] == ["f:2", "f:4"]


def test_no_room_is_a_storage_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: Spool[int] = Spool()

    def full(data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept._file, "write", full)
    with pytest.raises(StorageError, match=r"cannot hold the rows: No space left on device; .*TMPDIR"):
        kept.append(1)


def test_columns_of_prompts_have_one_type_over_all_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("alignment.data.tokens.BATCH", 2)
    prompt = [{"role": "user", "content": "a"}]
    rows = [{"prompt": prompt, "answer": None}, {"prompt": prompt, "answer": 1, "tags": []},
            {"prompt": prompt, "answer": 0.5, "tags": ["x"]}]  # fmt: skip
    types = _types(rows, "prompts")
    assert (types["answer"], types["tags"]) == (pa.float64(), pa.list_(pa.string()))
    pieces = [pa.table(_others(rows[:2], types)), pa.table(_others(rows[2:], types))]
    assert pieces[0].schema == pieces[1].schema
    assert pa.concat_tables(pieces).column("answer").to_pylist() == [None, 1.0, 0.5]
    with pytest.raises(DataError, match="column answer: its values are not of one type"):
        _types([*rows, {"prompt": prompt, "answer": "text"}], "prompts")


@pytest.mark.parametrize("schema", ["preference", "text"])
def test_memory_does_not_grow_with_the_rows(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, schema: Any
) -> None:
    """Ten times the rows, read, checked, held against limits and tokenized: some bytes a row more, not their text."""
    monkeypatch.setattr(spool, "HELD", 2**16)
    for module in ("tokens", "texts", "lengths"):
        monkeypatch.setattr(f"alignment.data.{module}.BATCH", 50)
    text = "word " * 150
    peaks = []
    for count in (300, 3000):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for index in range(count):
                row = {"prompt": f"{index} {text}", "chosen": f"yes {index}", "rejected": f"no {index}"}
                file.write(json.dumps(row if schema == "preference" else {"text": row["prompt"]}) + "\n")
        limits = {"near_duplicate": None, "duplicate": 0.5, "separable": None}
        data = {"train": [{"path": str(path)}], "limits": limits, "dedupe": "rows"}
        stage = Stage.model_validate({"algorithm": "dpo", "seed": 1, "data": data})
        gc.collect()
        tracemalloc.start()
        prepare(stage, schema, tokenizer, max_length=None, cache=tmp_path / "cache", say=lambda text: None)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 2700 < 500  # bytes; the text of a row alone has 750
