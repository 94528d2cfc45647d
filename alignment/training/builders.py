"""From a prepared stage to its trainer: one function per trainer class of the table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import PreTrainedModel, Trainer, set_seed
from trl import pack_dataset

from alignment.errors import RecipeError
from alignment.models.adapters import merge
from alignment.models.generation import vocabulary_size
from alignment.models.load import (
    DTYPES,
    adapter_base,
    init_policy,
    is_adapter,
    load_policy,
    load_scorer,
    resize_embeddings,
)
from alignment.training import trainers
from alignment.training.context import Context
from alignment.training.publish import weights_of
from alignment.training.rewards import RewardSource, load_rewards
from alignment.training.shared_base import SharedBase, SharedScorer


def pretrain(ctx: Context) -> Trainer:
    """Causal LM on blocks of text."""
    return _sft_trainer(ctx)


def sft(ctx: Context) -> Trainer:
    """Causal LM on conversations; labels are -100 outside the assistant's turns."""
    return _sft_trainer(ctx)


def reward(ctx: Context) -> Trainer:
    """Scorer on pairs: each answer is scored with its prompt."""
    assert ctx.start is not None
    set_seed(ctx.args.seed)
    model, _ = load_scorer(ctx.start, fresh_head=True, **_loading(ctx))
    resize_embeddings(model, ctx.tokenizer)
    return trainers.Reward(model=model, peft_config=ctx.peft, **_common(ctx, _with_prompts))


def dpo(ctx: Context) -> Trainer:
    """Policy and reference on pairs."""
    policy, reference = _policy_and_reference(ctx)
    return trainers.DPO(model=policy, ref_model=reference, peft_config=ctx.peft, **_common(ctx))


def kto(ctx: Context) -> Trainer:
    """Policy and reference on single answers with a label."""
    if ctx.args.per_device_train_batch_size < 2:
        raise RecipeError("batch.per_device: kto pairs the rows of a forward pass with each other; give at least 2")
    policy, reference = _policy_and_reference(ctx)
    size, seed = ctx.args.per_device_train_batch_size, ctx.args.seed

    def rotate(rows: Dataset) -> Dataset:
        # TRL reads KTO's rows in order, so that the neighbours stay together: shuffle before they are paired.
        return _with_mismatched(rows.shuffle(seed=seed), size)

    return trainers.KTO(model=policy, ref_model=reference, peft_config=ctx.peft, **_common(ctx, rotate))


def ppo(ctx: Context) -> Trainer:
    """Policy, critic and reference on prompts, with the stage's rewards."""
    from alignment.training.ppo import PPOTrainer  # heavy, and only this row needs it

    policy, reference = _policy_and_reference(ctx)
    stage, args = ctx.spec.config, ctx.args
    model, critic = policy, None
    if reference is not None:
        sources = _rewards(ctx, batch_size=args.local_rollout_forward_batch_size)
        critic = _critic(ctx) if args.critic == "separate" else None
    elif "critic_init" in stage.train:
        raise RecipeError("train.critic_init: the critic of adapters starts as the reference; remove the key")
    else:
        model = _on_one_base(ctx, policy)
        sources = _rewards(ctx, batch_size=args.local_rollout_forward_batch_size, share=_on(ctx, model))
    return PPOTrainer(
        model=model, ref_model=reference, value_model=critic, reward_funcs=sources,
        **_common(ctx),
    )  # fmt: skip


def rloo(ctx: Context) -> Trainer:
    """Policy and reference on prompts, several replies to each, with the stage's rewards."""
    return _online(ctx, trainers.RLOO)


def grpo(ctx: Context) -> Trainer:
    """Policy and reference on prompts, several replies to each, with the stage's rewards."""
    return _online(ctx, trainers.GRPO)


