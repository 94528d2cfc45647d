"""`alignment run`: plan the stages, refuse what cannot be right, then run one after the other.

Nothing is written before the recipe, its files and the state of the run agree. While it works it holds the run's lock;
each stage's worker holds the stage's own.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.errors import ChainError, ExitCode, RecipeError
from alignment.pipeline import chains, describe, launch, space
from alignment.pipeline import plan as planning
from alignment.pipeline.files import sweep
from alignment.pipeline.locks import holder, lock, refuse_if_held
from alignment.pipeline.memory import plan as memory_plan
from alignment.pipeline.memory.source import Machine
from alignment.pipeline.plan import StagePlan
from alignment.pipeline.runs import OUTPUT, STAGE, read_manifest
from alignment.recipe.load import resolve
from alignment.recipe.problems import did_you_mean
from alignment.recipe.schema import Launch, Recipe

Say = Callable[[str], None]


@dataclass(frozen=True)
class Request:
    """One `alignment run`.

    Attributes:
        recipe, recipe_path, overrides: what to run, and where it came from.
        runs, run: the folder of all runs, and the name of this one.
        stages: only these; empty for all.
        until: the last one, of all.
        allow: keys whose change is accepted.
        force: start changed stages (with `stages`: those) again, moving what is there aside.
        capture: the worker's output goes to `output.log` in its folder.
    """

    recipe: Recipe
    recipe_path: Path
    overrides: Sequence[str]
    runs: Path
    run: str
    stages: Sequence[str] = ()
    until: str | None = None
    allow: Sequence[str] = ()
    force: bool = False
    capture: bool = False

    @property
    def folder(self) -> Path:
        """The run directory."""
        return self.runs / self.run


def dry_run(request: Request, say: Say) -> dict[str, Any]:
    """Print the plan with its exact command lines; nothing is written and nothing is hashed.

    Raises:
        ChainError: the run would be refused.
    """
    names = selected(request)
    plans = planned(request, names, hash_files=False)
    stages = {}
    for name in names:
        plan = plans[name]
        say(f"{describe.title(request.recipe, name)}: {describe.status(plan)}")
        for line in describe.details(request.recipe, plan):
            say(line)
        memory = _memory(request, name)
        say(f"  memory     {memory['text']}")
        path = plan.spec.output / STAGE
        if plan.status in ("fresh", "resume", "waiting"):
            say(f"  command    {launch.shown(plan.spec, path)}")
        stages[name] = {"status": plan.status, "waiting_for": list(plan.waiting_for), "path": str(plan.spec.output),
                        "difference": list(plan.difference), "command": launch.command(plan.spec, path),
                        "environment": launch.settings(plan.spec), "memory": memory}  # fmt: skip
    moved = to_archive(request, names, plans)
    for name in moved:
        say(f"{name}: {request.folder / name} would be moved aside")
    refuse(request, names, plans, moved)
    _admit(request, names, plans, deep=False)
    return {"run": str(request.folder), "dry_run": True, "code": 0, "stages": stages}


def _memory(request: Request, name: str) -> dict[str, Any]:
    """What a stage needs on this machine's devices, as it would be launched."""
    machine = this_machine(resolve(request.recipe, name).launch)
    plan = memory_plan.assess(request.recipe, name, machine, run=request.folder)
    return {"text": memory_plan.brief(plan, cuda=machine.cuda), **memory_plan.facts(plan)}


def this_machine(config: Launch) -> Machine:
    """The devices of this machine on which a stage would be launched."""
    cuda = bool(launch.gpus({**os.environ, **config.env}))
    return Machine(config.processes, cuda=cuda, fast_bfloat16=cuda or launch.cpu_has_amx())


def execute(request: Request, say: Say) -> dict[str, Any]:
    """Run what has to run, and return the summary: `{run, code, stages: {name: {status, code, metrics, ...}}}`.

    Raises:
        ChainError: a stage changed, or its parent is unfinished and not asked for.
        LockedError: another live process works on this run.
        StorageError: the run directory cannot be written.
    """
    with opened(request, say) as (names, plans):
        for name in names:
            if plans[name].status != "done":
                launch.refuse_several_nodes(plans[name].spec)
        summary: dict[str, Any] = {"run": str(request.folder), "code": int(ExitCode.DONE), "stages": {}}
        if len(names) > 1 and any(plans[name].status != "done" for name in names):
            for name in names:
                say(f"{describe.title(request.recipe, name)}: {describe.status(plans[name])}")
            say("")
        ran = False
        for name in names:
            result = _stage(request, name, say)
            summary["stages"][name] = result
            ran = ran or result["ran"]
            left = [other for other in names[names.index(name) + 1 :] if plans[other].status != "done"]
            if result["status"] == "done" and not left:
                result["code"] = int(ExitCode.DONE)  # a signal that found nothing more to stop
            elif result["status"] == "done" and result["code"] != ExitCode.DONE:
                say(f"stopped before {left[0]}; the same command goes on")
            if result["code"] != ExitCode.DONE:
                summary["code"] = result["code"]
                break
    if not ran:
        say(f"nothing to do: {'all ' if len(names) > 1 else ''}{len(names)} of {len(names)} stages are done")
    return summary


