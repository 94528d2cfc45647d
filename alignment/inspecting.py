"""`alignment data check | show | prepare | score`: from a recipe, or from files, to rows, tokenizers and reports.

The tokenizer of a stage is made as the run makes it (loaded or trained at the root of the chain, fitted to the template
of every stage on the way, saved and read back), so that the tables prepared here are those that the run finds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from alignment.errors import DataError, RecipeError, UserError
from alignment.recipe.algorithms import ALGORITHMS, Schema
from alignment.recipe.load import full_train, load_recipe, max_length, resolve
from alignment.recipe.schema import Recipe, Resolved, Source, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from alignment.data.report import Subject

CACHE = ".cache"  # of a `runs/` folder; the worker keeps its token tables there
RECIPES = (".yaml", ".yml")
TEXT = ("schema", "sources", "rows", "findings", "limits_passed")  # what two reports on the same rows have in common
Say = Callable[[str], None]


@dataclass
class Tokenizers:
    """The tokenizers of a recipe's stages, each made once."""

    recipe: Recipe
    _made: dict[str, PreTrainedTokenizerBase] = field(default_factory=dict)

    def of(self, name: str) -> PreTrainedTokenizerBase:
        """The tokenizer with which a stage's rows are tokenized.

        Raises:
            UserError: it is not on this machine, or does not fit the template.
        """
        if name not in self._made:
            self._made[name] = _reloaded(self._start(name), resolve(self.recipe, name))
        return self._made[name]

    def _start(self, name: str) -> PreTrainedTokenizerBase:
        """What a stage begins with: its parent's, one from disk, or one trained on its own rows."""
        from alignment.data import templates
        from alignment.data.prepare import load_rows
        from alignment.models.tokenizer import load_tokenizer, train_tokenizer

        stage = resolve(self.recipe, name)
        model = stage.model
        if model is None:
            raise DataError("the stage names no model, so there is no tokenizer")
        if model.stage is not None:
            return self.of(model.stage)
        if model.init is None:
            assert model.path is not None
            return load_tokenizer(Path(model.path).expanduser(), model.revision)
        if model.init.tokenizer.train is None:
            assert model.init.tokenizer.path is not None
            return load_tokenizer(Path(model.init.tokenizer.path).expanduser())
        data = stage.data
        assert data is not None
        special = templates.template(stage.chat_template).special_tokens if stage.chat_template else ()
        rows = load_rows(
            data.train, "text", seed=stage.seed, strict=data.strict, limits=data.limits, say=lambda text: None,
            data=data,
        )  # fmt: skip
        return train_tokenizer((row["text"] for row in rows), model.init.tokenizer.train.vocab_size, special)


def _reloaded(tokenizer: PreTrainedTokenizerBase, stage: Stage) -> PreTrainedTokenizerBase:
    """The tokenizer fitted to a stage, as it is read back from the stage's folder."""
    import copy

    from alignment.models.tokenizer import fit, load_tokenizer

    fitted = copy.deepcopy(tokenizer)
    fit(fitted, stage.chat_template, conversational=ALGORITHMS[stage.algorithm].schema != "text")
    with tempfile.TemporaryDirectory() as folder:
        fitted.save_pretrained(folder)
        return load_tokenizer(folder)


# --- what to look at ------------------------------------------------------------------------------------------------


def trained_stages(recipe: Recipe, wanted: Sequence[str]) -> list[str]:
    """The stages that learn from rows; of those wanted, or all.

    Raises:
        RecipeError: no such stage, or one without rows.
    """
    for name in wanted:
        resolve(recipe, name)  # names what there is
        if recipe.stages[name].data is None:
            having = ", ".join(other for other, stage in recipe.stages.items() if stage.data is not None)
            raise RecipeError(f"stage {name} trains on no rows; those that do are {having or 'none'}")
    return list(wanted) or [name for name, stage in recipe.stages.items() if stage.data is not None]


