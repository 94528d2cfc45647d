"""No answer to a foreign spelling names a key that does not exist."""

from __future__ import annotations

import re

import pytest

from alignment.recipe.algorithms import ALGORITHMS, OWNED, PEFT_OWNED
from alignment.recipe.schema import Recipe, Stage
from alignment.recipe.spellings import SPELLINGS, today
from alignment.recipe.trainer_keys import LORA
from alignment.recipe.upstream import fields
from alignment.recipe.wording import section_at

CONFIGS = sorted({row.config for row in ALGORITHMS.values() if row.config})


def exists(place: str) -> bool:
    """Whether a place of the grammar of answers is one of today's recipes."""
    section, _, name = place.partition(".")
    if section == "train" and name:
        return any(name in fields(config) for config in CONFIGS) and name not in OWNED
    if section == "peft" and name:
        return name in fields(LORA) and name not in PEFT_OWNED
    parts: list[str | int] = ["stages", "x"]
    for part in place.split("."):
        parts += [part.removesuffix("[]"), *([0] if part.endswith("[]") else [])]
    holder = section_at(tuple(parts[:-1]))
    return holder is not None and parts[-1] in {field.alias or key for key, field in holder.model_fields.items()}


@pytest.mark.parametrize("key", SPELLINGS)
def test_answers_exist_and_questions_do_not(key: str) -> None:
    spelling = SPELLINGS[key]
    assert spelling.here is not None or spelling.note
    if spelling.here is not None:
        assert exists(spelling.here)
    for named in re.findall(r"\b(?:train|peft|precision|data|batch|model)\.[a-z_]+", spelling.note):
        assert exists(named)
    assert key not in Recipe.model_fields
    assert key not in Stage.model_fields
    # A key that one class has dropped may be another's: `today` is asked where it is unknown, and names what is known.
    section, _, now = (spelling.here or "").partition(".")
    homes = [config for config in CONFIGS if key in fields(config)]
    assert not homes or (section == "train" and not any(now in fields(config) for config in homes))
    assert spelling.here == f"peft.{key}" or key not in fields(LORA)


def test_a_key_of_another_trainer_is_not_recommended() -> None:
    assert today("pref_beta", fields("trl.trainer.sft_config:SFTConfig")) is None
    assert (
        today("pref_beta", fields("trl.trainer.dpo_config:DPOConfig"))
        == "LLaMA-Factory's name; today it is `train.beta`"
    )


def test_a_setting_that_is_gone_says_what_to_do() -> None:
    assert today("padding_value") == "a name of older TRL; the padding token follows from the tokenizer; remove it"


def test_an_unlisted_key_has_no_answer() -> None:
    assert today("no_such_key") is None
