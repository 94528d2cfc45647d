"""What stops a run before its first step, and what the cache remembers of files that were looked at."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignment import cli
from alignment.data import loading
from alignment.data.prepare import Prepared, prepare
from alignment.errors import DataError
from alignment.recipe.schema import DataLimits, ReportLimits, Stage

Tokenizer = PreTrainedTokenizerFast
Lines = Callable[..., Path]
WORDS = [f"{a}{b}{c}" for a in "bdfgklmnpr" for b in "aeiou" for c in ("n", "s", "t", "rk", "lm", "nd")]


def prose(seed: int, count: int = 30) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=count))


def pair(seed: int, **columns: Any) -> dict[str, Any]:
    return {"prompt": prose(3 * seed), "chosen": prose(3 * seed + 1), "rejected": prose(3 * seed + 2), **columns}


def clean() -> list[dict[str, Any]]:
    return [pair(seed) for seed in range(120)]


def staged(path: Path, **data: Any) -> Stage:
    section = {"train": [{"path": str(path)}], **data}
    return Stage.model_validate({"algorithm": "dpo", "seed": 7, "data": section})


@pytest.fixture
def run(tokenizer: Tokenizer, tmp_path: Path) -> Callable[..., tuple[Prepared, list[str]]]:
    def go(stage: Stage, max_length: int | None = None) -> tuple[Prepared, list[str]]:
        said: list[str] = []
        cache = tmp_path / "runs" / ".cache"
        made = prepare(stage, "preference", tokenizer, max_length=max_length, cache=cache, say=said.append)
        return made, said

    return go


# --- limits ---------------------------------------------------------------------------------------------------------


def test_clean_pairs_pass_every_limit(run: Any, lines: Lines) -> None:
    tight = {name: 0.0 for name in ReportLimits.model_fields if name not in ("length_bias", "separable")}
    made, _ = run(staged(lines(clean()), limits=tight, eval_fraction=0.1))
    assert (len(made.train), len(made.eval)) == (108, 12)


def swapped(row: dict[str, Any]) -> dict[str, Any]:
    return {**row, "chosen": row["rejected"], "rejected": row["chosen"]}


PLANTED: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "duplicate": ([pair(1)] * 130, {}),
    "near-duplicate": ([pair(1, prompt=prose(3) + " x")], {"limits": {"near_duplicate": 0.0}}),
    "contradictory": ([swapped(pair(seed)) for seed in range(20)], {}),
    "secret": ([pair(500, prompt="my key is AKIA" + "ABCDEFGHIJ123456")], {}),
    "personal-data": ([pair(500, prompt="write to ann.lee@mail.org")], {"limits": {"personal_data": 0.0}}),
    "separable": (
        [pair(seed, chosen=f"yes {prose(seed)}", rejected=f"no {prose(seed + 1)}") for seed in range(1000, 9000)],
        {"limits": {"separable": 0.9}},
    ),
    "length-bias": (
        [pair(seed, chosen=prose(seed, 40), rejected=prose(seed + 1, 20)) for seed in range(1000, 1400)],
        {"limits": {"length_bias": 0.7}},
    ),
}


@pytest.mark.parametrize("check", PLANTED)
def test_a_passed_limit_stops_with_the_line_of_the_report(
    run: Any, lines: Lines, check: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, data = PLANTED[check]
    path = lines([*clean(), *rows])
    with pytest.raises(DataError) as caught:
        run(staged(path, **data))
    text = str(caught.value)
    assert text.startswith(f"{check}: ")
    assert "\n" not in text
    said, _, _ = text.partition(". LIMIT PASSED")
    recipe = tmp_path / "r.yaml"
    limits = "".join(f"{key}: {value}" for key, value in data.get("limits", {}).items())
    recipe.write_text(
        f"name: x\nmodel: {tmp_path}/none\nstages:\n  dpo:\n    algorithm: dpo\n"
        f"    data: {{train: [{{path: {path}}}], limits: {{{limits}}}}}\n"
    )
    assert cli.main(["data", "check", str(recipe)]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert said.removeprefix(f"{check}: ") in printed  # the same sentence, with the same numbers
    key = check.replace("-", "_")
    assert run(staged(path, limits={key: None}))[0].train.num_rows > 0


def test_a_leak_stops_and_names_the_row(run: Any, lines: Lines) -> None:
    held = lines([pair(5), *(pair(seed) for seed in range(900, 909))], "held.jsonl")
    with pytest.raises(DataError, match=r"^leak: 1 \(10.0 %\) of the held-out rows .*held.jsonl:1\)"):
        run(staged(lines(clean()), eval=[{"path": str(held)}]))


def test_limits_of_the_token_table(run: Any, lines: Lines) -> None:
    path = lines([*clean(), *(pair(seed, chosen=prose(seed, 300)) for seed in range(900, 920))])
    with pytest.raises(DataError, match=r"^unstopped: 20 .*data.limits.unstopped: 0.05"):
        run(staged(path, on_overlong="truncate_right"), max_length=1200)
    with pytest.raises(DataError, match=r"^truncated: 20 .*are cut at 1,200 tokens"):
        run(staged(path, on_overlong="truncate_right", limits={"truncated": 0.1, "unstopped": None}), max_length=1200)


def test_several_limits_are_one_line(run: Any, lines: Lines) -> None:
    path = lines([pair(1, prompt="AKIA" + "ABCDEFGHIJ123456")] * 10)
    with pytest.raises(DataError, match=r"^secret: .*; duplicate: .*raise the limit$"):
        run(staged(path))


def test_every_limit_is_enforced_or_known_not_to_be() -> None:
    from alignment.data.limits import ELSEWHERE, OF_TOKENS

    of_text = {"duplicate", "near_duplicate", "leak", "contradictory", "secret", "personal_data", "separable",
               "length_bias"}  # fmt: skip
    assert of_text | {*OF_TOKENS, *ELSEWHERE} == set(ReportLimits.model_fields)
    assert set(DataLimits.model_fields) <= set(ELSEWHERE)


# --- what the cache remembers -----------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sources that were opened."""
    opened: list[str] = []
    original = loading.open_source

    def counted(source: Any, *rest: Any, **named: Any) -> Any:
        opened.append(source.path)
        return original(source, *rest, **named)

    monkeypatch.setattr(loading, "open_source", counted)
    return opened


