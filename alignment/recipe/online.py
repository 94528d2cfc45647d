"""What `rloo` and `grpo` want of a recipe: several replies to each prompt, whole groups of them in every batch.

TRL's trainers take much that the toolkit decides elsewhere (`OWNED`), some things that do not do what they say
(`rloo_needs`, `grpo_needs`), and counts of replies that must fit each other (`group_problems`). Sources:
trl/trainer/rloo_config.py, grpo_config.py, rloo_trainer.py, grpo_trainer.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from alignment.recipe.schema import Stage

Train = Mapping[str, Any]

_VLLM = (
    "use_vllm", "vllm_mode", "vllm_model_impl", "vllm_enable_sleep_mode", "vllm_structured_outputs_regex",
    "vllm_server_base_url", "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_group_port",
    "vllm_gpu_memory_utilization", "vllm_max_model_length", "vllm_tensor_parallel_size",
    "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap",
)  # fmt: skip
_CONTINUOUS = (
    "use_transformers_continuous_batching", "transformers_continuous_batching_config", "use_transformers_paged"
)  # fmt: skip

# Joined to `algorithms.OWNED`: keys of these trainers alone.
OWNED: dict[str, str] = {
    "reward_weights": "belongs in `rewards[].weight`",
    "reward_clip_range": "cannot be set: clip a reward in its own function, before it is weighted",
    "chat_template_kwargs": "cannot be set: rows are tokenized by this toolkit",
    "generation_kwargs": "cannot be set: temperature, top_p, top_k, min_p and repetition_penalty are keys of `train`",
    "max_tool_calling_iterations": "cannot be set: no tools are called",
    "log_multimodal": "cannot be set: rows are text",
    "log_completions_hub_repo": "cannot be set: conversations stand in the stage's log.jsonl",
    **dict.fromkeys(_VLLM, "cannot be set: replies are drawn by the model in training, in its own process; no vLLM"),
    # trl/trainer/grpo_trainer.py, `_generate_single_turn`: `unwrapped_model.to(torch.bfloat16)`
    **dict.fromkeys(_CONTINUOUS, "cannot be set: upstream rounds the trained weights to 16 bits for it"),
}


def rloo_needs(train: Train) -> Iterator[tuple[str, str]]:
    """What both trainers refuse late, or take and do not do."""
    if train["num_generations"] is None:
        yield "num_generations", "needs a number: how many replies are drawn to each prompt"
    if train["max_completion_length"] is None:
        yield "max_completion_length", "needs a number: without one, generation stops where Transformers happens to"
    if train["generation_batch_size"] is not None and train["steps_per_generation"] is not None:
        yield "generation_batch_size", "says the same as steps_per_generation; give one of the two"
    if train["use_liger_kernel"]:
        yield "use_liger_kernel", "cannot go with this trainer: both replace the forward pass; remove it"
    if train["sync_ref_model"]:
        message = "cannot be used: checkpoints do not hold the moved reference, a resumed run would have another one"
        yield "sync_ref_model", message
    if train["train_sampling_strategy"] != "random":
        yield "train_sampling_strategy", "has no effect: each prompt is repeated by a sampler of its own; remove it"


def grpo_needs(train: Train) -> Iterator[tuple[str, str]]:
    """As above, and the combinations of GRPO's many losses that are not what their papers describe."""
    yield from rloo_needs(train)
    loss, level = train["loss_type"], train["importance_sampling_level"]
    if loss == "bnpo":
        yield "loss_type", "bnpo divides by the tokens of one forward pass, so batch.per_device decides; take dapo"
    if loss == "luspo" and level != "sequence":
        yield "loss_type", "luspo weighs whole sequences; set `importance_sampling_level: sequence`"
    if level == "sequence" and loss not in ("grpo", "sapo", "luspo"):
        yield "importance_sampling_level", f"sequence cannot go with {loss}; take `loss_type: grpo` (GSPO) or luspo"
    if loss == "cispo" and (train["epsilon_high"] is None or train["epsilon_high"] < 1):
        yield "epsilon_high", "is the largest weight of a token in cispo; give one above 1, for example 5.0"
    if train["delta"] is not None and train["delta"] <= 1 + (train["epsilon_high"] or train["epsilon"]):
        yield "delta", "must be above 1 + epsilon_high: below it, it would undo the clip range"
    if train["multi_objective_aggregation"] == "normalize_then_sum" and train["scale_rewards"] != "group":
        yield "scale_rewards", "has no effect with normalize_then_sum; remove one of the two"


def adapter_problems(peft: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Adapters past which TRL reads the output layer's weights (trl/trainer/utils.py, `add_fused_lm_head`)."""
    targets = peft.get("target_modules") or ()
    if targets == "lm_head" or (not isinstance(targets, str) and "lm_head" in targets):
        yield "target_modules", "lm_head would not be trained: TRL reads its weights past the adapter; leave it out"
    if peft.get("trainable_token_indices"):
        yield "trainable_token_indices", "cannot be read by TRL; write `modules_to_save: [embed_tokens]`"


def group_problems(stage: Stage, train: Train, processes: int) -> Iterator[tuple[tuple[str, str], str]]:
    """Batches that cut a group of replies: yields (where in the stage, what is wrong and the nearest legal values).

    `batch.global` and `batch.per_device` count replies. One generation fills `steps_per_generation` forward passes of
    every process, by default those of one optimizer step.

    Args:
        stage: the resolved stage, whose `batch.global` is a multiple of `batch.per_device` x `processes`.
        train: all arguments of the trainer, upstream's defaults included.
    """
    replies, batch = train["num_generations"], stage.batch
    if replies is None:
        return
    step = batch.per_device * processes  # replies of one forward pass of all processes
    whole = math.lcm(step, replies)
    steps, wanted = train["steps_per_generation"], train["generation_batch_size"]
    if wanted is not None and wanted % whole:
        message = f"must fill whole forward passes ({step} replies) with whole groups (num_generations {replies})"
        yield ("train", "generation_batch_size"), f"{message}: {_nearest(wanted, whole)}"
    elif steps is not None and steps * step % replies:
        message = f"{steps} x {step} replies are no whole groups of num_generations {replies}"
        yield ("train", "steps_per_generation"), f"{message}: {_nearest(steps, whole // step)}"
    elif wanted is None and steps is None and batch.global_ % replies:
        message = f"{batch.global_} replies are no whole groups of num_generations {replies}"
        yield ("batch", "global"), f"{message}: {_nearest(batch.global_, whole)}"
    evaluates = stage.data is not None and bool(stage.data.eval or stage.data.eval_fraction)
    rows, drawn = batch.per_device_eval or batch.per_device, train["num_generations_eval"] or replies
    if evaluates and rows * processes % drawn:
        message = f"{rows} x {processes} processes are no whole groups of {drawn} replies (num_generations_eval)"
        yield ("batch", "per_device_eval"), f"{message}: {_nearest(rows, drawn // math.gcd(drawn, processes))}"


def _nearest(value: int, unit: int) -> str:
    below = value // unit * unit
    if not below:
        return f"the nearest legal value is {unit}"
    return f"the nearest legal values are {below} and {below + unit}"
