"""The command line: `alignment check | run | data | status | runs | report | verify | chat | export | env`.

Parsing, printing and exit codes only. Whatever imports torch is imported inside the command that needs it, so that
`--help`, `run --dry-run`, `check --quick`, `status`, `runs`, `report`, `verify` and `env` need none of it.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment import datacli, statuscli, verifying
from alignment.commands import EXIT_CODES, add_json, add_recipe, add_runs, command, count, positive, say, silent
from alignment.errors import DataError, ExitCode, RecipeError, UserError
from alignment.recipe.credentials import mask


def run() -> None:
    """The `alignment` program."""
    # Reading upstream's source makes a million small objects, none of them garbage: looking takes a tenth of a second.
    gc.set_threshold(200_000)
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def main(argv: Sequence[str]) -> int:
    """Run one command and return its exit code; an error of the user's is printed as its own text."""
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
    except UserError as error:
        text = mask(str(error))
        print(f"alignment: {text}", file=sys.stderr)
        if getattr(arguments, "json", False):
            print(json.dumps({"code": int(error.code), "error": text}))
        return int(error.code)
    return code


# -- the commands ------------------------------------------------------------------------------------------------------


def _check(arguments: argparse.Namespace) -> int:
    from alignment.checking import check, measure
    from alignment.pipeline.memory.plan import facts, lines, problem
    from alignment.recipe.load import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)
    if arguments.probe or arguments.stage:
        return measure(recipe, arguments)
    plans = _memory_plans(recipe, arguments)
    found = check(recipe, quick=arguments.quick or bool(plans))
    found.problems += [line for plan in plans if (line := problem(plan))]
    if arguments.deep and not found.problems:
        from alignment.training.deep import deep

        more = deep(recipe, runs=arguments.runs, run=recipe.name, recipe_path=arguments.recipe)
        found.checked += more.checked
        found.unchecked += more.unchecked
        found.problems += more.problems
    code = int(ExitCode.BAD_INPUT if found.problems else ExitCode.DONE)
    if arguments.json:
        memory = {plan.stage: facts(plan) for plan in plans}
        print(json.dumps({"code": code, **asdict(found), **({"memory": memory} if plans else {})}))
        return code
    for line in found.checked:
        print(f"ok           {line}")
    for line in found.unchecked:
        print(f"not checked  {line}")
    for plan in plans:
        print("\n".join(lines(plan)))
    for line in found.problems:
        print(f"alignment: {arguments.recipe}: {line}", file=sys.stderr)
    print(f"{arguments.recipe}: {len(recipe.stages)} stages, {count(len(found.problems), 'problem')}")
    return code


def _memory_plans(recipe: Any, arguments: argparse.Namespace) -> list[Any]:
    """The memory of every stage on the GPUs that were asked about; empty if none were."""
    from alignment.pipeline.memory.plan import GIB, assess
    from alignment.pipeline.memory.source import Machine
    from alignment.recipe.load import resolve

    if arguments.gpus is None and arguments.memory is None:
        return []
    memory = None if arguments.memory is None else arguments.memory * GIB
    run = arguments.runs / recipe.name
    return [
        assess(recipe, name, Machine(arguments.gpus or resolve(recipe, name).launch.processes), memory=memory, run=run)
        for name in recipe.stages
    ]


def _run(arguments: argparse.Namespace) -> int:
    from alignment.checking import check, missing_files
    from alignment.pipeline.execute import Request, dry_run, execute, selected
    from alignment.recipe.load import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.set)
    name = arguments.run or recipe.name
    tell = silent if arguments.json or arguments.quiet else say
    if arguments.launch and not arguments.smoke:
        raise RecipeError("--launch belongs to --smoke; a run always goes through the launcher")
    if arguments.slurm and arguments.smoke:
        raise RecipeError("--slurm submits jobs, --smoke runs here; give one of them")
    if arguments.smoke:
        from alignment.training.smoke import smoke

        return smoke(recipe, runs=arguments.runs, run=name, launch=arguments.launch, say=tell)
    request = Request(
        recipe=recipe, recipe_path=arguments.recipe, overrides=arguments.set, runs=arguments.runs, run=name,
        stages=arguments.stage, until=arguments.until, allow=arguments.allow_change, force=arguments.force,
        capture=arguments.json or arguments.quiet,
    )  # fmt: skip
    names = selected(request)
    # What the last stage cannot use should not show after hours. A dry run only looks whether files are there.
    problems = missing_files(recipe, names) if arguments.dry_run else check(recipe, quick=True, names=names).problems
    if problems:
        raise DataError("\n".join(f"{arguments.recipe}: {line}" for line in problems))
    if arguments.slurm:
        from alignment.pipeline import submit

        start = submit.write_scripts if arguments.dry_run else submit.submit
    else:
        start = dry_run if arguments.dry_run else execute
    summary = start(request, tell)
    for stage, result in summary["stages"].items():
        if result.get("message") and tell is silent:
            print(f"alignment: stage {stage}: {result['message']}", file=sys.stderr)
    print(json.dumps(summary) if arguments.json else summary["run"])
    return int(summary["code"])


