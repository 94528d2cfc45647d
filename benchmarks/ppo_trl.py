"""TRL 1.12.0's PPO trainer at work: what one update computes, or how fast it is.

Runs in the environment of `ppo_common.environment` and imports nothing of this project:

    python ppo_trl.py dump  SPEC.json     one update per case, every tensor of it written to safetensors
    python ppo_trl.py speed SPEC.json     some updates; seconds and memory written as JSON

A spec holds `models` (a folder with policy, reference, reward, value), `prompts` (lists of token ids), `out` (where to
write) and `dtype` (fp32; bf16: fp32 weights under autocast; bf16-weights). `speed` adds `arguments` (fields of
PPOConfig) and `collect` (false stubs `gc.collect` out); `dump` adds `cases` (name -> fields of PPOConfig).

The trainer's loop is not touched. It is watched from the functions that it calls: `masked_whiten` and
`accelerator.backward` look at the variables of the frame that called them.
"""

from __future__ import annotations

import json
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from datasets import Dataset
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer


class Watch(TrainerCallback):
    """Keeps what the trainer logs and when its updates end."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.logs: list[dict[str, float]] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """The first update starts here."""
        self.ends.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An update has ended; TRL's second garbage collection follows and counts to the next one."""
        self.ends.append(time.perf_counter())

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """One line per update."""
        self.logs.append(dict(logs or {}))


def make_trainer(spec: dict[str, Any], arguments: dict[str, Any]) -> tuple[PPOTrainer, Watch]:
    """The trainer on freshly loaded models."""
    # One process may make several trainers, and accelerate keeps what the first one set in singletons.
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    if spec["dtype"] == "bf16":
        # The trainer makes its Accelerator without looking at args.bf16, and transformers 5 no longer tells accelerate
        # by this variable: without it (`accelerate launch` sets it) bf16=True computes in float32.
        os.environ["ACCELERATE_MIXED_PRECISION"] = "bf16"
    folder = Path(spec["models"])
    kind = torch.bfloat16 if spec["dtype"] == "bf16-weights" else torch.float32
    heads = {
        role: AutoModelForSequenceClassification.from_pretrained(folder / role, dtype=kind)
        for role in ("reward", "value")
    }
    policies = {
        role: AutoModelForCausalLM.from_pretrained(folder / role, dtype=kind) for role in ("policy", "reference")
    }
    config = PPOConfig(
        output_dir=str(Path(spec["out"]).parent / "trl-output"),  # stays empty
        report_to="none",
        save_strategy="no",
        num_sample_generations=0,
        use_cpu=not torch.cuda.is_available(),
        bf16=spec["dtype"] == "bf16",
        gradient_checkpointing=False,
        disable_tqdm=True,
        **arguments,
    )
    watch = Watch()
    trainer = PPOTrainer(
        args=config,
        processing_class=AutoTokenizer.from_pretrained(folder / "policy", padding_side="left"),
        model=policies["policy"],
        ref_model=policies["reference"],
        reward_model=heads["reward"],
        value_model=heads["value"],
        train_dataset=Dataset.from_dict({"input_ids": spec["prompts"]}),
        callbacks=[watch],
    )
    return trainer, watch


# --- what an update computes ------------------------------------------------------------------------------------------

ROLLOUT = (
    "queries", "query_responses", "responses", "postprocessed_responses", "sequence_lengths", "padding_mask",
    "padding_mask_p1", "logprobs", "ref_logprobs", "values", "scores", "kl", "non_score_reward", "rewards", "returns",
)  # fmt: skip
MICRO = ("micro_batch_inds", "new_logprobs", "vpred", "ratio", "pg_loss", "vf_loss", "loss", "ppo_epoch_idx",
         "minibatch_idx")  # fmt: skip


