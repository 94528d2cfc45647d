"""Every shipped recipe loads, every row of the table has one, and the READMEs say what is there.

A recipe that does not load, a field that `recipes/README.md` does not explain and a copied recipe fail here.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from alignment.errors import ExitCode
from alignment.pipeline.fingerprint import is_local
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import load_recipe, resolve
from alignment.recipe.schema import Model, Recipe, Section, Stage
from alignment.recipe.upstream import display_name

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes").rglob("*.yaml"))
FOLDERS = sorted({path.parent for path in RECIPES} - {Path("recipes")})
README = (ROOT / "recipes/README.md").read_text(encoding="utf-8")
SIMILAR = 0.9  # share of common lines above which one recipe is a copy of another
# Values that are upstream's own mappings, not sections of ours.
OPEN = {"train", "peft", "config", "env", "columns"}


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Paths in recipes are relative to the folder in which the command is typed."""
    monkeypatch.chdir(ROOT)


def sections(section: type[Section]) -> Iterator[type[Section]]:
    """A section of the schema and all sections inside it."""
    yield section
    for field in section.model_fields.values():
        waiting = [field.annotation]
        while waiting:
            kind = waiting.pop()
            waiting += get_args(kind)
            if isinstance(kind, type) and issubclass(kind, Section):
                yield from sections(kind)


def keys(section: type[Section]) -> set[str]:
    return {field.alias or name for name, field in section.model_fields.items()}


SECTIONS = set(sections(Recipe))
ALL_KEYS = set().union(*map(keys, SECTIONS))


