"""`alignment run --slurm`: one job for each stage that is not done, each behind the jobs of the stages it links to.

It submits what is missing and returns: a stage that is done, or whose job waits or runs, is left alone. A stage that
fails takes the jobs that wait for it out of the queue; the next `alignment run --slurm` submits them again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from alignment.errors import ChainError, ExitCode
from alignment.pipeline import describe, slurm
from alignment.pipeline import plan as planning
from alignment.pipeline.execute import Request, Say, opened, planned, refuse, selected, to_archive
from alignment.pipeline.files import storage, write_text
from alignment.pipeline.locks import refuse_if_held
from alignment.pipeline.overview import StageState
from alignment.pipeline.plan import StagePlan


def submit(request: Request, say: Say) -> dict[str, Any]:
    """Submit the stages that are missing; the summary is `{run, code, stages: {name: {status, job, after, ...}}}`.

    Raises:
        ChainError, LockedError, StorageError: see `execute.execute`; also a job in the queue that would run something
            else than the recipe now says.
        SlurmError: Slurm is not there, or refused a job; what was submitted before stays.
    """
    names = selected(request)
    folders = {name: request.folder / name for name in request.recipe.stages}
    live = _live(folders)
    before = planned(request, names)
    for name in to_archive(request, names, before):
        if name in live:
            raise ChainError(f"stages.{name}: job {live[name].id} is in the queue; take it out first: "
                             f"scancel {live[name].id}")  # fmt: skip
    stages: dict[str, Any] = {}
    with opened(request, say):
        plans = planned(request, names)  # what was moved aside is fresh now
        live = _live(folders)
        for name in names:
            _refuse_other(plans[name], live.get(name))
        for name in names:
            stages[name] = _one(plans[name], live)
            if stages[name]["job"] and name not in live:
                live[name] = slurm.Job(stages[name]["job"], "PENDING")
    for line in describe.table([[name, *_row(entry)] for name, entry in stages.items()]):
        say(line)
    return {"run": str(request.folder), "code": int(ExitCode.DONE), "stages": stages}


def write_scripts(request: Request, say: Say) -> dict[str, Any]:
    """`--dry-run --slurm`: write the scripts and say where; nothing is submitted.

    Raises:
        ChainError, StorageError: see `execute.dry_run`.
    """
    names = selected(request)
    plans = planned(request, names, hash_files=False)
    refuse(request, names, plans, to_archive(request, names, plans))
    stages: dict[str, Any] = {}
    for name in names:
        spec, after = plans[name].spec, _parents(plans[name], names)
        path = None if plans[name].status == "done" else _write(plans[name])
        stages[name] = {"status": plans[name].status, "job": None, "after": after, "script": path and str(path)}
        behind = f", after {' and '.join(after)}" if after else ""
        say(f"{describe.title(request.recipe, name)}: {path or 'done'}{behind if path else ''}")
        if path is not None:
            launch = spec.config.launch
            say(
                f"  {launch.machines} nodes, signal {slurm.lead((launch.slurm or slurm.Slurm()).time)} s before the end"
            )
    return {"run": str(request.folder), "dry_run": True, "code": int(ExitCode.DONE), "stages": stages}


def _one(plan: StagePlan, live: dict[str, slurm.Job]) -> dict[str, Any]:
    """Submit one stage, unless it is done or has a job."""
    spec = plan.spec
    entry: dict[str, Any] = {"status": "done", "job": None, "after": {}, "log": None}
    if plan.status == "done":
        planning.record_forced(spec)
        return entry
    job = live.get(spec.stage)
    after = {name: live[name].id for name in plan.waiting_for if name in live}
    if job is None:
        refuse_if_held(spec.output)
        planning.write_stage(spec)
        job = slurm.Job(slurm.sbatch(_write(plan), list(after.values())), "PENDING")
        slurm.record(spec, job.id, after)
        entry["status"] = "submitted"
    else:
        entry["status"] = job.state.lower()
    log = spec.output / slurm.FOLDER / f"{job.id}.log"
    return entry | {"job": job.id, "after": after, "log": str(log)}


def _write(plan: StagePlan) -> Path:
    path = plan.spec.output / slurm.FOLDER / slurm.SCRIPT
    with storage(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, slurm.script(plan.spec))
    return path


def _refuse_other(plan: StagePlan, job: slurm.Job | None) -> None:
    """Raise ChainError where the queue holds a job for another version of the stage than the recipe's."""
    record = slurm.recorded(plan.spec.output) or {}
    if job is not None and record.get("fingerprint_sha256") != plan.spec.fingerprint_sha256:
        raise ChainError(
            f"stages.{plan.spec.stage}: job {job.id} is in the queue with other settings than the recipe has now; take "
            f"it out first (scancel {job.id}), or choose another name with --run NAME"
        )


