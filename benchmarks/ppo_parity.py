"""TRL 1.12.0's PPO and ours on the same weights, prompts, replies and scores: one table per case.

    python benchmarks/ppo_parity.py [--env DIR] [--keep DIR]

TRL's trainer makes one update of tiny models in its own environment and everything in it is written down
(`ppo_trl.py dump`). From its replies and its weights before the update, `alignment.training.objectives` computes the
update again, and so does `PPOTrainer`, given TRL's replies, scores and order of minibatches. Exit status 1 where the
two mean the same and differ by more than 1e-5.

The strict cases draw replies without a stop token. With one, TRL pays the score one token after it, so rewards,
advantages and losses differ on purpose; the case `stop` shows by how much.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from ppo_common import DEFAULT_ENVIRONMENT, HERE, Size, bias_the_head, call, environment, random_prompts, save_roles
from ppo_common import word_tokenizer as tokenizer_of
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    PrinterCallback,
)
from transformers.utils import logging

from alignment.training import objectives
from alignment.training.ppo import PPOTrainer
from alignment.training.ppo_config import PPOConfig
from alignment.training.rollout import Episodes, Rollout, Scores

TINY = Size(64, 32, 64, 2, 4)
TOLERANCE = 1e-5
SAME, OTHER = "yes", "no"
ROLLOUT = {  # TRL's name -> ours
    "logprobs": "log-probabilities",
    "ref_logprobs": "reference log-probabilities",
    "values": "values",
    "scores": "scores",
    "kl": "KL per token",
    "rewards": "rewards",
    "advantages_raw": "advantages, raw",
    "returns": "returns",
    "advantages": "advantages, whitened",
}
BEFORE_REWARDS = ("logprobs", "ref_logprobs", "values", "scores", "kl")
# The Adam step of a gradient near zero depends on its sign: with our epsilon, instead of TRL's 1e-8, rounding stays
# rounding. The learning rate is large enough for the update to be seen above the tolerance.
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "total_episodes": 16,
    "response_length": 12,
    "temperature": 0.7,
    "num_ppo_epochs": 2,
    "num_mini_batches": 2,
    "learning_rate": 3e-4,
    "adam_epsilon": 1e-5,
    "weight_decay": 0.0,
    "optim": "adamw_torch",
    "kl_coef": 0.05,
    "kl_estimator": "k1",
    "whiten_rewards": False,
    "gamma": 1.0,
    "lam": 0.95,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
}
CASES = {
    "k1": COMMON,
    "k3": COMMON | {"kl_estimator": "k3", "gamma": 0.98, "temperature": 1.0},
    "whiten_rewards": COMMON | {"whiten_rewards": True, "cliprange": 0.02, "cliprange_value": 0.02},
    "stop": COMMON | {"stop_token": "eos"},
}
# TRL counts accumulation steps, not minibatches: how many optimizer steps it takes in how many updates.
MANY = COMMON | {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4}
STEPS = {
    "steps 1": MANY | {"num_mini_batches": 1},
    "steps 2": MANY | {"num_mini_batches": 2},
    "steps 4": MANY | {"num_mini_batches": 4},
    "steps to the end": MANY | {"num_mini_batches": 1, "total_episodes": 48},  # 48 prompts: the last update ends them
}


@dataclass(frozen=True)
class Line:
    """One line of a table."""

    quantity: str
    difference: float
    same: str
    remark: str = ""

    def holds(self) -> bool:
        """False where the two sides should agree and do not."""
        return self.same != SAME or self.difference <= TOLERANCE


def make_models(target: Path) -> None:
    """Tiny float32 models; the reference is not the policy, so that the KL is not 0."""
    torch.manual_seed(0)
    config = TINY.config()
    config.initializer_range = 0.2  # logits that differ: a policy with something to unlearn
    policy, reference = LlamaForCausalLM(config), LlamaForCausalLM(config)
    bias_the_head(policy, 0.1)
    reference.load_state_dict(policy.state_dict())
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    save_roles(policy, reference, tokenizer_of(TINY.vocabulary), target)


# --- the same update, from our formulas -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """Sequences of prompt and reply, S = P + T tokens: prompts padded on the left, replies on the right."""

    ids: Tensor  # (B, S)
    attention: Tensor  # (B, S)
    tokens: Tensor  # (B, T)
    mask: Tensor  # (B, T), true at the drawn tokens

    def take(self, rows: Tensor) -> Rows:
        """Some of the rows."""
        return Rows(self.ids[rows], self.attention[rows], self.tokens[rows], self.mask[rows])

    def inputs(self) -> dict[str, Tensor]:
        """What a model takes."""
        positions = (self.attention.cumsum(1) - 1).clamp(min=0)
        return {"input_ids": self.ids, "attention_mask": self.attention, "position_ids": positions}


def rows_of(queries: Tensor, responses: Tensor, ends: Tensor, pad: int) -> Rows:
    """The episodes of a dump; `ends` (B,) is the index of each reply's last token."""
    mask = torch.arange(responses.shape[1])[None] <= ends[:, None]
    attention = torch.cat([queries != pad, mask], 1)
    ids = torch.cat([queries, responses], 1).masked_fill(~attention, 0)
    return Rows(ids, attention.long(), responses, mask)


