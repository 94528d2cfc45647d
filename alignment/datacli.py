"""The command line's group `alignment data`: convert.

Imported by `cli` when it makes its parser; what imports torch is imported inside the commands.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from alignment import cli


def _convert(arguments: argparse.Namespace) -> int:
    from alignment.data.convert import convert, source_of

    source = source_of(
        str(arguments.input), columns=arguments.columns, format=arguments.format, subset=arguments.subset,
        split=arguments.split, pairs=arguments.pairs, score=arguments.score,
    )  # fmt: skip
    say = cli._silent if arguments.json else cli._say
    summary = convert(source, arguments.out, schema=arguments.to, strict=arguments.strict, say=say)
    if arguments.json:
        print(json.dumps({"code": 0, **summary}))
    return 0


# -- arguments --------------------------------------------------------------------------------------------------------


def add(commands: Any) -> None:
    """`alignment data`, a group of commands of its own."""
    summary = "look at rows before anything is trained"
    parser = commands.add_parser(
        "data", help=summary, epilog=cli.EXIT_CODES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{summary}\n\n  alignment data convert pairs.json.gz pairs.jsonl",
    )  # fmt: skip
    group = parser.add_subparsers(metavar="COMMAND", required=True, help="what to do with them")
    _add_convert(group)


def _add_convert(group: Any) -> None:
    from alignment.recipe.schema import Source

    parser = cli._command(
        group, "convert", _convert, "write rows of any known format in TRL's conversational schema",
        "Row by row, whatever the size. Says the format it recognised, and counts what it dropped and why.\n\n"
        "  alignment data convert pairs.json.gz pairs.jsonl\n"
        "  alignment data convert ultrafeedback.parquet pairs.jsonl.zst --pairs all\n"
        "  alignment data convert LLaMA-Factory/data/dataset_info.json out.jsonl --subset alpaca_en_demo\n"
        "  alignment data convert gsm8k.jsonl sft.jsonl --column prompt=question --column completion=answer",
    )  # fmt: skip
    parser.add_argument("input", type=Path, metavar="IN", help="a file, glob, folder or hub name, a dataset_info.json "
                        "of LLaMA-Factory, or an Axolotl file")  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="a new .jsonl file (also .jsonl.gz, .jsonl.zst)")
    parser.add_argument("--to", choices=["messages", "preference", "unpaired", "prompts", "text"],
                        help="the schema to write (default: the one that suits the format)")  # fmt: skip
    parser.add_argument("--format", metavar="NAME", help="the format of IN, where it is not to be recognised")
    parser.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", dest="columns",
                        help="our name of a column, and the file's (may be repeated)")  # fmt: skip
    parser.add_argument("--subset", metavar="NAME", help="which data set of a description or on the hub")
    parser.add_argument("--split", default=Source.model_fields["split"].default, metavar="NAME",
                        help="split of a folder or on the hub (default: train)")  # fmt: skip
    parser.add_argument("--pairs", choices=["best-worst", "adjacent", "all"], default="best-worst",
                        help="pairs made of several rated answers (default: best-worst)")  # fmt: skip
    parser.add_argument("--score", metavar="KEY", help="what rates such answers, where it is not the usual key")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    cli._add_json(parser)
