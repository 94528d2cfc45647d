"""Reading files: every kind, every kind of damage, named with file and line; mixtures and splits."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest

from alignment.data import files, sources
from alignment.errors import DataError
from alignment.recipe.schema import Source

ROWS = [{"text": "one"}, {"text": "twö"}, {"text": "three"}]
JSONL = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def read(path: Path | str, **keys: Any) -> list[sources.Record]:
    return list(sources.read(Source(path=str(path), **keys)))


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    if path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(data)
    else:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    return path


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", JSONL),
        ("a.jsonl.gz", JSONL),
        ("a.json", JSONL),
        ("a.json", json.dumps(ROWS, indent=2)),
        ("a.json.gz", "\ufeff " + json.dumps(ROWS)),
        ("a.jsonl.zst", JSONL),
        ("a.json.zst", json.dumps(ROWS)),
        ("a.csv.gz", "text\none\ntwö\nthree\n"),
        ("a.csv", "text\none\ntwö\nthree\n"),
        ("a.tsv", "text\r\none\r\n\r\ntwö\r\nthree\r\n"),
        ("a.jsonl", "\ufeff" + JSONL.replace("\n", "\r\n\r\n")),
        ("a.jsonl", JSONL.rstrip("\n")),
    ],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, content: str) -> None:
    assert [record.value for record in read(put(tmp_path / name, content))] == ROWS


def test_parquet(tmp_path: Path) -> None:
    path = parquet(tmp_path / "a.parquet")
    assert [record.value for record in read(path)] == ROWS
    assert read(path)[2].where == f"{path}[2]"


def test_a_csv_cell_may_hold_messages(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": 'Say "hi".'}]
    path = tmp_path / "a.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([["messages", "note"], [json.dumps(turns), '[{"a": 1}]'], ['[{"role": "user"', "x"]])
    assert [record.value for record in read(path)] == [
        {"messages": turns, "note": '[{"a": 1}]'},
        {"messages": '[{"role": "user"', "note": "x"},
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_an_array_is_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(files, "CHUNK", size)
    rows = [{"text": 'ö\n😀 \\ "', "n": -1.5e3, "list": [{}, [None, True]]}, {}, {"ß": ""}]
    for text in (json.dumps(rows), json.dumps(rows, indent=3, ensure_ascii=False), "\ufeff\r\n[ ]\n"):
        path = put(tmp_path / "a.json", text)
        assert [record.value for record in files.read_file(path)] == json.loads(text.removeprefix("\ufeff"))
    assert read(put(tmp_path / "a.json", json.dumps(rows)))[2].where == f"{tmp_path}/a.json[2]"
    damaged = [
        ('[{"a": 1},\n {"a": 1}\n {"a": 2}]', "a.json:3: invalid JSON: Expecting ',' delimiter at column 2"),
        ('[{"a": 1},\n\n {"b" 1}]', "a.json:3: invalid JSON: Expecting ':' delimiter at column 7"),
        ('[{"a": 1},\n', "a.json:2: invalid JSON: Expecting value at column 1"),
        ('[{"a": 1}\n', "a.json:2: invalid JSON: Expecting ',' delimiter at column 1"),
        ('[{"a": 1}] x', "a.json:1: invalid JSON: Extra data at column 12"),
        ('[{"a": 1}, {"b": 1, "b": 2}]', "a.json:1: invalid JSON: duplicate key 'b'"),
        ("[" * 100_000, "a.json:1: invalid JSON: nested too deeply"),
    ]
    for text, message in damaged:
        with pytest.raises(DataError) as error:
            read(put(tmp_path / "a.json", text))
        assert str(error.value) == f"{tmp_path}/{message}"
    for data, place in ((b'[{"a": 1},\n {"a": "\xff"}]', "2: invalid UTF-8 at byte 9"),
                        (b'[{"\xc3\xb6": "\xc3', "1: invalid UTF-8 at byte 10")):  # fmt: skip
        with pytest.raises(DataError, match=f"a.json:{place}"):
            read(put(tmp_path / "a.json", data))


def test_lines_are_counted_as_an_editor_counts_them(tmp_path: Path) -> None:
    records = read(put(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n'))
    assert [record.where for record in records] == [f"{tmp_path}/a.jsonl:1", f"{tmp_path}/a.jsonl:3"]
    quoted = read(put(tmp_path / "a.csv", 'a,b\n1,"two\nlines"\n3,4\n'))
    assert [(record.where.rpartition(":")[2], record.value["b"]) for record in quoted] == [
        ("2", "two\nlines"),
        ("4", "4"),
    ]


def test_paths_below_the_working_directory_are_shown_as_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(tmp_path / "data" / "a.jsonl", JSONL)
    monkeypatch.chdir(tmp_path)
    assert read(tmp_path / "data" / "a.jsonl")[0].where == "data/a.jsonl:1"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": 2}\n{"a": "x" "b"}\n', ":3: invalid JSON: Expecting ',' delimiter at column 11"),
        ("a.jsonl", '{"a": 1}\n{"a": ', ":2: invalid JSON: Expecting value at column 7"),
        ("a.jsonl", "{'a': 1}\n", ":1: invalid JSON: Expecting property name enclosed in double quotes at column 2"),
        ("a.jsonl", '{"a": 1, "a": 2}\n', ":1: invalid JSON: duplicate key 'a'"),
        ("a.jsonl", '{"a": NaN}\n', ":1: invalid JSON: NaN is not JSON"),
        ("a.jsonl", '{"a": 1}\n[1]\n', ":2: a record must be a JSON object with columns, found list"),
        ("a.jsonl", '{"a": ' + "[" * 100_000, ":1: invalid JSON: nested too deeply"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', ":2: invalid UTF-8 at byte 8"),
        ("a.json", '[{"a": 1},\n {"a": 1}\n {"a": 2}]', ":3: invalid JSON: Expecting ',' delimiter at column 2"),
        ("a.json", b'[{"a": 1},\n {"a": "\xff"}]', ":2: invalid UTF-8 at byte 9"),
        ("a.json", '[{"a": 1}, 2]', "[1]: a record must be a JSON object with columns, found int"),
        ("a.csv", "a,b\n1,2\n3\n", ":3: 1 fields, the header has 2"),
        ("a.csv", 'a,b\n1,"2\n', ":2: invalid CSV: unexpected end of data"),
        ("a.csv", "a,a\n1,2\n", ":1: duplicate column in the header: a, a"),
        ("a.jsonl", "", ": no records"),
        ("a.jsonl", "\n\r\n  \n", ": no records"),
        ("a.json", "[]", ": no records"),
        ("a.csv", "text\n", ": no records"),
        ("a.parquet", b"not parquet", ": damaged Parquet file: "),
        ("a.txt", "x", ": unknown kind of file; known are .jsonl, .ndjson, .json, .csv, .tsv, .parquet (also"),
    ],
)
def test_damage_stops_with_one_line_that_names_the_place(
    tmp_path: Path, name: str, content: str | bytes, message: str
) -> None:
    path = put(tmp_path / name, content)
    with pytest.raises(DataError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(b"plain text")
    with pytest.raises(DataError, match=r"a.jsonl.gz: damaged gzip file: Not a gzipped file"):
        read(path)
    path.write_bytes(gzip.compress(JSONL.encode() * 1000)[:-40])
    with pytest.raises(DataError, match=r"a.jsonl.gz: damaged gzip file"):
        read(path)


def test_a_line_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LINE_LIMIT", 2**20)
    path = put(tmp_path / "a.jsonl", '{"a": 1}\n' + "x" * 2**21)
    with pytest.raises(DataError, match=r"a.jsonl:2: line of more than 1 MiB"):
        read(path)
    monkeypatch.setattr(files, "LINE_LIMIT", 100)
    with pytest.raises(DataError, match=r"b.json:1: an object of more than 0 MiB, or invalid JSON: Unterminated"):
        read(put(tmp_path / "b.json", json.dumps([{"a": "x" * 2**22}])))
    assert csv.field_size_limit() >= 0


def test_missing_and_unreadable(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing.jsonl: no such file or folder"):
        read(tmp_path / "nothing.jsonl")
    with pytest.raises(DataError, match=r"no file matches"):
        read(tmp_path / "*.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: no data files"):
        read(tmp_path / "empty")


def test_folders_and_globs(tmp_path: Path) -> None:
    put(tmp_path / "d" / "b.jsonl", '{"t": 2}\n')
    put(tmp_path / "d" / "a.jsonl", '{"t": 1}\n')
    put(tmp_path / "d" / "README.md", "not data")
    assert [record.value["t"] for record in read(tmp_path / "d")] == [1, 2]
    assert [record.value["t"] for record in read(tmp_path / "d" / "[b]*.jsonl")] == [2]
    put(tmp_path / "s" / "train-00000-of-00002.jsonl", '{"t": 1}\n')
    put(tmp_path / "s" / "train-00001-of-00002.jsonl", '{"t": 2}\n')
    put(tmp_path / "s" / "test.jsonl", '{"t": 3}\n')
    assert [record.value["t"] for record in read(tmp_path / "s")] == [1, 2]
    assert [record.value["t"] for record in read(tmp_path / "s", split="test")] == [3]
    with pytest.raises(DataError, match=r"no files of split 'validation'; it has test, train"):
        read(tmp_path / "s", split="validation")


def test_what_another_tool_keeps_beside_its_data_is_no_data(tmp_path: Path) -> None:
    put(tmp_path / "a.jsonl", '{"t": 1}\n')
    put(tmp_path / "dataset_info.json", json.dumps({"a": {"file_name": "a.jsonl"}}))
    assert [record.value for record in read(tmp_path)] == [{"t": 1}]
    assert [record.value for record in read(tmp_path / "dataset_info.json")] == [{"t": 1}]


def test_turns_are_told_in_our_words(tmp_path: Path) -> None:
    turns = [{"speaker": "Kunde", "said": "Q", "id": 1}, {"speaker": "gpt", "said": "A"}]
    path = put(tmp_path / "a.jsonl", json.dumps({"talk": turns, "chosen": {"speaker": "gpt", "said": "B"}}) + "\n")
    names = {"role": "speaker", "content": "said", "roles": {"Kunde": "user"}}
    source = Source.model_validate({"path": str(path), "columns": {"messages": "talk"}, "turns": names})
    (record,) = sources.read(source)
    sources.require_columns([record], source)
    assert sources.adapt(record.value, source) == {
        "messages": [{"role": "user", "content": "Q", "id": 1}, {"role": "gpt", "content": "A"}],
        "chosen": {"role": "gpt", "content": "B"},
    }
    wrong = Source.model_validate({**source.model_dump(), "turns": {"content": "text"}})
    with pytest.raises(DataError, match=r"a.jsonl: turns: content: no turn has 'text'; they have id, said, speaker"):
        sources.require_columns([record], wrong)


def test_hub_names_go_to_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load(path: str, **keys: Any) -> datasets.Dataset:
        asked.update(path=path, **keys)
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    records = read("owner/name", revision="abc", subset="en", split="test")
    assert [record.value for record in records] == ROWS
    assert records[1].where == "owner/name[1]"
    assert asked == {"path": "owner/name", "revision": "abc", "name": "en", "data_dir": None, "split": "test"}
    read("owner/name", folder="helpful-base")
    assert asked["data_dir"] == "helpful-base"


def test_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def load(path: str, **keys: Any) -> datasets.Dataset:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled)\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as error:
        read("owner/name")
    assert str(error.value) == (
        "owner/name: no such file here, and not to be had from the hub: "
        "Couldn't reach 'owner/name' on the Hub (OfflineModeIsEnabled); "
        "give the path of a local copy, or connect (HF_HUB_OFFLINE=0)"
    )


def test_columns_are_renamed(lines: Callable[..., Path]) -> None:
    assert sources.rename({"q": 1, "a": 2, "id": 3}, {"prompt": "q", "completion": "a"}) == {
        "prompt": 1,
        "completion": 2,
        "id": 3,
    }
    assert sources.rename({"prompt": 0, "q": 1}, {"prompt": "q"}) == {"prompt": 1}
    bad = Source(path="x.jsonl", columns={"prompt": "question"})
    with pytest.raises(
        DataError, match=r"x.jsonl: columns: prompt: no column 'question'; the file has answer, problem"
    ):
        sources.require_columns([sources.Record({"problem": 1, "answer": 2}, "x.jsonl:1")], bad)


def test_mixture_is_the_largest_in_which_the_shares_hold() -> None:
    parts = [list(range(100)), list(range(100, 150)), list(range(150, 160))]
    mixed = sources.mix(parts, [1.0, 1.0, 0.5], seed=3)
    assert [len(part) for part in mixed] == [20, 20, 10]  # the third is scarce for its weight: it gives all it has
    assert all(set(some) <= set(part) and some == sorted(some) for some, part in zip(mixed, parts, strict=True))
    assert mixed == sources.mix(parts, [1.0, 1.0, 0.5], seed=3)
    assert mixed != sources.mix(parts, [1.0, 1.0, 0.5], seed=4)
    assert sources.mix(parts, [None, None, None], seed=3) == parts
    assert [len(part) for part in sources.mix(parts[:2], [None, 3.0], seed=3)] == [17, 50]


def test_take_is_seeded_and_loses_nothing() -> None:
    rows = list(range(50))
    assert sources.take(rows, 60, 1) == rows
    assert len(sources.take(rows, 5, 1)) == 5
    assert sources.take(rows, 5, 1, "a") != sources.take(rows, 5, 1, "b")
