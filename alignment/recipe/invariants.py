"""What must be true of a training run: the table of the checks that every run makes, and of those of `check --deep`.

A row says what is looked at and what a failure usually means; the function of the same name is in
`alignment.training.invariants`. The documentation (`recipes/checks.md`) is held against this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

When: TypeAlias = Literal["start", "first step", "deep"]
Kind: TypeAlias = Literal["offline", "online", "all"]


@dataclass(frozen=True)
class Invariant:
    """One check.

    Attributes:
        name: what messages, the manifest and `skip_checks` call it.
        holds: what must be true.
        cause: what a failure usually means.
        when: before the first step, at it, or in `alignment check --deep`.
        kind: `offline` for algorithms that learn from rows, `online` for those that learn from their own replies.
        optional: it may be named in `skip_checks`.
    """

    name: str
    holds: str
    cause: str
    when: When = "start"
    kind: Kind = "all"
    optional: bool = True


INVARIANTS: dict[str, Invariant] = {
    row.name: row
    for row in (
        Invariant(
            "embeddings",
            "as many embedding rows as the tokenizer has ids, tied where the base's are",
            "a tokenizer that grew and a model that was not resized, or resizing that cut the tie",
            optional=False,
        ),
        Invariant(
            "unused-rows",
            "rows beyond the tokenizer's ids are never a token of a row or a label, and never drawn",
            "a token table made with another tokenizer, or generation settings that do not suppress them",
            optional=False,
        ),
        Invariant(
            "trained-tokens",
            "the collated batch trains the tokens that the table says, more than none and (but for pretrain) not all",
            "padding masked by token value where pad is eos, a collator that cuts, or a mask that is all ones",
            kind="offline",
        ),
        Invariant(
            "trainable",
            "every weight is trained, or with an adapter the adapter and what it saves, and nothing else",
            "a layer frozen before training, a base that was not frozen under its adapter, or a reference that learns",
        ),
        Invariant(
            "precision",
            "trained weights are float32 or have a float32 master, frozen ones and autocast are as `precision` says",
            "a library that casts on loading, or mixed precision that was switched on or off behind the recipe",
        ),
        Invariant(
            "dropout",
            "two passes over one row in training mode agree where no dropout is declared, and differ where it is",
            "dropout that attention reads from the configuration, which `disable_dropout` does not reach",
            kind="offline",
        ),
        Invariant(
            "padding",
            "a longer pad, and padding on the left, change no number of a row",
            "a loss that averages over padding, a mask that is ignored, a reward read at the last column",
            kind="offline",
        ),
        Invariant(
            "row-alone",
            "a row gives the same numbers alone and beside another",
            "a loss that depends on the length of its neighbours, or attention between rows",
            kind="offline",
        ),
        Invariant(
            "accumulation",
            "n rows at once and n times one row, accumulated, give the same loss",
            "a loss that is divided by the number of accumulated passes twice, or not at all, or averaged per pass",
            kind="offline",
        ),
        Invariant(
            "reference",
            "before the first update policy and reference give a row the same log-probability",
            "a reference that is not the policy's start (the base instead of the SFT model), or dropout",
            kind="offline",
        ),
        Invariant(
            "stage",
            "the start gives a fixed conversation the log-probability that its stage recorded when it was published",
            "another model than the stage's: an adapter that is not on its base, a base instead of what was trained",
        ),
        Invariant(
            "first-loss",
            "the first loss is the one that theory gives where policy and reference agree",
            "a reference that is not the policy's start, dropout, another template or tokenizer",
            when="first step",
            kind="offline",
        ),
        Invariant(
            "gradients",
            "every trained weight receives a gradient and no frozen one does; they are not all zero",
            "gradient checkpointing that cuts the graph under a frozen embedding, or a layer that nothing uses",
            when="first step",
        ),
        Invariant(
            "optimizer",
            "the optimizer's moments are float32, unless `train.optim` asks for 8 bits",
            "weights that were cast after the optimizer was made",
            when="first step",
        ),
        Invariant(
            "learning-rate-zero",
            "a step at learning rate 0 changes no weight",
            "weight decay or noise outside the optimizer, a callback that writes weights, a norm that keeps statistics",
            when="deep",
            kind="offline",
        ),
        Invariant(
            "accumulated-gradients",
            "n rows at once and n times one row, accumulated, give the same gradient",
            "as of accumulation; here through the trainer's own training step and backward pass",
            when="deep",
            kind="offline",
        ),
        Invariant(
            "stage-rows",
            "the start gives training rows the log-probabilities that the stage's folder gives, loaded afresh",
            "as of stage; here on rows instead of one conversation",
            when="deep",
            kind="offline",
        ),
    )
}
SKIPPABLE = tuple(row.name for row in INVARIANTS.values() if row.optional and row.when != "deep")
