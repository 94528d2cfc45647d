"""What PPO needs before its first step: policy and critic as one module, prompts as tokens, the Trainer's arguments."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from datasets import Dataset
from peft import get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.models.utils import prepare_deepspeed

from alignment.data import templates
from alignment.errors import RecipeError
from alignment.evaluation.judges import Judge, judge_replies
from alignment.models.generation import vocabulary_size
from alignment.training.actor_critic import ActorCritic, SharedTrunk
from alignment.training.ppo_config import PPOConfig
from alignment.training.rewards import RewardSource
from alignment.training.shared_base import SharedBase

CONTROLLERS = "ppo.json"  # in a checkpoint: what is neither a weight nor the Trainer's


def assemble(
    model: PreTrainedModel | ActorCritic,
    value_model: PreTrainedModel | None,
    tokenizer: PreTrainedTokenizerBase,
    args: PPOConfig,
    peft_config: Any = None,
) -> ActorCritic:
    """Policy and critic as one module: given so, or two models, or a head on the policy, or adapters on one base."""
    if isinstance(model, ActorCritic):
        return model
    size = vocabulary_size(tokenizer)
    if value_model is not None and (peft_config is not None or args.critic == "shared"):
        raise RecipeError("value_model: is not used with critic: shared or with adapters; leave it out")
    if peft_config is not None:
        return SharedBase(get_peft_model(model, peft_config), reference=None, vocabulary=size)
    if args.critic == "shared":
        return SharedTrunk(model, vocabulary=size)
    if value_model is None:
        raise RecipeError("value_model: critic: separate needs one; pass a scorer, or set critic: shared")
    return ActorCritic(model, value_model, vocabulary=size)


def reward_sources(rewards: Any) -> list[RewardSource]:
    """Rewards as sources: a function with TRL's reward signature becomes one, with weight 1 and its own name.

    Raises:
        RecipeError: there is none, or two have one name.
    """
    given = rewards if isinstance(rewards, list | tuple) else [rewards]
    sources = [reward if isinstance(reward, RewardSource) else function_source(reward) for reward in given]
    names = [source.name for source in sources]
    if not names or len(set(names)) < len(names):
        raise RecipeError(f"rewards: at least one, each with a name of its own, found {', '.join(names) or 'none'}")
    return sources


def function_source(function: Callable[..., Any]) -> RewardSource:
    """A Python function as a reward."""
    judge = Judge(function.__name__, function, function.__name__)
    return RewardSource(judge.name, 1.0, partial(judge_replies, judge))


def require_reference(module: ActorCritic, reference: PreTrainedModel | None) -> None:
    if reference is None and not module.has_reference:
        raise RecipeError("ref_model: a fully trained policy needs its reference passed: a second copy of its start")
    if reference is module.policy:
        raise RecipeError("ref_model: is the policy itself, and would be trained; pass a second copy of its start")


def frozen(model: PreTrainedModel | None, accelerator: Accelerator) -> Any:
    """A model that only judges: on the device, sharded under ZeRO-3 like the trained ones."""
    if model is None:
        return None
    model.requires_grad_(False).eval()
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3:
        return prepare_deepspeed(model, accelerator)
    return model.to(accelerator.device)


def stop_tokens(tokenizer: PreTrainedTokenizerBase, args: PPOConfig) -> list[int]:
    if args.stop_token_id is not None:
        return [args.stop_token_id]
    if tokenizer.chat_template is not None:
        return templates.stop_ids(tokenizer)
    if tokenizer.eos_token_id is None:
        raise RecipeError("train.stop_token_id: the tokenizer has no end token; say which id ends a reply")
    return [tokenizer.eos_token_id]


def one_step_per_update(args: PPOConfig, local_rows: int) -> PPOConfig:
    """A copy for the Trainer, in which one batch is one update."""
    own = copy.copy(args)
    own.per_device_train_batch_size, own.gradient_accumulation_steps = local_rows, 1
    own.remove_unused_columns = False  # rewards read the other columns
    if args.total_episodes is not None:
        own.max_steps = math.ceil(args.total_episodes / (local_rows * args.world_size))
    return own


def collate(rows: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows as they are: rewards read their columns."""
    return {"rows": rows}


def with_prompt_ids(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Prompts with their tokens; conversations through the chat template."""
    if "prompt_ids" in rows.column_names:
        return rows

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt = row["prompt"]
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else templates.encode_prompt(tokenizer, prompt)
        return {"prompt_ids": ids}

    return rows.map(encode, keep_in_memory=True)


class SaveControllers(TrainerCallback):
    """Adds `ppo.json` to each checkpoint, before it is sealed."""

    def __init__(self, trainer: Any):
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Upstream has written the rest."""
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            (folder / CONTROLLERS).write_text(json.dumps(self.trainer.controllers()), encoding="utf-8")
