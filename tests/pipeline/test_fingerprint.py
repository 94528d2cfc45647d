"""What is part of a stage's identity, and what is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignment.errors import DataError
from alignment.pipeline import fingerprint as fp
from alignment.pipeline.files import digest
from alignment.recipe.algorithms import ALGORITHMS, TRAINED, dpo


@pytest.fixture
def identity(load: Callable, look: Callable) -> Callable[..., dict[str, Any]]:
    """The fingerprint of a stage under overrides."""
    return lambda name, *overrides: look(load(*overrides), name).spec.fingerprint


CHANGES = [
    ("sft", "seed=8", "seed: 7 -> 8"),
    ("sft", "stages.sft.seed=9", "seed: 7 -> 9"),
    ("sft", "precision.compute=bfloat16", "precision.compute: float32 -> bfloat16"),
    ("sft", "chat_template=zephyr", "chat_template: chatml -> zephyr"),
    ("sft", "stages.sft.batch.global=16", "batch.global: 8 -> 16"),
    ("sft", "stages.sft.train.learning_rate=1.0e-3", "train.learning_rate: 0.0002 -> 0.001"),
    ("sft", "stages.sft.train.weight_decay=0.1", "train.weight_decay: 0.0 -> 0.1"),
    ("sft", "stages.sft.data.train[0].rows=4", "data.train[0].rows: (absent) -> 4"),
    ("sft", "stages.sft.data.on_overlong=truncate_right", "data.on_overlong: drop -> truncate_right"),
    ("sft", "stages.sft.peft={r: 4}", "peft.r: (absent) -> 4"),
    ("dpo", "stages.dpo.algorithm=ipo", "algorithm: dpo -> ipo"),
    ("kto", "stages.kto.batch.per_device=2", "batch.per_device: 4 -> 2"),
    ("evaluate", "stages.evaluate.sampling.temperature=0.5", "sampling.temperature: 1.0 -> 0.5"),
    ("evaluate", "stages.evaluate.baseline=stage:dpo", "baseline: stage:sft -> stage:dpo"),
]


@pytest.mark.parametrize(("name", "override", "line"), CHANGES, ids=[change[1] for change in CHANGES])
def test_what_changes_the_result_is_in_it(identity: Callable, name: str, override: str, line: str) -> None:
    lines = fp.difference(identity(name), identity(name, override))
    assert line in lines


SAME = [
    ("sft", "stages.sft.batch.per_device=8"),
    ("sft", "launch.processes=2"),
    ("sft", "launch.env={A: b}"),
    ("sft", "checkpoints.every=3"),
    ("sft", "report_to=[tensorboard]"),
    ("sft", "stages.sft.train.logging_steps=1"),
    ("sft", "stages.sft.train.gradient_checkpointing=false"),
    ("sft", "stages.sft.train.dataloader_num_workers=1"),
    ("sft", "stages.sft.data.limits.dropped=0.5"),
    ("sft", "stages.sft.train.num_train_epochs=1.0"),
    ("sft", "stages.dpo.train.beta=0.3"),
]


@pytest.mark.parametrize(("name", "override"), SAME, ids=[same[1] for same in SAME])
def test_what_only_moves_work_about_is_not(identity: Callable, name: str, override: str) -> None:
    assert fp.difference(identity(name), identity(name, override)) == []


def test_an_sft_term_in_dpo_is_a_mean_over_each_pass_so_its_rows_count(identity: Callable) -> None:
    terms = ["stages.dpo.train.loss_type=[sigmoid, sft]", "stages.dpo.train.loss_weights=[1.0, 0.3]"]
    assert "per_device" not in identity("dpo")["batch"]
    assert identity("dpo", *terms)["batch"]["per_device"] >= 1


def test_a_key_at_its_default_may_be_written_or_not(identity: Callable) -> None:
    assert identity("sft") == identity("sft", "stages.sft.train.lr_scheduler_type=linear")


def test_frequencies_count_once_they_choose_the_checkpoint(identity: Callable) -> None:
    best = ["stages.sft.data.eval_fraction=0.5", "stages.sft.train.load_best_model_at_end=true",
            "stages.sft.train.eval_strategy=steps", "stages.sft.train.eval_steps=3", "checkpoints.every=3"]  # fmt: skip
    other = [*best[:3], "stages.sft.train.eval_steps=2", "checkpoints.every=4"]
    assert fp.difference(identity("sft", *best), identity("sft", *other)) == [
        "train.checkpoints.every: 3 -> 4",
        "train.eval_steps: 3 -> 2",
    ]


def test_data_counts_by_content_not_by_place(workplace: Path, identity: Callable) -> None:
    before = identity("sft")
    (workplace / "rows" / "sft.jsonl").rename(workplace / "moved.jsonl")
    assert identity("sft", "stages.sft.data.train[0].path=moved.jsonl") == before
    with open(workplace / "moved.jsonl", "a") as file:
        file.write("\n")
    lines = fp.difference(before, identity("sft", "stages.sft.data.train[0].path=moved.jsonl"))
    assert len(lines) == 1
    assert lines[0].startswith("data.train[0].content: ")
    assert len(lines[0].rpartition(" -> ")[2]) == 12


def test_a_folder_and_a_glob_count_every_file(workplace: Path, identity: Callable) -> None:
    for pattern in ("rows", "rows/*.jsonl"):
        override = f"stages.sft.data.train[0].path={pattern}"
        before = identity("sft", override)
        (workplace / "rows" / f"more-{len(pattern)}.jsonl").write_text("{}\n")
        assert fp.difference(before, identity("sft", override)) != []


def test_models_templates_and_judges_count_by_content(workplace: Path, identity: Callable) -> None:
    def lines(name: str, path: Path, content: str, *overrides: str) -> list[str]:
        before = identity(name, *overrides)
        path.write_text(content)
        return [line.partition(": ")[0] for line in fp.difference(before, identity(name, *overrides))]

    (workplace / "own.jinja").write_text("{{ messages }}")
    assert lines("sft", workplace / "base" / "model.safetensors", "others") == ["model.path"]
    assert lines("sft", workplace / "base" / "metrics.json", "{}") == []
    assert lines("sft", workplace / "own.jinja", "{{ messages[0] }}", "chat_template=own.jinja") == ["chat_template"]
    assert lines("evaluate", workplace / "judge.py", "def score(): ...") == ["rewards[0].function.content"]


REWARDS = "stages.evaluate.rewards="


def test_judges_count_by_what_they_say(identity: Callable) -> None:
    before = identity("evaluate")
    assert before["rewards"] == [{"function": before["rewards"][0]["function"], "name": "length"}]  # no defaults
    found = identity("evaluate", REWARDS + "[{name: a, regex: x}, {name: b, length: 4}]")
    assert found["rewards"] == [{"name": "a", "regex": "x"}, {"name": "b", "length": 4}]


def test_rewards_of_training_count_with_weight_and_scale(
    workplace: Path, identity: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(dpo, name="ppo", sections=TRAINED | {"rewards"}, schema="prompts")
    monkeypatch.setitem(ALGORITHMS, "ppo", row)

    def found(*rewards: str) -> dict[str, Any]:
        return identity("dpo", "stages.dpo.algorithm=ppo", f"stages.dpo.rewards=[{', '.join(rewards)}]")

    own, other = "{name: rm, model: base}", "{name: rm, model: base, weight: 2, normalize: running}"
    assert fp.difference(found(own), found(other)) == [
        "rewards[0].normalize: (absent) -> running", "rewards[0].weight: (absent) -> 2.0",
    ]  # fmt: skip
    assert found(own) == found("{name: rm, model: base, weight: 1}")
    before = found(own)
    assert found("{name: rm, model: org/name}")["rewards"][0]["model"] == "org/name"
    (workplace / "base" / "model.safetensors").write_bytes(b"others")
    (line,) = fp.difference(before["rewards"][0], found(own)["rewards"][0])
    assert line.startswith("model: ")


def test_a_linked_reward_model_counts_by_its_stage(identity: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    row = replace(dpo, name="ppo", sections=TRAINED | {"rewards"}, schema="prompts")
    monkeypatch.setitem(ALGORITHMS, "ppo", row)
    monkeypatch.setitem(ALGORITHMS, "dpo", replace(dpo, publishes="sequence-classification"))
    overrides = ["stages.kto.algorithm=ppo", "stages.kto.rewards=[{name: rm, model: stage:dpo}]",
                 "stages.evaluate.models=[stage:sft]"]  # fmt: skip
    before = identity("kto", *overrides)
    assert before["rewards"] == [{"name": "rm", "model": "stage:dpo"}]
    assert before["parents"] == {name: digest(identity(name, overrides[-1])) for name in ("sft", "dpo")}
    changed = fp.difference(before, identity("kto", *overrides, "stages.dpo.train.beta=0.3"))
    assert [line.partition(": ")[0] for line in changed] == ["parents.dpo"]


def test_parents_count_by_their_fingerprint(identity: Callable) -> None:
    before = identity("dpo")
    assert before["parents"] == {"sft": digest(identity("sft"))}
    changed = fp.difference(before, identity("dpo", "stages.sft.train.learning_rate=1.0e-3"))
    assert [line.partition(": ")[0] for line in changed] == ["parents.sft"]


def test_hub_names_count_as_they_are(identity: Callable) -> None:
    found = identity("sft", "model={path: org/name, revision: abc}", "stages.sft.data.train[0].path=org/rows")
    assert found["model"] == {"path": "org/name", "revision": "abc"}
    assert found["data"]["train"] == [{"hub": "org/rows"}]


def test_a_missing_file_is_named(workplace: Path, identity: Callable) -> None:
    (workplace / "rows" / "sft.jsonl").unlink()
    with pytest.raises(DataError, match=r"sft\.jsonl: no such file"):
        identity("sft")


def test_flatten_and_difference() -> None:
    assert fp.flatten({"a": {"b": [1, {"c": None}], "d": {}}}) == {"a.b[0]": 1, "a.b[1].c": None, "a.d": {}}
    old, new = {"x": {"y": 1, "gone": None}, "h": "a" * 64}, {"x": {"y": 2}, "h": "b" * 64, "new": [1]}
    assert fp.difference(old, new) == [
        f"h: {'a' * 12} -> {'b' * 12}", "new[0]: (absent) -> 1", "x.gone: none -> (absent)", "x.y: 1 -> 2",
    ]  # fmt: skip
    assert fp.difference({"h": "a" * 64}, {"h": fp.NOT_HASHED}) == []


@pytest.mark.parametrize(
    ("path", "local"),
    [("org/name", False), ("name", False), ("/x/y", True), ("./y", True), ("org/rows.jsonl", True),
     ("rows.json.gz", True), ("a*b", True), ("rows", True)],
)  # fmt: skip
def test_what_is_a_local_path(workplace: Path, path: str, local: bool) -> None:
    assert fp.is_local(path) is local


def test_evaluation_sets_that_are_looked_for_do_not_change_a_stage(workplace: Path, identity: Callable) -> None:
    before = identity("sft")
    (workplace / "rows" / "other.jsonl").write_text('{"prompt": "Q"}\n')
    sets = "stages.sft.data.against=[{path: rows/other.jsonl}]"
    assert fp.difference(before, identity("sft", sets)) == []


def test_the_rule_of_what_is_held_out_is_part_of_a_stage(identity: Callable) -> None:
    now = identity("sft", "stages.sft.data.eval_fraction=0.25")
    assert now["data"]["held_out_by"] == "prompt"
    assert "held_out_by" not in identity("sft")["data"]
    single = {**now, "data": {key: value for key, value in now["data"].items() if key != "held_out_by"}}
    assert fp.difference(single, now) == ["data.held_out_by: (absent) -> prompt"]
