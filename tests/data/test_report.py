"""The data report: what it counts, what it says of whole files, its limits and its exit codes."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from made_rows import pair, prose, talk, talks
from transformers import PreTrainedTokenizerFast

from alignment import cli, inspecting
from alignment.data import lengths, page
from alignment.data.prepare import prepare
from alignment.recipe.load import load_recipe

Write = Callable[..., Path]


@pytest.fixture
def check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run `alignment data check --json` and give its exit code and what it printed."""

    def run(*words: str | Path) -> tuple[int, dict[str, Any]]:
        code = cli.main(["data", "check", *map(str, words), "--json", "--runs", str(tmp_path / "runs")])
        out, err = capsys.readouterr()
        assert err == "" or code == 2, err
        return code, json.loads(out)

    return run


def by_check(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {finding["check"]: finding for finding in report["findings"]}


# --- files ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [pair(seed) for seed in range(120)],
        talks(120),
        [{"text": prose(seed, 60)} for seed in range(120)],
        [{"prompt": prose(seed)} for seed in range(120)],
        [{"prompt": prose(2 * seed), "completion": prose(2 * seed + 1), "label": seed % 3 == 0} for seed in range(120)],
    ],
    ids=["preference", "messages", "text", "prompts", "unpaired"],
)
def test_clean_files_have_no_findings(rows: list[dict[str, Any]], lines: Write, check: Any, tiny_policy: Path) -> None:
    for words in ((), ("--tokenizer", tiny_policy)):
        code, report = check(lines(rows), "--strict", *words)
        assert report["findings"] == []
        assert (code, report["rows"]) == (0, {"in": 120, "kept": 120, "dropped": {}})


def test_the_shape_of_the_json(lines: Write, check: Any) -> None:
    rows = [pair(seed) for seed in range(30)]
    rows[4]["chosen"] = rows[4]["rejected"]
    rows[7]["rejected"] = " "
    code, report = check(lines(rows))
    assert report["rows"] == {"in": 30, "kept": 28, "dropped": {"equal-answers": 1, "empty-answer": 1}}
    found = by_check(report)
    place = str(lines(rows))
    assert found["equal-answers"]["count"] == 1
    assert found["equal-answers"]["rows"] == [f"{place}:5"]
    assert found["empty-answer"]["rows"] == [f"{place}:8"]
    assert (code, report["code"]) == (1, 1), "2 of 30 are more than 1 in 100"
    assert report["stages"][0]["limits_passed"] == ["dropped"]
    assert found["dropped"]["limit"] == 0.01


def test_repeats_within_and_across_sources(lines: Write, check: Any) -> None:
    first, second = talks(40), talks(40, start=100)
    first[9] = first[3]
    second[5] = first[2]
    near = first[6]["messages"][1]["content"].split()
    near[-1] = "anders"
    second[8] = talk(first[6]["messages"][0]["content"], " ".join(near))
    a, b = lines(first, "a.jsonl"), lines(second, "b.jsonl")
    code, report = check(a, b)
    found = by_check(report)
    assert code == 0, "limits are wide"
    assert found["duplicate"]["rows"] == [f"{a}:10 ({a}:4)", f"{b}:6 ({a}:3)"]
    assert found["duplicate"]["values"] == {"within": 1, "across": 1}
    assert found["near-duplicate"]["rows"] == [f"{b}:9 ({a}:7)"]
    sources = report["stages"][0]["sources"]
    assert [source["findings"] for source in sources] == [{"duplicate": 1}, {"duplicate": 1, "near-duplicate": 1}]
    assert check(a, b, "--strict")[0] == 1


