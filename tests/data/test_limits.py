"""What stops a run before its first step, and what the cache remembers of files that were looked at."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_rows import pair, prose
from transformers import PreTrainedTokenizerFast

from alignment import cli
from alignment.data import loading
from alignment.data.prepare import Prepared, prepare
from alignment.errors import DataError
from alignment.recipe.schema import DataLimits, ReportLimits, Stage

Tokenizer = PreTrainedTokenizerFast
Lines = Callable[..., Path]


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

    of_text = {"duplicate", "near_duplicate", "leak", "contaminated", "contradictory", "secret", "personal_data",
               "separable", "length_bias"}  # fmt: skip
    assert of_text | {*OF_TOKENS, *ELSEWHERE} == set(ReportLimits.model_fields)
    assert set(DataLimits.model_fields) <= set(ELSEWHERE)


# --- the recipe's evaluation sets -------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, tiny_policy: Path) -> Callable[..., Path]:
    """A recipe that trains on one file and evaluates on others."""

    def write(train: Path, *, prompts: str, pairs: str = "", data: str = "") -> Path:
        path = tmp_path / "recipe.yaml"
        scored = f"    scorers: [stage:reward]\n    pairs: [{pairs}]\n" if pairs else ""
        path.write_text(
            f"name: x\nchat_template: chatml\nmodel: {tiny_policy}\nstages:\n  reward:\n    algorithm: reward\n"
            f"    data: {{train: [{{path: {train}}}]{data}}}\n    train: {{max_length: 1024}}\n"
            f"  evaluate:\n    algorithm: evaluate\n    models: [{tiny_policy}]\n    prompts: [{prompts}]\n"
            f"    rewards: [{{name: a, regex: a}}]\n{scored}"
        )
        return path

    return write


def test_a_run_refuses_rows_of_the_evaluation_sets_that_the_recipe_names(
    recipe: Any, lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = lines(
        [{"prompt": pair(5)["prompt"]}, *({"prompt": prose(seed)} for seed in range(5000, 5009))], "ask.jsonl"
    )
    held = lines([pair(7), pair(901)], "held.jsonl")
    path = recipe(lines(clean()), prompts=f"{{path: {asked}}}", pairs=f"{{path: {held}}}")
    runs = ["--runs", str(tmp_path / "runs")]
    said = [
        f"contaminated: {share} of {file} are in the training rows: half or more of their runs of 13 words, or all of "
        f"a shorter text; 1 share at least one run. LIMIT PASSED (data.limits.contaminated: 0.01) ({file}:1)"
        for share, file in (("1 (10.0 %)", asked), ("1 (50.0 %)", held))
    ]
    remedy = "mend the data (`alignment data check` says more), or raise the limit"
    assert cli.main(["data", "prepare", str(path), *runs]) == 2
    assert capsys.readouterr().err == f"alignment: stages.reward: {'; '.join(said)}; {remedy}\n"
    assert cli.main(["data", "check", str(path), *runs]) == 1
    printed = " ".join(capsys.readouterr().out.split())
    assert all(line.removeprefix("contaminated: ").rpartition(" (/")[0] in printed for line in said)
    for limit in ("0.5", "null"):
        assert cli.main(["data", "prepare", str(path), *runs, "--set",
                         f"stages.reward.data.limits.contaminated={limit}"]) == 0  # fmt: skip


def test_sets_of_a_stage_of_its_own_count_too_and_clean_ones_do_not(
    recipe: Any, lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = lines([{"prompt": prose(seed)} for seed in range(5000, 5010)], "ask.jsonl")
    known = lines([{"question": pair(3)["chosen"]}], "known.jsonl")
    runs = ["--runs", str(tmp_path / "runs")]
    path = recipe(lines(clean()), prompts=f"{{path: {asked}}}")
    assert cli.main(["data", "prepare", str(path), *runs]) == 0
    path = recipe(lines(clean()), prompts=f"{{path: {asked}}}", data=f", against: [{{path: {known}}}]")
    assert cli.main(["data", "prepare", str(path), *runs]) == 2
    assert f"contaminated: 1 of {known} are in the training rows" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["check {} --quick", "run {} --dry-run --runs runs"])
def test_a_set_of_the_stage_that_is_not_there_is_told_before_a_run(
    recipe: Any, lines: Lines, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    asked, none = lines([{"prompt": prose(5000)}], "ask.jsonl"), tmp_path / "lost.jsonl"
    path = recipe(lines(clean()), prompts=f"{{path: {asked}}}", data=f", against: [{{path: {none}}}]")
    assert cli.main(command.format(path).split()) == 2
    said = "alignment: recipe.yaml: stages.reward.data.against[0].path: lost.jsonl: no such file or folder\n"
    assert capsys.readouterr().err.replace(f"{tmp_path}/", "") == said


def test_an_evaluation_set_that_changes_is_looked_for_again(run: Any, lines: Lines, reads: list[str]) -> None:
    asked = lines([{"prompt": prose(seed)} for seed in range(5000, 5010)], "ask.jsonl")
    stage = staged(lines(clean()), against=[{"path": str(asked)}])
    for _ in range(2):
        run(stage)
    assert len(reads) == 1, "the second time from the cache"
    lines([pair(5)], "ask.jsonl")
    with pytest.raises(DataError, match=r"^contaminated: 1 of .*ask.jsonl are in the training rows"):
        run(stage)


def test_an_evaluation_set_that_cannot_be_read_is_told_every_time(run: Any, lines: Lines, tmp_path: Path) -> None:
    none = tmp_path / "none.jsonl"
    stage = staged(lines(clean()), against=[{"path": str(none)}])
    for _ in range(2):
        made, said = run(stage)
        assert len(made.train) == 120
        assert f"not looked for in the training rows: {none}: no such file or folder" in said
    _, said = run(staged(lines(clean()), against=[{"path": str(none)}], limits={"contaminated": None}))
    assert not any("not looked for" in line for line in said)


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
