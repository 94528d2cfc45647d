"""What `alignment status | runs | report | env` print: how things stand. Nothing here imports torch."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def status(arguments: argparse.Namespace) -> int:
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


def runs(arguments: argparse.Namespace) -> int:
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


def report(arguments: argparse.Namespace) -> int:
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


def env(arguments: argparse.Namespace) -> int:
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
