"""The table: one row per algorithm, the one place to add another.

The planner, the checks, the worker, `alignment --help`, `--smoke`, the documentation and the parametrized tests all
read these rows. A row names functions by import string, so that reading the table costs no torch. A variant is a row
made by `replace` (see `ipo`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from alignment.recipe import online

Schema = Literal["text", "messages", "preference", "unpaired", "prompts"]
Kind = Literal["causal-lm", "sequence-classification"]
Train = Mapping[str, Any]
TRAINED = frozenset(
    {"model", "data", "batch", "train", "peft", "precision", "chat_template", "checkpoints", "report_to", "skip_checks"}
)


@dataclass(frozen=True)
class Role:
    """One model that stands in memory while the algorithm runs."""

    name: str
    trained: bool


@dataclass(frozen=True)
class Algorithm:
    """One row of the table.

    Attributes:
        name: what a recipe's `algorithm:` says.
        summary: one line for `--help` and the documentation.
        paper: where the objective comes from.
        schema: the data schema its rows are converted to; None if it trains on nothing.
        config: `package.module:Class` whose fields are the legal keys of `train:`; None if it has no `train:`.
        build: `package.module:function`; takes a `alignment.training.context.Context` and returns a
            `transformers.Trainer`, or a callable without arguments that returns a dict of metrics.
        sections: the sections of a stage that it takes; others are refused.
        starts_from: the kind of model a `model: stage:...` must publish.
        publishes: the kind of model in its output folder; None if there is none.
        roles: the models that stand in memory, trained or frozen.
        defaults: `train` keys to which we give another default than upstream.
        fixed: `train` keys that the row decides; refused in a recipe.
        metric: the logged metric that tells most, for the progress line; (label, key).
        expected_first_loss: the loss before the first update, from the full `train` mapping (upstream defaults
            included), where theory fixes it; None where it does not.
        smallest_batch: the rows per forward pass without which it means nothing.
        batch_dependent: the loss of a row depends on the other rows of its forward pass, so `batch.per_device` is
            part of the fingerprint.
        across_ranks: ... and on the rows of the other processes' passes too, so a resumed run needs as many of them.
        init: may start from random weights (`model: {init: ...}`).
        groups: `train.num_generations` replies are drawn to each prompt, and batches hold whole groups of them.
        needs: checks of the full `train` mapping beyond the type and range of each key: yields (key, what is wrong and
            what to do).
    """

    name: str
    summary: str
    build: str
    schema: Schema | None = None
    config: str | None = None
    paper: str = ""
    sections: frozenset[str] = TRAINED
    starts_from: Kind = "causal-lm"
    publishes: Kind | None = "causal-lm"
    roles: tuple[Role, ...] = (Role("policy", trained=True),)
    defaults: Train = field(default_factory=dict)
    fixed: Train = field(default_factory=dict)
    metric: tuple[str, str] | None = None
    expected_first_loss: Callable[[Train], float | None] = lambda train: None
    smallest_batch: int = 1
    batch_dependent: bool = False
    across_ranks: bool = False
    init: bool = False
    groups: bool = False
    needs: Callable[[Train], Iterator[tuple[str, str]]] = lambda train: iter(())


LN2 = math.log(2)
POLICY_AND_REFERENCE = (Role("policy", trained=True), Role("reference", trained=False))

pretrain = Algorithm(
    name="pretrain",
    summary="causal language model on plain text, from random weights or continued",
    build="alignment.training.builders:pretrain",
    schema="text",
    config="trl.trainer.sft_config:SFTConfig",
    init=True,
    # Documents are joined and cut into full blocks before TRL sees them.
    fixed={"packing": False, "padding_free": False},
    metric=("accuracy", "mean_token_accuracy"),
)

sft = Algorithm(
    name="sft",
    summary="supervised fine-tuning on conversations; the loss is on the assistant's turns",
    build="alignment.training.builders:sft",
    schema="messages",
    config="trl.trainer.sft_config:SFTConfig",
    metric=("accuracy", "mean_token_accuracy"),
)

reward = Algorithm(
    name="reward",
    summary="reward model: a scorer with one output, trained on pairs",
    paper="Bradley-Terry; Ouyang et al. 2022 (arXiv:2203.02155), equation 1",
    build="alignment.training.builders:reward",
    schema="preference",
    config="trl.trainer.reward_config:RewardConfig",
    publishes="sequence-classification",
    metric=("accuracy", "accuracy"),
    # The score head starts at zero, so both scores are zero.
    expected_first_loss=lambda train: LN2,
)


def _ln2(train: Train) -> float:
    return LN2


def _dpo_first_loss(train: Train) -> float | None:
    """ln 2 where the plain row keeps its sigmoid loss; a mixture set by hand has no fixed value."""
    return LN2 if train["loss_type"] == ["sigmoid"] and not train.get("use_weighting") else None


def _above_zero(train: Train) -> Iterator[tuple[str, str]]:
    """Elsewhere 0 switches the reference off; these losses divide by beta, or are constant at 0."""
    if train["beta"] == 0:
        yield "beta", "must be above 0, found 0"


def _dpo_needs(train: Train) -> Iterator[tuple[str, str]]:
    """What DPOTrainer refuses, or takes and does not do (trl/trainer/dpo_trainer.py, `__init__`)."""
    yield from _above_zero(train)
    losses, weights, smoothing = train["loss_type"], train["loss_weights"], train["label_smoothing"]
    if weights is not None and len(weights) != len(losses):
        yield "loss_weights", f"has {len(weights)} weights for {len(losses)} losses; give one for each"
    if "exo_pair" in losses and not smoothing:
        yield "label_smoothing", "must be above 0 (the paper takes 1e-3): the loss contains its logarithm"
    if "robust" in losses and smoothing >= 0.5:
        yield "label_smoothing", "must be below 0.5: it is the probability that a label is flipped"
    refused = [loss for loss in losses if loss not in F_DIVERGENCE_LOSSES]
    if train["f_divergence_type"] != "reverse_kl" and refused:
        yield "f_divergence_type", f"must be reverse_kl with the loss {refused[0]}"
    if train["use_weighting"] and {"aot", "aot_unpaired"} & set(losses):
        yield "use_weighting", "cannot go with aot: that loss sorts the pairs, and the weights would be another pair's"
    if train["sync_ref_model"] and train["precompute_ref_log_probs"]:
        yield "sync_ref_model", "cannot go with precompute_ref_log_probs: the reference changes"
    if train["padding_free"]:
        yield "padding_free", "has no effect in the installed TRL, which pads all the same; remove it"


def _plain_dpo_needs(train: Train) -> Iterator[tuple[str, str]]:
    """As above, and one name for one thing: a single loss is an algorithm of its own."""
    yield from _dpo_needs(train)
    losses = train["loss_type"]
    if len(losses) == 1 and losses != ["sigmoid"] and losses[0] in ALGORITHMS:
        yield "loss_type", f"is the algorithm {losses[0]}; write `algorithm: {losses[0]}` and remove the key"
    elif batchwise := sorted({"aot", "aot_unpaired"} & set(losses)):
        yield "loss_type", f"{batchwise[0]} cannot be mixed: its loss depends on the other rows of the batch"


# The losses of DPOTrainer that are built on the difference of rewards.
F_DIVERGENCE_LOSSES = ("sigmoid", "sigmoid_norm", "hinge", "ipo", "exo_pair", "robust", "discopop", "sft")

dpo = Algorithm(
    name="dpo",
    summary="direct preference optimization, sigmoid loss",
    paper="Rafailov et al. 2023 (arXiv:2305.18290), equation 7",
    build="alignment.training.builders:dpo",
    schema="preference",
    config="trl.trainer.dpo_config:DPOConfig",
    roles=POLICY_AND_REFERENCE,
    metric=("accuracy", "rewards/accuracies"),
    expected_first_loss=_dpo_first_loss,
    needs=_plain_dpo_needs,
)


def _variant(name: str, summary: str, paper: str, loss: Callable[[Train], float], **changes: Any) -> Algorithm:
    """A row of the DPO family: TRL's DPOTrainer with one `loss_type`."""

    def first_loss(train: Train) -> float | None:
        return None if train.get("use_weighting") else loss(train)

    settings: dict[str, Any] = {
        "fixed": {"loss_type": [name]},
        "needs": _dpo_needs,
        "expected_first_loss": first_loss,
    } | changes
    return replace(dpo, name=name, summary=summary, paper=paper, **settings)


