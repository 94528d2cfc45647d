"""Every saved model is loaded by another process, and a stage whose model comes back otherwise is not finished."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from alignment.errors import ExitCode, ModelError, UserError
from alignment.models.load import load_policy
from alignment.models.tokenizer import describe
from alignment.training import publish, readback

LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}
Damage = Callable[[Path], object]


def test_another_process_finds_what_the_folder_holds(tiny_policy: Path) -> None:
    found = readback.read(tiny_policy, scorer=False, attention="sdpa")
    model, tokenizer = load_policy(tiny_policy)
    ids = readback.probe(tokenizer)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    assert torch.allclose(torch.from_numpy(found["logits"]), logits, atol=1e-6)
    assert found["probe_ids"] == ids[0].tolist()
    assert found["stop_ids"] == describe(tokenizer)["eos_ids"]
    assert found["process"] not in (os.getpid(), readback.start().process.pid)  # a fork of the one that imported
    assert found["differences"] == []
    assert readback.read(tiny_policy, scorer=False, attention="sdpa")["process"] != found["process"]
    assert not tiny_policy.with_name(tiny_policy.name + readback.LOGITS).exists()


def test_a_reader_that_is_killed_is_named_and_started_again(tiny_policy: Path, tmp_path: Path) -> None:
    reader = readback.start()
    os.kill(reader.process.pid, signal.SIGKILL)
    with pytest.raises(UserError, match="the process that reads the saved model back ended with -9"):
        reader.ask({"folder": "x"})
    with pytest.raises(ModelError, match=r"no model folder"):
        readback.read(tmp_path, scorer=False, attention="sdpa")
    assert readback.start() is not reader


def test_it_takes_nothing_of_the_launch_along() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "x", "ACCELERATE_USE_DEEPSPEED": "true", "PATH": "/bin",
           "TORCHELASTIC_RUN_ID": "7", "CUDA_VISIBLE_DEVICES": "3"}  # fmt: skip
    assert readback.environment(env) == {"PATH": "/bin", "CUDA_VISIBLE_DEVICES": ""}


def tensors(**change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Change the tensors of a weight file whose names hold a word."""

    def damage(folder: Path) -> None:
        (path,) = folder.glob("*.safetensors")
        found, touched = load_file(path), 0
        for word, function in change.items():
            for name in found:
                if word in name:
                    found[name], touched = function(found[name]).contiguous(), touched + 1
        assert touched
        save_file(found, path, metadata={"format": "pt"})

    return damage


def last_row_nan(weight: torch.Tensor) -> torch.Tensor:
    weight[-1] = float("nan")  # of an id that no token has
    return weight


def comment(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + "{# the same text, another template #}")


def other_stop(folder: Path) -> None:
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [5]}))


FAULTS: dict[str, tuple[str, Damage, int, str]] = {
    "half a layer": ("sft", tensors(up_proj=lambda w: w * 0.5), 2, "up_proj.weight has the norm "),
    "a row that is not finite": ("sft", tensors(embed_tokens=last_row_nan), 6, "embed_tokens.weight is not finite"),
    "another template": ("sft", comment, 2, "the saved chat template is not the trained one"),
    "another stop token": ("sft", other_stop, 2, "the saved model stops at [5], trained were"),
    "an empty adapter": (
        "adapter",
        tensors(lora_B=torch.zeros_like),
        2,
        "lora_B.default.weight has the norm 0, in memory ",
    ),
    "an empty score head": (
        "reward",
        tensors(score=torch.zeros_like),
        2,
        "score.weight has the norm 0, in memory it has ",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_model_that_comes_back_otherwise_is_not_published(
    name: str, tiny_run: Path, run_recipe: Callable[..., Path], tiny_recipe: Callable[..., Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    stage, damage, code, says = FAULTS[name]
    original = publish._check_weights

    def after(folder: Path) -> None:
        original(folder)
        damage(folder)

    monkeypatch.setattr(publish, "_check_weights", after)
    algorithm = "sft" if stage == "adapter" else stage
    change: dict[str, Any] = {"model": str(tiny_run / "sft"), "train": {"max_steps": 2}}
    recipe = tiny_recipe(algorithm, **{algorithm: change | ({"peft": LORA} if stage == "adapter" else {})})
    run = run_recipe(recipe, tmp_path, expect=ExitCode(code))
    assert says in capsys.readouterr().err
    assert not (run / algorithm / "manifest.json").exists()
    assert not list((run / algorithm).glob("*.safetensors"))
