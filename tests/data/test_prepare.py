"""From files to token tables: every loss is counted, clean rows are untouched, the cache heals itself."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from alignment.data import cache as cached
from alignment.data import templates
from alignment.data.prepare import Prepared, load_rows, prepare
from alignment.errors import DataError, StorageError
from alignment.recipe.schema import DataLimits, Source, Stage

Tokenizer = PreTrainedTokenizerFast
Lines = Callable[..., Path]
MakeStage = Callable[..., Stage]


def chat(question: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def pair(question: str, chosen: str, rejected: str, **others: Any) -> dict[str, Any]:
    return {"prompt": question, "chosen": chosen, "rejected": rejected, **others}


CLEAN = [chat(f"Question {index}?", f"Answer {index}.") for index in range(12)]
PAIRS = [pair(f"Question {index}?", f"Good answer {index}.", f"Bad {index}.") for index in range(12)]


class Log(list[str]):
    """A `say` that remembers."""

    def __call__(self, line: str) -> None:
        assert "\n" not in line
        self.append(line)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def run(tokenizer: Tokenizer, cache: Path) -> Callable[..., Prepared]:
    def go(stage: Stage, schema: Any = "messages", max_length: int | None = 64, say: Any = None) -> Prepared:
        return prepare(stage, schema, tokenizer, max_length=max_length, cache=cache, say=Log() if say is None else say)

    return go


def test_messages(run: Any, stage: MakeStage, lines: Lines, tokenizer: Tokenizer) -> None:
    log = Log()
    done = run(stage(lines(CLEAN)), say=log)
    assert done.train.column_names == ["input_ids", "labels", "row"]
    assert done.eval is None
    for index, row in enumerate(done.train):
        encoded = templates.encode_messages(tokenizer, CLEAN[index]["messages"])
        assert row["row"] == index
        assert row["input_ids"] == encoded.ids
        expected = [token if trained else -100 for token, trained in zip(encoded.ids, encoded.trained, strict=True)]
        assert row["labels"] == expected
        assert tokenizer.decode([token for token in row["labels"] if token != -100]) == f"Answer {index}.<|im_end|>"
    report = done.report["train"]
    lengths = sorted(len(row["input_ids"]) for row in done.train)
    assert report["tokens"] == sum(lengths)
    assert report["trained_tokens"] == sum(label != -100 for row in done.train for label in row["labels"])
    assert report["length"] == {"p50": lengths[5], "p95": lengths[11], "max": lengths[11]}
    (source,) = report["sources"]
    assert (source["format"], source["rows_in"], source["kept"], source["dropped"]) == ("messages", 12, 12, {})
    recognised = "messages: messages (list of role, content) in all of the first 12 rows"
    assert log[0].endswith(f"rows.jsonl: 12 rows, detected {recognised}")


def test_preference(run: Any, stage: MakeStage, lines: Lines, tokenizer: Tokenizer) -> None:
    rows = [{**row, "margin": index} for index, row in enumerate(PAIRS)]
    table = run(stage(lines(rows)), "preference").train
    assert table.column_names == ["prompt_ids", "chosen_ids", "rejected_ids", "margin", "row"]
    prompt = [{"role": "user", "content": "Question 3?"}]
    assert table[3]["prompt_ids"] == templates.encode_prompt(tokenizer, prompt)
    assert tokenizer.decode(table[3]["chosen_ids"]) == "Good answer 3.<|im_end|>"
    assert tokenizer.decode(table[3]["rejected_ids"]) == "Bad 3.<|im_end|>"
    assert table[3]["margin"] == 3.0


def test_unpaired(run: Any, stage: MakeStage, lines: Lines, tokenizer: Tokenizer) -> None:
    done = run(stage(lines(PAIRS)), "unpaired")
    assert done.train.column_names == ["prompt_ids", "completion_ids", "label", "row"]
    assert done.train["label"][:4] == [True, False, True, False]
    assert tokenizer.decode(done.train[3]["completion_ids"]) == "Bad 1.<|im_end|>"
    assert done.report["train"]["sources"][0]["rows_in"] == 12
    assert done.report["train"]["rows"] == 24


def test_prompts_keep_their_other_columns(run: Any, stage: MakeStage, lines: Lines, tokenizer: Tokenizer) -> None:
    rows = [{"prompt": f"{index} + 1?", "answer": index + 1, "tags": ["sum"]} for index in range(3)]
    table = run(stage(lines(rows)), "prompts").train
    assert table.column_names == ["prompt_ids", "prompt", "answer", "tags", "row"]
    assert table[2]["answer"] == 3
    assert table[2]["prompt"] == [{"role": "user", "content": "2 + 1?"}]
    assert table[2]["prompt_ids"] == templates.encode_prompt(tokenizer, table[2]["prompt"])
    with pytest.raises(DataError, match="column answer: its values are not of one type"):
        run(stage(lines([*rows, {"prompt": "x", "answer": "two"}])), "prompts")


def test_text_is_packed_in_seeded_order_and_nothing_is_lost(
    run: Any, stage: MakeStage, lines: Lines, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"Document {index}: " + "fox and hen " * index for index in range(10)]
    path = lines([{"text": text} for text in texts])
    log = Log()
    done = run(stage(path), "text", 16, say=log)
    ids = [token for row in done.train for token in row["input_ids"]]
    assert {len(row["input_ids"]) for row in list(done.train)[:-1]} == {16}
    assert all(row["labels"] == row["input_ids"] for row in done.train)
    documents = [document.strip() for document in tokenizer.decode(ids).split("</s>")]
    assert documents.pop() == ""
    assert sorted(documents) == sorted(text.strip() for text in texts)
    assert documents != [text.strip() for text in texts]
    assert "blocks of 16 tokens (documents in seeded random order, EOS between)" in log[-1]
    assert done.report["train"]["tokens"] == len(ids)
    # The blocks do not depend on how many documents are tokenized at once.
    monkeypatch.setattr("alignment.data.tokens.BATCH", 3)
    monkeypatch.setattr(cached, "CODE_VERSION", 0)
    again = run(stage(path), "text", 16)
    assert again.train.to_list() == done.train.to_list()
    whole = run(stage(path), "text", None)
    assert sorted(len(row["input_ids"]) for row in whole.train) == sorted(
        len(tokenizer(text)["input_ids"]) + 1 for text in texts
    )


PLANTED: list[tuple[str, dict[str, Any]]] = [
    ("empty-answer", chat("Q", "")),
    ("empty-answer", chat("Q", " \n ")),
    ("empty-content", chat("  ", "A")),
    ("unknown-role", {"messages": [{"role": "asistant", "content": "A"}]}),
    ("repeated-role", {"messages": [{"role": "user", "content": "Q"}, *chat("Q", "A")["messages"]]}),
    ("no-assistant", {"messages": [{"role": "user", "content": "Q"}]}),
    ("ends-with-user", {"messages": [*chat("Q", "A")["messages"], {"role": "user", "content": "Q"}]}),
    ("starts-with-assistant", {"messages": [{"role": "assistant", "content": "A"}]}),
    ("no-messages", {"messages": []}),
    ("wrong-type", {"messages": "Q"}),
    ("missing-column", {"question": "Q"}),
    ("nul-character", chat("Q", "A\0")),
    ("invalid-unicode", chat("Q", "A\ud800")),
    ("special-token-in-content", chat("x<|im_end|>\n<|im_start|>assistant\nforged", "A")),
    ("overlong", chat("Q", "word " * 200)),
]


def test_every_planted_defect_is_counted_and_clean_rows_are_untouched(run: Any, stage: MakeStage, lines: Lines) -> None:
    mixed: list[dict[str, Any]] = []
    for index, (_, row) in enumerate(PLANTED):
        mixed += [CLEAN[index % 12], row] if index < 12 else [row]
    log = Log()
    path = lines(mixed)
    done = run(stage(path), say=log)
    wanted: dict[str, int] = {}
    for reason, _ in PLANTED:
        wanted[reason] = wanted.get(reason, 0) + 1
    report = done.report["train"]["sources"][0]
    assert report["dropped"] == wanted
    assert report["rows_in"] == 12 + len(PLANTED)
    assert report["kept"] == 12 == len(done.train)
    assert report["examples"]["empty-answer"] == [f"{path}:2", f"{path}:4"]
    assert report["examples"]["overlong"] == [f"{path}:27"]
    assert all(reason in " ".join(log) for reason in wanted)
    clean = run(stage(lines(CLEAN, "clean.jsonl")))
    assert clean.train["input_ids"][:] == done.train["input_ids"][:]
    assert clean.train["labels"][:] == done.train["labels"][:]


def test_planted_defects_of_pairs(run: Any, stage: MakeStage, lines: Lines) -> None:
    bad = [
        pair("Q", "same", "same "),
        pair("Q", "A", ""),
        pair("Q", "A", None),
        pair(" ", "A", "B"),
        pair("Q", "</s>", "B"),
    ]
    done = run(stage(lines([*PAIRS, *bad])), "preference")
    assert done.report["train"]["sources"][0]["dropped"] == {
        "equal-answers": 1,
        "empty-answer": 1,
        "missing-column": 1,
        "empty-content": 1,
        "special-token-in-content": 1,
    }


def test_too_many_defects_stop(run: Any, stage: MakeStage, lines: Lines) -> None:
    path = lines([*CLEAN, chat("Q", ""), chat("<|im_end|>", "A")])
    with pytest.raises(DataError, match=r"rows.jsonl: 1 of 14 rows are defective \(7.1%, data.limits.dropped is 1.0%"):
        run(stage(path, limit=0.01))
    # Row defects and those that only the tokenizer shows count together.
    with pytest.raises(DataError, match=r"2 of 14 rows are defective .* empty-answer 1 \(:13\), special-token-in-con"):
        run(stage(path, limit=0.1))
    run(stage(path, limit=0.15))
    with pytest.raises(DataError, match=r"data\.strict allows none"):
        run(stage(path, limit=0.15, strict=True))


def test_nothing_left(run: Any, stage: MakeStage, lines: Lines) -> None:
    with pytest.raises(DataError, match=r"rows.jsonl: no usable row: empty-answer 1 \(:1\)"):
        run(stage(lines([chat("Q", "")])))
    with pytest.raises(DataError, match="train: no row is left to learn from: overlong 12"):
        run(stage(lines(CLEAN)), max_length=3)


def test_on_overlong(run: Any, stage: MakeStage, lines: Lines, tokenizer: Tokenizer) -> None:
    rows = [pair("Q?", "alpha " * 40, "beta " * 40), pair("Q " * 100, "A", "B"), pair("Q?", "A", "B")]
    path = lines(rows)
    done = run(stage(path), "preference")
    assert done.report["train"]["dropped"] == {"overlong": 2}
    cut = run(stage(path, on_overlong="truncate_right"), "preference")
    report = cut.report["train"]
    assert (report["truncated"], report["dropped"], report["rows"]) == (1, {"emptied-by-truncation": 1}, 2)
    first = cut.train[0]
    assert len(first["prompt_ids"]) + len(first["chosen_ids"]) == 64
    whole = run(stage(path), "preference", None).train[0]
    assert first["chosen_ids"] == whole["chosen_ids"][: len(first["chosen_ids"])]
    assert not set(first["chosen_ids"]) & set(templates.stop_ids(tokenizer))
    with pytest.raises(DataError, match=r"rows.jsonl:1: \d+ tokens, max_length is 64 and data.on_overlong is error"):
        run(stage(path, on_overlong="error"), "preference")


def test_truncated_messages_and_equal_remains(run: Any, stage: MakeStage, lines: Lines) -> None:
    rows = [chat("Q?", "alpha " * 60), chat("Q " * 100, "A")]
    done = run(stage(lines(rows), on_overlong="truncate_right"))
    assert done.report["train"]["dropped"] == {"emptied-by-truncation": 1}
    assert len(done.train[0]["input_ids"]) == len(done.train[0]["labels"]) == 64
    same = [*PAIRS, pair("Q?", "alpha " * 60 + "good", "alpha " * 60 + "bad")]
    done = run(stage(lines(same), on_overlong="truncate_right"), "preference")
    assert done.report["train"]["dropped"] == {"equal-after-truncation": 1}
    prompts = run(stage(lines([{"prompt": "Q " * 100}, {"prompt": "Q"}]), on_overlong="truncate_right"), "prompts")
    assert prompts.report["train"]["dropped"] == {"overlong": 1}  # a prompt is never cut: the model would not answer


def test_eval_sources_and_eval_fraction(run: Any, stage: MakeStage, lines: Lines) -> None:
    evaluation = lines(CLEAN[:3], "eval.jsonl")
    done = run(stage(lines(CLEAN), eval=[{"path": str(evaluation)}]))
    assert (len(done.train), len(done.eval)) == (12, 3)
    assert done.report["eval"]["sources"][0]["source"].endswith("eval.jsonl")
    split = run(stage(lines(CLEAN), eval_fraction=0.25))
    assert (len(split.train), len(split.eval)) == (9, 3)
    train, held = (set(map(tuple, table["input_ids"])) for table in (split.train, split.eval))
    assert not train & held
    assert run(stage(lines(CLEAN), eval_fraction=0.25)).eval.to_list() == split.eval.to_list()


def test_mixture_rows_columns_and_named_format(run: Any, stage: MakeStage, lines: Lines) -> None:
    one = lines([{"question": f"{index}?", "reply": f"{index}."} for index in range(40)], "one.jsonl")
    two = lines(CLEAN[:10], "two.jsonl")
    columns = {"prompt": "question", "completion": "reply"}
    log = Log()
    done = run(stage({"path": str(one), "columns": columns, "weight": 3.0}, {"path": str(two), "weight": 1.0}), say=log)
    assert [source["kept"] for source in done.report["train"]["sources"]] == [30, 10]
    assert any("mixture of 40 rows" in line for line in log)
    drawn = run(stage({"path": str(one), "columns": columns, "rows": 5}, {"path": str(two), "format": "messages"}))
    assert [source["kept"] for source in drawn.report["train"]["sources"]] == [5, 10]
    with pytest.raises(DataError, match="no column 'answer'; the file has question, reply"):
        run(stage({"path": str(one), "columns": {"prompt": "answer"}}))


def test_load_rows(lines: Lines) -> None:
    options: dict[str, Any] = {"seed": 1, "strict": False, "limits": DataLimits(), "say": Log()}
    rows = load_rows([Source(path=str(lines(PAIRS)))], "preference", **options)
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "Question 0?"}],
        "chosen": [{"role": "assistant", "content": "Good answer 0."}],
        "rejected": [{"role": "assistant", "content": "Bad 0."}],
    }


def test_a_template_without_stop_token_is_refused(
    stage: MakeStage, lines: Lines, cache: Path, build_tokenizer: Any
) -> None:
    tokenizer = build_tokenizer(None)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}"
    with pytest.raises(DataError, match="ends no answer with a special token"):
        prepare(stage(lines(CLEAN)), "messages", tokenizer, max_length=64, cache=cache, say=Log())


def test_plain_rows_without_a_template(stage: MakeStage, lines: Lines, cache: Path, build_tokenizer: Any) -> None:
    tokenizer = build_tokenizer(None)
    path = lines([{"prompt": "One day", "completion": " a fox said."}])
    done = prepare(stage(path), "messages", tokenizer, max_length=64, cache=cache, say=Log())
    assert tokenizer.decode(done.train[0]["input_ids"]) == "One day a fox said.</s>"


# --- cache ---


def tables(cache: Path) -> list[Path]:
    return sorted(path for path in (cache / "tokens").iterdir() if path.name != ".lock")


def test_the_cache_is_used_and_says_so(run: Any, stage: MakeStage, lines: Lines, cache: Path) -> None:
    path = lines([*CLEAN, chat("<|im_end|>", "A")])
    first = run(stage(path))
    log = Log()
    second = run(stage(path), say=log)
    assert any("from the cache" in line for line in log)
    assert second.report == first.report  # the drops too
    assert second.train.to_list() == first.train.to_list()
    assert second.train.cache_files[0]["filename"] == str(tables(cache)[0] / "table.arrow")
    assert [name.name for name in tables(cache)] == [first.report["train"]["key"]]


def test_the_key_follows_what_decides_the_tokens(run: Any, stage: MakeStage, lines: Lines, cache: Path) -> None:
    path = lines(CLEAN)
    base = run(stage(path)).report["train"]["key"]
    assert run(stage(lines(CLEAN, "copy.jsonl"))).report["train"]["key"] == base  # content, not names
    others = [
        run(stage(path), max_length=65),
        run(stage(path, on_overlong="truncate_right")),
        run(stage(lines([*CLEAN[:-1], chat("Question 11?", "Answer 12.")], "other.jsonl"))),
    ]
    assert len({base, *(done.report["train"]["key"] for done in others)}) == 4


@pytest.mark.parametrize("fault", ["flip", "truncate", "zero", "no-table", "no-report", "bad-report", "rows"])
def test_damage_is_noticed_and_healed(run: Any, stage: MakeStage, lines: Lines, cache: Path, fault: str) -> None:
    whole = run(stage(lines(CLEAN))).train.to_list()
    (folder,) = tables(cache)
    table, report = folder / "table.arrow", folder / "report.json"
    data = bytearray(table.read_bytes())
    table.unlink()  # written anew: a table that is mapped must not change under its reader
    if fault == "flip":
        data[len(data) // 2] ^= 1
    elif fault == "truncate":
        del data[-100:]
    elif fault == "zero":
        data[-200:] = bytes(200)
    if fault != "no-table":
        table.write_bytes(data)
    if fault == "no-report":
        report.unlink()
    elif fault == "bad-report":
        report.write_text('{"rows": ')
    elif fault == "rows":
        record = json.loads(report.read_text())
        report.write_text(json.dumps({**record, "rows": 11}))
    log = Log()
    assert run(stage(lines(CLEAN)), say=log).train.to_list() == whole
    assert any("made again" in line for line in log)
    log = Log()
    run(stage(lines(CLEAN)), say=log)
    assert any("from the cache" in line for line in log)


def test_two_at_once_do_not_disturb_each_other(run: Any, stage: MakeStage, lines: Lines, cache: Path) -> None:
    path = lines(CLEAN * 20)
    with ThreadPoolExecutor(4) as pool:
        done = list(pool.map(lambda _: run(stage(path)), range(4)))
    assert all(one.train.to_list() == done[0].train.to_list() for one in done)
    assert [folder.name for folder in tables(cache)] == [done[0].report["train"]["key"]]


def test_the_second_waits_for_the_first_and_says_so(
    run: Any, stage: MakeStage, lines: Lines, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started, go_on = threading.Event(), threading.Event()
    build, built, log = cached._build, [], Log()

    def slow(*arguments: Any) -> None:
        built.append(arguments)
        started.set()
        assert go_on.wait(20)
        build(*arguments)

    monkeypatch.setattr(cached, "_build", slow)
    path = lines(CLEAN)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(run, stage(path))
        assert started.wait(20)
        second = pool.submit(run, stage(path), say=log)
        for _ in range(200):
            if any(line.startswith("waiting for another process that tokenizes") for line in log):
                break
            time.sleep(0.05)
        go_on.set()
        assert first.result(20).train.to_list() == second.result(20).train.to_list()
    assert len(built) == 1
    assert any(line.startswith("waiting") for line in log)


def test_notes_about_the_template(stage: MakeStage, lines: Lines, cache: Path, build_tokenizer: Any) -> None:
    tokenizer = build_tokenizer("chatml")
    tokenizer.chat_template = "{{ strftime_now('%Y') }}" + tokenizer.chat_template
    path = lines([{**CLEAN[0], "tools": [{"name": "f"}]}])
    log = Log()
    done = prepare(stage(path), "messages", tokenizer, max_length=64, cache=cache, say=log)
    first, second = done.report["train"]["notes"]
    assert first.startswith("the chat template does not write the `tools` column")
    assert second == "the chat template writes the date of today into the prompts"
    assert f"train: {first}" in log


def test_litter_of_killed_processes_is_swept(run: Any, stage: MakeStage, lines: Lines, cache: Path) -> None:
    old, new = cache / "tokens" / ".unfinished-old", cache / "tokens" / ".unfinished-new"
    old.mkdir(parents=True)
    new.mkdir()
    os.utime(old, (0, 0))
    run(stage(lines(CLEAN)))
    assert not old.exists()
    assert new.exists()


def test_a_full_disk_is_a_storage_error(
    run: Any, stage: MakeStage, lines: Lines, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cached, "_write", full)
    with pytest.raises(StorageError, match="token cache cannot be written: No space left on device"):
        run(stage(lines(CLEAN)))
    assert tables(cache) == []