def _exo_first_loss(train: Train) -> float:
    epsilon = train["label_smoothing"]
    return 0.5 * (-LN2 - math.log1p(-epsilon)) + 0.5 * (-LN2 - math.log(epsilon))


ipo = _variant(
    "ipo", "identity preference optimization: a squared loss that does not saturate",
    "Azar et al. 2023 (arXiv:2310.12036), equation 17", lambda train: 1 / (4 * train["beta"] ** 2),
)  # fmt: skip
hinge = _variant(
    "hinge", "hinge loss on the log-ratio margin", "Zhao et al. 2023 (arXiv:2305.10425), SLiC", lambda train: 1.0
)
robust = _variant(
    "robust", "unbiased under label flips with probability label_smoothing",
    "Chowdhury et al. 2024 (arXiv:2403.00409), equation 12", _ln2,
)  # fmt: skip
exo_pair = _variant(
    "exo_pair", "reverse KL to the smoothed preference", "Ji et al. 2024 (arXiv:2402.00856), equation 16",
    _exo_first_loss, defaults={"label_smoothing": 1e-3},
)  # fmt: skip
nca_pair = _variant(
    "nca_pair", "noise contrastive alignment: absolute likelihoods, not only margins",
    "Chen et al. 2024 (arXiv:2402.05369)", lambda train: 2 * LN2,
)  # fmt: skip
bco_pair = _variant(
    "bco_pair", "binary classifier optimization on pairs", "Jung et al. 2024 (arXiv:2404.04656)",
    lambda train: 2 * LN2,
)  # fmt: skip
sppo_hard = _variant(
    "sppo_hard", "self-play preference optimization with hard labels", "Wu et al. 2024 (arXiv:2405.00675), eq. 4.7",
    lambda train: 1 / (2 * train["beta"] ** 2),
)  # fmt: skip
aot = _variant(
    "aot", "alignment via optimal transport on paired margins", "Melnyk et al. 2024 (arXiv:2406.05882)", _ln2,
    batch_dependent=True,
)  # fmt: skip
aot_unpaired = _variant(
    "aot_unpaired", "alignment via optimal transport, chosen against rejected distributions",
    "Melnyk et al. 2024 (arXiv:2406.05882)", _ln2, batch_dependent=True,
)  # fmt: skip
apo_zero = _variant(
    "apo_zero", "anchored: chosen up, rejected down; for answers better than the model's own",
    "D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 7", lambda train: 1.0,
)  # fmt: skip
apo_down = _variant(
    "apo_down", "anchored: both down, rejected more; for answers worse than the model's own",
    "D'Oosterlinck et al. 2024 (arXiv:2408.06266), equation 8", lambda train: 1.0,
)  # fmt: skip
discopop = _variant(
    "discopop", "log-ratio modulated loss, found by search", "Lu et al. 2024 (arXiv:2406.08414), equation 5",
    lambda train: 0.5 * LN2 + 0.5,
)  # fmt: skip
sigmoid_norm = _variant(
    "sigmoid_norm", "sigmoid loss on log-ratios averaged per token", "Lambert et al. 2024 (arXiv:2411.15124), Tulu 3",
    _ln2,
)  # fmt: skip


