"""Formats of data files, and their conversion to the schemas of the toolkit.

A `Format` says how its rows are recognised, which schema they give, and how one row is converted. `detect` picks the
format of a source from its first records; `convert` turns one record into rows of the wanted schema:

    text        {"text": str}
    messages    {"messages": [{"role", "content"}, ...], "tools"?: [...]}
    preference  {"prompt": [...], "chosen": [one turn], "rejected": [one turn], other columns}
    unpaired    {"prompt": [...], "completion": [one turn], "label": bool, other columns}
    prompts     {"prompt": [...], other columns}

Plain strings become one user or one assistant turn. To add a format, add a row to `FORMATS`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from alignment.data.checks import Defect, Message
from alignment.errors import DataError
from alignment.recipe.algorithms import Schema

Row = dict[str, Any]

ROLES: dict[str, str] = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "ipython": "tool",
}
CALL_ROLES = frozenset({"function_call", "tool_call"})  # ShareGPT: an assistant turn that is one JSON call
KEPT_FIELDS = ("tool_calls", "name", "tool_call_id", "reasoning_content")
TRANSCRIPT_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
LABELS = {"true": True, "1": True, "false": False, "0": False}


@dataclass(frozen=True)
class Format:
    """One way in which files hold rows.

    Attributes:
        name: what the log says, and what `format:` of a source may name.
        gives: the schema of the converted rows.
        wants: its columns in words, for the error that nothing matched.
        matches: whether a record has the columns (and their types) of this format.
        convert: one record to one row of schema `gives`; raises `Defect`.
    """

    name: str
    gives: Schema
    wants: str
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Callable[[Row], Row]


# --- parts of a row -------------------------------------------------------------------------------------------------


def _text(value: Any, field: str) -> str:
    if value is None:
        raise Defect("missing-column", field)
    if not isinstance(value, str):
        raise Defect("wrong-type", f"{field} is {type(value).__name__}, not text")
    return value


def _content(value: Any) -> str:
    """Message content as text; a list of text parts is joined."""
    if isinstance(value, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in value):
            raise Defect("content-not-text")
        return "".join(_text(part.get("text"), "content part") for part in value)
    return _text(value, "content")


def _call(value: str) -> Message:
    """A ShareGPT `function_call` turn as an assistant turn with `tool_calls`."""
    try:
        found = json.loads(value)
    except ValueError:
        raise Defect("wrong-type", "function_call is not JSON") from None
    calls = found if isinstance(found, list) else [found]
    if not calls or any(not isinstance(call, dict) or not isinstance(call.get("name"), str) for call in calls):
        raise Defect("wrong-type", "function_call has no name")
    functions = [{"name": call["name"], "arguments": call.get("arguments", {})} for call in calls]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": function} for function in functions],
    }


def _message(turn: Any, role_key: str, content_key: str) -> Message:
    if not isinstance(turn, dict):
        raise Defect("wrong-type", f"a message is {type(turn).__name__}, not an object")
    role, content = _text(turn.get(role_key), role_key), turn.get(content_key)
    if role in CALL_ROLES:
        return _call(_text(content, content_key))
    if role not in ROLES:
        raise Defect("unknown-role", repr(role))
    fields = {key: turn[key] for key in KEPT_FIELDS if turn.get(key) is not None}
    if content is None and "tool_calls" in fields:
        content = ""
    return {"role": ROLES[role], "content": _content(content), **fields}


def _turns(value: Any) -> list[Message]:
    """A list of messages, OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`)."""
    if not isinstance(value, list):
        raise Defect("missing-column" if value is None else "wrong-type", "messages are not a list")
    keys = ("from", "value") if value and isinstance(value[0], dict) and "from" in value[0] else ("role", "content")
    return [_message(turn, *keys) for turn in value]


def _transcript(value: Any, field: str) -> list[Message]:
    """An HH-RLHF transcript, `\\n\\nHuman: ...\\n\\nAssistant: ...`, as messages without the surrounding space."""
    before, *parts = TRANSCRIPT_TURN.split(_text(value, field))
    if before.strip() or not parts:
        raise Defect("not-a-transcript", field)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in pairs]


def _prompt(value: Any) -> list[Message]:
    return [{"role": "user", "content": value}] if isinstance(value, str) else _turns(value)


def _answer(value: Any, field: str) -> list[Message]:
    """An answer as a list of messages: given as text, as one message, or as a list of them."""
    if isinstance(value, dict):
        return _turns([value])
    if isinstance(value, list):
        return _turns(value)
    return [{"role": "assistant", "content": _text(value, field)}]


def _alpaca_prompt(row: Row) -> list[Message]:
    """`instruction` and `input` on a line each, after `system` and the `history` of (question, answer) pairs."""
    turns: list[Message] = []
    if row.get("system"):
        turns.append({"role": "system", "content": _text(row["system"], "system")})
    for pair in row.get("history") or []:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Defect("wrong-type", "history is not a list of pairs")
        turns.append({"role": "user", "content": _text(pair[0], "history")})
        turns.append({"role": "assistant", "content": _text(pair[1], "history")})
    instruction, extra = _text(row.get("instruction"), "instruction"), row.get("input") or ""
    parts = [part for part in (instruction, _text(extra, "input")) if part.strip()]
    return [*turns, {"role": "user", "content": "\n".join(parts)}]


def _tools(row: Row) -> Row:
    """The `tools` column as a list of JSON schemas; absent where it is empty."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise Defect("wrong-type", "tools is not JSON") from None
    if not tools:
        return {}
    if not isinstance(tools, list) or any(not isinstance(tool, dict) for tool in tools):
        raise Defect("wrong-type", "tools is not a list of objects")
    return {"tools": tools}


def _with_system(row: Row, turns: list[Message]) -> list[Message]:
    if row.get("system") and (not turns or turns[0]["role"] != "system"):
        return [{"role": "system", "content": _text(row["system"], "system")}, *turns]
    return turns


def _others(row: Row, *used: str) -> Row:
    return {key: value for key, value in row.items() if key not in used and key != "tools"} | _tools(row)


def _pair(row: Row, chosen: list[Message], rejected: list[Message], *used: str) -> Row:
    """A preference row from two whole conversations: the prompt is what stands before the answers in both."""
    if not chosen or not rejected:
        raise Defect("no-messages")
    if chosen[:-1] != rejected[:-1]:
        raise Defect("different-prompts")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Defect("ends-with-user")
    others = _others(row, "prompt", "chosen", "rejected", *used)
    return {"prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:], **others}


def _label(value: Any) -> bool:
    if isinstance(value, str):
        value = LABELS.get(value.strip().lower())
    if value not in (True, False) or not isinstance(value, (bool, int, float)):
        raise Defect("wrong-label")
    return bool(value)


# --- whole rows -----------------------------------------------------------------------------------------------------


def _from_messages(row: Row) -> Row:
    return {"messages": _with_system(row, _turns(row.get("messages"))), **_tools(row)}


def _from_sharegpt(row: Row) -> Row:
    return {"messages": _with_system(row, _turns(row.get("conversations"))), **_tools(row)}


def _from_alpaca(row: Row) -> Row:
    answer: Message = {"role": "assistant", "content": _text(row.get("output"), "output")}
    return {"messages": [*_alpaca_prompt(row), answer]}


def _from_prompt_completion(row: Row) -> Row:
    return {"messages": [*_prompt(row.get("prompt")), *_answer(row.get("completion"), "completion")], **_tools(row)}


def _from_hh(row: Row) -> Row:
    return _pair(row, _transcript(row.get("chosen"), "chosen"), _transcript(row.get("rejected"), "rejected"))


def _from_hh_prompt(row: Row) -> Row:
    prompt = _transcript(row.get("prompt"), "prompt")
    if prompt[-1] == {"role": "assistant", "content": ""}:  # the cue after which the answer begins
        prompt.pop()
    answers = {name: _answer(_text(row.get(name), name).strip(), name) for name in ("chosen", "rejected")}
    return {"prompt": prompt, **answers, **_others(row, "prompt", "chosen", "rejected")}


def _from_conversation_pairs(row: Row) -> Row:
    return _pair(row, _turns(row.get("chosen")), _turns(row.get("rejected")))


def _explicit(row: Row, prompt: list[Message], *used: str) -> Row:
    answers = {name: _answer(row.get(name), name) for name in ("chosen", "rejected")}
    return {"prompt": prompt, **answers, **_others(row, "chosen", "rejected", *used)}


def _from_sharegpt_pairs(row: Row) -> Row:
    return _explicit(row, _with_system(row, _turns(row.get("conversations"))), "conversations", "system")


def _from_alpaca_pairs(row: Row) -> Row:
    return _explicit(row, _alpaca_prompt(row), "instruction", "input", "output", "system", "history")


def _from_pairs(row: Row) -> Row:
    return _explicit(row, _prompt(row.get("prompt")), "prompt")


def _unpaired(row: Row, conversation: list[Message], label: str, *used: str) -> Row:
    if not conversation:
        raise Defect("no-messages")
    others = _others(row, label, *used)
    return {"prompt": conversation[:-1], "completion": conversation[-1:], "label": _label(row.get(label)), **others}


def _from_completion_label(row: Row) -> Row:
    answer = _answer(row.get("completion"), "completion")
    others = _others(row, "prompt", "completion", "label")
    return {"prompt": _prompt(row.get("prompt")), "completion": answer, "label": _label(row.get("label")), **others}


def _from_messages_label(row: Row) -> Row:
    return _unpaired(row, _with_system(row, _turns(row.get("messages"))), "label", "messages", "system")


def _from_sharegpt_label(row: Row) -> Row:
    turns = _with_system(row, _turns(row.get("conversations")))
    return _unpaired(row, turns, "label" if "label" in row else "kto_tag", "conversations", "system")


def _from_text(row: Row) -> Row:
    return {"text": _text(row.get("text"), "text")}


def _from_prompt(row: Row) -> Row:
    return {"prompt": _prompt(row.get("prompt")), **_others(row, "prompt")}


# --- recognition ----------------------------------------------------------------------------------------------------


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and bool(re.match(r"\s*Human:", value))


def _is_list(row: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(row.get(name), list) for name in names)


def _has(row: Mapping[str, Any], *names: str) -> bool:
    return all(name in row for name in names)


def _opens_with_prompt(value: Any) -> bool:
    """A list of messages that holds the prompt too, not only the answer."""
    return isinstance(value, list) and len(value) > 1


# The first that fits the most of a source's first records is taken: the special stand before the general.
FORMATS: tuple[Format, ...] = (
    Format("messages", "messages", "messages (list of role, content)", lambda r: _is_list(r, "messages"),
           _from_messages),
    Format("sharegpt", "messages", "conversations (list of from, value)",
           lambda r: _is_list(r, "conversations"), _from_sharegpt),
    Format("alpaca", "messages", "instruction, output [, input, system, history]",
           lambda r: _has(r, "instruction", "output"), _from_alpaca),
    Format("prompt-completion", "messages", "prompt, completion", lambda r: _has(r, "prompt", "completion"),
           _from_prompt_completion),
    Format("hh-rlhf", "preference", "chosen, rejected (transcripts, Human: ... Assistant: ...)",
           lambda r: _is_transcript(r.get("chosen")) and _is_transcript(r.get("rejected")), _from_hh),
    Format("hh-rlhf-prompt", "preference", "prompt (transcript), chosen, rejected (text)",
           lambda r: _has(r, "chosen", "rejected") and _is_transcript(r.get("prompt")), _from_hh_prompt),
    Format("sharegpt-pairs", "preference", "conversations, chosen, rejected (one message each)",
           lambda r: _is_list(r, "conversations") and _has(r, "chosen", "rejected"), _from_sharegpt_pairs),
    Format("alpaca-pairs", "preference", "instruction, chosen, rejected [, input, system, history]",
           lambda r: _has(r, "instruction", "chosen", "rejected"), _from_alpaca_pairs),
    Format("ultrafeedback", "preference", "prompt, chosen, rejected (whole conversations)",
           lambda r: "prompt" in r and _opens_with_prompt(r.get("chosen")) and _opens_with_prompt(r.get("rejected")),
           _from_conversation_pairs),
    Format("implicit-prompt", "preference", "chosen, rejected (whole conversations)",
           lambda r: "prompt" not in r and _is_list(r, "chosen", "rejected"), _from_conversation_pairs),
    Format("prompt-chosen-rejected", "preference", "prompt, chosen, rejected",
           lambda r: _has(r, "prompt", "chosen", "rejected"), _from_pairs),
    Format("prompt-completion-label", "unpaired", "prompt, completion, label",
           lambda r: _has(r, "prompt", "completion", "label"), _from_completion_label),
    Format("messages-label", "unpaired", "messages, label", lambda r: _is_list(r, "messages") and "label" in r,
           _from_messages_label),
    Format("sharegpt-label", "unpaired", "conversations, label (or kto_tag)",
           lambda r: _is_list(r, "conversations") and ("label" in r or "kto_tag" in r), _from_sharegpt_label),
    Format("text", "text", "text", lambda r: "text" in r, _from_text),
    Format("prompt", "prompts", "prompt (text or messages)",
           lambda r: "prompt" in r and not _is_transcript(r["prompt"]), _from_prompt),
)  # fmt: skip
# What a stage's schema can be made from, the closest first.
ROUTES: dict[Schema, tuple[Schema, ...]] = {
    "text": ("text",),
    "messages": ("messages", "preference"),
    "preference": ("preference",),
    "unpaired": ("unpaired", "preference"),
    "prompts": ("prompts", "preference", "unpaired", "messages"),
}


def candidates(schema: Schema) -> list[Format]:
    """The formats from which rows of `schema` can be made, the closest first."""
    return [known for kind in ROUTES[schema] for known in FORMATS if known.gives == kind]


def detect(sample: Sequence[Mapping[str, Any]], schema: Schema, *, named: str | None, source: str) -> Format:
    """The format of a source, from its first records, or by its name.

    Raises:
        DataError: no format fits; the line names the columns found and those wanted.
    """
    known = candidates(schema)
    if named is not None:
        for candidate in known:
            if candidate.name == named:
                return candidate
        names = ", ".join(candidate.name for candidate in known)
        raise DataError(f"{source}: format: {named!r} is unknown for {schema} rows; known are {names}")
    scores = [sum(candidate.matches(row) for row in sample) for candidate in known]
    best = max(scores)
    if not best:
        found = sorted({str(name) for row in sample for name in row})
        wants = "; or ".join(f"{candidate.wants} [{candidate.name}]" for candidate in known)
        raise DataError(
            f"{source}: columns {', '.join(found)} fit no format of {schema} rows; wanted: {wants}. "
            "Map them with `columns`, which takes our name: the file's"
        )
    return known[scores.index(best)]


def convert(record: Row, known: Format, schema: Schema) -> list[Row]:
    """One record as rows of `schema`: one row, or two where a pair is taken apart for unpaired training.

    Raises:
        Defect: the record cannot be converted.
    """
    row = known.convert(record)
    if known.gives == schema:
        return [row]
    if schema == "unpaired":
        others = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
        return [
            {**others, "completion": row["chosen"], "label": True},
            {**others, "completion": row["rejected"], "label": False},
        ]
    if schema == "messages":
        return [{"messages": [*row["prompt"], *row["chosen"]], **_tools(row)}]
    assert schema == "prompts"
    if known.gives == "messages":
        turns = row["messages"]
        ends_with_answer = bool(turns) and turns[-1]["role"] == "assistant"
        return [{"prompt": turns[:-1] if ends_with_answer else turns, **_tools(row)}]
    return [{key: value for key, value in row.items() if key not in ("chosen", "rejected", "completion", "label")}]


def says(known: Format, schema: Schema) -> str:
    """What was detected, and what is made of it, in words."""
    if known.gives == schema:
        return known.name
    made = {"unpaired": "each pair as two rows", "messages": "chosen answers only"}
    return f"{known.name}, {made.get(schema, 'prompts only')}"
