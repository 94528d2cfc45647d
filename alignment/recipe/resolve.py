"""What a stage comes to: inherited sections filled in, all arguments of its trainer, and the stages it links to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from alignment.errors import RecipeError
from alignment.recipe.algorithms import ALGORITHMS, OWNED
from alignment.recipe.launching import Slurm
from alignment.recipe.problems import did_you_mean
from alignment.recipe.schema import Data, Launch, Recipe, Resolved, Section, Source, Stage, linked
from alignment.recipe.upstream import UNKNOWN, fields

AnySection = TypeVar("AnySection", bound=Section)


def resolve(recipe: Recipe, name: str) -> Resolved:
    """One stage with everything it inherits from the recipe.

    `precision`, `launch` and `checkpoints` are inherited key by key; `model` as a whole, and only where the algorithm
    takes one. `chat_template` may stay None: the model's own. A stage that trains nothing runs in one process on one
    node: of `launch` it inherits `env` and `slurm`.

    Raises:
        RecipeError: the recipe has no stage of that name.
    """
    if name not in recipe.stages:
        raise RecipeError(
            f"no stage is named {name}{did_you_mean(name, recipe.stages)}; the recipe has {', '.join(recipe.stages)}"
        )
    stage = recipe.stages[name]
    row = ALGORITHMS.get(stage.algorithm)
    takes_model = row is None or "model" in row.sections
    launch = _inherit(stage.launch, recipe.launch)
    own = {key: getattr(stage, key) for key in stage.model_fields_set}
    inherited: dict[str, Any] = {
        "model": (stage.model or recipe.model) if takes_model else stage.model,
        "seed": recipe.seed if stage.seed is None else stage.seed,
        "precision": _inherit(stage.precision, recipe.precision),
        "chat_template": recipe.chat_template if stage.chat_template is None else stage.chat_template,
        "launch": launch if row is None or row.config is not None else _alone(launch),
        "checkpoints": _inherit(stage.checkpoints, recipe.checkpoints),
        "report_to": recipe.report_to if stage.report_to is None else stage.report_to,
    }
    if stage.data is not None:
        inherited["data"] = stage.data.model_copy(update={"against": _evaluated(recipe, stage.data)})
    return Resolved(**own | inherited)


def _evaluated(recipe: Recipe, data: Data) -> list[Source]:
    """The evaluation sets that a stage names, and those of the stages that evaluate."""
    found = list(data.against)
    for stage in recipe.stages.values():
        found += [source for source in (*(stage.prompts or ()), *(stage.pairs or ())) if source not in found]
    return found


def _inherit(own: AnySection | None, general: AnySection) -> AnySection:
    """A stage's section over the recipe's, key by key. A stage's own way of launching replaces the recipe's other."""
    if own is None:
        return general
    inherited = general.model_dump(exclude_unset=True)
    if isinstance(own, Launch) and isinstance(general, Launch):
        if own.accelerate is not None:
            inherited.pop("deepspeed", None), inherited.pop("processes", None)
        elif own.model_fields_set & {"deepspeed", "processes"}:
            inherited.pop("accelerate", None)
        if own.slurm is not None and general.slurm is not None:
            merged = inherited.pop("slurm") | own.slurm.model_dump(exclude_unset=True)
            own = own.model_copy(update={"slurm": Slurm.model_validate(merged)})
        if own.nodes != 1 and "slurm" in inherited:
            inherited["slurm"].pop("nodes", None)  # the stage says it in the other place
    return type(own).model_validate(inherited | own.model_dump(exclude_unset=True))


def _alone(launch: Launch) -> Launch:
    """One process on one node, with what else the recipe says of its launches."""
    if launch.slurm is None:
        return Launch(env=launch.env)
    gpus = None if launch.slurm.gpus_per_node is None else min(1, launch.slurm.gpus_per_node)
    slurm = launch.slurm.model_copy(update={"nodes": None, "gpus_per_node": gpus})
    return Launch(env=launch.env, slurm=slurm)


def full_train(stage: Stage) -> dict[str, Any]:
    """All that the trainer's configuration class will be given, without the keys that the recipe owns elsewhere.

    Upstream's defaults, then the algorithm's, then the stage's `train:`, then what the algorithm fixes. Empty for an
    algorithm that has no trainer.
    """
    row = ALGORITHMS[stage.algorithm]
    if row.config is None:
        return {}
    known = fields(row.config)
    defaults = {name: field.default for name, field in known.items() if field.default is not UNKNOWN}
    given: Mapping[str, Any] = {**defaults, **row.defaults, **stage.train, **row.fixed}
    return {name: value for name, value in given.items() if name in known and name not in OWNED}


def batch_dependent(stage: Stage) -> bool:
    """Whether another `batch.per_device` is another loss: the algorithm's row says so, or DPO has an sft term, which
    TRL averages over the tokens of each forward pass."""
    return ALGORITHMS[stage.algorithm].batch_dependent or "sft" in (full_train(stage).get("loss_type") or ())


def max_length(stage: Stage) -> int | None:
    """The longest row in tokens: `train.max_length` (of prompts `prompt_length`), or its default."""
    train = full_train(stage)
    value = train.get("max_length", train.get("prompt_length"))
    return None if value is None else int(value)


def parents(stage: Stage) -> list[str]:
    """The stages that a stage links to, each once, in the order in which it names them."""
    rewards = [reward.model or "" for reward in stage.rewards]
    links = [linked(text) for text in (*(stage.models or ()), stage.baseline or "", *stage.scorers, *rewards)]
    if stage.model is not None:
        links.insert(0, stage.model.stage)
    return list(dict.fromkeys(link for link in links if link is not None))