def _kto_needs(train: Train) -> Iterator[tuple[str, str]]:
    """KTOTrainer pairs each row with its neighbour to estimate the KL term (trl/trainer/kto_trainer.py)."""
    yield from _above_zero(train)
    if train["loss_type"] == "kto" and train["train_sampling_strategy"] != "sequential":
        yield "train_sampling_strategy", "must be sequential: the KL term pairs each row with its neighbour"


kto = Algorithm(
    name="kto",
    summary="Kahneman-Tversky optimization on single answers labelled good or bad",
    paper="Ethayarajh et al. 2024 (arXiv:2402.01306), equation 8",
    build="alignment.training.builders:kto",
    schema="unpaired",
    config="trl.trainer.kto_config:KTOConfig",
    roles=POLICY_AND_REFERENCE,
    metric=("margin", "rewards/margins"),
    expected_first_loss=lambda train: 0.5 if train["desirable_weight"] == train["undesirable_weight"] == 1 else None,
    smallest_batch=2,
    batch_dependent=True,
    across_ranks=True,  # the KL term is a mean over all processes (trl/trainer/kto_trainer.py)
    needs=_kto_needs,
)

ppo = Algorithm(
    name="ppo",
    summary="proximal policy optimization: the model answers prompts, rewards score its answers",
    paper="Schulman et al. 2017 (arXiv:1707.06347); KL in the reward: Ziegler et al. 2019 (arXiv:1909.08593)",
    build="alignment.training.builders:ppo",
    schema="prompts",
    config="alignment.training.ppo_config:PPOConfig",
    sections=TRAINED | {"rewards"},
    roles=(Role("policy", trained=True), Role("critic", trained=True), Role("reference", trained=False),
           Role("scorer", trained=False)),
    metric=("score", "objective/scores"),
)  # fmt: skip

