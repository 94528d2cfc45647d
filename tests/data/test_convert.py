"""`alignment data convert`: what is written, what is counted, what is refused, and that memory does not grow."""

from __future__ import annotations

import datetime
import gzip
import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import trl

from alignment.cli import main
from alignment.data.convert import convert
from alignment.data.files import read_file
from alignment.errors import DataError, StorageError
from alignment.recipe.schema import Source

Lines = Callable[..., Path]
U, A = "user", "assistant"
ALPACA = [
    {"instruction": "Add", "input": "1 2", "output": "3"},
    {"instruction": "", "input": "", "output": "3"},
    {"instruction": "Say ö.", "input": None, "output": "ö", "history": [["Hi", "Yo."]]},
    {"instruction": "Say b.", "output": 3},
]
MESSAGES = [
    [{"role": U, "content": "Add\n1 2"}, {"role": A, "content": "3"}],
    [{"role": U, "content": "Hi"}, {"role": A, "content": "Yo."}, {"role": U, "content": "Say ö."},
     {"role": A, "content": "ö"}],
]  # fmt: skip


def silent(text: str) -> None:
    pass


def run(path: Path, out: Path, **keys: Any) -> dict[str, Any]:
    options: dict[str, Any] = {"schema": None, "strict": False, "say": silent}
    options |= {key: keys.pop(key) for key in list(keys) if key in options}
    return convert(Source(path=str(path), **keys), out, **options)


def rows(path: Path) -> list[dict[str, Any]]:
    return [record.value for record in read_file(path)]


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_rows_are_written_and_drops_are_counted(tmp_path: Path, lines: Lines, ending: str) -> None:
    out, said = tmp_path / f"out{ending}", []
    path = lines(ALPACA)
    summary = run(path, out, say=said.append)
    assert rows(out) == [{"messages": messages} for messages in MESSAGES]
    assert summary["rows"] == {"in": 4, "kept": 2, "dropped": {"empty-content": 1, "wrong-type": 1}}
    assert summary["examples"] == {"empty-content": [f"{path}:2"], "wrong-type": [f"{path}:4"]}
    assert said == [
        f"{path}: alpaca: instruction, output [, input, system, history] in all of the first 4 rows",
        f"{path}: dropped 2 (50.0%): empty-content 1 (:2; user), wrong-type 1 (:4; output is int, not text)",
        f"{out}: 2 messages rows from 4",
    ]
    assert sorted(file.name for file in tmp_path.iterdir()) == sorted([out.name, "rows.jsonl"])


def test_strict_stops_at_the_first_defect_and_writes_nothing(tmp_path: Path, lines: Lines) -> None:
    path, out = lines(ALPACA), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"rows.jsonl:2: empty-content: a user or system turn of white space only"):
        run(path, out, strict=True)
    assert list(tmp_path.iterdir()) == [path]


def test_damage_in_the_middle_writes_nothing(tmp_path: Path, lines: Lines) -> None:
    path, out = lines([*ALPACA * 200, '{"instruction": ']), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"rows.jsonl:801: invalid JSON"):
        run(path, out)
    assert list(tmp_path.iterdir()) == [path]


def test_no_usable_row(tmp_path: Path, lines: Lines) -> None:
    path, out = lines(ALPACA[3:]), tmp_path / "out.jsonl"
    with pytest.raises(DataError, match=r"rows.jsonl: no usable row: wrong-type 1 \(:1; output is int, not text\)"):
        run(path, out)
    assert not out.exists()


def test_what_is_written_is_read_again_as_it_is(tmp_path: Path, lines: Lines) -> None:
    pair = {"prompt": "Q", "chosen": "good", "rejected": "bad", "score": 1.5}
    for index, row in enumerate([{"text": "Once."}, ALPACA[0], pair, {"prompt": "Q", "completion": "A", "label": 0},
                                 {"prompt": "Q", "answer": 4}]):  # fmt: skip
        first, second = tmp_path / f"{index}-1.jsonl", tmp_path / f"{index}-2.jsonl"
        one = run(lines([row]), first)
        two = run(first, second)
        assert first.read_bytes() == second.read_bytes()
        assert one["schema"] == two["schema"]


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        (ALPACA[0], "messages"),
        ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, "preference"),
        ({"prompt": "Q", "completion": "A", "label": "true"}, "unpaired"),
        ({"prompt": "Q"}, "prompts"),
    ],
)
def test_trl_takes_the_rows_for_conversations(tmp_path: Path, lines: Lines, row: dict[str, Any], schema: str) -> None:
    summary = run(lines([row] * 3), tmp_path / "out.jsonl")
    assert summary["schema"] == schema
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "out.jsonl"), split="train", cache_dir=tmp_path)
    assert len(loaded) == 3
    assert trl.data_utils.is_conversational(loaded[0])


