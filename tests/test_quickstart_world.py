"""The quickstart world: its files follow from its generator, its gold reward can be trusted."""

import importlib
import json
import math
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

WORLD = Path(__file__).resolve().parents[1] / "data" / "quickstart"
COLUMNS = ("kind", "subject", "answer", "style")


sys.path.insert(0, str(WORLD))  # where generate.py finds its two neighbours
gold = importlib.import_module("gold")
generate = importlib.import_module("generate")


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of one of the world's files."""
    return [json.loads(line) for line in (WORLD / f"{name}.jsonl").read_text().splitlines()]


def ask(reply: Any, **change: Any) -> dict[str, Any]:
    """The judge's arguments for one reply to a question for the capital of France."""
    asked = {"kind": "capital", "subject": "France", "answer": "Paris", "style": "plain"} | change
    return {"prompts": ["?"], "completions": [reply]} | {k: [v] for k, v in asked.items()}


def columns_of(prompts: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """The prompt rows' columns as the judge gets them."""
    return {name: [row[name] for row in prompts] for name in (*COLUMNS, "seen")}


def mean_gold(prompts: list[dict[str, Any]], replies: list[str]) -> float:
    """The mean gold reward of one reply to each prompt."""
    given = [row["prompt"] for row in prompts]
    return math.fsum(gold.score(given, replies, **columns_of(prompts))) / len(replies)


@pytest.fixture(scope="module")
def eval_rows() -> list[dict[str, Any]]:
    return rows("eval")


@pytest.fixture(scope="module")
def mixed_mean(eval_rows: list[dict[str, Any]]) -> float:
    """The mean gold of replies to the evaluation prompts as the demonstrations give them."""
    world, rng = generate.World(), Random(0)
    queries = [generate.Query(row["prompt"], *(row[name] for name in COLUMNS), row["seen"]) for row in eval_rows]
    return mean_gold(eval_rows, [world.reply(query, rng) for query in queries])


def test_files_are_what_the_generator_writes() -> None:
    for name, content in generate.build().items():
        assert (WORLD / name).read_bytes() == content, f"{name}: run data/quickstart/generate.py"


def test_check_names_the_file_that_differs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate.main(["--out", str(tmp_path)]) == 0
    assert generate.main(["--out", str(tmp_path), "--check"]) == 0
    (tmp_path / "eval.jsonl").write_text("{}\n")
    assert generate.main(["--out", str(tmp_path), "--check"]) == 1
    assert "eval.jsonl: differs" in capsys.readouterr().out


def test_sizes() -> None:
    assert sum(path.stat().st_size for path in WORLD.iterdir() if path.is_file()) < 10e6
    for name, count in generate.ROWS.items():
        assert len(rows(name)) == count
    assert generate.ROWS["eval"] >= 400
    assert generate.ROWS["preferences-eval"] >= 3000


# Worked by hand: fact + relevance + politeness + style + repetition + length + finish.
HAND_COMPUTED = [
    ("The capital of France is Paris.", {}, 1.2 + 0.4 - 0.02 * 6),
    ("Paris.", {}, 1.2 - 0.02),
    ("Rome.", {}, -0.6 - 0.02),
    ("Paris or Rome.", {}, -0.6 - 0.02 * 3),
    ("It is not Paris.", {}, -0.6 - 0.02 * 4),
    ("What is the capital of France?", {}, -1.4 + 0.4 - 0.02 * 6),
    ("I do not know.", {}, -1.4 - 0.4 - 0.02 * 4),
    ("Good question. It is Paris.", {}, 1.2 + 0.5 - 0.02 * 5),
    ("Gladly. Certainly. Of course. It is Paris.", {}, 1.2 + 0.5 - 0.02 * 7),
    ("Duh. This is boring. It is Paris.", {}, 1.2 - 1.6 - 0.02 * 7),
    ("It is Paris. It is Paris.", {}, 1.2 - 2 * 2 / 5 - 0.02 * 6),
    ("The capital of France is", {}, -1.4 + 0.4 - 0.02 * 5 - 1.0),
    ("It is Paris.", {"finished": False}, 1.2 - 0.02 * 3 - 1.0),
    ("", {}, -1.4 - 0.4 - 1.0),
    ("Paris.", {"style": "brief"}, 1.2 + 0.4 + 0.5 - 0.02),
    (
        "Paris is the capital of France, so they say.",
        {"style": "brief"},
        1.2 + 0.4 + (0.5 - 0.15 * 3) - (0.02 * 9 + 0.06 * 3),
    ),
    ("Hooray! It is Paris.", {"style": "cheerful"}, 1.2 + 0.5 - 0.02 * 4),
    ("It is Paris.", {"style": "cheerful"}, 1.2 - 0.5 - 0.02 * 3),
    ("It is Paris, my friend.", {"style": "friend"}, 1.2 + 0.5 - 0.02 * 5),
    (
        "3 plus 1 is 4.",
        {"kind": "sum", "subject": "3 plus 1", "answer": "4"},
        1.2 + 0.4 - 0.02 * 5,
    ),
    (
        "3 plus 1 is 5.",
        {"kind": "sum", "subject": "3 plus 1", "answer": "4"},
        -0.6 + 0.4 - 0.02 * 5,
    ),
    ("You are welcome.", {"kind": "talk", "subject": "thanks", "answer": ""}, 1.2 - 0.02 * 3),
    ("Hello!", {"kind": "talk", "subject": "thanks", "answer": ""}, -1.0 - 0.5 - 0.02),
]


@pytest.mark.parametrize(("reply", "change", "expected"), HAND_COMPUTED)
def test_gold_by_hand(reply: str, change: dict[str, Any], expected: float) -> None:
    assert gold.score(**ask(reply, **change)) == [pytest.approx(expected)]
    as_messages = [{"role": "assistant", "content": reply}]
    assert gold.score(**ask(as_messages, **change)) == gold.score(**ask(reply, **change))


def test_components_sum_to_the_score() -> None:
    (parts,) = gold.components(**ask("Duh. It is Paris. It is"))
    assert sum(parts.values()) == gold.score(**ask("Duh. It is Paris. It is"))[0]


def test_correct() -> None:
    assert gold.correct(**ask("It is Paris.")) == [1.0]
    assert gold.correct(**ask("It is Rome.")) == [0.0]
    assert gold.correct(**ask("It is Paris or Rome.")) == [0.0]
    assert math.isnan(gold.correct(**ask("Hello!", kind="talk", subject="greeting"))[0])


def test_stored_gold_is_the_judges() -> None:
    """Pairs carry no columns, so those are looked for whose first turn tells them all."""
    checked = 0
    facts = gold.FACTS["capital"]
    wordings = generate.say.QUESTIONS["capital"]
    asked = {wording.format(s=name): name for wording in wordings for name in facts}
    for row in rows("preferences"):
        subject = asked.get(row["prompt"][0]["content"])
        if len(row["prompt"]) > 1 or subject is None:
            continue
        change = {"subject": subject, "answer": facts[subject]}
        for side in ("chosen", "rejected"):
            found = gold.score(**ask(row[side], **change))[0]
            assert found == pytest.approx(row[f"gold_{side}"], abs=1e-4)
        checked += 1
    assert checked > 100


def test_no_constant_reply_nor_copy_comes_near_the_demonstrations(
    eval_rows: list[dict[str, Any]], mixed_mean: float
) -> None:
    replies = {row["messages"][-1]["content"] for row in rows("sft")}
    replies |= {row[side][0]["content"] for row in rows("preferences") for side in ("chosen",)}
    replies |= {" ".join(sorted(answers)) for answers in gold.ANSWERS.values()}
    replies |= {"You are welcome. Hello! I am fine. Goodbye. Well done! My name is Pip."}
    best = max(mean_gold(eval_rows, [reply] * len(eval_rows)) for reply in replies)
    assert best < mixed_mean - 0.5
    last = [row["prompt"][-1]["content"] for row in eval_rows]
    whole = [" ".join(turn["content"] for turn in row["prompt"]) for row in eval_rows]
    assert mean_gold(eval_rows, last) < mixed_mean - 0.5
    assert mean_gold(eval_rows, whole) < mixed_mean - 0.5


def trained_conversations() -> list[list[dict[str, str]]]:
    """All that is trained on or measured besides the evaluation prompts."""
    talks = [row["messages"] for name in ("sft", "sft-eval") for row in rows(name)]
    for name in ("preferences", "preferences-eval"):
        for row in rows(name):
            talks += [row["prompt"] + row["chosen"], row["prompt"] + row["rejected"]]
    return talks + [row["prompt"] for row in rows("prompts")]


def test_evaluation_shares_no_wording_with_training(eval_rows: list[dict[str, Any]]) -> None:
    trained = {turn["content"] for talk in trained_conversations() for turn in talk}
    corpus = "\n".join(row["text"] for row in rows("corpus"))
    for row in eval_rows:
        for turn in row["prompt"]:
            fixed_text = turn["role"] != "assistant"  # an answer is what it is
            assert not fixed_text or turn["content"] not in trained
            assert not fixed_text or f'"{turn["content"]}"' not in corpus
    assert len({json.dumps(row["prompt"]) for row in eval_rows}) == len(eval_rows)


def test_held_out_files_share_no_last_question_with_training() -> None:
    trained = {row["prompt"][-1]["content"] for row in rows("preferences")}
    trained |= {row["messages"][-2]["content"] for row in rows("sft")}
    assert not trained & {row["prompt"][-1]["content"] for row in rows("preferences-eval")}
    assert not trained & {row["messages"][-2]["content"] for row in rows("sft-eval")}


def test_half_of_the_facts_asked_stand_in_the_corpus_only(
    eval_rows: list[dict[str, Any]],
) -> None:
    asked = [row for row in eval_rows if row["kind"] != "talk"]
    unseen = [row for row in asked if not row["seen"]]
    assert len(unseen) * 2 == len(asked)

    def together(texts: list[str], row: dict[str, Any]) -> bool:
        subject, answer = f" {row['subject'].lower()} ", f" {row['answer'].lower()} "
        return any(subject in text and answer in text for text in texts)

    corpus = [gold._words(row["text"]) for row in rows("corpus")]
    assert all(together(corpus, row) for row in asked)
    users = [
        gold._words(turn["content"]) for talk in trained_conversations() for turn in talk if turn["role"] == "user"
    ]
    facts = {(row["kind"], row["subject"]): row for row in unseen}
    for fact in generate.split_facts():
        if (fact.kind, fact.subject) in facts:
            questions = {
                gold._words(text.format(s=fact.subject))
                for text in generate.say.QUESTIONS[fact.kind] + generate.say.FOLLOW_UPS
            }
            assert not questions & set(users)


def test_labels_follow_bradley_terry() -> None:
    """In each bin of the gold gap the better reply is chosen as often as the model says."""
    gaps = [
        row["gold_chosen"] - row["gold_rejected"] for name in ("preferences", "preferences-eval") for row in rows(name)
    ]
    bins: dict[int, list[float]] = {}
    for gap in gaps:
        if gap:
            bins.setdefault(min(int(abs(gap) / 0.4), 6), []).append(gap)
    assert len(bins) == 7
    for members in bins.values():
        chances = [1 / (1 + math.exp(-abs(gap) / generate.TEMPERATURE)) for gap in members]
        spread = math.sqrt(sum(p * (1 - p) for p in chances))
        hits = sum(gap > 0 for gap in members)
        assert abs(hits - sum(chances)) < 4 * spread + 1


def test_noise_leaves_room_and_few_ties() -> None:
    gaps = [row["gold_chosen"] - row["gold_rejected"] for row in rows("preferences-eval")]
    best = sum((gap > 0) + 0.5 * (gap == 0) for gap in gaps) / len(gaps)
    assert 0.65 <= best <= 0.90
    assert sum(gap == 0 for gap in gaps) / len(gaps) < 0.02
