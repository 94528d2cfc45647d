"""Stages as Slurm jobs, against programs that answer as Slurm's do; `tests/cluster` runs the real ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.cli import main
from alignment.errors import ChainError, ExitCode, RecipeError
from alignment.pipeline import launch, node, runs, slurm
from alignment.pipeline.plan import read_stage, write_stage
from alignment.recipe.load import resolve

# The queue is the file `queue`, one job a line (`id|state|reason`), what was asked of sbatch stands in `asked`.
PROGRAMS = {
    "sbatch": """
echo "$@" >> asked
if [ -e refuse ]; then echo "sbatch: error: Batch job submission failed: Invalid account" >&2; exit 1; fi
id=$(( $(wc -l < queue) + 11 ))
echo "$id|PENDING|None" >> queue
echo "$id;cluster"
""",
    "squeue": "cat queue",
    "sacct": "cat accounts 2>/dev/null || { echo 'Slurm accounting storage is disabled' >&2; exit 1; }",
    "scancel": 'sed -i "s/^$1|.*/$1|CANCELLED|None/" queue',
}


@pytest.fixture(autouse=True)
def splittable(workplace: Path) -> None:
    """Batches that up to 16 processes can share."""
    recipe = workplace / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("global: 8, per_device: 4", "global: 32, per_device: 2"))


@pytest.fixture
def queue(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty queue, and Slurm's programs in front of it."""
    programs = workplace / "bin"
    programs.mkdir()
    for name, text in PROGRAMS.items():
        (programs / name).write_text(f"#!/bin/bash\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(programs), prepend=":")
    (workplace / "queue").touch()
    return workplace / "queue"


def submit(*words: str) -> int:
    return main(["run", "recipe.yaml", "--until", "dpo", "--slurm", *words])


# -- the recipe --------------------------------------------------------------------------------------------------------


def test_nodes_are_said_once_and_share_the_processes(workplace: Path, load: Callable) -> None:
    both = load("launch={processes: 4, slurm: {nodes: 2, gpus_per_node: 2}}")
    assert resolve(both, "sft").launch.machines == 2
    assert resolve(both, "sft").launch.processes_per_node == 2
    alone = resolve(both, "evaluate").launch  # trains nothing: one process, and no GPU that it does not use
    assert (alone.machines, alone.processes, alone.slurm and alone.slurm.gpus_per_node) == (1, 1, 1)
    for launching, message in {
        "{processes: 3, nodes: 2}": r"launch: 3 processes .* evenly to 2 nodes; the nearest legal values are 2 and 4",
        "{processes: 2, nodes: 2, slurm: {nodes: 4}}": "nodes is 2 and slurm.nodes is 4: give one of them",
        "{processes: 8, slurm: {gpus_per_node: 4}}": "8 processes on each node, but slurm.gpus_per_node is 4",
        "{slurm: {time: 8h}}": "launch.slurm.time",
        "{slurm: {extra: [exclusive]}}": r"launch.slurm.extra\[0\]",
        "{slurm: {queue: long}}": "launch.slurm.queue: unknown key",
    }.items():
        with pytest.raises(RecipeError, match=message):
            load(f"launch={launching}")


def test_a_stage_inherits_what_it_does_not_say_of_slurm(load: Callable) -> None:
    recipe = load(
        "launch={processes: 8, nodes: 2, slurm: {partition: gpu, time: '08:00:00'}}",
        "stages.dpo.launch={slurm: {time: '02:00:00'}}", "stages.kto.launch={nodes: 4}",
    )  # fmt: skip
    found = resolve(recipe, "dpo").launch
    assert (found.machines, found.slurm and found.slurm.partition, found.slurm and found.slurm.time) == (
        2, "gpu", "02:00:00",
    )  # fmt: skip
    assert resolve(recipe, "kto").launch.machines == 4
    assert resolve(recipe, "sft").launch.slurm == recipe.launch.slurm


def test_launch_of_one_node_of_several(workplace: Path, load: Callable, look: Callable) -> None:
    (workplace / "zero2.json").write_text("{}")
    env = {"CUDA_VISIBLE_DEVICES": ""}
    where = ["--num_machines", "2", "--machine_rank", "1", "--main_process_ip", "10.0.0.7", "--main_process_port", "77"]
    here = launch.Node("1", "10.0.0.7", "77")
    plain = look(load("launch={processes: 4, nodes: 2}"), "sft").spec
    words = launch.command(plain, Path("s.yaml"), env, node=here, logs=Path("logs"))
    assert words[words.index("--num_processes") :] == [
        "--num_processes", "4", "--multi_gpu", *where, "-m", "alignment.train", "s.yaml", "--logs", "logs",
    ]  # fmt: skip
    sharded = look(load("launch={processes: 4, nodes: 2, deepspeed: zero2.json}"), "sft").spec
    words = launch.command(sharded, Path("s.yaml"), env, node=here)
    # accelerate's default for several nodes is pdsh, which wants a host file and SSH.
    assert words[words.index("--main_process_port") :][:4] == [
        "--main_process_port", "77", "--deepspeed_multinode_launcher", "standard",
    ]  # fmt: skip
    (workplace / "own.yaml").write_text("distributed_type: FSDP\n")
    own = look(load("launch={accelerate: own.yaml, nodes: 2}"), "sft").spec
    assert launch.command(own, Path("s.yaml"), env, node=here)[3:] == [
        "--config_file", f"{workplace}/own.yaml", *where, "-m", "alignment.train", "s.yaml",
    ]  # fmt: skip
    threads = str(max(1, len(os.sched_getaffinity(0)) // 2))  # of one node, not of all
    assert launch.settings(plain, env)["OMP_NUM_THREADS"] == threads


def test_several_nodes_are_refused_here(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "recipe.yaml", "--set", "launch={processes: 2, nodes: 2}"]) == ExitCode.BAD_INPUT
    said = capsys.readouterr().err
    assert "stages.sft.launch.nodes: 2" in said
    assert "--slurm" in said
    assert not (workplace / "runs" / "small" / "sft").exists()


# -- the script --------------------------------------------------------------------------------------------------------


def test_the_script_says_what_the_recipe_says(load: Callable, look: Callable, workplace: Path) -> None:
    spec = look(load(
        "launch={processes: 16, nodes: 2, slurm: {partition: gpu, account: me, time: '1-00:00:00', constraint: 'a&b',"
        " setup: 'module load cuda', extra: ['--qos=long', '--signal=USR1@900']}}"
    ), "sft").spec  # fmt: skip
    text = slurm.script(spec)
    options = [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]
    assert options == [
        "--job-name=small/sft", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--partition=gpu",
        "--account=me", "--time=1-00:00:00", "--constraint='a&b'", "--signal=USR1@300", "--open-mode=append",
        f"--output={spec.output}/slurm/%j.log", "--requeue", "--wait-all-nodes=1", "--qos=long", "--signal=USR1@900",
    ]  # fmt: skip
    lines = text.splitlines()
    assert lines.index("module load cuda") > lines.index(f"cd {workplace}")
    on_cpu = slurm.script(look(load("launch={slurm: {gpus_per_node: 0}}"), "sft").spec)
    assert "gpus" not in on_cpu


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [(None, 300), ("0", 300), ("60", 300), ("2", 30), ("2:40", 40), ("00:04:00", 60), ("1-0", 300), ("0-0:10", 150)],
)
def test_the_signal_comes_early_enough(limit: str | None, seconds: int) -> None:
    assert slurm.lead(limit) == seconds


def test_a_dry_run_writes_scripts_that_a_shell_takes(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    slurm_section = "launch={processes: 4, nodes: 2, slurm: {time: '01:00:00', setup: 'module load \"cuda\"'}}"
    assert main(["run", "recipe.yaml", "--slurm", "--dry-run", "--set", slurm_section]) == 0
    said = capsys.readouterr().out
    scripts = sorted(workplace.glob("runs/small/*/slurm/job.sh"))
    assert [path.parent.parent.name for path in scripts] == ["dpo", "evaluate", "kto", "sft"]
    for path in scripts:
        assert str(path) in said
        assert subprocess.run(["bash", "-n", str(path)], check=False).returncode == 0
        if shutil.which("shellcheck"):
            found = subprocess.run(["shellcheck", str(path)], check=False, capture_output=True, text=True)
            assert found.returncode == 0, found.stdout
    # What a dry run leaves behind is in nobody's way.
    assert main(["run", "recipe.yaml", "--dry-run"]) == 0


# -- submitting --------------------------------------------------------------------------------------------------------


def asked(queue: Path) -> list[str]:
    return (queue.parent / "asked").read_text().splitlines()


def test_each_stage_waits_for_those_it_links_to(queue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "recipe.yaml", "--slurm", "--json"]) == 0
    stages = json.loads(capsys.readouterr().out)["stages"]
    assert {name: entry["job"] for name, entry in stages.items()} == {
        "sft": "11", "dpo": "12", "kto": "13", "evaluate": "14",
    }  # fmt: skip
    assert stages["evaluate"]["after"] == {"sft": "11", "dpo": "12"}
    path = queue.parent / "runs" / "small"
    behind = ["", "--dependency=afterok:11 --kill-on-invalid-dep=yes ",
              "--dependency=afterok:11 --kill-on-invalid-dep=yes ",
              "--dependency=afterok:11:12 --kill-on-invalid-dep=yes "]  # fmt: skip
    assert asked(queue) == [
        f"--parsable {order}{path / name}/slurm/job.sh" for order, name in zip(behind, stages, strict=True)
    ]
    assert read_stage(path / "dpo" / "stage.yaml").stage == "dpo"


def test_again_it_submits_only_what_is_missing(
    queue: Path, finish: Callable, load: Callable, look: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit() == 0
    assert submit() == 0
    assert len(asked(queue)) == 2  # both wait still
    finish(look(load(), "sft").spec)
    queue.write_text("11|COMPLETED|None\n12|FAILED|None\n")
    capsys.readouterr()
    assert submit() == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["sft", "done"]
    assert table[1].split()[:4] == ["dpo", "submitted", "job", "13"]
    assert asked(queue)[2:] == [f"--parsable {queue.parent}/runs/small/dpo/slurm/job.sh"]  # waits for nobody


def test_a_job_that_waits_for_a_failed_one_makes_room(queue: Path) -> None:
    """A cluster may leave it in the queue for ever, in spite of --kill-on-invalid-dep."""
    assert submit() == 0
    queue.write_text("11|FAILED|None\n12|PENDING|DependencyNeverSatisfied\n")
    assert submit() == 0
    assert queue.read_text().splitlines() == [
        "11|FAILED|None", "12|CANCELLED|None", "13|PENDING|None", "14|PENDING|None",
    ]  # fmt: skip
    assert asked(queue)[3].startswith("--parsable --dependency=afterok:13 ")


def test_a_job_of_another_recipe_is_not_taken_for_this_one(queue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    assert submit("--set", "stages.sft.train.learning_rate=1.0e-4") == ExitCode.BAD_INPUT
    assert "stages.sft: job 11 is in the queue with other settings" in capsys.readouterr().err
    assert len(asked(queue)) == 2


def test_force_does_not_move_a_stage_away_under_its_job(queue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    assert main(["run", "recipe.yaml", "--slurm", "--stage", "sft", "--force"]) == ExitCode.BAD_INPUT
    assert "stages.sft: job 11 is in the queue; take it out first: scancel 11" in capsys.readouterr().err
    assert (queue.parent / "runs/small/sft/slurm/job.json").exists()


def test_what_slurm_refuses_is_said(queue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (queue.parent / "refuse").touch()
    assert submit() == ExitCode.FAILED
    assert "sbatch: error: Batch job submission failed: Invalid account" in capsys.readouterr().err


def test_without_slurm_it_says_so(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(workplace))
    assert submit() == ExitCode.FAILED
    assert "sbatch: not found: this machine has no Slurm" in capsys.readouterr().err


# -- states ------------------------------------------------------------------------------------------------------------


def states(capsys: pytest.CaptureFixture[str]) -> dict[str, tuple[str, str]]:
    capsys.readouterr()
    main(["status", "small", "--json"])
    return {s["stage"]: (s["state"], s["message"]) for s in json.loads(capsys.readouterr().out)["stages"]}


def test_states_come_from_the_queue(queue: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit() == 0
    queue.write_text("11|PENDING|Resources\n12|PENDING|Dependency\n")
    assert states(capsys)["sft"] == ("queued", "Resources")
    assert states(capsys)["dpo"] == ("queued", "after sft (job 11)")
    queue.write_text("11|RUNNING|None\n12|PENDING|Dependency\n")
    assert states(capsys)["sft"] == ("running", "")
    main(["runs"])
    assert "job 12, after sft (job 11)" in capsys.readouterr().out


def test_after_the_queue_forgot_them_the_accounting_knows(
    queue: Path, load: Callable, look: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit() == 0
    sft = look(load(), "sft").spec
    runs.write_status(sft.output, attempt="a", state="failed", code=6, message="loss is nan")
    queue.write_text("")
    (queue.parent / "accounts").write_text("11|FAILED\n12|CANCELLED by 0\n")
    assert states(capsys)["sft"] == ("failed", "loss is nan")
    assert states(capsys)["dpo"] == ("cancelled", "cancelled because sft failed")
    (queue.parent / "accounts").unlink()
    assert states(capsys)["dpo"] == ("not started", "")  # nobody knows


def test_a_job_that_never_reached_the_worker_is_not_called_not_started(
    queue: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert submit() == 0
    queue.write_text("11|NODE_FAIL|None\n12|CANCELLED|None\n")
    state, message = states(capsys)["sft"]
    assert state == "failed"
    assert message.startswith("the job ended (NODE_FAIL) before the worker began; see ")


# -- in the job --------------------------------------------------------------------------------------------------------


@pytest.fixture
def job(look: Callable, load: Callable, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`node end` of the submitted stage, on the given restart of job 11."""
    spec = look(load(), "sft").spec
    write_stage(spec)
    monkeypatch.setenv("SLURM_JOB_ID", "11")

    def run(what: str, restart: int) -> int:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        attempt = f"slurm-11-{restart}"
        if what == "begin":
            node.agree(spec.output / "stage.yaml", attempt, first=True)
            return 0
        if what == "preempted":
            runs.write_status(spec.output, attempt=attempt, state="preempted", code=85, message="saved")
        return node.main([str(spec.output / "stage.yaml"), "end"])

    return run


def test_nodes_agree_on_the_start_by_its_name(look: Callable, load: Callable) -> None:
    spec = look(load(), "sft").spec
    path = write_stage(spec)
    with pytest.raises(ChainError, match="node 0 began nothing within 0 s; is this folder shared by all nodes"):
        node.agree(path, "slurm-11-1", first=False, limit=0.3)
    assert node.agree(path, "slurm-11-1", first=True).attempt == "slurm-11-1"
    assert node.agree(path, "slurm-11-1", first=False, limit=0.3).attempt == "slurm-11-1"


def test_how_a_start_ended(job: Callable, look: Callable, load: Callable, finish: Callable) -> None:
    job("begin", 0)
    assert job("end", 0) == 1  # nobody spoke
    assert job("preempted", 0) == 85
    assert job("end", 1) == 1  # what an earlier start said does not count
    finish(look(load(), "sft").spec)
    assert job("end", 1) == 0


def test_a_time_limit_that_is_too_short_does_not_queue_again_for_ever(
    job: Callable, start: Callable, look: Callable, load: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    codes = []
    for restart in range(3):
        job("begin", restart)
        codes.append(job("preempted", restart))
    assert codes == [85, 85, 1]
    assert "stopped 3 times in a row before a new checkpoint; launch.slurm.time" in capsys.readouterr().err


def test_a_start_that_saved_may_be_queued_again_as_often_as_it_takes(
    job: Callable, start: Callable, look: Callable, load: Callable
) -> None:
    spec = look(load(), "sft").spec
    for restart in range(6):
        job("begin", restart)
        folder = spec.output / f"checkpoint-{restart + 1}"
        folder.mkdir()
        (folder / "SEALED.json").write_text("{}")
        assert job("preempted", restart) == 85
