"""fresh, waiting, resume, done, changed; and what --allow-change and --force do."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.errors import ChainError, LockedError
from alignment.pipeline import fingerprint, runs
from alignment.pipeline import plan as planning
from alignment.pipeline.locks import lock
from alignment.recipe.algorithms import ALGORITHMS, TRAINED, dpo
from alignment.recipe.schema import Launch


def test_a_stage_from_fresh_to_done(load: Callable, look: Callable, start: Callable, finish: Callable) -> None:
    recipe = load()
    first = look(recipe, "sft")
    assert (first.status, first.waiting_for, first.unhashed) == ("fresh", (), ())
    planning.write_stage(first.spec)
    assert look(recipe, "sft").status == "fresh"  # nothing sealed, so nothing to lose: also for a changed recipe
    assert look(load("seed=8"), "sft").status == "fresh"
    start(first.spec)
    second = look(recipe, "sft")
    assert second.status == "resume"
    assert second.spec.attempt != first.spec.attempt
    assert look(recipe, "dpo").status == "waiting"
    assert look(recipe, "evaluate").waiting_for == ("sft", "dpo")
    finish(second.spec)
    assert look(recipe, "sft").status == "done"
    assert look(recipe, "dpo").status == "fresh"
    assert look(recipe, "evaluate").waiting_for == ("dpo",)


def test_nothing_is_written_by_a_look(workplace: Path, load: Callable, look: Callable) -> None:
    look(load(), "evaluate", hash_files=False)
    assert not (workplace / "runs").exists()


def test_a_look_that_must_not_hash_says_what_it_left_out(load: Callable, look: Callable, finish: Callable) -> None:
    recipe = load()
    plan = look(recipe, "sft", hash_files=False)
    assert plan.unhashed == ("data.train[0].content", "model.path")
    assert plan.spec.fingerprint["data"]["train"][0]["content"] == "not hashed yet"
    assert look(recipe, "dpo", hash_files=False).spec.fingerprint["parents"] == {"sft": "not hashed yet"}
    finish(look(recipe, "sft").spec)
    assert look(recipe, "sft", hash_files=False).status == "done"
    assert look(recipe, "dpo", hash_files=False).spec.fingerprint["parents"]["sft"] != "not hashed yet"


def test_stage_yaml_round_trip(load: Callable, look: Callable) -> None:
    spec = replace(look(load("stages.sft.train.learning_rate=5e-7"), "sft").spec, forced=("stages.sft.x: 1 -> 2",))
    path = planning.write_stage(spec)
    assert path == spec.output / "stage.yaml"
    assert planning.read_stage(path) == spec
    assert planning.read_stage(path).fingerprint_sha256 == spec.fingerprint_sha256


def test_stage_yaml_holds_absolute_paths_and_links_as_written(workplace: Path, load: Callable, look: Callable) -> None:
    (workplace / "own.jinja").write_text("x")
    (workplace / "ds.json").write_text("{}")
    recipe = load("chat_template=own.jinja", "launch.deepspeed=ds.json", "launch.env={A: b}")
    spec = look(recipe, "evaluate").spec
    stage = spec.config
    assert stage.rewards[0].function == f"{workplace}/judge.py:score"
    assert stage.prompts is not None
    assert stage.prompts[0].path == f"{workplace}/rows/prompts.jsonl"
    assert stage.models == ["stage:sft", "stage:dpo"]
    assert stage.launch == Launch(env={"A": "b"})  # what trains nothing runs in one process
    assert look(recipe, "sft").spec.config.launch.deepspeed == f"{workplace}/ds.json"
    assert stage.chat_template == f"{workplace}/own.jinja"
    assert spec.parents == {name: workplace / "runs" / "small" / name for name in ("sft", "dpo")}
    assert spec.output == workplace / "runs" / "small" / "evaluate"
    sft = look(load(), "sft").spec.config
    assert sft.model is not None
    assert sft.model.path == f"{workplace}/base"
    assert sft.data is not None
    assert sft.data.train[0].path == f"{workplace}/rows/sft.jsonl"
    assert [source.path for source in sft.data.against] == [f"{workplace}/rows/prompts.jsonl"]  # what is evaluated on
    assert sft.chat_template == "chatml"


def test_a_limit_that_was_switched_off_stays_off_in_stage_yaml(load: Callable, look: Callable) -> None:
    spec = look(load("stages.sft.data.limits={duplicate: null, leak: 0.2}"), "sft").spec
    read = planning.read_stage(planning.write_stage(spec)).config.data.limits
    assert (read.duplicate, read.leak, read.truncated) == (None, 0.2, None)
    assert read == spec.config.data.limits


def test_stage_yaml_holds_absolute_paths_of_rewards(
    workplace: Path, load: Callable, look: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(dpo, name="ppo", sections=TRAINED | {"rewards"}, schema="prompts")
    monkeypatch.setitem(ALGORITHMS, "ppo", row)
    rewards = ('[{name: a, function: "judge.py:score"}, {name: b, model: base, weight: 2}, {name: c, length: 4}, '
               '{name: d, model: org/name}]')  # fmt: skip
    spec = look(load("stages.dpo.algorithm=ppo", f"stages.dpo.rewards={rewards}"), "dpo").spec
    found = [reward.function or reward.model for reward in spec.config.rewards]
    assert found == [f"{workplace}/judge.py:score", f"{workplace}/base", None, "org/name"]
    path = planning.write_stage(spec)
    assert planning.read_stage(path) == spec
    assert planning.read_stage(path).config.rewards[1].weight == 2.0


@pytest.mark.parametrize(
    ("content", "says"),
    [("schema: 3\n", "schema 3"), ("a: [", "damaged: not YAML"), ("schema: 1\nrun: x\n", "damaged"), ("", "None")],
)
def test_a_damaged_stage_yaml_is_named(workplace: Path, content: str, says: str) -> None:
    (workplace / "stage.yaml").write_text(content)
    with pytest.raises(ChainError, match=says) as caught:
        planning.read_stage(workplace / "stage.yaml")
    assert str(caught.value).startswith(f"{workplace}/stage.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_changed_recipe_is_refused_key_by_key(
    load: Callable, look: Callable, start: Callable, finish: Callable
) -> None:
    finish(look(load(), "sft").spec)
    start(look(load(), "dpo").spec)
    changed = load("stages.dpo.train.beta=0.05", "seed=8")
    plan = look(changed, "dpo")
    assert plan.status == "changed"
    assert plan.difference[:2] == (
        f"stages.dpo.parents.sft: {look(load(), 'sft').spec.fingerprint_sha256[:12]} -> "
        f"{look(changed, 'sft').spec.fingerprint_sha256[:12]}",
        "stages.dpo.seed: 7 -> 8",
    )
    assert plan.difference[2:] == ("stages.dpo.train.beta: 0.1 -> 0.05",)


@pytest.mark.parametrize("key", ["stages.dpo.train.beta", "stages.dpo.train", "stages.dpo"])
def test_an_allowed_change_is_kept_and_not_asked_again(
    load: Callable, look: Callable, start: Callable, finish: Callable, key: str
) -> None:
    finish(look(load(), "sft").spec)
    begun = look(load(), "dpo").spec
    start(begun)
    changed = load("stages.dpo.train.beta=0.05")
    assert look(changed, "dpo", allow=["stages.dpo.train.bet"]).status == "changed"
    plan = look(changed, "dpo", allow=[key])
    assert plan.status == "resume"
    assert plan.spec.forced == ("stages.dpo.train.beta: 0.1 -> 0.05",)
    assert plan.spec.config.train["beta"] == 0.05
    assert plan.spec.fingerprint == begun.fingerprint  # its checkpoints are still its own
    planning.write_stage(plan.spec)
    assert look(changed, "dpo").status == "resume"
    finish(look(changed, "dpo").spec)
    assert look(changed, "dpo").status == "done"
    assert (runs.read_manifest(begun.output) or {})["forced"] == ["stages.dpo.train.beta: 0.1 -> 0.05"]
    assert look(load("stages.dpo.train.beta=0.02"), "dpo").status == "changed"


def test_a_change_allowed_for_a_finished_stage_goes_into_its_manifest(
    load: Callable, look: Callable, finish: Callable
) -> None:
    finish(look(load(), "sft").spec)
    plan = look(load("seed=8"), "sft", allow=["stages.sft.seed"])
    assert plan.status == "done"
    planning.record_forced(plan.spec)
    assert (runs.read_manifest(plan.spec.output) or {})["forced"] == ["stages.sft.seed: 7 -> 8"]
    assert look(load("seed=8"), "sft").status == "done"


def test_a_parent_that_ran_again_is_a_change(load: Callable, look: Callable, finish: Callable) -> None:
    recipe = load()
    finish(look(recipe, "sft").spec)
    finish(look(recipe, "dpo").spec)
    assert look(recipe, "dpo").status == "done"
    finish(look(recipe, "sft").spec, b"other weights")
    plan = look(recipe, "dpo")
    assert plan.status == "changed"
    assert plan.difference[0].startswith("stages.dpo.parents.sft.weights: ")


def test_a_key_of_another_trainer_version_is_no_change(
    load: Callable, look: Callable, finish: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(look(load(), "sft").spec)
    real = fingerprint.full_train
    monkeypatch.setattr(fingerprint, "full_train", lambda stage: {**real(stage), "brand_new": 1})
    assert look(load(), "sft").status == "done"
    monkeypatch.setattr(fingerprint, "full_train", lambda stage: {**real(stage), "weight_decay": 0.5})
    assert look(load(), "sft").difference == ("stages.sft.train.weight_decay: 0.0 -> 0.5",)


def test_damage_is_a_change_that_force_can_clear(load: Callable, look: Callable, finish: Callable) -> None:
    spec = look(load(), "sft").spec
    finish(spec)
    (spec.output / "manifest.json").write_text("{")
    plan = look(load(), "sft")
    assert plan.status == "changed"
    assert "manifest.json: damaged: not JSON" in plan.difference[0]
    assert "\n" not in plan.difference[0]


def test_a_folder_of_somebody_else_is_never_written_to(workplace: Path, load: Callable, look: Callable) -> None:
    folder = workplace / "runs" / "small" / "sft"
    folder.mkdir(parents=True)
    (folder / "lock").write_text("")
    assert look(load(), "sft").status == "fresh"
    (folder / "thesis.tex").write_text("...")
    plan = look(load(), "sft")
    assert plan.status == "changed"
    assert plan.difference == (f"{folder}: holds thesis.tex but no stage.yaml: it was not made by a run",)


def test_archive_renames_and_never_overwrites(load: Callable, look: Callable) -> None:
    output = look(load(), "sft").spec.output
    assert planning.archive(output) is None
    targets = []
    for content in ("one", "two", "three"):
        output.mkdir(parents=True)
        (output / "file").write_text(content)
        targets.append(planning.archive(output))
    assert [(target / "file").read_text() for target in targets if target] == ["one", "two", "three"]
    assert not output.exists()
    with lock(output), pytest.raises(LockedError, match=f"process {os.getpid()}"):
        planning.archive(output)


def test_dependants_are_found_through_others(load: Callable) -> None:
    assert planning.dependants(load(), "sft") == ["dpo", "kto", "evaluate"]
    assert planning.dependants(load(), "dpo") == ["evaluate"]
    assert planning.dependants(load(), "evaluate") == []


def test_the_recipe_is_kept_with_its_overrides(workplace: Path, load: Callable) -> None:
    from alignment.recipe.load import load_recipe

    recipe = load("seed=9", "stages.dpo.train.beta=0.5")
    path = planning.write_recipe(recipe, workplace / "runs" / "small", origin=Path("recipe.yaml"), overrides=["seed=9"])
    assert path.read_text().startswith("# recipe.yaml --set seed=9\n")
    assert load_recipe(path) == recipe
