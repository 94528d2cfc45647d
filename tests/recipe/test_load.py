"""What a loaded recipe holds, what `--set` changes, what a stage inherits, and what loading costs."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from alignment.errors import RecipeError
from alignment.recipe.algorithms import ALGORITHMS, OWNED, Algorithm
from alignment.recipe.load import full_train, load_recipe, parents, resolve
from alignment.recipe.schema import Recipe


@pytest.fixture
def load(good: str, tmp_path: Path) -> Callable[..., Recipe]:
    """A function that loads the good recipe with overrides."""
    path = tmp_path / "good.yaml"
    path.write_text(good)
    return lambda *overrides: load_recipe(path, overrides)


def test_values_arrive_as_written(load: Callable[..., Recipe]) -> None:
    recipe = load()
    assert (recipe.name, recipe.seed, list(recipe.stages)) == ("chain", 7, ["base", "sft", "reward", "dpo", "compare"])
    sft = recipe.stages["sft"]
    assert sft.train == {"learning_rate": 2e-4, "num_train_epochs": 2, "eval_strategy": "steps"}
    assert sft.model is not None and sft.model.stage == "base"
    assert sft.data is not None and [source.weight for source in sft.data.train] == [0.5, None]
    assert (sft.batch.global_, sft.batch.per_device) == (64, 16)


def test_a_stage_inherits_key_by_key(load: Callable[..., Recipe]) -> None:
    sft = resolve(load(), "sft")
    assert sft.precision is not None and sft.launch is not None and sft.checkpoints is not None
    assert (sft.precision.compute, sft.precision.weights) == ("bfloat16", "bfloat16")
    assert (sft.seed, sft.chat_template, sft.report_to) == (7, "chatml", [])
    assert (sft.launch.processes, sft.checkpoints.every, sft.checkpoints.keep) == (2, 100, 3)


def test_a_stages_own_way_to_launch_replaces_the_other(load: Callable[..., Recipe], tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("")
    launch = resolve(load("launch.env={A: x}", f"stages.dpo.launch.accelerate={own}"), "dpo").launch
    assert launch is not None
    assert (launch.accelerate, launch.processes, launch.env) == (str(own), 1, {"A": "x"})
    recipe = load(f"launch={{accelerate: {own}}}", "stages.dpo.launch.processes=4")
    launch = resolve(recipe, "dpo").launch
    assert launch is not None and (launch.accelerate, launch.processes) == (None, 4)


def test_the_model_is_inherited_where_the_algorithm_takes_one(load: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = load("model=some/model", "stages.dpo.model=null")
    dpo, compare = resolve(recipe, "dpo"), resolve(recipe, "compare")
    assert dpo.model is not None and dpo.model.path == "some/model"
    assert compare.model is None


def test_resolve_names_the_nearest_stage(load: Callable[..., Recipe]) -> None:
    with pytest.raises(RecipeError, match=r"no stage is named dppo \(did you mean dpo\?\); the recipe has base, sft"):
        resolve(load(), "dppo")


def test_parents_come_once_and_in_order(load: Callable[..., Recipe]) -> None:
    recipe = load()
    assert parents(recipe.stages["base"]) == []
    assert parents(recipe.stages["dpo"]) == ["sft"]
    assert parents(recipe.stages["compare"]) == ["sft", "dpo", "reward"]


def test_full_train_is_upstream_then_row_then_recipe_then_fixed(
    load: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = load("stages.dpo.algorithm=exo_pair", "stages.dpo.train={beta: 0.3, max_grad_norm: 0.5}")
    train = full_train(recipe.stages["dpo"])
    assert train["learning_rate"] == 1e-6  # DPOConfig's own default
    assert train["adam_beta2"] == 0.999  # TrainingArguments'
    assert train["label_smoothing"] == 1e-3  # the row's
    assert (train["beta"], train["max_grad_norm"]) == (0.3, 0.5)
    assert train["loss_type"] == ["exo_pair"]  # fixed
    assert not OWNED.keys() & train.keys()
    assert full_train(recipe.stages["compare"]) == {}
    monkeypatch.setitem(ALGORITHMS, "dpo", replace(ALGORITHMS["dpo"], defaults={"beta": 0.7}))
    assert full_train(load("stages.dpo.train={}").stages["dpo"])["beta"] == 0.7


def test_a_row_of_the_table_is_enough_for_a_new_algorithm(
    load: Callable[..., Recipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    row = replace(
        ALGORITHMS["dpo"], name="new", fixed={"beta": 1.0}, needs=lambda train: iter([("max_length", "is too new")])
    )
    monkeypatch.setitem(ALGORITHMS, "new", row)
    with pytest.raises(RecipeError) as error:
        load("stages.dpo.algorithm=new", "stages.dpo.train={beta: 2.0}")
    assert error.value.problems == [
        "--set: stages.dpo.train.beta: is fixed to 1.0 by the algorithm new; remove it",
        "--set: stages.dpo.train.max_length: is too new",
    ]


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("seed=43", 43),
        ("stages.dpo.train.beta=5e-2", 0.05),
        ("stages.dpo.train.max_length=null", None),
        ("stages.sft.data.train[1].path=x=y.jsonl", "x=y.jsonl"),
        ("stages.sft.data.train[0]={path: z.jsonl}", {"path": "z.jsonl"}),
        ("stages.dpo.train.loss_type=[sigmoid]", ["sigmoid"]),
        ("stages.reward.train.center_rewards_coefficient=0.01", 0.01),
        ("stages.compare.sampling.temperature=0", 0.0),
    ],
)
def test_set_reaches_every_place(override: str, value: object, load: Callable[..., Recipe]) -> None:
    place = override.partition("=")[0].replace("[", ".").replace("]", "").split(".")
    found: object = load(override).model_dump(by_alias=True, exclude_unset=True)
    for part in place:
        found = found[int(part)] if isinstance(found, list) else found[part]  # type: ignore[index]
    assert found == value


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed", '"seed" is not place=value (stages.sft.train.max_steps=10, seed=43)'),
        ("=3", '"=3" is not place=value (stages.sft.train.max_steps=10, seed=43)'),
        ("a..b=3", '"a..b=3" is not place=value (stages.sft.train.max_steps=10, seed=43)'),
        ("seed=", "seed: has no value; write null for none"),
        (
            "seed=[1",
            "seed: \"[1\" is not valid YAML: while parsing a flow sequence; expected ',' or ']', "
            "but got '<stream end>'",
        ),
        ("seed=0010", 'seed: 0010 is read as 8 by YAML 1.1; write 10 or 8, or "0010" to mean text'),
        ("seed=-1", "seed: expected at least 0, found -1"),
        ("sede=1", "sede: unknown key (did you mean seed?)"),
        ("stages.dpoo.train.beta=1", "stages.dpoo.train.beta: no stage is named dpoo (did you mean dpo?)"),
        ("stages.dpo.trian.beta=1", "stages.dpo.trian: unknown key (did you mean train?)"),
        ("stages.dpo.train.betta=1", "stages.dpo.train.betta: unknown key of trl.DPOConfig (did you mean beta?)"),
        (
            "stages.dpo.model.path=x",
            'stages.dpo.model.path: stages.dpo.model is "stage:sft", not a mapping; set it as a whole',
        ),
        (
            "stages.sft.data.train[2].path=x",
            "stages.sft.data.train[2].path: stages.sft.data.train has 2 items, counted from 0",
        ),
        (
            "stages.sft.data.train.0.path=x",
            "stages.sft.data.train.0.path: stages.sft.data.train is a list; name an item, stages.sft.data.train[0]",
        ),
        ("stages.sft.batch[0]=x", "stages.sft.batch[0]: stages.sft.batch is not a list"),
        ("stages.sft.data.train[0].rows=x", 'stages.sft.data.train[0].rows: expected a whole number, found "x"'),
    ],
)  # fmt: skip
def test_a_wrong_set_is_told_as_such(
    override: str, expected: str, good: str, problems: Callable[..., list[str]]
) -> None:
    assert problems(good, [override]) == [f"--set: {expected}"]


def test_set_repairs_a_fault_of_the_file(good: str, problems: Callable[..., list[str]]) -> None:
    assert problems(good.replace("seed: 7", "seed: -1"), ["seed=1"]) == []
    assert problems(good.replace("learning_rate: 2e-4", "learning_rate: high"), ["stages.sft.train={}"]) == []


def test_set_max_steps_needs_no_word_about_epochs(good: str, problems: Callable[..., list[str]]) -> None:
    assert problems(good, ["stages.sft.train.max_steps=10"]) == []


def test_the_last_set_for_a_place_counts(load: Callable[..., Recipe]) -> None:
    assert load("seed=1", "seed=2").seed == 2


def test_the_file_is_named_as_typed(good: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("sub").mkdir()
    Path("sub/my.yaml").write_text("nam: x\n")
    with pytest.raises(RecipeError) as error:
        load_recipe("sub/../sub/my.yaml")
    assert error.value.problems == [
        "sub/../sub/my.yaml:1: stages: is missing: what runs, in this order; each stage names its `algorithm:`",
        "sub/../sub/my.yaml:1: nam: unknown key (did you mean name?)",
    ]


def test_planning_imports_nothing_heavy(good: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(good)
    script = (
        "import sys; from alignment.recipe.load import load_recipe; load_recipe('r.yaml'); "
        "print(sorted({name.partition('.')[0] for name in sys.modules} & "
        "{'torch', 'transformers', 'trl', 'peft', 'accelerate', 'datasets', 'numpy'}))"
    )
    root = Path(__file__).resolve().parents[2]
    command, env = [sys.executable, "-c", script], {"PYTHONPATH": str(root)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


@pytest.mark.parametrize("row", [row for row in ALGORITHMS.values() if row.config], ids=lambda row: row.name)
def test_every_algorithm_passes_with_its_defaults(row: Algorithm, problems: Callable[..., list[str]]) -> None:
    rewards = ", rewards: [{name: brief, length: 9}]" if "rewards" in row.sections else ""
    stage = f"{{algorithm: {row.name}, data: {{train: [{{path: a}}]}}{rewards}}}"
    text = f"name: x\nmodel: some/model\nstages: {{s: {stage}}}\n"
    assert problems(text) == []
    assert problems(text, ["stages.s.peft={}"]) == []


def test_every_recipe_of_the_repository_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).resolve().parents[2]
    monkeypatch.chdir(root)
    recipes = sorted((root / "recipes").rglob("*.yaml"))
    assert recipes
    for path in recipes:
        load_recipe(path)