def _chat(arguments: argparse.Namespace) -> int:
    from alignment.pipeline.overview import model_folder

    folder = model_folder(arguments.name, arguments.runs)
    from alignment.serving.chat import chat

    return chat(
        folder, system=arguments.system, temperature=arguments.temperature, top_p=arguments.top_p,
        max_new_tokens=arguments.max_new_tokens, seed=arguments.seed,
    )  # fmt: skip


def _export(arguments: argparse.Namespace) -> int:
    from alignment.pipeline.overview import model_folder

    if (arguments.name is None) == (arguments.from_checkpoint is None):
        raise RecipeError("export: name a run, a stage or a folder, or give --from-checkpoint CHECKPOINT; one of them")
    if arguments.from_checkpoint is not None:
        from alignment.serving.consolidate import export_checkpoint

        print(export_checkpoint(arguments.from_checkpoint, arguments.out))
        return 0
    folder = model_folder(arguments.name, arguments.runs)
    from alignment.serving.export import export

    print(export(folder, arguments.out))
    return 0


# -- arguments ---------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="alignment",
        description="Train aligned language models as a chain of checked stages that a recipe describes.\n\n"
        "  alignment check recipes/quickstart.yaml     is everything right, before anything runs?\n"
        "  alignment run recipes/quickstart.yaml       run what has not run yet\n"
        "  alignment chat quickstart                   talk to the result",
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    _add_check(commands)
    _add_run(commands)
    datacli.add(commands)
    statuscli.add(commands)
    verifying.add(commands)
    _add_serving(commands)
    return parser


def _add_check(commands: Any) -> None:
    from alignment.recipe.algorithms import ALGORITHMS

    width = max(map(len, ALGORITHMS))
    rows = "".join(f"  {row.name:<{width}}  {row.summary}\n" for row in ALGORITHMS.values())
    parser = command(
        commands, "check", _check, "say whether a recipe can run, without running it",
        "The recipe, its files and the first records of each, at once; then every row, and the chat\n"
        "template on real rows where the tokenizer is on this machine.\n\n"
        "  alignment check recipes/quickstart.yaml --set stages.dpo.train.beta=0.05\n\n"
        "With --gpus or --memory, instead of the rows: what each stage will need on each GPU, at the\n"
        "longest row; the largest batch and longest row that fit; and the cheapest change that makes it\n"
        "fit where it does not. It takes the model's config.json and no GPU.\n\n"
        "  alignment check recipes/zephyr-7b/full.yaml --gpus 8 --memory 80\n\n"
        "With --probe, two steps of each stage at the longest row on this machine, with models of zeros\n"
        "and made-up rows, and their peak beside the plan; code 1 where it is more than 15 % above, or a\n"
        "stage runs out of memory. It takes config.json and tokenizer, and writes nothing into a run.\n\n"
        "  alignment check recipes/zephyr-7b/full.yaml --probe --stage dpo",
        epilog=f"algorithms:\n{rows}\n",
    )  # fmt: skip
    add_recipe(parser)
    parser.add_argument("--quick", action="store_true", help="only what needs no tokenizer: well under a second")
    parser.add_argument("--deep", action="store_true",
                        help="also build every stage whose parents are finished, and make a step without effect: "
                        "recipes/checks.md")  # fmt: skip
    parser.add_argument("--gpus", type=positive(int), metavar="N",
                        help="plan the memory on N GPUs (default: launch.processes of each stage)")  # fmt: skip
    parser.add_argument("--memory", type=positive(float), metavar="GB",
                        help="of one GPU; a stage that does not fit fails the check")  # fmt: skip
    parser.add_argument("--probe", action="store_true", help="measure the memory and compare it with the plan")
    parser.add_argument("--stage", action="append", metavar="NAME", help="with --probe: only this stage (repeatable)")
    add_runs(parser)
    add_json(parser)