def _online(ctx: Context, trainer: Callable[..., Trainer]) -> Trainer:
    """One of TRL's trainers that draw their own replies; without a price on the KL there is no reference."""
    policy, reference = _policy_and_reference(ctx) if ctx.args.beta else (_policy(ctx), None)
    sources = _rewards(ctx, batch_size=ctx.args.per_device_train_batch_size)
    return trainer(
        model=policy, ref_model=reference, reward_funcs=sources, peft_config=ctx.peft, **_common(ctx)
    )  # fmt: skip


def _on(ctx: Context, module: SharedBase) -> Callable[[Path], SharedScorer | None]:
    """Scorers that need the policy's base and nothing more: adapters on the same weights, by content."""
    assert ctx.start is not None
    base = adapter_base(ctx.start) if is_adapter(ctx.start) else ctx.start
    weights = weights_of(Path(base))

    def share(path: Path) -> SharedScorer | None:
        if weights is None or not is_adapter(path) or weights_of(Path(adapter_base(path))) != weights:
            return None
        ctx.say(f"  {path}: an adapter on the policy's base, which it shares")
        return SharedScorer(module, path, f"reward-{path.name}")

    return share


def _rewards(
    ctx: Context, *, batch_size: int, share: Callable[[Path], SharedScorer | None] = lambda path: None
) -> list[RewardSource]:
    """The stage's rewards, ready to score; a reward model reads `batch_size` conversations at once."""
    stage = ctx.spec.config
    return load_rewards(
        stage.rewards, path_of=ctx.path_of, dtype=DTYPES[stage.precision.weights], device=ctx.args.device,
        batch_size=batch_size, template=stage.chat_template, share=share,
    )  # fmt: skip


def _critic(ctx: Context) -> PreTrainedModel:
    """A scorer that becomes the critic: the first reward model with the policy's vocabulary, or the policy's start."""
    wanted = ctx.args.critic_init
    for reward in ctx.spec.config.rewards if wanted != "policy" else ():
        if reward.model is None:
            continue
        scorer, tokenizer = load_scorer(ctx.path_of(reward.model), attention=ctx.model.attention)
        if not isinstance(scorer, PreTrainedModel):
            scorer = merge(scorer)
        if tokenizer.get_vocab() == ctx.tokenizer.get_vocab():
            return scorer
    if wanted == "reward":
        raise RecipeError("train.critic_init: reward needs a reward model with the policy's vocabulary in `rewards`")
    assert ctx.start is not None
    set_seed(ctx.args.seed)
    critic, _ = load_scorer(ctx.start, fresh_head=True, attention=ctx.model.attention, revision=ctx.model.revision)
    resize_embeddings(critic, ctx.tokenizer)
    return critic


def _on_one_base(ctx: Context, policy: Any) -> SharedBase:
    """Adapters for policy and critic; the reference is the base, or a frozen copy of the adapter that is trained on."""
    reference = None
    if ctx.peft is not None:
        policy = get_peft_model(policy, ctx.peft)
    else:
        reference = "reference"
        policy.load_adapter(ctx.start, reference, is_trainable=False)
    return SharedBase(policy, reference=reference, vocabulary=vocabulary_size(ctx.tokenizer))


# --- shared -------------------------------------------------------------------------------------------------------


def _sft_trainer(ctx: Context) -> Trainer:
    """TRL's SFTTrainer; `pretrain` and `sft` differ only in their rows."""

    def pack(rows: Dataset) -> Dataset:
        if not ctx.args.packing:
            return rows
        rows = rows.select_columns(["input_ids", "labels"]).shuffle(seed=ctx.args.seed)
        return pack_dataset(rows, ctx.args.max_length, ctx.args.packing_strategy)

    return trainers.SFT(model=_policy(ctx), peft_config=ctx.peft, **_common(ctx, pack))


