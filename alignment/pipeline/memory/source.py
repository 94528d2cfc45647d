"""From a stage of a recipe to the `Situation` that decides its memory: which models it takes, how large, how trained.

The size of a model comes from the `config.json` of a folder on this machine (the model's own, the cache of the hub, a
finished parent's), or from `model.init.config`. Nothing is downloaded: what is not here is not known, and the message
holds the command that fetches it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from alignment.errors import ModelError
from alignment.pipeline import hub
from alignment.pipeline.fingerprint import is_local
from alignment.pipeline.memory import sizes
from alignment.pipeline.memory.activations import FLOAT32
from alignment.pipeline.memory.situation import (
    BFLOAT16,
    Critic,
    Frozen,
    Sharding,
    Situation,
    optimizer_state,
)
from alignment.pipeline.memory.sizes import Lora, ModelSize
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import full_train, resolve
from alignment.recipe.schema import Model, Recipe, Resolved

ADAPTER = "adapter_config.json"
ROWS_MULTIPLE = 64  # as models/load.py rounds embedding rows
PROMPT = 512  # tokens that a prompt is taken to have where nothing limits it


class NotKnownError(ModelError):
    """The memory of a stage cannot be told from what is on this machine."""


@dataclass(frozen=True)
class Found:
    """A model as it is published.

    Attributes:
        size: of the whole model, or of an adapter's base.
        adapter: the keys of `peft:`, if it is an adapter.
        base: what the weights, or those that the adapter stands on, are called.
        config: the content of its config.json.
        tokenizer: the folder or hub name that it comes from; a number of ids for one that a stage trains.
    """

    size: ModelSize
    adapter: Mapping[str, Any] | None = None
    base: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str | int = ""


@dataclass(frozen=True)
class Machine:
    """Where a stage will run: `ranks` processes, on GPUs or on CPUs; bfloat16 where `precision.compute` is auto."""

    ranks: int
    cuda: bool = True
    fast_bfloat16: bool = True


@dataclass(frozen=True)
class Source:
    """A stage's situation, and what was assumed where the recipe does not say."""

    situation: Situation
    assumed: tuple[str, ...] = ()


def source(recipe: Recipe, name: str, machine: Machine, *, run: Path | None = None) -> Source:
    """What decides the memory of a stage.

    Args:
        run: the run directory, in which finished parents have their folders.

    Raises:
        NotKnownError: a model's size is not known on this machine, or a setting whose cost is not known here.
    """
    stage = resolve(recipe, name)
    assert stage.launch is not None and stage.precision is not None
    if stage.launch.accelerate is not None:
        raise NotKnownError("an own accelerate configuration is not read here")
    finder = _Finder(recipe, run)
    try:
        if stage.algorithm == "evaluate":
            return _evaluate(stage, machine, finder)
        return _training(stage, machine, finder)
    except NotKnownError:
        raise
    except ModelError as error:
        raise NotKnownError(str(error)) from error


def compute_bytes(stage: Resolved, machine: Machine) -> int:
    """Bytes of what a matrix product gives."""
    choice = stage.precision.compute
    fast = machine.fast_bfloat16 if choice == "auto" else choice == "bfloat16"
    return BFLOAT16 if fast else FLOAT32