def causal(folder: Path) -> Any:
    """A policy in float32."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def classifier(folder: Path) -> Any:
    """A reward model or critic in float32."""
    return AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)


def policy_of(model: torch.nn.Module, rows: Rows, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each token of the replies (B, T) and entropy before it (B, T), at the sampling temperature."""
    logits = model(**rows.inputs()).logits[:, -rows.tokens.shape[1] - 1 : -1] / temperature
    return objectives.log_probabilities(logits, rows.tokens), objectives.entropy(logits)


def heads_of(model: Any, rows: Rows) -> Tensor:
    """What a sequence classifier says after each token (B, S)."""
    return model.score(model.model(**rows.inputs()).last_hidden_state).squeeze(-1)


def values_of(model: Any, rows: Rows) -> Tensor:
    """Value of the state before each token of the replies (B, T)."""
    return heads_of(model, rows)[:, -rows.tokens.shape[1] - 1 : -1]


def largest(ours: Tensor, theirs: Tensor, mask: Tensor | None = None) -> float:
    """The largest absolute difference, where the mask is true."""
    difference = (ours.detach().double() - theirs.detach().double()).abs()
    return float(difference.max() if mask is None else difference[mask].max())


def judged(case: dict[str, Any], models: Path, rows: Rows) -> dict[str, Tensor]:
    """Our rollout on TRL's replies, by TRL's names: all (B, T), scores (B,)."""
    mask = rows.mask
    with torch.no_grad():
        policy, _ = policy_of(causal(models / "policy"), rows, case["temperature"])
        reference, _ = policy_of(causal(models / "reference"), rows, case["temperature"])
        values = values_of(classifier(models / "value"), rows)
        last = rows.ids.shape[1] - mask.shape[1] + mask.sum(1) - 1  # column of each reply's last token
        scores = heads_of(classifier(models / "reward"), rows)[torch.arange(len(mask)), last]
    kl = objectives.kl_estimate(policy, reference, case["kl_estimator"])
    rewards = objectives.token_rewards(scores, kl, mask, kl_coef=case["kl_coef"])
    if case["whiten_rewards"]:
        rewards = objectives.masked_whiten(rewards, mask, shift_mean=False)
    raw, returns = objectives.gae(rewards, values, mask, gamma=case["gamma"], lam=case["lam"])
    return {
        "logprobs": policy, "ref_logprobs": reference, "values": values, "scores": scores, "kl": kl,
        "rewards": rewards, "advantages_raw": raw, "returns": returns,
        "advantages": objectives.masked_whiten(raw, mask),
    }  # fmt: skip


@dataclass
class Update:
    """Our update beside TRL's: the worst difference by quantity, means over the minibatches by TRL's names."""

    worst: dict[str, float]
    averages: dict[str, float]
    gradient: float = 0.0

    def see(self, found: dict[str, float]) -> None:
        """Take the differences of one more minibatch."""
        self.worst = {name: max(self.worst.get(name, 0.0), difference) for name, difference in found.items()}


