"""Does it fit: the memory of each stage in words, the largest batch and longest row, and what would make it fit.

assess(recipe, "dpo", Machine(8), memory=80 * GIB) -> Assessment
lines(assessment)                                     for `alignment check --gpus 8 --memory 80`
brief(recipe, "dpo", machine)                         one line for `alignment run --dry-run`
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.errors import ModelError
from alignment.pipeline.memory.activations import FLOAT32
from alignment.pipeline.memory.peak import Estimate, estimate
from alignment.pipeline.memory.situation import BFLOAT16, GIB, Critic, Frozen, Sharding, Situation, Standing
from alignment.pipeline.memory.source import Machine, NotKnownError, Source, adapter_of, source
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import batch_dependent, resolve
from alignment.recipe.schema import Recipe

MIB = 2**20


@dataclass(frozen=True)
class Change:
    """A change of the recipe: the key with its value, what it costs, and the situation that it makes."""

    key: str
    cost: str
    situation: Situation


@dataclass(frozen=True)
class Assessment:
    """The memory of one stage.

    Attributes:
        stage, algorithm, ranks: which, and on how many processes.
        unknown: why nothing can be said; else None.
        found: the situation and what was assumed.
        estimate: what it comes to.
        memory: bytes of a device, if it was said.
        rows, length: the largest `batch.per_device` and the longest row that fit, each with all else as it is; None
            if nothing fits, or if the memory was not said.
        changes: what makes it fit, together; empty if it fits or if nothing does.
    """

    stage: str
    algorithm: str
    ranks: int
    unknown: str | None = None
    found: Source | None = None
    estimate: Estimate | None = None
    memory: float | None = None
    rows: int | None = None
    length: int | None = None
    changes: tuple[Change, ...] = ()

    @property
    def fits(self) -> bool | None:
        """None where it is not known."""
        if self.estimate is None or self.memory is None:
            return None
        return self.estimate.peak <= self.memory


def assess(
    recipe: Recipe, name: str, machine: Machine, *, memory: float | None = None, run: Path | None = None
) -> Assessment:
    """What a stage needs on each rank, and whether it fits.

    Args:
        machine: where it runs; a stage that trains nothing runs in one process.
        memory: bytes of a device.
        run: the run directory, in which finished parents have their folders.
    """
    stage = resolve(recipe, name)
    row = ALGORITHMS[stage.algorithm]
    machine = machine if row.config is not None else replace(machine, ranks=1)
    try:
        found = source(recipe, name, machine, run=run)
    except NotKnownError as unknown:
        return Assessment(name, stage.algorithm, machine.ranks, unknown=str(unknown))
    plan = Assessment(name, stage.algorithm, machine.ranks, found=found, estimate=estimate(found.situation))
    if memory is None:
        return plan
    s = found.situation
    legal = _legal_rows(stage.batch.global_, machine.ranks, row.smallest_batch, trains=row.config is not None)
    rows = _largest(legal, lambda count: with_rows(s, count), memory)
    lengths = range(s.prompt + 1, s.size.positions + 1)
    longest = _largest(lengths, lambda length: replace(s, length=length), memory)
    plan = replace(plan, memory=memory, rows=rows, length=longest)
    if plan.fits:
        return plan
    return replace(plan, changes=tuple(_remedy(s, legal, memory, dependent=batch_dependent(stage))))


def with_rows(s: Situation, rows: int) -> Situation:
    """The same optimizer step with other rows per pass."""
    drawn = s.drawn
    if s.method == "generate":
        drawn = rows
    elif s.drawn_by_pass is not None:
        drawn = rows * s.drawn_by_pass
    return replace(s, rows=rows, drawn=drawn)


def _legal_rows(total: int, ranks: int, least: int, *, trains: bool) -> list[int]:
    """Values of `batch.per_device` with which the rows of a step are whole passes."""
    if not trains:
        return list(range(1, 1025))
    each = total // ranks
    return [rows for rows in range(least, each + 1) if each % rows == 0] or [least]


def _largest(values: list[int] | range, changed: Callable[[int], Situation], memory: float) -> int | None:
    """The largest of ascending values that fits; None if none does."""
    low, high = 0, len(values)  # values below `low` fit, from `high` on they do not
    while low < high:
        middle = (low + high) // 2
        if estimate(changed(values[middle])).peak <= memory:
            low = middle + 1
        else:
            high = middle
    return values[low - 1] if low else None


# --- what would make it fit -------------------------------------------------------------------------------------------


def _remedy(s: Situation, legal: list[int], memory: float, *, dependent: bool) -> list[Change]:
    """The cheapest changes that make it fit: what keeps the result first, and each dearer one with as little else."""
    for change in _cheap(s, legal, memory, dependent=dependent):
        if _fits(change.situation, memory):
            return [change]
    first = [] if s.checkpointing or s.method == "generate" else [_checkpointed(s)]
    base = first[-1].situation if first else s
    batch = next(_cheap(base, legal, memory, dependent=dependent, only_batch=True), None)
    if batch is not None:
        return [*first, batch]
    for change in _dear(s):
        if _fits(change.situation, memory):
            return [change]
        at = replace(change.situation, checkpointing=base.checkpointing)
        taken = [change, *(replace(one, situation=at) for one in first)]
        if _fits(at, memory):
            return taken
        batch = next(_cheap(at, legal, memory, dependent=dependent, only_batch=True), None)
        if batch is not None:
            return [*taken, batch]
    shorter = _shorter(base, memory) if s.method == "loss" else []
    return [*first, *shorter] if shorter else []


def _shorter(s: Situation, memory: float) -> list[Change]:
    """Shorter rows: the last resort."""
    length = _largest(range(1, s.length), lambda length: replace(s, length=length), memory)
    if length is None:
        return []
    cost = "longer rows are dropped or cut, as data.on_overlong says"
    return [Change(f"train.max_length: {length}", cost, replace(s, length=length))]


def _fits(s: Situation, memory: float) -> bool:
    return estimate(s).peak <= memory


def _checkpointed(s: Situation) -> Change:
    return Change("train.gradient_checkpointing: true", "about a third more arithmetic: blocks run forward twice",
                  replace(s, checkpointing=True))  # fmt: skip


def _cheap(
    s: Situation, legal: list[int], memory: float, *, dependent: bool, only_batch: bool = False
) -> Iterator[Change]:
    """Changes that keep the result, but for rounding."""
    fewer = [rows for rows in legal if rows < s.rows]
    rows = _largest(fewer, lambda count: with_rows(s, count), memory)
    if rows is not None:
        cost = "other pairs of rows are compared, so the result differs" if dependent else "more passes of fewer rows"
        yield Change(f"batch.per_device: {rows}", cost, with_rows(s, rows))
    if s.method == "ppo":
        fewer = [2**power for power in range(s.drawn.bit_length()) if 2**power < s.drawn]
        drawn = _largest(fewer, lambda count: replace(s, drawn=count), memory)
        if drawn is not None:
            yield Change(f"train.local_rollout_forward_batch_size: {drawn}", "replies are drawn in more rounds",
                         replace(s, drawn=drawn))  # fmt: skip
    if only_batch:
        return
    if s.method != "generate" and not s.checkpointing:
        yield _checkpointed(s)
    if s.frozen == FLOAT32 and s.method != "generate" and (s.judges or s.lora is not None):
        yield Change("precision.weights: bfloat16", "frozen weights are rounded", replace(s, frozen=BFLOAT16))


def _dear(s: Situation) -> Iterator[Change]:
    """Changes that cost traffic, host memory, or another result."""
    if s.method == "generate":
        return
    if s.ranks > 1 and s.bits is None:
        bucket, live = s.sharding.bucket if s.engine else None, s.sharding.live
        for stage, file, offload, cost in (
            (2, "zero2", False, "the traffic of data parallel"),
            (3, "zero3", False, "half as much traffic again"),
            (2, "zero2_offload", True, "optimizer states in host memory: slow steps"),
            (3, "zero3_offload", True, "weights and optimizer states in host memory: slowest"),
        ):
            wanted = Sharding(stage, offload, offload and stage == 3, bucket, live)
            now = s.sharding
            if stage < now.stage or (stage == now.stage and offload <= now.offload_states):
                continue
            changed = replace(s, sharding=wanted, judges=tuple(replace(j, engine=_held(j, s, stage)) for j in s.judges))
            host = f" ({amount(estimate(changed).host)} a process)" if offload else ""
            yield Change(f"launch.deepspeed: ds_configs/{file}.json", cost + host, changed)
    if s.lora is None and s.head != "score":
        try:
            adapter = adapter_of(s.size)
        except ModelError:
            return
        judges = tuple(judge for judge in s.judges if judge.name != "reference")
        critic: Critic | None = "adapter" if s.critic is not None else None
        lora = replace(s, lora=adapter, judges=judges, critic=critic, frozen=BFLOAT16, sharding=Sharding())
        cost = f"another result: an adapter of {count(adapter.parameters)} parameters is trained"
        plain = ", launch.deepspeed: null" if s.engine else ""
        keys = f"peft: {{r: 16, target_modules: all-linear}}, precision.weights: bfloat16{plain}"
        yield Change(keys, cost, lora)
        packed = f"{cost}, on a base rounded to 4 bits; slower"
        yield Change(f"{keys}, model.quantization: {{bits: 4}}", packed, replace(lora, bits=4))
    elif s.lora is not None and s.bits is None and not s.engine:
        yield Change("model.quantization: {bits: 4}", "the base is rounded to 4 bits; slower", replace(s, bits=4))


def _held(judge: Frozen, s: Situation, stage: int) -> bool:
    """Whether DeepSpeed holds the reference: TRL's always, PPO's in stage 3 only; reward models never."""
    return judge.name == "reference" and (s.method != "ppo" or stage == 3)


# --- words ------------------------------------------------------------------------------------------------------------


def lines(plan: Assessment) -> list[str]:
    """A stage's memory, for `alignment check`."""
    if plan.unknown is not None:
        return [f"{plan.stage}: memory not known: {plan.unknown}"]
    assert plan.estimate is not None and plan.found is not None
    s, found = plan.found.situation, plan.estimate
    rows = "1 row" if s.rows == 1 else f"{s.rows} rows"
    what = f"{rows} of up to {s.length:,} tokens" if s.method != "generate" else f"{s.rows} replies at once"
    told = [f"{plan.stage} ({plan.algorithm}): {_way(plan)}, {what}"]
    for one in found.standing:
        told.append(f"  {one.name:<12} {_standing(one)}")
    terms = ", ".join(f"{name} {amount(value)}" for name, value in found.terms.items())
    rest = f", CUDA and cut-offs {amount(found.reserve)}" if found.reserve else ""
    told.append(f"  peak         {amount(found.peak)} at {found.moment}: {terms}{rest}")
    if found.host:
        told.append(f"  host         {amount(found.host)} a process, {amount(found.host * plan.ranks)} in all")
    told += [f"  assumed      {text}" for text in plan.found.assumed]
    return told + _verdict(plan)