def test_the_second_time_no_row_is_read_and_all_is_said_again(run: Any, lines: Lines, reads: list[str]) -> None:
    path = lines([*clean(), {"prompt": "a", "chosen": "b", "rejected": "b"}])
    stage = staged(path, eval_fraction=0.1, filter={"length": {"min": 2}})
    first, said = run(stage)
    assert len(reads) == 1
    second, again = run(stage)
    assert len(reads) == 1
    assert second.report == first.report
    assert second.train.to_list() == first.train.to_list()
    assert second.eval.to_list() == first.eval.to_list()
    assert any("dropped 1 (0.8%): equal-answers 1 (:121)" in line for line in again)
    assert [line.split("; tokenized")[0] for line in said] == [line.split("; from the cache")[0] for line in again]


def test_a_file_that_is_edited_under_its_old_size_and_time_is_read_again(
    run: Any, lines: Lines, reads: list[str]
) -> None:
    path = lines(clean())
    first, _ = run(staged(path))
    time.sleep(0.15)
    run(staged(path))
    assert len(reads) == 1
    before = path.stat()
    text = path.read_text()
    word = prose(0).split()[0]
    path.write_text(text.replace(word, word[::-1], 1))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (before.st_size, before.st_mtime_ns, before.st_ino)
    second, _ = run(staged(path))
    assert len(reads) == 2
    assert second.train.to_list()[1:] == first.train.to_list()[1:]
    assert second.train[0] != first.train[0]


def test_another_file_in_its_place_is_read(run: Any, lines: Lines, reads: list[str], tmp_path: Path) -> None:
    path = lines(clean())
    first, _ = run(staged(path))
    stat = path.stat()
    other = lines([pair(seed) for seed in range(200, 320)], "other.jsonl")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.rename(path)
    second, _ = run(staged(path))
    assert len(reads) == 2
    assert second.report["train"]["key"] != first.report["train"]["key"]


@pytest.mark.parametrize("change", [{"dedupe": "rows"}, {"on_system": "drop"}, {"limits": {"duplicate": 0.4}}])
def test_other_settings_are_other_rows(run: Any, lines: Lines, reads: list[str], change: dict[str, Any]) -> None:
    path = lines(clean())
    run(staged(path))
    run(staged(path, **change))
    assert len(reads) == 2


def test_a_passed_limit_is_not_forgotten(run: Any, lines: Lines) -> None:
    path = lines([pair(1)] * 10)
    for _ in range(2):
        with pytest.raises(DataError, match=r"^duplicate"):
            run(staged(path))


def test_a_folder_that_gets_another_file_is_read_again(
    run: Any, lines: Lines, reads: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    lines(clean(), "folder/a.jsonl")
    stage = staged(folder)
    assert len(run(stage)[0].train) == 120
    lines([pair(seed) for seed in range(300, 310)], "folder/b.jsonl")
    assert len(run(stage)[0].train) == 130
    assert len(reads) == 2


def test_rows_of_functions_are_made_every_time(run: Any, lines: Lines, reads: list[str], tmp_path: Path) -> None:
    hook = tmp_path / "hook.py"
    hook.write_text("def same(row):\n    return [row]\n")
    stage = staged(lines(clean()), augment=[f"{hook}:same"])
    run(stage)
    run(stage)
    assert len(reads) == 2


def test_a_damaged_record_or_table_is_made_again(run: Any, lines: Lines, reads: list[str], tmp_path: Path) -> None:
    stage = staged(lines(clean()))
    whole = run(stage)[0].train.to_list()
    (record,) = (tmp_path / "runs" / ".cache" / "prepared").iterdir()
    record.write_text('{"report": ')
    assert run(stage)[0].train.to_list() == whole
    (table,) = (tmp_path / "runs" / ".cache" / "tokens").glob("*/table.arrow")
    table.unlink()
    assert run(stage)[0].train.to_list() == whole
    assert len(reads) == 3
