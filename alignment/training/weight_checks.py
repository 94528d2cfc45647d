"""Checks of the first batch that look at weights and rows: sizes, what is trained, precision, where it starts.

Each yields what it found, or raises `Skip`; the table is `recipe/invariants.py`, who calls them `invariants.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import Trainer

from alignment.models.generation import vocabulary_size
from alignment.models.load import DTYPES, is_adapter, load_config
from alignment.pipeline import runs
from alignment.training import probe, readback
from alignment.training.subject import EXACT, Skip, Subject, dtype_name, names

NATS, NATS_ROUNDED = 1e-3, 0.03  # mean of a conversation's tokens, through another run of the program
UNUSED = 0.01  # of the probability: below it, ids without a token change no number that anybody reads


def embeddings(subject: Subject) -> Iterator[str]:
    """One row per id; tied where the base's are."""
    core, ctx = subject.core, subject.ctx
    table = core.get_input_embeddings().weight
    rows = getattr(table, "ds_shape", table.shape)[0]
    wanted = vocabulary_size(ctx.tokenizer)
    if rows < wanted:
        yield f"{rows} embedding rows for {wanted} ids of the tokenizer"
    out = core.get_output_embeddings()
    if out is None or ctx.start is None or is_adapter(ctx.start) or ctx.model.quantization is not None:
        return
    if not load_config(ctx.start, ctx.model.revision).tie_word_embeddings:
        return
    if any(p.requires_grad for p in core.get_input_embeddings().parameters()) and ctx.peft is not None:
        return  # PEFT keeps a trained copy beside the frozen table, and ties it on saving
    if out.weight is not table and (subject.sharded or out.weight.data_ptr() != table.data_ptr()):
        yield "input and output embeddings are tied in the base, and two tensors here"


def unused_rows(subject: Subject) -> Iterator[str]:
    """Ids beyond the tokenizer's are in no row and are not drawn."""
    trainer, size = subject.trainer, vocabulary_size(subject.ctx.tokenizer)
    rows = subject.core.config.get_text_config().vocab_size
    if "prompt_ids" in trainer.train_dataset.column_names or "input_ids" in trainer.train_dataset.column_names:
        for row in subject.rows:
            worst = max(max(value, default=0) for key, value in row.items() if key.endswith("ids") or key == "labels")
            if worst >= size:
                yield f"a row holds the id {worst}, the tokenizer's largest is {size - 1}"
                break
    drawn = getattr(trainer, "generation_config", None)
    if subject.ctx.row.groups and rows > size:
        suppressed = set(getattr(drawn, "suppress_tokens", None) or ())
        if not suppressed >= set(range(size, rows)):
            yield f"generation may draw the ids {size} to {rows - 1}, which have no token"
    module = getattr(trainer, "module", None)
    if module is not None and module.vocabulary > size:
        yield f"log-probabilities count {module.vocabulary} ids, the tokenizer has {size}"
    if module is None and rows > size and subject.ctx.start is not None and subject.ctx.row.publishes == "causal-lm":
        share = float(torch.softmax(_probe_logits(subject), -1)[..., size:].sum(-1).mean())
        if share > UNUSED:
            subject.notes.append(
                f"ids without a token hold {share:.1%} of the probability; TRL's log-probabilities count them, "
                "generation does not draw them"
            )


def trained_tokens(subject: Subject) -> Iterator[str]:
    """The collator trains what the table says."""
    if subject.algorithm == "reward":
        raise Skip("a reward model is trained on whole answers, not on tokens")
    trainer = subject.trainer
    free = bool(getattr(trainer.args, "padding_free", False) or getattr(trainer.args, "packing", False))
    batch = probe.collate(trainer, subject.rows)
    ids = batch["input_ids"]
    mask = batch["labels"] != -100 if "labels" in batch else batch["completion_mask"].bool()
    found, read = int(mask.sum()), int(batch["attention_mask"].sum()) if "attention_mask" in batch else ids.numel()
    if "labels" in batch:
        wanted = sum(len([label for label in row["labels"] if label != -100]) for row in subject.rows)
    else:
        sides = [key for key in ("chosen_ids", "rejected_ids", "completion_ids") if key in subject.rows[0]]
        wanted = sum(len(row[key]) for row in subject.rows for key in sides)
    if found != wanted and not free:
        yield f"the collated batch trains {found} tokens, the table says {wanted}"
    if found == 0:
        yield "no token is trained"
    if found >= read and subject.ctx.row.schema != "text":
        yield f"all of {read} tokens are trained, the prompt too"


