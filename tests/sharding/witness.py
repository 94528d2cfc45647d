"""What a rank says of itself: its engine, and the bytes that it really holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cells import HIDDEN

from alignment.pipeline.plan import StageSpec

SMALL = 10 * HIDDEN  # elements up to which ZeRO-3 keeps a tensor whole, here


def inside(folder: Path, pairs: int | None = None) -> Any:
    """The function that a forked rank runs: the worker, with a witness added to its callbacks.

    Args:
        pairs: kto's KL pairs are made within so many rows, whatever the forward pass holds.
    """

    def run(spec: StageSpec, rank: int) -> int:
        from alignment.training import builders, worker

        if pairs is not None:
            mismatched = builders._with_mismatched
            builders._with_mismatched = lambda rows, size: mismatched(rows, pairs)
        if spec.config.precision.compute == "bfloat16":
            # Transformers refuses bf16 on a CPU unless `use_cpu` is said, which would switch DeepSpeed off.
            import transformers.training_args

            transformers.training_args.is_torch_bf16_gpu_available = lambda: True
        watch(folder / f"{spec.run}-{spec.attempt}-{rank}.json")
        return worker.main([str(spec.output / "stage.yaml")])

    return run


def watch(path: Path) -> None:
    """Write `path` when the training of this process ends."""
    from transformers import TrainerCallback

    from alignment.training import ppo, worker

    instrument = worker._instrument
    ppo.draw = fixed_replies

    class Witness(TrainerCallback):
        def __init__(self, trainer: Any):
            self.trainer = trainer

        def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            import forks

            forks.write(path, facts(self.trainer))

    def with_witness(ctx: Any, trainer: Any) -> Any:
        preemption = instrument(ctx, trainer)
        trainer.add_callback(Witness(trainer))
        return preemption

    worker._instrument = with_witness


def fixed_replies(policy: Any, tokenizer: Any, prompts: Any, sampling: Any, stops: Any) -> list[list[int]]:
    """Stands in for sampling, whose draws depend on the rank: replies of 2 to 12 tokens that the prompt decides.

    One generation is still run: under ZeRO-3 it gathers the policy, and its tokens are thrown away.
    """
    from alignment.models.generation import draw

    draw(policy, tokenizer, prompts, sampling, stops)
    words = [id for id in range(len(tokenizer)) if id not in set(tokenizer.all_special_ids)]
    replies = []
    for prompt in prompts:
        seed = sum(position * id for position, id in enumerate(prompt, start=1))
        length = 1 + seed % (sampling.max_new_tokens - 1)
        body = [words[(seed * 31 + 7 * step * step) % len(words)] for step in range(length)]
        replies.append([*body, stops[0]])
    return replies


def facts(trainer: Any) -> dict[str, Any]:
    """The engine of this rank's trainer, and bytes: of weights, and of the optimizer's states of trained weights."""
    model = trainer.model
    parameters = list(model.parameters())
    engine = trainer.model_wrapped if trainer.is_deepspeed_enabled else None
    optimizer = engine.optimizer.optimizer if engine is not None else trainer.optimizer
    optimizer = getattr(optimizer, "optimizer", optimizer)
    states = [value for state in optimizer.state.values() for value in state.values() if getattr(value, "ndim", 0) > 0]
    reference = getattr(trainer, "ref_model", None)
    return {
        "distributed": str(trainer.accelerator.distributed_type.value),
        "stage": 0 if engine is None else engine.zero_optimization_stage(),
        "optimizer": type(optimizer).__name__,
        "weights": sum(map(held, parameters)),
        "weights_whole": sum(map(whole, parameters)),
        "weights_small": sum(whole(p) for p in parameters if getattr(p, "ds_numel", p.numel()) <= SMALL),
        "trained": sum(getattr(p, "ds_numel", p.numel()) for p in parameters if p.requires_grad),
        "states": sum(value.numel() * value.element_size() for value in states),
        "reference": None if reference is None else sum(map(held, reference.parameters())),
        "reference_whole": None if reference is None else sum(map(whole, reference.parameters())),
        "scorers": scorers(trainer),
        "dtypes": sorted({str(p.dtype) for p in parameters if p.requires_grad}),
    }


def held(parameter: Any) -> int:
    """Bytes of a parameter that this rank keeps: its shard, or all of it where it is small enough to stay whole."""
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None or getattr(parameter, "ds_persist", False):
        return whole(parameter)
    return int(parameter.element_size() * shard.numel())


def whole(parameter: Any) -> int:
    """Bytes of a whole parameter."""
    return int(parameter.element_size() * getattr(parameter, "ds_numel", parameter.numel()))


def scorers(trainer: Any) -> list[list[int]]:
    """Bytes held and whole of each reward model that is a model of its own."""
    found = []
    for source in getattr(trainer, "sources", ()):
        for cell in getattr(source.score, "__closure__", None) or ():
            model = cell.cell_contents
            if hasattr(model, "parameters"):
                parameters = list(model.parameters())
                found.append([sum(map(held, parameters)), sum(map(whole, parameters))])
    return found
