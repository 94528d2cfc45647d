"""What the builder of an algorithm is given: the stage, and what the worker has already prepared for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from alignment.models.load import snapshot
from alignment.recipe.algorithms import ALGORITHMS, Algorithm
from alignment.recipe.schema import Model, linked, pinned

if TYPE_CHECKING:
    from alignment.data.prepare import Prepared
    from alignment.pipeline.plan import StageSpec


@dataclass(frozen=True)
class Context:
    """One stage, ready to be built.

    Attributes:
        spec: the stage as planned; `spec.config` is its resolved recipe section.
        say: prints one line for the person watching (rank 0 only).
        compute: the autocast dtype.
        start: folder or hub name of the weights to start from; None for random ones, or a stage without a model.
        commit: of that hub name, once it is known: everything is loaded from it.
        args, tokenizer, data: None for a stage that trains nothing.
        added_tokens: what the chat template added to the tokenizer.
        peft: the adapter's configuration, if the stage makes a new one.
    """

    spec: StageSpec
    say: Callable[[str], None]
    compute: torch.dtype
    start: str | None = None
    commit: str | None = None
    args: Any = None  # the instance of the row's config class
    tokenizer: Any = None
    data: Prepared | None = None
    added_tokens: tuple[str, ...] = ()
    peft: Any = None

    @property
    def model(self) -> Model:
        """The `model:` section of a stage that trains, at the commit that was found for it."""
        model = self.spec.config.model
        assert model is not None
        return model if self.commit is None else model.model_copy(update={"revision": self.commit})

    @property
    def rows(self) -> Prepared:
        """The token tables of a stage that trains."""
        assert self.data is not None
        return self.data

    @property
    def row(self) -> Algorithm:
        """The stage's row of the table."""
        return ALGORITHMS[self.spec.config.algorithm]

    def path_of(self, link: str) -> Path:
        """The folder behind `stage:<name>` or `hub-name@commit`; a path or hub name as it is."""
        if (stage := linked(link)) is not None:
            return self.spec.parents[stage]
        name, commit = pinned(link)
        return Path(name) if commit is None else snapshot(name, commit)
