"""What is read from upstream's source, held against the classes themselves; and our tables, held against upstream."""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import math
import types
import typing
from pathlib import Path
from typing import Any, Literal, Union

import pytest

from alignment.errors import RecipeError
from alignment.recipe import upstream
from alignment.recipe.algorithms import ALGORITHMS, OWNED, PEFT_OWNED
from alignment.recipe.limits import CHOICES, PEFT_RANGES, TRAIN_RANGES
from alignment.recipe.trainer_keys import LORA
from alignment.recipe.upstream import UNKNOWN, Field, display_name, fields, in_words, model_config, model_types

TRL = sorted(
    {row.config for row in ALGORITHMS.values() if row.config}
    | {f"trl.trainer.{name.lower()}_config:{name}Config" for name in ("SFT", "DPO", "Reward", "KTO", "RLOO", "GRPO")}
)
CONFIGS = [*TRL, "transformers.training_args:TrainingArguments", LORA]
TRAIN_CONFIGS = sorted({row.config for row in ALGORITHMS.values() if row.config})


def real(config: str) -> Any:
    """The class itself."""
    module, _, name = config.partition(":")
    return getattr(importlib.import_module(module), name)


def as_read(annotation: Any) -> Any:
    """A real type as `upstream` gives it: enums as values, dataclasses as mappings, other classes as anything."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return annotation
    if origin in (Union, types.UnionType):
        members = [as_read(argument) for argument in arguments]
        if Any in members:
            return Any
        if any(isinstance(argument, type) and issubclass(argument, enum.Enum) for argument in arguments):
            members = [member for member in members if member is not str]
        return Union[tuple(members)]  # noqa: UP007
    if origin is not None:
        return origin[tuple(as_read(argument) for argument in arguments)]
    if isinstance(annotation, type) and issubclass(annotation, enum.Enum):
        return Literal[tuple(member.value for member in annotation)]
    if dataclasses.is_dataclass(annotation):
        return dict[str, Any]
    return annotation if annotation in (bool, int, float, str, dict, list, type(None)) else Any


@pytest.mark.parametrize("config", CONFIGS, ids=display_name)
def test_names_types_and_defaults_equal_those_of_the_class(config: str) -> None:
    cls, read = real(config), fields(config)
    found = {field.name: field for field in dataclasses.fields(cls) if field.init}
    assert list(read) == list(found)
    hints = typing.get_type_hints(cls)
    for name, field in found.items():
        # An annotation is read as anything or as the very type.
        assert read[name].annotation in (as_read(hints[name]), Any), name
        if field.default_factory is not dataclasses.MISSING:
            made = field.default_factory()
            assert read[name].default == (UNKNOWN if dataclasses.is_dataclass(made) else made), name
        else:
            default = field.default.value if isinstance(field.default, enum.Enum) else field.default
            assert read[name].default == default, name
            assert type(read[name].default) is type(default), name
        choices = field.metadata.get("choices")
        if choices is not None and read[name].choices is not None:
            assert list(read[name].choices or ()) == list(choices), name


@pytest.mark.parametrize("config", CONFIGS, ids=display_name)
def test_nearly_every_type_is_known(config: str) -> None:
    unknown = {name for name, field in fields(config).items() if field.annotation is Any}
    assert unknown <= {"parallelism_config", "reward_weights", "tools"}


@pytest.mark.parametrize("config", CONFIGS, ids=display_name)
def test_every_default_passes_its_own_check(config: str) -> None:
    for field in fields(config).values():
        # Upstream leaves some fields None that are not annotated so.
        if field.default not in (UNKNOWN, None):
            assert field.accepts(field.default), field


def test_display_name() -> None:
    assert display_name("trl.trainer.dpo_config:DPOConfig") == "trl.DPOConfig"
    assert display_name(LORA) == "peft.LoraConfig"


def test_a_class_is_found_through_the_packages_own_import() -> None:
    assert fields("transformers:TrainingArguments") == fields("transformers.training_args:TrainingArguments")


def test_what_is_not_installed_is_named() -> None:
    with pytest.raises(RecipeError, match=r"the installed trl has no trl\.PPOConfig"):
        fields("trl.trainer.ppo_config:PPOConfig")
    with pytest.raises(RecipeError, match=r"the installed no_such_package has no no_such_package\.X"):
        fields("no_such_package.module:X")


def test_inheritance_forward_references_and_init_false(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "made_up"
    (package / "deep").mkdir(parents=True)
    (package / "__init__.py").write_text("try:\n    from .base import Base as Base\nexcept ImportError:\n    pass\n")
    (package / "base.py").write_text(
        "from dataclasses import dataclass, field\nfrom enum import Enum\nfrom typing import ClassVar\n"
        "raise SystemExit('imported')\n"
        "class Color(Enum):\n    RED = 'red'\n    BLUE = 'blue'\n"
        "@dataclass\nclass Base:\n    a: int = 1\n    b: 'Color | str' = 'red'\n    c: ClassVar[int] = 3\n"
        "    d: int = field(default=4, init=False)\n    e: float = 5\n"
    )
    (package / "deep" / "__init__.py").write_text("")
    (package / "deep" / "child.py").write_text(
        "from dataclasses import dataclass\nfrom typing import Optional\nfrom .. import Base\nfrom torch import dtype\n"
        "@dataclass\nclass Child(Base):\n    a: Optional[list[int]] = None\n    f: dtype = None\n    g: str\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    upstream._source.cache_clear()
    read = fields("made_up.deep.child:Child")
    assert list(read) == ["a", "b", "e", "f", "g"]
    assert read["a"] == Field("a", list[int] | None, None)
    assert (read["b"].choices, read["b"].default) == (("red", "blue"), "red")
    assert (read["f"].annotation, read["g"].default) == (Any, UNKNOWN)


def test_types_in_words() -> None:
    assert in_words(int | None) == "a whole number or null"
    assert in_words(list[str] | str | None) == "a list of text or text or null"
    assert in_words(dict[str, Any]) == "a mapping"
    assert in_words(Literal["a", "b"]) == "one of a, b"


def test_numbers_are_not_taken_for_each_other() -> None:
    whole, number, truth = Field("a", int), Field("b", float), Field("c", bool)
    assert [whole.accepts(value) for value in (1, 1.0, True, "1", None)] == [True, False, False, False, False]
    assert [number.accepts(value) for value in (1, 1.5, True, "1", math.nan)] == [True, True, False, False, False]
    assert [truth.accepts(value) for value in (True, 1, "yes")] == [True, False, False]


def test_model_configurations() -> None:
    assert model_config("llama") == "transformers.models.llama.configuration_llama:LlamaConfig"
    assert model_config("lama") is None
    assert model_config("../auto") is None
    assert model_config("x" * 300) is None
    assert {"llama", "qwen3", "gpt2"} <= set(model_types())
    for model_type in ("llama", "qwen3", "gpt2", "gpt_neox"):
        config = model_config(model_type)
        assert config is not None
        names = {field.name for field in dataclasses.fields(real(config)) if field.init}
        assert set(fields(config)) == names


@pytest.mark.parametrize("key", OWNED)
def test_an_owned_key_is_one_of_upstream(key: str) -> None:
    assert any(key in fields(config) for config in TRAIN_CONFIGS)


@pytest.mark.parametrize("key", PEFT_OWNED)
def test_an_owned_peft_key_is_one_of_upstream(key: str) -> None:
    assert key in fields(LORA)


@pytest.mark.parametrize("row", ALGORITHMS.values(), ids=lambda row: row.name)
def test_keys_and_values_of_a_row_are_upstreams(row: Any) -> None:
    for key, value in {**row.defaults, **row.fixed}.items():
        assert fields(row.config)[key].accepts(value)


@pytest.mark.parametrize(("table", "configs"), [(TRAIN_RANGES, TRAIN_CONFIGS), (PEFT_RANGES, [LORA])])
def test_a_range_is_about_a_key_of_upstream_and_holds_its_default(table: dict[str, Any], configs: list[str]) -> None:
    for key, limits in table.items():
        defaults = [fields(config)[key].default for config in configs if key in fields(config)]
        assert defaults, key
        for default in defaults:
            assert default is None or isinstance(default, str | list) or default in limits, key


def test_a_choice_stands_in_upstreams_own_source() -> None:
    for (name, key), choices in CHOICES.items():
        configs = [config for config in [*TRAIN_CONFIGS, LORA] if name == config.partition(":")[2]] or TRAIN_CONFIGS
        assert configs, name
        source = ""
        for config in configs:
            if key not in fields(config):
                continue
            source += "".join(inspect.getsource(base) for base in real(config).__mro__[:-1])
            trainer = importlib.import_module(config.partition(":")[0].replace("_config", "_trainer")) if name in (
                "DPOConfig", "KTOConfig"
            ) else None  # fmt: skip
            source += inspect.getsource(trainer) if trainer else ""
            default = fields(config)[key].default
            assert default in choices or (isinstance(default, list) and set(default) <= set(choices)) or default is None
        if key.startswith("log_level"):
            from transformers.training_args import trainer_log_levels

            assert set(choices) == set(trainer_log_levels)
        else:
            assert all(f'"{choice}"' in source or f"'{choice}'" in source or choice is True for choice in choices), key


def test_every_loss_that_dpo_knows_is_a_choice() -> None:
    """The trainer lists them in its own error message."""
    from trl.trainer import dpo_trainer

    source = inspect.getsource(dpo_trainer)
    listed = source.partition("Unknown loss type: {loss_type}. Should be one of [")[2].partition("]")[0]
    assert set(CHOICES["DPOConfig", "loss_type"]) == {
        part.strip(" '\"\n") for part in listed.replace('f"', "").replace('"', "").split(",")
    }
