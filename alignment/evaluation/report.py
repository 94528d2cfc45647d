"""What an evaluation says: the table, the conversations, and the same numbers under flat keys."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from alignment.evaluation.metrics import Estimate

WIDTH = 100
EMPTY = "(nothing)"


@dataclass(frozen=True)
class Line:
    """One model of the table.

    Attributes:
        model: its label.
        kl: nats per reply, to the baseline; NaN without one.
        length: tokens per reply, the stop token included.
        finished: share of replies that ended with a stop token.
        judged: the first judge's mean reward.
        win_rate: against the baseline, by the first judge.
        means: of the other judges, where they apply.
    """

    model: str
    kl: float
    length: float
    finished: float
    judged: Estimate | None = None
    win_rate: Estimate | None = None
    means: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Results:
    """All numbers of an evaluation; `judge` names the one that decides wins."""

    lines: Sequence[Line]
    baseline: str | None
    judge: str | None
    accuracies: Mapping[str, Estimate]
    best_possible: float | None
    pairs: int


@dataclass(frozen=True)
class Shown:
    """One model's reply in a conversation that is shown."""

    model: str
    text: str
    finished: bool
    reward: float | None


def flat(results: Results) -> dict[str, float]:
    """`gold/dpo`, `win_rate_low/dpo`, `accuracy/best_possible` ...: what `metrics.json` holds."""
    numbers: dict[str, float] = {}
    for line in results.lines:
        if line.judged is not None and results.judge is not None:
            numbers |= _spread(results.judge, line.model, line.judged)
        if line.win_rate is not None:
            numbers |= _spread("win_rate", line.model, line.win_rate)
        if results.baseline is not None:
            numbers[f"kl/{line.model}"] = line.kl
        numbers |= {f"{name}/{line.model}": value for name, value in line.means.items()}
        numbers[f"length/{line.model}"] = line.length
        numbers[f"finished/{line.model}"] = line.finished
    for name, accuracy in results.accuracies.items():
        numbers |= _spread("accuracy", name, accuracy)
    if results.best_possible is not None:
        numbers["accuracy/best_possible"] = results.best_possible
    return numbers


def _spread(metric: str, name: str, value: Estimate) -> dict[str, float]:
    return {f"{metric}/{name}": value.value, f"{metric}_low/{name}": value.low, f"{metric}_high/{name}": value.high}


# -- tables ------------------------------------------------------------------------------------------------------------


def models_table(results: Results) -> list[list[str]]:
    """Header and one row per model, as text; empty without models."""
    if not results.lines:
        return []
    judged = any(line.judged for line in results.lines)
    won = any(line.win_rate for line in results.lines)
    others = list(results.lines[0].means)
    header = ["model"]
    header += [str(results.judge), "95 % interval"] * judged
    header += ["win rate", "95 % interval"] * won
    header += [f"KL to {results.baseline}"] * (results.baseline is not None)
    header += [*others, "length", "finished"]
    return [header, *(_cells(line, results, others) for line in results.lines)]


def _cells(line: Line, results: Results, others: Sequence[str]) -> list[str]:
    cells = [line.model]
    if line.judged is not None:
        cells += [_number(line.judged.value, 3), f"[{_number(line.judged.low, 3)}, {_number(line.judged.high, 3)}]"]
    if line.win_rate is not None:
        cells += [_percent(line.win_rate.value), _percents(line.win_rate)]
    if results.baseline is not None:
        cells.append(_number(line.kl, 2))
    cells += [_number(line.means[name], 3) for name in others]
    return [*cells, _number(line.length, 1), _percent(line.finished)]


def scorers_table(results: Results) -> list[list[str]]:
    """Header and one row per reward model, with the best possible last; empty without pairs."""
    rows = [[name, _percent(value.value), _percents(value)] for name, value in results.accuracies.items()]
    if results.best_possible is not None:
        rows.append(["best possible", _percent(results.best_possible), ""])
    return [[f"on {results.pairs:,} pairs", "accuracy", "95 % interval"], *rows] if rows else []


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """The table for a terminal: the first column to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = []
    for row in table:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return lines


def markdown_table(table: Sequence[Sequence[str]]) -> list[str]:
    """The table in Markdown."""
    rule = ["---", *["---:"] * (len(table[0]) - 1)]
    return ["| " + " | ".join(_escape(cell) for cell in row) + " |" for row in (table[0], rule, *table[1:])]


def _number(value: float, digits: int) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.1f} %"


def _percents(value: Estimate) -> str:
    return "-" if math.isnan(value.low) else f"[{100 * value.low:.1f}, {100 * value.high:.1f}]"


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


# -- conversations -----------------------------------------------------------------------------------------------------


def conversation(title: str, prompt: Any, shown: Sequence[Shown]) -> list[str]:
    """One prompt with every model's reply below each other, for a terminal."""
    speakers = [(message["role"], message["content"]) for message in _messages(prompt)]
    margin = 2 + max(len(name) for name in (*(role for role, _ in speakers), *(reply.model for reply in shown)))
    lines = [f"-- {title} ".ljust(WIDTH, "-")]
    for name, text in (*speakers, *((reply.model, _with_notes(reply)) for reply in shown)):
        first, *rest = _wrap(text, WIDTH - margin)
        lines += [name.ljust(margin) + first, *(" " * margin + line for line in rest)]
    return lines


def markdown_conversation(title: str, prompt: Any, shown: Sequence[Shown]) -> list[str]:
    """One prompt with every model's reply, in Markdown."""
    lines = [f"### {title}", ""]
    lines += [f"> **{message['role']}**: {_quoted(message['content'])}\n>" for message in _messages(prompt)]
    rows = [["model", "reward", "reply"], ["---", "---:", "---"]]
    for reply in shown:
        reward = "" if reply.reward is None else _number(reply.reward, 2)
        text = _escape(reply.text).replace("\n", "<br>") or EMPTY
        rows.append([reply.model, reward, text + ("" if reply.finished else " *(cut)*")])
    return [*lines, "", *("| " + " | ".join(row) + " |" for row in rows), ""]


def _messages(prompt: Any) -> list[dict[str, str]]:
    return [{"role": "prompt", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _with_notes(reply: Shown) -> str:
    notes = [] if reply.reward is None else [_number(reply.reward, 2)]
    notes += [] if reply.finished else ["cut"]
    return f"{reply.text.strip() or EMPTY}  [{', '.join(notes)}]" if notes else reply.text.strip() or EMPTY


def _wrap(text: str, width: int) -> list[str]:
    return [part for line in text.splitlines() for part in textwrap.wrap(line, max(width, 20)) or [""]] or [""]


def _quoted(text: str) -> str:
    return text.replace("\n", "\n> ")
