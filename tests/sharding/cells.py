"""The combinations of the sharding matrix, and the recipe of each."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
ALGORITHMS = ("sft", "reward", "dpo", "kto", "ppo")
TUNINGS = ("full", "lora", "qlora")
SHARDINGS = ("none", "zero1", "zero2", "zero3", "zero3_offload")
ACTIONS = ("train", "save", "resume", "other_ranks")
STEPS, MIDDLE, ROWS, HIDDEN = 10, 5, 8, 64
ROWS_OF = {"sft": "sft", "reward": "preferences", "dpo": "preferences", "kto": "unpaired", "ppo": "prompts"}
WORDS = "cat dog sun moon red blue big small run jump eat sleep king queen tree river".split()


@dataclass(frozen=True)
class Cell:
    """One combination.

    Attributes:
        added: the template's tokens are new to the tokenizer, so the embedding grows.
        compute, weights: `precision` of the recipe.
    """

    algorithm: str
    tuning: str
    sharding: str
    added: bool = False
    compute: str = "float32"
    weights: str = "float32"

    @property
    def name(self) -> str:
        more = [word for word, there in (("added", self.added), ("bf16", self.compute != "float32"),
                                         ("bf16weights", self.weights != "float32")) if there]  # fmt: skip
        return "-".join((self.algorithm, self.tuning, self.sharding, *more))

    @property
    def adapter(self) -> bool:
        return self.tuning != "full"


def all_cells() -> list[Cell]:
    """Every combination of the table."""
    return [Cell(a, t, s) for a in ALGORITHMS for t in TUNINGS for s in SHARDINGS]


def more_cells() -> list[Cell]:
    """Beside the table: embeddings that grow, and bfloat16 as it is used on GPUs."""
    half = {"compute": "bfloat16", "weights": "bfloat16"}
    grown = [Cell("sft", tuning, sharding, added=True) for tuning in TUNINGS[:2] for sharding in ("zero2", "zero3")]
    plain = [Cell(a, t, s) for a in ALGORITHMS for t in TUNINGS for s in ("zero2", "zero3")]
    return [*grown, *(replace(cell, **half) for cell in (*plain, *grown))]


def recipe(cell: Cell, folder: Path, *, processes: int, per_device: int) -> dict[str, Any]:
    """The recipe of a cell on the models and rows that `world` made in `folder`."""
    ppo = cell.algorithm == "ppo"
    model: Any = {"path": str(folder / ("plain" if cell.added else "policy"))}
    if cell.tuning == "qlora":
        model["quantization"] = {"bits": 4}
    train: dict[str, Any] = {"max_steps": STEPS, "learning_rate": 1e-3, "gradient_checkpointing": True}
    if ppo:
        train |= {"response_length": 12, "num_ppo_epochs": 2, "num_mini_batches": 1}
    else:
        train |= {"max_length": 96, "logging_steps": 1}
    stage: dict[str, Any] = {
        "algorithm": cell.algorithm, "model": model, "train": train,
        "data": {
            "train": [{"path": str(folder / f"{ROWS_OF[cell.algorithm]}.jsonl")}],
            "limits": {"duplicate": None, "separable": None},  # few and made up
        },
        "batch": {"global": ROWS, "per_device": per_device},
    }  # fmt: skip
    if cell.adapter:
        stage["peft"] = {"r": 4, "lora_dropout": 0.0, "target_modules": "all-linear"}
        if cell.added:
            stage["peft"]["modules_to_save"] = ["embed_tokens"]
    if ppo:
        stage["rewards"] = [
            {"name": "letters", "regex": "[a-m]"},
            {"name": "judge", "model": str(folder / "scorer"), "normalize": "none"},
        ]
    launch: dict[str, Any] = {"processes": processes}
    if cell.sharding != "none":
        launch["deepspeed"] = str(_deepspeed_file(cell.sharding, folder))
    return {
        "name": f"{cell.name}-{processes}x{per_device}", "seed": 7, "chat_template": "chatml", "launch": launch,
        "precision": {"compute": cell.compute, "weights": cell.weights},
        "checkpoints": {"every": MIDDLE, "keep": 2}, "stages": {"cell": stage},
    }  # fmt: skip


def _deepspeed_file(sharding: str, folder: Path) -> Path:
    """Our file, with the size up to which ZeRO-3 keeps a tensor whole written out.

    Of `auto` the Trainer makes this very number for the trained model (10 x hidden size); for a reference, whose engine
    is made earlier, DeepSpeed takes its default of 100,000 and would cut nothing of a tiny model.
    """
    content = json.loads((ROOT / "ds_configs" / f"{sharding}.json").read_text(encoding="utf-8"))
    if content["zero_optimization"]["stage"] == 3:
        content["zero_optimization"]["stage3_param_persistence_threshold"] = 10 * HIDDEN
    path = folder / f"{sharding}.json"
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def rows(schema: str, count: int = 96) -> list[dict[str, Any]]:
    """Rows whose lengths differ sixfold, so that every batch of several ranks is mostly padding on one of them."""
    found = []
    for index in range(count):
        first, second = WORDS[index % len(WORDS)], WORDS[(index * 7 + 3) % len(WORDS)]
        question = [{"role": "user", "content": f"Tell me about the {first} {index}."}]
        answer = " ".join([f"The {first} likes the {second} {index}."] * (1 + 5 * (index % 3 == 0)))[:150]
        good = [{"role": "assistant", "content": answer}]
        bad = [{"role": "assistant", "content": f"No idea about {index} {second}, ask again."}]
        row: dict[str, dict[str, Any]] = {
            "sft": {"messages": question + good},
            "preferences": {"prompt": question, "chosen": good, "rejected": bad},
            "unpaired": {"prompt": question, "completion": good if index % 2 else bad, "label": bool(index % 2)},
            "prompts": {"prompt": question},
        }
        found.append(row[schema])
    return found


def world(folder: Path) -> None:
    """Rows, a random policy with its tokenizer, the same without the template's tokens, and a reward model."""
    import torch

    from alignment.data import templates
    from alignment.models.load import init_policy, load_scorer
    from alignment.models.tokenizer import fit, train_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for schema in sorted(set(ROWS_OF.values())):
        text = "".join(json.dumps(row) + "\n" for row in rows(schema))
        (folder / f"{schema}.jsonl").write_text(text, encoding="utf-8")
    texts = [turn["content"] for row in rows("sft") for turn in row["messages"]]
    config = {
        "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
        "tie_word_embeddings": True,
    }  # fmt: skip
    for name, special in (("policy", templates.template("chatml").special_tokens), ("plain", ("<eos>",))):
        tokenizer = train_tokenizer(texts, 320, special)
        if name == "policy":
            fit(tokenizer, "chatml", conversational=True)
        torch.manual_seed(0)
        init_policy(config, tokenizer, attention="sdpa").save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    model, tokenizer = load_scorer(folder / "policy", fresh_head=True)
    torch.manual_seed(1)
    torch.nn.init.normal_(model.score.weight)
    model.save_pretrained(folder / "scorer")
    tokenizer.save_pretrained(folder / "scorer")
