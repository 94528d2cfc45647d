"""DeepSpeed files that would end late or wrong are refused with the recipe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from alignment.recipe.sharding import deepspeed_problems

GATHER = {"stage": 3, "stage3_gather_16bit_weights_on_model_save": True}


@pytest.mark.parametrize("name", ["zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_our_files_are_sound(name: str, root: Path) -> None:
    assert list(deepspeed_problems(str(root / "ds_configs" / f"{name}.json"))) == []


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"optimizer": {"type": "AdamW"}}, "`optimizer` belongs to the recipe (`train.optim`)"),
        ({"scheduler": {"type": "WarmupLR"}}, "`scheduler` belongs to the recipe (`train.lr_scheduler_type`)"),
        ({"fp16": {"enabled": True}}, "fp16 is not supported"),
        ({"zero_optimization": {"stage": 3}}, "ZeRO-3 saves no weights"),
        ({"zero_optimization": GATHER | {"stage3_gather_16bit_weights_on_model_save": False}}, "saves no weights"),
        ([], "is not a JSON object"),
    ],
)
def test_each_is_named(content: Any, told: str, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    (line,) = deepspeed_problems(str(path))
    assert told in line
    assert str(path) in line


@pytest.mark.parametrize("content", [{"fp16": {"enabled": False}}, {"zero_optimization": GATHER}, {"bf16": "auto"}, {}])
def test_sound_ones_pass(content: Any, tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(content))
    assert list(deepspeed_problems(str(path))) == []


def test_a_recipe_with_such_a_file_is_refused(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from alignment.errors import RecipeError
    from alignment.recipe.load import load_recipe

    monkeypatch.chdir(root)
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"scheduler": {}, "zero_optimization": {"stage": 3}}))
    with pytest.raises(RecipeError) as refused:
        load_recipe("recipes/tiny/chain.yaml", [f"launch.deepspeed={path}"])
    lines = str(refused.value).splitlines()
    assert [line for line in lines if "launch.deepspeed" in line and "scheduler" in line]
    assert [line for line in lines if "launch.deepspeed" in line and "saves no weights" in line]