def updated(
    case: dict[str, Any], policy: Any, value: Any, rows: Rows, ours: dict[str, Tensor], seen: dict[str, Tensor]
) -> Update:
    """Train policy and critic on TRL's minibatches, in TRL's order."""
    named = dict(policy.named_parameters(prefix="policy")) | dict(value.named_parameters(prefix="value"))
    optimizer = torch.optim.AdamW(
        named.values(), lr=case["learning_rate"], betas=(0.9, 0.999), eps=case["adam_epsilon"], weight_decay=0.0
    )
    update, count = Update({}, defaultdict(float)), int(seen["micro_batches"])
    for i in range(count):
        chosen = seen[f"micro.{i}.micro_batch_inds"]
        batch, old = rows.take(chosen), {name: tensor[chosen] for name, tensor in ours.items()}
        (new, entropy), values = policy_of(policy, batch, case["temperature"]), values_of(value, batch)
        surrogate = objectives.policy_loss(new, old["logprobs"], old["advantages"], cliprange=case["cliprange"])
        error = objectives.value_loss(values, old["values"], old["returns"], cliprange=case["cliprange_value"])
        difference = new - old["logprobs"]
        tokens = {
            "loss/policy_avg": surrogate.loss,
            "loss/value_avg": error.loss,
            "policy/clipfrac_avg": surrogate.clipped.float(),
            "val/clipfrac_avg": error.clipped.float(),
            "policy/approxkl_avg": difference.square() / 2,
            "policy/entropy_avg": entropy,
            "val/ratio": difference.exp(),
        }
        means = {name: objectives.masked_mean(tensor, batch.mask) for name, tensor in tokens.items()}
        optimizer.zero_grad()
        (means["loss/policy_avg"] + case["vf_coef"] * means["loss/value_avg"]).backward()
        if i == 0:
            update.gradient = max(largest(p.grad, seen[f"grad.{n}"]) for n, p in named.items() if p.grad is not None)
        optimizer.step()
        for name, mean in means.items():
            update.averages[name] += mean.item() / count
        update.see({
            "new log-probabilities": largest(new, seen[f"micro.{i}.new_logprobs"], batch.mask),
            "new values": largest(values, seen[f"micro.{i}.vpred"], batch.mask),
            "policy loss": largest(means["loss/policy_avg"], seen[f"micro.{i}.pg_loss"]),
            "value loss": largest(means["loss/value_avg"], seen[f"micro.{i}.vf_loss"]),
        })  # fmt: skip
    return update


# --- the same update, from our trainer --------------------------------------------------------------------------------


class Replay(PPOTrainer):
    """Our trainer with TRL's replies, scores and minibatches; all else is its own."""

    seen: dict[str, Tensor]
    kept: Rollout

    def _generate(self, model: Any, rows: Any) -> Episodes:
        pad = self.tokenizer.pad_token_id
        prompts = [[token for token in row if token != pad] for row in self.seen["queries"].tolist()]
        replies = self.seen["responses"].tolist()
        return Episodes(rows, prompts, replies, [""] * len(prompts), [False] * len(prompts))

    def _score(self, episodes: Episodes) -> Scores:
        scores = self.seen["scores"].double().numpy()
        return Scores(scores, {"reward": scores})

    def _minibatches(self, rows: int) -> Iterator[list[int]]:
        for number in range(int(self.seen["micro_batches"])):
            yield self.seen[f"micro.{number}.micro_batch_inds"].tolist()

    def rollout(self, model: Any, rows: Any) -> Rollout:
        """Keep it for the comparison."""
        self.kept = super().rollout(model, rows)
        return self.kept


def replayed(case: dict[str, Any], models: Path, seen: dict[str, Tensor], log: dict[str, float]) -> list[Line]:
    """One update of `PPOTrainer` beside TRL's: advantages, logged losses, weights."""
    tokenizer = AutoTokenizer.from_pretrained(models / "policy", padding_side="left")
    policy, value = causal(models / "policy"), classifier(models / "value")
    with tempfile.TemporaryDirectory(prefix="ppo-replay-") as output:
        config = PPOConfig(
            output_dir=output, report_to="none", save_strategy="no", logging_steps=1, use_cpu=True, disable_tqdm=True,
            bf16=False, max_grad_norm=0.0, bootstrap_truncated=False, **case,
        )  # fmt: skip
        trainer = Replay(
            policy, config, Dataset.from_dict({"prompt_ids": [[3]] * 16, "prompt": ["x"] * 16}),
            processing_class=tokenizer, reward_funcs=lambda prompts, completions, **_: [0.0] * len(prompts),
            value_model=value, ref_model=causal(models / "reference"), starts_at_reference=False,
        )  # fmt: skip
        trainer.seen = seen
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    line = next(line for line in trainer.state.log_history if "loss/policy_avg" in line)
    lines = [Line("PPOTrainer: advantages", largest(trainer.kept.advantages, seen["advantages"]), SAME)]
    for name in ("loss/policy_avg", "loss/value_avg", "policy/clipfrac_avg", "objective/rlhf_reward", "val/ratio"):
        lines.append(Line(f"PPOTrainer: {name}", abs(line[name] - log[name]), SAME, f"{log[name]:.4f}"))
    for role, model in (("policy", policy), ("value", value)):
        error = max(largest(p, seen[f"after.{role}.{name}"]) for name, p in model.named_parameters())
        lines.append(Line(f"PPOTrainer: {role} weights after the update", error, SAME))
    return lines


