"""`alignment run RECIPE --smoke`: two steps of every stage with stand-ins, before anything is downloaded or queued.

Every model becomes a tiny random one built on the spot, every source a few made-up rows of the same schema, every
reward function the length of the reply. What stays is what breaks on clusters at night: the recipe's keys, the chain of
stages, PEFT and quantization settings, templates, saving and reading back. What had to be changed is said.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from alignment.data import templates
from alignment.errors import ChainError, ExitCode
from alignment.models.load import init_policy, load_scorer
from alignment.models.tokenizer import fit, train_tokenizer
from alignment.pipeline import launch as launching
from alignment.pipeline import plan as planning
from alignment.pipeline import runs as files
from alignment.recipe.algorithms import ALGORITHMS, Algorithm, Schema
from alignment.recipe.schema import DataLimits, Recipe, ReportLimits, linked
from alignment.recipe.upstream import fields

STEPS = 2
STAND_IN = "stand-in"
ROWS = 12
LENGTH = 96
REPLY = 8
CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
SCHEDULE = ("num_train_epochs", "total_episodes", "num_mini_batches", "warmup_steps", "torch_compile", "packing",
            "padding_free", "use_liger_kernel", "generation_batch_size", "steps_per_generation",
            "num_generations_eval")  # fmt: skip
# The keys of `train:` that bound lengths, and how many replies a prompt gets: those that the algorithm has are set.
LENGTHS = {"max_length": LENGTH, "prompt_length": LENGTH, "response_length": REPLY, "max_completion_length": REPLY,
           "num_generations": 2}  # fmt: skip
# A dozen made-up rows that say much the same pass every limit.
NO_LIMITS = {name: None for name in ReportLimits.model_fields if name not in DataLimits.model_fields}


def length_reward(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A stand-in judge: characters of the reply."""
    return [float(len(str(completion))) for completion in completions]


def smoke(recipe: Recipe, *, runs: Path, run: str, launch: bool = False, say: Callable[[str], None] = print) -> int:
    """Run two steps of each stage of `recipe` with stand-ins, in this process or through the launcher.

    Returns:
        The exit code of the first stage that fails, or 0.
    """
    folder = runs.absolute() / f"{run}-smoke"
    if (folder / STAND_IN).is_dir():
        shutil.rmtree(folder)  # an earlier smoke
    elif folder.exists():
        raise ChainError(f"{folder}: not left by --smoke; rename it, or choose another --run NAME")
    small = stand_in(recipe, folder / STAND_IN, launch=launch, say=say)
    for number, name in enumerate(small.stages, start=1):
        say(f"[{number}/{len(small.stages)}] {name} ({small.stages[name].algorithm}), smoke")
        plan = planning.prepare(small, name, runs=runs.absolute(), run=folder.name, recipe_path=folder / files.RECIPE)
        path = planning.write_stage(plan.spec)
        code = launching.run_stage(plan.spec, path, say=say) if launch else in_process(plan.spec)
        if code != ExitCode.DONE:
            return int(code)
    say(f"smoke passed: {len(small.stages)} stages, {STEPS} steps each, in {folder}")
    return int(ExitCode.DONE)


def in_process(spec: planning.StageSpec) -> int:
    """One stage in this very process; Accelerate keeps the first stage's precision unless it is told to forget."""
    from accelerate.state import AcceleratorState, GradientState

    from alignment.training.quiet import quiet
    from alignment.training.worker import run_stage

    quiet()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return run_stage(spec)


def stand_in(recipe: Recipe, folder: Path, *, launch: bool, say: Callable[[str], None] = print) -> Recipe:
    """The recipe with every model, source and reward function replaced; what is built goes to `folder`."""
    content = recipe.model_dump(by_alias=True, exclude_unset=True)
    content["checkpoints"] = {"every": 1, "keep": 1}
    content.pop("report_to", None)
    if content.get("model"):
        content["model"] = _small_model(content["model"], folder, say)
    if not launch:
        content.pop("launch", None)
    for section in (content, *content["stages"].values()):
        if launch and section.get("launch"):
            section["launch"] = _on_this_host(section["launch"])
    for name, stage in content["stages"].items():
        _shrink(name, stage, folder, recipe.chat_template, launch, say)
    return Recipe.model_validate(content)


def _on_this_host(launch: dict[str, Any]) -> dict[str, Any]:
    """A section `launch:` with at most two processes, on one node."""
    kept = {key: value for key, value in launch.items() if key not in ("nodes", "slurm")}
    return kept | ({"processes": min(2, kept["processes"])} if "processes" in kept else {})