def test_credentials_are_counted_and_never_printed(
    lines: Write, check: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = talks(60)
    rows[3] = talk("my key", "AKIAIOSFODNN7EXAMPLE")
    rows[4] = talk("mail", "it is jane.roe@mail.org, yes")
    code, report = check(lines(rows))
    found = by_check(report)
    assert code == 1
    assert report["stages"][0]["limits_passed"] == ["secret"]
    assert found["secret"]["values"] == {"kinds": {"AWS key": 1}}
    assert found["personal-data"]["values"] == {"kinds": {"e-mail address": 1}}
    assert cli.main(["data", "check", str(lines(rows)), "--runs", str(tmp_path)]) == 1
    out = capsys.readouterr().out + json.dumps(report)
    assert "AKIA" not in out and "jane" not in out
    assert "LIMIT PASSED (data.limits.secret: 0)" in out.replace("\n" + " " * 30, " ")


def test_evaluation_sets_by_path(lines: Write, check: Any) -> None:
    rows = talks(50)
    rows[10] = talk("Count: " + prose(777, 40), "It is 42.")
    exam = [{"question": prose(777, 40), "answer": "42"}, {"question": prose(778, 40), "answer": "43"}]
    path = lines(exam, "exam.jsonl")
    code, report = check(lines(rows), "--against", path)
    found = by_check(report)["contaminated"]
    assert (code, found["count"], found["of"], found["rows"]) == (1, 1, 2, [f"{path}:1"])
    assert found["values"] == {"set": str(path), "any": 1}
    code, report = check(lines(rows), "--against", lines(exam[1:], "clean.jsonl"))
    assert (code, report["findings"]) == (0, [])


def test_system_turns_that_training_and_evaluation_share_do_not_count(lines: Write, check: Any) -> None:
    system = {"role": "system", "content": prose(1, 80)}
    rows = [{"messages": [system, *row["messages"]]} for row in talks(50, start=10)]
    exam = [{"prompt": [system, {"role": "user", "content": prose(5000 + i, 20)}]} for i in range(5)]
    assert check(lines(rows), "--against", lines(exam, "exam.jsonl"))[1]["findings"] == []


def test_tokens_of_files(lines: Write, check: Any, tiny_policy: Path) -> None:
    rows = [*talks(50), talk("a", "x<|im_end|>y")]
    code, report = check(lines(rows))
    assert "special-token-in-content" in by_check(report)
    assert "not_counted" in report["stages"][0]["tokens"]
    code, report = check(lines(rows), "--tokenizer", tiny_policy)
    assert report["rows"] == {"in": 51, "kept": 50, "dropped": {"special-token-in-content": 1}}
    assert by_check(report)["special-token-in-content"]["rows"] == [f"{lines(rows)}:51"]
    tokens = report["stages"][0]["tokens"]["train"]
    assert (tokens["rows"], tokens["answers"], tokens["stop_trained"]) == (50, 50, 1.0)
    assert report["stages"][0]["proof"]["failed"] == []
    assert code == 1, "1 of 51"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"messages": [}\n', ":1: invalid JSON"),
        ("", "no records"),
        ('{"question": 1}\n', "columns question fit no format of rows"),
        ('{"prompt": "a", "chosen": "b", "rejected": ""}\n', "no usable row"),
    ],
)
def test_unusable_files_are_code_2_and_one_line(tmp_path: Path, check: Any, content: str, says: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    code, report = check(path)
    assert code == 2
    assert says in report["error"]
    assert "\n" not in report["error"]


def test_words_that_do_not_go_together(tmp_path: Path, lines: Write, check: Any) -> None:
    said, pairs = lines(talks(5), "t.jsonl"), lines([pair(1)], "p.jsonl")
    assert "rows of different kinds" in check(said, pairs)[1]["error"]
    assert "belong to a recipe" in check(said, "--stage", "sft")[1]["error"]
    assert "give one recipe" in check("a.yaml", said)[1]["error"]
    assert "belong to files" in check("a.yaml", "--tokenizer", tmp_path)[1]["error"]


# --- recipes --------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(tmp_path: Path, tiny_policy: Path) -> Callable[..., Path]:
    """A recipe of one sft stage on given files, and more keys of its `data`."""

    def write(train: Path, *, data: str = "", max_length: int = 512, more: str = "") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"name: x\nchat_template: chatml\nmodel: {tiny_policy}\nstages:\n  sft:\n    algorithm: sft\n"
            f"    data: {{train: [{{path: {train}}}]{data}}}\n    batch: {{global: 8, per_device: 4}}\n"
            f"    train: {{max_length: {max_length}}}\n{more}"
        )
        return path

    return write


