"""Bad input on the real command line: every fault ends in one clear line and exit code 2, or in a counted drop.

Damage to a file stops whatever `--strict` says; a defective row is dropped and counted, and stops where `--strict` (of
a recipe `data.strict`) is asked for. The reader's own tests are in test_sources.py, those of recipes in
tests/test_bad_inputs.py.
"""

from __future__ import annotations

import codecs
import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest

from alignment.cli import main
from alignment.data import files
from alignment.errors import DataError

ROWS = [{"prompt": f"Question {index}", "completion": f"Answer {index}"} for index in range(200)]
TEXT = "".join(json.dumps(row) + "\n" for row in ROWS)
OTHER = '{"instruction": "Q", "output": "A"}\n'
Command = tuple[str, str]  # what is typed, and what stands before the line on stderr

CHECK: Command = ("data check {path}", "")
CONVERT: Command = ("data convert {path} out.jsonl", "")
PREPARE: Command = ("data prepare recipe.yaml --runs runs", "stages.sft: ")
STRICT: tuple[Command, ...] = (
    ("data check {path} --strict", ""),
    ("data convert {path} out.jsonl --strict", ""),
    ("data prepare recipe.yaml --runs runs --set stages.sft.data.strict=true", "stages.sft: "),
)
COMMANDS = (CHECK, CONVERT, PREPARE, *STRICT)


def row(**changes: Any) -> str:
    return json.dumps({"prompt": "Q", "completion": "A", **changes}) + "\n"


