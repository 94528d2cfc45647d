"""`alignment run` from end to end with a stand-in for the worker: order, skipping, refusals, exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.cli import main
from alignment.errors import LockedError
from alignment.pipeline import launch, runs
from alignment.pipeline.locks import lock
from alignment.pipeline.supervise import Ended

STUB = Path(__file__).with_name("stub_worker.py")


@pytest.fixture
def alignment(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., Any]:
    """`alignment run recipe.yaml ...` with the stub; returns exit code, stdout, stderr and the stages that ran."""
    monkeypatch.setattr(launch, "command", lambda spec, path, env=None: [sys.executable, str(STUB), str(path)])
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))

    def run(*words: str) -> tuple[int, str, str, list[str]]:
        (workplace / "trace").write_text("")
        capfd.readouterr()
        code = main(["run", "recipe.yaml", *words])
        out, err = capfd.readouterr()
        return code, out, err, (workplace / "trace").read_text().split()

    return run


def test_all_stages_run_in_order_and_a_second_run_does_nothing(alignment: Callable) -> None:
    code, out, _, ran = alignment()
    assert (code, ran) == (0, ["sft", "dpo", "kto", "evaluate"])
    assert "[2/4] dpo (dpo on stage:sft): to run, after sft" in out
    assert "[2/4] dpo (dpo on stage:sft): done after" in out
    assert "eval_loss 1.25" in out
    assert "stub works on sft" in out
    assert out.splitlines()[-1] == "runs/small"
    code, out, _, ran = alignment()
    assert (code, ran) == (0, [])
    assert "nothing to do: all 4 of 4 stages are done" in out
    assert out.splitlines()[-1] == "runs/small"


def test_parts_of_a_recipe(alignment: Callable) -> None:
    code, _, err, ran = alignment("--stage", "dpo")
    assert (code, ran) == (2, [])
    assert err == "alignment: stages.dpo: sft must be finished first; run everything up to it: --until dpo\n"
    assert alignment("--until", "dpo")[3] == ["sft", "dpo"]
    assert alignment("--stage", "kto")[3] == ["kto"]
    code, _, err, _ = alignment("--stage", "dop")
    assert code == 2
    assert "--stage dop: no such stage (did you mean dpo?); stages are sft, dpo, kto, evaluate" in err


def test_a_changed_recipe_is_refused_with_the_difference(alignment: Callable) -> None:
    alignment("--until", "dpo")
    change = ["--set", "stages.dpo.train.beta=0.05", "--until", "dpo"]
    for extra in ([], ["--dry-run"]):
        code, _, err, ran = alignment(*change, *extra)
        assert (code, ran) == (2, [])
        assert "alignment: stages.dpo.train.beta: 0.1 -> 0.05\n" in err
        assert "--allow-change KEY" in err
        assert "--force" in err
    code, _, _, ran = alignment(*change, "--allow-change", "stages.dpo.train.beta")
    assert (code, ran) == (0, [])
    manifest = runs.read_manifest(Path("runs/small/dpo")) or {}
    assert manifest["forced"] == ["stages.dpo.train.beta: 0.1 -> 0.05"]
    assert alignment(*change)[0] == 0


def test_force_moves_the_stage_and_what_depends_on_it(alignment: Callable) -> None:
    alignment()
    before = (Path("runs/small/dpo/model.safetensors")).read_bytes()
    change = ["--set", "stages.dpo.train.beta=0.05"]
    code, out, _, ran = alignment(*change, "--force", "--dry-run")
    assert (code, ran) == (0, [])
    assert "dpo: runs/small/dpo would be moved aside" in out
    code, out, _, ran = alignment(*change, "--force")
    assert (code, ran) == (0, ["dpo", "evaluate"])
    (moved,) = Path("runs/small").glob("dpo.*")
    assert (moved / "model.safetensors").read_bytes() == before
    assert len(list(Path("runs/small").glob("evaluate.*"))) == 1
    assert alignment(*change, "--stage", "kto", "--force")[3] == ["kto"]


def test_force_of_a_parent_archives_all_that_follows(alignment: Callable) -> None:
    alignment()
    code, _, _, ran = alignment("--stage", "sft", "--force")
    assert (code, ran) == (0, ["sft"])
    assert sorted(path.name.partition(".")[0] for path in Path("runs/small").glob("*.2*")) == [
        "dpo", "evaluate", "kto", "sft",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("word", "code", "says"),
    [("fail", 1, "failed"), ("nan", 6, "failed"), ("preempt", 85, "preempted"), ("die", 1, "failed")],
)
def test_the_exit_code_is_the_workers(workplace: Path, alignment: Callable, word: str, code: int, says: str) -> None:
    (workplace / "behave").write_text(f"dpo {word}\n")
    found, out, _, ran = alignment()
    assert (found, ran) == (code, ["sft", "dpo"])
    assert f"[2/4] dpo (dpo on stage:sft): {says} after" in out
    assert main(["status", "small/dpo"]) == code
    if word == "die":
        assert "the worker was killed after step 2" in out
    (workplace / "behave").unlink()
    found, out, _, ran = alignment()
    assert (found, ran) == (0, ["dpo", "kto", "evaluate"])
    assert "goes on from its newest sealed checkpoint" in out
    assert ("taken over" in out) is (word == "die")


def test_json_is_all_of_stdout(alignment: Callable) -> None:
    code, out, _, _ = alignment("--json", "--until", "dpo")
    summary = json.loads(out)
    assert (code, summary["code"], summary["run"]) == (0, 0, "runs/small")
    assert summary["stages"]["dpo"]["status"] == "done"
    assert summary["stages"]["dpo"]["metrics"] == {"eval_loss": 1.25}
    assert Path("runs/small/dpo/output.log").read_text() == "stub works on dpo\n"
    code, out, _, _ = alignment("--json", "--set", "seed=8")
    assert (code, json.loads(out)["code"]) == (2, 2)
    assert "seed: 7 -> 8" in json.loads(out)["error"]


def test_quiet_prints_the_path_only_and_errors_on_stderr(workplace: Path, alignment: Callable) -> None:
    (workplace / "behave").write_text("dpo nan\n")
    code, out, err, _ = alignment("--quiet")
    assert (code, out) == (6, "runs/small\n")
    assert "alignment: stage dpo: loss is nan" in err


def test_two_on_one_run(workplace: Path, alignment: Callable) -> None:
    with lock(workplace / "runs" / "small"):
        started = time.monotonic()
        code, _, err, ran = alignment()
        assert (code, ran) == (5, [])
        assert f"in use by process {os.getpid()} on " in err
        assert time.monotonic() - started < 2
    with lock(workplace / "runs" / "small" / "sft"):  # a worker that outlived its `alignment run`
        code, _, err, ran = alignment()
        assert (code, ran) == (5, [])
    assert alignment("--until", "sft")[0] == 0


def test_a_run_on_a_full_disk_is_code_4(workplace: Path, alignment: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    (workplace / "runs").write_text("a file, where a folder should be")
    code, _, err, ran = alignment()
    assert (code, ran) == (4, [])
    assert err.startswith("alignment: ")
    assert err.count("\n") == 1


def test_missing_files_are_named_together_and_nothing_is_written(workplace: Path, alignment: Callable) -> None:
    (workplace / "rows" / "sft.jsonl").unlink()
    (workplace / "base" / "config.json").unlink()
    code, _, err, _ = alignment()
    assert code == 2
    assert "stages.sft.data.train[0]: rows/sft.jsonl: no such file" in err
    assert "stages.sft.model: base: no model folder" in err
    assert not (workplace / "runs").exists()


def test_ctrl_c_leaves_no_process(workplace: Path) -> None:
    """The whole command as its own process; the stub would sleep for ever."""
    (workplace / "behave").write_text("sft sleep\n")
    script = (
        "import sys; from alignment.pipeline import launch; from alignment.cli import main\n"
        f"launch.command = lambda spec, path, env=None: [sys.executable, {str(STUB)!r}, str(path)]\n"
        "sys.exit(main(['run', 'recipe.yaml']))"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    process = subprocess.Popen([sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, text=True)
    status = workplace / "runs" / "small" / "sft" / "status.json"
    end = time.monotonic() + 30
    while not status.exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    worker = json.loads(status.read_text())["pid"]
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 85
    assert "SIGINT: stopping" in out
    assert "stopped by SIGINT; the same command goes on" in out
    with pytest.raises(ProcessLookupError):
        os.kill(worker, 0)


def test_a_signal_at_the_last_moment_starts_no_further_stage(
    workplace: Path, alignment: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = launch.run

    def signalled(*args: Any, **options: Any) -> Ended:
        return Ended(real(*args, **options).code, signal.SIGTERM)

    monkeypatch.setattr(launch, "run", signalled)
    code, out, _, ran = alignment()
    assert (code, ran) == (85, ["sft"])
    assert "sft (sft on base): done after" in out
    assert "stopped before dpo; the same command goes on" in out
    code, out, _, ran = alignment("--until", "dpo")
    assert (code, ran) == (0, ["dpo"])  # nothing more was asked for: there is nothing to start again
    assert "stopped" not in out
    monkeypatch.undo()


def test_the_plan_says_what_is_inherited_overridden_and_default(alignment: Callable) -> None:
    out = alignment("--dry-run", "--set", "stages.dpo.seed=9", "--set", "stages.dpo.launch.processes=2")[1]
    dpo = out[out.index("[2/4] dpo") : out.index("[3/4] kto")]
    assert "models     policy (trained), reference (frozen)" in dpo
    assert "beta 0.1, " in dpo
    assert "learning_rate 1e-06 (default)" in dpo
    assert "lr_scheduler_type linear (default)" in dpo
    assert "8 rows per step = 2 x 4 x 1 (processes x per_device x accumulation)" in dpo
    assert "chat_template chatml" in dpo
    assert "overrides  seed 9 (recipe: 7)" in dpo
    assert "--num_processes 2 --multi_gpu" in dpo or "stub_worker.py" in dpo
    assert "stages.dpo" not in dpo


def test_the_run_lock_is_free_afterwards(workplace: Path, alignment: Callable) -> None:
    alignment("--until", "sft")
    try:
        with lock(workplace / "runs" / "small"):
            pass
    except LockedError:
        pytest.fail("still held")