def _policy(ctx: Context) -> Any:
    """The model to train: random, whole, or a parent's adapter that is trained on."""
    set_seed(ctx.args.seed)
    if ctx.start is None:
        assert ctx.model.init is not None
        return init_policy(ctx.model.init.config, ctx.tokenizer, attention=ctx.model.attention)
    model, _ = load_policy(ctx.start, trainable=True, **_loading(ctx))
    if not is_adapter(ctx.start):
        resize_embeddings(model, ctx.tokenizer)
    return model


def _policy_and_reference(ctx: Context) -> tuple[Any, PreTrainedModel | None]:
    """The policy, and the reference where it is a model of its own.

    Full fine-tuning: the reference is a second copy of the policy's own start, embeddings resized alike. A new
    adapter: the reference is the base with the adapter off. An adapter that is trained on: TRL copies it to a frozen
    adapter `ref`. In all three the first batch's log-probabilities are equal, which the first loss shows.
    """
    assert ctx.start is not None
    policy = _policy(ctx)
    if ctx.peft is not None or is_adapter(ctx.start):
        return policy, None
    set_seed(ctx.args.seed)  # new embedding rows are random: the same ones for both
    options = _loading(ctx) | {"dtype": DTYPES[ctx.spec.config.precision.weights]}
    reference, _ = load_policy(ctx.start, **options)
    resize_embeddings(reference, ctx.tokenizer)
    return policy, reference


def _loading(ctx: Context) -> dict[str, Any]:
    """dtype, attention and quantization of the weights that are loaded.

    Weights that are trained in full are float32 (under ZeRO with bf16 the engine keeps the float32 master); the base
    under an adapter is frozen and may be `precision.weights`.
    """
    model = ctx.model
    frozen = ctx.peft is not None or (ctx.start is not None and is_adapter(ctx.start))
    dtype = DTYPES[ctx.spec.config.precision.weights] if frozen else torch.float32
    return {
        "dtype": dtype, "attention": model.attention, "quantization": model.quantization, "compute": ctx.compute,
        "revision": model.revision,
    }  # fmt: skip


def _common(ctx: Context, change: Any = lambda rows: rows) -> dict[str, Any]:
    """What every trainer is given."""
    train = change(ctx.rows.train)
    if ctx.args.train_sampling_strategy == "group_by_length" and ctx.row.schema != "prompts":
        train = _with_length(train, ctx.args.length_column_name)
    return {
        "args": ctx.args,
        "train_dataset": train,
        "eval_dataset": None if ctx.rows.eval is None else change(ctx.rows.eval),
        "processing_class": ctx.tokenizer,
    }


def _with_length(rows: Dataset, name: str) -> Dataset:
    """The column by which the Trainer groups rows: the tokens of the longest sequence of each row."""
    answers = [key for key in ("input_ids", "chosen_ids", "rejected_ids", "completion_ids") if key in rows.features]

    def lengths(batch: dict[str, list[list[int]]]) -> dict[str, list[int]]:
        prompts = [len(ids) for ids in batch.get("prompt_ids", [[]] * len(batch[answers[0]]))]
        longest = [max(map(len, row)) for row in zip(*(batch[key] for key in answers), strict=True)]
        return {name: [prompt + answer for prompt, answer in zip(prompts, longest, strict=True)]}

    return rows.map(lengths, batched=True, keep_in_memory=True)


def _with_prompts(rows: Dataset) -> Dataset:
    """Pairs as the reward trainer wants them: the prompt in front of both answers."""

    def join(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        return {
            name: [prompt + answer for prompt, answer in zip(batch["prompt_ids"], batch[name], strict=True)]
            for name in ("chosen_ids", "rejected_ids")
        }

    return rows.map(join, batched=True, keep_in_memory=True, remove_columns=["prompt_ids"])


def _with_mismatched(rows: Dataset, size: int) -> Dataset:
    """KTO's KL term: each prompt also meets the answer of its neighbour in the forward pass (rotated by one)."""

    def rotate(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        answers = batch["completion_ids"]
        return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

    return rows.map(rotate, batched=True, batch_size=size, keep_in_memory=True)
