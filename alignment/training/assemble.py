"""From a planned stage to its trainer: tokenizer, rows and start weights, then arguments, model and trainer.

    ctx, trainer = assembled(Context(spec=spec, say=print, compute=torch.bfloat16))

The worker trains what this returns; `deep.py` and `probe_memory.py` look at it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, Trainer

from alignment.data import proof, templates
from alignment.data.prepare import Prepared, load_rows, prepare
from alignment.models.adapters import lora_config, merge_to_folder
from alignment.models.load import is_adapter, load_config
from alignment.models.tokenizer import fit, load_tokenizer, train_tokenizer
from alignment.recipe.load import max_length
from alignment.training import handoff, pinned
from alignment.training.actor_critic import switch_off_dropout
from alignment.training.arguments import build_arguments, is_main, resolve_import, token_cache
from alignment.training.context import Context

Table = Callable[[Context, PreTrainedTokenizerBase], Prepared]


def assembled(ctx: Context, table: Table | None = None) -> tuple[Context, Trainer]:
    """The rows (by `table`; default: the stage's own), arguments, model and trainer of a stage."""
    ctx = _prepare(ctx, table)
    args = build_arguments(ctx.spec, compute=ctx.compute, has_eval=ctx.rows.eval is not None)
    ctx = replace(ctx, args=args)
    trainer: Trainer = resolve_import(ctx.row.build)(ctx)
    _float32_where_trained(trainer)
    if getattr(args, "disable_dropout", False):
        switch_off_dropout(trainer.model)  # TRL reaches modules only, not the rates that attention reads itself
    return ctx, trainer


def _float32_where_trained(trainer: Trainer) -> None:
    """AdamW on bfloat16 weights loses most of its updates: at learning rate 5e-7, 99 of 100.

    TRL casts a quantized model's adapter to bfloat16. DeepSpeed keeps a float32 master, but without bf16 it leaves the
    weights as they come: those that passes see and that are saved would be rounded. With bf16 they stay as they come:
    beside weights that were cut while they were loaded, a head or an embedding in float32 could not be computed with.
    """
    if trainer.is_deepspeed_enabled and trainer.args.bf16:
        return
    for name, parameter in trainer.model.named_parameters():
        if hasattr(parameter, "ds_id"):
            continue
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
        assert not parameter.requires_grad or parameter.dtype == torch.float32, name


# --- before any process group exists ------------------------------------------------------------------------------


def _prepare(ctx: Context, table: Table | None = None) -> Context:
    """Tokenizer, rows and start weights: made by rank 0 while the others wait at a file, not in a collective."""
    spec, table = ctx.spec, table or _table
    folder = spec.output / "prepared"
    if is_main():
        ctx = replace(ctx, commit=pinned.commit(spec, ctx.say))
        start, added = _prepare_start(ctx, folder)
        tokenizer = load_tokenizer(folder / "tokenizer")
        data = table(ctx, tokenizer)
        handoff.ready(spec, {"start": start, "added_tokens": added, "commit": ctx.commit})
    else:
        record = handoff.wait(spec)
        start, added = record["start"], record["added_tokens"]
        ctx = replace(ctx, commit=record["commit"])
        tokenizer = load_tokenizer(folder / "tokenizer")
        data = table(ctx, tokenizer)  # from the cache
    peft = None
    if spec.config.peft is not None:
        scorer = ctx.row.publishes == "sequence-classification"
        assert start is not None  # the planner refuses an adapter on random weights
        tied = bool(load_config(start, ctx.model.revision).tie_word_embeddings)
        peft = lora_config(spec.config.peft, scorer=scorer, added_tokens=added, tied=tied)
        peft.revision = ctx.commit  # of the base, for whoever loads the adapter
    return replace(ctx, start=start, tokenizer=tokenizer, data=data, added_tokens=tuple(added), peft=peft)


def _prepare_start(ctx: Context, folder: Path) -> tuple[str | None, list[str]]:
    """The tokenizer on disk, and where the weights start; an adapter that is not trained on is merged first."""
    stage, model = ctx.spec.config, ctx.model
    start: str | None = str(ctx.spec.parents[model.stage]) if model.stage is not None else model.path
    if model.init is not None and model.init.tokenizer.train is not None:
        special = templates.template(stage.chat_template).special_tokens if stage.chat_template else ()
        data = stage.data
        assert data is not None
        rows = load_rows(
            data.train, "text", seed=stage.seed, strict=data.strict, limits=data.limits, say=lambda text: None,
            data=data,
        )  # fmt: skip
        tokenizer = train_tokenizer((row["text"] for row in rows), model.init.tokenizer.train.vocab_size, special)
    else:
        source = model.init.tokenizer.path if model.init is not None else start
        assert source is not None
        tokenizer = load_tokenizer(source, model.revision)
    added = fit(tokenizer, stage.chat_template, conversational=ctx.row.schema != "text")
    tokenizer.save_pretrained(folder / "tokenizer")
    scorer = ctx.row.publishes == "sequence-classification"
    if start is not None and is_adapter(start) and (stage.peft is not None or scorer):
        base = ctx.spec.output / "base"
        ctx.say(f"  merging the adapter {start} into its base: {base}")
        merge_to_folder(Path(start), base)
        start = str(base)
    return start, added


def _table(ctx: Context, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The token tables of the stage's rows, which rank 0 proves first."""
    if is_main():
        _prove(ctx, tokenizer)
    return _rows(ctx, tokenizer)


def _prove(ctx: Context, tokenizer: PreTrainedTokenizerBase) -> None:
    """Prove on the first rows of every source that the template trains the assistant's text, before anything else."""
    data, schema = ctx.spec.config.data, ctx.row.schema
    if data is not None and schema in proof.SCHEMAS and (rows := proof.head(data, schema)):
        found = proof.prove(tokenizer, rows, schema)
        found.enforce("chat_template")
        if found.rows:  # where the template takes none, the rows are dropped with the reason, and counted
            ctx.say(f"  template   proved on {found.rows} rows")


def _rows(ctx: Context, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The stage's token tables, from the cache where they are there already."""
    assert ctx.row.schema is not None
    return prepare(
        ctx.spec.config,
        ctx.row.schema,
        tokenizer,
        max_length=max_length(ctx.spec.config),
        cache=token_cache(ctx.spec),
        say=ctx.say,
    )
