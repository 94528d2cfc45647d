"""`data.limits` before the first step: what `alignment data check` fails on stops a run too, with the same line.

All limits are held against the rows and tokens that will be trained on. The look at the text costs about a third of
what tokenizing costs, and is spared where the files were looked at before (`cache.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import datasets
from transformers import PreTrainedTokenizerBase

from alignment.data import lengths, templates
from alignment.data.dialect import Dialect
from alignment.data.findings import Finding, Limit, limit_of, line
from alignment.data.tokens import Settings
from alignment.errors import DataError
from alignment.recipe.schema import Data

if TYPE_CHECKING:
    from alignment.data.loading import Splits

OF_TOKENS = ("truncated", "unstopped")  # the limits that hold for the token table; the others are of the text
ELSEWHERE = ("dropped",)  # enforced while rows are dropped

Say = Callable[[str], None]


def enforce(
    splits: Splits, table: datasets.Dataset, made: Mapping[str, Any], data: Data, settings: Settings,
    tokenizer: PreTrainedTokenizerBase, say: Say,
) -> None:  # fmt: skip
    """Stop where the rows of training pass a limit of the recipe.

    Args:
        table, made: the token table of the rows, and its part of the report.

    Raises:
        DataError: one line with every limit that is passed, and where.
    """
    from alignment.data import contamination, texts

    limit = limit_of(data.limits)
    wanted = {name for name, value in data.limits.model_dump().items() if value is not None} - set(ELSEWHERE)
    train = texts.Loaded(*splits["train"])
    found: list[Finding] = []
    if wanted - set(OF_TOKENS):
        held = texts.Loaded(*splits["eval"]) if "eval" in splits else None
        watches = contamination.watches(data.watched, say)
        found += texts.read(settings.schema, train, held, watches, limit, tokens=False).findings
        for watch in watches:
            found += contamination.finding(watch, limit)
    if wanted & set(OF_TOKENS):
        counts = lengths.count(table, stops(tokenizer, settings.schema), bos(tokenizer))
        found += lengths.findings(counts, settings.schema, train.where, limit)
        found += cut(made, settings, limit, len(table))
    passed = [finding for finding in found if finding.passed_limit]
    if passed:
        said = "; ".join(f"{finding.check}: {_with_places(finding)}" for finding in passed)
        raise DataError(f"{said}; mend the data (`alignment data check` says more), or raise the limit")


def _with_places(finding: Finding) -> str:
    places = ", ".join(finding.rows[:3])
    return line(finding.as_dict()) + (f" ({places}{', ...' if len(finding.rows) > 3 else ''})" if places else "")


def stops(tokenizer: PreTrainedTokenizerBase, schema: str) -> list[int]:
    """The ids that end an answer, or a document."""
    return templates.stop_ids(tokenizer) if schema != "text" else [int(tokenizer.eos_token_id)]


def bos(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The BOS id, unless the template writes that token at every turn (SmolLM2's is `<|im_start|>`)."""
    token = tokenizer.bos_token
    if token is None:
        return None
    if tokenizer.chat_template:
        try:
            text = Dialect.of(tokenizer).text(templates.PROBE)
        except DataError:
            return int(tokenizer.bos_token_id)
        if text.count(token) > 1:
            return None
    return int(tokenizer.bos_token_id)


def cut(made: Mapping[str, Any], settings: Settings, limit: Limit, rows: int) -> Iterator[Finding]:
    """Rows that were cut or shortened, and prompts whose end their answer changes."""
    if made["truncated"]:
        left = settings.on_overlong == "truncate_left"
        what = "have lost the beginning of their prompt to fit into" if left else "are cut at"
        says = f"{what} {settings.max_length:,} tokens; `alignment data show --worst truncation` shows the worst"
        yield Finding("truncated", made["truncated"], rows, says, (), {}, limit("truncated"))
    if made["boundary_mismatches"]:
        says = "have an answer that changes how the end of the prompt is tokenized; the prompt ends before that token"
        yield Finding("prompt-boundary", made["boundary_mismatches"], rows, says, (), {}, limit("prompt-boundary"))
