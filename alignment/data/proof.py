"""The template proof: on real rows, that what will be trained is the assistant's text, and nothing else.

`prove` takes a sample of rows through `tokens.tables`, as training does, and compares the result with what
`apply_chat_template` of Transformers writes. The assistant's text is found there without the help of spans, masks or
generation blocks: the row is rendered once as it is and once with a sentinel in place of an answer, and where the two
texts part is the answer.

    trained-text        every answer is trained whole, with what the template writes before and after it, up to its stop
                        token; no text of another turn is
    stop-trained        the last trained token of an answer is one that ends a turn
    stops-generation    ... and one at which generation stops
    prompt-is-prefix    the tokens of the prompt alone are the first tokens of the row (or the boundary is moved to
                        where they part, and counted)
    same-ids            Transformers gives the same ids for the row, and for the prompt that is generated from
    same-ids-exported   and so does the tokenizer once it is saved and loaded again
    double-bos          a row begins with one BOS token at most
"""

from __future__ import annotations

import itertools
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignment.data import templates
from alignment.data.checks import Message
from alignment.data.dialect import Dialect
from alignment.data.loading import Loading, opened_for, usable
from alignment.data.remedies import Account
from alignment.data.tokens import IGNORED, Settings, tables
from alignment.errors import DataError
from alignment.recipe.algorithms import Schema
from alignment.recipe.schema import Data, DataLimits

ROWS = 64  # of a sample: the first ones and some that are spread over the rest
NEARLY_ALL = 0.95  # of the answers must end with a trained stop token
SENTINEL = "\ue0f1"  # a private-use character that no template and no row holds
CHECKS = (
    "trained-text", "stop-trained", "stops-generation", "prompt-is-prefix", "same-ids", "same-ids-exported",
    "double-bos",
)  # fmt: skip
SCHEMAS = ("messages", "preference", "unpaired")
ANSWERS = {"preference": ("chosen", "rejected"), "unpaired": ("completion",)}
Ids = Sequence[int]


@dataclass
class Proof:
    """What the proof came to.

    Attributes:
        rows: that were looked at; skipped: that no template could take, or that could not be rendered without help.
        boundaries: whose answer changes how the end of the prompt is tokenized.
        failed: how many rows failed each check, and what was seen first.
    """

    rows: int = 0
    skipped: int = 0
    answers: int = 0
    unstopped: int = 0
    boundaries: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    saw: dict[str, str] = field(default_factory=dict)

    def fail(self, check: str, text: str) -> None:
        """Note a row that fails a check."""
        self.failed[check] += 1
        self.saw.setdefault(check, text)

    @property
    def lines(self) -> list[str]:
        """One line for each check that failed."""
        return [
            f"{check}: {self.failed[check]} of {self.rows} rows: {self.saw[check]}"
            for check in CHECKS
            if self.failed[check]
        ]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": self.rows, "skipped": self.skipped, "boundaries": self.boundaries,
            "checks": {check: "failed" if self.failed[check] else "ok" for check in CHECKS}, "failed": self.lines,
        }  # fmt: skip

    def enforce(self, place: str) -> None:
        """Stop when a check failed.

        Raises:
            DataError: one line with all that failed.
        """
        if self.lines:
            raise DataError(f"{place}: the chat template does not train what it should: {'; '.join(self.lines)}")


