"""Chains as jobs of a real Slurm with two nodes: every daemon, every worker and every signal is real."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from alignment.pipeline import runs

pytestmark = [pytest.mark.slow, pytest.mark.slurm]

STEPS = 240  # some six seconds, where nothing else runs: long enough to be interrupted twice


class Cluster:
    """The commands of a user who works in one folder, and of the cluster's clients."""

    def __init__(self, folder: Path, env: dict[str, str], root: Path):
        self.folder, self.env = folder, env | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}

    def alignment(self, *words: str) -> str:
        """`alignment ...`, which must end well; its output."""
        return self.ask(sys.executable, "-m", "alignment", *words)

    def ask(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def states(self, run: str) -> dict[str, dict[str, Any]]:
        found = json.loads(self.alignment("runs", "--json"))[run]
        return {state["stage"]: state for state in found}

    def queued(self) -> list[str]:
        return sorted(self.ask("squeue", "--noheader", "--format=%i").split(), key=int)

    def wait(self, condition: Callable[[], object], what: str, seconds: float = 900) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                logs = "\n".join(path.read_text()[-3000:] for path in self.folder.glob("runs/*/*/slurm/*.log"))
                raise AssertionError(f"waited in vain for {what}\n{self.ask('squeue', '--states=all')}\n{logs}")
            time.sleep(0.1)

    def begin_again(self, job: str, restarts: int) -> None:
        """Wait until a job was queued again, and begin at once: Slurm would wait for two minutes."""
        waits = f"{job}|PENDING|BeginTime|{restarts}"
        self.wait(lambda: waits in self.ask("squeue", "--noheader", "--Format=JobID:|,State:|,Reason:|,RestartCnt:|")
                  .replace(" ", ""), f"restart {restarts} of job {job}")  # fmt: skip
        # Credentials are revoked by whole seconds: within the one of the last end, "Job credential revoked" fails it.
        time.sleep(2)
        self.ask("scontrol", "update", f"JobId={job}", "StartTime=now")


@pytest.fixture
def cluster(slurm: dict[str, str], root: Path, tmp_path: Path) -> Cluster:
    return Cluster(tmp_path, slurm, root)


@pytest.fixture
def chain(tiny_recipe: Callable[..., dict[str, Any]], tiny_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """Write the recipe of a chain of sft and dpo, on two nodes with one process each unless `launch` says else."""

    def write(name: str, launch: dict[str, Any] | None = None, rows: Path | None = None) -> Path:
        long = {"max_steps": STEPS, "logging_steps": 10}
        sft: dict[str, Any] = {"model": str(tiny_run / "base"), "train": long, "checkpoints": {"every": 20}}
        if rows is not None:
            sft["data"] = {"train": [{"path": str(rows)}]}
        recipe = tiny_recipe("sft", "dpo", sft=sft) | {"name": name}
        slurm = {"gpus_per_node": 0, "time": "00:30:00"}
        recipe["launch"] = launch or {"processes": 2, "nodes": 2, "slurm": slurm}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        return path

    return write


def starts_of(cluster: Cluster, job: str) -> list[str]:
    """How each start of a job ended, as sacct tells it: of one that was queued again it keeps both."""
    if cluster.env["ACCOUNTS"]:
        return cluster.ask("sacct", "-X", "--duplicates", "-j", job, "--noheader", "-P", "-o", "State").split()
    lines = cluster.ask("sacct", "--completion", "-j", job, "--noheader", "-P", "-o", "State").split()
    return ["REQUEUED" if state == "PENDING" else state for state in lines]


def newest_checkpoint(stage: Path) -> int:
    return max(int(path.parent.name.rpartition("-")[2]) for path in stage.glob("checkpoint-*/SEALED.json"))


def test_a_chain_on_two_nodes_survives_a_time_limit_and_a_requeue(cluster: Cluster, chain: Callable[..., Path]) -> None:
    recipe = chain("whole")
    table = [line.split() for line in cluster.alignment("run", str(recipe), "--slurm").splitlines()]
    assert [row[:2] for row in table[:2]] == [["sft", "submitted"], ["dpo", "submitted"]]
    sft, dpo = (row[3] for row in table[:2])
    assert f"after sft ({sft})" in " ".join(table[1])
    folder = cluster.folder / "runs" / "whole"

    # What Slurm sends before the time limit, in the middle: the worker saves, and the job queues itself again.
    cluster.wait(lambda: (folder / "sft" / "checkpoint-20" / "SEALED.json").exists(), "checkpoint-20")
    cluster.ask("scancel", "--signal=USR1", sft)
    cluster.begin_again(sft, 1)
    saved = runs.read_status(folder / "sft")
    assert saved["state"] == "preempted"
    assert cluster.queued() == [sft, dpo]  # what waits for it goes on waiting
    again = cluster.alignment("run", str(recipe), "--slurm")
    assert "submitted" not in again
    assert cluster.states("whole")["dpo"]["state"] == "queued"

    # What an administrator or a more urgent job does: Slurm kills it, and starts it again.
    cluster.wait(lambda: "resuming from checkpoint-" in (folder / "sft/slurm" / f"{sft}.log").read_text(), "the resume")
    before = newest_checkpoint(folder / "sft")
    cluster.wait(lambda: newest_checkpoint(folder / "sft") > before, "another checkpoint")
    cluster.ask("scontrol", "requeue", sft)
    cluster.begin_again(sft, 2)

    cluster.wait(lambda: not cluster.queued(), "both stages")
    assert {name: state["state"] for name, state in cluster.states("whole").items()} == {"sft": "done", "dpo": "done"}
    assert starts_of(cluster, sft) == ["REQUEUED", "REQUEUED", "COMPLETED"]
    assert starts_of(cluster, dpo) == ["COMPLETED"]
    log = (folder / "sft" / "slurm" / f"{sft}.log").read_text()
    assert log.count("resuming from checkpoint-") == 2
    assert (folder / "sft" / "slurm" / "rank-1.log").read_text().count(" on ") >= 3  # one start, one heading
    manifest = runs.verify_parent(folder / "sft", deep=True)
    assert manifest["batch"] == {"global": 8, "per_device": 4, "processes": 2, "accumulation": 1}

    # Done is done.
    assert [line.split() for line in cluster.alignment("run", str(recipe), "--slurm").splitlines()[:2]] == [
        ["sft", "done"], ["dpo", "done"],
    ]  # fmt: skip
    assert not cluster.queued()

    # The same two ranks, uninterrupted and without Slurm.
    cluster.alignment("run", str(chain("plain", {"processes": 2})), "--until", "sft")
    ours, theirs = (load_file(folder.parent / run / "sft" / "model.safetensors") for run in ("whole", "plain"))
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor == theirs[name]).all(), name


def test_a_stage_that_fails_takes_its_dependants_out_of_the_queue(
    cluster: Cluster, chain: Callable[..., Path], data_folder: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    whole = (data_folder / "sft.jsonl").read_text() * 50
    rows.write_text(whole + '{"messages": [\n')  # the check of the first records does not see it
    recipe = chain("broken", {"slurm": {"gpus_per_node": 0}}, rows)
    cluster.alignment("run", str(recipe), "--slurm")
    sft, dpo = cluster.queued()
    cluster.wait(lambda: not cluster.queued(), "the failure")
    states = cluster.states("broken")
    assert (states["sft"]["state"], states["sft"]["code"]) == ("failed", 2)
    assert "rows.jsonl:2401" in states["sft"]["message"]
    assert (states["dpo"]["state"], states["dpo"]["message"]) == ("cancelled", "cancelled because sft failed")
    assert starts_of(cluster, sft) == ["FAILED"]
    assert [state.partition(" ")[0] for state in starts_of(cluster, dpo)[:1]] == ["CANCELLED"]
    said = (cluster.folder / "runs/broken/sft/slurm" / f"{sft}.log").read_text()
    assert "alignment: stage sft: " in said
    assert "Traceback" not in said

    rows.write_text(whole)
    table = cluster.alignment("run", str(recipe), "--slurm").splitlines()
    assert [line.split()[:2] for line in table[:2]] == [["sft", "submitted"], ["dpo", "submitted"]]
    for job in cluster.queued():
        cluster.ask("scancel", job)
    cluster.wait(lambda: not cluster.queued(), "an empty queue")
