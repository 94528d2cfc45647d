"""A rank that dies takes the others with it, within a minute and with one message that names it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from alignment.errors import ExitCode
from alignment.pipeline import runs
from alignment.pipeline.plan import StageSpec, read_stage
from alignment.training import failing, launcher

HOST = socket.gethostname()


# -- who tells ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def spec(tiny_run: Path, tmp_path: Path) -> StageSpec:
    """A stage whose rank 0 has begun."""
    from dataclasses import replace

    spec = replace(read_stage(tiny_run / "sft" / "stage.yaml"), output=tmp_path, attempt="now")
    runs.write_status(tmp_path, attempt="now", state="running", code=0, step=3, steps=6)
    return spec


def said(spec: StageSpec) -> dict[str, Any]:
    status = runs.read_status(spec.output)
    assert status is not None
    return {key: status[key] for key in ("state", "code", "message", "rank", "step")}


GONE = [
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:47124",
    "[../third_party/gloo/gloo/transport/tcp/pair.cc:525] Read error [10.0.0.1]:9: Connection reset by peer",
    "NCCL error in: ProcessGroupNCCL.cpp:3690, remote process exited or there was a network error, NCCL version 2.27",
    "Connection was likely closed. Did the remote server shutdown or crash? recvValue failed on SocketImpl(fd=3)",
]
OWN = ["CUDA out of memory. Tried to allocate 2.00 GiB", "mat1 and mat2 shapes cannot be multiplied (4x8 and 9x2)"]


@pytest.mark.parametrize("text", GONE)
def test_what_a_gone_partner_leaves_is_a_consequence(
    text: str, spec: StageSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert failing.consequence(spec, RuntimeError(text))
    assert not list(spec.output.glob(".failed-*"))  # the one who was first can still say so
    note = (spec.output / failing.LOST_LOG).read_text()
    assert f"rank 1 on {HOST}, attempt now" in note
    assert text in note


def test_the_store_of_a_gone_rank_says_no_more_than_its_type() -> None:
    """Rank 0 keeps the store at which the others wait; where it left for a full disk, they fail of that."""
    text = "Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?"
    assert failing.lost_contact(torch.distributed.DistNetworkError(text))
    assert not failing.lost_contact(RuntimeError(text))  # a reward function's own connection
    assert not failing.lost_contact(torch.distributed.DistNetworkError("The client socket has timed out"))


@pytest.mark.parametrize("text", OWN)
def test_of_all_own_failures_the_first_tells(text: str, spec: StageSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not failing.consequence(spec, RuntimeError(text))  # one process: nobody else could
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert not failing.consequence(spec, RuntimeError(text))
    for rank in range(1, 8):
        monkeypatch.setenv("RANK", str(rank))
        assert failing.consequence(spec, RuntimeError(text))
    failing.clear(spec)
    assert failing.consequence(spec, RuntimeError(text))  # of this start: it stays
    runs.write_status(spec.output, attempt="later", state="running", code=0)
    later = StageSpec(**{**vars(spec), "attempt": "later"})
    failing.clear(later)
    assert not failing.consequence(later, RuntimeError(text))


KILLED = f"rank 1 on {HOST} was killed by SIGKILL (out of memory?); the same command continues the stage"


@pytest.mark.parametrize(
    ("codes", "message", "rank"),
    [
        ({1: -9, 0: 76}, KILLED, 1),
        ({0: 76, 1: -9}, KILLED, 1),  # seen in another order
        ({1: -9, 0: -15}, KILLED, 1),  # rank 0 hung in a collective and was told to stop
        ({1: -9, 0: -9}, KILLED, 1),  # ... and did not listen
        ({1: -11, 0: 76}, f"rank 1 on {HOST} was killed by SIGSEGV; the same command continues the stage", 1),
    ],
)
def test_the_launcher_names_the_rank_that_could_not(
    spec: StageSpec, codes: dict[int, int], message: str, rank: int, capsys: pytest.CaptureFixture[str]
) -> None:
    launcher.explain(spec, codes, wait=0)
    assert said(spec) == {"state": "failed", "code": 1, "message": message, "rank": rank, "step": 3}
    assert capsys.readouterr().err == f"alignment: stage sft: {message}\n"


def test_the_launcher_does_not_talk_over_a_rank(spec: StageSpec, capsys: pytest.CaptureFixture[str]) -> None:
    runs.write_status(spec.output, attempt="now", state="failed", code=6, message="loss is nan", rank=1)
    launcher.explain(spec, {1: 6, 0: -9})
    assert said(spec)["message"] == "loss is nan"
    # In use by another process: what stands in status.json is that process's.
    runs.write_status(spec.output, attempt="another", state="running", code=0)
    launcher.explain(spec, {0: ExitCode.LOCKED, 1: -15})
    # Stopped while it was still importing.
    launcher.explain(spec, {0: -15, 1: -15})
    assert runs.read_status(spec.output)["attempt"] == "another"
    assert capsys.readouterr().err == ""


def test_where_all_only_lost_contact_it_says_that(spec: StageSpec) -> None:
    """The rank that failed is on another node, which says so in its own time, or the network failed."""
    launcher.explain(spec, {0: 76, 1: 76}, wait=0.5)
    assert said(spec)["message"].startswith(f"rank 0 on {HOST} lost contact with the other ranks; ")


# -- planted -----------------------------------------------------------------------------------------------------------

JUDGE = """
import os
calls = []
def score(prompts, completions, **columns):
    calls.append(1)
    if len(calls) > 1 and os.environ["RANK"] == "1":
        raise KeyError("a judge that cannot")
    return [float(len(str(completion))) for completion in completions]