def head(data: Data, schema: Schema) -> list[dict[str, Any]]:
    """The first rows of every source of `data.train`, `ROWS` in all: enough to prove a template before all are read.

    They are read as training reads them, `on_system` and `filter` applied. What needs all rows (`dedupe`, `prune`,
    `max_pairs_per_prompt`, `balance`, mixtures) is not, and no function of `augment` is called.

    Raises:
        DataError: a damaged file, columns that fit no format, or a system turn where `on_system` is error.
    """
    how = Loading(schema, 0, False, DataLimits(), lambda text: None, data)
    each, rows = max(1, ROWS // len(data.train)), []
    for index, source in enumerate(data.train):
        opened = opened_for(source, how)
        found = usable(opened, index, how, Account(opened.name, opened.says))
        rows += [one.row for one in itertools.islice(found, each)]
    return rows


def sample(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The first rows and some spread over the others, `ROWS` at most."""
    half = ROWS // 2
    step = max(1, (len(rows) - half) // half)
    return [dict(row) for row in [*rows[:half], *rows[half::step][:half]]]


def prove(tokenizer: PreTrainedTokenizerBase, rows: Sequence[Mapping[str, Any]], schema: str) -> Proof:
    """Prove the template on some normalised rows of a schema (`messages`, `preference` or `unpaired`).

    Raises:
        DataError: the template ends no answer with a special token.
    """
    proof = Proof()
    sampled = [_written(row, Dialect.of(tokenizer)) for row in sample(rows)]
    settings = Settings(schema, None, "error", 0)
    pieces, _ = tables(sampled, [""] * len(sampled), settings, tokenizer)
    trained = [entry for piece in pieces for entry in piece.to_pylist()]
    exported = _exported(tokenizer)
    stops = frozenset(templates.stop_ids(tokenizer))
    proof.skipped = len(sampled) - len(trained)
    for entry in trained:
        row = sampled[entry["row"]]
        for prompt, answer, ids, flags in _sequences(row, entry, schema):
            last = schema != "messages"
            moved = _prove_prompt(
                tokenizer, exported, prompt, row.get("tools"), ids, flags.index(True) if last else 0, proof
            )
            _prove_one(
                tokenizer,
                exported,
                stops,
                [*prompt, *answer],
                row.get("tools"),
                ids,
                flags,
                proof,
                last=last,
                moved=moved,
            )
        proof.rows += 1
    if proof.answers and proof.unstopped > (1 - NEARLY_ALL) * proof.answers:
        proof.fail("stop-trained", f"{proof.unstopped} of {proof.answers} answers do not end with a trained stop token")
    return proof


def _sequences(
    row: Mapping[str, Any], entry: Mapping[str, Any], schema: str
) -> list[tuple[list[Message], list[Message], list[int], list[bool]]]:
    """Prompt, answer, ids and trained flags of each sequence that a row of the table gives."""
    if schema == "messages":
        flags = [label != IGNORED for label in entry["labels"]]
        return [(row["messages"][:-1], row["messages"][-1:], entry["input_ids"], flags)]
    prompt_ids = entry["prompt_ids"]
    return [
        (row["prompt"], row[name], prompt_ids + entry[f"{name}_ids"],
         [False] * len(prompt_ids) + [True] * len(entry[f"{name}_ids"]))
        for name in ANSWERS[schema]
    ]  # fmt: skip


def _written(row: Mapping[str, Any], dialect: Dialect) -> dict[str, Any]:
    """A row with its calls written as text where the template does not know them, as training writes them."""
    return {
        name: dialect.messages(value) if name in ("messages", "prompt", "chosen", "rejected", "completion") else value
        for name, value in row.items()
    }


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Any, *, generation: bool = False
) -> str | None:
    """The text that Transformers writes; None where the template refuses it."""
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=generation)
        )
    except (jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError):
        return None


def _prove_one(
    tokenizer: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase, stops: frozenset[int],
    messages: list[Message], tools: Any, ids: list[int], flags: list[bool], proof: Proof, *, last: bool, moved: bool,
) -> None:  # fmt: skip
    """Compare the trained tokens of one sequence with the answers found in its text."""
    text = _render(tokenizer, messages, tools)
    if text is None:  # no chat template at all: prompt, answer and EOS are joined by us
        proof.skipped += 1
        return
    if _double(ids, tokenizer.bos_token_id):
        proof.fail("double-bos", "two BOS tokens at the beginning: the template writes one, and so does the tokenizer")
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    theirs, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if theirs[: len(ids)] != list(ids):
        at = next((i for i, (a, b) in enumerate(zip(ids, theirs, strict=False)) if a != b), min(len(ids), len(theirs)))
        proof.fail("same-ids", f"apply_chat_template gives other ids from token {at} on")
        return
    if exported(text, add_special_tokens=False)["input_ids"] != theirs:
        proof.fail("same-ids-exported", "the tokenizer gives other ids once it was saved and loaded")
    runs = _runs(flags)
    _prove_ends(tokenizer, runs, ids, stops, proof)
    chars = [(offsets[begin][0], offsets[begin][1], offsets[end - 1][1]) for begin, end in runs]
    _prove_text(tokenizer, messages, tools, text, chars, proof, last=last, moved=moved)


def _prove_ends(
    tokenizer: PreTrainedTokenizerBase, runs: Sequence[tuple[int, int]], ids: Ids, stops: frozenset[int], proof: Proof
) -> None:
    """The last trained token of every answer ends a turn, and generation stops at it."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    for _, end in runs:
        proof.answers += 1
        last = ids[end - 1]
        if last not in special:
            proof.unstopped += 1
        elif last not in stops:
            token = tokenizer.convert_ids_to_tokens(last)
            proof.fail("stops-generation", f"answers end with {token}, at which generation does not stop")


def _prove_text(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], tools: Any, text: str,
    trained: list[tuple[int, int, int]], proof: Proof, *, last: bool, moved: bool,
) -> None:  # fmt: skip
    """Each trained run is one answer, with what the template writes around it.

    Args:
        trained: where each run begins, where its first token ends, and where the run ends, in characters.
        last: only the last answer is trained.
        moved: the prompt ends some tokens early, so that its end is trained with the answer.
    """
    if lost := [name for name in _called(messages) if name not in text]:
        proof.fail("trained-text", f"the template does not write the call of {', '.join(sorted(set(lost)))}")
        return
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    wanted = turns[-1:] if last else turns
    if len(wanted) != len(trained):
        proof.fail("trained-text", f"{len(trained)} trained spans for {len(wanted)} answers")
        return
    special = tokenizer.all_special_tokens + [str(token) for token in tokenizer.added_tokens_decoder.values()]
    for index, (begin, first_end, end) in zip(wanted, trained, strict=True):
        answer = _answer(tokenizer, messages, index, tools, text)
        if answer is None:
            proof.skipped += 1
            continue
        after = text[answer[1] : end].strip()
        if begin > answer[0] or end < answer[1]:
            missing = text[answer[0] : begin] or text[max(end, answer[0]) : answer[1]]
            proof.fail("trained-text", f"{len(missing)} characters of an answer are not trained")
        elif not moved and first_end <= _end_of_prompt(tokenizer, messages, index, tools, text):
            proof.fail("trained-text", "text of the prompt is trained with an answer")
        elif after and after not in special and not messages[index].get("tool_calls"):
            proof.fail("trained-text", "text after the stop token is trained with an answer")


def _answer(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], index: int, tools: Any, text: str
) -> tuple[int, int] | None:
    """Where the answer of one turn stands in the text: found by rendering once more with a sentinel in its place."""
    other = [{**turn, "content": SENTINEL} if place == index else turn for place, turn in enumerate(messages)]
    marked = _render(tokenizer, other, tools)
    if marked is None or marked.count(SENTINEL) != 1:
        return None
    ahead, behind = marked.split(SENTINEL)
    if not text.startswith(ahead):  # what stands before an answer may follow from its content: thoughts
        thought = next((at for at, (a, b) in enumerate(zip(ahead, text, strict=False)) if a != b), len(ahead))
        at = text.find((messages[index]["content"] or "").rpartition("</think>")[2].strip(), thought)
        return None if at < 0 or not text.endswith(behind) else (at, len(text) - len(behind))
    if not text.endswith(behind) or len(ahead) + len(behind) > len(text):
        return None
    return len(ahead), len(text) - len(behind)


