"""The keys of `train:`, `peft:` and `model.init.config:`, which are upstream's own, held against upstream's classes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignment.recipe.algorithms import OWNED, PEFT_OWNED, Algorithm
from alignment.recipe.limits import out_of_limits
from alignment.recipe.problems import Place, Problems, did_you_mean, nearest, shown
from alignment.recipe.spellings import today
from alignment.recipe.upstream import Field, display_name, fields, model_config, model_types
from alignment.recipe.wording import elsewhere

LORA = "peft.tuners.lora.config:LoraConfig"
SHOWN_CHOICES = 12


def check_train(train: Mapping[str, Any], row: Algorithm, place: Place, problems: Problems) -> set[str]:
    """Check a stage's `train:`; returns the keys that are fit for use."""
    assert row.config is not None
    allowed = dict(train)
    for key in train:
        if key in row.fixed and key not in OWNED:
            problems.add((*place, key), f"is fixed to {shown(row.fixed[key])} by the algorithm {row.name}; remove it")
            del allowed[key]
    return _check(allowed, row.config, OWNED, place, problems)


def check_peft(peft: Mapping[str, Any], place: Place, problems: Problems) -> None:
    """Check a stage's `peft:`, the keys of `peft.LoraConfig`."""
    _check(peft, LORA, PEFT_OWNED, place, problems)


def check_model_config(settings: Mapping[str, Any], place: Place, problems: Problems) -> None:
    """Check the configuration of a randomly initialised model, the keys of the class of its `model_type`."""
    model_type = settings.get("model_type")
    if not isinstance(model_type, str):
        problems.add((*place, "model_type"), "is missing: the architecture, for instance llama")
        return
    config = model_config(model_type)
    if config is None:
        close = did_you_mean(model_type, model_types())
        problems.add((*place, "model_type"), f"is no architecture of the installed Transformers{close}")
        return
    owned = {"vocab_size": "follows from the tokenizer", "dtype": "belongs in `precision`"}
    _check({key: value for key, value in settings.items() if key != "model_type"}, config, owned, place, problems)


def _check(
    given: Mapping[str, Any], config: str, owned: Mapping[str, str], place: Place, problems: Problems
) -> set[str]:
    """Hold keys against a class of upstream: owned elsewhere, unknown, of the wrong type, out of range."""
    known, sound = fields(config), set()
    for key, value in given.items():
        if key in owned:
            reason = owned[key] if owned[key].startswith("cannot") else f"is not set here: it {owned[key]}"
        elif key not in known:
            reason = _unknown(key, config, known)
        elif not known[key].accepts(value):
            reason = _wrong_type(known[key], value)
        else:
            reason = out_of_limits(config, key, value) or ""
        if reason:
            problems.add((*place, key), reason)
        else:
            sound.add(key)
    return sound


def _unknown(key: str, config: str, known: Mapping[str, Field]) -> str:
    advice = today(key, known)
    hint = f": {advice}" if advice else did_you_mean(key, known) or elsewhere(key)
    return f"unknown key of {display_name(config)}{hint}"


def _wrong_type(field: Field, value: object) -> str:
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be finite, found {shown(value)}"
    if field.choices is None:
        wrap = f"; write [{value}]" if field.accepts([value]) else ""
        return f"expected {field.expected}, found {shown(value)}{wrap}"
    close = nearest(value, map(str, field.choices))
    listed = ", ".join(map(str, field.choices[:SHOWN_CHOICES])) + (
        ", ..." if len(field.choices) > SHOWN_CHOICES else ""
    )
    return f"must be one of {listed}, found {shown(value)}{f' (did you mean {close}?)' if close else ''}"
