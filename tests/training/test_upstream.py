"""The private names of upstream that we override: this fails the day one of them changes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl

from alignment.training import trainers


@pytest.mark.parametrize("ours", [trainers.SFT, trainers.Reward, trainers.DPO, trainers.KTO])
def test_every_name_that_the_mixin_overrides_exists_upstream(ours: type) -> None:
    theirs = ours.__mro__[2]
    assert theirs.__module__.startswith("trl.trainer")
    for name in (
        "_prepare_dataset",
        "compute_loss",
        "training_step",
        "_run_epoch",
        "create_model_card",
        "_set_signature_columns_if_needed",
    ):
        assert callable(getattr(theirs, name)), f"{theirs.__name__}.{name} is gone"
    assert "_prepare_dataset(train_dataset" in inspect.getsource(theirs.__init__).replace("\n", "").replace(" ", "")


def test_the_trainer_still_calls_run_epoch_and_stops_on_control() -> None:
    source = inspect.getsource(transformers.Trainer._inner_training_loop)
    assert "self._run_epoch(" in source
    assert "should_training_stop" in source


def test_trl_tokenizes_nothing(
    run_recipe: Callable[..., Path],
    tiny_recipe: Callable[..., dict[str, Any]],
    tiny_run: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []
    for module in ("sft_trainer", "dpo_trainer", "reward_trainer", "kto_trainer"):
        target = getattr(trl.trainer, module)
        monkeypatch.setattr(target, "_tokenize", lambda *args, name=module, **kwargs: calls.append(name), raising=True)
    run_recipe(tiny_recipe("base", "sft", "reward", "dpo", "kto"))
    assert calls == []
