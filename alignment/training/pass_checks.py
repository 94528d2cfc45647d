"""Checks of the first batch that look at what a pass says: of rows alone, together and padded, and of the first step.

Each yields what it found, or raises `Skip`; the table is `recipe/invariants.py`, who calls them `invariants.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from alignment.recipe.algorithms import POLICY_AND_REFERENCE
from alignment.recipe.load import batch_dependent, full_train
from alignment.training import probe
from alignment.training.subject import Skip, Subject, dtype_name, names
from alignment.training.trainers import Checked


def dropout(subject: Subject) -> Iterator[str]:
    """Random only where it is declared."""
    trainer = subject.trainer
    random = declared(subject)
    first, second = (probe.measure(trainer, subject.rows[-1:], training=True) for _ in range(2))
    differences = list(subject.differ(first, second))
    if differences and not random:
        yield f"two passes over one row differ ({'; '.join(differences)}), and no dropout is declared{_rates(subject)}"
    acts = {name for name in random if name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop")}
    if acts and first["loss"] == second["loss"]:
        yield f"{', '.join(sorted(acts))} is declared, and two passes in training mode agree: it is switched off"
    lora = float((subject.ctx.spec.config.peft or {}).get("lora_dropout") or 0)
    if lora and "lora_dropout" not in random:
        subject.notes.append(f"peft.lora_dropout {lora:g} has no effect: train.disable_dropout switches it off")


def declared(subject: Subject) -> dict[str, float]:
    """What may make two passes differ: names and rates."""
    args = subject.trainer.args
    found: dict[str, float] = {}
    if not getattr(args, "disable_dropout", False):
        config = subject.core.config.get_text_config()
        for name, value in config.to_dict().items():
            if ("drop" in name or "jitter" in name) and isinstance(value, float) and value > 0:
                found[name] = value
        for name, module in subject.trainer.model.named_modules():
            if "lora_dropout" in name and isinstance(module, torch.nn.Dropout) and module.p:
                found["lora_dropout"] = module.p
    if getattr(args, "neftune_noise_alpha", None):
        found["neftune_noise_alpha"] = float(args.neftune_noise_alpha)
    return found


def _rates(subject: Subject) -> str:
    """The modules that drop, for the message."""
    found = []
    for name, module in subject.trainer.model.named_modules():
        rates = {"p": module.p} if isinstance(module, torch.nn.Dropout) else {
            key: value for key in ("attention_dropout", "attn_dropout", "dropout")
            if isinstance(value := getattr(module, key, None), float)
        }  # fmt: skip
        found += [f"{name}.{key} = {value:g}" for key, value in rates.items() if value]
    return f"; found {names(found)}" if found else ""


def padding(subject: Subject) -> Iterator[str]:
    """A longer pad on either side changes nothing."""
    subject.auxiliary()
    trainer = subject.trainer
    if getattr(trainer.args, "padding_free", False) or getattr(trainer.args, "packing", False):
        raise Skip("rows are packed without padding")
    row = subject.rows[:1]
    for left in (False, True):
        if left and subject.algorithm == "kto":
            continue  # TRL gives the mismatched answers of the KL term the positions of the others
        padded = probe.measure(trainer, row, extra=5, left=left)
        if found := list(subject.differ(subject.alone[0], padded)):
            yield f"5 more columns of padding on the {'left' if left else 'right'} change a row: {'; '.join(found)}"


def row_alone(subject: Subject) -> Iterator[str]:
    """A row beside another says what it says alone."""
    subject.auxiliary()
    keys = subject.keys
    items = None
    alone = subject.alone
    if subject.algorithm == "sft":
        batch = probe.collate(subject.trainer, subject.rows)
        items = subject.trainer._get_num_items_in_batch([batch], _device(subject))
        alone = [probe.measure(subject.trainer, [row], items=items) for row in subject.rows]
    together = probe.measure(subject.trainer, subject.rows, items=items)
    expected = {}
    for key in keys:
        values = [numbers[key] for numbers in alone if key in numbers]
        expected[key] = sum(values) / (1 if items is not None else max(len(values), 1))
    if found := list(subject.differ(expected, together, keys)):
        yield f"{len(subject.rows)} rows alone against the same rows together: {'; '.join(found)}"


def accumulation(subject: Subject) -> Iterator[str]:
    """1 row x n passes gives what n rows x 1 pass give."""
    subject.auxiliary()
    if batch_dependent(subject.ctx.spec.config):
        raise Skip("the loss of a row depends on the other rows of its forward pass")
    one_by_one = _accumulated(subject, [[row] for row in subject.rows])
    at_once = _accumulated(subject, [subject.rows])
    yield from (
        f"1 row x {len(subject.rows)} passes against {len(subject.rows)} rows x 1 pass: {text}"
        for text in subject.differ({"loss": one_by_one}, {"loss": at_once}, ("loss",))
    )


def _accumulated(subject: Subject, parts: list[list[probe.Row]]) -> float:
    """The loss of a step that is cut into parts, scaled as `Trainer.training_step` scales it."""
    trainer = subject.trainer
    batches = [probe.collate(trainer, part) for part in parts]
    items = trainer._get_num_items_in_batch(batches, _device(subject))
    scaled = trainer.loss_is_scaled_for_ga
    if scaled is None:
        scaled = (trainer.model_accepts_loss_kwargs and items is not None) or trainer.compute_loss_func is not None
    losses = [probe.measure_batch(trainer, batch, items=items)["loss"] for batch in batches]
    return sum(losses) / (1 if scaled else len(batches))


def _device(subject: Subject) -> torch.device:
    device: torch.device = subject.trainer.args.device
    return device


def reference(subject: Subject) -> Iterator[str]:
    """Policy and reference agree on each answer, not only on the difference of two."""
    if subject.ctx.row.roles != POLICY_AND_REFERENCE:
        raise Skip("there is no reference")
    if subject.trainer.state.global_step > 0:
        raise Skip("resumed: the policy has moved")
    beta = subject.trainer.args.beta
    for numbers in subject.alone:
        for side in ("chosen", "rejected"):
            if f"rewards/{side}" not in numbers:
                continue
            policy, ratio = numbers[f"logps/{side}"], numbers[f"rewards/{side}"] / beta
            if not abs(ratio) <= subject.tolerance * max(1.0, abs(policy)):
                yield (
                    f"a {side} answer has log-probability {policy:.5g} under the policy and {policy - ratio:.5g} under "
                    "the reference; they start as the same weights"
                )
                return


# --- the first step ---------------------------------------------------------------------------------------------------


def first_loss(subject: Subject) -> Iterator[str]:
    """The loss before the first update is the one of theory."""
    expected = subject.ctx.row.expected_first_loss(full_train(subject.ctx.spec.config))
    if expected is None:
        raise Skip("theory fixes none for this loss")
    if getattr(subject.trainer, "aux_loss_enabled", False):
        raise Skip("the router's auxiliary loss is part of it")
    assert isinstance(subject.trainer, Checked) and subject.trainer.first_loss is not None
    found = subject.trainer.first_loss
    if not abs(found - expected) <= 0.02 * max(1.0, abs(expected)):
        yield (
            f"the first loss is {found:.4f}, it must be {expected:.4f}: before the first update policy and reference "
            "give the same log-probabilities (a reward head gives 0)"
        )
    else:
        subject.notes.append(f"first loss {found:.4f}, as it must be ({expected:.4f})")


def gradients(subject: Subject) -> Iterator[str]:
    """They reach what is trained and nothing else."""
    trainer = subject.trainer
    trained = [name for name, p in trainer.model.named_parameters() if p.requires_grad]
    without = [name for name in trained if name not in subject.received]
    if trainer.args.torch_compile:
        raise Skip("a compiled graph shows no single gradients")
    if without:
        yield f"{len(without)} of {len(trained)} trained weights receive no gradient: {names(without)}"
    astray = [name for name, p in trainer.model.named_parameters() if not p.requires_grad and p.grad is not None]
    if astray:
        yield f"{len(astray)} frozen weights have a gradient: {names(astray)}"
    low = sorted(dtype_name(dtype) for dtype in subject.seen_dtypes - {torch.float32})
    if low and not trainer.is_deepspeed_enabled:
        yield f"gradients are {', '.join(low)}, trained weights are float32"
    found = [p.grad for p in trainer.model.parameters() if p.grad is not None]
    learns = without or subject.ctx.row.schema == "prompts" or trainer.is_deepspeed_enabled  # equal rewards give 0
    if found and not learns and float(torch.nn.utils.get_total_norm(found)) == 0:
        yield "the norm of all gradients is exactly 0: nothing will be learned"


def optimizer(subject: Subject) -> Iterator[str]:
    """Moments in float32."""
    name = str(subject.trainer.args.optim)
    if any(word in name for word in ("8bit", "4bit", "fp8")):
        raise Skip(f"{name.rpartition('.')[2].lower()} keeps moments in fewer bits")
    states = getattr(subject.trainer.optimizer, "state", {})
    low = sorted({
        dtype_name(value.dtype) for state in states.values() if isinstance(state, dict) for value in state.values()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dtype != torch.float32
    })  # fmt: skip
    if low:
        yield f"the optimizer's state is {', '.join(low)}"
