"""What TRL's trainers that learn from their own replies (RLOO, GRPO) are given here, and what they lack.

Prompts are the ids of our token table, rewards the sources of the recipe, the reference a second copy of the policy's
own start. A checkpoint also holds the replies that are still to be trained on, so a resumed run goes on to the bit.
Upstream: trl/trainer/rloo_trainer.py, grpo_trainer.py; `tests/training/test_online.py` fails the day one of the names
that are overridden here changes.
"""

from __future__ import annotations

import copy
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl.trainer.utils import RepeatSampler

from alignment.data import templates
from alignment.errors import RecipeError, UserError
from alignment.evaluation.judges import JudgeError, row_name
from alignment.models.generation import positions, vocabulary_size
from alignment.training import nonfinite
from alignment.training.ranks import gather
from alignment.training.rewards import RewardSource

Rows = Sequence[dict[str, Any]]
FROM_TRL = ("trainer_state", "log_extra", "log_metric")  # what a reward function is given beside the rows' columns
VISION = ("image", "images")
SAMPLES = 3  # conversations in a line of the log


class Online:
    """Mixin in front of TRL's trainer, which it gives prompts, rewards and reference.

    Args:
        model: the policy; with adapters, also its own reference.
        ref_model: a second copy of a fully trained policy's start; None with adapters, or where `beta` is 0.
        reward_funcs: the sources of the recipe.

    Raises:
        RecipeError: batches, prompts or models that do not go together.
    """

    step_rows: Sequence[Sequence[int]]

    def __init__(
        self,
        model: Any,
        *,
        ref_model: PreTrainedModel | None,
        reward_funcs: Sequence[RewardSource],
        args: Any,
        train_dataset: Dataset,
        eval_dataset: Dataset | None,
        processing_class: PreTrainedTokenizerBase,
        peft_config: Any = None,
    ):
        self.sources = list(reward_funcs)
        self.stops = templates.stop_ids(processing_class)
        self.samples: list[dict[str, Any]] = []  # of the last generation, for the log
        self._rows: Rows = []
        self._last: dict[str, Any] = {}
        self._compared = False
        adapters = peft_config is not None or hasattr(model, "peft_config")
        if ref_model is None and args.beta and not adapters:
            raise RecipeError(
                "ref_model: a fully trained policy needs its reference passed: a second copy of its start"
            )
        for rows in (train_dataset, eval_dataset):
            if rows is not None:
                _require_room(model, rows, args.max_completion_length)
        _require_groups(args, train_dataset, eval_dataset)
        own = _own_arguments(model, args, self.sources, self.stops, processing_class)
        with _reference_is(ref_model, self):
            super().__init__(  # type: ignore[call-arg]
                model=model,
                reward_funcs=[self._function(source) for source in self.sources],
                args=own,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                peft_config=peft_config,
            )
        assert set(self.eos_token_ids) == set(self.stops), (self.eos_token_ids, self.stops)  # type: ignore[attr-defined]
        self.add_callback(KeepReplies(self))  # type: ignore[attr-defined]

    # --- prompts ----------------------------------------------------------------------------------------------------

    def _get_train_sampler(self, dataset: Any = None) -> RepeatSampler:
        theirs: RepeatSampler = super()._get_train_sampler(dataset)  # type: ignore[misc]
        return EpochSampler(theirs, epoch=lambda: int(self.state.epoch or 0))  # type: ignore[attr-defined]

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, Any]:
        self._rows = inputs
        if self.model.training:  # type: ignore[attr-defined]
            nonfinite.require_finite_weights(self)
        result: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        if nonfinite.ROW in inputs[0]:  # goes through TRL's shuffling and splitting with the replies
            result[nonfinite.ROWS] = torch.tensor(nonfinite.numbers(inputs))
        return result

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        found: dict[str, Any] = super()._prepare_inputs(inputs)  # type: ignore[misc]
        if self.model.training and nonfinite.ROWS in found:  # type: ignore[attr-defined]
            self.step_rows = [*self.step_rows, found[nonfinite.ROWS].tolist()]
        self._last = found
        return found

    def loss_alone(self, place: int) -> float:
        """The loss of one reply of the last forward pass by itself."""
        one = {key: value[place : place + 1] if _has_rows(value) else value for key, value in self._last.items()}
        self.model.eval()  # type: ignore[attr-defined]
        with self.compute_loss_context_manager():  # type: ignore[attr-defined]
            return float(self.compute_loss(self.model_wrapped, one))  # type: ignore[attr-defined]

    def _tokenize_prompts(self, prompts: Sequence[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The ids that were checked and shown; upstream would write the `tools` of a row nowhere."""
        assert len(prompts) == len(self._rows)
        return [list(row["prompt_ids"]) for row in self._rows], None, {}

    # --- rewards ----------------------------------------------------------------------------------------------------

    def _function(self, source: RewardSource) -> Callable[..., list[float]]:
        """A source with the signature of TRL's reward functions; what it returns is on the common scale."""

        def reward(
            prompts: Sequence[Any], completions: Sequence[Any], completion_ids: Sequence[Sequence[int]], **columns: Any
        ) -> list[float]:
            log_metric = columns["log_metric"]
            names = [name for name in columns if name not in FROM_TRL]
            rows = [
                {"prompt": prompt} | {name: columns[name][index] for name in names}
                for index, prompt in enumerate(prompts)
            ]
            replies, finished = self._texts(completion_ids)
            with nonfinite.together(self):
                raw = source.score(rows, replies, finished)
            if self.model.training:  # type: ignore[attr-defined]
                source.normalizer.update(gather(raw))  # of all ranks, in one order
            if source.normalizer.kind != "none" and not np.isnan(raw).all():
                log_metric(f"rewards/{source.name}/raw", float(np.nanmean(raw)))
            return [float(value) for value in source.normalizer(raw)]

        reward.__name__ = source.name
        return reward

    def _texts(self, completion_ids: Sequence[Sequence[int]]) -> tuple[list[str], list[bool]]:
        """Replies as text without special tokens, and whether each ended with a stop token."""
        replies = self.processing_class.batch_decode(completion_ids, skip_special_tokens=True)  # type: ignore[attr-defined]
        return replies, [ids[-1] in self.stops for ids in completion_ids]

    def _calculate_rewards(
        self, inputs: Rows, prompts: Sequence[Any], completions: Sequence[Any], completion_ids_list: Any
    ) -> Tensor:
        """Upstream's (B of all ranks, sources), NaN where a source does not apply.

        Raises:
            JudgeError: none applies to a reply. Upstream would take 0 for its advantage, and warn.
        """
        found: Tensor = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)  # type: ignore[misc]
        local = found[self.accelerator.process_index * len(inputs) :][: len(inputs)]  # type: ignore[attr-defined]
        lost = torch.isnan(found).all(dim=1)
        if lost.any():
            mine = torch.isnan(local).all(dim=1).nonzero().flatten().tolist()
            where = row_name(inputs, mine[0]) if mine else "a row of another process"
            names = ", ".join(source.name for source in self.sources)
            raise JudgeError(f"rewards: none of {names} applies to {where}; leave it out, or add a reward")
        if self.model.training:  # type: ignore[attr-defined]
            totals = (local * self.reward_weights.to(local.device)).nansum(dim=1).tolist()  # type: ignore[attr-defined]
            replies, finished = self._texts(completion_ids_list[:SAMPLES])
            self.samples = [
                {"prompt": row["prompt"][-1]["content"], "reply": reply, "score": round(total, 4), "finished": done}
                for row, reply, total, done in zip(inputs, replies, totals, finished, strict=False)
            ]
        return found

    def for_the_log(self) -> dict[str, Any]:
        """A few conversations of the last generation."""
        return {"samples": self.samples}

    # --- the first step ---------------------------------------------------------------------------------------------

    def compute_loss(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        """Upstream's loss; before the first update the policy must be its reference.

        Raises:
            UserError: the KL of the first batch is not 0.
        """
        result = super().compute_loss(model, *args, **kwargs)  # type: ignore[misc]
        if model.training and not self._compared:
            self._compared = True
            for kl in self._metrics["train"]["kl"][-1:]:  # type: ignore[attr-defined]
                self._require_zero(kl)
        return result

    def _require_zero(self, kl: float) -> None:
        args, weights = self.args, next(self.model.parameters()).dtype  # type: ignore[attr-defined]
        rounded = args.bf16 or args.fp16 or weights != torch.float32 or _dtype(self.ref_model) != torch.float32  # type: ignore[attr-defined]
        # RLOO's is the mean log-ratio d; GRPO's is exp(d) - 1 - d, about d * d / 2.
        allowed = {"RLOO": (1e-3, 0.05), "GRPO": (2e-6, 5e-3)}[self._name][rounded]  # type: ignore[attr-defined]
        if not abs(kl) <= allowed:
            raise UserError(
                f"reference: before the first update policy and reference are the same weights, so their KL must be 0, "
                f"found {kl:.3g} nats per token. Usual causes: a reference that is not the policy's start, dropout "
                "(train.disable_dropout), weights stored in another precision"
            )

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Upstream's, with the duration of a step among the durations."""
        numbers = self._metrics["train"]  # type: ignore[attr-defined]
        if "step_time" in numbers:
            numbers["time/step_time"] = numbers.pop("step_time")
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def train(self, resume_from_checkpoint: Any = None, **kwargs: Any) -> Any:
        """Train, or go on from a checkpoint with the replies that it holds."""
        if resume_from_checkpoint:
            self._compared = True
            path = self._kept(Path(resume_from_checkpoint))
            if path.exists():  # not where the checkpoint is of another number of processes: generates at once
                device = self.accelerator.device  # type: ignore[attr-defined]
                place = "cpu" if device.type == "cpu" else device  # of several processes it is cpu:0, which is no place
                self._restore(torch.load(path, map_location=place, weights_only=True))
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)  # type: ignore[misc]

    def _kept(self, folder: Path) -> Path:
        """Where a rank keeps its part: what is neither a weight nor the Trainer's."""
        accelerator = self.accelerator  # type: ignore[attr-defined]
        return folder / f"replies-{accelerator.process_index}-of-{accelerator.num_processes}.pt"

    def controllers(self) -> dict[str, Any]:
        """The position in the cycle of generations, its replies, the scales of the rewards, and what the log is due."""
        cycle = self.args.steps_per_generation * self.num_iterations  # type: ignore[attr-defined]
        return {
            "step": self._step,
            "rows": self.args.per_device_train_batch_size,  # type: ignore[attr-defined]
            "replies": self._buffered_inputs if self._step % cycle else None,
            "normalizers": {source.name: source.normalizer.state_dict() for source in self.sources},
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},  # type: ignore[attr-defined]
            "samples": self.samples,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        for source in self.sources:
            source.normalizer.load_state_dict(state["normalizers"][source.name])
        self._metrics["train"].clear()  # type: ignore[attr-defined]
        for name, values in state["metrics"].items():
            self._metrics["train"][name] = list(values)  # type: ignore[attr-defined]
        self.samples = state.get("samples", [])  # a release without them wrote none in the lines before a generation
        replies = state["replies"]
        fits = replies is None or len(replies) == self.args.steps_per_generation  # type: ignore[attr-defined]
        if fits and state["rows"] == self.args.per_device_train_batch_size:  # type: ignore[attr-defined]
            self._step, self._buffered_inputs = state["step"], replies


class KeepReplies(TrainerCallback):
    """Adds every rank's part to each checkpoint, before it is sealed."""

    def __init__(self, trainer: Online):
        self.trainer = trainer

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Upstream has written the rest."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.trainer.controllers(), self.trainer._kept(folder))


class EpochSampler(RepeatSampler):
    """TRL's sampler in an order that seed and epoch decide: upstream's begins anew where a run is resumed."""

    def __init__(self, theirs: RepeatSampler, epoch: Callable[[], int]):
        self.__dict__.update(theirs.__dict__)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch())
        yield from super().__iter__()