class Said(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def attempt(
    tmp_path: Path, tiny_policy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[Command, str], Said]:
    """Type a command about a file; a recipe of one stage names it too."""
    monkeypatch.chdir(tmp_path)

    def run(command: Command, path: str) -> Said:
        Path("recipe.yaml").write_text(
            f"name: x\nchat_template: chatml\nmodel: {tiny_policy}\nstages:\n  sft:\n    algorithm: sft\n"
            f"    data: {{train: [{{path: {path}}}]}}\n    batch: {{global: 8, per_device: 4}}\n"
            "    train: {max_length: 256}\n"
        )
        capsys.readouterr()
        code = main(command[0].format(path=path).split())
        said = Said(code, *capsys.readouterr())
        assert (Path("out.jsonl").is_file()) == ("convert" in command[0] and code == 0)
        assert not list(Path().glob(".out.jsonl*")), "nothing is left unfinished"
        Path("out.jsonl").unlink(missing_ok=True)
        return said

    return run


# --- damage: always stops ---------------------------------------------------------------------------------------------


def put(name: str, content: str | bytes) -> Callable[[], str]:
    """Write a file, and name it."""

    def write() -> str:
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return name

    return write


def made(name: str, make: Callable[[Path], object]) -> Callable[[], str]:
    def do() -> str:
        if not os.path.lexists(name):
            make(Path(name))
        return name

    return do


def zstd(text: str) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(text.encode())
    return bytes(sink.getvalue())


def folder_with_lost_file(path: Path) -> None:
    path.mkdir()
    (path / "a.jsonl").write_text(TEXT)
    (path / "b.jsonl").symlink_to("nowhere.jsonl")  # half of the data is gone: not a smaller data set


KINDS = ".jsonl, .ndjson, .json, .csv, .tsv, .parquet"
BOTH = (
    "alpaca (instruction, output [, input, system, history]); prompt-completion (prompt, completion). Name the one "
    "that is meant with `format`"
)
DAMAGE: dict[str, tuple[Callable[[], str], str]] = {
    "malformed JSON": (put("a.jsonl", TEXT + '{"prompt": "Q" "completion"\n' + row()),
                       "a.jsonl:201: invalid JSON: Expecting ',' delimiter at column 16"),
    "a last line that was cut": (put("a.jsonl", TEXT[:-10]), "a.jsonl:200: invalid JSON: Unterminated string at column "
                                 "42; the file ends in this line: was it cut?"),
    "an array that was cut": (put("a.json", json.dumps(ROWS)[:-10]),
                              "a.json:1: invalid JSON: Unterminated string at column 10967"),
    "a control character": (put("a.jsonl", TEXT + '{"prompt": "a\0b"}\n'),
                            "a.jsonl:201: invalid JSON: Invalid control character at column 14"),
    "a text for a row": (put("a.jsonl", TEXT + '"a text"\n'),
                         "a.jsonl:201: a record must be a JSON object with columns, found str"),
    "two formats in equal parts": (put("a.jsonl", (row() + OTHER) * 20), "a.jsonl: 20 each of the first 40 rows fit "
                                   f"several formats of {{kind}}rows: {BOTH}"),
    "half a gzip file": (put("a.jsonl.gz", gzip.compress(TEXT.encode() * 5)[:-30]), "a.jsonl.gz: damaged gzip file: "
                         "Compressed file ended before the end-of-stream marker was reached; fetch or pack it again"),
    "a gzip file that is none": (put("a.jsonl.gz", TEXT), "a.jsonl.gz: damaged gzip file: Not a gzipped file (b'{\"'); "
                                 "fetch or pack it again"),
    "half a zstd file": (put("a.jsonl.zst", zstd(TEXT * 30)[:-20]), "a.jsonl.zst: damaged zstd file: Truncated "
                         "compressed stream; fetch or pack it again"),
    "a zstd file that is none": (put("a.jsonl.zst", TEXT), "a.jsonl.zst: damaged zstd file: ZSTD decompress failed: "
                                 "Unknown frame descriptor; fetch or pack it again"),
    "a Parquet file that is none": (put("a.parquet", TEXT), "a.parquet: damaged Parquet file: Parquet magic bytes not "
                                    "found in footer. Either the file is corrupted or this is not a parquet file.; "
                                    "fetch or write it again"),
    "NUL bytes at the end": (put("a.jsonl", TEXT.encode() + bytes(300)), "a.jsonl:201: NUL bytes where JSON belongs: "
                             "the file was not written to its end; write or fetch it again"),
    "a file of NUL bytes": (put("a.jsonl", bytes(4096)), "a.jsonl:1: NUL bytes where JSON belongs: the file was not "
                            "written to its end; write or fetch it again"),
    "Latin-1": (put("a.jsonl", TEXT.encode() + b'{"prompt": "\xe9"}\n'),
                "a.jsonl:201: invalid UTF-8 at byte 13; save the file as UTF-8"),
    "UTF-16": (put("a.jsonl", codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le")),
               "a.jsonl: is UTF-16 text; save it as UTF-8"),
    "UTF-16, CSV": (put("a.csv", codecs.BOM_UTF16_LE + "prompt\nQ\n".encode("utf-16-le")),
                    "a.csv: is UTF-16 text; save it as UTF-8"),
    "UTF-16, an array": (put("a.json", codecs.BOM_UTF16_BE + b"\0[\0]"), "a.json: is UTF-16 text; save it as UTF-8"),
    "a field too many": (put("a.csv", "prompt,completion\nQ,A\nQ,A,B\n"), "a.csv:3: 3 fields, the header has 2; quote "
                         "the fields that hold a delimiter or a line end"),
    "an open quotation mark": (put("a.csv", 'prompt,completion\nQ,A\nQ,"A\n'),
                               "a.csv:3: invalid CSV: unexpected end of data; is a quotation mark open?"),
    "no rows": (put("a.jsonl", ""), "a.jsonl: no records"),
    "no rows, blank lines": (put("a.jsonl", "\n \r\n\n"), "a.jsonl: no records"),
    "no rows, CSV": (put("a.csv", "prompt,completion\n"), "a.csv: no records"),
    "no rows, an array": (put("a.json", "[]"), "a.json: no records"),
    "no file": (lambda: "none.jsonl", "none.jsonl: no such file or folder"),
    "a link to nothing": (made("lost.jsonl", lambda path: path.symlink_to("nowhere.jsonl")),
                          "lost.jsonl: is a link to nowhere.jsonl, which does not exist"),
    "a folder without rows": (made("folder.jsonl", Path.mkdir),
                              f"folder.jsonl: no data files ({KINDS}) in this folder"),
    "a folder with a link to nothing": (made("folder", folder_with_lost_file),
                                        "folder/b.jsonl: is a link to nowhere.jsonl, which does not exist"),
    "a pipe": (made("pipe.jsonl", os.mkfifo), "pipe.jsonl: is neither a file nor a folder"),
    "another kind of file": (put("a.xlsx", "x"), f"a.xlsx: unknown kind of file; known are {KINDS} (also with .gz or "
                             ".zst, but for .parquet)"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DAMAGE)
def test_damage_stops_every_command_with_one_line(fault: str, attempt: Any) -> None:
    plant, line = DAMAGE[fault]
    for command in COMMANDS:
        said = attempt(command, plant())
        kind = "messages " if command[1] else ""  # a stage wants a schema, a file is taken as what it is
        assert said.err == f"alignment: {command[1]}{line.replace('{kind}', kind)}\n", command
        assert said.code == 2


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
@pytest.mark.parametrize("change", ["append", "replace", "touch"])
def test_a_file_that_changes_while_it_is_read(tmp_path: Path, kind: str, change: str) -> None:
    path = tmp_path / f"a{kind}"
    lines = "".join(f"{row['prompt']},{row['completion']}\n" for row in ROWS)
    text = {".jsonl": TEXT, ".json": json.dumps(ROWS), ".csv": "prompt,completion\n" + lines}
    path.write_text(text[kind])
    assert len(list(files.read_file(path))) == 200
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


def test_a_file_that_grows_under_a_command(attempt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program writes a row each time that one is read."""
    original = files._object

    def written(value: Any, where: str) -> files.Record:
        with open("a.jsonl", "a") as file:
            file.write("\n")
        return original(value, where)

    monkeypatch.setattr(files, "_object", written)
    for command in COMMANDS:
        said = attempt(command, put("a.jsonl", TEXT)())
        line = "a.jsonl: changed while it was read; start again when nothing writes to it"
        assert (said.code, said.err) == (2, f"alignment: {command[1]}{line}\n")


# --- what is harmless passes ------------------------------------------------------------------------------------------

HARMLESS: dict[str, tuple[Callable[[], str], int]] = {
    "one row": (put("a.jsonl", row()), 1),
    "one row without a line end": (put("a.jsonl", row().rstrip("\n")), 1),
    "a byte order mark": (put("a.jsonl", "\ufeff" + TEXT), 200),
    "a byte order mark, CSV": (put("a.csv", "\ufeffprompt,completion\r\nQ,A\r\n"), 1),
    "a byte order mark, an array": (put("a.json", "\ufeff" + json.dumps(ROWS)), 200),
    "Windows line ends": (put("a.jsonl", TEXT.replace("\n", "\r\n")), 200),
    "blank lines": (put("a.jsonl", "\n\n" + row() + "   \n" + row(prompt="R")), 2),
    "line ends of other conventions inside a row": (put("a.jsonl", row(prompt="a \u2028 \u2029 b")), 1),
    "a whole zstd file": (put("a.jsonl.zst", zstd(TEXT)), 200),
    "a name that is no kind of file for a folder": (made("rows.d", lambda path: (path.mkdir(),
                                                    (path / "a.jsonl").write_text(TEXT))), 200),
}  # fmt: skip


@pytest.mark.parametrize("case", HARMLESS)
def test_what_is_harmless_passes_every_command(case: str, attempt: Any) -> None:
    plant, rows = HARMLESS[case]
    for command in COMMANDS:
        said = attempt(command, plant())
        assert (said.code, said.err) == (0, "")
        if "check" in command[0]:
            assert said.out.endswith(f"{rows:,} of {rows:,} rows kept, no findings, no limits passed\n")


def test_a_line_of_10_mb_is_read(attempt: Any) -> None:
    path = put("a.jsonl", TEXT + row(prompt="x" * 10 * 2**20))()
    for command in (CHECK, CONVERT, *STRICT[:2]):
        said = attempt(command, path)
        assert (said.code, said.err) == (0, "")
        assert "201 of 201 rows kept" in said.out or "201 messages rows from 201" in said.out


# --- defective rows: counted, or refused ------------------------------------------------------------------------------

TYPE = "a field holds another type than the format says (a number where text belongs)"
ABSENT = "a column that the format needs is absent or null in this row"
DEFECTS: dict[str, tuple[str, str, str, str]] = {  # the row, its reason, what that means, and what was found
    "a number for text": (row(completion=3), "wrong-type", TYPE, "completion is int, not text"),
    "null for text": (row(completion=None), "missing-column", ABSENT, "completion"),
    "a list of text for a message": (row(prompt=["Q"]), "wrong-type", TYPE, "a message is str, not an object"),
    "a NUL character": (row(prompt="a\0b"), "nul-character", "a NUL character in the text", ""),
    "half a character": (row(completion="\ud800"), "invalid-unicode", "a lone surrogate: half of a character",
                         "'\\ud800'"),
    "white space for an answer": (row(completion="\t\u00a0\n"), "empty-answer", "an assistant turn of white space only",
                                  ""),
    "a row of another format": (OTHER, "other-format", "a row of another format than most rows of its file", "alpaca"),
    "a row of no format": ('{"unknown": 1}\n', "missing-column", ABSENT, "prompt"),
}  # fmt: skip


@pytest.mark.parametrize("fault", DEFECTS)
def test_a_defective_row_is_counted_or_refused(fault: str, attempt: Any) -> None:
    bad, reason, means, detail = DEFECTS[fault]
    path = put("a.jsonl", TEXT + bad + row())()
    counted = f"{reason} 1 (:201{f'; {detail}' if detail else ''})"
    assert "201 of 202 rows kept, 1 finding, no limits passed" in attempt(CHECK, path).out
    for command in (CONVERT, PREPARE):
        said = attempt(command, path)
        assert (said.code, said.err) == (0, "")
        assert f"a.jsonl: dropped 1 (0.5%): {counted}\n" in said.out
    check, convert, prepare = (attempt(command, path) for command in STRICT)
    assert (check.code, check.err) == (1, "")
    assert f"! {reason} " in check.out
    assert (convert.code, convert.err) == (
        2, f"alignment: a.jsonl:201: {reason}: {means}{f': {detail}' if detail else ''}\n"
    )  # fmt: skip
    line = f"a.jsonl: 1 of 202 rows are defective (0.5%, data.strict allows none): {counted}"
    assert (prepare.code, prepare.err) == (2, f"alignment: stages.sft: {line}\n")