def test_leaks_between_training_and_held_out_rows(lines: Write, check: Any, recipe: Callable[..., Path]) -> None:
    train, held = talks(60), talks(20, start=500)
    held[3] = train[5]
    held[4] = talk(train[6]["messages"][0]["content"].upper() + "!", prose(9991))
    held[7] = talk(prose(9992), train[8]["messages"][1]["content"])
    where = lines(held, "held.jsonl")
    path = recipe(lines(train), data=f", eval: [{{path: {where}}}]")
    code, report = check(path)
    found = by_check(report)
    assert code == 1
    assert found["leak"]["rows"] == [f"{where}:4", f"{where}:5"]
    assert found["leak"]["values"] == {"whole_rows": 1}
    assert found["leak-ngram"]["rows"] == [f"{where}:8"]
    assert check(path, "--set", "stages.sft.data.limits.leak=0.2")[0] == 0
    assert check(path, "--set", "stages.sft.data.limits.leak=null")[0] == 0
    code, report = check(recipe(lines(train), data=", eval_fraction: 0.2"))
    assert (code, report["findings"], report["stages"][0]["eval_rows"]) == (0, [], 12)


def test_answers_without_a_trained_stop_token(lines: Write, check: Any, recipe: Callable[..., Path]) -> None:
    rows = [talk(prose(2 * i, 5), prose(2 * i + 1, 12 if i % 4 else 90)) for i in range(40)]
    path = recipe(lines(rows), data=", on_overlong: truncate_right", max_length=100)
    code, report = check(path)
    found = by_check(report)
    assert code == 1
    assert (found["unstopped"]["count"], found["truncated"]["count"]) == (10, 10)
    assert found["unstopped"]["rows"][0] == f"{lines(rows)}:1"
    assert report["stages"][0]["tokens"]["train"]["stop_trained"] == 0.75
    code, report = check(path, "--set", "stages.sft.data.on_overlong=drop")
    assert (code, by_check(report)["overlong"]["count"], report["rows"]["kept"]) == (0, 10, 30)
    assert "unstopped" not in by_check(report)