rloo = Algorithm(
    name="rloo",
    summary="REINFORCE with several replies to a prompt, each compared with the mean of the others; no critic",
    paper="Ahmadian et al. 2024 (arXiv:2402.14740)",
    build="alignment.training.builders:rloo",
    schema="prompts",
    config="trl.trainer.rloo_config:RLOOConfig",
    sections=TRAINED | {"rewards"},
    roles=(*POLICY_AND_REFERENCE, Role("scorer", trained=False)),
    # Replies are drawn in training mode, and two passes over one reply must agree: the ratio starts at 1.
    defaults={"disable_dropout": True},
    metric=("reward", "reward"),
    groups=True,
    needs=online.rloo_needs,
)

grpo = replace(
    rloo,
    name="grpo",
    summary="group relative policy optimization: a reply's reward on the scale of its group; no critic",
    paper="Shao et al. 2024 (arXiv:2402.03300); the loss of DAPO, Yu et al. 2025 (arXiv:2503.14476)",
    build="alignment.training.builders:grpo",
    config="trl.trainer.grpo_config:GRPOConfig",
    needs=online.grpo_needs,
)

evaluate = Algorithm(
    name="evaluate",
    summary="generate from several models on the same prompts and compare: judges, win rate, KL, reward-model accuracy",
    build="alignment.evaluation.evaluate:build",
    schema=None,
    sections=frozenset(
        {"models", "baseline", "scorers", "rewards", "prompts", "pairs", "sampling", "limits", "batch", "precision"}
    ),
    publishes=None,
    roles=(Role("policy", trained=False), Role("scorer", trained=False)),
)

ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        pretrain, sft, reward, dpo, ipo, hinge, robust, exo_pair, nca_pair, bco_pair, sppo_hard, aot, aot_unpaired,
        apo_zero, apo_down, discopop, sigmoid_norm, kto, ppo, rloo, grpo, evaluate,
    )
}  # fmt: skip