def compare(case: dict[str, Any], models: Path, seen: dict[str, Tensor], log: dict[str, float]) -> list[Line]:
    """Every quantity of one update of TRL beside ours."""
    policy, value = causal(models / "policy"), classifier(models / "value")
    rows = rows_of(seen["queries"], seen["responses"], seen["sequence_lengths"], policy.config.pad_token_id)
    mask, ours = rows.mask, judged(case, models, rows)
    stops = not bool(mask.all())
    same = OTHER if stops else SAME  # from the rewards on
    remarks = {"logprobs": "TRL: of the generation", "kl": case["kl_estimator"]}
    lines = []
    for name, label in ROLLOUT.items():
        agrees = SAME if name in BEFORE_REWARDS else same
        remark = "TRL: the score stands one token after the stop token" if stops and name == "rewards" else ""
        difference = largest(ours[name], seen[name], None if name == "scores" else mask)
        lines.append(Line(label, difference, agrees, remarks.get(name, remark)))

    update = updated(case, policy, value, rows, ours, seen)
    of = f"worst of {int(seen['micro_batches'])} minibatches"
    lines += [Line(name, difference, same, of) for name, difference in update.worst.items()]
    lines.append(Line("gradient of the first minibatch", update.gradient, same))
    for role, model in (("policy", policy), ("value", value)):
        before, after = dict(type(model).from_pretrained(models / role).named_parameters()), model.named_parameters()
        moved = {name: (largest(p, before[name]), largest(p, seen[f"after.{role}.{name}"])) for name, p in after}
        furthest, difference = (max(column) for column in zip(*moved.values(), strict=True))
        lines.append(Line(f"{role} weights after the update", difference, same, f"moved by up to {furthest:.1e}"))

    kl = float(objectives.masked_sum(ours["kl"], mask) / len(mask))
    score = float(ours["scores"].mean())
    before_rewards = {
        "objective/kl": kl,
        "objective/entropy": float(-objectives.masked_sum(ours["logprobs"], mask) / len(mask)),
        "objective/non_score_reward": -case["kl_coef"] * kl,
        "objective/scores": score,
        "objective/rlhf_reward": score - case["kl_coef"] * kl,
    }
    for name, number in sorted((before_rewards | update.averages).items()):
        agrees = SAME if name in before_rewards else same
        lines.append(Line(f"log: {name}", abs(number - log[name]), agrees, f"{log[name]:.4f}"))
    return lines


def main() -> None:
    """Both sides, and the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--env", type=Path, default=DEFAULT_ENVIRONMENT, help="folder of TRL's environment")
    parser.add_argument("--keep", type=Path, help="folder for models and dump, instead of one that is removed")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for TRL's side")
    arguments = parser.parse_args()
    python = environment(arguments.env)
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    failed = False
    with tempfile.TemporaryDirectory(prefix="ppo-parity-") as made:
        folder = arguments.keep or Path(made)
        models, spec = folder / "models", folder / "spec.json"
        make_models(models)
        prompts = random_prompts(TINY.vocabulary, 48, 4, 8)
        out = folder / "dump"
        wanted = {"models": str(models), "prompts": prompts, "out": str(out), "dtype": "fp32", "cases": CASES | STEPS}
        spec.write_text(json.dumps(wanted))
        problem = call([str(python), str(HERE / "ppo_trl.py"), "dump", str(spec)], 1, arguments.timeout)
        if problem:
            sys.exit(f"TRL's side: {problem}")
        for name, case in CASES.items():
            seen, log = load_file(out / f"{name}.safetensors"), json.loads((out / f"{name}.json").read_text())
            lines = compare(case, models, seen, log)
            if "stop_token" not in case:
                lines += replayed(case, models, seen, log)
            ended = int((seen["sequence_lengths"] + 1 < seen["responses"].shape[1]).sum())
            replies = f"{len(seen['queries'])} replies, {ended} shorter than {case['response_length']} tokens"
            print(f"\n### {name}: {replies}")
            print("\n| quantity | max abs difference | same meaning? | |\n|---|---|---|---|")
            for line in lines:
                wrong = "" if line.holds() else " **too large**"
                print(f"| {line.quantity} | {line.difference:.1e}{wrong} | {line.same} | {line.remark} |")
            failed |= not all(line.holds() for line in lines)
        print("\n### Optimizer steps of TRL: 4 rows at once, 16 episodes per update, 2 epochs\n")
        print("| num_mini_batches | updates | steps expected | steps of TRL |\n|---|---|---|---|")
        for name, case in STEPS.items():
            updates, batches = case["total_episodes"] // 16, case["num_mini_batches"]
            taken = int(load_file(out / f"{name}.safetensors")["optimizer_steps"])
            where = " (the last batch of the prompts among them)" if updates > 1 else ""
            print(f"| {batches} | {updates}{where} | {updates * batches * case['num_ppo_epochs']} | {taken} |")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
