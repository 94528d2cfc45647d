"""Tokenizers: loading, training one on a corpus, and fitting one to a chat template.

What `fit` guarantees, because each has silently ruined runs elsewhere: the template's special tokens are single ids;
the token that ends an assistant turn is the eos token of a conversational model; pad differs from eos.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from alignment.data import bounds, templates
from alignment.errors import ModelError
from alignment.pipeline.files import digest

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")  # any will do
END_OF_TEXT, PAD = "<|endoftext|>", "<|pad|>"


def load_tokenizer(path: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder or under a hub name; code of a model repository is never run."""
    if Path(path).is_dir() and not any((Path(path) / name).exists() for name in FILES):
        raise ModelError(f"{path}: no tokenizer in it ({FILES[0]})")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(own_code(path, error) or f"{path}: no usable tokenizer ({_first_line(error)})") from error
    if not tokenizer.is_fast:
        raise ModelError(f"{path}: its tokenizer has no fast version (tokenizer.json), which this toolkit needs")
    _require_bounded(tokenizer, str(path))
    return tokenizer


def _require_bounded(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Try a template that is not one of ours under limits, before it meets the data."""
    if tokenizer.chat_template and tokenizer.chat_template not in {named.jinja for named in templates.NAMED.values()}:
        special = {key: token for key, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        bounds.require_bounded(tokenizer.get_chat_template(), special, name)


def train_tokenizer(texts: Iterable[str], vocab_size: int, special_tokens: Iterable[str]) -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer of at most `vocab_size` ids, special ones included.

    Deterministic for the same texts in the same order. `special_tokens` (a chat template's) are reserved from the
    start, so that no later stage has to grow the embeddings.
    """
    special = [END_OF_TEXT, PAD, *(token for token in special_tokens if token not in (END_OF_TEXT, PAD))]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PAD, additional_special_tokens=special[2:]
    )


def fit(tokenizer: PreTrainedTokenizerBase, chat_template: str | None, *, conversational: bool) -> list[str]:
    """Give the tokenizer the recipe's template, in place; returns the tokens that had to be added.

    Args:
        chat_template: a named template, a `.jinja` file, or None for the tokenizer's own.
        conversational: the stage trains on or generates conversations, so the token that ends a turn becomes eos;
            a base model keeps its own.

    Raises:
        ModelError: a conversational stage and no template at all.
    """
    added: list[str] = []
    if chat_template is not None:
        named = templates.template(chat_template)
        tokenizer.chat_template = named.jinja
        _require_bounded(tokenizer, chat_template)
        added = _add_special_tokens(tokenizer, named.special_tokens)
        if conversational and named.stop is not None:
            tokenizer.eos_token = named.stop
    elif conversational and tokenizer.chat_template is None:
        raise ModelError("the tokenizer has no chat template: set `chat_template:` in the recipe (for instance chatml)")
    if tokenizer.pad_token is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        added += _choose_pad(tokenizer)
    return added


def _add_special_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> list[str]:
    """Make each token one special id; those that are new to the vocabulary are returned."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in tokens if token not in vocabulary]
    plain = [token for token in tokens if token not in tokenizer.all_special_tokens]
    if plain:
        tokenizer.add_special_tokens({"additional_special_tokens": plain}, replace_extra_special_tokens=False)
    return missing


def _choose_pad(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A pad token that is not eos: a reserved one of the vocabulary if there is one, else a new token."""
    vocabulary = tokenizer.get_vocab()
    candidates = (PAD, "<pad>", "[PAD]", "<|finetune_right_pad_id|>", "<|endoftext|>", "<unk>")
    for token in candidates:
        if token in vocabulary and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return []
    tokenizer.add_special_tokens({"pad_token": PAD})
    return [PAD]


def probe_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of a fixed conversation, or of plain text without a template: what tells two tokenizers apart."""
    if tokenizer.chat_template is not None:
        return list(templates.encode_messages(tokenizer, templates.PROBE).ids)
    return list(tokenizer("The capital of France is Paris.")["input_ids"])


def describe(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a manifest says of a tokenizer; `alignment verify` holds the files against it."""
    template = tokenizer.chat_template
    return {
        "sha256": templates.digest(tokenizer),
        "vocabulary_sha256": digest(tokenizer.get_vocab()),
        "vocab_size": len(tokenizer),
        "template_sha256": None if template is None else digest(template),
        "eos_ids": templates.stop_ids(tokenizer) if template else [tokenizer.eos_token_id],
        "pad_id": tokenizer.pad_token_id,
        "probe_ids": probe_ids(tokenizer),
    }


def own_code(path: str | Path, error: BaseException) -> str | None:
    """The line for a repository that needs Python of its own (`auto_map`); None for any other error."""
    if "trust_remote_code" not in str(error):
        return None
    return (
        f"{path}: needs Python code of its own repository (auto_map), which is never run; take a model whose "
        "architecture Transformers brings"
    )


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
