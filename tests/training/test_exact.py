"""A resumed stage goes on with the very log it had; what would not be exact is said or refused."""

from __future__ import annotations

import errno
import itertools
import json
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from trl import DPOTrainer, KTOTrainer, RewardTrainer, SFTTrainer

from alignment.errors import ExitCode, StorageError
from alignment.pipeline import runs, seals
from alignment.training import callbacks, exact, outcome, storage, worker

Recipe = Callable[..., dict[str, Any]]
Run = Callable[..., Path]


class Killed(BaseException):
    """Stands for a kill: nothing catches it."""


def die(*args: Any, **kwargs: Any) -> None:
    raise Killed


def plain_log(stage: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def killed_at(step: int, recipe: dict[str, Any], run_recipe: Run, folder: Path) -> Path:
    """Run a recipe's only stage and kill it at the end of a step; returns the stage's folder."""
    with pytest.MonkeyPatch.context() as patch:
        own = callbacks.Seal.on_save

        def on_save(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            own(self, args, state, control, **kwargs)
            if state.global_step == step:
                die()

        patch.setattr(callbacks.Seal, "on_save", on_save)
        with pytest.raises(Killed):
            run_recipe(recipe, folder)
    (name,) = recipe["stages"]
    return folder / recipe["name"] / name


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "kto"])
def test_a_log_line_over_several_steps_is_the_same_after_a_kill_in_its_middle(
    name: str, tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """Lines of 3 steps, checkpoints of 2: the line of steps 4 to 6 begins before the checkpoint of step 4."""
    change = {name: {"model": str(tiny_run / ("base" if name == "sft" else "sft")), "train": {"logging_steps": 3}}}
    recipe = tiny_recipe(name, **change)
    (tmp_path / "whole").mkdir()
    whole = run_recipe(recipe, tmp_path / "whole") / name
    killed_at(4, recipe, run_recipe, tmp_path)
    again = run_recipe(recipe, tmp_path) / name
    assert plain_log(again) == plain_log(whole)
    steps = [(line["step"], "loss" in line) for line in plain_log(again)]
    assert steps == [(3, True), (6, True), (6, False)]  # the last one sums up
    assert runs.read_manifest(again)["metrics"] == runs.read_manifest(whole)["metrics"]


def test_a_stage_killed_after_its_last_step_writes_no_line_twice(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, data_folder: Path
) -> None:
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base")})
    recipe["stages"]["sft"]["data"]["eval"] = [{"path": str(data_folder / "sft-eval.jsonl")}]
    (tmp_path / "whole").mkdir()
    whole = run_recipe(recipe, tmp_path / "whole") / "sft"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_finish", die)
        with pytest.raises(Killed):
            run_recipe(recipe, tmp_path)
    again = run_recipe(recipe, tmp_path) / "sft"
    assert plain_log(again) == plain_log(whole)
    assert sum("train_loss" in line for line in plain_log(again)) == 1
    assert sum("eval_loss" in line for line in plain_log(again)) == 1


def test_the_mean_loss_of_a_run_is_that_of_all_its_steps(tiny_run: Path) -> None:
    lines = plain_log(tiny_run / "sft")
    losses = [line["loss"] for line in lines if "loss" in line]
    assert lines[-1]["train_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)


def test_a_reference_that_moves_is_part_of_the_checkpoint(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    train = {"sync_ref_model": True, "ref_model_sync_steps": 1, "ref_model_mixup_alpha": 0.5}
    recipe = tiny_recipe("dpo", dpo={"model": str(tiny_run / "sft"), "train": train})
    (tmp_path / "whole").mkdir()
    whole = run_recipe(recipe, tmp_path / "whole") / "dpo"
    stage = killed_at(4, recipe, run_recipe, tmp_path)
    kept = load_file(stage / "checkpoint-4" / exact.REFERENCE)
    start = load_file(tiny_run / "sft" / "model.safetensors")
    assert any(not torch.equal(kept[name], start[name]) for name in start)  # it did move
    again = run_recipe(recipe, tmp_path) / "dpo"
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert plain_log(again) == plain_log(whole)


def test_a_checkpoint_without_the_moving_reference_is_refused(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """ZeRO-3 shards the reference, so that no checkpoint holds it."""
    train = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    recipe = tiny_recipe("dpo", dpo={"model": str(tiny_run / "sft"), "train": train})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exact, "_reference", lambda trainer: {})
        killed_at(4, recipe, run_recipe, tmp_path)
    run_recipe(recipe, tmp_path, expect=ExitCode.NO_CHECKPOINT)
    assert "checkpoint-4: does not hold the reference that train.sync_ref_model moves" in capsys.readouterr().err


def test_a_checkpoint_of_other_processes_goes_on_and_says_so(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base")})
    stage = killed_at(4, recipe, run_recipe, tmp_path)
    for folder in seals.checkpoints(stage):  # as two ranks would have left it
        (folder / "exact-0-of-1.json").rename(folder / "exact-0-of-2.json")
        sealed = json.loads((folder / seals.SEALED).read_text())
        sealed["files"]["exact-0-of-2.json"] = sealed["files"].pop("exact-0-of-1.json")
        (folder / seals.SEALED).write_text(json.dumps(sealed))
    run_recipe(recipe, tmp_path)
    assert "checkpoint-4 was made by another number of processes" in capsys.readouterr().out


def test_upstream_still_has_what_is_carried_over() -> None:
    """The day a name changes, a resumed log would differ and nothing else would show."""
    import inspect

    import transformers

    source = inspect.getsource(transformers.Trainer)
    for name in ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged"):
        assert f"self.{name}" in source, name
    for trainer in (SFTTrainer, DPOTrainer, KTOTrainer, RewardTrainer):
        for name in ('_metrics = {"train": defaultdict(list)', "_total_train_tokens = 0"):
            assert f"self.{name}" in inspect.getsource(trainer), (trainer, name)


def test_a_clock_that_jumps_changes_nothing(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock is days before or after the last one."""
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base")})
    (tmp_path / "whole").mkdir()
    whole = run_recipe(recipe, tmp_path / "whole") / "sft"
    real, looks = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: real() + (-1) ** next(looks) * 3 * 24 * 3600)
    killed_at(4, recipe, run_recipe, tmp_path)
    again = run_recipe(recipe, tmp_path) / "sft"
    assert next(looks) > 2
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (again, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert plain_log(again) == plain_log(whole)


# --- checkpoints that are no good -----------------------------------------------------------------------------------


def test_the_rotation_does_not_count_a_damaged_checkpoint_as_good(
    tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    """With one to keep, a damaged checkpoint of step 6 must not cost the good one of step 5."""
    recipe = tiny_recipe("sft", sft={"model": str(tiny_run / "base"), "train": {"max_steps": 8}})
    stage = killed_at(6, recipe, run_recipe, tmp_path)
    (stage / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    (stage / "checkpoint-9").mkdir()  # unsealed
    recipe["checkpoints"]["keep"] = 1
    seen: list[list[str]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker, "_finish", die)
        own = callbacks.Preemption.on_step_end

        def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            own(self, args, state, control, **kwargs)
            seen.append([path.name for path in seals.checkpoints(stage)])
            control.should_save = state.global_step == 5

        patch.setattr(callbacks.Preemption, "on_step_end", on_step_end)
        with pytest.raises(Killed):
            run_recipe(recipe, tmp_path)
    assert seen[0] == ["checkpoint-4"]
    assert seen[1] == ["checkpoint-5"]
    assert [path.name for path in seals.checkpoints(stage) if seals.seal_fault(path) is None]


# --- a disk that refuses ----------------------------------------------------------------------------------------------

DiskUsage = namedtuple("DiskUsage", "total used free")


@pytest.mark.parametrize(
    ("error", "says", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device", True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "Disk quota exceeded", True),
        (OSError(errno.EIO, "Input/output error"), "Input/output error", False),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
         "No space left on device", True),
        (RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5312 vs 5204"),
         "a file could not be written", False),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
         "a file could not be written", False),
    ],
)  # fmt: skip
def test_a_refusing_disk_is_recognised(
    error: Exception, says: str, full: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: DiskUsage(2**40, 0, 2**40))
    with pytest.raises(StorageError) as caught, storage.told(tmp_path, 3.5 * 2**30):
        raise error
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}: {says}: ")
    assert "\n" not in text
    assert ("a checkpoint takes about 3.5 GB, " in text and " are free; free some space" in text) == full


def test_where_the_reason_is_lost_the_room_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's archives say that a write failed, and not why."""
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: DiskUsage(2**40, 2**40 - 2**20, 2**20))
    with pytest.raises(StorageError) as caught, storage.told(tmp_path, 3.5 * 2**30):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 5312 vs 5204")
    assert str(caught.value).startswith(
        f"{tmp_path}: a file could not be written: a checkpoint takes about 3.5 GB, 1.0 MB are free; free some space"
    )
    with pytest.raises(StorageError, match="the storage failed"), storage.told(tmp_path, 3.5 * 2**30):
        raise OSError(errno.EIO, "Input/output error")


def test_torch_hides_the_reason_and_it_is_found() -> None:
    def write() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 5312 vs 5204")

    with pytest.raises(RuntimeError) as caught:
        write()
    assert storage.reason(caught.value) == ("No space left on device", True)


@pytest.mark.parametrize("error", [RuntimeError("mat1 and mat2"), FileNotFoundError(2, "gone"), ValueError("x")])
def test_other_errors_stay_what_they_are(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(type(error)), storage.told(tmp_path, 1.0):
        raise error


def test_the_first_failure_of_an_attempt_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose neighbour is gone fails too, of nothing that helps."""

    class Spec:
        output, attempt = tmp_path, "one"

    outcome.write_status(Spec, state="running", code=0)  # type: ignore[arg-type]
    outcome.write_status(Spec, state="failed", code=4, message="full")  # type: ignore[arg-type]
    monkeypatch.setenv("RANK", "1")
    outcome.write_status(Spec, state="failed", code=1, message="connection closed", rank=1)  # type: ignore[arg-type]
    assert (runs.read_status(tmp_path)["code"], runs.read_status(tmp_path)["message"]) == (4, "full")
    Spec.attempt = "two"
    outcome.write_status(Spec, state="failed", code=1, message="alone", rank=1)  # type: ignore[arg-type]
    assert runs.read_status(tmp_path)["message"] == "alone"