def test_a_schema_may_be_asked_for(tmp_path: Path, lines: Lines) -> None:
    path = lines([{"prompt": "Q", "responses": ["c", "a", "b"], "scores": [1, 3, 2]}])
    written = {}
    for schema in ("preference", "unpaired", "messages", "prompts"):
        run(path, tmp_path / f"{schema}.jsonl", schema=schema, pairs="adjacent")
        written[schema] = rows(tmp_path / f"{schema}.jsonl")
    assert [(row["chosen"][0]["content"], row["rejected"][0]["content"]) for row in written["preference"]] == [
        ("a", "b"), ("b", "c")
    ]  # fmt: skip
    assert [(row["completion"][0]["content"], row["label"]) for row in written["unpaired"]] == [
        ("a", True), ("b", False), ("b", True), ("c", False)
    ]  # fmt: skip
    assert written["messages"] == [{"messages": [{"role": U, "content": "Q"}, {"role": A, "content": "a"}]}]
    assert written["prompts"][0]["prompt"] == [{"role": U, "content": "Q"}]
    with pytest.raises(DataError, match="columns prompt, responses, scores fit no format of text rows"):
        run(path, tmp_path / "text.jsonl", schema="text")


def test_parquet_values_that_json_does_not_have(tmp_path: Path) -> None:
    path, day = tmp_path / "a.parquet", datetime.date(2024, 2, 29)
    table = {"prompt": ["Q", "R", "S"], "day": [day] * 3, "score": [1.0, float("nan"), None], "raw": [None, None, b"x"]}
    pyarrow.parquet.write_table(pa.table(table), path)
    summary = run(path, tmp_path / "out.jsonl")
    prompt = [{"role": U, "content": "Q"}]
    assert rows(tmp_path / "out.jsonl") == [{"prompt": prompt, "day": "2024-02-29", "score": 1.0, "raw": None}]
    assert summary["rows"]["dropped"] == {"wrong-type": 2}


def test_what_is_refused(tmp_path: Path, lines: Lines) -> None:
    path = lines(ALPACA)
    there = tmp_path / "there.jsonl"
    there.write_text("precious")
    for out, message in (
        (there, "there.jsonl: exists, and is not written over; give another name"),
        (path, "rows.jsonl: exists"),
        (tmp_path / "out.parquet", "out.parquet: is written as JSON Lines; name it .jsonl, .jsonl.gz, .jsonl.zst"),
        (tmp_path / "none" / "out.jsonl", "none: no such folder"),
    ):
        with pytest.raises(DataError, match=message):
            run(path, out)
    assert there.read_text() == "precious"


def test_a_full_disk_is_a_storage_error(tmp_path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    path = lines(ALPACA)
    with pytest.raises(StorageError, match=r"out.jsonl: cannot be written: No space left on device"):
        run(path, tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == [path]


def test_the_command(tmp_path: Path, lines: Lines, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = lines([{"question": "Q", "reply": "A"}, {"question": "Q", "reply": ""}]), tmp_path / "out.jsonl"
    command = ["data", "convert", str(path), str(out)]
    assert main(command) == 2
    assert "columns question, reply fit no format of rows; wanted: " in capsys.readouterr().err
    assert main([*command, "--column", "prompt"]) == 2
    assert "--column prompt: give our name and the file's" in capsys.readouterr().err
    columns = ["--column", "prompt=question", "--column", "completion=reply"]
    assert main([*command, *columns, "--strict", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["code"] == 2
    assert main([*command, *columns, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["rows"] == {"in": 2, "kept": 1, "dropped": {"empty-answer": 1}}
    assert (summary["code"], summary["format"], summary["schema"]) == (0, "prompt-completion", "messages")
    assert len(rows(out)) == 1
    assert main(command) == 2
    assert "exists, and is not written over" in capsys.readouterr().err


def _peak(path: Path, out: Path) -> int:
    tracemalloc.start()
    run(path, out)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    monkeypatch.setattr("alignment.data.files.CHUNK", 2**14)
    row = json.dumps({"prompt": "Q " * 100, "completion": "A " * 100})
    peaks = []
    for count in (4000, 10000):  # 1.7 and 4.2 MB
        text = "[" + ",\n".join([row] * count) + "]" if kind == ".json" else (row + "\n") * count
        path = tmp_path / f"{count}{kind}"
        path.write_bytes(gzip.compress(text.encode()) if kind.endswith(".gz") else text.encode())
        peaks.append(_peak(path, tmp_path / f"{count}.out.jsonl"))
    assert peaks[1] - peaks[0] < 500_000  # reading it whole takes at least 2.5 MB more
