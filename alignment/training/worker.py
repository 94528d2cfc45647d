"""One stage under `accelerate launch`: the only place where a recipe becomes a training run.

    prepare (rank 0, before any process group: tokenizer, rows, merged base) -> arguments -> model and trainer
    -> train, with the callbacks' checks -> publish -> read back -> manifest last

Rank 0 holds the stage's lock from beginning to end and writes `status.json` as its last act, because launchers do not
pass a worker's exit code on.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from alignment.errors import ChainError, Preempted, UserError
from alignment.models.load import compute_dtype
from alignment.pipeline import chains, runs, sharding
from alignment.pipeline.plan import StageSpec, read_stage
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.credentials import Masked
from alignment.training import (
    callbacks,
    early,
    exact,
    handoff,
    invariants,
    nonfinite,
    outcome,
    publish,
    ranks,
    storage,
    watchdog,
)
from alignment.training.arguments import (
    accumulation,
    is_main,
    resolve_import,
    world_size,
)
from alignment.training.assemble import assembled
from alignment.training.context import Context
from alignment.training.quiet import quiet

PR_SET_PDEATHSIG = 1


def main(argv: list[str]) -> int:
    """Run one stage as this launch's rank; returns the exit code of the table in `errors.py`."""
    die_with_parent()
    sys.stdout, sys.stderr = Masked(sys.stdout), Masked(sys.stderr)
    quiet()
    parser = argparse.ArgumentParser(prog="alignment.train", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a stage.yaml written by `alignment run`, or a recipe")
    parser.add_argument("--stage", help="with a recipe: the stage to run")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="with a recipe: override a key")
    parser.add_argument("--run", help="with a recipe: name of the run directory (default: the recipe's name)")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="where run directories are (default: runs)")
    parser.add_argument("--logs", type=Path, help="a folder for the output of every rank but 0 (default: the terminal)")
    parser.add_argument("--measure-memory", action="store_true", help="what `alignment check --probe` starts")
    arguments = parser.parse_args(argv)
    if arguments.logs is not None and not is_main():
        _redirect(arguments.logs / f"rank-{os.environ['RANK']}.log")
    try:
        if arguments.stage is None:
            spec = read_stage(arguments.file)
        else:
            spec = handoff.plan_by_hand(
                arguments.file, arguments.stage, overrides=arguments.set, run=arguments.run, runs_folder=arguments.runs
            )
    except UserError as error:
        print(f"alignment: {error}", file=sys.stderr)
        return int(error.code)
    if arguments.measure_memory:
        from alignment.training.probe_memory import measure

        return run_stage(spec, measure)
    return run_stage(spec)


def die_with_parent() -> None:
    """Get SIGTERM when the launcher dies: `accelerate launch` with one process would leave an orphan that trains on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _redirect(path: Path) -> None:
    """Append all that this process and its libraries print to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    print(f"-- {time.strftime('%Y-%m-%dT%H:%M:%S%z')} on {socket.gethostname()}", flush=True)


def run_stage(spec: StageSpec, work: Callable[[StageSpec], None] | None = None) -> int:
    """Run a planned stage to its end and return the exit code; the status file says the same.

    Args:
        work: what is done with it; default: it is trained and published.
    """
    handlers = {number: signal.getsignal(number) for number in callbacks.STOPPING}
    try:
        return outcome.of(spec, lambda dog: _run(spec, dog) if work is None else work(spec), say=_say)
    finally:  # in one process with others (`--smoke`), the next Ctrl-C is not this stage's
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: not set from Python


def _say(text: str) -> None:
    if is_main():
        print(text, flush=True)


def _run(spec: StageSpec, dog: watchdog.Watchdog) -> None:
    """The stage itself."""
    started = time.monotonic()
    row = ALGORITHMS[spec.config.algorithm]
    for folder in spec.parents.values():
        if runs.read_manifest(folder) is None:
            runs.verify_parent(folder)  # says what to do
    chains.admit(spec)  # what was forced when the stage was planned stands in its `forced`
    compute = compute_dtype(spec.config.precision.compute)
    ctx = Context(spec=spec, say=_say, compute=compute)
    if row.config is None:
        metrics = resolve_import(row.build)(ctx)()
        _finish(ctx, {"files": _plain_files(spec)}, metrics, started)
        return
    ctx, trainer = assembled(ctx)
    preemption = _instrument(ctx, trainer)
    dog.follow(trainer)
    _header(ctx, trainer)
    checkpoint = _checkpoint(spec)
    if checkpoint is not None:
        plugin = ctx.args.deepspeed_plugin
        now = sharding.Engine(0 if plugin is None else int(plugin.zero_stage), world_size())
        if problem := sharding.resume_problem(checkpoint, now, spec.config.algorithm):
            raise ChainError(problem)
    exact.refuse_inexact(trainer, checkpoint, _say)
    trainer.callback_handler.callbacks.insert(0, exact.Exact(trainer, spec.output / runs.LOG, checkpoint))
    with storage.told(spec.output, storage.checkpoint_bytes(trainer)):
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if preemption.left is not None:
        raise Preempted(
            f"left on signal {preemption.left} after step {trainer.state.global_step} of "
            f"{trainer.state.max_steps}, saved; run the same command again to go on"
        )
    if getattr(trainer, "stopped", None):
        _say(f"  stopped after update {trainer.state.global_step}: {trainer.stopped}")
    nonfinite.require_finite_weights(trainer)
    metrics = _metrics(ctx, trainer)
    with storage.told(spec.output, storage.checkpoint_bytes(trainer)):
        published = publish.publish(ctx, trainer, metrics)
    if published is not None:
        _finish(ctx, published, metrics, started)
    ranks.meeting("published")()