def subjects(recipe: Recipe, names: Sequence[str], *, strict: bool, against: Sequence[Source]) -> Iterator[Subject]:
    """What is reported of each stage, with its tokenizer where that can be had."""
    from alignment.data.report import Subject

    tokenizers = Tokenizers(recipe)
    for name in names:
        resolved = resolve(recipe, name)
        data, schema = resolved.data, ALGORITHMS[resolved.algorithm].schema
        assert data is not None and schema is not None
        tokenizer, why = None, ""
        try:
            tokenizer = tokenizers.of(name)
        except UserError as error:
            why = str(error)
        sets = [*against, *(source for source in data.against if source not in against)]
        yield Subject(
            name=name, schema=schema, stage=resolved, against=sets, strict=strict or data.strict, tokenizer=tokenizer,
            why_no_tokens=why, max_length=max_length(resolved),
            grouped=full_train(resolved).get("train_sampling_strategy") == "group_by_length",
        )  # fmt: skip


def file_subject(
    files: Sequence[Source], *, strict: bool, against: Sequence[Source], tokenizer: str | None, template: str | None
) -> Subject:
    """Files as one subject; their schema is found from the first records.

    Raises:
        DataError: files that fit no format, or not the same.
    """
    from alignment.data.report import Subject
    from alignment.models.tokenizer import fit, load_tokenizer

    kinds = {file.path: schema_of(file) for file in files}
    if len(set(kinds.values())) > 1:
        found = ", ".join(f"{file} ({kind})" for file, kind in kinds.items())
        raise DataError(f"these files hold rows of different kinds: {found}; check them one by one")
    schema = next(iter(kinds.values()))
    algorithm = next(row for row in ALGORITHMS.values() if row.schema == schema)
    data = {"train": [file.model_dump(exclude_unset=True) for file in files]}
    stage = Resolved.model_validate({
        "algorithm": algorithm.name, "data": data, "seed": 0, "precision": {}, "launch": {}, "checkpoints": {},
        "report_to": [], "chat_template": template,
    })  # fmt: skip
    loaded, why = None, "give --tokenizer FOLDER (and --chat-template), or check a recipe"
    if tokenizer is not None:
        loaded = load_tokenizer(Path(tokenizer).expanduser())
        fit(loaded, template, conversational=schema != "text")
    elif template is not None:
        raise RecipeError("--chat-template needs --tokenizer")
    return Subject(
        name="files", schema=schema, stage=stage, against=against, strict=strict, tokenizer=loaded, why_no_tokens=why,
    )  # fmt: skip


def schema_of(source: Source) -> Schema:
    """The schema in which a file is looked at: the one that suits its format.

    Raises:
        DataError: it cannot be read, or its columns fit none.
    """
    from alignment.data.opened import open_source

    return open_source(source, None).schema


def is_recipe(path: str) -> bool:
    """Whether a word of the command line is a recipe rather than rows, or Axolotl's description of rows."""
    if not path.endswith(RECIPES):
        return False
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return True  # which says what is wrong with it
    return not (isinstance(content, dict) and "datasets" in content and "stages" not in content)


# --- the commands ---------------------------------------------------------------------------------------------------


