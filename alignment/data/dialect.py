"""What a tokenizer and its chat template do together: rendering, and the proof of which text is the assistant's.

A `Dialect` renders conversations (in Jinja's sandbox, by Transformers) and finds the spans of the assistant's turns in
the rendered text. Templates with `{% generation %}` blocks mark them; for the others they are proved: once by
reassembly (the text is exactly the contents within the template's fixed pieces), and where a template's output depends
on the contents, from the prompt of each turn. A dialect also knows how an answer ends, whether a system turn is
written, and which strings would forge a turn.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from alignment.data.checks import Defect, Message, strings

Span = tuple[int, int]
Tools = list[dict[str, Any]] | None

# For a tokenizer without a template: prompt, answer, EOS, and nothing else (BOS if it sets one itself).
BARE = """\
{%- if messages|length > 2 or messages[0]['role'] != 'user' %}
    {{- raise_exception('the tokenizer has no chat template and this row is a conversation; set chat_template') }}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + eos_token }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] }}
    {%- endif %}
{%- endfor %}
"""

# What control strings look like where the tokenizer does not know them as special tokens.
CONTROL = re.compile(r"<\|[^|<>\n]{1,40}\|>|<｜[^｜<>\n]{1,40}｜>|\[/?[A-Z_]{3,}\]|</?s>|<<?/?SYS>>?|<\w+_of_\w+>")
# What a template does with a row it cannot take: its own raise_exception, and plain Python errors inside Jinja.
TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
ROUNDS = 4  # of breaking control strings: what is left after them is refused
START, END = "\ue000", "\ue001"  # private-use characters, which no template knows
MARK = re.compile(f"{START}\\d+{END}")


@dataclass(frozen=True)
class Skeleton:
    """What a template writes around the contents of a conversation with given roles."""

    order: tuple[int, ...]  # indices of the messages, as they stand in the text
    pieces: tuple[str, ...]  # one before each content, and one after the last
    leads: tuple[int, ...]  # characters at the end of each piece that belong to the answer after it
    tails: tuple[int, ...]  # characters at the start of the next piece up to the end of the stop token


@dataclass(frozen=True)
class Dialect:
    """What one tokenizer and its chat template do together.

    Attributes:
        jinja: the template.
        special: names and strings of the special tokens that the template may write (`bos_token`, ...).
        tokens: every special token, added ones included.
    """

    jinja: str
    special: tuple[tuple[str, str], ...]
    tokens: tuple[str, ...]
    _skeletons: dict[tuple[str, ...], Skeleton | None] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> Dialect:
        """The dialect of a tokenizer; without a chat template, the bare `prompt + answer + EOS`."""
        special = {name: token for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)}
        known = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        # A configuration may name a token that the vocabulary lacks: it has the id of the unknown token, or none.
        unknown = (None, tokenizer.unk_token_id)
        known |= {name for name in special.values() if tokenizer.convert_tokens_to_ids(name) not in unknown}
        if tokenizer.chat_template:
            jinja = tokenizer.get_chat_template()
        else:
            jinja = "{{- bos_token }}" + BARE if sets_bos(tokenizer) else BARE
        return _dialect(jinja, tuple(sorted(special.items())), tuple(sorted(known)))

    # --- rendering ---

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Messages as the template takes them.

        Where it does not know `tool_calls`, a call is written as its JSON. Where it writes calls only beside a content
        that is null (DeepSeek's), an empty content becomes that.
        """
        if not any(message.get("tool_calls") for message in messages):
            return list(messages)
        if "tool_calls" in self.jinja:
            if not self._null_content:
                return list(messages)
            return [
                {**message, "content": None} if message.get("tool_calls") and not message["content"] else message
                for message in messages
            ]
        adapted = []
        for message in messages:
            if calls := message.get("tool_calls"):
                functions = [call.get("function", call) for call in calls]
                written = json.dumps(functions[0] if len(functions) == 1 else functions, ensure_ascii=False)
                text = "\n".join(part for part in (message["content"], written) if part)
                message = {key: value for key, value in message.items() if key != "tool_calls"} | {"content": text}
            adapted.append(message)
        return adapted

    def _render(
        self, messages: Sequence[Message], tools: Tools, generation_prompt: bool, track: bool = False
    ) -> tuple[str, list[Span]]:
        try:
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=tools,
                chat_template=self.jinja,
                return_assistant_tokens_mask=track,
                add_generation_prompt=generation_prompt,
                **dict(self.special),
            )
        except TEMPLATE_ERRORS as error:
            raise Defect("template-refused", str(error)) from None
        return texts[0], list(spans[0]) if track else []

    def text(self, messages: Sequence[Message], tools: Tools = None, generation_prompt: bool = False) -> str:
        """A conversation as text; with `generation_prompt`, the text after which the model answers."""
        return self._render(self.messages(messages), tools, generation_prompt)[0]

    def render(self, messages: Sequence[Message], tools: Tools = None) -> tuple[str, list[Span]]:
        """A whole conversation as text, up to its last answer, and the character spans of the assistant's turns.

        A span runs from where the prompt of that turn ends, which is where the model starts to write at inference,
        through the stop token. Text that the template writes after the last stop token is cut.

        Raises:
            Defect: the template fails on this row, or changes an answer beyond recognition.
        """
        messages = self.messages(messages)
        text, spans = self._render(messages, tools, False, track=self._tracks)
        if self._tracks:
            spans = [(start, self._through_stop(text, end)) for start, end in spans]
        else:
            plain = not tools and not any(message.get("tool_calls") for message in messages)
            spans = (self._by_skeleton(text, messages) if plain else None) or self._by_prefix(text, messages, tools)
        answers = [message["content"] or "" for message in messages if message["role"] == "assistant"]
        if len(spans) != len(answers) or any(
            answer.rpartition("</think>")[2].strip() not in text[start:end]  # thoughts may be left out or moved
            for answer, (start, end) in zip(answers, spans, strict=False)
        ):
            raise Defect("answer-not-found")
        return text[: spans[-1][1]] if spans else text, spans

    @cached_property
    def _tracks(self) -> bool:
        """Whether the template marks the assistant's turns itself."""
        return re.search(r"\{%-?\s*generation", self.jinja) is not None

    def _through_stop(self, text: str, end: int) -> int:
        """The end of the stop token that follows at `end`, if one does; some templates mark the content alone."""
        if self.stop and not text.endswith(self.stop, 0, end):
            after = end + len(text[end:]) - len(text[end:].lstrip())
            if text.startswith(self.stop, after):
                return after + len(self.stop)
        return end

    # --- spans, where the template does not mark them ---

    def _by_skeleton(self, text: str, messages: Sequence[Message]) -> list[Span] | None:
        """Spans proved by reassembly: the text is exactly the contents within the template's fixed pieces."""
        roles = tuple(message["role"] for message in messages)
        if roles not in self._skeletons:
            self._skeletons[roles] = self._skeleton(roles)
        skeleton = self._skeletons[roles]
        if skeleton is None or not text.startswith(skeleton.pieces[0]):
            return None
        spans, at = [], len(skeleton.pieces[0])
        for place, index in enumerate(skeleton.order):
            following, content = skeleton.pieces[place + 1], messages[index]["content"]
            for written in (content, content.strip()):
                end = at + len(written)
                if text.startswith(written, at) and text.startswith(following, end):
                    break
            else:
                return None
            if roles[index] == "assistant":
                spans.append((at - skeleton.leads[place], end + skeleton.tails[place]))
            at = end + len(following)
        return spans if at == len(text) else None

    def _skeleton(self, roles: tuple[str, ...]) -> Skeleton | None:
        """What the template writes around contents of these roles; None if it does not write each of them once."""
        marks = _marked(roles)
        text = self._probe(*roles) or ""
        contents = [mark["content"] for mark in marks]
        found = MARK.findall(text)
        if sorted(found) != sorted(contents):
            return None
        order = tuple(contents.index(mark) for mark in found)  # some templates write the system turn late
        pieces, leads, tails, at = MARK.split(text), [], [], 0
        for place, index in enumerate(order):
            at += len(pieces[place])
            lead = tail = 0
            if roles[index] == "assistant":
                lead = at - _common(self._render(marks[:index], None, True)[0], text)
                lead = lead if lead <= len(pieces[place]) else 0
                stop = pieces[place + 1].find(self.stop) if self.stop else -1
                tail = stop + len(self.stop) if stop >= 0 else 0
            leads.append(lead)
            tails.append(tail)
            at += len(found[place])
        return Skeleton(order, tuple(pieces), tuple(leads), tuple(tails))

    def _by_prefix(self, text: str, messages: Sequence[Message], tools: Tools) -> list[Span]:
        """Spans from the prompts: a turn starts where the text leaves its prompt, and ends with the next stop token.

        For templates whose output depends on the contents (Qwen3 drops the reasoning of earlier turns).
        """
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(messages[:index], tools, False)[0]
            start = _common(self._render(messages[:index], tools, True)[0], text)
            end = text.find(self.stop, start) + len(self.stop) if self.stop else len(text)
            if not text.startswith(before) or end < start:
                raise Defect("answer-not-found")
            spans.append((start, end))
        return spans

    # --- what the template does ---

    def _probe(self, *roles: str) -> str | None:
        """The text of a conversation with these roles, its contents marked; None if the template refuses."""
        try:
            return self._render(_marked(roles), None, False)[0]
        except Defect:
            return None

    @cached_property
    def stop(self) -> str:
        """The string that ends an answer; empty if the template writes no special token there."""
        for roles in (("user", "assistant"), ("system", "user", "assistant")):
            text = self._probe(*roles)
            if text is not None:
                found = self._special_tokens.match(text.rpartition(END)[2].lstrip())
                return found.group() if found else ""
        return ""

    @cached_property
    def _null_content(self) -> bool:
        """Whether the template writes a call beside a content that is null, and none beside an empty one."""

        def written(content: str | None) -> bool:
            call = {"type": "function", "function": {"name": f"{START}f{END}", "arguments": {}}}
            turns = [*_marked(["user"]), {"role": "assistant", "content": content, "tool_calls": [call]}]
            try:
                return f"{START}f{END}" in self._render(turns, None, False)[0]
            except Defect:
                return False

        return not written("") and written(None)

    @cached_property
    def writes_system(self) -> bool:
        """Whether a system turn reaches the text."""
        return f"{START}0{END}" in (self._probe("system", "user") or "")

    @cached_property
    def _special_tokens(self) -> re.Pattern[str]:
        return _any_of(self.tokens)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Strings that open or end a turn: special tokens, look-alikes the template writes, and plain role lines."""
        turns = ("user", "assistant", "user", "assistant", "user")
        text = self._probe("system", *turns) or self._probe(*turns) or ""
        found = {*self.tokens, *CONTROL.findall(MARK.sub("", text))}
        for piece in MARK.split(text)[1:-1]:
            header = piece.removeprefix(self.stop).rstrip()
            if header.startswith("\n") and header.strip() and not any(mark in header for mark in found):
                found.add(header)
        return _any_of(found)

    def check_content(self, messages: Sequence[Message], tools: Tools = None) -> None:
        """Refuse contents that hold a control string: rendered, they would forge a turn.

        Raises:
            Defect: `special-token-in-content`, or `system-turn-refused`.
        """
        fields = [{key: value for key, value in message.items() if key != "role"} for message in messages]
        for text in strings([*fields, tools]):
            if found := self._control.search(text):
                raise Defect("special-token-in-content", repr(found.group()))
        if messages[0]["role"] == "system" and not self.writes_system:
            raise Defect("system-turn-refused")

    def neutral(self, text: str, *, document: bool = False) -> str:
        """A text whose control strings open and end no turn any more: each with a space before its last character.

        `<|im_end|>` becomes `<|im_end| >`, `[INST]` becomes `[INST ]`: a person reads the same, the template's tokens
        are not in it.
        """
        pattern = self._special_tokens if document else self._control
        for _ in range(ROUNDS):
            if not pattern.search(text):
                break
            text = pattern.sub(lambda found: f"{found.group()[:-1]} {found.group()[-1]}", text)
        return text

    def check_text(self, text: str) -> None:
        """Refuse a document that holds a special token."""
        if found := self._special_tokens.search(text):
            raise Defect("special-token-in-content", repr(found.group()))


@lru_cache(maxsize=16)
def _dialect(jinja: str, special: tuple[tuple[str, str], ...], tokens: tuple[str, ...]) -> Dialect:
    return Dialect(jinja, special, tokens)


def sets_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself puts a BOS token before every text."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id


def _common(first: str, second: str) -> int:
    """Length of the common prefix of two texts."""
    if second.startswith(first):
        return len(first)
    length = min(len(first), len(second))
    return next((i for i in range(length) if first[i] != second[i]), length)


def _marked(roles: Sequence[str]) -> list[Message]:
    """A conversation whose contents can be found again in the rendered text."""
    return [{"role": role, "content": f"{START}{index}{END}"} for index, role in enumerate(roles)]


def _any_of(literals: Iterable[str]) -> re.Pattern[str]:
    """A pattern that finds any of the strings, the longest first."""
    longest_first = sorted(set(literals), key=lambda literal: (-len(literal), literal))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