"""


def start(recipe: dict[str, Any], folder: Path, root: Path) -> subprocess.Popen[str]:
    path = folder / f"{recipe['name']}.yaml"
    path.write_text(yaml.safe_dump(recipe | {"launch": {"processes": 2}}, sort_keys=False), encoding="utf-8")
    return subprocess.Popen(
        [sys.executable, "-m", "alignment", "run", str(path), "--runs", str(folder)], cwd=root, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def rank_of(stage: Path, rank: int) -> int:
    """The process that trains as this rank of a stage."""
    for entry in Path("/proc").iterdir():
        try:
            words, env = (entry / "cmdline").read_bytes(), (entry / "environ").read_bytes()
        except OSError:
            continue
        if str(stage / "stage.yaml").encode() in words and f"RANK={rank}".encode() in env.split(b"\0"):
            return int(entry.name)
    raise AssertionError(f"no process is rank {rank} of {stage}")


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank(
    victim: int, root: Path, tiny_run: Path, tiny_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    changes = {"model": str(tiny_run / "base"), "train": {"max_steps": 100_000}}
    run = start(tiny_recipe("sft", sft=changes) | {"name": "killed"}, tmp_path, root)
    stage = tmp_path / "killed" / "sft"
    end = time.monotonic() + 240
    while not (stage / "checkpoint-4" / "SEALED.json").exists():
        assert time.monotonic() < end
        assert run.poll() is None
        time.sleep(0.1)
    os.kill(rank_of(stage, victim), signal.SIGKILL)
    killed = time.monotonic()
    output, _ = run.communicate(timeout=120)
    assert time.monotonic() - killed < 60
    assert run.returncode == ExitCode.FAILED
    message = f"rank {victim} on {HOST} was killed by SIGKILL (out of memory?)"
    assert output.count(message) == 1
    assert "Traceback" not in output
    assert output.count("alignment: ") == 1
    assert said_of(stage)["message"].startswith(message)
    assert said_of(stage)["rank"] == victim


@pytest.mark.slow
def test_a_rank_that_raises(
    root: Path, tiny_run: Path, tiny_recipe: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "judge.py").write_text(JUDGE)
    reward = [{"name": "judge", "function": f"{tmp_path}/judge.py:score"}]
    changes = {"model": str(tiny_run / "sft"), "rewards": reward, "batch": {"per_device": 2}}
    run = start(tiny_recipe("ppo", ppo=changes) | {"name": "raises"}, tmp_path, root)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == ExitCode.FAILED
    assert output.count("Traceback (most recent call last)") <= 2  # the error's own, and the error that it came from
    assert "judge.py" in output
    assert output.count("alignment: ") == 1, output
    assert "a judge that cannot" in said_of(tmp_path / "raises" / "ppo")["message"]
    assert f"(rank 1 on {HOST})" in output
    assert said_of(tmp_path / "raises" / "ppo")["rank"] == 1


def said_of(stage: Path) -> dict[str, Any]:
    status = runs.read_status(stage)
    assert status is not None
    return status