class Recorder:
    """Watches one update of a trainer; `found` holds its tensors by name."""

    def __init__(self, trainer: PPOTrainer) -> None:
        self.trainer = trainer
        self.found: dict[str, torch.Tensor] = {}
        self.micro_batches = self.steps = 0
        self.whiten, self.backward = ppo_trainer.masked_whiten, trainer.accelerator.backward
        self.step = trainer.optimizer.optimizer.step
        ppo_trainer.masked_whiten = self.see_whiten
        trainer.accelerator.backward = self.see_backward
        trainer.optimizer.optimizer.step = self.see_step

    def keep(self, name: str, value: Any) -> None:
        """Copy a value of the loop, which goes on to change it."""
        self.found[name] = torch.as_tensor(value).detach().clone().contiguous()

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """What is trained, by role and name."""
        roles = {"policy": self.trainer.policy_model, "value": self.trainer.value_model}
        return {f"{role}.{name}": p for role, model in roles.items() for name, p in model.named_parameters()}

    def see_whiten(self, values: torch.Tensor, mask: torch.Tensor, shift_mean: bool = True) -> torch.Tensor:
        """The whole rollout is in the loop's variables when the advantages are whitened."""
        result = self.whiten(values, mask, shift_mean)
        loop = sys._getframe(1).f_locals
        if "returns" in loop:  # rewards are whitened earlier in the loop, by the same function
            for name in (*ROLLOUT, "context_length"):
                self.keep(name, loop[name])
            self.keep("advantages_raw", values)
            self.keep("advantages", result.masked_fill(~mask, 0))
        return result

    def see_backward(self, loss: torch.Tensor, **options: Any) -> None:
        """One micro-batch: its rows, what the models said of them, its losses, optimizer steps taken before it."""
        loop = sys._getframe(1).f_locals
        for name in MICRO:
            self.keep(f"micro.{self.micro_batches}.{name}", loop[name])
        self.keep(f"micro.{self.micro_batches}.steps_before", self.steps)
        self.micro_batches += 1
        self.backward(loss, **options)

    def see_step(self, *arguments: Any, **options: Any) -> Any:
        """A step that the optimizer really takes (accelerate leaves out those within an accumulation)."""
        if self.steps == 0:
            for name, parameter in self.parameters().items():
                if parameter.grad is not None:
                    self.keep(f"grad.{name}", parameter.grad)
        self.steps += 1
        return self.step(*arguments, **options)

    def close(self) -> dict[str, torch.Tensor]:
        """Stop watching; all that was seen, with the weights as they are now."""
        ppo_trainer.masked_whiten = self.whiten
        self.keep("micro_batches", self.micro_batches)
        self.keep("optimizer_steps", self.steps)
        for name, parameter in self.parameters().items():
            self.keep(f"after.{name}", parameter)
        return self.found


def dump(spec: dict[str, Any]) -> None:
    """One update of each case: `OUT/CASE.safetensors` with its tensors, `OUT/CASE.json` with what TRL logged."""
    out = Path(spec["out"])
    out.mkdir(parents=True, exist_ok=True)
    for name, arguments in spec["cases"].items():
        trainer, watch = make_trainer(spec, arguments)
        np.random.seed(0)  # TRL permutes minibatches with numpy's global state, which nothing in it seeds
        recorder = Recorder(trainer)
        trainer.train()
        save_file(recorder.close(), out / f"{name}.safetensors")
        (out / f"{name}.json").write_text(json.dumps(watch.logs[0]))


# --- how fast it is ---------------------------------------------------------------------------------------------------


def resident_peak() -> float:
    """Largest resident memory of this process so far, MiB (Linux: getrusage would count the parent's, before exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def speed(spec: dict[str, Any]) -> None:
    """Seconds per update, by part, and the peak of resident memory, to `out`. The first update is a warm-up."""
    trainer, watch = make_trainer(spec, spec["arguments"])
    loaded = resident_peak()
    parts: dict[str, float] = {}

    def timed(function: Callable[..., Any], part: str, training_part: str | None = None) -> Callable[..., Any]:
        """The function, its seconds added to a part after the warm-up and before the end of the last update."""

        def call(*arguments: Any, **options: Any) -> Any:
            name = training_part if training_part and torch.is_grad_enabled() else part
            started = time.perf_counter()
            result = function(*arguments, **options)
            if 1 < len(watch.ends) <= trainer.args.num_total_batches:
                parts[name] = parts.get(name, 0.0) + time.perf_counter() - started
            return result

        return call

    collect = ppo_trainer.gc.collect if spec["collect"] else lambda: 0
    ppo_trainer.gc = types.SimpleNamespace(collect=timed(collect, "gc"))
    ppo_trainer.batch_generation = timed(ppo_trainer.batch_generation, "generate")
    ppo_trainer.get_reward = timed(ppo_trainer.get_reward, "reward_and_value")
    ppo_trainer.forward = timed(ppo_trainer.forward, "reference", "train_forward")
    trainer.accelerator.backward = timed(trainer.accelerator.backward, "backward")
    trainer.optimizer.step = timed(trainer.optimizer.step, "optimizer")
    trainer.train()

    seconds = [later - earlier for earlier, later in zip(watch.ends, watch.ends[1:], strict=False)]
    counted = seconds[1:]
    per_update = {name: value / len(counted) for name, value in parts.items()}
    result = {
        "episodes_per_second": trainer.args.batch_size * len(counted) / sum(counted),
        "seconds_per_update": seconds,
        "parts": per_update | {"rest": sum(counted) / len(counted) - sum(per_update.values())},
        "peak_mib": resident_peak(),
        "loaded_mib": loaded,
        "gpu_peak_mib": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
        "mixed_precision": str(trainer.accelerator.mixed_precision),
        "eos_per_update": [line["val/num_eos_tokens"] for line in watch.logs],
        "log": watch.logs[-1],
    }
    Path(spec["out"]).write_text(json.dumps(result))


if __name__ == "__main__":
    {"dump": dump, "speed": speed}[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text()))
