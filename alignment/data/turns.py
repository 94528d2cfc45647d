"""Parts of a row: messages, prompts, answers, tools and labels, as data sets write them and as the toolkit holds them.

A message of the toolkit is `{"role": system|user|assistant|tool, "content": str}`; an assistant's call of tools is
`tool_calls: [{"type": "function", "function": {"name", "arguments": {...}}}]`, whatever the file's own way was. Each
function takes one value of a record and raises `Defect` where the value is not what it should be.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from alignment.data.checks import Defect, Message

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
    "bot": "assistant",
    "chatbot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
    "tool_response": "tool",
    "ipython": "tool",
}
CALL_ROLES = frozenset({"function_call", "tool_call"})  # ShareGPT: an assistant turn that is one JSON call
ROLE_KEYS = ("role", "from")
CONTENT_KEYS = ("content", "value", "text")
KEPT_FIELDS = ("name", "tool_call_id", "reasoning_content")
MARKS = ("weight", "train", "training")  # OpenAI's, and Axolotl's `message_field_training`
TOOL_COLUMNS = frozenset({"tools", "functions"})
TRANSCRIPT_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
LABELS = {"true": True, "1": True, "false": False, "0": False}


def text(value: Any, field: str) -> str:
    """A value that must be text."""
    if value is None:
        raise Defect("missing-column", field)
    if not isinstance(value, str):
        raise Defect("wrong-type", f"{field} is {type(value).__name__}, not text")
    return value


def parsed(value: str, field: str) -> Any:
    """The JSON in a text field."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise Defect("wrong-type", f"{field} is not JSON") from None


def content(value: Any) -> str:
    """Message content as text; a list of text parts is joined."""
    if isinstance(value, list):
        if any(not isinstance(part, dict) or part.get("type") != "text" for part in value):
            raise Defect("content-not-text")
        return "".join(text(part.get("text"), "content part") for part in value)
    return text(value, "content")


# --- tools ----------------------------------------------------------------------------------------------------------


def calls(value: Any, field: str) -> list[dict[str, Any]]:
    """Calls of tools, OpenAI's (`function: {name, arguments}`, the arguments often JSON in text) or bare ones.

    The arguments come out as an object: chat templates write them as JSON, and would quote a text a second time.
    """
    found = parsed(value, field) if isinstance(value, str) else value
    found = found if isinstance(found, list) else [found]
    made = []
    for call in found:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise Defect("wrong-type", f"{field} has no name")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            arguments = parsed(arguments, f"the arguments of {field}") if arguments.strip() else {}
        if not isinstance(arguments, dict | None):
            raise Defect("wrong-type", f"the arguments of {field} are {type(arguments).__name__}, not an object")
        named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        made.append({**named, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}})
    if not made:
        raise Defect("wrong-type", f"{field} has no name")
    return made


def tools(row: Row) -> Row:
    """The `tools` column as a list of JSON schemas; absent where it is empty. OpenAI's older name is `functions`."""
    found = row.get("tools") or row.get("functions")
    if isinstance(found, str) and found.strip():
        found = parsed(found, "tools")
    if not found or (isinstance(found, str) and not found.strip()):
        return {}
    if not isinstance(found, list) or any(not isinstance(tool, dict) for tool in found):
        raise Defect("wrong-type", "tools is not a list of objects")
    return {"tools": found}


# --- messages -------------------------------------------------------------------------------------------------------


def _value(turn: Row, keys: Sequence[str]) -> tuple[str, Any]:
    """The first of the keys that a turn has, and its value."""
    for key in keys:
        if key in turn:
            return key, turn[key]
    return keys[0], None


def message(turn: Any) -> Message:
    """One message, OpenAI's (`role`, `content`) or ShareGPT's (`from`, `value`)."""
    if not isinstance(turn, dict):
        raise Defect("wrong-type", f"a message is {type(turn).__name__}, not an object")
    role_key, role = _value(turn, ROLE_KEYS)
    content_key, said = _value(turn, CONTENT_KEYS)
    role = text(role, role_key).strip()
    if role.lower() in CALL_ROLES:
        return {"role": "assistant", "content": "", "tool_calls": calls(text(said, content_key), role)}
    known = ROLES.get(role) or ROLES.get(role.lower())
    if known is None:
        raise Defect("unknown-role", repr(role))
    fields = {key: turn[key] for key in KEPT_FIELDS if turn.get(key) is not None}
    called = turn.get("tool_calls") or turn.get("function_call")
    if called and known == "assistant":
        fields["tool_calls"] = calls(called, "tool_calls" if turn.get("tool_calls") else "function_call")
        said = "" if said is None else said
    return {"role": known, "content": content(said), **fields}


