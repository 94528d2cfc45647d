"""Tiny tokenizers, trained on a few lines, and writers of small data files."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from alignment.data import templates
from alignment.recipe.schema import Stage

sys.path.insert(0, str(Path(__file__).parent))  # where the tests find made_rows.py

CORPUS = [
    "What is the capital of France? The capital of France is Paris.",
    "Human and assistant speak: user, assistant, system. Yes, no, perhaps; one two three four.",
    "A story of a fox and a hen. The fox said good day, and the hen said good night.",
]


def make_tokenizer(template: str | None = "chatml", *, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of some 330 ids with the tokens that the named template needs."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["<s>", "</s>", "<pad>"], initial_alphabet=alphabet)
    backend.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>" if bos else None, eos_token="</s>", pad_token="<pad>"
    )
    if template is not None:
        named = templates.NAMED[template]
        tokens = [AddedToken(token, special=True, normalized=False) for token in named.special_tokens]
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.chat_template = named.jinja
    return tokenizer


@pytest.fixture(scope="session")
def build_tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return make_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer("chatml")


@pytest.fixture
def lines(tmp_path: Path) -> Callable[..., Path]:
    """Write rows, or raw lines, as a JSONL file."""

    def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    return write


@pytest.fixture(scope="session")
def stage() -> Callable[..., Stage]:
    """A resolved stage that trains on the given files and lets any share of their rows be dropped, repeated or cut."""

    def make(*train: Path | dict[str, Any], limit: float = 1.0, **data: Any) -> Stage:
        sources = [source if isinstance(source, dict) else {"path": str(source)} for source in train]
        limits = {"dropped": limit, "duplicate": None, "leak": None, "unstopped": None}
        section = {"train": sources, "limits": limits, **data}
        return Stage.model_validate({"algorithm": "sft", "seed": 7, "data": section})

    return make
