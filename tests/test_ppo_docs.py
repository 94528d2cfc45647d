"""recipes/ppo.md says what the code says: options, checks, keys of the log, the recipe and the script in it."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from transformers import TrainerControl, TrainingArguments

from alignment.evaluation.series import LINES
from alignment.models.load import load_scorer
from alignment.recipe.load import load_recipe, resolve
from alignment.training import ppo_checks
from alignment.training.arguments import accumulation
from alignment.training.callbacks import Log
from alignment.training.ppo_config import PPOConfig
from alignment.training.recorder import SUMMED

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "recipes/ppo.md").read_text(encoding="utf-8")


def part(number: int) -> str:
    """The text of a numbered heading, up to the next."""
    (text,) = re.findall(rf"^## {number}\. .*?(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    return text


def block(text: str, language: str) -> str:
    """The one code block of a language."""
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return code


def table(text: str) -> list[list[str]]:
    """The cells of the rows that begin with code."""
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in text.splitlines() if line[:3] == "| `"]


def codes(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


# --- the page ---------------------------------------------------------------------------------------------------------


def test_the_page_is_linked_and_its_links_lead_somewhere() -> None:
    assert "(ppo.md)" in (ROOT / "recipes/README.md").read_text(encoding="utf-8")
    assert "(recipes/ppo.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", PAGE):
        assert target.startswith("https://") or (ROOT / "recipes" / target).exists(), target


def test_the_recipe_loads_and_its_example_is_counted_right(tmp_path: Path) -> None:
    path = tmp_path / "ppo.yaml"
    path.write_text(block(part(1), "yaml"), encoding="utf-8")
    stage = resolve(load_recipe(path), "ppo")
    assert stage.batch is not None
    processes, mini_batches = 2, 4
    local = accumulation(stage, processes) * stage.batch.per_device
    size = local // mini_batches
    said = {row[0]: row[-1] for row in table_of_batches()}
    assert said == {
        "episodes of one update": f"{stage.batch.global_}",
        "episodes that one process draws": f"{local}",
        "rows drawn and judged at once": f"up to {PPOConfig.local_rollout_forward_batch_size}",
        "episodes of one optimizer step and process": f"{local} / {mini_batches} = {size}",
        "forward and backward passes of it": f"{size} / {stage.batch.per_device} = {size // stage.batch.per_device}",
        "optimizer steps of one update": f"{PPOConfig.num_ppo_epochs} x {mini_batches} = "
        f"{PPOConfig.num_ppo_epochs * mini_batches}",
        "updates with `total_episodes: 12800`": f"{stage.train['total_episodes'] // stage.batch.global_}",
    }


def table_of_batches() -> list[list[str]]:
    (rows,) = re.findall(r"^\| what \| from \|.*?\n\|---.*?\n(.*?)\n\n", part(1), re.MULTILINE | re.DOTALL)
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in rows.splitlines()]


# --- options ----------------------------------------------------------------------------------------------------------


def test_every_option_stands_in_the_table_with_its_default() -> None:
    upstream = {field.name: field.default for field in dataclasses.fields(TrainingArguments)}
    own = {
        field.name: field.default
        for field in dataclasses.fields(PPOConfig)
        if field.name not in upstream or field.default != upstream[field.name]
    }
    rows = table(part(2))
    assert all(len(row) == 4 and all(row) for row in rows), "a name, a default, a meaning and a reason each"
    said = {codes(row[0])[0]: yaml.safe_load(row[1]) for row in rows}
    assert len(said) == len(rows), "an option stands twice"
    assert said == own
    assert {name: type(value) for name, value in said.items()} == {name: type(value) for name, value in own.items()}


def test_the_differences_name_real_defaults() -> None:
    """Numbers that the text repeats."""
    args = PPOConfig(output_dir="unused", use_cpu=True, report_to="none")
    differences = part(7)
    assert f"`max_grad_norm` {args.max_grad_norm}" in differences
    assert f"`adam_epsilon` is {args.adam_epsilon:.0e}".replace("e-0", "e-") in differences
    assert f"`temperature` is {args.temperature} " in differences
    assert f"`response_length` is {args.response_length} " in differences
    assert f"| {args.response_length}, {args.temperature}, {args.logging_steps} |" in differences
    assert not args.gradient_checkpointing
    assert not args.bf16


@pytest.mark.parametrize(
    "name",
    ["num_sample_generations", "stop_token", "sft_model_path", "reward_model_path", "model_adapter_name",
     "ref_adapter_name", "dataset_num_proc", "world_size", "batch_size", "mini_batch_size"],
)  # fmt: skip
def test_fields_that_trl_had_and_we_have_not_are_named(name: str) -> None:
    assert name not in {field.name for field in dataclasses.fields(PPOConfig)}
    assert re.search(rf"`{name}\b", part(7)), name


# --- checks -----------------------------------------------------------------------------------------------------------


def messages(module: Any) -> list[str]:
    """The first words of each message that a module's generators yield, up to what they fill in."""
    found = []
    for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Yield) and isinstance(node.value, ast.JoinedStr | ast.Constant):
            first = node.value.values[0] if isinstance(node.value, ast.JoinedStr) else node.value
            assert isinstance(first, ast.Constant)
            found.append(re.split(r", |; ", str(first.value))[0].strip())
    return found


