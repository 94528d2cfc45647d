"""Waiting for a rank that works alone outlasts the time-out of a collective."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

RANK = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
from alignment.errors import UserError
from alignment.training import ranks

rank = int(sys.argv[1])
dist.init_process_group("gloo", store=dist.TCPStore("127.0.0.1", int(sys.argv[2]), 2, rank == 0),
                        rank=rank, world_size=2, timeout=timedelta(seconds=1))
meet = ranks.meeting("test", limit=float(sys.argv[4]))
for _ in range(2):
    if rank == 0:
        time.sleep(float(sys.argv[3]))  # seals, publishes
    try:
        {wait}
    except (UserError, RuntimeError) as error:
        print("failed:", type(error).__name__)
        break
else:
    print("met")
sys.stdout.flush()
os._exit(0)
"""


def two_ranks(wait: str, folder: Path, *, alone: float, limit: float) -> list[str]:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    script = folder / "rank.py"
    script.write_text(RANK.replace("{wait}", wait))
    started = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), port, str(alone), str(limit)], stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    return [process.communicate(timeout=120)[0].strip() for process in started]


@pytest.mark.parametrize(
    ("wait", "alone", "limit", "said"),
    [
        ("dist.barrier()", 3.0, 60.0, "failed: RuntimeError"),  # the fault that a meeting is there to avoid
        ("meet()", 3.0, 60.0, "met"),
        ("meet()", 3.0, 0.5, "failed: UserError"),  # bounded
    ],
    ids=["collective", "meeting", "limit"],
)
def test_two_ranks(wait: str, alone: float, limit: float, said: str, tmp_path: Path) -> None:
    assert two_ranks(wait, tmp_path, alone=alone, limit=limit)[1] == said


def test_alone_there_is_nobody_to_wait_for() -> None:
    from alignment.training import ranks

    ranks.meeting("alone", limit=0.0)()
