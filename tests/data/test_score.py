"""`alignment data score`: the loss of a model on each row, and pruning by it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from alignment import cli
from alignment.data.loading import Loading, load
from alignment.data.templates import encode_completion, encode_messages
from alignment.inspecting import Tokenizers
from alignment.recipe.load import load_recipe, resolve
from alignment.recipe.schema import DataLimits

Lines = Callable[..., Path]
TALKS = [
    {"messages": [{"role": "user", "content": f"Question {index}?"}, {"role": "assistant", "content": text}]}
    for index, text in enumerate(["It is 4.", "zebra qwxyz kjh vvv", "Yes, it is, and it is so for long now.", "No"])
]
PAIRS = [
    {"prompt": "Q?", "chosen": text, "rejected": other} for text, other in (("Yes.", "xq zzj kw"), ("qq jj", "No."))
]


@pytest.fixture
def recipe(tmp_path: Path, tiny_policy: Path) -> Callable[..., Path]:
    def write(train: Path, algorithm: str, data: str = "") -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"name: x\nchat_template: chatml\nmodel: {tiny_policy}\nstages:\n  it:\n    algorithm: {algorithm}\n"
            f"    data: {{train: [{{path: {train}}}], on_overlong: truncate_right{data}}}\n"
        )
        return path

    return write


@pytest.fixture
def score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    def run(recipe: Path, *words: str) -> Any:
        out = tmp_path / "scored.jsonl"
        out.unlink(missing_ok=True)
        code = cli.main(["data", "score", str(recipe), str(out), "--stage", "it", "--runs", str(tmp_path / "runs"),
                         *words])  # fmt: skip
        if code:
            return code, capsys.readouterr().err
        return code, [json.loads(line) for line in out.read_text().splitlines()]

    return run


def tokenizer_of(recipe: Path) -> PreTrainedTokenizerFast:
    return Tokenizers(load_recipe(recipe)).of("it")  # type: ignore[return-value]


def test_the_loss_of_a_conversation_is_that_of_transformers(
    lines: Lines, recipe: Any, score: Any, tiny_policy: Path
) -> None:
    path = recipe(lines(TALKS), "sft")
    code, rows = score(path)
    assert code == 0
    assert [row["messages"] for row in rows] == [row["messages"] for row in TALKS]
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32).eval()
    for row in rows:
        encoded = encode_messages(tokenizer_of(path), row["messages"])
        labels = [token if trained else -100 for token, trained in zip(encoded.ids, encoded.trained, strict=True)]
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([encoded.ids]), labels=torch.tensor([labels])).loss
        assert row["loss"] == pytest.approx(loss.item(), abs=1e-5)


def test_the_loss_of_a_pair(lines: Lines, recipe: Any, score: Any, tiny_policy: Path) -> None:
    path = recipe(lines(PAIRS), "dpo")
    code, rows = score(path)
    assert code == 0
    model = AutoModelForCausalLM.from_pretrained(tiny_policy, dtype=torch.float32).eval()
    for row in rows:
        means = []
        for name in ("chosen", "rejected"):
            prompt, answer = encode_completion(tokenizer_of(path), row["prompt"], row[name])
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
            at = [len(prompt) - 1 + step for step in range(len(answer))]
            means.append(logits[at, answer].mean().item())
        assert (row["loss_chosen"], row["loss_rejected"]) == pytest.approx((-means[0], -means[1]), abs=1e-5)
        assert row["loss"] == pytest.approx(-math.log(1 / (1 + math.exp(means[1] - means[0]))), abs=1e-5)


def test_what_was_scored_can_be_pruned(lines: Lines, recipe: Any, score: Any, tmp_path: Path) -> None:
    _, rows = score(recipe(lines(TALKS), "sft"))
    by_loss = sorted(range(4), key=lambda index: rows[index]["loss"])
    pruned = recipe(tmp_path / "scored.jsonl", "sft", ", prune: {by: loss, keep: 0.5, side: middle}")
    stage = resolve(load_recipe(pruned), "it")
    assert stage.data is not None
    how = Loading("messages", 1, False, DataLimits(), lambda text: None, stage.data)
    found, (account,) = load(stage.data.train, how)
    assert [one.row["messages"] for one in found] == [TALKS[index]["messages"] for index in sorted(by_loss[1:3])]
    assert account.dropped == {"pruned": 2}


def test_what_cannot_be_scored(lines: Lines, recipe: Any, score: Any, tmp_path: Path) -> None:
    code, text = score(recipe(lines([{"prompt": "a"}]), "ppo"))
    assert code == 2
    path = tmp_path / "chain.yaml"
    path.write_text(
        f"name: x\nchat_template: chatml\nstages:\n  first: {{algorithm: sft, model: {tmp_path}, "
        f"data: {{train: [{{path: {lines(TALKS)}}}]}}}}\n  it: {{algorithm: sft, model: 'stage:first', "
        f"data: {{train: [{{path: {lines(TALKS)}}}]}}}}\n"
    )
    code, text = score(path)
    assert (code, text.count("\n")) == (2, 1)
    code, text = score(recipe(lines(TALKS), "sft", ", prune: {by: loss, keep: 0.5}"))
    assert code == 0, "the number is what is wanted, so prune waits for it"
