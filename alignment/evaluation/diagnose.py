"""What the logs of a run show, in words: each finding with its numbers, the usual cause and the key to change.

    for found in diagnose(Path("runs/quickstart"), ["reward", "dpo"]):
        print("\n".join(text(found)))

Nothing here imports torch.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.evaluation.rules import RULES, Rule, Severity
from alignment.evaluation.series import LINES, Series, read
from alignment.pipeline.files import storage
from alignment.pipeline.runs import LOG

REPORT = "report.md"  # as the evaluate stage calls it


@dataclass(frozen=True)
class Finding:
    """A rule that saw its fault.

    Attributes:
        rule, severity: which, and how bad.
        steps: from, to.
        shows: the numbers.
        cause: the usual one.
        remedy: what to change, in words.
        keys: the places in the recipe that the remedy names.
    """

    rule: str
    severity: Severity
    steps: tuple[int, int]
    shows: str
    cause: str
    remedy: str
    keys: tuple[str, ...]


def apply(rule: Rule, series: Series, stage: str) -> Finding | None:
    """Let one rule look at the log of a stage."""
    seen = rule.look(series)
    if seen is None:
        return None
    keys = tuple(f"stages.{stage}.{key}" for key in re.findall(r"\{(.+?)\}", rule.remedy))
    remedy = re.sub(r"\{(.+?)\}", rf"stages.{stage}.\1", rule.remedy)
    return Finding(rule.name, rule.severity, seen.steps, seen.shows, rule.cause, remedy, keys)


@dataclass(frozen=True)
class Diagnosis:
    """What the rules say of one stage.

    Attributes:
        stage: its name.
        logged: whether it has a log.
        lines: of how many logged training steps.
        steps: from, to; None without lines.
        cut: the last line of the log was incomplete.
        rules: the names of those that looked.
        findings: what they found.
    """

    stage: str
    logged: bool = False
    lines: int = 0
    steps: tuple[int, int] | None = None
    cut: bool = False
    rules: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()


def diagnose(run: Path, stages: Sequence[str]) -> list[Diagnosis]:
    """Look at the logs of some stages of a run. Raises what `read` raises."""
    return [judge(stage, read(run / stage / LOG)) for stage in stages]


def reports(run: Path, stages: Sequence[str]) -> dict[str, str]:
    """The pages that evaluate stages of a run have written, by stage. Raises StorageError when one cannot be read."""
    pages = {stage: run / stage / REPORT for stage in stages if (run / stage / REPORT).is_file()}
    with storage(run, "read"):
        return {stage: page.read_text(encoding="utf-8") for stage, page in pages.items()}


def judge(stage: str, series: Series | None) -> Diagnosis:
    """Let every rule that can look at a log do so."""
    if series is None:
        return Diagnosis(stage)
    steps = [entry["step"] for entry in series.entries if "loss" in entry]
    looking = [rule for rule in RULES if steps and rule.looks(series)]
    found = [finding for rule in looking if (finding := apply(rule, series, stage)) is not None]
    return Diagnosis(
        stage=stage, logged=True, lines=len(steps), steps=(steps[0], steps[-1]) if steps else None, cut=series.cut,
        rules=tuple(rule.name for rule in looking), findings=tuple(found),
    )  # fmt: skip


def text(diagnosis: Diagnosis) -> list[str]:
    """A diagnosis for a terminal: one sentence, and four entries for each finding."""
    lines = [_sentence(diagnosis)]
    for finding in diagnosis.findings:
        lines += ["", f"  {finding.severity}  {finding.rule}, steps {finding.steps[0]} to {finding.steps[1]}"]
        for label, words in (("shows", finding.shows), ("cause", finding.cause), ("change", finding.remedy)):
            lines += textwrap.wrap(words, 108, initial_indent=f"    {label:<8}", subsequent_indent=" " * 12,
                                   break_on_hyphens=False, break_long_words=False)  # fmt: skip
    return [*lines, ""] if diagnosis.findings else lines


def _sentence(found: Diagnosis) -> str:
    if not found.logged:
        return f"{found.stage}: no {LOG}: nothing to judge"
    cut = "; the last line is cut and left out" if found.cut else ""
    if found.steps is None:
        return f"{found.stage}: no step is logged: nothing to judge{cut}"
    if found.lines < LINES:
        return (
            f"{found.stage}: too few logged steps ({found.lines}) to judge, {LINES} are needed: lower "
            f"stages.{found.stage}.train.logging_steps; {_result(found)}{cut}"
        )
    steps = f"{found.lines} logged lines, steps {found.steps[0]} to {found.steps[1]}"
    return f"{found.stage}: {len(found.rules)} rules looked at {steps}: {_result(found)}{cut}"


def _result(found: Diagnosis) -> str:
    if found.findings:
        return f"{len(found.findings)} finding{'s' * (len(found.findings) > 1)}"
    return "nothing wrong" if found.lines >= LINES else "its numbers are finite"