def _verdict(plan: Assessment) -> list[str]:
    if plan.memory is None:
        return []
    of = f"{amount(plan.memory)}"
    if plan.fits:
        return [f"  fits         {of}; largest batch.per_device {plan.rows}, longest row {plan.length:,} tokens"]
    told = [f"  does not fit {of}{_alone(plan)}"]
    if not plan.changes:
        return [*told, "  remedy       none of those known here: more or larger GPUs, or a smaller model"]
    for change in plan.changes:
        told.append(f"  remedy       {change.key}  ({change.cost})")
    return [*told, f"  then         {amount(estimate(plan.changes[-1].situation).peak)}"]


def _alone(plan: Assessment) -> str:
    """What of the batch alone would have to give."""
    parts = []
    if plan.rows is not None:
        parts.append(f"batch.per_device {plan.rows} would")
    if plan.length is not None:
        parts.append(f"rows of {plan.length:,} tokens would")
    return f"; {', or '.join(parts)}" if parts else "; no batch and no row length would"


def problem(plan: Assessment) -> str | None:
    """The line that makes a check fail."""
    if plan.fits is not False:
        return None
    assert plan.estimate is not None and plan.memory is not None
    remedy = " and ".join(change.key for change in plan.changes) or "more or larger GPUs"
    return (
        f"stages.{plan.stage}: needs about {amount(plan.estimate.peak)} on each of {plan.ranks} GPUs and "
        f"{amount(plan.memory)} are there; {remedy} would make it fit"
    )