def test_every_check_stands_in_the_table() -> None:
    found = messages(ppo_checks)
    assert len(found) == 5
    said = [codes(row[0])[0] for row in table(part(3))]
    missing = [words for words in found if not any(words.startswith(label) for label in said)]
    assert not missing
    # The sixth is a message of the rewards'.
    assert "rewards: NAME: its tokenizer loses a part of the reply" in said
    assert len(said) == len(found) + 1


def test_the_tolerances_are_those_of_the_code() -> None:
    text = " ".join(part(3).split())
    assert f"{ppo_checks.EXACT:.0e}".replace("e-0", "e-") + f" nats, under bfloat16 {ppo_checks.ROUNDED}" in text


def test_the_diagnosis_wants_as_many_lines_as_it_says() -> None:
    assert LINES == 10
    assert "It wants ten logged updates" in part(5)


# --- the script, and what it logs -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ran(
    tiny_policy: Path, tiny_tokenizer: Any, data_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """The script of the page after one update of a tiny model: its names, and `folder`."""
    folder = tmp_path_factory.mktemp("script")
    scorer, _ = load_scorer(tiny_policy, fresh_head=True)
    scorer.save_pretrained(folder / "reward")
    tiny_tokenizer.save_pretrained(folder / "reward")
    code = block(part(6), "python")
    for old, new in {
        '"my/sft"': repr(str(tiny_policy)),
        '"my/reward"': repr(str(folder / "reward")),
        '"my/prompts.jsonl"': repr(str(data_folder / "prompts.jsonl")),
        '"my/ppo"': repr(str(folder / "ppo")),
        "gradient_accumulation_steps=16": "gradient_accumulation_steps=2",
        "total_episodes=6400": "total_episodes=8, report_to='none', use_cpu=True, disable_tqdm=True",
        "response_length=128": "response_length=8",
        "bf16=torch.cuda.is_available()": "bf16=False",
    }.items():
        assert old in code, old
        code = code.replace(old, new)
    names: dict[str, Any] = {"folder": folder}
    exec(compile(code, "recipes/ppo.md", "exec"), names)
    return names


def test_the_script_trains_and_saves(ran: dict[str, Any]) -> None:
    assert ran["trainer"].state.global_step == 1
    assert (ran["folder"] / "ppo" / "model.safetensors").is_file()
    assert (ran["folder"] / "ppo" / "critic" / "model.safetensors").is_file()
    assert (ran["folder"] / "ppo" / "tokenizer.json").is_file()


def test_the_comment_on_episodes_is_right() -> None:
    code = block(part(6), "python")
    rows, passes = (
        int(re.findall(rf"{name}=(\d+)", code)[0])
        for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    assert f"x {rows} = {rows * passes} episodes per process and update" in code


def test_every_key_of_the_log_stands_in_the_table(ran: dict[str, Any]) -> None:
    trainer, path = ran["trainer"], ran["folder"] / "log.jsonl"
    (line,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    Log(path, trainer.for_the_log).on_log(trainer.args, trainer.state, TrainerControl(), line)
    entry = json.loads(path.read_text(encoding="utf-8"))
    recorded = {f"time.{key}" for key in entry.pop("time")} | set(entry)
    assert {"time." + name.removeprefix("time/") for name in SUMMED if name != "tokens"} < recorded
    for source in ("polite", "rm"):
        recorded -= {f"rewards/{source}", f"rewards/{source}_std"}
    said = [key for row in table(part(4)) for key in codes(row[0])]
    assert len(said) == len(set(said)), "a key stands twice"
    assert set(said) == recorded | {"rewards/<name>", "rewards/<name>_std"}
    (sample, *_) = entry["samples"]
    (row,) = (row for row in table(part(4)) if row[0] == "`samples`")
    assert set(sample) <= set(codes(row[1]))
