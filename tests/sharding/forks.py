"""Launches without the imports: worker processes forked from one that has imported everything.

A real launch spends ten seconds importing, and a matrix of combinations needs hundreds. What a forked worker gets is
what `accelerate launch` would give it: our own command line goes through accelerate's parser and validation, and the
environment is the one that its launcher hands on, with torchrun's variables on top. Each launch has fresh processes: no
state of one combination is seen by the next. `test_sharding.py` compares the environment with that of a real launch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignment.pipeline import launch as launching
from alignment.pipeline import plan as planning

Inside = Callable[[planning.StageSpec, int], int]  # what a rank runs; returns its exit code


def environment(spec: planning.StageSpec, stage_yaml: Path) -> dict[str, str]:
    """The environment that the launcher of a planned stage gives to all its ranks."""
    from accelerate.commands import launch as upstream

    argv = launching.command(spec, stage_yaml)
    before = dict(os.environ)
    os.environ.update(launching.settings(spec))
    try:
        args, defaults, _ = upstream._validate_launch_command(upstream.launch_command_parser().parse_args(argv[3:]))
        if args.use_deepspeed:
            args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
            return dict(upstream.prepare_deepspeed_cmd_env(args)[1])
        if args.multi_gpu:
            return dict(upstream.prepare_multi_gpu_env(args))
        return dict(upstream.prepare_simple_launcher_cmd_env(args)[1])
    finally:
        os.environ.clear()
        os.environ.update(before)


def launch(spec: planning.StageSpec, inside: Inside, *, limit: float = 240.0) -> int:
    """Run a planned stage on as many forked ranks as it asks for; returns the exit code that a launch would have had.

    What the ranks print goes to `output.log` in the stage's folder.
    """
    path = planning.write_stage(spec)
    shared = environment(spec, path)
    assert spec.config.launch is not None
    count, port = spec.config.launch.processes, _free_port()
    sys.stdout.flush()
    sys.stderr.flush()
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _become(spec, inside, shared | _torchrun(rank, count, port, shared))
        children.append(child)
    _await(children, limit)
    return launching.outcome(spec)[0]


def _torchrun(rank: int, count: int, port: int, shared: dict[str, str]) -> dict[str, str]:
    if count == 1 and "ACCELERATE_USE_DEEPSPEED" not in shared:
        return {}
    number = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    return {key: str(value) for key, value in number.items()} | {"MASTER_ADDR": "127.0.0.1"}


def _become(spec: planning.StageSpec, inside: Inside, variables: dict[str, str]) -> None:
    """This forked process is a rank from here to its end."""
    code = 1
    try:
        import torch

        file = os.open(spec.output / "output.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        os.environ.clear()
        os.environ.update(variables)
        # After a fork torch replaces its pool of threads at the first use: not while Transformers loads with several.
        torch.set_num_threads(torch.get_num_threads())
        code = inside(spec, int(variables.get("RANK", "0")))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _await(children: list[int], limit: float) -> None:
    """Wait for all ranks; as torchrun does, one that fails takes the others down."""
    end, left = time.monotonic() + limit, set(children)
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                if os.waitstatus_to_exitcode(status):
                    end = min(end, time.monotonic() + 5)
        if time.monotonic() > end:
            for child in left:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            return
        time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write(path: Path, content: Any) -> None:
    """A small JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1), encoding="utf-8")