def turns(value: Any) -> list[Message]:
    """A list of messages.

    ShareGPT writes each call of a tool as a turn of its own, also after a text of the same answer: they are one turn.
    """
    if not isinstance(value, list):
        raise Defect("missing-column", "messages") if value is None else Defect("wrong-type", "messages are not a list")
    found: list[Message] = []
    for turn in value:
        made = message(turn)
        is_call = isinstance(turn, dict) and str(_value(turn, ROLE_KEYS)[1]).strip().lower() in CALL_ROLES
        if is_call and found and found[-1]["role"] == "assistant":
            before = found.pop()
            made = {**before, "tool_calls": [*before.get("tool_calls", ()), *made["tool_calls"]]}
        found.append(made)
    return found


def trained(value: Any) -> list[Message]:
    """Messages of which every answer is learned from; a mark on one of them that says otherwise is not overlooked."""
    for turn in value if isinstance(value, list) else ():
        if isinstance(turn, dict) and any(turn.get(key) in (0, False) for key in MARKS if turn.get(key) is not None):
            role = str(_value(turn, ROLE_KEYS)[1]).strip().lower()
            if ROLES.get(role) == "assistant" or role in CALL_ROLES:
                raise Defect("untrained-turn", ", ".join(f"{key}: {turn[key]}" for key in MARKS if key in turn))
    return turns(value)


def transcript(value: Any, field: str) -> list[Message]:
    """An HH-RLHF transcript, `\\n\\nHuman: ...\\n\\nAssistant: ...`, as messages without the surrounding space."""
    before, *parts = TRANSCRIPT_TURN.split(text(value, field))
    if before.strip() or not parts:
        raise Defect("not-a-transcript", field)
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": "user" if who == "Human" else "assistant", "content": said.strip()} for who, said in pairs]


def is_transcript(value: Any) -> bool:
    """Whether a text starts as an HH-RLHF transcript."""
    return isinstance(value, str) and bool(re.match(r"\s*Human:", value))


def cued(value: Any, field: str) -> list[Message]:
    """A transcript that is a prompt: it may end with the cue after which the answer begins, an empty `Assistant:`."""
    found = transcript(value, field)
    if found[-1] == {"role": "assistant", "content": ""}:
        found.pop()
    return found


def prompt(value: Any) -> list[Message]:
    """A prompt as messages: given as text, or as a list of them."""
    if value is None:
        raise Defect("missing-column", "prompt")
    return [{"role": "user", "content": value}] if isinstance(value, str) else turns(value)


def answer(value: Any, field: str) -> list[Message]:
    """An answer as a list of messages: given as text, as one message, or as a list of them."""
    if isinstance(value, dict):
        return turns([value])
    if isinstance(value, list):
        return turns(value)
    return [{"role": "assistant", "content": text(value, field)}]


def alpaca_prompt(row: Row) -> list[Message]:
    """`instruction` and `input` on a line each, after `system` and the `history` of (question, answer) pairs."""
    found: list[Message] = []
    if row.get("system"):
        found.append({"role": "system", "content": text(row["system"], "system")})
    history = row.get("history") or []
    for pair in parsed(history, "history") if isinstance(history, str) else history:
        if not isinstance(pair, list) or len(pair) != 2:
            raise Defect("wrong-type", "history is not a list of pairs")
        found.append({"role": "user", "content": text(pair[0], "history")})
        found.append({"role": "assistant", "content": text(pair[1], "history")})
    instruction, extra = text(row.get("instruction"), "instruction"), row.get("input") or ""
    parts = [part for part in (instruction, text(extra, "input")) if part.strip()]
    return [*found, {"role": "user", "content": "\n".join(parts)}]


def with_system(row: Row, found: list[Message]) -> list[Message]:
    """Messages after the system turn of a column of its own, unless they have one."""
    if row.get("system") and (not found or found[0]["role"] != "system"):
        return [{"role": "system", "content": text(row["system"], "system")}, *found]
    return found


def label(value: Any) -> bool:
    """Whether an answer is labelled good."""
    if isinstance(value, str):
        value = LABELS.get(value.strip().lower())
    if value not in (True, False) or not isinstance(value, (bool, int, float)):
        raise Defect("wrong-label")
    return bool(value)


def others(row: Row, *used: str) -> Row:
    """The columns of a row that no part of it was made from, and its tools."""
    return {key: value for key, value in row.items() if key not in used and key not in TOOL_COLUMNS} | tools(row)