def written_keys(value: Any) -> Iterator[str]:
    """The keys of a YAML value, without those of upstream's mappings and the names of stages."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield key
            if key == "stages":
                yield from itertools.chain.from_iterable(written_keys(stage) for stage in inner.values())
            elif key not in OPEN or isinstance(inner, list):  # a list under `train` is data.train: sources
                yield from written_keys(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from written_keys(inner)


def lines(path: Path) -> set[str]:
    """The lines that say something: no comments, no blank ones."""
    found = (re.sub(r"\s+#.*", "", line).strip() for line in path.read_text(encoding="utf-8").splitlines())
    return {line for line in found if line and not line.startswith("#")}


def similarity(first: set[str], second: set[str]) -> float:
    return len(first & second) / min(len(first), len(second))


# --- the recipes ----------------------------------------------------------------------------------------------------


def test_there_are_recipes() -> None:
    assert Path("recipes/quickstart.yaml") in RECIPES
    assert len(RECIPES) >= 11


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    for name in recipe.stages:
        assert resolve(recipe, name).seed is not None
    names = [load_recipe(other).name for other in RECIPES if other != path]
    assert recipe.name not in names, "two recipes would share a run directory"


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_key_is_of_the_schema(path: Path) -> None:
    assert set(written_keys(yaml.safe_load(path.read_text(encoding="utf-8")))) <= ALL_KEYS


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_recipe_opens_with_its_launch_line(path: Path) -> None:
    head = path.read_text(encoding="utf-8").split("\nname:")[0]
    assert all(line.startswith("#") or not line for line in head.splitlines())
    assert f"alignment run {path}" in head


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name in ("tiny", "recipes")], ids=str)
def test_offline_recipe_names_only_files_of_the_repository(path: Path) -> None:
    recipe = load_recipe(path)
    for name in recipe.stages:
        stage = resolve(recipe, name)
        for source in _sources(stage):
            assert Path(source.path).is_file(), f"{name}: {source.path}"
        assert stage.model is None or stage.model.path is None, f"{name}: a model of the hub"
        assert all(link.startswith("stage:") for link in [*(stage.models or []), *stage.scorers])


@pytest.mark.parametrize("path", [p for p in RECIPES if p.parent.name == "tiny"], ids=str)
def test_tiny_recipe_is_tiny(path: Path) -> None:
    recipe = load_recipe(path)
    for name, stage in recipe.stages.items():
        assert all(source.rows is not None and source.rows <= 200 for source in _sources(stage)), name
        if stage.model is not None and stage.model.init is not None:
            assert stage.model.init.config["hidden_size"] <= 32, name


def test_every_algorithm_has_a_tiny_stage() -> None:
    tiny = [load_recipe(path) for path in RECIPES if path.parent.name == "tiny"]
    assert {stage.algorithm for recipe in tiny for stage in recipe.stages.values()} == set(ALGORITHMS)


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(RECIPES, 2)), ids=str)
def test_no_recipe_is_a_copy(first: Path, second: Path) -> None:
    assert similarity(lines(first), lines(second)) < SIMILAR


def test_a_copy_is_found() -> None:
    original = lines(Path("recipes/zephyr-7b/full.yaml"))
    copy = {line.replace("mistralai/Mistral-7B-v0.1", "my/model") for line in original}
    assert copy != original
    assert similarity(original, copy) >= SIMILAR


def test_no_recipe_trains_quantized_weights_under_zero3() -> None:
    for path in RECIPES:
        recipe = load_recipe(path)
        for name in recipe.stages:
            stage = resolve(recipe, name)
            if stage.model is not None and stage.model.quantization is not None:
                assert stage.launch is not None
                assert "zero3" not in (stage.launch.deepspeed or ""), f"{path}: {name}"


# --- the READMEs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", [pytest.param(s, id=s.__name__) for s in sorted(SECTIONS, key=repr)])
def test_readme_explains_every_field(section: type[Section]) -> None:
    # A field that only stands inside another one's sentence counts: `init`'s are written as `{train: {vocab_size: N}}`.
    code = " ".join(re.findall(r"`([^`\n]+)`", README))
    missing = {key for key in keys(section) if not re.search(rf"\b{key}\b", code)}
    assert not missing, f"recipes/README.md says nothing of {section.__name__}: {', '.join(sorted(missing))}"


def test_readme_lists_every_algorithm() -> None:
    for name, row in ALGORITHMS.items():
        schema = f"`{row.schema}`" if row.schema else "nothing"
        config = f"`{display_name(row.config)}`" if row.config else "nothing"
        assert f"| `{name}` | {schema} | {config} | {row.summary}" in README, f"recipes/README.md: row {name}"


def test_readme_lists_every_exit_code() -> None:
    table = re.findall(r"^\| (\d+) \|", README, re.MULTILINE)
    assert sorted(map(int, table)) == sorted(ExitCode)


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_readme_lists_every_recipe(path: Path) -> None:
    assert f"[`{path.relative_to('recipes')}`]" in README


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_folder_has_a_readme_with_its_launch_lines(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    for path in folder.glob("*.yaml"):
        assert f"alignment run {path}" in text
    if folder.name != "tiny":
        assert "Hardware" in text or "hardware" in text
        assert "Where the values come from" in text
        assert "measured" in text, "say what the results are, or that they are not yet measured"


def test_links_in_the_readmes_lead_somewhere() -> None:
    for readme in Path("recipes").rglob("README.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text(encoding="utf-8")):
            assert target.startswith("https://") or (readme.parent / target).exists(), f"{readme}: {target}"


def test_the_annotated_example_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    example = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(example) == 1
    (tmp_path / "example.yaml").write_text(example[0], encoding="utf-8")
    (tmp_path / "my").mkdir()
    (tmp_path / "my/judge.py").touch()
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("example.yaml")
    assert list(recipe.stages) == ["sft", "dpo", "evaluate"]


def test_the_commands_in_the_readmes_load() -> None:
    """Every `alignment run RECIPE --set ...` in a README names a recipe and values that it takes."""
    count = 0
    for readme in Path("recipes").rglob("README.md"):
        text = readme.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in re.findall(r"^alignment run +(recipes/.*)$", text, re.MULTILINE):
            words = shlex.split(line, comments=True)
            if words[0] == "recipes/x.yaml":  # a placeholder
                continue
            load_recipe(words[0], [words[i + 1] for i, word in enumerate(words) if word == "--set"])
            count += 1
    assert count >= len(RECIPES) - 1


def test_hh_rlhf_can_be_run_on_local_files() -> None:
    """The line of its README replaces every name of the hub."""
    text = Path("recipes/hh-rlhf/README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    line = next(line for line in text.splitlines() if line.startswith("alignment run") and "--set" in line)
    words = shlex.split(line)
    recipe = load_recipe(words[2], [words[i + 1] for i, word in enumerate(words) if word == "--set"])
    stages = [resolve(recipe, name) for name in recipe.stages]
    assert recipe.model is not None
    assert (recipe.model.path or "").startswith("/path/to/")
    for stage in stages:
        assert all(source.path.startswith("/path/to/") for source in _sources(stage))


def _sources(stage: Stage) -> list[Any]:
    data = [*stage.data.train, *stage.data.eval] if stage.data else []
    return [*data, *(stage.prompts or []), *(stage.pairs or [])]


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_model_of_the_hub_is_pinned(path: Path) -> None:
    recipe = load_recipe(path)
    named = [text for stage in recipe.stages.values() for text in (*(stage.models or ()), *stage.scorers)]
    models = [recipe.model, *(stage.model for stage in recipe.stages.values()), *map(Model.model_validate, named)]
    open_ = [model.path for model in models if model is not None and model.path is not None and model.revision is None]
    assert [name for name in open_ if not is_local(name)] == []


NO_COMMIT_KNOWN = {"allenai/llama-3.1-tulu-3-8b-preference-mixture"}  # said in its README


@pytest.mark.parametrize("path", RECIPES, ids=str)
def test_every_data_set_of_the_hub_is_pinned(path: Path) -> None:
    sources = []
    for stage in load_recipe(path).stages.values():
        sources += [*(stage.prompts or ()), *(stage.pairs or ())]
        sources += [*stage.data.train, *stage.data.eval] if stage.data is not None else []
    moving = {source.path for source in sources if not is_local(source.path) and source.revision is None}
    assert moving <= NO_COMMIT_KNOWN
