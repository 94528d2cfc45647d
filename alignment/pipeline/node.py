"""One node's part of a Slurm job; the job's script calls it, see `slurm.BODY`.

    python -m alignment.pipeline.node STAGE_YAML port         a free port of this host
    python -m alignment.pipeline.node STAGE_YAML run --port N     on every node: launch its ranks, see them off
    python -m alignment.pipeline.node STAGE_YAML end          afterwards, once: how the stage ended; 85: queue it again

The nodes agree on the name of this start without talking: the job's id and how often it was queued again.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from alignment.errors import ChainError, ExitCode, UserError
from alignment.pipeline import launch, runs
from alignment.pipeline.files import read_json, storage
from alignment.pipeline.plan import StageSpec, read_stage, write_stage
from alignment.pipeline.seals import SEALED, checkpoints
from alignment.pipeline.slurm import FOLDER
from alignment.pipeline.supervise import run as supervise

BEGUN = "begun.json"
AGREE_SECONDS = 300.0  # for a shared file system to show what node 0 wrote
IDLE_STARTS = 3  # starts in a row without a new checkpoint after which a job is not queued again


def main(argv: Sequence[str], env: Mapping[str, str] = os.environ) -> int:
    """See the module; returns the exit code."""
    parser = argparse.ArgumentParser(prog="alignment.pipeline.node", description=__doc__.splitlines()[0])
    parser.add_argument("stage_yaml", type=Path)
    parser.add_argument("what", choices=["port", "run", "end"])
    parser.add_argument("--port", default="0")
    arguments = parser.parse_args(argv)
    try:
        if arguments.what == "port":
            print(free_port())
            return 0
        attempt = f"slurm-{env['SLURM_JOB_ID']}-{env.get('SLURM_RESTART_COUNT') or 0}"
        if arguments.what == "end":
            return end(replace(read_stage(arguments.stage_yaml), attempt=attempt))
        number = int(env["SLURM_NODEID"])
        node = launch.Node(str(number), env["SLURM_LAUNCH_NODE_IPADDR"], arguments.port)
        spec = agree(arguments.stage_yaml, attempt, first=number == 0)
        return 0 if runs.read_manifest(spec.output) else run(spec, arguments.stage_yaml, node)
    except UserError as error:
        print(f"alignment: {error}", file=sys.stderr)
        return int(error.code)


def free_port() -> int:
    """A port that nothing on this host listens on."""
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def agree(stage_yaml: Path, attempt: str, *, first: bool, limit: float = AGREE_SECONDS) -> StageSpec:
    """The stage under this start's name, which node 0 writes and the others wait for.

    Raises:
        ChainError: node 0 did not write it in time, or this node does not see its files.
    """
    if first:
        spec = replace(read_stage(stage_yaml), attempt=attempt)
        if runs.read_manifest(spec.output) is None:
            write_stage(spec)
            _begin(spec)
        return spec
    end = time.monotonic() + limit
    while time.monotonic() < end:
        spec = read_stage(stage_yaml)
        if spec.attempt == attempt or runs.read_manifest(spec.output) is not None:
            return spec
        time.sleep(0.2)
    raise ChainError(f"{stage_yaml}: node 0 began nothing within {limit:.0f} s; is this folder shared by all nodes?")


def run(spec: StageSpec, stage_yaml: Path, node: launch.Node) -> int:
    """Run this node's ranks to their end; returns not 0 only where they failed, which ends the other nodes too."""
    launch.refuse_impossible(spec)
    command = launch.command(spec, stage_yaml, node=node, logs=spec.output / FOLDER)
    ended = supervise(command, {**os.environ, **launch.settings(spec)})
    spoke = launch.last_word(spec) is not None
    if ended.stopped_by is not None and not spoke and node.rank == "0":
        message = f"stopped by {ended.stopped_by.name} before it could save a step"
        runs.write_status(
            spec.output, attempt=spec.attempt, state="preempted", code=ExitCode.PREEMPTED, message=message
        )
    left = ended.stopped_by is not None or ended.code in (ExitCode.DONE, ExitCode.PREEMPTED)
    # A launcher of one process loses the code; what the worker wrote does not.
    code, _ = launch.outcome(spec)
    return 0 if left or code in (ExitCode.DONE, ExitCode.PREEMPTED) else int(ExitCode.FAILED)


def end(spec: StageSpec) -> int:
    """Say how the stage ended and return its exit code; 85 only while starting again leads somewhere."""
    if runs.read_manifest(spec.output) is not None:
        print(f"stage {spec.stage}: done", flush=True)
        return int(ExitCode.DONE)
    code, message = launch.outcome(spec)
    if code == ExitCode.PREEMPTED:
        started = read_json(spec.output / FOLDER / BEGUN, schema=1, error=ChainError) or {}
        idle = started.get("idle", 0) + 1 if started.get("checkpoint") == _newest(spec) else 0
        if idle >= IDLE_STARTS:
            code = int(ExitCode.FAILED)
            message = (
                f"stopped {idle} times in a row before a new checkpoint; launch.slurm.time must be longer than it "
                "takes to start and train one step"
            )
            runs.write_status(spec.output, attempt=spec.attempt, state="failed", code=code, message=message)
        else:
            message += "; queued again"
    print(f"alignment: stage {spec.stage}: {message}", file=sys.stderr, flush=True)
    return int(code)


def _begin(spec: StageSpec) -> None:
    """Note from which checkpoint this start goes on, and how many before it made none."""
    place, checkpoint = spec.output / FOLDER / BEGUN, _newest(spec)
    before = read_json(place, schema=1, error=ChainError) or {}
    idle = before.get("idle", 0) + 1 if before and before.get("checkpoint") == checkpoint else 0
    with storage(place):
        place.parent.mkdir(parents=True, exist_ok=True)
    runs.write_json(place, {"schema": 1, "attempt": spec.attempt, "checkpoint": checkpoint, "idle": idle})


def _newest(spec: StageSpec) -> str | None:
    """The name of the newest sealed checkpoint; that it is whole, the worker checks."""
    return next((path.name for path in checkpoints(spec.output) if (path / SEALED).exists()), None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
