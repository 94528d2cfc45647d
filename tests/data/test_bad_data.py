"""Bad input, end to end: every fault ends in one clear line, or in a counted drop where `strict` is not asked for."""

from __future__ import annotations

import codecs
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from alignment.cli import main
from alignment.data import files
from alignment.data.convert import convert
from alignment.errors import DataError
from alignment.recipe.schema import Source

GOOD = {"prompt": "Q", "completion": "A"}
LINE = json.dumps(GOOD) + "\n"


def row(**changes: Any) -> str:
    return json.dumps({**GOOD, **changes}) + "\n"


def attempt(path: Path, *, strict: bool) -> dict[str, Any]:
    out = path.parent / "out" / "out.jsonl"
    out.parent.mkdir(exist_ok=True)
    out.unlink(missing_ok=True)
    summary = convert(Source(path=str(path)), out, schema=None, strict=strict, say=lambda text: None)
    return {**summary["rows"], "places": [place for places in summary["examples"].values() for place in places]}


# --- damage: always stops, whatever `strict` says ---


def zstd(data: bytes, path: Path) -> bytes:
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(data)
    return path.read_bytes()


DAMAGE: list[tuple[str, bytes, str]] = [
    ("a.jsonl", (LINE * 2 + '{"prompt": "Q" "completion"\n').encode(), ":3: invalid JSON: Expecting ',' delimiter"),
    ("a.jsonl", (LINE * 3)[:-10].encode(), ":3: invalid JSON: Unterminated string starting at"),
    ("a.jsonl", (LINE * 2).encode() + bytes(300), ":3: NUL bytes where JSON belongs: the file was not written to its"),
    ("a.jsonl", b'{"prompt": "a\0b"}\n', ":1: invalid JSON: Invalid control character at"),
    ("a.jsonl", codecs.BOM_UTF16_LE + LINE.encode("utf-16-le"), ": is UTF-16 text; save it as UTF-8"),
    ("a.json", codecs.BOM_UTF16_BE + b"\0[\0]", ": is UTF-16 text; save it as UTF-8"),
    ("a.csv", codecs.BOM_UTF16_LE + "prompt\nQ\n".encode("utf-16-le"), ": is UTF-16 text; save it as UTF-8"),
    ("a.jsonl", LINE.encode() + b'{"prompt": "\xe9"}\n', ":2: invalid UTF-8 at byte 13"),
    ("a.jsonl", b"", ": no records"),
    ("a.jsonl.gz", gzip.compress(LINE.encode() * 3000)[:-30], ": damaged gzip file: "),
    ("a.jsonl.gz", LINE.encode(), ": damaged gzip file: Not a gzipped file"),
    ("a.jsonl.zst", LINE.encode(), ": damaged zstd file: "),
    ("a.parquet.gz", b"x", ": unknown kind of file; known are "),
    ("a.jsonl", b'"a text"\n', ":1: a record must be a JSON object with columns, found str"),
]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(("name", "data", "message"), DAMAGE)
def test_damage_is_one_line(tmp_path: Path, name: str, data: bytes, message: str, strict: bool) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        attempt(path, strict=strict)
    assert str(error.value).startswith(f"{path}{message}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("cut", [20, 60])
def test_a_zstd_file_that_ends_too_early(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl.zst"
    whole = zstd("".join(row(prompt=f"Q{index}") for index in range(3000)).encode(), path)
    assert attempt(path, strict=True)["kept"] == 3000
    path.write_bytes(whole[:-cut])
    with pytest.raises(DataError, match=r"a.jsonl.zst: damaged zstd file: Truncated compressed stream"):
        attempt(path, strict=False)


def test_what_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "gone.jsonl").symlink_to("nowhere.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    for name, message in (
        ("none.jsonl", "none.jsonl: no such file or folder"),
        ("gone.jsonl", "gone.jsonl: is a link to nowhere.jsonl, which does not exist"),
        ("pipe.jsonl", "pipe.jsonl: is neither a file nor a folder"),
        ("folder.jsonl", r"folder.jsonl: no data files \("),
    ):
        with pytest.raises(DataError, match=message):
            attempt(tmp_path / name, strict=False)
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text(LINE)
    assert attempt(folder, strict=True)["kept"] == 1
    (folder / "b.jsonl").symlink_to("nowhere.jsonl")  # half of the data is gone: not a smaller data set
    with pytest.raises(DataError, match=r"is a link to nowhere.jsonl, which does not exist"):
        attempt(folder, strict=False)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("change", ["append", "replace", "touch"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, kind: str, change: str) -> None:
    path = tmp_path / f"a{kind}"
    text = {".jsonl": LINE * 300, ".json": json.dumps([GOOD] * 300), ".csv": "prompt,completion\n" + "Q,A\n" * 300}
    path.write_text(text[kind])
    assert len(list(files.read_file(path))) == 300
    records = files.read_file(path)
    next(records)
    if change == "append":
        with path.open("a") as file:
            file.write("\n")
    elif change == "replace":
        other = tmp_path / "other"
        other.write_text(text[kind])
        other.rename(path)
    else:
        os.utime(path, ns=(0, 0))
    with pytest.raises(DataError, match=r": changed while it was read; start again when nothing writes to it"):
        list(records)


# --- what is harmless passes ---


@pytest.mark.parametrize(
    "text",
    [
        LINE,
        "\ufeff" + LINE * 3,
        LINE.replace("\n", "\r\n") * 3,
        "\n\n" + LINE + "   \n" + LINE,
        LINE.rstrip("\n"),
        row(prompt="x" * 10 * 2**20),  # a line of 10 MB
        row(prompt="\u2028 \u0085 \ufeff"),  # line ends of other conventions, inside a line
    ],
)
def test_harmless(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(text, encoding="utf-8", newline="")
    found = attempt(path, strict=True)
    assert found["dropped"] == {}
    assert found["kept"] == found["in"] == text.count("prompt")


# --- defective rows: counted, or refused with `strict` ---


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        (row(completion=3), "wrong-type", "completion is int, not text"),
        (row(completion=None), "missing-column", "completion"),
        (row(prompt=["Q"]), "wrong-type", "a message is str, not an object"),
        (row(prompt="a\0b"), "nul-character", "NUL"),
        (row(completion="\ud800"), "invalid-unicode", "d800"),
        (row(completion="\t\u00a0\n"), "empty-answer", "white space"),
        ('{"instruction": "Q", "output": "A"}\n', "other-format", "alpaca"),
        ('{"messages": [{"role": "user", "content": "Q"}]}\n', "other-format", "messages"),
        ('{"unknown": 1}\n', "missing-column", "prompt"),
    ],
)
def test_a_defective_row(tmp_path: Path, bad: str, reason: str, detail: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINE * 4 + bad + LINE)
    found = attempt(path, strict=False)
    assert (found["in"], found["kept"], found["dropped"]) == (6, 5, {reason: 1})
    assert found["places"] == [f"{path}:5"]
    with pytest.raises(DataError) as error:
        attempt(path, strict=True)
    assert str(error.value).startswith(f"{path}:5: {reason}: ")
    assert detail in str(error.value)


def test_a_file_of_two_formats_in_equal_parts(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text((LINE + '{"instruction": "Q", "output": "A"}\n') * 20)
    with pytest.raises(DataError, match=r"20 each of the first 40 rows fit several formats of rows: alpaca .*; prompt"):
        attempt(path, strict=False)


def test_the_command_says_it_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(LINE + "{\n")
    assert main(["data", "convert", str(path), str(tmp_path / "out.jsonl")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"alignment: {path}:2: invalid JSON: Expecting property name")