# `train` keys that the recipe owns, and where they belong: one fact, one place.
OWNED: dict[str, str] = {
    "output_dir": "is set by the run directory (--run NAME, --runs DIR)",
    "run_name": "is set by the run directory (--run NAME)",
    "seed": "belongs in `seed`",
    "data_seed": "belongs in `seed`",
    "gradient_accumulation_steps": "is derived from `batch.global`",
    "per_device_train_batch_size": "belongs in `batch.per_device`",
    "per_device_eval_batch_size": "belongs in `batch.per_device_eval`",
    "deepspeed": "belongs in `launch.deepspeed`",
    "fsdp": "belongs in `launch.accelerate`",
    "fsdp_config": "belongs in `launch.accelerate`",
    "parallelism_config": "belongs in `launch.accelerate`",
    "accelerator_config": "belongs in `launch.accelerate`",
    "use_cpu": "follows from the device; see `launch.env`",
    "ddp_backend": "follows from the device",
    "local_rank": "is set by the launcher",
    "bf16": "belongs in `precision.compute`",
    "fp16": "belongs in `precision.compute`",
    "bf16_full_eval": "belongs in `precision.compute`",
    "fp16_full_eval": "belongs in `precision.compute`",
    "tf32": "belongs in `precision.compute`",
    "save_strategy": "belongs in `checkpoints.every`",
    "save_steps": "belongs in `checkpoints.every`",
    "save_total_limit": "belongs in `checkpoints.keep`",
    "save_only_model": "cannot be set: a checkpoint without optimizer state cannot resume",
    "save_on_each_node": "cannot be set",
    "enable_jit_checkpoint": "cannot be set: it publishes a half-trained model with exit code 0",
    "resume_from_checkpoint": "is decided by the plan: run the same command again",
    "ignore_data_skip": "cannot be set: a resumed run would see other data",
    "restore_callback_states_from_checkpoint": "is decided by the plan",
    "report_to": "belongs in `report_to`",
    "logging_nan_inf_filter": "cannot be set: it hides non-finite losses",
    "model_init_kwargs": "belongs in `model` and `precision`",
    "trust_remote_code": "cannot be set: code of a model repository is not run",
    "remove_unused_columns": "cannot be set: rows are tokenized by this toolkit",
    "dataset_num_proc": "cannot be set: rows are tokenized by this toolkit",
    "dataset_text_field": "belongs in `data.train[].columns`",
    "dataset_kwargs": "cannot be set: rows are tokenized by this toolkit",
    "truncation_mode": "belongs in `data.on_overlong`",
    "shuffle_dataset": "cannot be set: training rows are shuffled with the recipe's seed",
    "chat_template_path": "belongs in `chat_template`",
    "eos_token": "follows from `chat_template`",
    "pad_token": "follows from the tokenizer",
    "assistant_only_loss": "cannot be set: the loss of sft is on the assistant's turns",
    "completion_only_loss": "cannot be set: the loss of sft is on the assistant's turns",
    "eval_packing": "cannot be set",
    "do_train": "cannot be set",
    "do_eval": "follows from `data.eval`",
    "do_predict": "cannot be set",
    "push_to_hub": "cannot be set: publish with `alignment export`",
    "hub_model_id": "cannot be set: publish with `alignment export`",
    "hub_strategy": "cannot be set: publish with `alignment export`",
    "hub_token": "cannot be set: upstream writes it in clear into the output",
    "hub_private_repo": "cannot be set: publish with `alignment export`",
    "hub_always_push": "cannot be set: publish with `alignment export`",
    "hub_revision": "cannot be set: publish with `alignment export`",
    "auto_find_batch_size": "cannot be set: it changes the batch in silence",
    "disable_tqdm": "is set by `--quiet`",
} | online.OWNED

# The same for `peft`: every adapter is a LoRA that starts as no change of an unchanged base. With the adapter switched
# off the model must be the reference, and the base must be the one that the manifest names.
PEFT_OWNED: dict[str, str] = {
    "peft_type": "cannot be set: adapters are LoRA",
    "task_type": "follows from the algorithm",
    "inference_mode": "cannot be set: the adapter is trained",
    "base_model_name_or_path": "belongs in `model`",
    "revision": "belongs in `model.revision`",
    "auto_mapping": "cannot be set",
    "peft_version": "cannot be set",
    "runtime_config": "cannot be set: it is an object of PEFT, not a value",
    "bias": "cannot be set: trained biases stay when the adapter is switched off, and it would be no reference",
    "layer_replication": "cannot be set: it changes the base",
    "megatron_config": "cannot be set: Megatron is not used",
    "megatron_core": "cannot be set: Megatron is not used",
    "loftq_config": "cannot be set: LoftQ changes the base",
    "eva_config": "cannot be set: it needs a pass over the data before training",
    "corda_config": "cannot be set: it needs a pass over the data before training",
    "lora_ga_config": "cannot be set: it needs a pass over the data before training",
}
