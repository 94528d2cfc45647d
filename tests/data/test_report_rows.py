"""The data report looks at the rows of a run: every format that sources have, remedies applied, the same tables."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_rows import pair, prose

from alignment import cli, inspecting
from alignment.data.prepare import prepare
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import load_recipe, max_length, resolve

Lines = Callable[..., Path]


def rated(seed: int, count: int = 3) -> dict[str, Any]:
    answers = [prose(100 * seed + answer) for answer in range(1, count + 1)]
    return {"prompt": prose(100 * seed), "responses": answers, "scores": list(range(count))}


@pytest.fixture
def recipe(tmp_path: Path, tiny_policy: Path) -> Callable[..., Path]:
    """A recipe of one stage; `data` is its section, as YAML takes it."""

    def write(data: dict[str, Any], *, algorithm: str = "dpo", max_length: int = 512) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"name: x\nchat_template: chatml\nmodel: {tiny_policy}\nstages:\n  it:\n    algorithm: {algorithm}\n"
            f"    data: {json.dumps(data)}\n    train: {{max_length: {max_length}}}\n"
        )
        return path

    return write


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    def run(*words: str | Path) -> tuple[int, dict[str, Any]]:
        code = cli.main(["data", "check", *map(str, words), "--json", "--runs", str(tmp_path / "runs")])
        return code, json.loads(capsys.readouterr().out)

    return run


def trained(path: Path, cache: Path) -> Any:
    """What a run prepares for the stage."""
    loaded = load_recipe(path, [])
    stage = resolve(loaded, "it")
    schema = ALGORITHMS[stage.algorithm].schema
    assert schema is not None
    return prepare(
        stage, schema, inspecting.Tokenizers(loaded).of("it"), max_length=max_length(stage), cache=cache,
        say=lambda text: None,
    )  # fmt: skip


def test_remedies_are_applied_counted_and_no_findings(
    lines: Lines, check: Any, recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [pair(seed, lang="en" if seed % 4 else "de", margin=seed, system="Be kind.") for seed in range(120)]
    rows[9] = rows[5]  # an equal row, which dedupe takes
    hooks = tmp_path / "hooks.py"
    hooks.write_text("def twice(row):\n    return [row, {**row, 'prompt': row['prompt'][:-1] + [{'role': 'user', "
                     "'content': row['prompt'][-1]['content'] + '!'}]}]\n")  # fmt: skip
    path = recipe({
        "train": [{"path": str(lines(rows))}], "on_system": "merge", "filter": {"columns": {"lang": "en"}},
        "dedupe": "rows", "prune": {"by": "margin", "keep": 0.5}, "eval_fraction": 0.2,
        "augment": [f"{hooks}:twice"], "limits": {"near_duplicate": None, "duplicate": None},
    })  # fmt: skip
    code, report = check(path)
    made = trained(path, tmp_path / "own")
    # 30 of 120 are not English, one of 90 repeats; half of 89 (44) are left, 9 of them held out, and 35 made twice
    taken = {"filtered-column": 30, "duplicate": 1, "pruned": 45}
    assert report["rows"] == {"in": 120, "kept": 70, "dropped": dict(sorted(taken.items(), key=lambda one: -one[1]))}
    stage = report["stages"][0]
    assert (stage["rows"]["taken"], stage["eval_rows"]) == (taken, 9)
    assert stage["rows"]["changed"] == {"system-merged": 90, "augmented": 35}
    assert stage["tokens"]["train"]["key"] == made.report["train"]["key"], "the very table that is trained on"
    assert stage["tokens"]["eval"]["key"] == made.report["eval"]["key"]
    assert len(made.train) == 70
    assert code == 0
    assert {found["check"] for found in report["findings"]} == {"near-duplicate"}, "each row and its copy with '!'"
    assert cli.main(["data", "check", str(path), "--runs", str(tmp_path / "runs")]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "120 read, 70 pairs kept, 76 dropped (76 of them as the recipe says: " in text
    assert "system-merged 90, augmented 35" in text


def test_a_filter_does_not_fail_a_strict_report(lines: Lines, check: Any, recipe: Any) -> None:
    path = lines([pair(seed, lang="en" if seed else "de") for seed in range(60)])
    wanted = {"train": [{"path": str(path)}], "filter": {"columns": {"lang": "en"}}}
    code, report = check(recipe(wanted), "--strict")
    assert (code, report["findings"], report["rows"]["dropped"]) == (0, [], {"filtered-column": 1})
    path = lines([{**pair(seed), "rejected": pair(seed)["rejected"] if seed else " "} for seed in range(60)])
    assert check(recipe({"train": [{"path": str(path)}]}), "--strict")[0] == 1, "a defect does"


@pytest.mark.parametrize(("pairs", "kept"), [("best-worst", 20), ("adjacent", 40), ("all", 60)])
def test_rated_answers_are_the_pairs_of_the_run(
    lines: Lines, check: Any, recipe: Any, tmp_path: Path, pairs: str, kept: int
) -> None:
    path = recipe({"train": [{"path": str(lines([rated(seed) for seed in range(20)])), "pairs": pairs}]})
    code, report = check(path)
    assert (code, report["rows"]["in"], report["rows"]["kept"]) == (0, 20, kept)
    stage = report["stages"][0]
    assert stage["sources"][0]["format"] == f"rated-answers, pairs {pairs}"
    assert (stage["pairs"]["pairs"], stage["pairs"]["margin"]["negative"]) == (kept, 0)
    assert stage["proof"]["failed"] == []
    assert stage["tokens"]["train"]["key"] == trained(path, tmp_path / "own").report["train"]["key"]


def test_files_of_rated_answers_need_no_recipe(lines: Lines, check: Any) -> None:
    code, report = check(lines([rated(seed) for seed in range(20)]))
    assert (code, report["stages"][0]["schema"], report["rows"]["kept"]) == (0, "preference", 20)


def test_more_rows_dropped_than_records_are_reported(lines: Lines, check: Any, recipe: Any) -> None:
    """Six pairs of each record are dropped at tokenization; the report says so, and does not stop."""
    rows = [rated(seed, 4) for seed in range(20)]
    for row in rows[:19]:
        row["prompt"] = "<|im_end|>" + row["prompt"]
    code, report = check(recipe({"train": [{"path": str(lines(rows)), "pairs": "all"}]}))
    assert code == 1
    assert report["rows"] == {"in": 20, "kept": 6, "dropped": {"special-token-in-content": 114}}
    assert report["stages"][0]["limits_passed"] == ["dropped"]


def test_data_sets_that_another_tool_describes(lines: Lines, check: Any, recipe: Any, tmp_path: Path) -> None:
    lines([{"q": prose(2 * seed), "a": prose(2 * seed + 1)} for seed in range(40)], "rows.jsonl")
    described = tmp_path / "dataset_info.json"
    described.write_text(json.dumps({
        "mine": {"file_name": "rows.jsonl", "columns": {"prompt": "q", "response": "a"}},
        "other": {"file_name": "none.jsonl"},
    }))  # fmt: skip
    source = {"path": str(described), "subset": "mine"}
    code, report = check(recipe({"train": [source]}, algorithm="sft"))
    assert (code, report["rows"]["kept"], report["findings"]) == (0, 40, [])
    assert report["stages"][0]["proof"]["rows"] == 40


def test_descriptions_and_columns_on_the_command_line(lines: Lines, check: Any, recipe: Any, tmp_path: Path) -> None:
    rows = lines([{"q": prose(2 * seed), "a": prose(2 * seed + 1)} for seed in range(40)], "rows.jsonl")
    code, report = check(rows)
    assert code == 2
    assert "--column prompt=question" in report["error"]
    named = ("--column", "prompt=q", "--column", "completion=a")
    code, report = check(rows, *named)
    assert (code, report["rows"]["kept"], report["findings"]) == (0, 40, [])
    described = tmp_path / "dataset_info.json"
    entry = {"file_name": "rows.jsonl", "columns": {"prompt": "q", "response": "a"}}
    described.write_text(json.dumps({"mine": entry, "other": {"file_name": "none.jsonl"}}))
    assert check(described)[0] == 2
    code, report = check(described, "--subset", "mine")
    assert (code, report["rows"]["kept"]) == (0, 40)
    axolotl = tmp_path / "axolotl.yaml"
    axolotl.write_text(
        f"base_model: x\ndatasets:\n  - {{path: {rows}, type: {{field_instruction: q, field_output: a}}}}\n"
    )
    code, report = check(axolotl)
    assert (code, report["rows"]["kept"], report["stages"][0]["schema"]) == (0, 40, "messages")
    path = recipe({"train": [{"path": str(described), "subset": "mine"}]}, algorithm="sft")
    assert "belong to files" in check(path, "--subset", "mine")[1]["error"]


def test_ranks_are_margins(lines: Lines, check: Any) -> None:
    rows = [
        {"prompt": prose(9 * seed), "answers": [{"answer": prose(9 * seed + at), "rank": at} for at in (1, 2, 4)]}
        for seed in range(1, 9)
    ]
    _, report = check(lines(rows))
    margin = report["stages"][0]["pairs"]["margin"]
    assert (margin["rows"], margin["p50"], margin["negative"]) == (8, 3.0, 0)


def test_evaluation_sets_of_one_description_are_told_apart(
    lines: Lines, check: Any, recipe: Any, tmp_path: Path
) -> None:
    rows = [pair(seed) for seed in range(40)]
    lines([{"instruction": rows[3]["prompt"], "output": prose(9000)}, pair(800)], "known.jsonl")
    lines([{"instruction": prose(9001), "output": prose(9002)}], "new.jsonl")
    described = tmp_path / "dataset_info.json"
    described.write_text(json.dumps({name: {"file_name": f"{name}.jsonl"} for name in ("new", "known")}))
    path = recipe({"train": [{"path": str(lines(rows))}], "limits": {"contaminated": None}})
    sets = [{"path": str(described), "subset": name} for name in ("new", "known")]
    path.write_text(
        path.read_text() + "  look:\n    algorithm: evaluate\n    models: [stage:it]\n    baseline: stage:it\n"
        f"    rewards: [{{name: a, regex: a}}]\n    prompts: {json.dumps(sets)}\n"
    )
    code, report = check(path)
    assert code == 0
    assert [found["values"]["set"] for found in report["findings"]] == [str(tmp_path / "known.jsonl")]


def test_transcripts_as_an_evaluation_set_are_compared_turn_by_turn(lines: Lines, check: Any) -> None:
    """Turns so short that every run of 13 words in the transcript crosses into the next one."""
    said = [prose(seed, 10) for seed in range(4)]
    talk = [
        {"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, said, strict=True)
    ]  # fmt: skip
    rows = [{"messages": talk}, *({"messages": [{"role": "user", "content": prose(50 + 2 * seed)},
             {"role": "assistant", "content": prose(51 + 2 * seed)}]} for seed in range(20))]  # fmt: skip
    transcript = f"\n\nHuman: {said[0]}\n\nAssistant: {said[1]}\n\nHuman: {said[2]}\n\nAssistant: "
    exam = lines([{"chosen": transcript + said[3], "rejected": transcript + prose(70, 8)}], "exam.jsonl")
    code, report = check(lines(rows), "--against", exam)
    assert [found["check"] for found in report["findings"]] == ["contaminated"]
    assert code == 1


def test_prompts_shortened_on_the_left(
    lines: Lines, check: Any, recipe: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [pair(seed) for seed in range(30)]
    rows[4]["prompt"] = prose(5000, 300)
    path = recipe({"train": [{"path": str(lines(rows))}], "on_overlong": "truncate_left"}, max_length=400)
    code, report = check(path)
    assert (code, report["rows"]["kept"]) == (0, 30)
    (found,) = [found for found in report["findings"] if found["check"] == "truncated"]
    assert found["count"] == 1
    assert "lost the beginning of their prompt" in found["says"]
    made = trained(path, tmp_path / "own").train
    assert cli.main(["data", "show", str(path), "--stage", "it", "--worst", "truncation", "--ids", "--no-color"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("it, row 4 of 30: ")
    shown, kind = [], ""
    for line in out.splitlines()[3:]:
        kind = line[:13].strip(" #") or kind
        if kind == "not trained" and line[13] == "#":
            shown += [int(token) for token in line[15:].split()]
    assert shown == made[4]["prompt_ids"], "what is not marked as cut is what is trained on"