def brief(plan: Assessment, *, cuda: bool) -> str:
    """One line, for `alignment run --dry-run`."""
    if plan.unknown is not None:
        return f"not known: {plan.unknown}"
    assert plan.estimate is not None
    found = plan.estimate
    terms = sorted(found.terms.items(), key=lambda term: -term[1])[:4]
    shown = ", ".join(f"{name} {amount(value)}" for name, value in terms)
    where = "per GPU" if cuda else "per process, on the CPU"
    host = f", and {amount(found.host)} of host memory" if found.host else ""
    return f"about {amount(found.peak)} {where} at {found.moment} ({shown}){host}"


def facts(plan: Assessment) -> dict[str, Any]:
    """A stage's memory as plain values, for `--json`; bytes."""
    if plan.estimate is None:
        return {"unknown": plan.unknown}
    found = plan.estimate
    return {
        "peak": round(found.peak), "at": found.moment, "terms": {name: round(v) for name, v in found.terms.items()},
        "reserve": round(found.reserve), "host": round(found.host), "fits": plan.fits, "largest_per_device": plan.rows,
        "longest_row": plan.length, "changes": [change.key for change in plan.changes],
        "assumed": list(plan.found.assumed) if plan.found else [],
        "models": [
            {"name": one.name, "dtype": one.dtype, "trained": one.trained, "parameters": one.parameters,
             "weights": round(one.weights), "gradients": round(one.gradients), "optimizer": round(one.states)}
            for one in found.standing
        ],
    }  # fmt: skip


