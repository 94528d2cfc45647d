"""Values that upstream's annotations allow and that make no sense: ranges, and choices that upstream keeps in prose.

Upstream takes `learning_rate: -1`, trains zero steps with `num_train_epochs: -1`, and learns of an unknown `loss_type`
in the first step. Every entry is tested against the installed classes: the key exists, its default is inside the
range, and each choice stands in upstream's own source.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

from alignment.recipe.problems import did_you_mean, shown


class Range(NamedTuple):
    """An interval of numbers; `also` is one value outside it that has a meaning of its own."""

    low: float = -math.inf
    high: float = math.inf
    open_low: bool = False
    open_high: bool = False
    also: float | None = None

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float):
            return False
        above = value > self.low if self.open_low else value >= self.low
        below = value < self.high if self.open_high else value <= self.high
        return (above and below) or value == self.also

    def __str__(self) -> str:
        low = f"{'above' if self.open_low else 'at least'} {self.low:g}"
        high = f"{'below' if self.open_high else 'at most'} {self.high:g}"
        text = low if self.high == math.inf else f"{low} and {high}"
        return text if self.also is None else f"{text}, or {self.also:g}"


POSITIVE = Range(0, open_low=True)
NOT_NEGATIVE = Range(0)
AT_LEAST_ONE = Range(1)
SHARE = Range(0, 1)
BELOW_ONE = Range(0, 1, open_high=True)
POSITIVE_SHARE = Range(0, 1, open_low=True)

TRAIN_RANGES: dict[str, Range] = {
    "learning_rate": POSITIVE,
    "num_train_epochs": POSITIVE,
    "max_steps": Range(1, also=-1),
    "warmup_steps": NOT_NEGATIVE,
    "weight_decay": NOT_NEGATIVE,
    "adam_beta1": BELOW_ONE,
    "adam_beta2": BELOW_ONE,
    "adam_epsilon": POSITIVE,
    "max_grad_norm": NOT_NEGATIVE,
    "label_smoothing_factor": BELOW_ONE,
    "neftune_noise_alpha": NOT_NEGATIVE,
    "logging_steps": POSITIVE,
    "eval_steps": POSITIVE,
    "eval_delay": NOT_NEGATIVE,
    "eval_accumulation_steps": AT_LEAST_ONE,
    "torch_empty_cache_steps": AT_LEAST_ONE,
    "dataloader_num_workers": NOT_NEGATIVE,
    "dataloader_prefetch_factor": AT_LEAST_ONE,
    "ddp_bucket_cap_mb": AT_LEAST_ONE,
    "ddp_timeout": AT_LEAST_ONE,
    "max_length": Range(2),
    "pad_to_multiple_of": AT_LEAST_ONE,
    "router_aux_loss_coef": NOT_NEGATIVE,
    "beta": NOT_NEGATIVE,
    "label_smoothing": BELOW_ONE,
    "ld_alpha": SHARE,
    "discopop_tau": POSITIVE,
    "loss_weights": NOT_NEGATIVE,
    "ref_model_mixup_alpha": SHARE,
    "ref_model_sync_steps": AT_LEAST_ONE,
    "precompute_ref_batch_size": AT_LEAST_ONE,
    "center_rewards_coefficient": NOT_NEGATIVE,
    "desirable_weight": NOT_NEGATIVE,
    "undesirable_weight": NOT_NEGATIVE,
    "total_episodes": AT_LEAST_ONE,
    "response_length": AT_LEAST_ONE,
    "temperature": POSITIVE,
    "stop_token_id": NOT_NEGATIVE,
    "prompt_length": AT_LEAST_ONE,
    "local_rollout_forward_batch_size": AT_LEAST_ONE,
    "kl_coef": NOT_NEGATIVE,
    "kl_target": POSITIVE,
    "kl_horizon": AT_LEAST_ONE,
    "missing_eos_penalty": NOT_NEGATIVE,
    "gamma": SHARE,
    "lam": SHARE,
    "num_ppo_epochs": AT_LEAST_ONE,
    "num_mini_batches": AT_LEAST_ONE,
    "cliprange": POSITIVE,
    "cliprange_value": POSITIVE,
    "vf_coef": NOT_NEGATIVE,
    "target_kl": POSITIVE,
    "max_kl": POSITIVE,
    "critic_learning_rate": POSITIVE,
    "log_samples": NOT_NEGATIVE,
    "num_generations": Range(2),
    "num_generations_eval": AT_LEAST_ONE,
    "max_completion_length": AT_LEAST_ONE,
    "generation_batch_size": AT_LEAST_ONE,
    "steps_per_generation": AT_LEAST_ONE,
    "num_iterations": AT_LEAST_ONE,
    "top_p": POSITIVE_SHARE,
    "top_k": NOT_NEGATIVE,
    "min_p": SHARE,
    "repetition_penalty": POSITIVE,
    "epsilon": POSITIVE,
    "epsilon_high": POSITIVE,
    "delta": POSITIVE,
    "sapo_temperature_neg": POSITIVE,
    "sapo_temperature_pos": POSITIVE,
    "vespo_k_pos": NOT_NEGATIVE,
    "vespo_lambda_pos": NOT_NEGATIVE,
    "vespo_k_neg": NOT_NEGATIVE,
    "vespo_lambda_neg": NOT_NEGATIVE,
    "top_entropy_quantile": SHARE,
    "entropy_coef": NOT_NEGATIVE,
    "entropy_coef_min": NOT_NEGATIVE,
    "entropy_coef_max": NOT_NEGATIVE,
    "entropy_coef_delta": NOT_NEGATIVE,
    "entropy_target": NOT_NEGATIVE,
    "off_policy_mask_threshold": POSITIVE,
    "num_completions_to_print": NOT_NEGATIVE,
}

PEFT_RANGES: dict[str, Range] = {
    "r": AT_LEAST_ONE,
    "lora_alpha": AT_LEAST_ONE,
    "lora_dropout": BELOW_ONE,
    "qalora_group_size": AT_LEAST_ONE,
}

# Choices that upstream states in a help text or in the trainer, by class and key ("" is every class).
CHOICES: dict[tuple[str, str], tuple[Any, ...]] = {
    ("DPOConfig", "loss_type"): (
        "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
        "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm",
    ),
    ("DPOConfig", "f_divergence_type"): ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"),
    ("KTOConfig", "loss_type"): ("kto", "apo_zero_unpaired"),
    ("GRPOConfig", "loss_type"): ("grpo", "dr_grpo", "dapo", "bnpo", "cispo", "sapo", "luspo", "vespo"),
    ("GRPOConfig", "importance_sampling_level"): ("token", "sequence"),
    ("GRPOConfig", "scale_rewards"): ("group", "batch", "none"),
    ("GRPOConfig", "multi_objective_aggregation"): ("sum_then_normalize", "normalize_then_sum"),
    ("", "log_level"): ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    ("", "log_level_replica"): ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    ("", "pad_to_multiple_of"): ("auto",),
    # Other ways to start (pissa, olora, corda, loftq, eva) change the base or are no adapter of zero: algorithms.py.
    ("LoraConfig", "init_lora_weights"): (True, "gaussian", "mica"),
}  # fmt: skip


def out_of_limits(config: str, key: str, value: Any) -> str | None:
    """Say why a value of the right type is not allowed; None where it is.

    Args:
        config: the class, `package.module:Class`.
        key: the key of `train` or `peft`.
        value: its value; of a list, each item is checked.
    """
    class_name = config.partition(":")[2]
    ranges = PEFT_RANGES if class_name == "LoraConfig" else TRAIN_RANGES
    choices = CHOICES.get((class_name, key)) or CHOICES.get(("", key))
    for item in value if isinstance(value, list) else [value]:
        number = isinstance(item, int | float) and not isinstance(item, bool)
        if number and not math.isfinite(item):
            return f"must be finite, found {shown(item)}"
        if number and key in ranges and item not in ranges[key]:
            return f"must be {ranges[key]}, found {shown(item)}"
        if choices is not None and item is not None and not number and item not in choices:
            listed = ", ".join(shown(choice) if isinstance(choice, bool) else str(choice) for choice in choices)
            return f"must be one of {listed}, found {shown(item)}{did_you_mean(item, map(str, choices))}"
    return None
