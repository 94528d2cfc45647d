"""The settings of a PPO run: TRL's field names, ours where TRL had none, each default with its reason.

Batches: `per_device_train_batch_size` rows pass forward and backward at once; that times
`gradient_accumulation_steps` is what one process draws per update; `num_mini_batches` optimizer steps are taken in
each of `num_ppo_epochs` passes over it. A "step" of the Trainer is one update: schedule, logs and checkpoints count
updates.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from transformers import TrainingArguments


@dataclass
class PPOConfig(TrainingArguments):
    """Arguments of `alignment.training.ppo.PPOTrainer`.

    Raises:
        ValueError: a value outside of its range; or batches that `num_mini_batches` does not divide.
    """

    # --- defaults of TrainingArguments that do not suit PPO ---
    learning_rate: float = field(default=3e-6, metadata={"help": "peak learning rate; PPO moves from a good model"})
    adam_epsilon: float = field(
        default=1e-5, metadata={"help": "larger than AdamW's 1e-8: gradients of a converged policy are tiny and noisy"}
    )
    logging_steps: float = field(default=1, metadata={"help": "an update takes long enough to be worth a line"})

    # --- how long ---
    total_episodes: int | None = field(
        default=None, metadata={"help": "stop after so many episodes; default: num_train_epochs over the prompts"}
    )

    # --- rollout ---
    response_length: int = field(default=256, metadata={"help": "longest reply in tokens; longer ones are cut"})
    temperature: float = field(
        default=1.0,
        metadata={"help": "of the distribution that is sampled, trained and compared with the reference: one for all"},
    )
    stop_token_id: int | None = field(
        default=None, metadata={"help": "ends a reply; default: the end tokens of the tokenizer and its template"}
    )
    prompt_length: int | None = field(
        default=None, metadata={"help": "longest prompt in tokens; data.on_overlong says what happens to longer ones"}
    )
    local_rollout_forward_batch_size: int = field(
        default=64, metadata={"help": "rows at once where no gradient is needed: drawing and scoring"}
    )
    ds3_gather_for_generation: bool = field(
        default=True, metadata={"help": "ZeRO-3: gather the policy once per rollout instead of once per token"}
    )

    # --- reward ---
    kl_coef: float = field(default=0.05, metadata={"help": "price of a nat of KL to the reference"})
    kl_estimator: Literal["k1", "k2", "k3"] = field(
        default="k1", metadata={"help": "k1: unbiased; k2, k3: never negative, lower variance (Schulman 2020)"}
    )
    kl_target: float | None = field(
        default=None, metadata={"help": "adapt kl_coef so that the KL of an episode comes to this many nats"}
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "episodes over which an adaptive kl_coef reacts"})
    missing_eos_penalty: float | None = field(
        default=None, metadata={"help": "taken off the score of a reply that was cut at response_length"}
    )
    bootstrap_truncated: bool = field(
        default=False,
        metadata={
            "help": "a cut reply earns the critic's value of what would follow instead of its score; off, because an "
            "unfinished reply is a bad reply wherever response_length is not merely a matter of compute"
        },
    )
    whiten_rewards: bool = field(
        default=False, metadata={"help": "divide the token rewards of an update by their deviation"}
    )

    # --- advantages and losses ---
    gamma: float = field(default=1.0, metadata={"help": "discount; 1: a reply is short and its end is what counts"})
    lam: float = field(default=0.95, metadata={"help": "lambda of the generalized advantage estimate"})
    whiten_advantages: bool = field(
        default=True, metadata={"help": "advantages with mean 0 and deviation 1 over the update: no scale to tune"}
    )
    num_ppo_epochs: int = field(default=4, metadata={"help": "passes over the episodes of an update"})
    num_mini_batches: int = field(default=1, metadata={"help": "optimizer steps per pass"})
    cliprange: float = field(default=0.2, metadata={"help": "the ratio's clip range in the policy's loss"})
    cliprange_value: float | None = field(default=0.2, metadata={"help": "the value's clip range; null: no clipping"})
    vf_coef: float = field(default=0.1, metadata={"help": "weight of the value loss"})
    target_kl: float | None = field(
        default=None, metadata={"help": "leave an update's passes when its approximate KL exceeds this"}
    )
    max_kl: float | None = field(
        default=None, metadata={"help": "end the run, saved, when the mean KL of an episode exceeds this"}
    )

    # --- critic ---
    critic: Literal["separate", "shared"] = field(
        default="separate", metadata={"help": "a model of its own, or a head on the policy's trunk"}
    )
    critic_init: Literal["auto", "reward", "policy"] = field(
        default="auto", metadata={"help": "what the critic starts from; auto: the reward model if there is one"}
    )
    critic_learning_rate: float | None = field(default=None, metadata={"help": "default: learning_rate"})

    # --- log ---
    log_samples: int = field(default=3, metadata={"help": "conversations in each line of log.jsonl"})

    def __post_init__(self) -> None:
        """Refuse what cannot work before anything is set up."""
        at_least_one = ("response_length", "local_rollout_forward_batch_size", "kl_horizon", "num_ppo_epochs",
                        "num_mini_batches")  # fmt: skip
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(
                f"temperature must be above 0, found {self.temperature}: greedy replies cannot be learned from"
            )
        if self.total_episodes is not None and self.max_steps > 0:
            raise ValueError("total_episodes and max_steps both say when to stop; give one of them")
        rows = self.per_device_train_batch_size * self.gradient_accumulation_steps
        if rows % self.num_mini_batches:
            raise ValueError(
                f"num_mini_batches {self.num_mini_batches} does not divide the {rows} episodes that a process draws "
                "per update (per_device_train_batch_size x gradient_accumulation_steps)"
            )
        super().__post_init__()