def _called(messages: Sequence[Message]) -> list[str]:
    """The names of the functions that a conversation calls."""
    calls = [call for message in messages for call in message.get("tool_calls") or []]
    return [str(call.get("function", call).get("name", "")) for call in calls]


def _end_of_prompt(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], index: int, tools: Any, text: str
) -> int:
    """How much of the text is the prompt of one turn, or begins as that does."""
    prompt = _render(tokenizer, messages[:index], tools, generation=True) or ""
    return next(
        (at for at, (a, b) in enumerate(zip(prompt, text, strict=False)) if a != b), min(len(prompt), len(text))
    )


def _prove_prompt(
    tokenizer: PreTrainedTokenizerBase, exported: PreTrainedTokenizerBase, prompt: Sequence[Message], tools: Any,
    ids: Ids, before: int, proof: Proof,
) -> bool:  # fmt: skip
    """What generation starts from is what training put before the answer, in this tokenizer and in the exported one.

    Args:
        before: tokens that the table calls the prompt; 0 where it does not say.

    Returns:
        Whether the prompt was made to end a few tokens early, because an answer changes them.
    """
    text = _render(tokenizer, prompt, tools, generation=True)
    if text is None:
        return False
    ours = templates.encode_prompt(tokenizer, list(prompt), tools)
    theirs = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ours != theirs:
        proof.fail("same-ids", "apply_chat_template gives other ids for the prompt that is generated from")
    again = _render(exported, prompt, tools, generation=True)
    if again is None or exported(again, add_special_tokens=False)["input_ids"] != theirs:
        proof.fail("same-ids-exported", "the prompt has other ids once the tokenizer was saved and loaded")
    common = next((i for i, (a, b) in enumerate(zip(ours, ids, strict=False)) if a != b), min(len(ours), len(ids)))
    moved = 0 < len(ours) - before <= templates.BOUNDARY if before else False
    proof.boundaries += moved or common < len(ours)
    if len(ours) - common > templates.BOUNDARY:
        proof.fail("prompt-is-prefix", f"prompt and row part at token {common} of the prompt's {len(ours)}")
    return moved


def _exported(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """The tokenizer as somebody else will load it."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return loaded


def _runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Where the trained tokens begin and end."""
    edges = [i for i in range(len(flags) + 1) if (i < len(flags) and flags[i]) != (i > 0 and flags[i - 1])]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _double(ids: Ids, bos: int | None) -> bool:
    return bos is not None and list(ids[:2]) == [bos, bos]