# --- before TRL's own __init__ ----------------------------------------------------------------------------------------


def _own_arguments(
    model: Any, args: Any, sources: Sequence[RewardSource], stops: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> Any:
    """A copy of the arguments with what the recipe says elsewhere, and the policy made to stop at the template's end.

    A model folder's own generation settings would be mixed into TRL's; ids without a token, which only pad the
    embedding matrix, are never drawn.
    """
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    core.generation_config = GenerationConfig(eos_token_id=list(stops), pad_token_id=tokenizer.pad_token_id)
    own = copy.copy(args)
    own.reward_weights = [source.weight for source in sources]
    own.remove_unused_columns = False  # rewards read the other columns
    own.shuffle_dataset = True  # the toolkit's default is for trainers whose loader shuffles
    unused = list(range(vocabulary_size(tokenizer), int(core.config.get_text_config().vocab_size)))
    own.generation_kwargs = {"eos_token_id": list(stops), "suppress_tokens": unused or None}
    return own


def _require_room(model: Any, rows: Dataset, new: int) -> None:
    """Refuse columns that TRL takes for images, and prompts after which there is no room for a reply."""
    for name in VISION:
        if name in rows.column_names:
            raise RecipeError(f"data.train: the column {name} would be taken for pictures; rename it (`columns:`)")
    limit = positions(model)
    longest = max(map(len, rows["prompt_ids"]))
    if limit is not None and longest + new > limit:
        raise RecipeError(
            f"train.max_completion_length: the longest prompt has {longest} tokens, with {new} for the reply that is "
            f"more than the model's {limit} positions; lower it, or leave out the longest prompts"
        )


def _require_groups(args: Any, train: Dataset, evaluation: Dataset | None) -> None:
    """Enough prompts for one generation; whole groups while evaluating, or rewards of two prompts would be compared."""
    prompts = args.generation_batch_size // args.num_generations
    if len(train) < prompts:
        raise RecipeError(f"data.train: {len(train)} prompts are fewer than the {prompts} of one generation")
    drawn, rows = args.num_generations_eval or args.num_generations, args.per_device_eval_batch_size * args.world_size
    if evaluation is not None and rows % drawn:
        wanted = drawn // math.gcd(drawn, args.world_size)
        raise RecipeError(
            f"batch.per_device_eval: {rows} replies of all processes are no whole groups of {drawn}; give a multiple "
            f"of {wanted}"
        )


@contextmanager
def _reference_is(reference: PreTrainedModel | None, trainer: Any) -> Iterator[None]:
    """Let TRL take this model where it would load its reference from the path in the policy's configuration.

    That path is another model once embeddings were resized, and its trainers take no `ref_model`.
    """
    theirs = next(base for base in type(trainer).__mro__ if base.__module__.startswith("trl.trainer"))
    module = sys.modules[theirs.__module__]
    loader = module.create_model_from_path

    def given(*args: Any, **kwargs: Any) -> PreTrainedModel:
        assert reference is not None, "TRL loads a model where none is wanted"
        return reference

    module.create_model_from_path = given  # type: ignore[attr-defined]
    try:
        yield
    finally:
        module.create_model_from_path = loader  # type: ignore[attr-defined]


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) or (isinstance(value, Tensor) and value.ndim > 0)


def _dtype(model: Any) -> torch.dtype:
    return torch.float32 if model is None else next(model.parameters()).dtype
