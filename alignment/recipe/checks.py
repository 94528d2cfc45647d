"""What a recipe must hold beyond the shape of its parts: links, sections, trainer keys, batches, evaluation."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass

from alignment.recipe.algorithms import ALGORITHMS, Algorithm, Kind
from alignment.recipe.online import adapter_problems, group_problems
from alignment.recipe.problems import Place, Problems, did_you_mean, shown
from alignment.recipe.resolve import full_train, parents, resolve
from alignment.recipe.schedule import schedule_problems
from alignment.recipe.schema import LINK, Recipe, Stage, linked, pinned
from alignment.recipe.sharding import deepspeed_problems
from alignment.recipe.trainer_keys import check_model_config, check_peft, check_train

EVERYWHERE = frozenset({"algorithm", "seed", "launch"})  # sections that every algorithm takes
KIND_IN_WORDS = {"causal-lm": "a language model", "sequence-classification": "a reward model", None: "no model"}


@dataclass(frozen=True)
class _Subject:
    """One stage under check: as written, as resolved, and the whole it stands in.

    `order` names all stages as written, those included that had to be cut out.
    """

    recipe: Recipe
    order: Sequence[str]
    name: str
    stage: Stage
    resolved: Stage
    row: Algorithm
    problems: Problems

    def add(self, *place: str | int, message: str) -> None:
        self.problems.add(("stages", self.name, *place), message)


def check_stages(recipe: Recipe, order: Sequence[str], problems: Problems) -> None:
    """Add the problems of every stage.

    Args:
        recipe: the recipe without its faulty parts.
        order: the names of all stages, the faulty ones included.
        problems: takes what is found.
    """
    if recipe.model is not None and recipe.model.stage is not None:
        problems.add(("model",), "links to a stage; write the link in the stages that start from it")
    for file in ("deepspeed", "accelerate"):
        _check_file(getattr(recipe.launch, file), ("launch", file), problems)
    _check_deepspeed(recipe.launch.deepspeed, ("launch", "deepspeed"), problems)
    for name, stage in recipe.stages.items():
        row = ALGORITHMS.get(stage.algorithm)
        if row is None:
            known = f"{did_you_mean(stage.algorithm, ALGORITHMS, cutoff=0.7)}; known are {', '.join(ALGORITHMS)}"
            problems.add(("stages", name, "algorithm"), f"unknown algorithm {shown(stage.algorithm)}{known}")
            continue
        subject = _Subject(recipe, order, name, stage, resolve(recipe, name), row, problems)
        _check_sections(subject)
        _check_launch(subject)
        _check_model(subject)
        _check_links(subject)
        if row.config is not None:
            _check_trainer(subject)
            _check_batch(subject)
        if "rewards" in row.sections:
            _check_rewards(subject)
        if "models" in row.sections:
            _check_evaluate(subject)


def _check_file(path: str | None, place: Place, problems: Problems) -> None:
    if path is not None and not os.path.isfile(path):
        problems.add(place, f"no such file: {path}")


def _check_deepspeed(path: str | None, place: Place, problems: Problems) -> None:
    for line in deepspeed_problems(path) if path is not None else ():
        problems.add(place, line)


def _check_sections(subject: _Subject) -> None:
    """Sections the algorithm does not take, and those it cannot do without."""
    row, stage = subject.row, subject.stage
    for section in Stage.model_fields:
        if section in stage.model_fields_set and section not in row.sections | EVERYWHERE:
            taken = ", ".join(sorted(row.sections))
            subject.add(section, message=f"is not read by the algorithm {row.name}, which takes {taken}; remove it")
    if row.schema is not None and stage.data is None:
        subject.add("data", message=f"is missing: {row.name} learns from it (data: {{train: [{{path: ...}}]}})")
    if stage.launch is not None:
        for file in ("deepspeed", "accelerate"):
            _check_file(getattr(stage.launch, file), ("stages", subject.name, "launch", file), subject.problems)
        _check_deepspeed(stage.launch.deepspeed, ("stages", subject.name, "launch", "deepspeed"), subject.problems)


def _check_launch(subject: _Subject) -> None:
    """Processes that nodes share evenly, and numbers that are said once."""
    own, launch = subject.stage.launch, subject.resolved.launch
    assert launch is not None
    place: Place = ("launch",) if own is None else ("stages", subject.name, "launch")
    per_node, rest = divmod(launch.processes, launch.machines)
    gpus = launch.slurm.gpus_per_node if launch.slurm is not None else None
    if launch.nodes not in (1, launch.machines):
        message = f"nodes is {launch.nodes} and slurm.nodes is {launch.machines}: give one of them"
    elif launch.accelerate is None and rest:
        near = sorted({max(1, per_node) * launch.machines, (per_node + 1) * launch.machines})
        message = (
            f"{launch.processes} processes (of all nodes together) cannot be shared out evenly to {launch.machines} "
            f"nodes; the nearest legal values are {' and '.join(map(str, near))}"
        )
    elif launch.accelerate is None and gpus and gpus < per_node:
        message = f"{per_node} processes on each node, but slurm.gpus_per_node is {gpus}"
    else:
        return
    subject.problems.add(place, message)


def _model_place(subject: _Subject) -> Place:
    """Where the model of a stage is written: in the stage, or at the top."""
    return ("model",) if subject.stage.model is None else ("stages", subject.name, "model")


def _check_model(subject: _Subject) -> None:
    """Exactly one start, of a form that the algorithm can use."""
    row, model = subject.row, subject.resolved.model
    if "model" not in row.sections:
        return
    if model is None:
        subject.add("model", message="is missing: give it here, or at the top of the recipe for all stages")
        return
    place = _model_place(subject)
    if model.init is not None:
        if row.init:
            check_model_config(model.init.config, (*place, "init", "config"), subject.problems)
        else:
            starts = ", ".join(name for name, other in ALGORITHMS.items() if other.init)
            message = f"random weights are for {starts}; {row.name} starts from `{LINK}<name>` or `path: ...`"
            subject.problems.add((*place, "init"), message)
    parent = subject.recipe.stages.get(model.stage or "")
    continues = parent is not None and parent.peft is not None
    if model.quantization is not None and subject.stage.peft is None and not continues:
        message = f"quantized weights cannot be trained; give `peft:` in stage {subject.name}, or remove it"
        subject.problems.add((*place, "quantization"), message)
    if model.path is not None and model.path in subject.order and not os.path.exists(model.path):
        subject.problems.add(place, f"no such folder: {model.path}; write {LINK}{model.path} to link to the stage")
    _check_commit(subject, model.path, place)


def _check_links(subject: _Subject) -> None:
    """Every `stage:<name>`: it exists, runs earlier, and publishes what is wanted."""
    stage, row = subject.stage, subject.row
    if stage.model is not None and stage.model.stage is not None and "model" in row.sections:
        _check_link(subject, ("model",), stage.model.stage, row.starts_from)
    for index, text in enumerate(stage.models or ()):
        _check_link(subject, ("models", index), linked(text), "causal-lm")
        _check_commit(subject, text, ("stages", subject.name, "models", index))
    for index, text in enumerate(stage.scorers):
        _check_link(subject, ("scorers", index), linked(text), "sequence-classification")
        _check_commit(subject, text, ("stages", subject.name, "scorers", index))


def _check_commit(subject: _Subject, text: str | None, place: Place) -> None:
    """A hub name with something else than a whole commit behind it: a branch may be another model tomorrow."""
    found = re.fullmatch(r"([\w.-]+/[\w.-]+)@(.+)", text or "")
    if found and pinned(found[0])[1] is None and not os.path.exists(found[0]):
        message = f"{found[2]} is no commit of {found[1]}; write all of its 40 hexadecimal digits"
        subject.problems.add(place, message)


def _check_link(subject: _Subject, place: Place, target: str | None, wanted: Kind) -> None:
    if target is None:
        return
    order, name = subject.order, subject.name
    if target not in order:
        message = f"no stage is named {shown(target)}{did_you_mean(target, order)}"
    elif target == name:
        message = "links to itself; name an earlier stage"
    elif _reaches(subject.recipe, target, name):
        message = f"links in a circle: {target} itself builds on {name}; break one of the two links"
    elif order.index(target) > order.index(name):
        message = f"links to {target}, which runs later; stages run as they are written, so move {target} up"
    else:
        message = _wrong_kind(subject, target, wanted)
    if message:
        subject.add(*place, message=message)


def _reaches(recipe: Recipe, start: str, goal: str) -> bool:
    """Whether a stage builds on another one, directly or through others."""
    seen, waiting = set(), [start]
    while waiting:
        name = waiting.pop()
        if name == goal:
            return True
        if name not in seen and name in recipe.stages:
            seen.add(name)
            waiting += parents(recipe.stages[name])
    return False


def _wrong_kind(subject: _Subject, target: str, wanted: Kind) -> str:
    """What is wrong with the model that a stage publishes, and the nearest one that would do; empty if it is right."""
    stages = subject.recipe.stages
    row = ALGORITHMS.get(stages[target].algorithm) if target in stages else None
    if row is None or row.publishes == wanted:
        return ""
    earlier = subject.order[: subject.order.index(subject.name)]
    fit = [
        name
        for name in earlier
        if name in stages and (other := ALGORITHMS.get(stages[name].algorithm)) and other.publishes == wanted
    ]
    origin = stages[target].model
    best = origin.stage if origin is not None and origin.stage in fit else fit[-1] if fit else None
    remedy = f"use {LINK}{best}" if best else "add such a stage before this one"
    published = KIND_IN_WORDS[row.publishes]
    return f"{target} publishes {published} ({row.name}), and {KIND_IN_WORDS[wanted]} is needed; {remedy}"


def _check_trainer(subject: _Subject) -> None:
    """`train:` and `peft:` key by key; then what only the whole of `train:` tells."""
    stage, row = subject.stage, subject.row
    sound = check_train(stage.train, row, ("stages", subject.name, "train"), subject.problems)
    if stage.peft is not None:
        check_peft(stage.peft, ("stages", subject.name, "peft"), subject.problems)
    train = {key: value for key, value in stage.train.items() if key in sound}
    full = full_train(stage.model_copy(update={"train": train}))
    for key, message in adapter_problems(stage.peft or {}) if row.groups else ():
        subject.add("peft", key, message=message)
    told = set()
    for key, message in (*row.needs(full), *schedule_problems(subject.resolved, full, sound)):
        subject.add("train", key, message=message)
        told.add(key)
    if full.get("sync_ref_model") and stage.peft is not None:
        subject.add("train", "sync_ref_model", message="cannot go with peft: there is no second model to keep in step")
    attention = subject.resolved.model.attention if subject.resolved.model is not None else ""
    for key in ("packing", "padding_free"):
        if full.get(key) and key not in told and not attention.startswith("flash_attention"):
            message = (
                f"needs `model.attention: flash_attention_2`: {attention or 'another'} attention looks across rows"
            )
            subject.add("train", key, message=message)
    if full.get("packing") and full.get("max_length") is None:
        subject.add("train", "packing", message="needs a max_length: the length of a pack")
    place: Place = ("stages", subject.name, "train", "max_steps")
    both = {"max_steps", "num_train_epochs"} <= sound and train["max_steps"] > 0
    # `--set ...max_steps=10` is the usual way to try a recipe out, and says plainly what it means.
    if both and not subject.problems.from_command_line(place):
        subject.problems.add(place, "overrides num_train_epochs; give one of the two")


def _check_batch(subject: _Subject) -> None:
    """The rows of an optimizer step are whole forward passes on every process.

    The number of processes of an own `accelerate` configuration is not known here; the worker repeats the check.
    """
    launch, batch = subject.resolved.launch, subject.resolved.batch
    assert launch is not None
    step = batch.per_device * launch.processes
    least = subject.row.smallest_batch
    if batch.per_device < least:
        message = f"must be at least {least}: {subject.row.name} compares the rows of a forward pass"
        subject.add("batch", "per_device", message=message)
    whole, rest = divmod(batch.global_, step)
    if rest and launch.accelerate is None:
        legal = [str(rows) for rows in (whole * step, (whole + 1) * step) if rows]
        message = (
            f"{batch.global_} rows cannot be split over {launch.processes} processes x {batch.per_device} rows "
            f"(batch.per_device); the nearest legal value{'s are' if whole else ' is'} {' or '.join(legal)}"
        )
        subject.add("batch", "global", message=message)
    elif subject.row.groups and launch.accelerate is None:
        for place, message in group_problems(subject.resolved, full_train(subject.stage), launch.processes):
            subject.add(*place, message=message)


def _check_rewards(subject: _Subject) -> None:
    """Each reward has a name of its own, and a function or a model that is there."""
    stage, trains = subject.stage, subject.row.config is not None
    if trains and not stage.rewards:
        message = f"is missing: what {subject.row.name} maximises, [{{name: rm, model: {LINK}<name>}}]"
        subject.add("rewards", message=message)
    names = [reward.name for reward in stage.rewards]
    for index, reward in enumerate(stage.rewards):
        if reward.name in names[:index]:
            first = names.index(reward.name)
            message = f"{reward.name} is the name of rewards[{first}]; give another"
            subject.add("rewards", index, "name", message=message)
        file = (reward.function or "").rpartition(":")[0]
        if file.endswith(".py"):
            _check_file(file, ("stages", subject.name, "rewards", index, "function"), subject.problems)
        if trains:
            _check_reward_model(subject, index, reward.model)
            continue
        if reward.model is not None:
            message = f"is no judge; the accuracy of a reward model is measured by `scorers: [{reward.model}]`"
            subject.add("rewards", index, "model", message=message)
        for key in ("weight", "normalize"):
            if key in reward.model_fields_set:
                message = f"is not read by {subject.row.name}, which tells every judge's rewards apart; remove it"
                subject.add("rewards", index, key, message=message)


def _check_reward_model(subject: _Subject, index: int, model: str | None) -> None:
    """A reward model is published by an earlier stage, or is no stage's name."""
    if model is None:
        return
    _check_link(subject, ("rewards", index, "model"), linked(model), "sequence-classification")
    _check_commit(subject, model, ("stages", subject.name, "rewards", index, "model"))
    if model in subject.order and not os.path.exists(model):
        message = f"no such folder: {model}; write {LINK}{model} to link to the stage"
        subject.add("rewards", index, "model", message=message)


def _check_evaluate(subject: _Subject) -> None:
    """An evaluation has models, and something to measure on them."""
    stage = subject.stage
    if not stage.models and (stage.prompts is not None or not stage.scorers):
        subject.add("models", message=f"is missing: the models to compare, [{LINK}sft, ...]")
    if stage.models and stage.prompts is None:
        subject.add("models", message="have nothing to answer; give `prompts:`")
    for index, text in enumerate(stage.models or ()):
        if text in (stage.models or [])[:index]:
            subject.add("models", index, message=f"names {text} twice")
    if stage.baseline is not None and stage.models and stage.baseline not in stage.models:
        close = did_you_mean(stage.baseline, stage.models)
        subject.add("baseline", message=f"{stage.baseline} is not one of `models`{close}")
    if stage.scorers and stage.pairs is None:
        subject.add("scorers", message="has nothing to score; give `pairs:`")
    if stage.rewards and stage.prompts is None and stage.pairs is None:
        subject.add("rewards", message="has nothing to judge; give `prompts:`")
