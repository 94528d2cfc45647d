"""Formats of data files, and their conversion to the schemas of the toolkit.

A `Format` says how its rows are recognised, which schema they give, and how one row is converted. `detect` picks the
format of a source from its first records; `convert` turns one record into rows of the wanted schema:

    text        {"text": str}
    messages    {"messages": [{"role", "content"}, ...], "tools"?: [...]}
    preference  {"prompt": [...], "chosen": [one turn], "rejected": [one turn], other columns}
    unpaired    {"prompt": [...], "completion": [one turn], "label": bool, other columns}
    prompts     {"prompt": [...], other columns}

Plain strings become one user or one assistant turn. Several rated answers to a prompt (`ranked`) become pairs. To add
a format, add a row to `FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from alignment.data import ranked
from alignment.data.checks import Defect, Message
from alignment.data.turns import (
    Row,
    alpaca_prompt,
    answer,
    cued,
    is_transcript,
    label,
    others,
    prompt,
    text,
    tools,
    trained,
    transcript,
    turns,
    with_system,
)
from alignment.errors import DataError
from alignment.recipe.algorithms import Schema

Gives = Schema | Literal["ranked"]


@dataclass(frozen=True)
class Format:
    """One way in which files hold rows.

    Attributes:
        name: what the log says, and what `format:` of a source may name.
        gives: the schema of the converted rows; `ranked` is several rated answers, of which pairs are made.
        wants: its columns in words, for the log and for the error that nothing matched.
        matches: whether a record has the columns (and their types) of this format.
        convert: one record to one row of `gives`; raises `Defect`. That of a `ranked` format also takes the name of
            the rating (`Reading.score`).
        over: the more general formats that its rows fit as well.
    """

    name: str
    gives: Gives
    wants: str
    matches: Callable[[Mapping[str, Any]], bool]
    convert: Callable[..., Row]
    over: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reading:
    """How the rows of a source are made where its format leaves a choice.

    Attributes:
        pairs: which pairs are made of several rated answers: `best-worst`, `adjacent`, `all`.
        score: the key or column that rates them, where it is not the usual one.
    """

    pairs: str = "best-worst"
    score: str | None = None


# --- whole rows -----------------------------------------------------------------------------------------------------


def _pair(row: Row, chosen: list[Message], rejected: list[Message]) -> Row:
    """A preference row from two whole conversations: the prompt is what stands before the answers in both."""
    if not chosen or not rejected:
        raise Defect("no-messages")
    if chosen[:-1] != rejected[:-1]:
        raise Defect("different-prompts")
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Defect("ends-with-user")
    rest = others(row, "prompt", "chosen", "rejected", "system")
    return {"prompt": with_system(row, chosen[:-1]), "chosen": chosen[-1:], "rejected": rejected[-1:], **rest}


def _from_messages(row: Row) -> Row:
    return {"messages": with_system(row, trained(row.get("messages"))), **tools(row)}


def _from_sharegpt(row: Row) -> Row:
    return {"messages": with_system(row, trained(row.get("conversations"))), **tools(row)}


def _from_alpaca(row: Row) -> Row:
    said: Message = {"role": "assistant", "content": text(row.get("output"), "output")}
    return {"messages": [*alpaca_prompt(row), said], **tools(row)}


def _from_prompt_completion(row: Row) -> Row:
    found = with_system(row, prompt(row.get("prompt")))
    return {"messages": [*found, *answer(row.get("completion"), "completion")], **tools(row)}


def _from_hh(row: Row) -> Row:
    return _pair(row, transcript(row.get("chosen"), "chosen"), transcript(row.get("rejected"), "rejected"))


def _from_hh_prompt(row: Row) -> Row:
    answers = {name: answer(text(row.get(name), name).strip(), name) for name in ("chosen", "rejected")}
    return {"prompt": cued(row.get("prompt"), "prompt"), **answers, **others(row, "prompt", "chosen", "rejected")}


def _from_conversation_pairs(row: Row) -> Row:
    return _pair(row, turns(row.get("chosen")), turns(row.get("rejected")))


def _explicit(row: Row, question: list[Message], *used: str, answers: tuple[str, str] = ("chosen", "rejected")) -> Row:
    both = {ours: answer(row.get(name), name) for ours, name in zip(("chosen", "rejected"), answers, strict=True)}
    return {"prompt": question, **both, **others(row, *answers, *used, "system")}


def _from_sharegpt_pairs(row: Row) -> Row:
    return _explicit(row, with_system(row, turns(row.get("conversations"))), "conversations")


def _from_alpaca_pairs(row: Row) -> Row:
    return _explicit(row, alpaca_prompt(row), "instruction", "input", "output", "history")


def _from_pairs(row: Row) -> Row:
    return _explicit(row, with_system(row, prompt(row.get("prompt"))), "prompt")


def _from_orca_pairs(row: Row) -> Row:
    return _explicit(row, with_system(row, prompt(row.get("question"))), "question")


def _from_openai_pairs(row: Row) -> Row:
    given = row.get("input")
    if not isinstance(given, dict):
        raise Defect("wrong-type", "input is not an object with messages")
    used = ("input", "preferred_output", "non_preferred_output")
    made = _explicit(row, turns(given.get("messages")), *used, answers=used[1:])
    return made | tools(given)


def _unpaired(row: Row, conversation: list[Message], *used: str) -> Row:
    if not conversation:
        raise Defect("no-messages")
    column = "label" if "label" in row else "kto_tag"
    rest = others(row, column, *used, "system")
    said = {"completion": conversation[-1:], "label": label(row.get(column))}
    return {"prompt": conversation[:-1], **said, **rest}


def _from_completion_label(row: Row) -> Row:
    found = with_system(row, prompt(row.get("prompt")))
    said = {"completion": answer(row.get("completion"), "completion"), "label": label(row.get("label"))}
    return {"prompt": found, **said, **others(row, "prompt", "completion", "label", "system")}


def _from_messages_label(row: Row) -> Row:
    return _unpaired(row, with_system(row, turns(row.get("messages"))), "messages")


def _from_sharegpt_label(row: Row) -> Row:
    return _unpaired(row, with_system(row, turns(row.get("conversations"))), "conversations")


def _from_alpaca_label(row: Row) -> Row:
    said = answer(row.get("output"), "output")
    return _unpaired(row, [*alpaca_prompt(row), *said], "instruction", "input", "output", "history")


def _from_text(row: Row) -> Row:
    return {"text": text(row.get("text"), "text")}


def _from_prompt(row: Row) -> Row:
    return {"prompt": with_system(row, prompt(row.get("prompt"))), **others(row, "prompt", "system")}


# --- recognition ----------------------------------------------------------------------------------------------------


def _is_list(row: Mapping[str, Any], *names: str) -> bool:
    return all(isinstance(row.get(name), list) for name in names)


def _has(row: Mapping[str, Any], *names: str) -> bool:
    return all(name in row for name in names)


def _labelled(row: Mapping[str, Any]) -> bool:
    return "label" in row or "kto_tag" in row


def _opens_with_prompt(value: Any) -> bool:
    """A list of messages that holds the prompt too, not only the answer."""
    return isinstance(value, list) and len(value) > 1


def _rated(row: Mapping[str, Any], names: tuple[str, ...]) -> bool:
    """A prompt and a list of answers with a rating of that kind."""
    return ranked.first(row, ranked.PROMPTS) is not None and ranked.rating_key(row, names) is not None


FORMATS: tuple[Format, ...] = (
    Format("messages", "messages", "messages (list of role, content)", lambda r: _is_list(r, "messages"),
           _from_messages),
    Format("sharegpt", "messages", "conversations (list of from, value)",
           lambda r: _is_list(r, "conversations"), _from_sharegpt),
    Format("alpaca", "messages", "instruction, output [, input, system, history]",
           lambda r: _has(r, "instruction", "output") and not isinstance(r["output"], list), _from_alpaca),
    Format("prompt-completion", "messages", "prompt, completion", lambda r: _has(r, "prompt", "completion"),
           _from_prompt_completion),
    Format("hh-rlhf", "preference", "chosen, rejected (transcripts, Human: ... Assistant: ...)",
           lambda r: is_transcript(r.get("chosen")) and is_transcript(r.get("rejected")), _from_hh,
           over=("prompt-chosen-rejected", "alpaca-pairs", "orca-pairs")),
    Format("hh-rlhf-prompt", "preference", "prompt (transcript), chosen, rejected (text)",
           lambda r: _has(r, "chosen", "rejected") and is_transcript(r.get("prompt"))
           and not is_transcript(r["chosen"]), _from_hh_prompt, over=("prompt-chosen-rejected",)),
    Format("sharegpt-pairs", "preference", "conversations, chosen, rejected (one message each)",
           lambda r: _is_list(r, "conversations") and _has(r, "chosen", "rejected"), _from_sharegpt_pairs,
           over=("implicit-prompt",)),
    Format("alpaca-pairs", "preference", "instruction, chosen, rejected [, input, system, history]",
           lambda r: _has(r, "instruction", "chosen", "rejected"), _from_alpaca_pairs),
    Format("orca-pairs", "preference", "question, chosen, rejected [, system]",
           lambda r: _has(r, "question", "chosen", "rejected"), _from_orca_pairs),
    Format("openai-pairs", "preference", "input (messages), preferred_output, non_preferred_output",
           lambda r: _has(r, "input", "preferred_output", "non_preferred_output"), _from_openai_pairs),
    Format("ultrafeedback", "preference", "prompt, chosen, rejected (whole conversations)",
           lambda r: "prompt" in r and _opens_with_prompt(r.get("chosen")) and _opens_with_prompt(r.get("rejected")),
           _from_conversation_pairs, over=("prompt-chosen-rejected",)),
    Format("implicit-prompt", "preference", "chosen, rejected (whole conversations)",
           lambda r: "prompt" not in r and _is_list(r, "chosen", "rejected"), _from_conversation_pairs),
    Format("prompt-chosen-rejected", "preference", "prompt, chosen, rejected",
           lambda r: _has(r, "prompt", "chosen", "rejected"), _from_pairs),
    Format("ultrafeedback-rated", "ranked", "instruction, completions (each with response, annotations)",
           ranked.is_ultrafeedback, ranked.from_ultrafeedback, over=("rated-answers",)),
    Format("rated-answers", "ranked", "prompt, completions (or responses, answers), a score of each",
           lambda r: _rated(r, ranked.SCORES), ranked.from_scores),
    Format("ranked-answers", "ranked", "prompt, answers (or responses, completions), a rank of each: 1 is the best",
           lambda r: _rated(r, ranked.RANKS), ranked.from_ranks),
    Format("alpaca-ranked", "ranked", "instruction, output (a list, the best first)",
           lambda r: "instruction" in r and _is_list(r, "output"), ranked.from_ordered),
    Format("two-answers", "ranked",
           "prompt (or history), two answers (human_ref_A and _B, response_0 and _1 ...), scores or which is better",
           lambda r: ranked.first(r, ranked.PROMPTS) is not None and ranked.two_columns(r) is not None,
           ranked.from_two_columns),
    Format("prompt-completion-label", "unpaired", "prompt, completion, label",
           lambda r: _has(r, "prompt", "completion", "label"), _from_completion_label),
    Format("messages-label", "unpaired", "messages, label (or kto_tag)",
           lambda r: _is_list(r, "messages") and _labelled(r), _from_messages_label),
    Format("sharegpt-label", "unpaired", "conversations, label (or kto_tag)",
           lambda r: _is_list(r, "conversations") and _labelled(r), _from_sharegpt_label),
    Format("alpaca-label", "unpaired", "instruction, output, label (or kto_tag)",
           lambda r: _has(r, "instruction", "output") and _labelled(r), _from_alpaca_label),
    Format("text", "text", "text", lambda r: "text" in r, _from_text),
    Format("prompt", "prompts", "prompt (text or messages)",
           lambda r: "prompt" in r and not is_transcript(r["prompt"]), _from_prompt),
)  # fmt: skip
# What a stage's schema can be made from, the closest first.
ROUTES: dict[Schema, tuple[Gives, ...]] = {
    "text": ("text",),
    "messages": ("messages", "preference", "ranked"),
    "preference": ("preference", "ranked"),
    "unpaired": ("unpaired", "preference", "ranked"),
    "prompts": ("prompts", "preference", "ranked", "unpaired", "messages"),
}
NATURAL: tuple[Gives, ...] = ("preference", "ranked", "unpaired", "messages", "text", "prompts")


def candidates(schema: Schema) -> list[Format]:
    """The formats from which rows of `schema` can be made, the closest first."""
    return [known for kind in ROUTES[schema] for known in FORMATS if known.gives == kind]


def detect(sample: Sequence[Mapping[str, Any]], schema: Schema, *, named: str | None, source: str) -> Format:
    """The format of a source, from its first records, or by its name.

    A format that gives the schema itself goes before one from which it must be made, and a special one before the
    general one that fits its rows as well.

    Raises:
        DataError: no format fits, or several do; the line names the columns found, and the choices.
    """
    known = candidates(schema)
    if named is not None:
        return _named(named, known, f"{schema} rows", source)
    found = _recognised(sample, known, f"{schema} rows", source)
    if schema == "messages" and found.gives == "messages":
        _refuse_labels(found, sample, source)
    return found


def recognise(sample: Sequence[Mapping[str, Any]], *, named: str | None, source: str) -> tuple[Format, Schema]:
    """The format of a source of which nothing is wanted in particular, and the schema that its rows give.

    Where rows fit several, pairs go before single answers, and those before the bare text or prompt beside them.

    Raises:
        DataError: as `detect`.
    """
    known = [one for kind in NATURAL for one in FORMATS if one.gives == kind]
    found = _recognised(sample, known, "rows", source) if named is None else _named(named, known, "rows", source)
    return found, "preference" if found.gives == "ranked" else found.gives


def _named(name: str, known: Sequence[Format], rows: str, source: str) -> Format:
    for candidate in known:
        if candidate.name == name:
            return candidate
    names = ", ".join(candidate.name for candidate in known)
    raise DataError(f"{source}: format: {name!r} is unknown for {rows}; known are {names}")


def _recognised(sample: Sequence[Mapping[str, Any]], known: Sequence[Format], rows: str, source: str) -> Format:
    """The one of the known formats, the closest first, that fits the most records."""
    fits = {candidate.name: sum(candidate.matches(row) for row in sample) for candidate in known}
    best = max(fits.values())
    if not best:
        found = sorted({str(name) for row in sample for name in row})
        wants = "; or ".join(f"{candidate.wants} [{candidate.name}]" for candidate in known)
        raise DataError(
            f"{source}: columns {', '.join(found)} fit no format of {rows}; wanted: {wants}. "
            "Map them with `columns`, our name: the file's (on the command line: --column prompt=question)"
        )
    tied = [candidate for candidate in known if fits[candidate.name] == best]
    closest = [candidate for candidate in tied if candidate.gives == tied[0].gives]
    general = {name for candidate in closest for name in candidate.over}
    left = [candidate for candidate in closest if candidate.name not in general]
    if len(left) > 1:
        choices = "; ".join(f"{choice.name} ({choice.wants})" for choice in left)
        fit = "all" if best == len(sample) else f"{best:,} each"
        raise DataError(
            f"{source}: {fit} of the first {len(sample):,} rows fit several formats of {rows}: {choices}. "
            "Name the one that is meant with `format`"
        )
    return left[0]


def _refuse_labels(known: Format, sample: Sequence[Mapping[str, Any]], source: str) -> None:
    """Refuse to learn good and bad answers alike from rows that tell them apart."""
    bad = [row for row in sample if row.get("label", row.get("kto_tag")) is False]
    if bad:
        raise DataError(
            f"{source}: {len(bad):,} of the first {len(sample):,} rows are labelled false: bad answers, which "
            f"{known.name} rows would teach; leave them out with `data.filter: {{columns: {{label: true}}}}`, or name "
            f"`format: {known.name}` to learn from all"
        )


def why(known: Format, sample: Sequence[Mapping[str, Any]]) -> str:
    """What a format was recognised by: its columns, and in how many of the first records they stand."""
    fit = sum(known.matches(row) for row in sample)
    return f"{known.wants} in {'all' if fit == len(sample) else fit} of the first {len(sample):,} rows"


def convert(record: Row, known: Format, schema: Schema, reading: Reading = Reading()) -> list[Row]:
    """One record as rows of `schema`: one row, or more where pairs are made or taken apart.

    Raises:
        Defect: the record cannot be converted.
    """
    is_ranked = known.gives == "ranked"
    try:
        row = known.convert(record, reading.score) if is_ranked else known.convert(record)
    except Defect:
        fitting = [] if known.matches(record) else [other.name for other in candidates(schema) if other.matches(record)]
        if fitting:
            raise Defect("other-format", fitting[0]) from None
        raise
    rows = ranked.pairs(row, reading.pairs) if is_ranked and schema in ("preference", "unpaired") else [row]
    return [made for one in rows for made in _made(one, known.gives, schema)]


def _made(row: Row, gives: Gives, schema: Schema) -> list[Row]:
    """A row of one schema as rows of another."""
    if schema in (gives, "preference"):
        return [row]
    if schema == "unpaired":
        rest = {key: value for key, value in row.items() if key not in ("chosen", "rejected")}
        return [
            {**rest, "completion": row["chosen"], "label": True},
            {**rest, "completion": row["rejected"], "label": False},
        ]
    if schema == "messages":
        if gives == "ranked":
            return [ranked.best(row)]
        return [{"messages": [*row["prompt"], *row["chosen"]], **tools(row)}]
    assert schema == "prompts"
    if gives == "messages":
        found = row["messages"]
        ends_with_answer = bool(found) and found[-1]["role"] == "assistant"
        return [{"prompt": found[:-1] if ends_with_answer else found, **tools(row)}]
    answers = ("chosen", "rejected", "completion", "label", "answers")
    return [{key: value for key, value in row.items() if key not in answers}]


def says(known: Format, schema: Schema, reading: Reading = Reading()) -> str:
    """What was detected, and what is made of it, in words."""
    if known.gives == schema:
        return known.name
    if known.gives == "ranked" and schema != "prompts":
        made = {"preference": "", "unpaired": ", each as two rows", "messages": ""}[schema]
        return f"{known.name}, " + ("best answers only" if schema == "messages" else f"pairs {reading.pairs}{made}")
    made = {"unpaired": "each pair as two rows", "messages": "chosen answers only"}.get(schema, "prompts only")
    return f"{known.name}, {made}"
