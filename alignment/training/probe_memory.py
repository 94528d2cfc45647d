"""`alignment check RECIPE --probe`: two optimizer steps of each stage at the longest row, and the peak beside the plan.

Models have the sizes of the recipe's and weights of zeros, rows are made up, everything else is the stage's own:
launcher, DeepSpeed file, arguments, builders, trainer, callbacks. So it needs config.json and tokenizer of a model and
no finished parent, and all that it writes is in a temporary folder. Measured is `torch.cuda.max_memory_allocated` of
the rank that needs most, loading included; on a CPU the highest point of torch's allocator.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import SaveStrategy

from alignment.data.prepare import Prepared
from alignment.errors import ModelError, RecipeError, UserError
from alignment.models.blank import blank_adapter, blank_model, blank_tokenizer
from alignment.models.load import compute_dtype
from alignment.models.tokenizer import fit, load_tokenizer
from alignment.pipeline import launch, runs
from alignment.pipeline import plan as planning
from alignment.pipeline.execute import this_machine
from alignment.pipeline.files import digest, read_json
from alignment.pipeline.memory.plan import Assessment, amount, assess
from alignment.pipeline.memory.source import Found, models
from alignment.pipeline.plan import StageSpec
from alignment.pipeline.supervise import run as supervised
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import full_train, resolve
from alignment.recipe.schema import Recipe, Resolved
from alignment.training.arguments import accumulation
from alignment.training.assemble import assembled
from alignment.training.context import Context

ALLOWED = 1.15  # measured over planned
SHORTER = 7  # tokens by which the other rows of a batch are shorter, so that it is padded
WORD = " a"  # one token, or two, of any tokenizer
TEMPLATE_TOKENS = 24  # of the longest prompt, left to the chat template of a reward model
SHAPE = "shape.json"  # beside stage.yaml: what the rows must be
# Keys of `train:` that need rows to evaluate on, or say when to stop.
LEFT_OUT = ("eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "load_best_model_at_end", "num_train_epochs",
            "metric_for_best_model", "greater_is_better", "num_generations_eval", "total_episodes")  # fmt: skip


@dataclass(frozen=True)
class Probed:
    """One stage: bytes planned (tensors, without the plan's reserve) and measured, and the planned moment.

    `problem`: why there is no measurement, or why it makes the check fail; else None.
    """

    stage: str
    planned: float
    moment: str
    measured: int | None = None
    problem: str | None = None

    @property
    def line(self) -> str:
        """What is printed of it."""
        told = f"{self.stage}: planned {amount(self.planned)}"
        if self.measured is not None:
            told += f", measured {amount(self.measured)} ({self.planned / self.measured:.2f}), at {self.moment}"
        return told if self.problem is None else f"{told}; {self.problem}"


def probe(recipe: Recipe, names: Sequence[str], *, run: Path, say: Callable[[str], None]) -> list[Probed]:
    """Measure stages one after the other; those that train nothing are passed over.

    Args:
        run: the run directory, in which finished parents have their folders; it is only read.

    Raises:
        RecipeError: the memory of a stage cannot be planned, or it cannot be launched on this machine.
        UserError: a stage fails for another reason than memory; the message is the worker's.
    """
    training = [name for name in names if ALGORITHMS[resolve(recipe, name).algorithm].config is not None]
    for name in names:
        if name not in training:
            say(f"{name}: not probed: it trains nothing")
    plans = {name: assess(recipe, name, this_machine(resolve(recipe, name).launch), run=run) for name in training}
    unknown = [f"stages.{name}: memory not known: {plan.unknown}" for name, plan in plans.items() if plan.unknown]
    if unknown:
        raise RecipeError(unknown)
    found = []
    for plan in plans.values():
        with tempfile.TemporaryDirectory(prefix="alignment-probe-") as folder:
            spec = _stand_in(recipe, plan, Path(folder), run, say)
            launch.refuse_impossible(spec)
            _launch(spec, planning.write_stage(spec))
            found.append(_compared(plan, spec))
        say(found[-1].line)
    return found


def _launch(spec: StageSpec, stage_yaml: Path) -> None:
    """Through the launcher of a real run; what it prints is kept for the case that it fails."""
    command = [*launch.command(spec, stage_yaml), "--measure-memory"]
    ended = supervised(command, {**os.environ, **launch.settings(spec)}, output=spec.output / runs.OUTPUT)
    if ended.stopped_by is not None:
        raise KeyboardInterrupt


def _compared(plan: Assessment, spec: StageSpec) -> Probed:
    """What the ranks left behind, beside the plan."""
    assert plan.estimate is not None
    planned = Probed(plan.stage, plan.estimate.allocated, plan.estimate.moment)
    records = [json.loads(file.read_text()) for file in sorted(spec.output.glob("memory-*.json"))]
    for record in records:
        if record["out_of_memory"]:
            text = f"does not fit: out of memory with {amount(record['peak'])} in use on rank {record['rank']}"
            return replace(planned, problem=f"{text} ({record['device']})")
    status = runs.read_status(spec.output) or {}
    if status.get("state") == "running":
        return replace(planned, problem="does not fit: killed, most likely because the machine ran out of memory")
    if len(records) < plan.ranks:
        log = spec.output / runs.OUTPUT
        tail = log.read_text(errors="replace").splitlines()[-20:] if log.is_file() else []
        message = status.get("message") or "the worker left no word"
        raise UserError("\n".join([f"stages.{plan.stage}: {message}", *tail]))
    measured = max(int(record["peak"]) for record in records)
    above = measured > ALLOWED * planned.planned
    more = f"that is {measured / planned.planned - 1:.0%} above the plan, and {ALLOWED - 1:.0%} is allowed"
    return replace(planned, measured=measured, problem=more if above else None)


# --- the stage that is measured ---------------------------------------------------------------------------------------


def _stand_in(recipe: Recipe, plan: Assessment, folder: Path, run: Path, say: Callable[[str], None]) -> StageSpec:
    """The stage with blank models, made-up rows and two steps, in a folder of its own."""
    assert plan.found is not None
    name, s = plan.stage, plan.found.situation
    stage = resolve(recipe, name)
    passes = _passes(stage, plan.ranks)
    steps, rows = 2, stage.batch.per_device * passes * plan.ranks
    if s.method == "online":  # the second time that replies are drawn, optimizer states are there
        train = full_train(stage)
        cycle = s.drawn // stage.batch.per_device * int(train.get("num_iterations") or 1)
        steps = 1 + math.ceil(cycle / passes)
    whole = accumulation(stage, plan.ranks)
    cut = f" of the recipe's {whole}" if whole != passes else ""
    say(
        f"{name}: {steps} steps; passes a step: {passes}{cut}, rows a pass: {s.rows}, tokens a row: up to "
        f"{s.length:,}, {'GPUs' if s.cuda else 'processes'}: {plan.ranks}"
    )
    start, rewards = models(recipe, name, run=run)
    makes = _Maker(folder / "models", stage)
    content = stage.model_dump(mode="json", by_alias=True, exclude_none=True)
    content |= {
        "data": {"train": [{"path": "made-up.jsonl"}]}, "batch": content["batch"] | {"global": rows}, "report_to": [],
        "model": makes.start(content["model"], start),
        "rewards": [makes.reward(one, found) for one, found in zip(content["rewards"], rewards, strict=True)],
        "train": {key: value for key, value in stage.train.items() if key not in LEFT_OUT} | {"max_steps": steps},
    }  # fmt: skip
    if s.method == "ppo":  # no reply ends before it is as long as it may be
        content["train"] |= {"num_ppo_epochs": 1, "stop_token_id": 2**31 - 1}
    else:
        content["train"]["train_sampling_strategy"] = "sequential"
    if "accelerate" in content["launch"]:
        content["launch"].pop("processes", None)
    spec = StageSpec(
        run="probe", stage=name, output=folder / name, config=planning.locate(Resolved.model_validate(content)),
        parents={}, fingerprint={}, attempt=runs.new_attempt(), recipe_path=folder / runs.RECIPE, runs=folder,
    )  # fmt: skip
    spec.output.mkdir()
    runs.write_json(spec.output / SHAPE, {"schema": 1, "length": s.length, "prompt": s.prompt, "rows": rows * steps})
    return spec


def _passes(stage: Resolved, ranks: int) -> int:
    """The fewest forward passes of an optimizer step (of an update, in PPO) with the peak of all of them.

    Gradients of earlier passes are there from the second pass on. PPO draws and judges so many episodes at once;
    `rloo` and `grpo` draw for all passes, so none is left out.
    """
    whole, rows, train = accumulation(stage, ranks), stage.batch.per_device, full_train(stage)
    if ALGORITHMS[stage.algorithm].schema != "prompts":
        return min(whole, 2)
    if stage.algorithm != "ppo":
        return whole
    parts, drawn = int(train["num_mini_batches"]), int(train["local_rollout_forward_batch_size"])

    def reaches(passes: int) -> bool:
        episodes, all_ = passes * rows, whole * rows
        same_step = min(episodes // parts, 2 * rows) == min(all_ // parts, 2 * rows)
        return episodes % parts == 0 and episodes >= min(drawn, all_) and same_step

    return next(passes for passes in range(1, whole + 1) if reaches(passes) or passes == whole)


class _Maker:
    """Makes the blank models of a stage, each once: a reward model may stand on the policy's base."""

    def __init__(self, folder: Path, stage: Resolved):
        self.folder, self.stage = folder, stage

    def start(self, model: dict[str, Any], found: Found) -> dict[str, Any]:
        """The `model:` of the stage."""
        kept: dict[str, Any] = {key: model[key] for key in ("attention", "quantization") if key in model}
        if "init" in model:
            folder = self.folder / "tokenizer"
            self._tokenizer(found, fitted=False).save_pretrained(folder)
            return {**kept, "init": {"config": model["init"]["config"], "tokenizer": {"path": str(folder)}}}
        return {**kept, "path": str(self._folder(found, scorer=False, fitted="stage" in model))}

    def reward(self, reward: dict[str, Any], found: Found | None) -> dict[str, Any]:
        """One of `rewards:`; a function is not called, any number will do."""
        if reward.get("function"):
            return reward | {"function": "alignment.training.smoke:length_reward"}
        if found is None:
            return reward
        return reward | {"model": str(self._folder(found, scorer=True, fitted=reward["model"].startswith("stage:")))}

    def _folder(self, found: Found, *, scorer: bool, fitted: bool) -> Path:
        """A folder with the model; `fitted`: a stage of the recipe publishes it, with the template's tokens."""
        tokenizer = self._tokenizer(found, fitted=fitted)
        whole = scorer and found.adapter is None
        base = self.folder / digest([found.base, whole])[:12]
        if not base.exists():
            blank_model(found.config, tokenizer, base, scorer=whole, name=found.base)
        if found.adapter is None:
            return base
        adapter = self.folder / digest([found.base, found.adapter, scorer])[:12]
        if not adapter.exists():
            blank_adapter(base, found.adapter, tokenizer, adapter, scorer=scorer)
        return adapter

    def _tokenizer(self, found: Found, *, fitted: bool) -> PreTrainedTokenizerBase:
        template = self.stage.chat_template
        if isinstance(found.tokenizer, int):
            tokenizer = blank_tokenizer(found.tokenizer, template)
        else:
            tokenizer = load_tokenizer(found.tokenizer)
        if fitted and template is not None:
            fit(tokenizer, template, conversational=True)
        return tokenizer


# --- in the worker ----------------------------------------------------------------------------------------------------


def measure(spec: StageSpec) -> None:
    """Run the stage's steps on this rank and leave the peak in `memory-RANK.json`.

    Raises:
        UserError: out of memory; the file says so, too.
    """
    rank, ran_out = int(os.environ.get("RANK", "0")), False
    with _watched() as peak:
        try:
            _steps(spec)
        except (RuntimeError, ModelError) as error:
            if not _out_of_memory(error):
                raise
            ran_out = True
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    record = {"schema": 1, "rank": rank, "peak": peak(), "out_of_memory": ran_out, "device": device}
    runs.write_json(spec.output / f"memory-{rank}.json", record)
    if ran_out:
        raise UserError("out of memory")


def _steps(spec: StageSpec) -> None:
    """The steps alone: what is checked of a first batch does not hold of weights that are zero."""
    if not torch.cuda.is_available():
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # the profiler does not see what other threads allocate
    compute = compute_dtype(spec.config.precision.compute)
    ctx, trainer = assembled(Context(spec=spec, say=lambda text: None, compute=compute), _table)
    trainer.args.save_strategy = SaveStrategy.NO
    # A reward model reads as many tokens as were drawn, whatever they are.
    ctx.tokenizer.batch_decode = lambda replies, **kwargs: [WORD * len(reply) for reply in replies]
    if ctx.row.groups:  # no reply ends before it is as long as it may be
        trainer.generation_config.min_new_tokens = trainer.args.max_completion_length
    trainer.train()
    trainer.accelerator.wait_for_everyone()


def _table(ctx: Context, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """Rows of the longest length and a little shorter ones; the answer is nearly all of a row, as the plan assumes."""
    shape = read_json(ctx.spec.output / SHAPE, schema=1, error=UserError)
    assert shape is not None
    token = tokenizer(WORD, add_special_tokens=False)["input_ids"][-1]
    per_device, length, prompt = ctx.spec.config.batch.per_device, shape["length"], shape["prompt"]
    asked = prompt or min(16, length // 2)

    def row(index: int) -> dict[str, Any]:
        shorter = 0 if index % per_device == 0 else min(SHORTER, length - asked - 1)
        ids, answer = [token] * (length - shorter), [token] * (length - asked - shorter)
        if ctx.row.schema in ("text", "messages"):
            return {"input_ids": ids, "labels": ids}
        if ctx.row.schema == "preference":
            less = answer[: max(1, length - asked - SHORTER)]
            return {"prompt_ids": [token] * asked, "chosen_ids": [token] * (length - asked), "rejected_ids": less}
        if ctx.row.schema == "unpaired":
            return {"prompt_ids": [token] * asked, "completion_ids": answer, "label": index % 2 == 0}
        shorter = 0 if index % per_device == 0 else min(SHORTER, prompt - 1)
        turn = {"role": "user", "content": WORD * max(1, prompt - TEMPLATE_TOKENS)}
        return {"prompt_ids": [token] * (prompt - shorter), "prompt": [turn]}

    rows = Dataset.from_list([row(index) | {"row": index} for index in range(shape["rows"])])
    return Prepared(rows, None, {})


def _out_of_memory(error: BaseException | None) -> bool:
    """Whether the device's memory ran out, or the host's, also below what our own loading made of it."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            return True
        error = error.__cause__
    return False


@contextmanager
def _watched() -> Iterator[Callable[[], int]]:
    """A function that gives the bytes at the highest point of what is done inside, once it is done."""
    if torch.cuda.is_available():
        yield lambda: max(torch.cuda.max_memory_allocated(index) for index in range(torch.cuda.device_count()))
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield lambda: _highest(profiler)


def _highest(profiler: torch.profiler.profile) -> int:
    """The largest sum of what was allocated and freed so far, from torch's `[memory]` events."""
    results = profiler.profiler.kineto_results
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    highest = here = 0
    for _, size in sorted(events):
        here += size
        highest = max(highest, here)
    return highest
