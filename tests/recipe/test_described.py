"""Data sets as LLaMA-Factory and Axolotl describe them: what a source becomes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.errors import DataError
from alignment.pipeline.fingerprint import fingerprint
from alignment.pipeline.located import locate
from alignment.recipe.described import described
from alignment.recipe.resolve import resolve
from alignment.recipe.schema import Recipe, Source


def become(path: Path, **keys: Any) -> dict[str, Any]:
    return described(Source(path=str(path), **keys)).model_dump(exclude_defaults=True, exclude_none=True)


def factory(folder: Path, **entries: Any) -> Path:
    path = folder / "dataset_info.json"
    path.write_text(json.dumps(entries))
    return path


def axolotl(folder: Path, *entries: Any) -> Path:
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump({"base_model": "x", "datasets": list(entries)}))
    return path


SHAREGPT_ROLES = {
    "human": "user", "gpt": "assistant", "observation": "tool", "function_call": "function_call", "system": "system"
}  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"file_name": "a.json"}, {"format": "alpaca"}),
        ({"file_name": "a.json", "columns": {"prompt": "q", "query": "", "response": "a"}, "num_samples": 5},
         {"format": "alpaca", "columns": {"instruction": "q", "input": "", "output": "a"}, "rows": 5}),
        ({"file_name": "a.json", "ranking": True, "columns": {"prompt": "instruction", "chosen": "good",
                                                              "rejected": "bad"}},
         {"format": "alpaca-pairs", "columns": {"instruction": "instruction", "chosen": "good", "rejected": "bad"}}),
        ({"file_name": "a.json", "ranking": True}, {"format": "alpaca-ranked"}),
        ({"file_name": "a.json", "columns": {"prompt": "q", "response": "a", "kto_tag": "ok"}},
         {"format": "alpaca-label", "columns": {"instruction": "q", "output": "a", "label": "ok"}}),
        ({"file_name": "a.json", "formatting": "sharegpt", "columns": {"messages": "talk", "tools": "tools"}},
         {"format": "sharegpt", "columns": {"conversations": "talk", "tools": "tools"},
          "turns": {"role": "from", "content": "value", "roles": SHAREGPT_ROLES}}),
        ({"file_name": "a.json", "formatting": "sharegpt", "ranking": True,
          "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "U", "assistant_tag": "A"}},
         {"format": "sharegpt-pairs",
          "turns": {"role": "who", "content": "what",
                    "roles": {**{name: role for name, role in SHAREGPT_ROLES.items() if name not in ("human", "gpt")},
                              "U": "user", "A": "assistant"}}}),
    ],
)  # fmt: skip
def test_llama_factory(tmp_path: Path, entry: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert become(factory(tmp_path, one=entry)) == {"path": str(tmp_path / "a.json"), **wanted}


def test_llama_factory_on_the_hub_and_what_the_recipe_says_itself(tmp_path: Path) -> None:
    path = factory(tmp_path, one={"hf_hub_url": "owner/name", "subset": "en", "split": "test"}, two={"file_name": "b"})
    assert become(path, subset="one", weight=2.0) == {
        "path": "owner/name", "subset": "en", "split": "test", "format": "alpaca", "weight": 2.0
    }  # fmt: skip
    assert become(path, subset="one", split="train[:9]")["split"] == "train[:9]"


@pytest.mark.parametrize(
    ("entries", "subset", "message"),
    [
        ({"one": {"file_name": "a"}, "two": {"file_name": "b"}}, None,
         "describes 2 data sets: name one with `subset`: one, two"),
        ({"one": {"file_name": "a"}}, "onee", 'describes no data set "onee" (did you mean one?)'),
        ({"one": {"script_url": "x"}}, None, "names neither file_name nor hf_hub_url for this data set"),
        ({"one": {"file_name": "a", "columns": {"images": "i"}}}, None, "columns: images: only text is read here"),
        ({"one": {"file_name": "a", "formatting": "chatml"}}, None,
         'formatting: "chatml" is unknown; known are alpaca, sharegpt, openai'),
        ({"one": {"file_name": "a", "weights": 1}}, None,
         "weights: is not followed here; write the source itself into the recipe"),
        ({"one": {"file_name": "a", "num_samples": "all"}}, None,
         'rows: Input should be a valid integer, found "all"'),
        ({"one": "a.json"}, None, "is not LLaMA-Factory's list of data sets, name: {file_name: ...}"),
    ],
)  # fmt: skip
def test_llama_factory_refused(tmp_path: Path, entries: Any, subset: str | None, message: str) -> None:
    path = factory(tmp_path, **entries)
    with pytest.raises(DataError) as error:
        become(path, subset=subset)
    assert str(error.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        ({"type": "chat_template"}, {"format": "messages"}),
        ({"type": "chat_template", "field_messages": "conversations",
          "message_property_mappings": {"role": "from", "content": "value"},
          "roles": {"user": ["human", "user"], "assistant": ["gpt"]}, "roles_to_train": ["gpt"],
          "train_on_eos": "turn", "field_tools": "functions", "field_system": "sys"},
         {"format": "messages", "columns": {"messages": "conversations", "tools": "functions", "system": "sys"},
          "turns": {"role": "from", "content": "value",
                    "roles": {"human": "user", "user": "user", "gpt": "assistant"}}}),
        ({"type": "chat_template.default", "field_messages": "conversation", "field_chosen": "good",
          "field_rejected": "bad"},
         {"format": "sharegpt-pairs",
          "columns": {"conversations": "conversation", "chosen": "good", "rejected": "bad"}}),
        ({"type": "chatml.intel", "split": "train[:10]"}, {"format": "orca-pairs", "split": "train[:10]"}),
        ({"type": "llama3.argilla"},
         {"format": "alpaca-pairs", "columns": {"chosen": "chosen_response", "rejected": "rejected_response"}}),
        ({"type": "completion", "field": "body"}, {"format": "text", "columns": {"text": "body"}}),
        ({"type": "alpaca_chat.load_qa"},
         {"format": "prompt-completion", "columns": {"prompt": "question", "completion": "answer"}}),
        ({"type": {"field_instruction": "q", "field_output": "a"}},
         {"format": "alpaca", "columns": {"instruction": "q", "output": "a"}}),
    ],
)  # fmt: skip
def test_axolotl(tmp_path: Path, entry: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert become(axolotl(tmp_path, {"path": "owner/name", **entry})) == {"path": "owner/name", **wanted}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"roles_to_train": ["user", "assistant"]}, "roles_to_train: the loss is on the assistant's turns here"),
        ({"train_on_eos": "last"}, "train_on_eos: every answer's stop token is trained here (turn)"),
        ({"message_field_training": "learn"}, "message_field_training: is not followed here; rows are dropped that"),
        ({"drop_system_message": True}, "drop_system_message: is not followed here; write the source itself"),
        ({"type": "chatml.unheard_of"}, 'type: "chatml.unheard_of" is not followed here; write the source itself'),
        ({"type": {"format": "[INST] {instruction}"}}, "type: format: is not followed here; a chat template writes"),
        ({"data_files": ["a.jsonl", "b.jsonl"]}, "data_files: name one file, or a pattern with *"),
    ],
)
def test_axolotl_refused(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    path = axolotl(tmp_path, {"path": "x", **entry})
    with pytest.raises(DataError) as error:
        become(path)
    assert str(error.value).startswith(f"{path}: {message}")


def test_axolotl_with_several_data_sets(tmp_path: Path) -> None:
    path = axolotl(tmp_path, {"path": "a/b"}, {"path": "json", "data_files": "x.jsonl"}, {"path": "a/b", "name": "en"})
    with pytest.raises(DataError, match=r"describes 3 data sets: name one with `subset`: a/b\[0\], json, a/b\[2\]"):
        become(path)
    assert become(path, subset="json")["path"] == "x.jsonl"
    assert become(path, subset="a/b[2]")["subset"] == "en"
    other = tmp_path / "other.yaml"
    other.write_text("stages: {}\n")
    with pytest.raises(DataError, match="is not an Axolotl file with"):
        become(other)


def test_an_ordinary_source_stays_as_it_is(tmp_path: Path) -> None:
    for path in ("owner/name", "a.jsonl", str(tmp_path)):
        source = Source(path=path, subset="x")
        assert described(source) is source


def test_an_unreadable_description_is_one_line(tmp_path: Path) -> None:
    for text in ("{", '{"a": [}'):
        path = tmp_path / "dataset_info.json"
        path.write_text(text)
        with pytest.raises(DataError, match=r"dataset_info.json: cannot be read: ") as error:
            become(path)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"none.yaml: cannot be read: No such file or directory"):
        become(tmp_path / "none.yaml")


def test_a_stage_is_known_by_the_rows_that_are_described(tmp_path: Path) -> None:
    data, hook = tmp_path / "a.json", tmp_path / "hooks.py"
    data.write_text('[{"q": "Q", "a": "A"}]')
    hook.write_text("def same(row):\n    return [row]\n")
    info = factory(tmp_path, one={"file_name": "a.json", "columns": {"prompt": "q", "response": "a"}})
    section = {"train": [{"path": str(info)}], "dedupe": "rows", "augment": [f"{hook}:same"]}
    recipe = Recipe.model_validate(
        {"name": "x", "stages": {"sft": {"algorithm": "sft", "model": "some/model", "data": section}}}
    )

    def print_of() -> dict[str, Any]:
        stage = locate(resolve(recipe, "sft"))
        assert stage.data is not None
        assert stage.data.train[0].path == str(data)
        found: dict[str, Any] = fingerprint(stage, parents={}, hash_of=lambda path: path.read_text())["data"]
        return found

    before = print_of()
    assert before["dedupe"] == "rows"
    assert before["train"][0]["columns"] == {"instruction": "q", "output": "a"}
    info.write_text(info.read_text() + "\n")  # says the same
    assert print_of() == before
    data.write_text('[{"q": "Q", "a": "B"}]')
    assert print_of()["train"] != before["train"]
    hook.write_text("def same(row):\n    return []\n")
    assert print_of()["augment"] != before["augment"]
