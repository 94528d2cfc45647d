"""recipes/cluster.md shows what works: a recipe's section, lines that accelerate takes, a YAML that fits together."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.recipe.launching import Launch, Slurm


@pytest.fixture(scope="module")
def page(root: Path) -> str:
    return (root / "recipes" / "cluster.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)


def launched(line: str) -> Any:
    """The arguments of a line as accelerate understands them."""
    from accelerate.commands.launch import launch_command_parser

    words = shlex.split(line)
    start = next(number for number, word in enumerate(words) if word in ("launch", "alignment.training.launcher"))
    return launch_command_parser().parse_args(words[start + 1 :])


def test_the_section_is_a_recipes(page: str) -> None:
    launch = Launch.model_validate(yaml.safe_load(blocks(page, "yaml")[0])["launch"])
    assert (launch.machines, launch.processes_per_node) == (2, 8)
    assert launch.slurm is not None
    shown = launch.slurm.model_fields_set
    assert shown | {"nodes"} == set(Slurm.model_fields)  # every key is shown; nodes is explained below
    assert launch.slurm.time == "08:00:00"


def test_the_lines_for_ssh_differ_in_the_number_of_the_host_only(page: str) -> None:
    lines = [shlex.split(line)[2] for line in page.splitlines() if line.startswith("ssh ")]
    found = [launched(line.partition("&& ")[2]) for line in lines]
    assert [arguments.machine_rank for arguments in found] == [0, 1]
    assert len({line.replace(f"--machine_rank {number}", "") for number, line in enumerate(lines)}) == 1
    for arguments in found:
        assert (arguments.num_machines, arguments.num_processes, arguments.multi_gpu) == (2, 16, True)
        assert arguments.main_process_ip == "host0"
        assert (arguments.training_script, arguments.module) == ("alignment.train", True)


def test_the_kubernetes_job_fits_together(page: str) -> None:
    service, job = yaml.safe_load_all(blocks(page, "yaml")[1])
    assert (service["kind"], job["kind"], job["apiVersion"]) == ("Service", "Job", "batch/v1")
    name, spec = job["metadata"]["name"], job["spec"]
    assert spec["completionMode"] == "Indexed"
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a podFailurePolicy demands it
    (container,) = pod["containers"]
    rule = spec["podFailurePolicy"]["rules"][0]
    assert rule["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [85]}
    # Kubernetes gives pods of an Indexed Job the name JOB-INDEX, which resolves within the headless service.
    assert service["spec"]["clusterIP"] == "None" or service["spec"]["clusterIP"] is None
    assert service["spec"]["selector"] == {"job-name": name}
    assert pod["subdomain"] == service["metadata"]["name"]
    arguments = launched(container["args"][0].replace('"$JOB_COMPLETION_INDEX"', "1"))
    assert arguments.main_process_ip == f"{name}-0.{service['metadata']['name']}"
    assert arguments.num_machines == spec["completions"] == spec["parallelism"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert arguments.num_processes == arguments.num_machines * gpus
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