def _add_run(commands: Any) -> None:
    parser = command(
        commands, "run", _run, "run the stages of a recipe that have not run yet",
        "Finished stages are skipped, unfinished ones go on from their newest sealed checkpoint, and a\n"
        "stage that differs from what was run is refused with the difference. The run's path is printed\n"
        "last. Ctrl-C saves and stops; a second one stops at once.\n\n"
        "  alignment run recipes/quickstart.yaml\n"
        "  alignment run recipes/quickstart.yaml --run low-beta --set stages.dpo.train.beta=0.05\n"
        "  alignment run recipes/quickstart.yaml --stage dpo --force\n\n"
        "With --slurm it submits one job for each stage that is missing, each after those it links to, and\n"
        "prints the table of jobs; `alignment runs` shows how they stand. Before its time limit a job saves,\n"
        "and queues itself again. What to ask the queue for stands under launch.slurm: in the recipe:\n"
        "recipes/cluster.md.\n\n"
        "  alignment run recipes/zephyr-7b/full.yaml --slurm --set launch.slurm.partition=gpu",
    )  # fmt: skip
    add_recipe(parser)
    parser.add_argument("--run", metavar="NAME", help="name of the run directory (default: the recipe's name)")
    add_runs(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--stage", action="append", default=[], metavar="NAME", help="only this stage (may be repeated)")
    which.add_argument("--until", metavar="NAME", help="all stages up to this one")
    parser.add_argument(
        "--allow-change", action="append", default=[], metavar="KEY",
        help="go on although this key or section changed; the manifest records it (may be repeated)",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true",
                        help="start changed stages again (with --stage: those), and what depends on them; "
                        "what is there is renamed, never deleted. Also goes on after a wrong chain (a parent "
                        "that was altered, another template ...), which the manifest records")  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print stages, status and command lines; write nothing")
    parser.add_argument("--slurm", action="store_true",
                        help="submit the missing stages as Slurm jobs and return; with --dry-run: only write the "
                        "scripts, STAGE/slurm/job.sh")  # fmt: skip
    parser.add_argument("--smoke", action="store_true",
                        help="two steps of every stage with tiny stand-in models and rows, in RUN-smoke")  # fmt: skip
    parser.add_argument("--launch", action="store_true", help="with --smoke: through the launcher, as a real run")
    parser.add_argument("--quiet", action="store_true",
                        help="print only the run's path; what the workers print goes to STAGE/output.log")  # fmt: skip
    add_json(parser)


def _add_serving(commands: Any) -> None:
    name = "a run (its last finished language model), a stage of one, or a model folder"
    parser = command(
        commands, "chat", _chat, "talk to a trained model in the terminal",
        "  alignment chat quickstart\n  alignment chat quickstart:sft --temperature 0",
    )  # fmt: skip
    parser.add_argument("name", metavar="RUN[:STAGE]|PATH", help=name)
    add_runs(parser)
    parser.add_argument("--system", metavar="TEXT", help="a system message")
    parser.add_argument(
        "--temperature", type=float, default=0.7, help="0 always takes the likeliest token (default: 0.7)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="draw from this share of the probability (default: 1)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="longest reply (default: 256)")
    parser.add_argument("--seed", type=int, help="seed of the draws (default: a new one each time)")
    parser = command(
        commands, "export", _export, "write a trained model as one plain folder, adapters merged",
        "The folder loads with `from_pretrained` anywhere. With --from-checkpoint: the model of a run\n"
        "that was killed, also where DeepSpeed left it in shares.\n\n"
        "  alignment export quickstart:dpo my-model\n"
        "  alignment export --from-checkpoint runs/quickstart/dpo/checkpoint-500 my-model",
    )  # fmt: skip
    parser.add_argument("name", metavar="RUN[:STAGE]|PATH", nargs="?", help=name)
    parser.add_argument("--from-checkpoint", type=Path, metavar="CHECKPOINT",
                        help="a checkpoint of yours instead; it must be sealed and whole")  # fmt: skip
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to write; must not exist")
    add_runs(parser)
