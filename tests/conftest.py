"""What all tests share: no network, few threads, tiny models and rows built on the spot."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # two test processes share two cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORDS = "cat dog sun moon red blue big small run jump eat sleep king queen tree river".split()
TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def write_jsonl() -> Callable[[Path, Iterable[dict[str, Any]]], Path]:
    """A function that writes rows to a JSON Lines file and returns its path."""

    def write(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        return path

    return write


def conversation(index: int) -> list[dict[str, str]]:
    """A short made-up exchange, different for every index."""
    first, second = WORDS[index % len(WORDS)], WORDS[(index * 7 + 3) % len(WORDS)]
    return [
        {"role": "user", "content": f"Tell me about the {first} {index}."},
        {"role": "assistant", "content": f"The {first} likes the {second} number {index}."},
    ]


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory, write_jsonl: Callable[..., Path]) -> Path:
    """Rows for every schema: corpus, sft, preferences, unpaired, prompts (48 each, 16 in the -eval files)."""
    folder = tmp_path_factory.mktemp("rows")
    for suffix, start, count in (("", 0, 48), ("-eval", 100, 16)):
        talks = [conversation(index) for index in range(start, start + count)]
        write_jsonl(
            folder / f"corpus{suffix}.jsonl", ({"text": " ".join(t["content"] for t in talk)} for talk in talks)
        )
        write_jsonl(folder / f"sft{suffix}.jsonl", ({"messages": talk} for talk in talks))
        write_jsonl(
            folder / f"preferences{suffix}.jsonl",
            (
                {
                    "prompt": talk[:1],
                    "chosen": talk[1:],
                    "rejected": [{"role": "assistant", "content": f"No idea about {talk[1]['content'][-3:]} it."}],
                }
                for talk in talks
            ),
        )
        write_jsonl(
            folder / f"unpaired{suffix}.jsonl",
            ({"prompt": talk[:1], "completion": talk[1:], "label": index % 2 == 0} for index, talk in enumerate(talks)),
        )
        write_jsonl(folder / f"prompts{suffix}.jsonl", ({"prompt": talk[:1]} for talk in talks))
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(data_folder: Path) -> Any:
    """A byte-level BPE tokenizer of 320 ids with the ChatML template."""
    from alignment.data import templates
    from alignment.models.tokenizer import fit, train_tokenizer

    texts = [json.loads(line)["text"] for line in (data_folder / "corpus.jsonl").read_text().splitlines()]
    tokenizer = train_tokenizer(texts, 320, templates.template("chatml").special_tokens)
    fit(tokenizer, "chatml", conversational=True)
    return tokenizer


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """A folder with a random Llama of 32 hidden units and its tokenizer."""
    import torch

    from alignment.models.load import init_policy

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiny-policy")
    init_policy(TINY, tiny_tokenizer, attention="sdpa").save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def run_recipe(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A function that runs stages of a recipe (a mapping) in this process and returns the run's folder.

    `expect` is the exit code of the last stage; the recipe's stages run in order up to `until`.
    """
    from alignment.pipeline import plan as planning
    from alignment.recipe.load import load_recipe
    from alignment.training.smoke import in_process

    def run(recipe: dict[str, Any], runs: Path | None = None, *, until: str | None = None, expect: int = 0) -> Path:
        runs = runs or tmp_path_factory.mktemp("runs")
        path = runs / f"{recipe['name']}.yaml"
        path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
        loaded = load_recipe(path)
        code = 0
        for name in loaded.stages:
            plan = planning.prepare(loaded, name, runs=runs, run=loaded.name, recipe_path=path)
            assert plan.status in ("fresh", "resume", "done"), (name, plan.status, plan.difference)
            if plan.status != "done":
                planning.write_stage(plan.spec)
                code = in_process(plan.spec)
            if code or name == until:
                break
        assert code == expect
        return runs / loaded.name

    return run


@pytest.fixture(scope="session")
def tiny_stages(data_folder: Path) -> dict[str, Any]:
    """Stages of a chain on made-up rows; 6 steps each, a checkpoint every 2, everything logged."""
    train = {
        "max_length": 96, "max_steps": 6, "logging_steps": 1, "learning_rate": 1e-3, "gradient_checkpointing": False
    }  # fmt: skip

    def stage(algorithm: str, rows: str, model: Any = "stage:sft", **train_keys: Any) -> dict[str, Any]:
        return {
            "algorithm": algorithm,
            "model": model,
            "data": {"train": [{"path": str(data_folder / f"{rows}.jsonl")}]},
            "batch": {"global": 8, "per_device": 4},
            "train": train | train_keys,
        }

    init = {"init": {"config": TINY, "tokenizer": {"train": {"vocab_size": 320}}}}
    return {
        "base": stage("pretrain", "corpus", init),
        "sft": stage("sft", "sft", "stage:base"),
        "reward": stage("reward", "preferences"),
        "dpo": stage("dpo", "preferences"),
        "kto": stage("kto", "unpaired"),
        "ppo": {
            "algorithm": "ppo",
            "model": "stage:sft",
            "data": {"train": [{"path": str(data_folder / "prompts.jsonl")}]},
            "batch": {"global": 8, "per_device": 4},
            "rewards": [{"name": "letters", "regex": "[a-m]"}],
            "train": {"max_steps": 4, "learning_rate": 1e-3, "response_length": 8, "num_ppo_epochs": 2},
        },
    }


@pytest.fixture(scope="session")
def tiny_recipe(tiny_stages: dict[str, Any]) -> Callable[..., dict[str, Any]]:
    """A function that makes a recipe of some of `tiny_stages`, changed by keyword: `dpo={"peft": {...}}`."""

    def make(*names: str, **changes: dict[str, Any]) -> dict[str, Any]:
        stages = {}
        for name in names:
            stage = dict(tiny_stages[name])
            for key, value in changes.get(name, {}).items():
                stage[key] = {**stage[key], **value} if isinstance(value, dict) and key in stage else value
            stages[name] = stage
        return {
            "name": "tiny", "seed": 7, "chat_template": "chatml", "precision": {"compute": "float32"},
            "checkpoints": {"every": 2, "keep": 2}, "stages": stages,
        }  # fmt: skip

    return make


@pytest.fixture(scope="session")
def tiny_run(run_recipe: Callable[..., Path], tiny_recipe: Callable[..., dict[str, Any]]) -> Path:
    """The folder of a finished chain: base and sft."""
    return run_recipe(tiny_recipe("base", "sft"))
