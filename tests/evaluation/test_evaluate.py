"""A whole evaluation of tiny models: every number recomputed from the samples that it leaves."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from alignment.errors import DataError
from alignment.evaluation import evaluate as module
from alignment.evaluation.evaluate import Contest, build, evaluate, labels
from alignment.evaluation.judges import Judge, JudgeError
from alignment.evaluation.metrics import bootstrap_interval
from alignment.models.load import load_policy, load_scorer
from alignment.recipe.schema import Sampling, Stage

PROMPTS = [
    {"prompt": [{"role": "user", "content": f"Tell me about the {word}."}], "word": word}
    for word in ("cat", "dog", "sun", "moon", "red", "blue", "river")
]
PAIRS = [
    {
        "prompt": [{"role": "user", "content": f"Tell me about the {word}."}],
        "chosen": [{"role": "assistant", "content": f"The {word} likes the queen."}],
        "rejected": [{"role": "assistant", "content": "No idea."}],
        "gold_chosen": gold, "gold_rejected": 1.0,
    }
    for word, gold in (("cat", 2.0), ("dog", 1.0), ("sun", 3.0), ("moon", 0.0))
]  # fmt: skip


def vowels(prompts: Any, completions: Any, **columns: Any) -> list[float]:
    return [float(sum(letter in "aeiou" for letter in reply[0]["content"])) for reply in completions]


def words(prompts: Any, completions: Any, word: Any, **columns: Any) -> list[float]:
    """Applies to words of three letters."""
    return [1.0 if len(one) == 3 else float("nan") for one in word]


GOLD, WORDS = Judge("gold", vowels, "judges.py:vowels"), Judge("words", words, "judges.py:words")


@pytest.fixture(scope="module")
def folders(tiny_policy: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A policy, a changed one, and a reward model."""
    root = tmp_path_factory.mktemp("models")
    model, tokenizer = load_policy(tiny_policy)
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    scorer, _ = load_scorer(tiny_policy, fresh_head=True)
    torch.nn.init.normal_(scorer.score.weight)
    for name, one in (("dpo", model), ("reward", scorer)):
        one.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    return {"sft": tiny_policy, "dpo": root / "dpo", "reward": root / "reward"}


@pytest.fixture
def contest(folders: dict[str, Path], tmp_path: Path) -> Callable[..., Contest]:
    def make(**changes: Any) -> Contest:
        given: dict[str, Any] = {
            "models": {"dpo": folders["dpo"], "sft": folders["sft"]}, "baseline": "sft", "prompts": PROMPTS,
            "output": tmp_path, "scorers": {"reward": folders["reward"]}, "judges": [GOLD, WORDS], "pairs": PAIRS,
            "sampling": Sampling(max_new_tokens=10), "batch": 3, "seed": 4,
        }  # fmt: skip
        return Contest(**{**given, **changes})

    return make


def silent(line: str) -> None:
    pass


def test_every_number_follows_from_the_samples(contest: Callable[..., Contest], tmp_path: Path) -> None:
    metrics = evaluate(contest(), silent)
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [sample["word"] for sample in samples] == [row["word"] for row in PROMPTS]
    gold = {name: [sample["replies"][name]["rewards"]["gold"] for sample in samples] for name in ("dpo", "sft")}
    won = [1.0 if a > b else 0.5 if a == b else 0.0 for a, b in zip(gold["dpo"], gold["sft"], strict=True)]
    assert metrics["gold/dpo"] == pytest.approx(np.mean(gold["dpo"]))
    assert metrics["win_rate/dpo"] == pytest.approx(np.mean(won))
    assert (metrics["win_rate_low/dpo"], metrics["win_rate_high/dpo"]) == bootstrap_interval(won, seed=4)
    assert (metrics["gold_low/sft"], metrics["gold_high/sft"]) == bootstrap_interval(gold["sft"], seed=4)
    assert metrics["kl/dpo"] == pytest.approx(np.mean([sample["replies"]["dpo"]["kl"] for sample in samples]))
    assert metrics["kl/dpo"] > 0
    assert metrics["length/dpo"] == np.mean([sample["replies"]["dpo"]["tokens"] for sample in samples])
    assert metrics["finished/dpo"] == np.mean([sample["replies"]["dpo"]["finished"] for sample in samples])
    assert metrics["words/dpo"] == 1.0  # the mean where it applies
    assert samples[3]["replies"]["dpo"]["rewards"]["words"] is None


def test_the_baseline_against_itself(contest: Callable[..., Contest]) -> None:
    metrics = evaluate(contest(), silent)
    assert (metrics["win_rate/sft"], metrics["win_rate_low/sft"], metrics["win_rate_high/sft"]) == (0.5, 0.5, 0.5)
    assert metrics["kl/sft"] == 0.0