def sharding(file: str | None) -> Sharding:
    """A DeepSpeed file; values that the Trainer fills in are left to it. Raises NotKnownError for one that is none."""
    if file is None:
        return Sharding()
    try:
        content = json.loads(Path(file).expanduser().read_bytes())
        zero = content.get("zero_optimization") or {}
        stage = int(zero.get("stage", 0))
        bucket, live = zero.get("reduce_bucket_size", 500_000_000), zero.get("stage3_max_live_parameters", 1e9)
        return Sharding(
            stage=stage,
            offload_states=(zero.get("offload_optimizer") or {}).get("device", "none") != "none",
            offload_weights=(zero.get("offload_param") or {}).get("device", "none") != "none",
            bucket=None if bucket == "auto" else int(bucket),
            live=1_000_000_000 if live == "auto" else int(live),
            sub_group=int(zero.get("sub_group_size", 1e9)),
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise NotKnownError(f"launch.deepspeed: {file}: cannot be read ({error})") from error


# --- one stage --------------------------------------------------------------------------------------------------------


def _training(stage: Resolved, machine: Machine, finder: _Finder) -> Source:
    row, train = ALGORITHMS[stage.algorithm], full_train(stage)
    start = finder.start(stage)
    adapter = stage.peft if stage.peft is not None else start.adapter
    continued = stage.peft is None and adapter is not None
    lora = None if adapter is None else sizes.lora(start.size, adapter)
    compute = compute_bytes(stage, machine)
    zero = sharding(stage.launch.deepspeed)
    online = row.schema == "prompts"
    prompt, length, assumed = _lengths(stage, train, start.size, online=online)
    accumulation = max(1, stage.batch.global_ // (stage.batch.per_device * machine.ranks))
    state = optimizer_state(str(train.get("optim")))
    if state is None:
        state = 8.0
        assumed.append(f"the optimizer {train.get('optim')} takes 8 bytes a parameter, as AdamW")
    situation = Situation(
        method="loss", size=start.size, rows=stage.batch.per_device, length=length, compute=compute,
        head="score" if row.publishes == "sequence-classification" else "tiles",
        frozen=BFLOAT16 if stage.precision.weights == "bfloat16" else FLOAT32, prompt=prompt, lora=lora,
        bits=stage.model.quantization.bits if stage.model and stage.model.quantization else None,
        double=bool(stage.model and stage.model.quantization and stage.model.quantization.double),
        state=state, foreach=train.get("optim") == "adamw_torch", step_rows=accumulation * stage.batch.per_device,
        scores_pairs=row.schema == "preference", attention=stage.model.attention if stage.model else "sdpa",
        dropout=not train.get("disable_dropout", stage.algorithm == "ppo"),
        checkpointing=bool(train.get("gradient_checkpointing")), ranks=machine.ranks, sharding=zero,
        cuda=machine.cuda,
    )  # fmt: skip
    roles = {role.name for role in row.roles}
    if "reference" in roles and (stage.algorithm not in ("rloo", "grpo") or train.get("beta")):
        situation = _with_reference(situation, train, continued=continued)
    if online:
        situation = _with_rollout(situation, stage, train, accumulation)
        situation = _with_scorers(situation, stage, finder, start)
    return Source(situation, tuple(assumed))


def _with_reference(s: Situation, train: Mapping[str, Any], *, continued: bool) -> Situation:
    """A second model, a copy of the adapter that is trained on, or the base without the new adapter."""
    if train.get("precompute_ref_log_probs"):
        return s  # it is gone before the first step
    if s.lora is not None:
        return replace(s, reference_adapter=continued)
    ppo = "response_length" in train
    engine = s.engine and (not ppo or s.sharding.stage == 3)
    return replace(s, judges=(*s.judges, Frozen("reference", s.size, engine=engine)))


def _with_rollout(s: Situation, stage: Resolved, train: Mapping[str, Any], accumulation: int) -> Situation:
    """How many replies are drawn, and PPO's critic."""
    rows = stage.batch.per_device
    if stage.algorithm != "ppo":
        by_pass = train.get("steps_per_generation")
        drawn = rows * (by_pass or accumulation)
        if train.get("generation_batch_size"):
            drawn = int(train["generation_batch_size"]) // s.ranks
        return replace(s, method="online", drawn=drawn, episodes=drawn, drawn_by_pass=by_pass)
    episodes = rows * accumulation
    own: Critic = "head" if train.get("critic") == "shared" else "model"
    critic: Critic = "adapter" if s.lora is not None else own
    return replace(
        s, method="ppo", head="logits", episodes=episodes, critic=critic,
        step_rows=episodes // int(train["num_mini_batches"]),
        drawn=min(int(train["local_rollout_forward_batch_size"]), episodes),
    )  # fmt: skip


def _with_scorers(s: Situation, stage: Resolved, finder: _Finder, start: Found) -> Situation:
    """Reward models; in PPO one that is an adapter on the policy's base costs nothing that counts."""
    judges = list(s.judges)
    for reward in stage.rewards:
        if reward.model is None:
            continue
        found = finder.link(reward.model)
        shares = stage.algorithm == "ppo" and s.lora is not None and found.adapter is not None
        if shares and found.base == start.base:
            continue
        judges.append(Frozen(f"reward {reward.name}", found.size, scores=True))
    return replace(s, judges=tuple(judges))


def _lengths(stage: Resolved, train: Mapping[str, Any], size: ModelSize, *, online: bool) -> tuple[int, int, list[str]]:
    """Tokens of the longest prompt and of the longest row, and what was assumed."""
    if not online:
        longest = train.get("max_length")
        assumed = [] if longest else [f"rows of up to {size.positions} tokens: train.max_length is not set"]
        return 0, int(longest or size.positions), assumed
    reply = int(train.get("response_length") or train.get("max_completion_length") or 256)
    limit = train.get("prompt_length")
    prompt = int(limit) if limit else max(1, min(PROMPT, size.positions - reply))
    assumed = [] if limit else [f"prompts of up to {prompt} tokens: nothing in the recipe limits them"]
    return prompt, prompt + reply, assumed


def _evaluate(stage: Resolved, machine: Machine, finder: _Finder) -> Source:
    """The largest of the models draws; the baseline stays beside it for the KL."""
    found = [finder.link(text) for text in (*(stage.models or ()), *stage.scorers)]
    if not found:
        raise NotKnownError("it loads no model")
    size = max((one.size for one in found), key=lambda size: size.parameters)
    reply = stage.sampling.max_new_tokens if stage.sampling else 256
    prompt = max(1, min(PROMPT, size.positions - reply))
    judges = () if stage.baseline is None else (Frozen("baseline", finder.link(stage.baseline).size),)
    compute = compute_bytes(stage, machine)
    situation = Situation(
        method="generate", size=size, rows=stage.batch.per_device, length=prompt + reply, prompt=prompt,
        drawn=stage.batch.per_device, compute=compute, frozen=compute, judges=judges, cuda=machine.cuda,
        checkpointing=False,
    )  # fmt: skip
    return Source(situation, (f"prompts of up to {prompt} tokens: nothing in the recipe limits them",))


# --- models -----------------------------------------------------------------------------------------------------------


class _Finder:
    """Sizes of the models of one recipe."""

    def __init__(self, recipe: Recipe, run: Path | None):
        self.recipe, self.run = recipe, run

    def start(self, stage: Resolved) -> Found:
        """The model that a stage starts from; an adapter that is not trained on is merged, into a base of its own."""
        assert stage.model is not None
        found = self._model(stage.model)
        scorer = ALGORITHMS[stage.algorithm].publishes == "sequence-classification"
        if found.adapter is not None and (stage.peft is not None or scorer):
            return replace(found, adapter=None, base=f"{found.base} merged for {stage.algorithm}")
        return found

    def link(self, text: str) -> Found:
        """`stage:<name>`, a folder, a hub name or `hub-name@commit`."""
        return self._model(Model.model_validate(text))

    def _model(self, model: Model) -> Found:
        if model.init is not None:
            return _initialised(model)
        if model.stage is not None:
            return self._published(model.stage)
        assert model.path is not None
        return in_folder(folder_of(model.path, model.revision), called=model.path)

    def _published(self, name: str) -> Found:
        """What a stage publishes, from what it starts from; from its folder where that is not known."""
        stage = resolve(self.recipe, name)
        assert stage.model is not None
        try:
            start = self._model(stage.model)
        except ModelError:
            folder = None if self.run is None else self.run / name
            if folder is None or not any((folder / file).is_file() for file in ("config.json", ADAPTER)):
                raise
            return in_folder(folder, called=str(folder))
        scorer = ALGORITHMS[stage.algorithm].publishes == "sequence-classification"
        if stage.peft is not None:
            # On an adapter, a new one stands on the merged base of this stage alone.
            base = start.base if start.adapter is None else f"{start.base} merged for {name}"
            return replace(start, adapter=stage.peft, base=base)
        if start.adapter is not None and not scorer:
            return start
        return replace(start, adapter=None, base=f"stage {name}")


def models(recipe: Recipe, name: str, *, run: Path | None = None) -> tuple[Found, list[Found | None]]:
    """The model that a stage starts from, and the reward model of each of its rewards that has one.

    Raises:
        NotKnownError: as `source`.
    """
    stage, finder = resolve(recipe, name), _Finder(recipe, run)
    try:
        rewards = [None if reward.model is None else finder.link(reward.model) for reward in stage.rewards]
        return finder.start(stage), rewards
    except NotKnownError:
        raise
    except ModelError as error:
        raise NotKnownError(str(error)) from error


def _initialised(model: Model) -> Found:
    """Random weights: the configuration is in the recipe, the vocabulary is the tokenizer's."""
    assert model.init is not None
    tokenizer = model.init.tokenizer
    if tokenizer.train is not None:
        ids = tokenizer.train.vocab_size
    else:
        assert tokenizer.path is not None
        file = folder_of(tokenizer.path, None, file="tokenizer.json") / "tokenizer.json"
        content = _json(file)
        taken = [*content.get("model", {}).get("vocab", {}).values()] if isinstance(content, dict) else []
        taken += [token["id"] for token in content.get("added_tokens", [])]
        ids = max(taken) + 1
    rows = -(-ids // ROWS_MULTIPLE) * ROWS_MULTIPLE
    size = sizes.read(None, model.init.config, vocab=rows)
    config = {**model.init.config, "vocab_size": rows}
    return Found(size, base="random weights", config=config, tokenizer=tokenizer.path or ids)


def folder_of(path: str, revision: str | None, *, file: str = "config.json") -> Path:
    """The folder on this machine behind a path or a hub name.

    Raises:
        NotKnownError: a hub name of which nothing is in the cache.
    """
    if is_local(path):
        return Path(path).expanduser()
    folder = hub.snapshot(path, revision)
    if folder is not None and ((folder / file).is_file() or (folder / ADAPTER).is_file()):
        return folder
    at = f" --revision {revision}" if revision else ""
    raise NotKnownError(
        f"{path} is not on this machine, so its size is not known; `hf download {path} {file}{at}` fetches that file"
    )


def in_folder(folder: Path, *, called: str) -> Found:
    """The model in a folder; an adapter stands on the base that it names."""
    if (folder / ADAPTER).is_file():
        peft = _json(folder / ADAPTER)
        base = str(peft.get("base_model_name_or_path") or "")
        if not base:
            raise NotKnownError(f"{called}/{ADAPTER}: base_model_name_or_path is missing")
        found = in_folder(folder_of(base, peft.get("revision")), called=base)
        own = str(folder) if (folder / "tokenizer.json").is_file() else found.tokenizer
        return replace(found, adapter=peft, base=base, tokenizer=own)
    config = _json(folder / "config.json")
    try:
        return Found(sizes.read(None, config), None, called, config, str(folder))
    except ModelError as error:
        raise NotKnownError(f"{called}: {error}") from error


def _json(file: Path) -> Any:
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise NotKnownError(f"{file}: cannot read: {error.strerror}") from error
    except ValueError as error:
        raise NotKnownError(f"{file}: not JSON ({error})") from error
    if not isinstance(content, dict):
        raise NotKnownError(f"{file}: no mapping")
    return content


def adapter_of(size: ModelSize, *, rank: int = 16) -> Lora:
    """An adapter on all linear layers, as a change that is proposed."""
    return sizes.lora(size, {"r": rank, "target_modules": "all-linear"})