def trainable(subject: Subject) -> Iterator[str]:
    """What is trained is what the recipe says."""
    if subject.ctx.row.build.endswith(":ppo"):
        raise Skip("policy and critic of PPO choose their own weights")
    parameters = list(subject.trainer.model.named_parameters())
    adapter = any("lora_" in name for name, _ in parameters)
    if adapter:
        own = ("lora_", "modules_to_save", "trainable_tokens")
        wrong = [name for name, p in parameters if p.requires_grad and not any(part in name for part in own)]
        if wrong:
            yield f"{len(wrong)} weights outside the adapter are trained: {names(wrong)}"
        learns = [name for name, p in parameters if p.requires_grad and ".ref." in name]
        if learns:
            yield f"the reference's adapter is trained: {names(learns)}"
    elif frozen := [name for name, p in parameters if not p.requires_grad]:
        yield f"{len(frozen)} of {len(parameters)} weights are frozen: {names(frozen)}"
    if not any(p.requires_grad for _, p in parameters):
        yield "no weight is trained"
    reference = getattr(subject.trainer, "ref_model", None)
    if reference is not None and (moving := [n for n, p in reference.named_parameters() if p.requires_grad]):
        trained = {p.data_ptr() for _, p in parameters if p.requires_grad and p.numel()}
        shared = [n for n, p in reference.named_parameters() if p.numel() and p.data_ptr() in trained]
        if shared and not subject.sharded:
            yield f"the reference shares {len(moving)} trained weights with the policy: {names(shared)}"


def precision(subject: Subject) -> Iterator[str]:
    """Stored and computed as planned."""
    trainer, ctx = subject.trainer, subject.ctx
    plan = ctx.spec.config.precision
    if ctx.model.quantization is None:
        reference = getattr(trainer, "ref_model", None)
        for where, model in (("frozen", trainer.model), ("the reference's", reference)):
            sizes: dict[torch.dtype, int] = {}
            for name, p in () if model is None else model.named_parameters():
                base = ".lora_" not in name  # adapters are small, and float32 whether they are trained or a reference
                if base and (model is reference or not p.requires_grad) and p.is_floating_point():
                    sizes[p.dtype] = sizes.get(p.dtype, 0) + getattr(p, "ds_numel", p.numel())
            most = max(sizes, key=lambda dtype: sizes[dtype], default=DTYPES[plan.weights])
            if most != DTYPES[plan.weights] and not trainer.is_deepspeed_enabled:
                yield f"{where} weights are {dtype_name(most)}, precision.weights says {plan.weights}"
    if trainer.is_deepspeed_enabled:
        if (dtype := _master_dtype(trainer)) not in (None, torch.float32):
            yield f"ZeRO's master weights are {dtype_name(dtype)}"
    elif low := [n for n, p in trainer.model.named_parameters() if p.requires_grad and p.dtype != torch.float32]:
        yield f"{len(low)} trained weights are not float32: {names(low)}"
        return  # and no pass would go through
    if ctx.row.schema != "prompts" and (computed := _computed_in(subject)) not in (None, ctx.compute):
        wanted = dtype_name(ctx.compute)
        yield f"matrix products are computed in {dtype_name(computed)}, precision.compute asks for {wanted}"


def _master_dtype(trainer: Trainer) -> torch.dtype | None:
    """Of the weights that DeepSpeed's optimizer updates; None where its layout is not known."""
    optimizer = getattr(trainer.model_wrapped, "optimizer", None)
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        if groups := getattr(optimizer, name, None):
            dtype: torch.dtype = groups[0].dtype
            return dtype
    return None


def _computed_in(subject: Subject) -> torch.dtype | None:
    """The dtype that the first linear layer puts out; None where none was asked."""
    found: list[torch.dtype] = []
    linear = next((m for m in subject.core.modules() if type(m) is torch.nn.Linear and m.out_features > 1), None)
    if linear is None:
        return None
    handle = linear.register_forward_hook(lambda module, args, output: found.append(output.dtype))
    try:
        probe.measure(subject.trainer, subject.rows[:1])
    finally:
        handle.remove()
    return found[0] if found else None


def stage(subject: Subject) -> Iterator[str]:
    """The start is the model that its stage published."""
    ctx, trainer = subject.ctx, subject.trainer
    folder = ctx.spec.parents.get(ctx.model.stage or "") or Path(ctx.model.path or "-")
    if trainer.state.global_step > 0:
        raise Skip("resumed: the policy has moved")
    record = runs.read_manifest(folder) if folder.is_dir() else None
    expected = ((record or {}).get("model") or {}).get("probe_log_prob")
    if record is None or expected is None:
        raise Skip("the start is no stage that recorded a log-probability")
    if ctx.row.publishes != "causal-lm":
        raise Skip("a reward model gives no log-probabilities")
    if ctx.model.quantization is not None:
        raise Skip("the start is quantized, and says other things than what was published")
    ids = readback.probe(ctx.tokenizer)
    if (record.get("tokenizer") or {}).get("probe_ids") != ids[0].tolist():
        raise Skip("this stage has another template or tokenizer")
    if ctx.added_tokens:
        raise Skip("the tokenizer has grown")
    found = probe.log_probability(_probe_logits(subject), ids)
    exact = subject.tolerance == EXACT and record["model"].get("probe_dtype") == "float32"
    if not abs(found - expected) <= (NATS if exact else NATS_ROUNDED):
        yield (
            f"the start gives the tokens of a fixed conversation {found:.4f} nats each, {folder.name} recorded "
            f"{expected:.4f} when it was published"
        )


def _probe_logits(subject: Subject) -> torch.Tensor:
    """What the policy says on the fixed conversation: (1, S, V)."""
    trainer = subject.trainer
    trainer.model.eval()
    ids = readback.probe(subject.ctx.tokenizer).to(trainer.args.device)
    out = trainer.model_wrapped(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    logits: torch.Tensor = out.logits.float()
    return logits
