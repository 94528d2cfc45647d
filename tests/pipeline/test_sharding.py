"""Which launch can go on from which checkpoint: told from the seal alone, before anything starts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from alignment.pipeline import plan as planning
from alignment.pipeline import runs
from alignment.pipeline.sharding import Engine, resume_problem, written_by, zero_stage

FILES = {
    0: ["optimizer.pt", "model.safetensors"],
    2: ["global_step5/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt", "global_step5/mp_rank_00_model_states.pt"],
    3: ["global_step5/zero_pp_rank_0_mp_rank_00_optim_states.pt",
        "global_step5/zero_pp_rank_0_mp_rank_00_model_states.pt"],
}  # fmt: skip


def checkpoint(folder: Path, stage: int, ranks: int, fingerprint: str = "x") -> Path:
    """A sealed checkpoint with the files that such a launch leaves."""
    path = folder / "checkpoint-5"
    for name in FILES[stage]:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"states")
    runs.seal(path, step=5, world_size=ranks, fingerprint_sha256=fingerprint)
    return path


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_the_files_tell_who_wrote_them(stage: int, tmp_path: Path) -> None:
    assert written_by(checkpoint(tmp_path, stage, 4)) == Engine(stage, 4)
    assert written_by(tmp_path) is None  # no seal


@pytest.mark.parametrize(
    ("then", "now", "algorithm", "reason"),
    [
        ((0, 4), (0, 2), "sft", None),  # one file of states: any number of processes reads it
        ((0, 4), (0, 2), "kto", "the loss of kto depends on the rows of all processes' forward passes"),
        ((0, 2), (0, 2), "kto", None),
        ((2, 4), (1, 4), "sft", None),
        ((2, 4), (2, 4), "sft", None),
        ((2, 4), (2, 2), "sft", "its states are cut into as many shares"),
        ((3, 4), (3, 4), "dpo", None),
        ((3, 4), (3, 8), "dpo", "its states are cut into as many shares"),
        ((3, 4), (0, 4), "dpo", "the one cannot read the other's states"),  # upstream: a fresh optimizer, in silence
        ((0, 4), (3, 4), "dpo", "the one cannot read the other's states"),
        ((2, 4), (3, 4), "ppo", "the one cannot read the other's states"),
    ],
)
def test_what_goes_on_from_what(
    then: tuple[int, int], now: tuple[int, int], algorithm: str, reason: str | None, tmp_path: Path
) -> None:
    found = resume_problem(checkpoint(tmp_path, *then), Engine(*now), algorithm)
    if reason is None:
        assert found is None
    else:
        assert found is not None
        assert reason in found
        assert f"written by {then[0 + 1]} processes" in found
        assert "alignment export --from-checkpoint" in found


def test_the_stage_of_a_file(root: Path, tmp_path: Path) -> None:
    found = {path.stem: zero_stage(path) for path in (root / "ds_configs").glob("zero*.json")}
    assert found == {"zero1": 1, "zero2": 2, "zero2_offload": 2, "zero3": 3, "zero3_offload": 3}
    (tmp_path / "none.json").write_text("[]")
    assert zero_stage(None) == zero_stage(tmp_path / "none.json") == zero_stage(tmp_path / "absent.json") == 0


def test_the_plan_refuses_another_engine(workplace: Path, load: Callable, look: Callable) -> None:
    (workplace / "zero3.json").write_text(
        json.dumps({"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}})
    )
    four = ("launch.processes=2", "launch.deepspeed=zero3.json")
    first = look(load(*four), "sft")
    planning.write_stage(first.spec)
    checkpoint(first.spec.output, 3, 2, first.spec.fingerprint_sha256)
    assert look(load(*four), "sft").status == "resume"
    plain = look(load("launch.processes=2"), "sft")
    assert plain.status == "changed"
    (line,) = plain.difference
    assert line.startswith("stages.sft.launch: checkpoint-5 was written by 2 processes under ZeRO-3, and this launch")
    fewer = look(load("launch.processes=1", "launch.deepspeed=zero3.json"), "sft")
    assert "cut into as many shares" in fewer.difference[0]
