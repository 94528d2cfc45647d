"""The manifest of every kind of stage is complete and verifies; what is edited afterwards is named."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from alignment.cli import main
from alignment.pipeline import runs
from alignment.pipeline.verify import CONTRACT, verify

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


@pytest.fixture(scope="module")
def chain(
    tiny_run: Path, run_recipe: Callable[..., Path], tiny_recipe: Callable[..., Any], tmp_path_factory: Any
) -> Path:
    """A run with an adapter, a new one on the merged one, a reward model, and ppo."""
    short = {"train": {"max_steps": 2}}
    recipe = tiny_recipe(
        "sft", "dpo", "reward", "ppo", sft={"model": str(tiny_run / "sft"), "peft": LORA} | short,
        dpo={"peft": LORA} | short, reward=short, ppo={"train": {"max_steps": 1}},
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("chain")
    umask = os.umask(0o027)
    try:
        run = run_recipe(recipe, folder)
        (run / "recipe.yaml").write_text("stages: {sft: {}, dpo: {}, reward: {}, ppo: {}}\n")
    finally:
        os.umask(umask)
    return run


def test_every_manifest_is_complete_and_verifies(chain: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(chain)]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.count("ok    ") == 4
    found = {name: runs.read_manifest(chain / name) or {} for name in ("sft", "dpo", "reward", "ppo")}
    for name, manifest in found.items():
        assert manifest.keys() >= CONTRACT.keys(), name
        assert manifest["data"]["train"]["key"], name  # hash of the rows and of what made them tokens
        assert {"kept", "dropped", "truncated"} <= manifest["data"]["train"].keys()
    assert found["sft"]["model"]["adapters"] == ["."]
    assert found["dpo"]["model"]["start"]["from"] == "stage:sft"
    assert found["dpo"]["model"]["start"]["merged"] is True
    assert found["dpo"]["model"]["base"]["path"] == str(chain / "dpo" / "base")
    assert found["reward"]["model"]["base"] is None
    assert found["sft"]["model"]["start"]["weights_sha256"] == found["sft"]["model"]["base"]["weights_sha256"]


def test_files_have_the_mode_of_the_umask_and_no_pickle_of_arguments_stays(chain: Path) -> None:
    files = [path for path in chain.rglob("*") if path.is_file()]
    assert {oct(path.stat().st_mode & 0o777) for path in files} == {"0o640"}
    assert [path for path in files if path.name == "training_args.bin"] == []
    assert any(path.name == "model.safetensors" and path.parent.name == "base" for path in files)


def copied(chain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chain, tmp_path / "copy"))


def test_an_adapter_is_held_against_its_base(chain: Path, tmp_path: Path) -> None:
    stage = copied(chain, tmp_path) / "dpo"
    base = tmp_path / "copy" / "dpo" / "base"
    for path, change in (
        (stage / "adapter_config.json", {"base_model_name_or_path": str(base)}),
        (stage / "manifest.json", {}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    manifest = json.loads((stage / "manifest.json").read_text())
    content = (stage / "adapter_config.json").read_bytes()
    manifest["files"]["adapter_config.json"] = {
        "size": len(content), "sha256": runs.file_hash(stage / "adapter_config.json", tmp_path)
    }  # fmt: skip
    (stage / "manifest.json").write_text(json.dumps(manifest))
    assert verify(stage).problems == []
    weights = base / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    (problem,) = verify(stage).problems
    assert f"its base {base} holds other weights than the adapter was trained on" in problem


def test_a_parent_that_ran_again_is_named(chain: Path, tmp_path: Path) -> None:
    run = copied(chain, tmp_path)
    path = run / "ppo" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parents"]["sft"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert verify(run / "ppo").problems == [f"{run}/ppo: its parent sft holds other weights now; it ran again since"]
    manifest["parents"]["sft"]["path"] = "/nowhere"
    path.write_text(json.dumps(manifest))
    verdict = verify(run / "ppo")
    assert verdict.problems == []
    assert verdict.notes == [f"{run}/ppo: its parent sft is not at /nowhere: not compared"]


def test_an_export_verifies_wherever_it_goes(
    chain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    assert main(["export", str(chain / "sft"), str(out)]) == 0
    shutil.move(out, tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "moved"]) == 0
    assert str(chain) not in (tmp_path / "moved" / "manifest.json").read_text()
    capsys.readouterr()
    assert main(["verify", "moved", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    with (tmp_path / "moved" / "tokenizer.json").open("a") as file:
        file.write(" ")
    assert main(["verify", "moved"]) == 2
    assert capsys.readouterr().err.startswith("alignment: moved/tokenizer.json: ")
