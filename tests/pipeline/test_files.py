"""Files that are whole or absent, kills and full disks included."""

from __future__ import annotations

import errno
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from alignment.errors import ChainError, DataError, StorageError
from alignment.pipeline import files


def test_json_is_canonical_and_ends_with_a_newline(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"b": 1, "a": [1.5, "ä"]})
    assert (tmp_path / "a.json").read_text() == '{\n "a": [\n  1.5,\n  "ä"\n ],\n "b": 1\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_digest_knows_order_and_spelling_apart_from_content() -> None:
    assert files.digest({"a": 1, "b": [1, 2]}) == files.digest({"b": [1, 2], "a": 1})
    assert files.digest({"a": 1}) != files.digest({"a": 1.5})
    assert files.digest({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
    with pytest.raises(ValueError, match="Out of range"):
        files.digest({"a": math.nan})


def test_a_metric_that_is_not_finite_becomes_null(tmp_path: Path) -> None:
    files.write_json(tmp_path / "a.json", {"loss": math.nan, "list": [math.inf, 1.0]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"loss": None, "list": [None, 1.0]}


def test_the_mode_follows_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "x")
        (tmp_path / "private").write_text("x")
        (tmp_path / "private").chmod(0o600)
        files.settle(tmp_path)
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o640


KILLED_WRITER = """
import os, signal, sys
from pathlib import Path
from alignment.pipeline import files
count = 0
def counted(real):
    def call(*args, **kwargs):
        global count
        count += 1
        if count == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    return call
os.fsync, os.replace = counted(os.fsync), counted(os.replace)
files.write_json(Path(sys.argv[1]), {"value": "new" * 1000})
"""


@pytest.mark.parametrize(("operation", "survives"), [(1, "old"), (2, "old"), (3, "new")])
def test_a_kill_leaves_the_old_file_or_the_new_one(tmp_path: Path, operation: int, survives: str) -> None:
    """Killed before fsync, before rename, and before the folder's fsync."""
    path = tmp_path / "record.json"
    files.write_json(path, {"value": "old" * 1000})
    done = subprocess.run([sys.executable, "-c", KILLED_WRITER, str(path), str(operation)], timeout=60, check=False)
    assert done.returncode == -9
    assert json.loads(path.read_text()) == {"value": survives * 1000}
    assert len(list(tmp_path.iterdir())) == (2 if survives == "old" else 1)
    files.sweep(tmp_path)
    assert [left.name for left in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize(("number", "says"), [(errno.ENOSPC, "free some space"), (errno.EROFS, "--runs DIR")])
def test_a_refusing_disk_is_one_line_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, says: str
) -> None:
    files.write_text(tmp_path / "a", "old")

    def refuse(descriptor: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(StorageError, match=says) as caught:
        files.write_text(tmp_path / "a", "new")
    assert str(caught.value).startswith(f"{tmp_path / 'a'}: cannot write: ")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"schema": 1', "damaged: not JSON"),
        (b"\xff\xfe", "damaged: not JSON"),
        (b"[]", "a JSON object was expected, found list"),
        (b'{"schema": 99}', "schema 99: this version of alignment reads schema 1"),
        (b"{}", "schema None"),
    ],
)
def test_a_damaged_record_is_named(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "manifest.json"
    path.write_bytes(content)
    with pytest.raises(ChainError, match=says) as caught:
        files.read_json(path, schema=1, error=ChainError)
    assert str(path) in str(caught.value)


def test_no_record_is_none(tmp_path: Path) -> None:
    assert files.read_json(tmp_path / "no" / "a.json", schema=1, error=ChainError) is None


def old(path: Path, content: str) -> Path:
    """A file whose last change is long enough ago to be memoised."""
    path.write_text(content)
    os.utime(path, ns=(1, 1))
    return path


def test_hashes_are_memoised_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_RACY_NS", -1)
    path = old(tmp_path / "rows.jsonl", "one")
    assert files.known_hash(path, tmp_path) is None
    value = files.file_hash(path, tmp_path)
    assert value == "7692c3ad3540bb803c020b3aee66cd8887123234ea0c6e7143c0add73ff431ed"
    with monkeypatch.context() as patched:
        patched.setattr(files, "_sha256", lambda path: pytest.fail("hashed again"))
        assert files.file_hash(path, tmp_path) == value
        assert files.known_hash(path, tmp_path) == value
    old(path, "two")  # same size, same mtime: only ctime tells
    assert files.known_hash(path, tmp_path) is None
    assert files.file_hash(path, tmp_path) != value


def test_a_fresh_change_is_not_memoised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_RACY_NS", 60 * 10**9)
    files.file_hash(old(tmp_path / "a", "x"), tmp_path)
    assert files.known_hash(tmp_path / "a", tmp_path) is None


def test_a_damaged_memo_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / ".cache").mkdir()
    (tmp_path / files.HASH_MEMO).write_text("{")
    assert len(files.file_hash(old(tmp_path / "a", "x"), tmp_path)) == 64


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = old(tmp_path / "a", "x")
    monkeypatch.setattr(files, "_sha256", lambda path: path.write_text("longer") and "hash")
    with pytest.raises(DataError, match="changed while it was read"):
        files.file_hash(path, tmp_path)


def test_fault_refuses_names_that_lead_out(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "outside").write_text("x")
    (folder / "link").symlink_to(tmp_path / "outside")
    entry = {"size": 1, "sha256": "?"}
    for name in ("../outside", str(tmp_path / "outside"), "link"):
        assert files.fault(folder, {name: entry}, deep=False) == f"{name}: leads out of the folder"