def check(
    paths: Sequence[str], *, overrides: Sequence[str], stages: Sequence[str], strict: bool, against: Sequence[str],
    tokenizer: str | None, template: str | None, columns: Sequence[str], format: str | None, subset: str | None,
    runs: Path, say: Say,
) -> Iterator[dict[str, Any]]:  # fmt: skip
    """The report of each stage of a recipe, or of files, one by one."""
    from alignment.data.convert import source_of
    from alignment.data.report import examine

    held_against = [Source(path=path) for path in against]
    if not any(map(is_recipe, paths)):
        if stages or overrides:
            raise RecipeError("--stage and --set belong to a recipe")
        files = [source_of(path, columns=columns, format=format, subset=subset) for path in paths]
        subject = file_subject(files, strict=strict, against=held_against, tokenizer=tokenizer, template=template)
        yield examine(subject, cache=runs / CACHE, say=say)
        return
    if len(paths) > 1:
        raise RecipeError(f"give one recipe, or files of rows; found {' '.join(paths)}")
    if tokenizer is not None or template is not None or columns or format is not None or subset is not None:
        raise RecipeError(
            "--tokenizer, --chat-template, --column, --format and --subset belong to files; a recipe names its own"
        )
    recipe = load_recipe(Path(paths[0]), list(overrides))
    reports: list[dict[str, Any]] = []
    for subject in subjects(recipe, trained_stages(recipe, stages), strict=strict, against=held_against):
        report = examine(subject, cache=runs / CACHE, say=say)
        same = (other["stage"] for other in reports if all(other[key] == report[key] for key in TEXT))
        report["same_rows_as"] = next(same, None)
        reports.append(report)
        yield report


def total(reports: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What `--json` prints: rows and findings of all stages, and the report of each."""
    from collections import Counter

    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report["rows"]["dropped"])
    return {
        "code": 1 if any(report["limits_passed"] for report in reports) else 0,
        "rows": {
            "in": sum(report["rows"]["in"] for report in reports),
            "kept": sum(report["rows"]["kept"] for report in reports),
            "dropped": dict(dropped.most_common()),
        },
        "findings": [{"stage": report["stage"], **found} for report in reports for found in report["findings"]],
        "stages": list(reports),
    }


def prepare(recipe_path: Path, *, overrides: Sequence[str], stages: Sequence[str], runs: Path, say: Say) -> list[str]:
    """Tokenize the rows of every stage into the cache that training reads; the names of the stages done.

    Raises:
        UserError: a stage whose rows or tokenizer cannot be had.
    """
    from alignment.data.prepare import prepare as tokenized

    recipe = load_recipe(recipe_path, list(overrides))
    tokenizers = Tokenizers(recipe)
    names = trained_stages(recipe, stages)
    for name in names:
        stage = resolve(recipe, name)
        schema = ALGORITHMS[stage.algorithm].schema
        assert schema is not None
        try:
            tokenized(
                stage, schema, tokenizers.of(name), max_length=max_length(stage), cache=runs / CACHE,
                say=lambda text, name=name: say(f"{name}: {text}"),  # type: ignore[misc]
            )  # fmt: skip
        except UserError as error:
            raise type(error)(f"stages.{name}: {error}") from None
    return names


def show(
    recipe_path: Path, *, overrides: Sequence[str], stage: str, row: str, worst: str | None, ids: bool, color: bool
) -> str:
    """One row of a stage as its model sees it.

    Raises:
        UserError: no such stage or row, or no tokenizer yet.
    """
    from alignment.data import report
    from alignment.data import show as showing
    from alignment.data.tokens import Settings

    recipe = load_recipe(recipe_path, list(overrides))
    trained_stages(recipe, [stage])
    resolved = resolve(recipe, stage)
    data, schema = resolved.data, ALGORITHMS[resolved.algorithm].schema
    assert data is not None and schema is not None
    tokenizer = Tokenizers(recipe).of(stage)
    rows = report.training_rows(data, schema, resolved.seed)
    settings = Settings(
        schema, max_length(resolved), data.on_overlong, resolved.seed, data.on_special_token
    )  # fmt: skip
    if schema == "text":
        if worst is not None or not row.isdecimal():
            raise RecipeError("documents are joined and cut into blocks, none is lost: give --row and a number")
        return showing.block(rows.rows, int(row), settings, tokenizer, ids=ids, color=color)
    if worst is not None:
        index = showing.longest(rows.rows, settings, tokenizer, cut_only=worst == "truncation")
    else:
        index = showing.place(row, rows.where)
    title = f"{stage}, row {index:,} of {len(rows.rows):,}: {rows.where[index]}"
    return showing.page(rows.rows[index], title, settings, tokenizer, ids=ids, color=color)
