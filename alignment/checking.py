"""`alignment check`: what can be known about a recipe before anything is trained.

First, without torch: the recipe, that every file is there, that its first records are what the stage wants. Then,
unless it is to be quick: every row, and for stages whose tokenizer is at hand the proof that the template trains the
right tokens. What was not checked is said, with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignment.data import sources
from alignment.data.checks import Defect, check_row
from alignment.data.opened import open_source, rows_of
from alignment.errors import ExitCode, RecipeError, UserError
from alignment.pipeline.fingerprint import is_local, is_template_file
from alignment.recipe.algorithms import ALGORITHMS, Schema
from alignment.recipe.load import resolve
from alignment.recipe.schema import Recipe, Source, Stage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = 20  # records of each source that are looked at without --quick, too
PROOF_ROWS = 100  # rows that are taken through the template


@dataclass
class Findings:
    """What a check found: `problems` make it fail; each entry is one line that starts with the place in the recipe."""

    problems: list[str] = field(default_factory=list)
    checked: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)

    def problem(self, place: str, text: object) -> None:
        """Note a problem once, however many stages share it."""
        line = f"{place}: {text}"
        if line not in self.problems:
            self.problems.append(line)


def check(recipe: Recipe, *, quick: bool, names: Sequence[str] | None = None) -> Findings:
    """Check the files of a loaded recipe; without `quick` also all rows and the templates (seconds to minutes).

    Args:
        names: only these stages (with `quick`).
    """
    found = Findings()
    for name in recipe.stages if names is None else names:
        stage = resolve(recipe, name)
        _check_files(name, stage, found)
        for place, source, schema in _sources(name, stage):
            _check_head(place, source, schema, found)
        for place, source in _against(recipe, name):
            _check_there(place, source, found)
    if quick:
        found.unchecked.append("rows beyond the first of each file, and the templates: leave out --quick")
    elif not found.problems:
        _check_rows(recipe, found)
    return found


def measure(recipe: Recipe, arguments: argparse.Namespace) -> int:
    """`check --probe`: measure the memory; 1 where the plan says too little, or a stage does not fit."""
    if not arguments.probe or arguments.gpus is not None or arguments.memory is not None:
        raise RecipeError("--stage goes with --probe; --gpus and --memory do not: it measures what is here")
    from alignment.training.quiet import before_import

    before_import()
    from alignment.training.probe_memory import probe

    def say(line: str) -> None:
        if not arguments.json:
            print(line, flush=True)

    found = probe(recipe, arguments.stage or list(recipe.stages), run=arguments.runs / recipe.name, say=say)
    code = int(ExitCode.FAILED if any(one.problem for one in found) else ExitCode.DONE)
    if arguments.json:
        print(json.dumps({"code": code, "probe": {one.stage: asdict(one) for one in found}}))
    return code


def missing_files(recipe: Recipe, names: Sequence[str]) -> list[str]:
    """One line for every local file or folder that these stages name and that is not there."""
    found = Findings()
    for name in names:
        stage = resolve(recipe, name)
        _check_files(name, stage, found)
        named = [*((place, source) for place, source, _ in _sources(name, stage)), *_against(recipe, name)]
        for place, source in named:
            _check_there(place, source, found)
    return found.problems


def _check_there(place: str, source: Source, found: Findings) -> None:
    """The local files of a source are there."""
    try:
        sources.find_files(source)
    except UserError as error:
        found.problem(f"{place}.path", error)


def _against(recipe: Recipe, name: str) -> Iterator[tuple[str, Source]]:
    """The evaluation sets that a stage itself names, which may be of any format, with their places in the recipe."""
    data = recipe.stages[name].data
    for index, source in enumerate(data.against if data is not None else ()):
        yield f"stages.{name}.data.against[{index}]", source


def _sources(name: str, stage: Stage) -> Iterator[tuple[str, Source, Schema]]:
    """Every source of a stage, with its place in the recipe and the schema its rows must have."""
    row = ALGORITHMS[stage.algorithm]
    if stage.data is not None and row.schema is not None:
        for key in ("train", "eval"):
            for index, source in enumerate(getattr(stage.data, key)):
                yield f"stages.{name}.data.{key}[{index}]", source, row.schema
    for key, schema in (("prompts", "prompts"), ("pairs", "preference")):
        for index, source in enumerate(getattr(stage, key) or ()):
            yield f"stages.{name}.{key}[{index}]", source, schema  # type: ignore[misc]


def _check_files(name: str, stage: Stage, found: Findings) -> None:
    """Model folders, template file and DeepSpeed file."""
    model = stage.model
    paths = [] if model is None else [("model", model.path)]
    if model is not None and model.init is not None:
        paths.append(("model.init.tokenizer", model.init.tokenizer.path))
    for key, path in paths:
        if path is None:
            continue
        if is_local(path):
            wanted = "tokenizer.json" if key.endswith("tokenizer") else "config.json"
            if not any((Path(path).expanduser() / file).is_file() for file in (wanted, "adapter_config.json")):
                found.problem(f"stages.{name}.{key}", f"{path}: no model folder ({wanted} is not in it)")
        else:
            found.unchecked.append(f"stages.{name}.{key}: {path} is a hub name, which is not looked up here")
    template = stage.chat_template
    if template is not None and is_template_file(template) and not Path(template).expanduser().is_file():
        found.problem(f"stages.{name}.chat_template", f"no such file: {template}")
    file = stage.launch.deepspeed if stage.launch else None
    if file is not None:
        try:
            json.loads(Path(file).read_bytes())
        except OSError as error:
            found.problem(f"stages.{name}.launch.deepspeed", f"{file}: cannot read: {error.strerror}")
        except ValueError as error:
            found.problem(f"stages.{name}.launch.deepspeed", f"{file}: not JSON ({error})")


def _check_head(place: str, source: Source, schema: Schema, found: Findings) -> None:
    """The first records of a source: they parse, have a known format, and one of them can be used."""
    try:
        if sources.find_files(source) is None:
            found.unchecked.append(f"{place}: {source.path} is a hub name, which is not downloaded here")
            return
        opened = open_source(source, schema)
        sample = list(itertools.islice(opened.records, SAMPLE))
    except UserError as error:
        found.problem(place, error)
        return
    defects = []
    for record in sample:
        try:
            for row in rows_of(record, opened):
                check_row(row, schema)
        except Defect as defect:
            defects.append(f"{record.where}: {defect.reason} ({defect.detail})")
    if len(defects) == len(sample):
        found.problem(place, f"none of the first {len(sample)} rows can be used: {defects[0]}")
    else:
        found.checked.append(f"{place}: {source.path}: {opened.says}: {opened.why}")


def _check_rows(recipe: Recipe, found: Findings) -> None:
    """Every row, and the template on the first rows, through the code that will prepare them."""
    from alignment.data.prepare import load_rows
    from alignment.recipe.schema import DataLimits

    for name in recipe.stages:
        stage = resolve(recipe, name)
        by_schema: dict[tuple[str, Schema], list[Source]] = {}
        for place, source, schema in _sources(name, stage):
            if sources.find_files(source) is not None:
                by_schema.setdefault((place.partition("[")[0], schema), []).append(source)
        data = stage.data
        for (place, schema), wanted in by_schema.items():
            limits, strict = stage.limits or DataLimits(), False
            if data is not None:
                limits, strict = data.limits, data.strict
            said: list[str] = []
            try:
                rows = load_rows(
                    wanted, schema, seed=stage.seed or 0, strict=strict, limits=limits, say=said.append, data=data,
                    held_out=place.endswith("data.eval"),
                )  # fmt: skip
            except UserError as error:
                found.problem(place, error)
                continue
            found.checked += [f"{place}: {line}" for line in said]
            if place.endswith("data.train"):
                _prove_template(recipe, name, stage, rows, found)


def _prove_template(recipe: Recipe, name: str, stage: Stage, rows: list[dict[str, Any]], found: Findings) -> None:
    """Take rows through the template of a stage, and show what is trained of the first."""
    schema = ALGORITHMS[stage.algorithm].schema
    if schema not in ("messages", "preference", "unpaired"):
        return
    place = f"stages.{name}.chat_template"
    folder = _tokenizer_folder(recipe, stage)
    if folder is None:
        found.unchecked.append(f"{place}: the tokenizer is not on this machine yet (made or downloaded by the run)")
        return
    from alignment.data import proof
    from alignment.models.tokenizer import fit, load_tokenizer

    try:
        tokenizer = load_tokenizer(folder)
        fit(tokenizer, stage.chat_template, conversational=True)
        texts = [_trained_text(tokenizer, row, schema) for row in rows[:PROOF_ROWS]]
        proof.prove(tokenizer, rows[:PROOF_ROWS], schema).enforce("proof")
    except UserError as error:
        found.problem(place, error)
        return
    found.checked.append(f"{place}: {len(texts)} rows tokenize; of the first one, {texts[0]!r} is trained")


def _trained_text(tokenizer: PreTrainedTokenizerBase, row: dict[str, Any], schema: str) -> str:
    """The text of the tokens of a row that the loss sees. Raises DataError when template and row do not agree."""
    from alignment.data import templates

    if schema == "messages":
        encoded = templates.encode_messages(tokenizer, row["messages"], row.get("tools"))
        ids = [token for token, trained in zip(encoded.ids, encoded.trained, strict=True) if trained]
    else:
        answer = row["chosen" if schema == "preference" else "completion"]
        ids = list(templates.encode_completion(tokenizer, row["prompt"], answer, row.get("tools"))[1])
    text = tokenizer.decode(ids)
    return text if len(text) <= 60 else f"{text[:28]} ... {text[-28:]}"


def _tokenizer_folder(recipe: Recipe, stage: Stage) -> Path | None:
    """The local folder from which a stage's tokenizer comes, through its parents; None where there is none yet."""
    while stage.model is not None and stage.model.stage is not None:
        stage = resolve(recipe, stage.model.stage)
    if stage.model is None:
        return None
    path = stage.model.init.tokenizer.path if stage.model.init is not None else stage.model.path
    return Path(path).expanduser() if path is not None and is_local(path) else None
