"""Proximal policy optimization on text: the trainer that stands on `transformers.Trainer`.

    rollout:  generate -> score -> advantages          one batch of prompts
    update:   epochs x minibatches x micro-batches     the clipped losses of `objectives.py`

One step of the Trainer is one update: the last optimizer step of an update is the Trainer's, those before are taken
here. So the schedule, the log and the checkpoints count updates, and a checkpoint never falls inside a rollout. All
random draws of an update come from (seed, update, rank): a resumed run draws what the uninterrupted one drew.

Schulman et al. 2017 (arXiv:1707.06347) with the reward of Ziegler et al. 2019 (arXiv:1909.08593).
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl
from trl.models.utils import unwrap_model_for_generation

from alignment.errors import RecipeError
from alignment.evaluation.metrics import Floats
from alignment.models.generation import draw, pad_id
from alignment.recipe.schema import Sampling
from alignment.training import nonfinite, objectives, ppo_setup
from alignment.training.actor_critic import ActorCritic, Drawn, Output, read
from alignment.training.ppo_checks import check_first_rollout
from alignment.training.ppo_config import PPOConfig
from alignment.training.ranks import gather, largest, match_engine, seeded, total, with_own_rate
from alignment.training.recorder import Recorder, conversations, rollout_numbers
from alignment.training.rewards import RewardSource, combine, normalizers, weights
from alignment.training.rollout import Batch, Episodes, Rollout, Scores, chunks, completion_mask
from alignment.training.trainers import Checked


class PPOTrainer(Checked, Trainer):
    """PPO with the shape of TRL's trainer.

    Args:
        model: the policy, a causal LM; or an `ActorCritic`, which brings its critic.
        args: see `PPOConfig`.
        train_dataset: rows with `prompt_ids`, `prompt` (text or messages), and any columns that rewards want.
        eval_dataset: as `train_dataset`; answered without updates.
        processing_class: the policy's tokenizer.
        reward_funcs: functions with TRL's reward signature, `RewardSource`s, or a list of both; summed by weight.
        value_model: a sequence classifier with one output that becomes the critic; None: a value head on the policy.
        ref_model: the frozen reference. None only where `model` brings its own (adapters).
        stop_ids: tokens that end a reply; default: those of the tokenizer and its template.
        peft_config: makes policy and critic adapters on `model`, which without them is the reference.
        starts_at_reference: policy and reference are the same model before the first update, which is checked.

    Raises:
        RecipeError: batches that do not divide, fewer prompts than one update needs, a missing reference.
    """

    def __init__(
        self,
        model: PreTrainedModel | ActorCritic,
        args: PPOConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        *,
        processing_class: PreTrainedTokenizerBase,
        reward_funcs: Any,
        value_model: PreTrainedModel | None = None,
        ref_model: PreTrainedModel | None = None,
        stop_ids: Sequence[int] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        peft_config: Any = None,
        starts_at_reference: bool = True,
    ):
        self.settings = args
        self.sources: list[RewardSource] = ppo_setup.reward_sources(reward_funcs)
        self.stops = ppo_setup.stop_tokens(processing_class, args) if stop_ids is None else list(stop_ids)
        self.kl_coef = args.kl_coef
        self.local_rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self.recorder = Recorder()
        self.samples: list[dict[str, Any]] = []  # of the last update, for the log
        self.kl = 0.0  # nats per episode, of the last rollout
        self.stopped: str | None = None  # why the run ended early
        self.starts_at_reference = starts_at_reference
        self._checked = False
        self.taken = 0  # optimizer steps of the update in progress
        self.module = ppo_setup.assemble(model, value_model, processing_class, args, peft_config)  # engines wrap it
        ppo_setup.require_reference(self.module, ref_model)
        super().__init__(
            model=self.module,
            args=ppo_setup.one_step_per_update(args, self.local_rows),
            data_collator=ppo_setup.collate,
            train_dataset=ppo_setup.with_prompt_ids(train_dataset, processing_class),
            eval_dataset=None if eval_dataset is None else ppo_setup.with_prompt_ids(eval_dataset, processing_class),
            processing_class=processing_class,
            callbacks=callbacks,
        )
        needed = self.local_rows * self.args.world_size
        if len(train_dataset) < needed:
            raise RecipeError(f"{len(train_dataset)} prompts are fewer than the {needed} episodes of one update")
        self.ref_model = ppo_setup.frozen(ref_model, self.accelerator)
        rows = self.local_rows // args.num_mini_batches
        match_engine(self.accelerator, rows=rows, micro_batch=args.per_device_train_batch_size)
        self.add_callback(ppo_setup.SaveControllers(self))

    # --- one update -------------------------------------------------------------------------------------------------

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Generate, score, estimate advantages, update; returns the mean loss of the update's minibatches."""
        model.train()
        self.taken = 0
        nonfinite.require_finite_weights(self)
        with self._seeded(self.state.global_step):
            self.step_rows = [nonfinite.numbers(inputs["rows"])]
            rollout = self.rollout(model, inputs["rows"])
            nonfinite.require_finite_rollout(self, rollout.parts())
            if not self._checked:
                self._checked = True
                check_first_rollout(self, model, rollout)
            loss = self._update(model, rollout)
        self._control_kl()
        return loss

    def rollout(self, model: torch.nn.Module, rows: Sequence[dict[str, Any]]) -> Rollout:
        """Draw a completion for each prompt and judge it."""
        started = time.monotonic()
        episodes = self._generate(model, rows)
        drawn = time.monotonic()
        scores = self._score(episodes)
        rollout = self._advantages(model, episodes, scores)
        judged = time.monotonic()
        numbers = rollout_numbers(rollout, scores, kl_coef=self.kl_coef, total=total)
        tokens = sum(map(len, episodes.completions))
        self.recorder.add(numbers | {"time/generate": drawn - started, "time/score": judged - drawn, "tokens": tokens})
        self.kl = numbers["objective/kl"]
        self.samples = conversations(rollout, self.settings.log_samples)
        return rollout

    def _generate(self, model: torch.nn.Module, rows: Sequence[dict[str, Any]]) -> Episodes:
        """Completions in groups of like prompt lengths, more rows at once than a backward pass could hold."""
        args = self.settings
        sampling = Sampling(temperature=args.temperature, max_new_tokens=args.response_length)
        prompts = [row["prompt_ids"] for row in rows]
        completions: dict[int, list[int]] = {}
        with self._for_generation(model) as policy:
            for indices in chunks([len(ids) for ids in prompts], args.local_rollout_forward_batch_size):
                drawn = draw(policy, self.tokenizer, [prompts[index] for index in indices], sampling, self.stops)
                completions |= dict(zip(indices, drawn, strict=True))
        replies = [completions[index] for index in range(len(rows))]
        texts = self.tokenizer.batch_decode(replies, skip_special_tokens=True)
        return Episodes(rows, prompts, replies, texts, [ids[-1] in self.stops for ids in replies])

    def _score(self, episodes: Episodes) -> Scores:
        """The reward of each finished text, (B,): sources combined, then the penalty for being cut."""
        raw: dict[str, Floats] = {}
        with nonfinite.together(self):
            for source in self.sources:
                raw[source.name] = source.score(episodes.rows, episodes.texts, episodes.finished)
        seen = {name: gather(values) for name, values in raw.items()}
        combined = combine(raw, weights(self.sources), normalizers(self.sources), seen=seen, rows=episodes.rows)
        if self.settings.missing_eos_penalty is not None:
            combined = combined - self.settings.missing_eos_penalty * ~np.array(episodes.finished)
        return Scores(combined, raw)

    def _advantages(self, model: torch.nn.Module, episodes: Episodes, scores: Scores) -> Rollout:
        """What policy, reference and critic say of every token, and the advantages that follow."""
        args = self.settings
        mask = completion_mask(episodes.completions, self.args.device)
        log_probs, reference, values, entropy = self._judge(model, episodes, mask)
        kl = objectives.kl_estimate(log_probs, reference, args.kl_estimator)
        combined = torch.tensor(scores.combined, dtype=torch.float32, device=mask.device)  # (B,)
        last_values = None
        if args.bootstrap_truncated:
            cut = torch.tensor([not done for done in episodes.finished], device=mask.device)
            ends = mask.sum(-1, keepdim=True)  # the column of the state after the last token
            last_values = torch.where(cut, values.gather(1, ends).squeeze(1), torch.zeros_like(combined))
            combined = torch.where(cut, combined.new_tensor(-(args.missing_eos_penalty or 0.0)), combined)
        rewards = objectives.token_rewards(combined, kl, mask, kl_coef=self.kl_coef)
        if args.whiten_rewards:
            rewards = objectives.masked_whiten(rewards, mask, shift_mean=False, total=total)
        before = values[:, :-1]
        raw, returns = objectives.gae(rewards, before, mask, gamma=args.gamma, lam=args.lam, last_values=last_values)
        advantages = objectives.masked_whiten(raw, mask, total=total) if args.whiten_advantages else raw
        return Rollout(
            episodes=episodes, mask=mask, log_probs=log_probs, reference=reference, values=before, entropy=entropy,
            scores=combined, kl=kl, advantages=advantages, returns=returns, raw_advantages=raw,
        )  # fmt: skip

    @torch.no_grad()
    def _judge(self, model: torch.nn.Module, episodes: Episodes, mask: Tensor) -> tuple[Tensor, ...]:
        """Log-probabilities of policy and reference (B, T), values (B, T + 1) and entropies (B, T); 0 where padded."""
        rows, longest = mask.shape
        log_probs, reference, entropy = (torch.zeros(mask.shape, device=mask.device) for _ in range(3))
        values = torch.zeros(rows, longest + 1, device=mask.device)
        size = self.settings.local_rollout_forward_batch_size
        for indices in chunks(episodes.lengths(), size):
            batch = self._batch(episodes, indices)
            width = batch.mask.shape[1]
            out = self.run(model, batch, with_entropy=True)
            log_probs[indices, :width], entropy[indices, :width] = out.log_probs, out.entropy
            values[indices, : width + 1] = out.values
            reference[indices, :width] = self.reference_log_probs(model, batch)
        return log_probs, reference, values, entropy

    def run(self, model: torch.nn.Module, batch: Batch, *, with_entropy: bool = False) -> Output:
        """Policy and critic on a batch, through the engine that trains them."""
        with self.compute_loss_context_manager():
            out: Output = model(batch=batch, temperature=self.settings.temperature, with_entropy=with_entropy)
        return out

    @torch.no_grad()
    def reference_log_probs(self, model: torch.nn.Module, batch: Batch) -> Tensor:
        """The frozen reference on the same tokens: (B, T), 0 where masked."""
        temperature = self.settings.temperature
        with self.compute_loss_context_manager(), self.accelerator.autocast():
            if self.ref_model is None:
                out: Tensor = model(batch=batch, temperature=temperature, reference=True)
                return out
            logits, _ = read(self.ref_model, batch)
        return Drawn.of(logits, batch, temperature=temperature, vocabulary=self.module.vocabulary).log_probs()

    def _update(self, model: torch.nn.Module, rollout: Rollout) -> Tensor:
        """Every epoch and minibatch; the optimizer step of the last one is left to the Trainer."""
        started = time.monotonic()
        losses: list[Tensor] = []
        for number, indices in enumerate(self._minibatches(len(rollout.episodes))):
            if number > 0:
                self._optimizer_step(model)
            self.taken, self.step_rows = number, []
            loss, approximate_kl = self._minibatch(model, rollout, indices)
            losses.append(loss)
            if self.settings.target_kl is not None and approximate_kl > self.settings.target_kl:
                break
        self.recorder.add({"time/update": time.monotonic() - started, "policy/minibatches": len(losses)})
        return torch.stack(losses).mean()

    def _minibatches(self, rows: int) -> Iterator[list[int]]:
        """The episodes of each optimizer step: a fresh permutation per epoch, cut into equal parts."""
        size = rows // self.settings.num_mini_batches
        for _ in range(self.settings.num_ppo_epochs):
            order = torch.randperm(rows).tolist()
            for start in range(0, rows, size):
                yield order[start : start + size]

    def _minibatch(self, model: torch.nn.Module, rollout: Rollout, indices: Sequence[int]) -> tuple[Tensor, float]:
        """Forward and backward of one optimizer step; returns its loss and approximate KL, the same on all ranks.

        Each token weighs the same however the minibatch is cut into micro-batches and ranks: sums are divided by the
        tokens of the whole minibatch. Gradients are averaged over ranks, hence the factor.
        """
        tokens = total(rollout.mask[list(indices)].sum())
        size = self.settings.per_device_train_batch_size
        parts = chunks(rollout.episodes.lengths(), size, indices)
        sums: Tensor | int = 0
        highest = tokens.new_zeros((), dtype=torch.float32)
        for number, part in enumerate(parts, start=1):
            last = number == len(parts)
            self.accelerator.sync_gradients = last
            with self._no_sync(model) if not last else nullcontext():
                self.step_rows = [*self.step_rows, nonfinite.numbers([rollout.episodes.rows[index] for index in part])]
                self.loss_alone = partial(self._loss_of, model, rollout, part)
                loss, stats, ratio = self._micro_batch(model, rollout, part, tokens)
                nonfinite.require_finite_loss(self, loss)  # DeepSpeed's engine updates in the backward pass
                self._backward(loss * self.args.world_size)
            sums, highest = sums + stats, torch.maximum(highest, ratio)
        assert isinstance(sums, Tensor)
        totals = total(sums)
        _, policy, value, kl, clipped, value_clipped, mean_ratio, squares = (totals / tokens).tolist()
        self.recorder.add({
            "loss/policy_avg": policy, "loss/value_avg": value, "policy/approxkl_avg": kl,
            "policy/clipfrac_avg": clipped, "val/clipfrac_avg": value_clipped, "val/ratio": mean_ratio,
            "val/ratio_var": max(squares - mean_ratio**2, 0.0), "val/ratio_max": float(largest(highest)),
        })  # fmt: skip
        return totals[0] / tokens, kl

    def _micro_batch(
        self, model: torch.nn.Module, rollout: Rollout, part: Sequence[int], tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A micro-batch's share of the minibatch's loss; sums over its tokens, for the log; its largest ratio."""
        args = self.settings
        batch = self._batch(rollout.episodes, part)
        mask, width = batch.mask, batch.mask.shape[1]

        def cut(whole: Tensor) -> Tensor:
            return whole[part, :width]

        out = self.run(model, batch)
        log_probs, old = out.log_probs, cut(rollout.log_probs)  # both 0 where masked: ratio 1, no gradient
        policy = objectives.policy_loss(log_probs, old, cut(rollout.advantages), cliprange=args.cliprange)
        value = objectives.value_loss(
            out.values[:, :-1], cut(rollout.values), cut(rollout.returns), cliprange=args.cliprange_value
        )
        policy_sum = objectives.masked_sum(policy.loss, mask)
        value_sum = objectives.masked_sum(value.loss, mask)
        loss = (policy_sum + args.vf_coef * value_sum) / tokens
        with torch.no_grad():
            difference = log_probs - old
            ratio = difference.exp()
            numbers = (
                policy.loss + args.vf_coef * value.loss, policy.loss, value.loss, difference.square() / 2,
                policy.clipped.float(), value.clipped.float(), ratio, ratio.square(),
            )  # fmt: skip
            return loss, torch.stack([objectives.masked_sum(number, mask) for number in numbers]), ratio.max()

    def _loss_of(self, model: torch.nn.Module, rollout: Rollout, part: Sequence[int], place: int) -> float:
        """The loss of one episode of a micro-batch by itself."""
        return float(self._micro_batch(model, rollout, [part[place]], rollout.mask[part[place]].sum())[0])

    def _control_kl(self) -> None:
        """Adapt the KL coefficient, or end the run, on the KL of this update's rollout."""
        args = self.settings
        if args.kl_target is not None:
            self.kl_coef = objectives.adapted_kl_coef(
                self.kl_coef, self.kl, target=args.kl_target, horizon=args.kl_horizon,
                episodes=self.local_rows * self.args.world_size,
            )  # fmt: skip
        if args.max_kl is not None and self.kl > args.max_kl:
            self.control.should_save = self.control.should_training_stop = True
            self.stopped = f"the KL to the reference reached {self.kl:.1f} nats per reply, max_kl is {args.max_kl:g}"

    # --- optimizer --------------------------------------------------------------------------------------------------

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Upstream's, with the critic's own learning rate where there is one."""
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        if self.settings.critic_learning_rate is not None:
            with_own_rate(optimizer, self.module.critic_parameters(), self.settings.critic_learning_rate)
        return optimizer

    def _optimizer_step(self, model: torch.nn.Module) -> None:
        """What the Trainer does for the last minibatch; DeepSpeed's engine has stepped in `backward`."""
        if self.args.max_grad_norm > 0:
            self._clip_grad_norm(model)
        self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
        self.optimizer.step()
        model.zero_grad()

    def _backward(self, loss: Tensor) -> None:
        # The loss is divided by the minibatch's tokens already: no engine may divide it again.
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        self.accelerator.backward(loss, **options)

    def _no_sync(self, model: torch.nn.Module) -> AbstractContextManager[Any]:
        return nullcontext() if self.is_deepspeed_enabled else self.accelerator.no_sync(model)

    def _seeded(self, update: int) -> AbstractContextManager[None]:
        """Draws that depend on nothing but seed, update and rank."""
        return seeded(self.args.seed, update, self.args.process_index, device=self.args.device)

    @contextmanager
    def _for_generation(self, model: torch.nn.Module) -> Iterator[Any]:
        """The policy, ready to draw: gathered once under ZeRO-3, key-value cache on, in eval mode."""
        gather = self.settings.ds3_gather_for_generation
        # On CPUs autocast costs a cast of every weight for every token, which bfloat16 does not earn back.
        autocast = self.accelerator.autocast() if self.args.device.type == "cuda" else nullcontext()
        with unwrap_model_for_generation(model, self.accelerator, gather_deepspeed3_params=gather) as module:
            module.eval()
            with module.as_policy() as policy, autocast:
                yield policy
            module.train()

    def _batch(self, episodes: Episodes, indices: Sequence[int]) -> Batch:
        return episodes.batch(indices, pad_id(self.tokenizer), self.args.device)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer."""
        tokenizer: PreTrainedTokenizerBase = self.processing_class
        return tokenizer

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Whole batches only: each update has the same number of episodes, and evaluation answers every prompt."""
        self.args.dataloader_drop_last = True
        loader = super().get_train_dataloader()
        self.args.dataloader_drop_last = False
        return loader

    # --- log, evaluation, files -------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Upstream's line with the flight recorder's numbers."""
        if "loss" in logs:
            logs = logs | {"episode": self.state.global_step * self.local_rows * self.args.world_size}
            logs |= self.recorder.take()
        super().log(logs, start_time)

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
        """Answer the evaluation prompts without updates; returns the rollout's numbers under `eval_`."""
        loader = self.get_eval_dataloader(self.eval_dataset if eval_dataset is None else eval_dataset)
        before, samples, kl = self.controllers(), self.samples, self.kl
        self.recorder.take()
        with self._seeded(2**32):  # beyond every update
            for batch in loader:
                self.rollout(self.model_wrapped, batch["rows"])
        found = self.recorder.take().items()
        self._restore(before)  # what was answered here must not move the training
        self.samples, self.kl = samples, kl
        numbers = {f"{metric_key_prefix}_{name}": value for name, value in found if not name.startswith("time/")}
        self.log(numbers)
        control: TrainerControl = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, numbers)
        return numbers

    def for_the_log(self) -> dict[str, Any]:
        """A few conversations of the last update."""
        return {"samples": self.samples}

    def controllers(self) -> dict[str, Any]:
        """What a resumed run needs beside weights, optimizer and the Trainer's own state."""
        return {
            "kl_coef": self.kl_coef,
            "recorder": self.recorder.state_dict(),
            "normalizers": {name: normalizer.state_dict() for name, normalizer in normalizers(self.sources).items()},
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.kl_coef = state["kl_coef"]
        self.recorder.load_state_dict(state["recorder"])
        for name, normalizer in normalizers(self.sources).items():
            normalizer.load_state_dict(state["normalizers"][name])

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        # Upstream would write policy and critic into one file, which `from_pretrained` cannot read.
        folder = Path(output_dir or self.args.output_dir)
        if self.args.should_save:
            folder.mkdir(parents=True, exist_ok=True)
            self.module.save(folder, self.module.state_dict() if state_dict is None else state_dict)
            self.tokenizer.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        self.module.load(Path(resume_from_checkpoint))

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint."""
        if resume_from_checkpoint:
            state = json.loads((Path(resume_from_checkpoint) / ppo_setup.CONTROLLERS).read_text(encoding="utf-8"))
            self._restore(state)
            self._checked = True
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