def _parents(plan: StagePlan, names: Sequence[str]) -> list[str]:
    return [name for name in plan.waiting_for if name in names]


def _live(folders: dict[str, Path]) -> dict[str, slurm.Job]:
    """The jobs that will still run, by stage; one that waits for a job that failed is taken out of the queue."""
    ids = {name: str(record["job"]) for name, folder in folders.items() if (record := slurm.recorded(folder))}
    known = slurm.jobs(list(ids.values()))
    for job in known.values():
        if job.reason == "DependencyNeverSatisfied":
            slurm.cancel(job.id)
    return {name: known[job] for name, job in ids.items() if job in known and known[job].alive}


def _row(entry: dict[str, Any]) -> list[str]:
    after = ", ".join(f"{name} ({job})" for name, job in entry["after"].items())
    job = f"job {entry['job']}" if entry["job"] else ""
    return [entry["status"], job, f"after {after}" if after else "", entry["log"] or ""]


# -- `alignment runs` and `alignment status` ---------------------------------------------------------------------------


def with_jobs(states: Sequence[StageState]) -> list[StageState]:
    """The states of stages with what Slurm says of their jobs; without a job or without Slurm, as they are."""
    records = {}
    for state in states:
        if state.state not in ("done", "damaged") and (record := slurm.recorded(state.folder)) is not None:
            records[state.folder] = record
    try:
        known = slurm.jobs([str(record["job"]) for record in records.values()])
    except slurm.SlurmError:
        known = {}
    shown: dict[Path, StageState] = {}
    for state in states:  # parents come before their children
        record = records.get(state.folder)
        shown[state.folder] = state if record is None else _with_job(state, record, known, shown)
    return list(shown.values())


def _with_job(
    state: StageState, record: dict[str, Any], known: dict[str, slurm.Job], shown: dict[Path, StageState]
) -> StageState:
    name, after = str(record["job"]), record.get("after") or {}
    job, state = known.get(name), replace(state, job=name)
    if job is None:
        return state
    if job.state in slurm.WORKING:
        return replace(state, state="running", code=0, message="")
    if job.alive:
        why = f"after {', '.join(f'{stage} (job {parent})' for stage, parent in after.items())}"
        return replace(state, state="queued", code=0, message=why if job.reason == "Dependency" else job.reason)
    if state.state == "not started" and job.state != "CANCELLED":
        why = f"the job ended ({job.state}) before the worker began; see {state.folder / slurm.FOLDER / f'{name}.log'}"
        return replace(state, state="failed", code=int(ExitCode.FAILED), message=why)
    if job.state == "CANCELLED" or (not job.alive and job.reason):
        failed = [shown[folder] for parent in after if (folder := state.folder.parent / parent) in shown]
        failed = [parent for parent in failed if parent.state not in ("done", "queued", "running")]
        why = f"because {failed[0].stage} {failed[0].state}" if failed else job.state
        if state.state in ("not started", "running"):
            state = replace(state, state="cancelled", code=int(ExitCode.FAILED), message=f"cancelled {why}")
        return state
    if state.state in ("running", "killed"):  # the job ended, and the worker could not say why
        return replace(state, state="killed", code=int(ExitCode.FAILED), message=f"the job ended: {job.state}")
    return state