# --- around training ----------------------------------------------------------------------------------------------


def _instrument(ctx: Context, trainer: Trainer) -> callbacks.Preemption:
    """Add our callbacks and remove upstream's printers."""
    spec, row = ctx.spec, ctx.row
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    preemption = callbacks.Preemption(trainer.args.device)
    nonfinite.follow_rows(trainer)
    wait = ranks.meeting("sealed")
    for callback in (
        preemption,
        nonfinite.Finite(trainer),
        invariants.FirstBatch(ctx, trainer, _say),
        early.Early(spec.stage, _say),
        callbacks.Log(spec.output / runs.LOG, getattr(trainer, "for_the_log", dict)),
        callbacks.Progress(spec.stage, row.metric),
        callbacks.Seal(fingerprint_sha256=spec.fingerprint_sha256, keep=spec.config.checkpoints.keep, wait=wait),
    ):
        trainer.add_callback(callback)
    return preemption


def _checkpoint(spec: StageSpec) -> Path | None:
    """The newest whole checkpoint; what is passed over is said."""
    found, passed_over = runs.latest_sealed(spec.output, spec.fingerprint_sha256)
    for line in passed_over:
        _say(f"  passed over {line}")
    if found is not None:
        _say(f"  resuming from {found.name}")
    return found


def _header(ctx: Context, trainer: Trainer) -> None:
    """What goes in, what comes out, how much is trained."""
    spec = ctx.spec
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    total, trained = sum(size for size, _ in sizes), sum(size for size, flag in sizes if flag)
    precision = "bfloat16" if ctx.compute == torch.bfloat16 else "float32"
    report = ctx.rows.report["train"]
    _say(f"  from       {ctx.model.stage or ctx.start or 'random weights'}")
    _say(f"  to         {spec.output}")
    tokens = f"{report['trained_tokens']:,} trained of {report['tokens']:,} tokens"
    if ctx.row.schema == "prompts":
        tokens = f"{report['tokens']:,} tokens of prompts"
    _say(f"  rows       {len(ctx.rows.train):,} (read {sum(s['rows_in'] for s in report['sources']):,}), {tokens}")
    _say(f"  trains     {trained:,} of {total:,} parameters, computes in {precision}")


def _metrics(ctx: Context, trainer: Trainer) -> dict[str, float]:
    """The numbers of the stage under TRL's names: the evaluation of what is published, and the last training log."""
    history = trainer.state.log_history
    metrics: dict[str, float] = {}
    if ctx.rows.eval is not None:
        last = [entry for entry in history if "eval_loss" in entry][-1:]
        current = last and last[0]["step"] == trainer.state.global_step and not trainer.args.load_best_model_at_end
        metrics |= last[0] if current else trainer.evaluate()
    metrics |= next((entry for entry in reversed(history) if "loss" in entry), {})
    return {
        key: float(value)
        for key, value in metrics.items()
        if isinstance(value, int | float)
        and key not in ("epoch", "step")
        and not (key.endswith(callbacks.UNDER_TIME) or key.startswith("time/"))
    }


def _plain_files(spec: StageSpec) -> dict[str, dict[str, Any]]:
    """The files of a stage that publishes no model: what it left beside our own records."""
    ours = {runs.STAGE, runs.STATUS, runs.LOG, runs.METRICS, runs.MANIFEST, runs.OUTPUT, "lock"}
    return {name: entry for name, entry in runs.settle(spec.output).items() if name not in ours}


def _finish(ctx: Context, published: dict[str, Any], metrics: dict[str, float], started: float) -> None:
    """metrics.json, then the manifest: from here on the stage is done."""
    spec, stage = ctx.spec, ctx.spec.config
    runs.write_json(spec.output / runs.METRICS, metrics)
    batch = None
    if ctx.args is not None:
        processes = world_size()
        batch = {
            "global": stage.batch.global_, "per_device": stage.batch.per_device, "processes": processes,
            "accumulation": accumulation(stage, processes),
        }  # fmt: skip
    if not is_main():
        return
    record = publish.manifest(
        spec,
        published,
        kind=ctx.row.publishes,
        data=None if ctx.data is None else ctx.data.report,
        batch=batch,
        metrics=metrics,
    )
    record |= {"checks": invariants.recorded(spec.output)}
    runs.write_manifest(spec.output, record | {"time": {"seconds": round(time.monotonic() - started, 1)}})