@contextmanager
def opened(request: Request, say: Say) -> Iterator[tuple[list[str], dict[str, StagePlan]]]:
    """Hold the run's lock while the block works: what was asked for, and how it stands; the recipe is written.

    Raises:
        ChainError, LockedError, StorageError: see `execute`.
    """
    names = selected(request)
    plans = planned(request, names)
    refuse(request, names, plans, to_archive(request, names, plans))
    _admit(request, names, plans)
    with lock(request.folder, say=say):
        plans = planned(request, names)  # another run may have been at work until now
        moved = to_archive(request, names, plans)
        refuse(request, names, plans, moved)
        for name in moved:
            refuse_if_held(request.folder / name)
        for name in moved:
            target = planning.archive(request.folder / name)
            say(f"{name}: what was there is now {target}") if target else None
        planning.write_recipe(request.recipe, request.folder, origin=request.recipe_path, overrides=request.overrides)
        yield names, plans


def _stage(request: Request, name: str, say: Say) -> dict[str, Any]:
    """Run one stage if it needs to; a line before and after."""
    plan = planning.prepare(
        request.recipe, name, runs=request.runs, run=request.run, recipe_path=request.recipe_path, allow=request.allow
    )
    refuse(request, [name], {name: plan}, [])
    title, spec, folder = describe.title(request.recipe, name), plan.spec, plan.spec.output
    if plan.status == "done":
        planning.record_forced(spec)
        if holder(folder) is None:
            sweep(folder)  # what a kill between the manifest and the last status left
        metrics = (read_manifest(folder) or {}).get("metrics") or {}
        shown = describe.key_metrics(metrics)
        say(f"{title}: done already{f' ({shown})' if shown else ''}")
        return {"status": "done", "ran": False, "code": 0, "metrics": metrics, "path": str(folder), "message": ""}
    launch.refuse_impossible(spec)
    refuse_if_held(folder)
    spec = chains.admit(spec, force=request.force)
    plan = replace(plan, spec=spec)
    space.refuse_if_full(request.recipe, name, request.folder, this_machine(resolve(request.recipe, name).launch))
    say(f"{title}: {describe.status(plan)}")
    for line in describe.details(request.recipe, plan):
        say(line)
    path = planning.write_stage(spec)
    started = time.monotonic()
    code = launch.run_stage(spec, path, output=folder / OUTPUT if request.capture else None, say=say)
    seconds = time.monotonic() - started
    finished, message = launch.outcome(spec)
    done = finished == ExitCode.DONE  # even if it is time to stop
    metrics = ((read_manifest(folder) or {}).get("metrics") or {}) if done else {}
    shown = describe.key_metrics(metrics)
    state = "done" if done else "preempted" if code == ExitCode.PREEMPTED else "failed"
    ending = f", exit code {code}" if state == "failed" else "; the same command continues it" if not done else ""
    say(f"{title}: {state} after {describe.duration(seconds)}{ending}{f': {shown}' if shown else ''}")
    return {"status": state, "ran": True, "code": code, "seconds": round(seconds, 1), "metrics": metrics,
            "path": str(folder), "message": message}  # fmt: skip


def selected(request: Request) -> list[str]:
    """The stages to run, in the recipe's order. Raises RecipeError for a name that it does not have."""
    known = list(request.recipe.stages)
    for flag, name in [("--stage", name) for name in request.stages] + [("--until", request.until)]:
        if name is not None and name not in known:
            raise RecipeError(f"{flag} {name}: no such stage{did_you_mean(name, known)}; stages are {', '.join(known)}")
    if request.until is not None:
        known = known[: known.index(request.until) + 1]
    return [name for name in known if not request.stages or name in request.stages]


def planned(request: Request, names: Sequence[str], *, hash_files: bool = True) -> dict[str, StagePlan]:
    """How the stages stand that were asked for, and those that they link to."""
    return planning.plan(
        request.recipe, runs=request.runs, run=request.run, recipe_path=request.recipe_path, hash_files=hash_files,
        allow=request.allow, names=names,
    )  # fmt: skip


def to_archive(request: Request, names: Sequence[str], plans: dict[str, StagePlan]) -> list[str]:
    """With --force: the stages whose folder is moved aside, those that depend on them included."""
    if not request.force:
        return []
    first = request.stages or [name for name in names if plans[name].status == "changed"]
    moved = set(first).union(*(planning.dependants(request.recipe, name) for name in first))
    return [name for name in request.recipe.stages if name in moved and (request.folder / name).exists()]


def _admit(request: Request, names: Sequence[str], plans: dict[str, StagePlan], *, deep: bool = True) -> None:
    """Refuse wrong chains before the first stage starts, where what they link to is there already.

    Raises:
        ChainError: all of them at once.
    """
    wrong = []
    for name in names:
        if plans[name].status in ("fresh", "resume"):
            try:
                chains.admit(plans[name].spec, force=request.force, deep=deep)
            except ChainError as error:
                wrong.append(str(error))
    if wrong:
        raise ChainError("\n".join(wrong))


def refuse(request: Request, names: Sequence[str], plans: dict[str, StagePlan], moved: Sequence[str]) -> None:
    """Raise ChainError for what stands in the way of running `names`, all of it at once.

    Raises:
        ChainError: a changed stage, or a parent that is neither finished nor asked for.
    """
    # A parent that is not asked for and was altered stands with the stage that links to it (`_admit`).
    parents = {name for name, plan in plans.items() if plan.altered and name not in names}
    problems = [line for name, plan in plans.items() if name not in {*moved, *parents} for line in plan.difference]
    if problems:
        raise ChainError(
            "\n".join(problems)
            + f"\n{request.folder} does not fit the recipe (see above): choose another name with --run NAME, accept "
            "a change and go on with --allow-change KEY, or start again with --force (moves what is there aside)"
        )
    for name in names:
        absent = [parent for parent in plans[name].waiting_for if parent not in names]
        if absent:
            first = " and ".join(absent)
            raise ChainError(f"stages.{name}: {first} must be finished first; run everything up to it: --until {name}")
