"""Slurm: the script of a stage's job, and what the queue says of jobs.

A job runs one task on each of its nodes, `python -m alignment.pipeline.node`, and asks it afterwards how the stage
ended. Before the time limit Slurm sends SIGUSR1 to the tasks: the worker saves, and the script puts its own job back
into the queue, under the same id, so that the jobs that wait for it go on waiting.
"""

from __future__ import annotations

import getpass
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from alignment.errors import ChainError, UserError
from alignment.pipeline.files import read_json, write_json
from alignment.pipeline.plan import StageSpec
from alignment.pipeline.runs import STAGE, now
from alignment.recipe.launching import Slurm

FOLDER = "slurm"  # in the stage's folder: script, record, logs
SCRIPT, RECORD = "job.sh", "job.json"
LEAD = 300  # seconds before the time limit at which the worker is told to save
ANSWER = 30  # seconds to wait for the controller
WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"})
WORKING = frozenset({
    "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING",
})  # fmt: skip


class SlurmError(UserError):
    """Slurm is not there, does not answer, or refused a job."""


@dataclass(frozen=True)
class Job:
    """A job as the queue, or after its end the accounting, knows it.

    Attributes:
        state: Slurm's word, such as PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT.
        reason: why it waits.
    """

    id: str
    state: str
    reason: str = ""

    @property
    def alive(self) -> bool:
        """Whether it will still run; what waits for a job that failed never will."""
        return self.state in WAITING | WORKING and self.reason != "DependencyNeverSatisfied"


# -- the script --------------------------------------------------------------------------------------------------------

BODY = """\
set -euo pipefail
cd {folder}
{setup}
# What the batch job got for each task; srun does not take it over by itself.
if [ -n "${{SLURM_CPUS_PER_TASK:-}}" ]; then export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"; fi
# Why a connection broke is said; that it ends the ranks, and does not hang them, is torch's default.
export NCCL_DEBUG="${{NCCL_DEBUG:-WARN}}"

node=({python} -m alignment.pipeline.node {stage})
port=$("${{node[@]}}" port) # one rendezvous for the job, here, on its first node
# --wait: when one node has ended, the others have that long. The end is judged below, not by srun's exit code.
srun --nodes={nodes} --ntasks-per-node=1 --mpi=none --kill-on-bad-exit=1 --wait=180 \\
    "${{node[@]}}" run --port "$port" || true
code=0
"${{node[@]}}" end || code=$?
if [ "$code" -eq 85 ]; then
    scontrol requeue "$SLURM_JOB_ID" # saved on a signal: the same job goes on from there
fi
exit "$code"
"""


def script(spec: StageSpec) -> str:
    """The text of the batch script that runs one stage."""
    launch = spec.config.launch
    slurm = launch.slurm or Slurm()
    gpus = slurm.gpus_per_node
    if gpus is None and launch.accelerate is None:
        gpus = launch.processes_per_node
    options = {
        "job-name": f"{spec.run}/{spec.stage}", "nodes": launch.machines, "ntasks-per-node": 1,
        "gpus-per-node": gpus or None, "partition": slurm.partition, "account": slurm.account, "time": slurm.time,
        "constraint": slurm.constraint, "signal": f"USR1@{lead(slurm.time)}", "open-mode": "append",
        "output": f"{str(spec.output / FOLDER).replace('%', '%%')}/%j.log",
    }  # fmt: skip
    lines = [f"--{key}={shlex.quote(str(value))}" for key, value in options.items() if value is not None]
    lines += ["--requeue", "--wait-all-nodes=1", *slurm.extra]
    head = "\n".join(["#!/bin/bash", f"# Stage {spec.stage} of {spec.run}; `alignment run --slurm` wrote this.",
                      *(f"#SBATCH {line}" for line in lines)])  # fmt: skip
    body = BODY.format(
        folder=shlex.quote(os.getcwd()), setup=slurm.setup.rstrip() and f"\n{slurm.setup.rstrip()}\n",
        python=shlex.quote(sys.executable), stage=shlex.quote(str(spec.output / STAGE)), nodes=launch.machines,
    )  # fmt: skip
    return f"{head}\n{body}"


def lead(limit: str | None) -> int:
    """Seconds before the time limit at which to save: five minutes, of short jobs a quarter of the limit."""
    if limit is None:
        return LEAD
    days, _, rest = limit.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:  # days-hours[:minutes[:seconds]]
        hours, minutes, seconds = [*parts, 0, 0][:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # minutes[:seconds]
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    return max(1, min(LEAD, total // 4)) if total else LEAD  # 0 means no limit


# -- what was submitted ------------------------------------------------------------------------------------------------


def record(spec: StageSpec, job: str, after: dict[str, str]) -> None:
    """Note the job of a stage: its id, what it will run, and the stages and jobs that it waits for."""
    write_json(spec.output / FOLDER / RECORD, {
        "schema": 1, "job": job, "after": after, "fingerprint_sha256": spec.fingerprint_sha256, "submitted": now(),
    })  # fmt: skip


def recorded(stage: Path) -> dict[str, object] | None:
    """The record of a stage's latest job; None if there was none. Raises ChainError when it is damaged."""
    return read_json(stage / FOLDER / RECORD, schema=1, error=ChainError)


# -- what Slurm says ---------------------------------------------------------------------------------------------------


def sbatch(path: Path, after: Sequence[str]) -> str:
    """Submit a script behind other jobs and return its id; when one of those fails, this job is cancelled.

    Raises:
        SlurmError: Slurm is not there, or says no.
    """
    order = ["--dependency=afterok:" + ":".join(after), "--kill-on-invalid-dep=yes"] if after else []
    return _ask(["sbatch", "--parsable", *order, str(path)]).strip().partition(";")[0]


def cancel(job: str) -> None:
    """Take a job out of the queue. Raises SlurmError."""
    _ask(["scancel", job])


def jobs(ids: Sequence[str]) -> dict[str, Job]:
    """What the queue says of jobs, and the accounting of those that have left it; what neither knows is left out.

    Raises:
        SlurmError: the queue does not answer.
    """
    if not ids:
        return {}
    listed = _ask(["squeue", "--noheader", "--states=all", f"--user={getpass.getuser()}", "--format=%i|%T|%r"])
    found = {}
    for line in listed.splitlines():
        job, state, reason = line.strip().split("|", 2)
        if job in ids:
            found[job] = Job(job, state, "" if reason == "None" else reason)
    gone = [job for job in ids if job not in found]
    if gone:
        try:
            # -X: jobs, not their steps; without duplicates, so of a job that was queued again the latest start.
            lines = _ask(["sacct", "-X", "--noheader", "--parsable2", f"--jobs={','.join(gone)}",
                          "--format=JobIDRaw,State"]).splitlines()  # fmt: skip
        except SlurmError:
            lines = []  # a cluster without accounting
        for line in lines:
            job, _, state = line.partition("|")
            found[job] = Job(job, state.split()[0].rstrip("+") if state else "UNKNOWN")  # CANCELLED by 1000
    return found


def _ask(command: list[str]) -> str:
    """The output of one of Slurm's commands."""
    if shutil.which(command[0]) is None:
        raise SlurmError(f"{command[0]}: not found: this machine has no Slurm; log in to one that has")
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=ANSWER, check=False)
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{command[0]}: no answer within {ANSWER} s; try again later") from None
    if done.returncode:
        raise SlurmError(f"{shlex.join(command)}: {' '.join(done.stderr.split()) or f'exit code {done.returncode}'}")
    return done.stdout
