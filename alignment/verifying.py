"""The command `alignment verify`: parsing, printing and exit code; the work is in `pipeline/verify.py`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from alignment.commands import add_json, add_runs, command
from alignment.errors import ExitCode


def add(commands: Any) -> None:
    """Add the command to the program's."""
    parser = command(
        commands, "verify", _verify, "say whether a stage, an exported model or a checkpoint is what was written",
        "Reads every byte that the manifest (or a checkpoint's seal) names, and holds together what the\n"
        "records say of each other: weights, tokenizer, template, stop tokens, the base of an adapter,\n"
        "parents. One line for each fault, exit code 2; nothing is loaded or run, no network is needed.\n\n"
        "  alignment verify runs/quickstart/dpo\n"
        "  alignment verify my-model",
    )  # fmt: skip
    parser.add_argument("path", type=Path, metavar="PATH",
                        help="a run, a stage of it, an exported model, or a checkpoint")  # fmt: skip
    add_runs(parser)
    add_json(parser)


def _verify(arguments: argparse.Namespace) -> int:
    from alignment.pipeline.verify import verify

    below = arguments.runs / arguments.path
    verdict = verify(below if below.exists() and not arguments.path.exists() else arguments.path)
    code = int(ExitCode.BAD_INPUT if verdict.problems else ExitCode.DONE)
    if arguments.json:
        found = {"checked": verdict.checked, "notes": verdict.notes, "problems": verdict.problems}
        print(json.dumps({"path": str(verdict.path), "code": code, **found}))
        return code
    for line in verdict.checked:
        print(f"ok    {line}")
    for line in verdict.notes:
        print(f"note  {line}")
    for line in verdict.problems:
        print(f"alignment: {line}", file=sys.stderr)
    return code