def test_a_template_that_trains_the_wrong_text_fails(
    lines: Write, check: Any, recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    template = tmp_path / "wrong.jinja"
    template.write_text(
        "{% for m in messages %}{% if m['role'] == 'assistant' %}"
        "{% generation %}{{ '<|im_start|>assistant\n' + m['content'] + '<|im_end|>' }}"
        "{% endgeneration %}{{ '\n' }}{% else %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    path = recipe(lines(talks(20)))
    code, report = check(path, "--set", f"chat_template={template}")
    assert code == 1
    assert report["stages"][0]["limits_passed"] == ["template-proof"]
    assert "text of the prompt is trained with an answer" in by_check(report)["template-proof"]["says"]
    assert cli.main(["check", str(path), "--set", f"chat_template={template}"]) == 2
    assert "text of the prompt is trained with an answer" in capsys.readouterr().err
    template.write_text("{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}")
    code, report = check(path, "--set", f"chat_template={template}")
    assert code == 2
    assert "ends no answer with a special token" in report["error"]


def test_evaluate_stages_are_looked_for_and_equal_rows_reported_once(
    lines: Write, check: Any, recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = talks(60)
    exam = lines([{"prompt": rows[4]["messages"][0]["content"]}, {"prompt": prose(77777)}], "exam.jsonl")
    train = lines(rows)
    more = (
        f"  again:\n    algorithm: sft\n    model: stage:sft\n    data: {{train: [{{path: {train}}}]}}\n"
        f"    train: {{max_length: 512}}\n"
        f"  evaluate:\n    algorithm: evaluate\n    models: [stage:sft]\n    baseline: stage:sft\n"
        f"    rewards: [{{name: a, regex: a}}]\n    prompts: [{{path: {exam}}}]\n"
    )
    path = recipe(train, more=more)
    code, report = check(path)
    assert code == 1
    assert [(found["stage"], found["check"]) for found in report["findings"]] == [
        ("sft", "contaminated"), ("again", "contaminated"),
    ]  # fmt: skip
    assert [stage["same_rows_as"] for stage in report["stages"]] == [None, "sft"]
    assert len(check(path, "--stage", "again")[1]["stages"]) == 1
    assert "trains on no rows; those that do are sft, again" in check(path, "--stage", "evaluate")[1]["error"]
    cli.main(["data", "check", str(path), "--runs", str(tmp_path / "runs")])
    out = capsys.readouterr().out
    assert out.count("contaminated ") == 1
    assert "those of sft, which has the same rows" in out
    assert out.endswith("120 of 120 rows kept, 2 findings, 2 limits passed\n")


def test_prepared_tables_are_those_of_the_run(
    tiny_run: Path, tiny_recipe: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Same keys as the run's manifests, so that a run finds what was prepared; the second time all is there."""
    path = tiny_run.parent / "tiny.yaml"
    for words in ("tokenized in", "from the cache"):
        assert cli.main(["data", "prepare", str(path), "--runs", str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert out.count(words) == 2
        assert out.endswith(f"{path}: 2 stages ready in {tmp_path / '.cache'}\n")
    made = {folder.name for folder in (tmp_path / ".cache" / "tokens").iterdir() if not folder.name.startswith(".")}
    manifests = [json.loads((tiny_run / stage / "manifest.json").read_text()) for stage in ("base", "sft")]
    assert made == {manifest["data"]["train"]["key"] for manifest in manifests}
    assert cli.main(["data", "check", str(path), "--runs", str(tiny_run.parent)]) in (0, 1)
    assert cli.main(["data", "prepare", str(path), "--stage", "nope"]) == 2


def test_ids_are_those_of_trl_where_both_are_right(
    tmp_path: Path, data_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast, stage: Callable[..., Any]
) -> None:
    """The table of pairs against TRL's own tokenization, which keeps the line end after the stop token."""
    from trl.data_utils import _tokenize

    table = prepare(
        stage(data_folder / "preferences.jsonl"), "preference", tiny_tokenizer, max_length=None, cache=tmp_path,
        say=lambda text: None,
    ).train  # fmt: skip
    rows = [json.loads(line) for line in (data_folder / "preferences.jsonl").read_text().splitlines()]
    newline = tiny_tokenizer("\n")["input_ids"]
    for row, ours in zip(rows, table, strict=True):
        prompt = _tokenize(tiny_tokenizer, row["prompt"], add_generation_prompt=True)["input_ids"]
        assert ours["prompt_ids"] == prompt
        for name in ("chosen", "rejected"):
            whole = _tokenize(tiny_tokenizer, [*row["prompt"], *row[name]])["input_ids"]
            assert ours["prompt_ids"] + ours[f"{name}_ids"] + newline == whole


# --- numbers --------------------------------------------------------------------------------------------------------


def test_counts_of_a_table_of_conversations() -> None:
    table = datasets.Dataset.from_dict({
        "input_ids": [[1, 9, 5, 2, 9, 5, 2], [1, 1, 5, 5], [9, 5, 2, 1], [1]],
        "labels": [[-100, -100, 5, 2, -100, 5, 2], [-100, -100, -100, 5], [-100, -100, 2, -100], [-100]],
        "row": [0, 1, 3, 4],
    })  # fmt: skip
    counts = lengths.count(table, [2], bos=1)
    assert (counts.tokens, counts.trained, counts.answers, counts.stopped) == (16, 6, 4, 3)
    assert (counts.unstopped, counts.untrained, counts.doubled) == ([1], [4], [1])
    assert counts.bos == {1: 3, 2: 1}
    found = lengths.findings(counts, "messages", [f"x:{i}" for i in range(5)], {}.get)
    assert [(finding.check, finding.rows) for finding in found] == [
        ("unstopped", ("x:1",)), ("untrained", ("x:4",)), ("double-bos", ("x:1",)),
    ]  # fmt: skip


def test_counts_of_a_table_of_pairs() -> None:
    table = datasets.Dataset.from_dict({
        "prompt_ids": [[1, 5], [1, 1, 5]], "chosen_ids": [[7, 2], [7]], "rejected_ids": [[8, 8, 2], [2]], "row": [0, 1],
    })  # fmt: skip
    counts = lengths.count(table, [2], bos=1)
    assert (counts.tokens, counts.trained, counts.answers, counts.stopped) == (12, 7, 4, 3)
    assert (counts.unstopped, counts.untrained, counts.doubled) == ([1], [], [1])
    assert np.concatenate(counts.sequences).tolist() == [[4, 5], [4, 4]]
    summary = lengths.summary(counts, "preference", per_device=2, seed=0, grouped=False, size=None)
    assert summary["length"] == {"p5": 4, "p50": 4, "p95": 5, "p99": 5, "max": 5}
    assert summary["padding"] == pytest.approx(1 - 17 / 20)


def test_padding_by_hand() -> None:
    rows = np.array([[10], [2], [8], [4]])
    assert lengths.padding(rows, 4, 0, grouped=False) == pytest.approx(1 - 24 / 40)
    assert lengths.padding(rows, 1, 0, grouped=False) == 0.0
    assert lengths.padding(rows, 2, 0, grouped=True) == pytest.approx(1 - 24 / (20 + 8))
    assert lengths.padding(np.array([[3], [3], [3]]), 2, 0, grouped=False) == 0.0, "the last batch is smaller"


def test_packing_equals_an_oracle() -> None:
    """Best fit decreasing, written as slowly as it is said."""
    for seed in range(20):
        draw = random.Random(seed)
        wanted = [draw.randint(1, 30) for _ in range(60)]
        blocks: list[int] = []
        for length in sorted(wanted, reverse=True):
            fits = [i for i, used in enumerate(blocks) if used + length <= 32]
            if fits:
                fullest = max(fits, key=lambda i: blocks[i])
                blocks[fullest] += length
            else:
                blocks.append(length)
        assert lengths.packed(wanted, 32) == len(blocks)
    assert lengths.packed([40, 2], 32) == 2, "a row longer than a block fills one"


def test_tokens_per_character_by_language(tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    english = "The hen was in the house, and the fox was looking for it there all night."
    german = "Die Henne war im Haus, und der Fuchs suchte sie dort die ganze Nacht."
    japanese = "めんどりは家の中にいて、きつねは一晩中そこでそれを探していました。"

    def rate(*texts: str) -> float:
        return sum(len(tiny_tokenizer(text)["input_ids"]) for text in texts) / sum(map(len, texts))

    rows = [[english, "42"], [german, german], [japanese, ""]]
    found = lengths.per_character(tiny_tokenizer, rows)
    assert found == {
        "rows": 3, "languages": {"de": rate(german), "en": rate(english), "ja": rate(japanese), "others": rate("42")},
    }  # fmt: skip
    assert list(found["languages"]) == ["de", "en", "ja", "others"], "the one with most characters first"
    assert lengths.per_character(tiny_tokenizer, [["42", "7"]])["languages"] == {"unclear": rate("42", "7")}
    assert lengths.per_character(tiny_tokenizer, []) == {"rows": 0, "languages": {}}


def test_languages_are_counted_in_a_seeded_sample_of_rows(
    lines: Write, check: Any, tiny_policy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = "Yesterday the fox and the hen were walking through the garden and said number {} to each other."
    gesagt = "Gestern sind der Fuchs und die Henne durch den Garten gegangen und sagten sich die Nummer {}."
    rows = lines([talk((said, gesagt)[index % 4 == 0].format(index), prose(index)) for index in range(900)])
    first, second = (check(rows, "--tokenizer", tiny_policy)[1]["stages"][0]["tokens"]["train"] for _ in range(2))
    assert first["per_character"] == second["per_character"]
    assert first["per_character"]["rows"] == 500
    assert {"en", "de"} <= first["per_character"]["languages"].keys()
    cli.main(["data", "check", str(rows), "--tokenizer", str(tiny_policy), "--runs", str(tmp_path / "runs")])
    assert "tokens per character (of 500 rows): " in " ".join(capsys.readouterr().out.split())


def test_the_page_names_files_once() -> None:
    places = ["a/b.jsonl:3 (a/b.jsonl:1)", "a/b.jsonl:9 (c.json[0])", "c.json[4]"]
    assert page._places(places) == "a/b.jsonl:3 (:1), :9 (c.json[0]), [4]"


def test_the_tokenizer_of_a_stage_is_made_as_the_run_makes_it(tiny_run: Path) -> None:
    from alignment.data import templates
    from alignment.models.tokenizer import load_tokenizer

    tokenizers = inspecting.Tokenizers(load_recipe(tiny_run.parent / "tiny.yaml"))
    for stage in ("base", "sft"):
        assert templates.digest(tokenizers.of(stage)) == templates.digest(load_tokenizer(tiny_run / stage))
