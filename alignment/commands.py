"""What the modules of the command line share: how a command is added, the options many have, and how they print."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

EXIT_CODES = """\
exit codes:
  0 done   1 a stage or check failed   2 bad input or a changed recipe   3 no whole checkpoint   4 storage
  5 in use by another process   6 not finite   7 hang   85 preempted: start it again
"""


def command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], summary: str, text: str, epilog: str = ""
) -> argparse.ArgumentParser:
    """Add a command to the program's; `function` runs it and returns its exit code."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary}\n\n{text}", epilog=epilog + EXIT_CODES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(command=function)
    return parser


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """The type of an argument that is a number above 0."""

    def convert(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise ValueError(text)
        return value

    convert.__name__ = "number above 0"
    return convert


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """A recipe, and overrides of its keys."""
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a recipe (YAML)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="override one key, by its full path: stages.dpo.train.beta=0.05 (may be repeated)",
    )  # fmt: skip


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Where runs lie."""
    parser.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR",
                        help="the folder of all run directories (default: runs)")  # fmt: skip


def add_json(parser: argparse.ArgumentParser) -> None:
    """For programs that call this one."""
    parser.add_argument("--json", action="store_true", help="print one JSON object on stdout, and nothing else")


def say(text: str) -> None:
    """Print a line now, also into a pipe."""
    print(text, flush=True)


def silent(text: str) -> None:
    """Print nothing."""


def count(number: int, what: str) -> str:
    """`no problems`, `1 problem`, `2 problems`."""
    return f"{number or 'no'} {what}{'' if number == 1 else 's'}"