def _shrink(
    name: str, stage: dict[str, Any], folder: Path, template: str | None, launch: bool, say: Callable[[str], None]
) -> None:
    """Replace in place what one stage names."""
    row = ALGORITHMS[stage["algorithm"]]
    for key in ("checkpoints", "report_to", *(() if launch else ("launch",))):
        stage.pop(key, None)
    if stage.get("model"):
        stage["model"] = _small_model(stage["model"], folder, say)
    for key, made in (("models", _model_folder), ("scorers", _scorer_folder)):
        if key in stage:
            stage[key] = [link if linked(link) else made(folder) for link in stage[key]]
    if row.schema is not None:
        source = [{"path": str(_rows(folder, row.schema))}]
        data = stage["data"]
        stage["data"] = {key: data[key] for key in ("eval_fraction",) if key in data} | {
            "train": source, "limits": NO_LIMITS,
        }  # fmt: skip
        if data.get("eval"):
            stage["data"]["eval"] = source
        stage["batch"] = {"global": 4, "per_device": 2}
        stage["train"] = _short(name, dict(stage.get("train") or {}), row=row, say=say)
    if "prompts" in stage:
        stage["prompts"] = [{"path": str(_rows(folder, "prompts"))}]
    if "pairs" in stage:
        stage["pairs"] = [{"path": str(_rows(folder, "preference"))}]
    if "rewards" in stage:
        stage["rewards"] = [_small_reward(reward, folder) for reward in stage["rewards"]]
    if "sampling" in stage:
        stage["sampling"] = stage["sampling"] | {"max_new_tokens": REPLY}


def _short(name: str, train: dict[str, Any], *, row: Algorithm, say: Callable[[str], None]) -> dict[str, Any]:
    """`train:` cut down to two steps."""
    for key in SCHEDULE:
        train.pop(key, None)
    optimizer = str(train.get("optim", ""))
    if any(word in optimizer for word in ("8bit", "4bit", "paged", "fused")) and not torch.cuda.is_available():
        say(f"  {name}: train.optim {optimizer} needs a GPU; adamw_torch stands in")
        train["optim"] = "adamw_torch"
    assert row.config is not None
    known = fields(row.config)
    train |= {"max_steps": STEPS, "logging_steps": 1} | {key: LENGTHS[key] for key in LENGTHS if key in known}
    if train.get("eval_strategy") == "steps":
        train["eval_steps"] = 1
    if train.get("eval_strategy") == "epoch":
        train |= {"eval_strategy": "steps", "eval_steps": 1}
    return train


def _small_model(model: Any, folder: Path, say: Callable[[str], None]) -> Any:
    """A tiny model of the same kind: a link stays, random weights stay random, anything else is built."""
    if isinstance(model, str):
        return model if model.startswith("stage:") else _model_folder(folder)
    small = {key: value for key, value in model.items() if key != "revision"}
    if str(small.get("attention", "")).startswith("flash"):
        say(f"  attention {small.pop('attention')}: sdpa stands in")
    if small.get("quantization") and importlib.util.find_spec("bitsandbytes") is None:
        say("  quantization needs bitsandbytes (pip install 'alignment-toolkit[quant]'): left out")
        small.pop("quantization")
    if small.get("path"):
        small["path"] = _model_folder(folder)
    if small.get("init"):
        small["init"] = {"config": CONFIG, "tokenizer": {"train": {"vocab_size": 512}}}
    return small


def _small_reward(reward: dict[str, Any], folder: Path) -> dict[str, Any]:
    """A stand-in for a function or a foreign reward model; a link, a pattern and a length stay."""
    if reward.get("function"):
        return reward | {"function": "alignment.training.smoke:length_reward"}
    if reward.get("model") and not linked(reward["model"]):
        return reward | {"model": _scorer_folder(folder)}
    return reward


def _scorer_folder(folder: Path) -> str:
    """A folder with a reward model made of `_model_folder`'s, made once; its stored mean and deviation are made up."""
    target = folder / "scorer"
    if not target.exists():
        model, tokenizer = load_scorer(_model_folder(folder), fresh_head=True)
        torch.manual_seed(0)
        torch.nn.init.normal_(model.score.weight)  # a head of zeros scores everything alike
        model.config.update({"score_mean": 0.0, "score_std": 1.0})
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)
    return str(target)


def _model_folder(folder: Path) -> str:
    """A folder with a tiny random model and a ChatML tokenizer, made once."""
    target = folder / "model"
    if not target.exists():
        texts = [json.loads(line)["text"] for line in _rows(folder, "text").read_text().splitlines()]
        tokenizer = train_tokenizer(texts, 512, templates.template("chatml").special_tokens)
        fit(tokenizer, "chatml", conversational=True)
        torch.manual_seed(0)
        init_policy(CONFIG, tokenizer, attention="sdpa").save_pretrained(target)
        tokenizer.save_pretrained(target)
    return str(target)


def _rows(folder: Path, schema: Schema) -> Path:
    """A file with a few made-up rows of a schema, made once."""
    path = folder / f"{schema}.jsonl"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(_row(schema, index)) + "\n" for index in range(ROWS)), encoding="utf-8")
    return path


def _row(schema: Schema, index: int) -> dict[str, Any]:
    question = [{"role": "user", "content": f"What comes after number {index}?"}]
    good = [{"role": "assistant", "content": f"After {index} comes {index + 1}."}]
    bad = [{"role": "assistant", "content": f"I will not say what follows {index}, ask again."}]
    rows: dict[str, dict[str, Any]] = {
        "text": {"text": f"After {index} comes {index + 1}. " * 4},
        "messages": {"messages": question + good},
        "preference": {"prompt": question, "chosen": good, "rejected": bad},
        "unpaired": {"prompt": question, "completion": good if index % 2 else bad, "label": bool(index % 2)},
        "prompts": {"prompt": question},
    }
    return rows[schema]