def _way(plan: Assessment) -> str:
    """`8 GPUs, ZeRO-3, bfloat16, checkpointing`."""
    assert plan.found is not None
    s = plan.found.situation
    devices = f"{plan.ranks} {'GPU' if s.cuda else 'CPU process'}{'s' if plan.ranks > 1 else ''}"
    parts = [devices.replace("processs", "processes")]
    if s.engine:
        parts.append(f"ZeRO-{s.sharding.stage}{' with offload' if s.sharding.offload_states else ''}")
    elif plan.ranks > 1:
        parts.append("data parallel")
    parts.append("bfloat16" if s.compute == BFLOAT16 else "float32")
    if s.method != "generate":
        parts.append("checkpointing" if s.checkpointing else "no checkpointing")
    return ", ".join(parts)


def _standing(one: Standing) -> str:
    trained = "trained" if one.trained else "frozen"
    parts = [f"{name} {amount(value)}" for name, value in
             (("weights", one.weights), ("gradients", one.gradients), ("optimizer", one.states)) if value]  # fmt: skip
    host = [f"in host memory {amount(one.host)}"] if one.host else []
    return f"{trained}, {one.what}, {count(one.parameters)} parameters, {one.dtype}: {', '.join([*parts, *host])}"


def amount(value: float) -> str:
    """`12.3 GB`, `340 MB`; a GB is 2^30 bytes, as GPUs are sold."""
    if value >= 100 * GIB:
        return f"{value / GIB:.0f} GB"
    if value >= GIB:
        return f"{value / GIB:.1f} GB"
    return f"{value / MIB:.0f} MB" if value >= 10 * MIB else f"{value / MIB:.1f} MB"


def count(number: int) -> str:
    """`8.03 B`, `41.9 M`, `12.3 k`."""
    for size, letter in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g} {letter}"
    return str(number)
