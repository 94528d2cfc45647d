"""Chat templates: the ones we bring, how conversations become tokens, and the proof of which tokens are trained.

`Dialect` (dialect.py) renders a conversation and finds the spans of the assistant's turns in the text; `tokenize` and
`trained_tokens` carry them over to tokens. Training tables, generation and evaluation all go through here, so that a
model sees at inference what it was trained on.

Everything is tokenized with `add_special_tokens=False`: a template writes the tokens it wants, BOS included, once.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from alignment.data.checks import Defect, Message
from alignment.data.dialect import Dialect, Span, Tools
from alignment.errors import DataError


@dataclass(frozen=True)
class NamedTemplate:
    """A chat template, the tokens a tokenizer must have for it, and the one that ends an answer (None: its EOS)."""

    jinja: str
    special_tokens: tuple[str, ...] = ()
    stop: str | None = None


CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}
    {%- else %}
        {{- message['content'] + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
ZEPHYR = """\
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}{{- '\\n' }}
    {%- else %}
        {{- message['content'] + eos_token + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""
LLAMA_3 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|eot_id|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|eot_id|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""
PLAIN = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- message['content'] }}
    {%- elif message['role'] == 'assistant' %}
        {{- '\\n\\nAssistant:' }}{%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- '\\n\\nUser: ' + message['content'] }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '\\n\\nAssistant:' }}
{%- endif %}
"""
NAMED: dict[str, NamedTemplate] = {
    "chatml": NamedTemplate(CHATML, ("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "zephyr": NamedTemplate(ZEPHYR),  # as in the original, the role marks are ordinary text
    "llama-3": NamedTemplate(LLAMA_3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
    "plain": NamedTemplate(PLAIN),  # no new tokens
}
# A fixed conversation: two tokenizers that give the same ids for it speak the same dialect.
PROBE: list[Message] = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "And 3 + 3?"},
]
BOUNDARY = 8  # tokens before the end of a prompt within which an answer may change how the prompt is tokenized


def template(name_or_path: str) -> NamedTemplate:
    """The template of that name, or of that file.

    Raises:
        DataError: neither a known name nor a readable file.
    """
    if name_or_path in NAMED:
        return NAMED[name_or_path]
    try:
        return NamedTemplate(Path(name_or_path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        near = difflib.get_close_matches(name_or_path, NAMED, 1)
        hint = f" (did you mean {near[0]}?)" if near else f"; named templates are {', '.join(NAMED)}"
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise DataError(f"chat_template: {name_or_path!r} is no named template and no file: {reason}{hint}") from None


# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Encoded:
    """The token ids of a conversation, and for each whether it is trained."""

    ids: list[int]
    trained: list[bool]


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> Iterator[Any]:
    """One `tokenizers.Encoding` (`ids`, `char_to_token`) per text, in one call of the fast tokenizer.

    Raises:
        DataError: the tokenizer is a slow one, which does not know which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise DataError(f"{tokenizer.name_or_path}: a slow tokenizer; a fast one (tokenizer.json) is needed")
    if not texts:
        return
    # `verbose` would warn of texts longer than the model: they are counted by the caller.
    batch = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False)
    yield from batch.encodings


def trained_tokens(encoding: Any, text: str, spans: Sequence[Span]) -> list[Span]:
    """Token spans [start, end) that cover the character spans."""

    def token_at(position: int) -> int:
        # Some characters belong to no token (white space beside a special token): the next one counts.
        for char in range(position, len(text)):
            token = encoding.char_to_token(char)
            if token is not None:
                return int(token)
        return len(encoding.ids)

    return [(token_at(start), token_at(end)) for start, end in spans]


def split(prompt_ids: Sequence[int], *whole: Sequence[int]) -> int:
    """The length of the prompt within one or more sequences of prompt and answer.

    It is the whole prompt where that is a prefix of all of them. Where tokens merge across the boundary, or the
    template writes another header before a given answer, the prompt ends where the first of them diverges.

    Raises:
        Defect: the sequences diverge long before the prompt ends.
    """
    common = len(prompt_ids)
    for ids in whole:
        if list(ids[:common]) != list(prompt_ids[:common]):
            pairs = zip(prompt_ids[:common], ids, strict=False)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), min(common, len(ids)))
    if len(prompt_ids) - common > BOUNDARY:
        raise Defect("prompt-not-prefix", f"they differ at token {common} of {len(prompt_ids)}")
    return common


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    tools: Tools = None,
) -> str:
    """A conversation as text; with `add_generation_prompt`, ready for the model to answer."""
    return Dialect.of(tokenizer).text(messages, tools, add_generation_prompt)


def encode_prompt(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools = None) -> list[int]:
    """The token ids after which the model answers."""
    return next(tokenize(tokenizer, [Dialect.of(tokenizer).text(messages, tools, True)])).ids


def encode_messages(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Tools = None) -> Encoded:
    """The token ids of a conversation up to its last stop token; the assistant's turns are the trained ones."""
    text, spans = Dialect.of(tokenizer).render(messages, tools)
    encoding = next(tokenize(tokenizer, [text]))
    trained = [False] * len(encoding.ids)
    for start, end in trained_tokens(encoding, text, spans):
        trained[start:end] = [True] * (end - start)
    return Encoded(encoding.ids, trained)


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Sequence[Message],
    completion: Sequence[Message],
    tools: Tools = None,
) -> tuple[list[int], list[int]]:
    """The token ids of a prompt and of its answer, stop token included; see `split` for where they part."""
    dialect = Dialect.of(tokenizer)
    whole = dialect.render([*prompt, *completion], tools)[0]
    prompt_ids, ids = (found.ids for found in tokenize(tokenizer, [dialect.text(prompt, tools, True), whole]))
    at = split(prompt_ids, ids)
    return ids[:at], ids[at:]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Every token id that ends an answer: the template's stop token and the tokenizer's EOS, sorted."""
    dialect = Dialect.of(tokenizer)
    tokens = {token for token in (dialect.stop, tokenizer.eos_token) if token in dialect.tokens}
    return sorted(tokenizer.convert_tokens_to_ids(token) for token in tokens)


def digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 of all that decides the token ids: vocabulary, merges, normalisation, special tokens, template."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state = {key: value for key, value in state.items() if key not in ("padding", "truncation")}  # set by mere use
    parts = [state, tokenizer.special_tokens_map, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()
