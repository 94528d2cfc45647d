"""What `alignment status | runs | report | env` print: how things stand. Nothing here imports torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from alignment.commands import add_json, add_runs, command


def _status(arguments: argparse.Namespace) -> int:
    from alignment.pipeline import overview, submit
    from alignment.pipeline.describe import table

    run, stage = overview.find(arguments.name, arguments.runs)
    states = submit.with_jobs([overview.stage_state(run / name) for name in overview.stage_names(run)])
    states = [state for state in states if stage in (None, state.stage)]
    code = next((state.code for state in states if state.code), 0)
    if arguments.json:
        print(json.dumps({"run": str(run), "code": code, "stages": [_plain(state) for state in states]}))
        return code
    for line in table([_state_row(state) for state in states]):
        print(line)
    return code


def _runs(arguments: argparse.Namespace) -> int:
    from alignment.pipeline import overview, submit
    from alignment.pipeline.describe import table

    every = [overview.stage_state(run / name) for run in overview.runs_in(arguments.runs)
             for name in overview.stage_names(run)]  # fmt: skip
    found: dict[Path, list[Any]] = {}
    for state in submit.with_jobs(every):
        found.setdefault(state.folder.parent, []).append(state)
    if arguments.json:
        print(json.dumps({run.name: [_plain(state) for state in states] for run, states in found.items()}))
        return 0
    for line in table([[run.name, *_state_row(state)] for run, states in found.items() for state in states]):
        print(line)
    if not found:
        print(f"no runs in {arguments.runs}")
    return 0


def _report(arguments: argparse.Namespace) -> int:
    from alignment.evaluation import diagnose
    from alignment.pipeline import overview

    run, stage = overview.find(arguments.name, arguments.runs)
    names = [stage] if stage else overview.stage_names(run)
    if arguments.diagnose:
        found = diagnose.diagnose(run, names)
        lines = [line for diagnosis in found for line in diagnose.text(diagnosis)]
        said: dict[str, Any] = {"stages": [asdict(diagnosis) for diagnosis in found]}
    else:
        pages = diagnose.reports(run, names)
        none = f"no report.md in {arguments.name}: `alignment status {run}` shows how its stages stand"
        lines = [page.rstrip() for page in pages.values()] or [none]
        said = {"reports": pages}
    print(json.dumps({"run": str(run), "code": 0, **said}) if arguments.json else "\n".join(lines))
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from alignment.environment import environment, lines

    found = environment(devices=arguments.devices)
    print(json.dumps(found) if arguments.json else "\n".join(lines(found)))
    return 0


def _plain(state: Any) -> dict[str, Any]:
    return {**asdict(state), "folder": str(state.folder)}


def _state_row(state: Any) -> list[str]:
    from alignment.pipeline.describe import duration, key_metrics

    progress = f"step {state.step} of {state.steps}" if state.step is not None and state.state != "done" else ""
    time = duration(state.seconds) if state.seconds is not None else ""
    told = progress or state.message or key_metrics(state.metrics)
    return [state.stage, state.state, time, ", ".join(filter(None, (state.job and f"job {state.job}", told)))]


def add(commands: Any) -> None:
    """Add these commands to the program's."""
    parser = command(
        commands, "status", _status, "say how a run or a stage stands",
        "Exits with the stage's own exit code (of a run: the first that is not 0), so that scripts can\n"
        "tell 85 (start it again) from 1 (failed).\n\n  alignment status quickstart/dpo",
    )  # fmt: skip
    parser.add_argument("name", metavar="RUN[/STAGE]", help="a run, a stage of it, or a path to either")
    add_runs(parser)
    add_json(parser)
    parser = command(
        commands, "runs", _runs, "list the runs here: stages, status, time, key metrics",
        "The latest first.\n\n  alignment runs --runs /scratch/runs",
    )  # fmt: skip
    add_runs(parser)
    add_json(parser)
    parser = command(
        commands, "report", _report, "print what a run has found out, or what its logs show",
        "The pages that its evaluate stages wrote. With --diagnose: faults that the log of each stage\n"
        "shows (KL that grows without reward, a critic that does not learn, a loss that rises ...), with\n"
        "numbers, the usual cause, and the key of the recipe to change. Findings do not change the exit\n"
        "code.\n\n  alignment report quickstart\n  alignment report quickstart/dpo --diagnose",
    )  # fmt: skip
    parser.add_argument("name", metavar="RUN[/STAGE]", help="a run, a stage of it, or a path to either")
    add_runs(parser)
    parser.add_argument("--diagnose", action="store_true", help="read each stage's log.jsonl and say what is wrong")
    add_json(parser)
    parser = command(
        commands, "env", _env, "show versions, devices, and what is missing for what",
        "Paste its output into a bug report.\n\n  alignment env --devices",
    )  # fmt: skip
    parser.add_argument("--devices", action="store_true", help="also ask torch which devices it sees (imports it)")
    add_json(parser)
