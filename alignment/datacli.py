"""The command line's group `alignment data`: check, show, prepare, score, convert.

What imports torch is imported inside the commands.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from alignment.commands import EXIT_CODES, add_json, add_recipe, add_runs, command, count, say, silent


def _check(arguments: argparse.Namespace) -> int:
    from alignment import inspecting

    reports = []
    found = inspecting.check(
        arguments.paths, overrides=arguments.set, stages=arguments.stage, strict=arguments.strict,
        against=arguments.against, tokenizer=arguments.tokenizer, template=arguments.chat_template,
        columns=arguments.columns, format=arguments.format, subset=arguments.subset, runs=arguments.runs,
        say=silent,
    )  # fmt: skip
    for report in found:
        reports.append(report)
        if not arguments.json:
            from alignment.data import page

            print("\n".join([*page.lines(report), ""]), flush=True)
    total = inspecting.total(reports)
    passed = [f"{report['stage']}: {check}" for report in reports for check in report["limits_passed"]]
    if arguments.json:
        print(json.dumps(total))
    else:
        kept = f"{total['rows']['kept']:,} of {total['rows']['in']:,} rows kept"
        print(f"{kept}, {count(len(total['findings']), 'finding')}, {count(len(passed), 'limit')} passed")
    return int(total["code"])


def _show(arguments: argparse.Namespace) -> int:
    from alignment.inspecting import show

    color = sys.stdout.isatty() and not arguments.no_color
    print(show(
        arguments.recipe, overrides=arguments.set, stage=arguments.stage, row=arguments.row, worst=arguments.worst,
        ids=arguments.ids, color=color,
    ))  # fmt: skip
    return 0


def _prepare(arguments: argparse.Namespace) -> int:
    from alignment.inspecting import prepare

    names = prepare(
        arguments.recipe, overrides=arguments.set, stages=arguments.stage, runs=arguments.runs, say=say
    )  # fmt: skip
    print(f"{arguments.recipe}: {count(len(names), 'stage')} ready in {arguments.runs / '.cache'}")
    return 0


def _score(arguments: argparse.Namespace) -> int:
    from alignment.scoring import score

    score(
        arguments.recipe, arguments.out, overrides=arguments.set, stage=arguments.stage, model=arguments.model,
        run=arguments.run, runs=arguments.runs, say=say,
    )  # fmt: skip
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    from alignment.data.convert import convert, source_of

    source = source_of(
        str(arguments.input), columns=arguments.columns, format=arguments.format, subset=arguments.subset,
        split=arguments.split, pairs=arguments.pairs, score=arguments.score,
    )  # fmt: skip
    tell = silent if arguments.json else say
    summary = convert(source, arguments.out, schema=arguments.to, strict=arguments.strict, say=tell)
    if arguments.json:
        print(json.dumps({"code": 0, **summary}))
    return 0


# -- arguments --------------------------------------------------------------------------------------------------------


def add(commands: Any) -> None:
    """`alignment data`, a group of commands of its own."""
    summary = "look at rows before anything is trained"
    parser = commands.add_parser(
        "data", help=summary, epilog=EXIT_CODES, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=f"{summary}\n\n  alignment data check recipes/quickstart.yaml\n"
        "  alignment data show recipes/quickstart.yaml --stage dpo --row 17",
    )  # fmt: skip
    group = parser.add_subparsers(metavar="COMMAND", required=True, help="what to do with them")
    _add_check(group)
    _add_show(group)
    _add_prepare(group)
    _add_score(group)
    _add_convert(group)


def _add_check(group: Any) -> None:
    parser = command(
        group, "check", _check, "report what is wrong with the rows of a recipe, or of files",
        "Rows dropped and why; duplicates; held-out rows and evaluation sets that are trained on; credentials\n"
        "and personal data (counted, never printed); tokens, lengths, padding; what a preference model could\n"
        "learn from pairs other than what is better; and the proof that the chat template trains the\n"
        "assistant's text. Exits with 1 when a limit of the recipe (data.limits) is passed.\n\n"
        "  alignment data check recipes/quickstart.yaml --stage dpo\n"
        "  alignment data check my/pairs.jsonl --against eval/gsm8k.jsonl",
    )  # fmt: skip
    parser.add_argument("paths", nargs="+", metavar="RECIPE|FILES", help="a recipe (.yaml), or files of rows")
    _add_set(parser)
    _add_stages(parser)
    _add_source(parser, "with files: ")
    parser.add_argument("--strict", action="store_true", help="exit with 1 on any finding, whatever the limits")
    parser.add_argument("--against", action="append", default=[], metavar="FILE",
                        help="an evaluation set that must not be trained on (may be repeated); those of the\n"
                        "recipe's evaluate stages are looked for in any case")  # fmt: skip
    parser.add_argument("--tokenizer", metavar="FOLDER", help="with files: count tokens with this tokenizer")
    parser.add_argument("--chat-template", metavar="NAME", help="with files: a named template or a .jinja file")
    add_runs(parser)
    add_json(parser)


def _add_show(group: Any) -> None:
    parser = command(
        group, "show", _show, "show one row as the model sees it",
        "What is trained, what is not, what is cut; special tokens and line ends visible; of pairs both\n"
        "answers side by side, with what differs marked.\n\n"
        "  alignment data show recipes/quickstart.yaml --stage dpo --row 17\n"
        "  alignment data show my.yaml --stage sft --worst truncation --ids",
    )  # fmt: skip
    add_recipe(parser)
    parser.add_argument("--stage", required=True, metavar="NAME", help="the stage whose rows are shown")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--row", metavar="N", default="0",
                       help="the number of a row, from 0, or where it stands: pairs.jsonl:12 (default: 0)")  # fmt: skip
    which.add_argument("--worst", choices=("truncation", "length"),
                       help="the row that loses most tokens, or the longest")  # fmt: skip
    parser.add_argument("--ids", action="store_true", help="also print the token ids")
    parser.add_argument("--no-color", action="store_true", help="no colours on a terminal")


def _add_prepare(group: Any) -> None:
    parser = command(
        group, "prepare", _prepare, "tokenize the rows of a recipe into the cache that training reads",
        "A run that comes after finds its tables there.\n\n  alignment data prepare recipes/quickstart.yaml",
    )  # fmt: skip
    add_recipe(parser)
    _add_stages(parser)
    add_runs(parser)


def _add_score(group: Any) -> None:
    parser = command(
        group, "score", _score, "write the rows of a stage with the loss that its model has on each",
        "In TRL's conversational schema, with a column `loss`: the mean over the trained tokens; of a pair\n"
        "-log sigmoid of how much more likely per token the chosen answer is. With OUT as source of the stage,\n"
        "`prune: {by: loss, keep: 0.5, side: middle}` leaves out what the model knows and what no model learns.\n\n"
        "  alignment data score my.yaml --stage sft scored.jsonl",
    )  # fmt: skip
    add_recipe(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new .jsonl file (also .jsonl.gz, .jsonl.zst)")
    parser.add_argument("--stage", required=True, metavar="NAME", help="the stage whose rows are scored")
    parser.add_argument("--model", metavar="FOLDER", help="the model (default: the one that the stage starts from)")
    parser.add_argument("--run", metavar="NAME", help="the run whose stages the model may be (default: the recipe's)")
    add_runs(parser)


def _add_set(parser: argparse.ArgumentParser) -> None:
    """`--set`, where the recipe is no argument of its own."""
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE",
                        help="override one key of the recipe, by its full path (may be repeated)")  # fmt: skip


def _add_stages(parser: argparse.ArgumentParser) -> None:
    """`--stage`, of which several may be named."""
    parser.add_argument(
        "--stage", action="append", default=[], metavar="NAME", help="only this stage (may be repeated)"
    )


def _add_source(parser: argparse.ArgumentParser, when: str) -> None:
    """What a recipe says of a source, for a file on the command line."""
    parser.add_argument("--format", metavar="NAME", help=f"{when}their format, where it is not to be recognised")
    parser.add_argument("--column", action="append", default=[], metavar="OURS=THEIRS", dest="columns",
                        help=f"{when}our name of a column, and the file's (may be repeated)")  # fmt: skip
    parser.add_argument("--subset", metavar="NAME", help=f"{when}which data set of a description or on the hub")


def _add_convert(group: Any) -> None:
    from alignment.recipe.schema import Source

    parser = command(
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
    _add_source(parser, "")
    parser.add_argument("--split", default=Source.model_fields["split"].default, metavar="NAME",
                        help="split of a folder or on the hub (default: train)")  # fmt: skip
    parser.add_argument("--pairs", choices=["best-worst", "adjacent", "all"], default="best-worst",
                        help="pairs made of several rated answers (default: best-worst)")  # fmt: skip
    parser.add_argument("--score", metavar="KEY", help="what rates such answers, where it is not the usual key")
    parser.add_argument("--strict", action="store_true", help="stop at the first row that cannot be used")
    add_json(parser)
