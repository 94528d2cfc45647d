"""Each shipped recipe fits the hardware that it names, and its README says with how much.

The sizes of the models are their published configurations, laid into a stand-in for the hub's cache.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from alignment.cli import main

ROOT = Path(__file__).resolve().parents[1]
LLAMA_31_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}  # fmt: skip
SMOLLM2 = {
    "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 49152, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip
MODELS = {
    "meta-llama/Llama-3.1-8B": LLAMA_31_8B,
    "allenai/Llama-3.1-Tulu-3-8B-DPO": LLAMA_31_8B | {"vocab_size": 128264},
    "mistralai/Mistral-7B-v0.1": LLAMA_31_8B
    | {"model_type": "mistral", "vocab_size": 32000, "max_position_embeddings": 32768, "sliding_window": 4096},
    "Qwen/Qwen3-8B-Base": LLAMA_31_8B
    | {
        "model_type": "qwen3", "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936,
        "head_dim": 128, "max_position_embeddings": 32768,
    },
    "HuggingFaceTB/SmolLM2-1.7B": SMOLLM2,
    "HuggingFaceTB/SmolLM2-1.7B-Instruct": SMOLLM2,
    "HuggingFaceTB/SmolLM2-135M": SMOLLM2
    | {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3,
    },
}  # fmt: skip
GB = 2**30
RECIPES = sorted(ROOT.glob("recipes/*/*.yaml"))
PINNED = dict(re.findall(r"([\w.-]+/[\w.-]+)(?:@|\n *revision: )([0-9a-f]{40})", "".join(map(Path.read_text, RECIPES))))
# GB of the GPUs that a recipe names; how many, it says itself in `launch.processes`.
HARDWARE = {
    "hh-rlhf/helpful": 24, "llama-3.1-8b/tulu3": 80, "qwen3-8b/full": 80, "qwen3-8b/lora": 80, "smollm2-1.7b/full": 80,
    "smollm2-1.7b/ppo": 80, "zephyr-7b/full": 80, "zephyr-7b/qlora": 24,
}  # fmt: skip


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache of the hub that holds the configurations and nothing else."""
    for name, config in MODELS.items():
        folder = tmp_path / f"models--{name.replace('/', '--')}" / "snapshots" / PINNED[name]
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))


def plans(recipe: str, capsys: pytest.CaptureFixture[str], *more: str) -> dict[str, Any]:
    """What `alignment check --memory` says of each stage."""
    main(["check", str(ROOT / "recipes" / f"{recipe}.yaml"), "--json", *more])
    found: dict[str, Any] = json.loads(capsys.readouterr().out)["memory"]
    return found


def test_every_recipe_for_a_gpu_is_in_the_table() -> None:
    shipped = {path.relative_to(ROOT / "recipes").with_suffix("").as_posix() for path in ROOT.glob("recipes/*/*.yaml")}
    assert {name for name in shipped if not name.startswith("tiny/")} == set(HARDWARE)


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("recipe", HARDWARE)
def test_a_recipe_fits_the_gpus_that_it_names_and_its_readme_says_how(
    recipe: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    memory = HARDWARE[recipe]
    found = plans(recipe, capsys, "--memory", str(memory))
    assert {name: plan.get("unknown") or plan["fits"] for name, plan in found.items()} == dict.fromkeys(found, True)
    peaks = ", ".join(f"{name} {plan['peak'] / GB:.1f}" for name, plan in found.items())
    folder = recipe.partition("/")[0]
    line = f"| `alignment check recipes/{recipe}.yaml --memory {memory}` | {peaks} |"
    assert line in (ROOT / "recipes" / folder / "README.md").read_text(), f"the README should hold this line:\n{line}"


@pytest.mark.usefixtures("hub")
def test_a_recipe_that_would_not_fit_is_told_so(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found = plans("zephyr-7b/full", capsys, "--gpus", "8", "--memory", "24")
    assert found["sft"]["fits"] is False
    assert found["sft"]["changes"]