def test_the_same_model_under_another_name_answers_alike(
    contest: Callable[..., Contest], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Same seeds: a difference between models is never one of the draw."""
    metrics = evaluate(contest(models={"sft": folders["sft"], "twin": folders["sft"]}), silent)
    assert metrics["win_rate/twin"] == 0.5
    assert metrics["kl/twin"] == 0.0
    for line in (tmp_path / "samples.jsonl").read_text().splitlines():
        replies = json.loads(line)["replies"]
        assert replies["twin"] == replies["sft"]


def test_two_runs_give_the_same_files(contest: Callable[..., Contest], tmp_path: Path) -> None:
    first = evaluate(contest(), silent), (tmp_path / "samples.jsonl").read_text(), (tmp_path / "report.md").read_text()
    again = evaluate(contest(), silent), (tmp_path / "samples.jsonl").read_text(), (tmp_path / "report.md").read_text()
    assert again == first


def test_reward_model_accuracy_beside_the_best_possible(
    contest: Callable[..., Contest], folders: dict[str, Path]
) -> None:
    metrics = evaluate(contest(), silent)
    scorer, tokenizer = load_scorer(folders["reward"])
    right = []
    for row in PAIRS:
        chosen, rejected = (
            tokenizer.apply_chat_template([*row["prompt"], *row[side]], tokenize=False).removesuffix("\n")
            for side in ("chosen", "rejected")
        )
        with torch.no_grad():
            scores = [scorer(**tokenizer(text, return_tensors="pt")).logits.item() for text in (chosen, rejected)]
        right.append(float(scores[0] > scores[1]))
    assert metrics["accuracy/reward"] == np.mean(right)
    assert metrics["accuracy_low/reward"] <= metrics["accuracy/reward"] <= metrics["accuracy_high/reward"]
    assert metrics["accuracy/best_possible"] == (1 + 0.5 + 1 + 0) / 4  # from the columns, ties half


def test_without_columns_the_judge_says_what_is_best_possible(contest: Callable[..., Contest]) -> None:
    pairs = [{key: value for key, value in row.items() if not key.startswith("gold")} for row in PAIRS]
    assert evaluate(contest(pairs=pairs, judges=[GOLD]), silent)["accuracy/best_possible"] == 1.0


def test_the_table_is_aligned_and_holds_the_same_numbers(contest: Callable[..., Contest], tmp_path: Path) -> None:
    said: list[str] = []
    metrics = evaluate(contest(), said.append)
    header = next(index for index, line in enumerate(said) if line.startswith("model"))
    assert said[header].split("  ")[0] == "model"
    columns = "gold 95 % interval win rate 95 % interval KL to sft words length finished".split()
    assert said[header].split()[1:] == columns
    dpo = said[header + 1]
    assert len(dpo) == len(said[header]) == len(said[header + 2])
    for text in (
        f"{metrics['gold/dpo']:.3f}", f"{100 * metrics['win_rate/dpo']:.1f} %", f"{metrics['kl/dpo']:.2f}",
        f"[{100 * metrics['win_rate_low/dpo']:.1f}, {100 * metrics['win_rate_high/dpo']:.1f}]",
        f"{metrics['length/dpo']:.1f}",
    ):  # fmt: skip
        assert text in dpo
        assert text in (tmp_path / "report.md").read_text()
    assert max(len(line) for line in said) <= 100


def test_five_conversations_are_drawn_by_seed(contest: Callable[..., Contest], tmp_path: Path) -> None:
    said: list[str] = []
    evaluate(contest(), said.append)
    assert "5 of 7 prompts, drawn with seed 4:" in said
    titles = [line.strip("- ") for line in said if line.startswith("-- prompt")]
    expected = sorted(np.random.default_rng(4).permutation(7)[:5])
    assert titles == [f"prompt {index + 1}" for index in expected]
    page = (tmp_path / "report.md").read_text()
    assert page.count("### Prompt") == 5
    assert all(PROMPTS[index]["prompt"][0]["content"] in page for index in expected)


def test_without_judge_scorer_and_baseline_the_rest_is_still_measured(contest: Callable[..., Contest]) -> None:
    metrics = evaluate(contest(judges=[], scorers={}, pairs=[], baseline=None), silent)
    assert set(metrics) == {"length/dpo", "finished/dpo", "length/sft", "finished/sft"}


def test_another_vocabulary_has_no_kl(
    contest: Callable[..., Contest], folders: dict[str, Path], tmp_path: Path
) -> None:
    model, tokenizer = load_policy(folders["dpo"])
    tokenizer.add_tokens(["extra"])
    model.save_pretrained(tmp_path / "grown")
    tokenizer.save_pretrained(tmp_path / "grown")
    said: list[str] = []
    metrics = evaluate(contest(models={"sft": folders["sft"], "grown": tmp_path / "grown"}), said.append)
    assert math.isnan(metrics["kl/grown"])
    assert "grown: no KL, because its vocabulary differs from that of sft" in said


def test_a_failing_judge_stops_before_any_model_is_loaded(
    contest: Callable[..., Contest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_policy", lambda *args, **options: pytest.fail("a model was loaded"))
    judge = Judge("gold", lambda **given: [given["no_such_column"]], "judges.py:gold")
    with pytest.raises(JudgeError, match=r"judges.py:gold failed on row 1 .*KeyError: 'no_such_column'"):
        evaluate(contest(judges=[judge]), silent)


def test_reward_columns_that_are_no_numbers_are_refused(contest: Callable[..., Contest]) -> None:
    pairs = [row | {"gold_chosen": "high"} for row in PAIRS]
    with pytest.raises(DataError, match="pairs: gold_chosen and gold_rejected must be numbers"):
        evaluate(contest(pairs=pairs), silent)


# -- from the recipe ---------------------------------------------------------------------------------------------------


def context(stage: dict[str, Any], folders: dict[str, Path], output: Path, say: Callable[[str], None]) -> Any:
    """What the worker gives."""
    config = Stage.model_validate({"algorithm": "evaluate", "seed": 4, **stage})
    spec = SimpleNamespace(config=config, stage="evaluate", output=output)
    path_of = lambda link: folders.get(link.removeprefix("stage:")) or Path(link)  # noqa: E731
    return SimpleNamespace(spec=spec, say=say, compute=torch.float32, path_of=path_of)


def test_from_the_recipe_to_the_metrics(
    folders: dict[str, Path], tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    (tmp_path / "gold.py").write_text("def score(prompts, completions, **columns):\n    return [1.0] * len(prompts)\n")
    stage = {
        "models": ["stage:dpo"], "baseline": "stage:sft", "scorers": ["stage:reward"],
        "rewards": [{"function": f"{tmp_path}/gold.py:score", "name": "gold"}],
        "prompts": [{"path": str(tmp_path / "prompts.jsonl")}], "pairs": [{"path": str(tmp_path / "pairs.jsonl")}],
        "sampling": {"temperature": 1.0, "max_new_tokens": 6}, "batch": {"per_device": 4},
    }  # fmt: skip
    metrics = build(context(stage, folders, tmp_path, silent))()
    assert metrics["gold/dpo"] == 1.0
    assert metrics["win_rate/dpo"] == 0.5
    assert metrics["accuracy/best_possible"] == 0.625
    assert {"kl/dpo", "length/sft", "accuracy/reward"} <= set(metrics)  # the baseline answers, though not in `models`


def test_pairs_alone_are_enough_for_a_reward_model(
    folders: dict[str, Path], tmp_path: Path, write_jsonl: Callable[..., Path]
) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", PAIRS)
    stage = {"scorers": ["stage:reward"], "pairs": [{"path": str(tmp_path / "pairs.jsonl")}]}
    metrics = build(context(stage, folders, tmp_path, silent))()
    assert set(metrics) == {"accuracy/reward", "accuracy_low/reward", "accuracy_high/reward"}
    assert (tmp_path / "samples.jsonl").read_text() == ""


def test_prompts_without_room_for_a_reply_are_dropped_and_counted(contest: Callable[..., Contest]) -> None:
    said: list[str] = []
    long = {"prompt": [{"role": "user", "content": "word " * 200}], "word": "cat"}
    one = contest(prompts=[*PROMPTS, long])
    metrics = evaluate(one, said.append)
    assert "prompts: dropped 1 of 8: overlong (more than 246 tokens)" in said  # 256 positions, 10 new tokens
    assert metrics == evaluate(contest(), silent)
    with pytest.raises(DataError, match="none of 1 has at most 246 tokens"):
        evaluate(contest(prompts=[long]), silent)


def test_labels_are_as_short_as_tells_them_apart() -> None:
    assert labels(["stage:sft", "stage:dpo"]) == {"stage:sft": "sft", "stage:dpo": "dpo"}
    assert labels(["runs/a/dpo", "runs/b/dpo"]) == {"runs/a/dpo": "a-dpo", "runs/b/dpo": "b-dpo"}
    assert labels(["stage:dpo", f"org/chat@{'0' * 40}"]) == {"stage:dpo": "dpo", f"org/chat@{'0' * 40}": "chat"}
    assert labels(["stage:dpo", "dpo"]) == {"stage:dpo": "stage:dpo", "dpo": "dpo"}
