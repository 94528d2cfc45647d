"""Talk to a trained model in the terminal: `alignment chat runs/x/dpo`.

The conversation is written in the template that the model was trained with, and a reply ends where the template ends
an answer. Without a terminal, each line of the input is one turn.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

import torch
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import TextStreamer

from alignment.data import templates
from alignment.data.dialect import Dialect
from alignment.errors import DataError, ModelError
from alignment.models.generation import Policy, draw, placed, positions
from alignment.models.load import compute_dtype, load_policy
from alignment.recipe.schema import Sampling
from alignment.serving.kind import kind_of

HELP = "/reset forgets the conversation, /system TEXT sets the system message and starts anew, /quit leaves"
Message = dict[str, str]


@dataclass
class Conversation:
    """The turns so far, and the system message before them."""

    system: str | None = None
    turns: list[Message] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """All turns, as the template takes them."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return [*head, *self.turns]


@dataclass(frozen=True)
class Speaker:
    """A loaded model and how it answers; `room` is the number of tokens it can read, None if without limit."""

    model: Policy
    tokenizer: PreTrainedTokenizerBase
    sampling: Sampling
    stops: Collection[int]
    room: int | None


def chat(
    path: Path,
    *,
    system: str | None = None,
    temperature: float = 0.7,
    top_p: float = 1.0,
    max_new_tokens: int = 256,
    seed: int | None = None,
) -> int:
    """Talk to the model in `path` until /quit, the end of the input, or Ctrl-C; returns the exit code.

    Ctrl-C while the model answers stops the answer only.

    Raises:
        ModelError: `path` holds no causal LM, or its tokenizer has no chat template.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens)
    speaker = _load(path, sampling)
    if seed is not None:
        torch.manual_seed(seed)
    conversation = Conversation(system)
    terminal = sys.stdin.isatty()
    if terminal:
        print(f"{path}: {HELP}")
    with suppress(KeyboardInterrupt):
        for line in _lines("> " if terminal else ""):
            if line.startswith("/"):
                if not _command(line, conversation):
                    return 0
            elif line.strip():
                _exchange(speaker, conversation, line, sys.stdout)
    if terminal:
        print()
    return 0


def _load(path: Path, sampling: Sampling) -> Speaker:
    if kind_of(path) != "causal-lm":
        raise ModelError(f"{path}: a reward model, which scores answers and gives none; chat needs a causal LM")
    model, tokenizer = load_policy(path, dtype=compute_dtype("auto"))
    if tokenizer.chat_template is None:
        raise ModelError(f"{path}: its tokenizer has no chat template, so it was not trained to converse")
    return Speaker(placed(model), tokenizer, sampling, templates.stop_ids(tokenizer), positions(model))


def _lines(question: str) -> Iterator[str]:
    """What the user types, line by line, until the input ends."""
    with suppress(EOFError):
        while True:
            yield input(question)


def _command(line: str, conversation: Conversation) -> bool:
    """Carry out a /command; False to leave."""
    name, _, rest = line.strip().partition(" ")
    if name in ("/quit", "/exit"):
        return False
    if name == "/reset":
        conversation.turns.clear()
        print("(forgotten)")
    elif name == "/system" and rest.strip():
        conversation.system = rest.strip()
        conversation.turns.clear()
        print("(system message set, conversation started anew)")
    elif name == "/system":
        print(f"({conversation.system or 'no system message'})")
    else:
        print(f"({HELP})")
    return True


def _exchange(speaker: Speaker, conversation: Conversation, text: str, out: TextIO) -> None:
    """One turn of the user and the model's answer; a turn that cannot be answered is taken back."""
    conversation.turns.append({"role": "user", "content": text})
    try:
        given = [message for message in conversation.messages if message["role"] != "assistant"]
        Dialect.of(speaker.tokenizer).check_content(given)
        prompt = _fit(speaker, conversation, out)
    except DataError as error:
        print(f"(refused: {error})", file=out)
        prompt = None
    if prompt is None:
        conversation.turns.pop()
        return
    reply = _reply(speaker, prompt, out)
    if reply.strip():
        conversation.turns.append({"role": "assistant", "content": reply})
    else:
        print("(no answer: this turn is forgotten)", file=out)
        conversation.turns.pop()


def _fit(speaker: Speaker, conversation: Conversation, out: TextIO) -> list[int] | None:
    """The ids to answer, the oldest turns dropped until an answer has room; None if the last turn alone is too long."""
    needed, turns, count = _needed(speaker), conversation.turns, 0
    for dropped in range(0, len(turns), 2):  # a question and its answer at a time
        messages = Conversation(conversation.system, turns[dropped:]).messages
        ids = templates.encode_prompt(speaker.tokenizer, messages)
        count = len(ids)
        if speaker.room is None or count + needed <= speaker.room:
            if dropped:
                print(f"(the context is full: the oldest {dropped} turns were dropped)", file=out)
                del turns[:dropped]
            return ids
    limit = f"the model reads {speaker.room}, of which {needed} are kept for the answer"
    print(f"(refused: {count} tokens are too many; {limit})", file=out)
    return None


def _needed(speaker: Speaker) -> int:
    """Tokens that are kept for an answer: all it may take, but at most half of what the model can read."""
    most = speaker.sampling.max_new_tokens
    return most if speaker.room is None else min(most, speaker.room // 2)


def _reply(speaker: Speaker, prompt: list[int], out: TextIO) -> str:
    """Stream the answer to `out`; returns its text, cut where Ctrl-C came."""
    printer = _Printer(speaker.tokenizer, out)
    sampling = speaker.sampling.model_copy(update={"max_new_tokens": _needed(speaker)})
    try:
        draw(speaker.model, speaker.tokenizer, [prompt], sampling, speaker.stops, streamer=printer)
    except KeyboardInterrupt:
        printer.end()
        print("(stopped)", file=out)
    return "".join(printer.said)


class _Printer(TextStreamer):
    """Prints words as they are complete, and remembers them. `generate` calls it in this thread, so Ctrl-C works."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, out: TextIO):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.out = out
        self.said: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> Any:
        """Called by Transformers with each piece of text."""
        self.said.append(text)
        print(text, end="\n" if stream_end else "", file=self.out, flush=True)
