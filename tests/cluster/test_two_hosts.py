"""Two hosts without Slurm: `accelerate launch` by hand on each, as recipes/cluster.md shows it.

Each host is a network namespace of its own; a pair of virtual cables joins them, and nothing else is reachable.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from alignment.pipeline import runs

pytestmark = pytest.mark.slow


def ip(*words: str, check: bool = True) -> bool:
    return subprocess.run(["ip", *words], check=check, capture_output=True, timeout=20).returncode == 0


@pytest.fixture
def hosts() -> Iterator[list[tuple[str, str, str]]]:
    """Two hosts that see each other: namespace, interface and address of each."""
    mark = f"{os.getpid() % 100_000}"
    found = [(f"align-{mark}-{number}", f"al{number}-{mark}", f"10.211.7.{number + 1}") for number in range(2)]
    if shutil.which("ip") is None or os.geteuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    if not ip("netns", "add", found[0][0], check=False):
        pytest.skip("this machine does not let root make network namespaces")
    try:
        ip("netns", "add", found[1][0])
        ip("link", "add", found[0][1], "netns", found[0][0], "type", "veth", "peer", "name", found[1][1],
           "netns", found[1][0])  # fmt: skip
        for space, cable, address in found:
            ip("-n", space, "address", "add", f"{address}/24", "dev", cable)
            ip("-n", space, "link", "set", cable, "up")
            ip("-n", space, "link", "set", "lo", "up")
        yield found
    finally:
        for space, _, _ in found:
            ip("netns", "delete", space, check=False)


def test_two_hosts_by_hand(
    hosts: list[tuple[str, str, str]],
    root: Path,
    tiny_run: Path,
    tiny_recipe: Callable[..., dict[str, Any]],
    run_recipe: Callable[..., Path],
    tmp_path: Path,
) -> None:
    start = {"model": str(tiny_run / "base")}
    one = run_recipe(tiny_recipe("sft", sft=start) | {"name": "one"}, tmp_path)
    path = tmp_path / "two.yaml"
    path.write_text(yaml.safe_dump(tiny_recipe("sft", sft=start) | {"name": "two"}, sort_keys=False), encoding="utf-8")
    processes = []
    for rank, (space, cable, _) in enumerate(hosts):
        launch = [
            sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "2",
            "--num_processes", "2", "--machine_rank", str(rank), "--main_process_ip", hosts[0][2],
            "--main_process_port", "29500", "-m", "alignment.train", str(path), "--stage", "sft",
            "--runs", str(tmp_path),
        ]  # fmt: skip
        env = dict(os.environ, ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME=cable)
        processes.append(subprocess.Popen(
            ["ip", "netns", "exec", space, *launch], cwd=root, env=env, text=True, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ))  # fmt: skip
    try:
        said = [process.communicate(timeout=400)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    stage = tmp_path / "two" / "sft"
    assert [process.returncode for process in processes] == [0, 0], "\n".join(said)
    assert runs.verify_parent(stage, deep=True)["batch"]["processes"] == 2
    ours, theirs = (load_file(run / "sft" / "model.safetensors") for run in (tmp_path / "two", one))
    for name, tensor in ours.items():
        assert tensor.numpy() == pytest.approx(theirs[name].numpy(), abs=2e-4), name

    # A refusal of rank 0 is said once, and ends the other host too.
    again = []
    for process in processes:
        again.append(subprocess.Popen(
            process.args, cwd=root, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env=dict(os.environ, ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME=hosts[len(again)][1]),
        ))  # fmt: skip
    said = [process.communicate(timeout=400)[0] for process in again]
    assert all(process.returncode for process in again)
    assert "".join(said).count("alignment: stage sft: done: nothing to run") == 1
