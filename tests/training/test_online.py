"""RLOO and GRPO on tiny models: prompts, rewards and reference are ours, advantages those of a loop, resuming exact."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from trl import GRPOConfig, RLOOConfig

from alignment.data import templates
from alignment.data.prepare import Prepared, prepare
from alignment.errors import NonFiniteError, RecipeError, UserError
from alignment.evaluation.judges import JudgeError
from alignment.models.load import load_policy
from alignment.pipeline import runs as files
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.load import full_train
from alignment.recipe.schema import Data, Resolved, Stage
from alignment.training import trainers
from alignment.training.online import Online
from alignment.training.rewards import Normalizer, RewardSource

KINDS = ("rloo", "grpo")
FORMS = ("full", "new adapter", "adapter continued")
LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
Make = Callable[..., Any]


def score_of(function: Callable[[dict[str, Any], str, bool], float]) -> Any:
    """A source's `score` from a function of row, reply and whether it ended."""

    def scored(rows: Sequence[dict[str, Any]], replies: Sequence[str], finished: Sequence[bool]) -> Any:
        return np.array([function(*one) for one in zip(rows, replies, finished, strict=True)], dtype=np.float64)

    return scored


def letters(row: dict[str, Any], reply: str, finished: bool) -> float:
    """A reward that a few updates can raise: one point for each letter e."""
    return float(reply.count("e"))


def source(name: str = "letters", function: Any = letters, weight: float = 1.0, kind: Any = "none") -> RewardSource:
    return RewardSource(name, weight, score_of(function), Normalizer(kind))


@pytest.fixture(scope="module")
def rows(data_folder: Path, tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Prompts through the data layer, with a column that rewards may read."""
    path = tmp_path_factory.mktemp("online") / "prompts.jsonl"
    lines = [json.loads(line) | {"want": i} for i, line in enumerate((data_folder / "prompts.jsonl").open())]
    lines[0]["prompt"].insert(0, {"role": "system", "content": "Be brief, naïve and kind."})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage = Resolved.model_validate(
        {"algorithm": "grpo", "seed": 3, "precision": {}, "launch": {}, "checkpoints": {}, "report_to": [],
         "data": Data.model_validate({"train": [{"path": str(path)}]})}
    )  # fmt: skip
    return prepare(stage, "prompts", tiny_tokenizer, max_length=None, cache=path.parent, say=lambda text: None)


@pytest.fixture
def make(tiny_policy: Path, tiny_tokenizer: Any, rows: Prepared, tmp_path: Path) -> Make:
    """A function that makes a trainer of a kind and of one of three forms; keywords go to TRL's configuration."""

    def trainer(
        kind: str = "grpo",
        form: str = "full",
        *,
        rewards: Any = None,
        reference: Any = "start",
        grow: int = 0,
        **settings: Any,
    ) -> Any:
        torch.manual_seed(0)
        policy, _ = load_policy(tiny_policy, trainable=True)
        models: dict[str, Any] = {"ref_model": None}
        if form == "full":
            models["ref_model"] = load_policy(tiny_policy)[0] if reference == "start" else reference
            for model in (policy, models["ref_model"]) if grow else ():
                torch.manual_seed(0)  # the new rows are random
                model.resize_token_embeddings(grow)
        elif form == "new adapter":
            models["peft_config"] = LoraConfig(**LORA)
        else:
            policy = get_peft_model(policy, LoraConfig(**LORA))
            for name, parameter in policy.named_parameters():
                if "lora_B" in name:  # the adapter of a parent stage has moved from its base
                    torch.nn.init.normal_(parameter, std=0.5)
        options = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
            "max_steps": 1, "use_cpu": True, "bf16": False, "max_completion_length": 10, "num_generations": 4,
            "learning_rate": 1e-3, "beta": 0.1, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
            "logging_steps": 1, "seed": 5, "gradient_checkpointing": False, "shuffle_dataset": False,
        }  # fmt: skip
        config = {"grpo": GRPOConfig, "rloo": RLOOConfig}[kind]
        args = config(**dict(ALGORITHMS[kind].defaults) | options | settings)
        return getattr(trainers, kind.upper())(
            policy, args=args, reward_funcs=rewards or [source()], train_dataset=rows.train, eval_dataset=None,
            processing_class=tiny_tokenizer, **models,
        )  # fmt: skip

    return trainer


def lines(trainer: Any) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def without(line: dict[str, float], key: str) -> dict[str, float]:
    return {name: value for name, value in line.items() if name != key and not name.startswith(("time/", "profiling"))}


class Seen:
    """What passes through a trainer's generations."""

    def __init__(self, trainer: Any):
        self.rewards: list[torch.Tensor] = []
        self.results: list[dict[str, Any]] = []
        rewards, generate = trainer._calculate_rewards, trainer._generate_and_score_completions

        def calculate(*args: Any) -> torch.Tensor:
            self.rewards.append(rewards(*args))
            return self.rewards[-1]

        def generated(inputs: Any) -> dict[str, Any]:
            self.results.append(generate(inputs))
            return self.results[-1]

        trainer._calculate_rewards, trainer._generate_and_score_completions = calculate, generated


# --- upstream ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [trainers.RLOO, trainers.GRPO])
def test_every_name_that_is_overridden_or_read_exists_upstream(ours: type) -> None:
    theirs = ours.__mro__[3]
    assert theirs.__module__.startswith("trl.trainer")
    overridden = [name for name, value in vars(Online).items() if callable(value) and hasattr(theirs, name)]
    assert {"_get_train_sampler", "_generate_and_score_completions", "_tokenize_prompts", "_calculate_rewards",
            "compute_loss", "train"} <= set(overridden)  # fmt: skip
    text = inspect.getsource(inspect.getmodule(theirs))
    for needed in (
        "self._tokenize_prompts(prompts)",
        "self.ref_model = create_model_from_path(",
        "self._step % self.args.steps_per_generation",
        "self._step % generate_every == 0 or self._buffered_inputs is None",
        "generation_kwargs.update(args.generation_kwargs)",
        'self._metrics[mode]["kl"]',
    ):
        assert needed in text, needed


# --- prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_the_ids_of_our_table_and_those_that_trl_would_make(
    kind: str, make: Make, rows: Prepared, tiny_tokenizer: Any
) -> None:
    trainer, seen = make(kind), []
    original = trainer._generate_single_turn

    def single_turn(prompt_ids: Any, *args: Any) -> Any:
        seen.extend(prompt_ids)
        return original(prompt_ids, *args)

    trainer._generate_single_turn = single_turn
    trainer.train()
    table = {tuple(row["prompt_ids"]): row for row in rows.train}
    assert len(seen) == 8
    assert all(tuple(ids) in table for ids in seen)
    theirs = type(trainer).__mro__[3]
    everything = list(rows.train)
    made, _, _ = theirs._tokenize_prompts(trainer, [row["prompt"] for row in everything])
    assert [list(ids) for ids in made] == [row["prompt_ids"] for row in everything]
    assert made[0] == templates.encode_prompt(tiny_tokenizer, everything[0]["prompt"])


def test_a_prompt_comes_as_a_group_and_rewards_read_its_columns(make: Make, rows: Prepared) -> None:
    read: list[tuple[dict[str, Any], str, bool]] = []

    def wants(row: dict[str, Any], reply: str, finished: bool) -> float:
        read.append((row, reply, finished))
        return float(row["want"])

    trainer = make(rewards=[source("wants", wants)])
    trainer.train()
    assert len(read) == 8
    wanted = [row["want"] for row, _, _ in read]
    assert len(set(wanted[:4])) == len(set(wanted[4:])) == 1
    assert wanted[0] != wanted[4]
    assert all(row["prompt"] == rows.train[row["want"]]["prompt"] for row, _, _ in read)


def test_each_epoch_has_an_order_of_its_own_that_the_seed_decides(make: Make) -> None:
    orders = []
    for seed in (5, 5, 6):
        sampler = make(seed=seed)._get_train_sampler()
        trainer_epochs = []
        for epoch in (0, 1, 0):
            sampler.epoch = lambda epoch=epoch: epoch
            trainer_epochs.append(list(sampler))
        orders.append(trainer_epochs)
    (first, second, again), same, other = orders
    assert first == again != second
    assert same == orders[0]
    assert other[0] != first
    assert sorted(set(first)) == list(range(48))
    assert all(len(set(first[start : start + 4])) == 1 for start in range(0, len(first), 4))


# --- replies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_generation_stops_at_the_templates_stop_ids_and_finished_says_so(
    kind: str, make: Make, tiny_tokenizer: Any
) -> None:
    told: list[bool] = []
    trainer = make(kind, rewards=[source("end", lambda row, reply, done: told.append(done) or float(done))],
                   num_generations=8, per_device_train_batch_size=32, max_completion_length=60)  # fmt: skip
    stops = templates.stop_ids(tiny_tokenizer)
    assert sorted(trainer.eos_token_ids) == stops
    assert trainer.generation_config.eos_token_id == stops
    seen = Seen(trainer)
    with torch.no_grad():  # stop tokens are likely
        trainer.model.get_output_embeddings().weight[stops[0]] *= 8
    with torch.no_grad():
        trainer.ref_model.get_output_embeddings().weight[stops[0]] *= 8
    trainer.train()
    ids, mask = seen.results[0]["completion_ids"], seen.results[0]["completion_mask"]
    lengths = mask.sum(1).tolist()
    ended = [int(row[length - 1]) in stops for row, length in zip(ids, lengths, strict=True)]
    assert told == ended
    assert True in ended
    for row, length in zip(ids.tolist(), lengths, strict=True):
        assert not set(row[: length - 1]) & set(stops)


def test_an_id_without_a_token_is_never_drawn(make: Make) -> None:
    trainer = make(grow=384, per_device_train_batch_size=32)  # the tokenizer has 320
    seen = Seen(trainer)
    trainer.train()
    ids = seen.results[0]["completion_ids"]
    assert ids.numel() > 600  # a share of 1/6 otherwise
    assert int(ids.max()) < 320


# --- rewards and advantages -------------------------------------------------------------------------------------------


def test_rewards_are_summed_by_weight_and_normalised_as_in_combine(make: Make) -> None:
    sources = [
        source("a", lambda row, reply, done: float(len(reply)), weight=2.0),
        source("b", lambda row, reply, done: row["want"] * 1.0, weight=-0.5, kind="running"),
        source("c", lambda row, reply, done: math.nan if row["want"] % 2 else 3.0, weight=1.0),
    ]
    sources[0].normalizer.__dict__.update(kind="stored", mean=10.0, std=4.0)
    trainer = make(rewards=sources, max_steps=2, beta=0.0)
    seen = Seen(trainer)
    trainer.train()
    assert trainer.reward_weights.tolist() == [2.0, -0.5, 1.0]
    values = np.array([float(row["want"]) for row in trainer._rows])
    scale = sources[1].normalizer
    assert scale.count == 16
    np.testing.assert_allclose(seen.rewards[1][:, 1], (values - scale.mean) / scale.std, rtol=1e-5)
    total = seen.rewards[1].nan_to_num(0.0) @ torch.tensor([2.0, -0.5, 1.0])
    assert lines(trainer)[1]["reward"] == pytest.approx(float(total.mean()), rel=1e-4)
    assert lines(trainer)[1]["rewards/b/raw"] == pytest.approx(values.mean())
    assert trainer.for_the_log()["samples"][0]["score"] == pytest.approx(float(total[0]), abs=1e-3)


def by_hand(kind: str, rewards: list[float], kl: list[float], beta: float) -> list[float]:
    """One group's advantages from a loop."""
    found = []
    if kind == "rloo":
        rewards = [reward - beta * nats for reward, nats in zip(rewards, kl, strict=True)]
    for index, reward in enumerate(rewards):
        others = [other for at, other in enumerate(rewards) if at != index]
        if kind == "rloo":
            found.append(reward - sum(others) / len(others))
        else:
            mean = sum(rewards) / len(rewards)
            variance = sum((other - mean) ** 2 for other in rewards) / (len(rewards) - 1)
            found.append((reward - mean) / (math.sqrt(variance) + 1e-4))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_advantages_are_those_of_a_loop(kind: str, make: Make) -> None:
    trainer = make(kind)
    seen = Seen(trainer)
    trainer.train()
    rewards = seen.rewards[0][:, 0].tolist()
    assert len(set(rewards)) > 1
    expected = [one for start in (0, 4) for one in by_hand(kind, rewards[start : start + 4], [0.0] * 4, 0.1)]
    assert seen.results[0]["advantages"].tolist() == pytest.approx(expected, abs=1e-4)


def test_rloo_takes_the_kl_off_the_reward(make: Make, tiny_policy: Path) -> None:
    other = load_policy(tiny_policy)[0]
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.3)
    trainer = make("rloo", reference=other, beta=0.5)
    trainer._compared = True
    seen = Seen(trainer)
    result = trainer._generate_and_score_completions([dict(row) for row in trainer.train_dataset.select([3] * 4)])
    ids = torch.cat([result["prompt_ids"], result["completion_ids"]], 1)
    mask = torch.cat([result["prompt_mask"], result["completion_mask"]], 1)
    kl = torch.zeros(4)
    for model, sign in ((trainer.model, 1.0), (other, -1.0)):
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
        found = logits.gather(2, ids[:, 1:, None])[:, :, 0][:, -result["completion_ids"].shape[1] :]
        kl += sign * (found * result["completion_mask"]).sum(1)
    assert float(kl.abs().max()) > 0.01
    expected = by_hand("rloo", seen.rewards[0][:, 0].tolist(), kl.tolist(), 0.5)
    assert result["advantages"].tolist() == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_reply_that_no_reward_applies_to_is_named(kind: str, make: Make) -> None:
    trainer = make(kind, rewards=[source(function=lambda row, reply, done: math.nan)])
    with pytest.raises(JudgeError, match=r"none of letters applies to row \d+ \(.*leave it out") as caught:
        trainer.train()
    number = int(str(caught.value).partition("applies to row ")[2].partition(" ")[0])
    said = trainer.train_dataset[number]["prompt"][-1]["content"]  # the number is that of the table
    assert f"row {number} ({said!r})" in str(caught.value)


# --- the reference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
def test_the_first_kl_is_zero_and_the_reference_stays_where_it_was(kind: str, form: str, make: Make) -> None:
    trainer = make(kind, form, max_steps=3, learning_rate=1e-2, lr_scheduler_type="constant")
    before = weights(trainer)
    reference = {} if trainer.ref_model is None else {n: p.clone() for n, p in trainer.ref_model.named_parameters()}
    assert (form == "full") == bool(reference)
    trainer.train()
    kl = [line["kl"] for line in lines(trainer)]
    assert kl[0] == pytest.approx(0.0, abs=1e-6)
    assert abs(kl[-1]) > 1e-5
    moved = {name for name, p in weights(trainer).items() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert not any(".ref." in name for name in moved)
    for name, parameter in reference.items():
        assert torch.equal(parameter, dict(trainer.ref_model.named_parameters())[name]), name


def test_the_reference_of_a_continued_adapter_is_that_adapter(make: Make) -> None:
    trainer = make("grpo", "adapter continued")
    for name, parameter in trainer.model.named_parameters():
        if ".default." in name:
            assert torch.equal(parameter, trainer.model.get_parameter(name.replace(".default.", ".ref.")))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reference_that_is_not_the_start_is_named(kind: str, make: Make, tiny_policy: Path) -> None:
    other = load_policy(tiny_policy)[0]
    with torch.no_grad():
        other.get_output_embeddings().weight.mul_(1.3)
    trainer = make(kind, reference=other)
    before = weights(trainer)
    with pytest.raises(UserError, match=r"reference: before the first update .* their KL must be 0, found"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in weights(trainer).items())


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_price_there_is_no_reference_and_with_one_it_is_needed(kind: str, make: Make) -> None:
    assert make(kind, beta=0.0, reference=None).ref_model is None
    with pytest.raises(RecipeError, match="ref_model: a fully trained policy needs its reference passed"):
        make(kind, reference=None)


@pytest.mark.parametrize("kind", KINDS)
def test_the_fused_log_probabilities_are_the_models(kind: str, make: Make) -> None:
    for form in FORMS:
        trainer = make(kind, form)
        ids = torch.tensor([trainer.train_dataset[1]["prompt_ids"] + [5, 9, 3]])
        with torch.no_grad():
            found, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, torch.ones_like(ids), 3)
            logits = trainer.model(input_ids=ids).logits[0, -4:-1].log_softmax(-1)
        assert found[0].tolist() == pytest.approx(logits[range(3), [5, 9, 3]].tolist(), abs=1e-5), form


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_it_learns(kind: str, make: Make) -> None:
    trainer = make(kind, max_steps=12, num_generations=8, per_device_train_batch_size=32, learning_rate=1e-2)
    trainer.train()
    rewards = [line["reward"] for line in lines(trainer)]
    assert np.mean(rewards[-3:]) > np.mean(rewards[:3]) + 0.3, rewards


@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_not_finite_stops_before_the_update(kind: str, make: Make) -> None:
    trainer = make(kind, beta=0.0)
    before = weights(trainer)
    original = trainer._generate_and_score_completions

    def broken(inputs: Any) -> dict[str, Any]:
        result = original(inputs)
        result["advantages"][0] = math.nan
        return result

    trainer._generate_and_score_completions = broken
    with pytest.raises(NonFiniteError, match="step 1: the loss is nan; nothing was updated"):
        trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in weights(trainer).items())


CYCLES = {
    "a step is a generation": {},
    "two steps of one generation": {"steps_per_generation": 4},
    "each generation twice": {"num_iterations": 2},
    "half a step": {"steps_per_generation": 1, "num_generations": 2},
}
START = {"two steps of one generation": "adapter continued", "each generation twice": "new adapter"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cycle", CYCLES)
def test_a_killed_run_resumes_bit_for_bit(kind: str, cycle: str, make: Make, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    if cycle == "a step is a generation":  # resumed within the second epoch
        settings |= {"per_device_train_batch_size": 16, "num_generations": 2, "save_steps": 4}

    def rewards() -> list[RewardSource]:
        return [source(kind="running")]

    whole, again = (make(kind, START.get(cycle, "full"), rewards=rewards(), **settings | CYCLES[cycle]) for _ in "ab")
    whole.train()
    again.train(resume_from_checkpoint=str(tmp_path / "out" / f"checkpoint-{settings['save_steps']}"))
    assert (whole.state.epoch > 2) == (cycle == "a step is a generation")
    for name, expected in weights(whole).items():
        assert torch.equal(weights(again)[name], expected), name
    assert again.sources[0].normalizer == whole.sources[0].normalizer
    # The Trainer's own sum of losses is not in its checkpoints: where one lies between two logs, it begins anew there.
    ours, theirs = ([without(line, "loss" if n == 0 else "") for n, line in enumerate(lines(trainer)[1:])]
                    for trainer in (again, whole))  # fmt: skip
    assert ours == theirs


def test_without_its_replies_a_checkpoint_resumes_to_other_weights(make: Make, tmp_path: Path) -> None:
    """What the file is for; another number of processes or of rows generates at once instead."""
    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "steps_per_generation": 4}
    whole = make(**settings)
    whole.train()
    (tmp_path / "out" / "checkpoint-3" / "replies-0-of-1.pt").unlink()
    again = make(**settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert again.state.global_step == 5
    assert any(not torch.equal(weights(again)[name], p) for name, p in weights(whole).items())


# --- what cannot be ---------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_refused_before_the_first_step(make: Make, rows: Prepared) -> None:
    with pytest.raises(RecipeError, match=r"max_completion_length: the longest prompt has \d+ tokens, with 250 for"):
        make(max_completion_length=250)
    with pytest.raises(RecipeError, match=r"data\.train: 48 prompts are fewer than the 64 of one generation"):
        make(per_device_train_batch_size=64, num_generations=2)
    trainer = make()
    with pytest.raises(RecipeError, match="the column images would be taken for pictures"):
        trainers.GRPO(
            trainer.model, args=trainer.args, reward_funcs=[source()], ref_model=trainer.ref_model, eval_dataset=None,
            train_dataset=rows.train.add_column("images", [None] * 48), processing_class=trainer.processing_class,
        )  # fmt: skip
    trainer.args.num_generations_eval = 3
    with pytest.raises(RecipeError, match="per_device_eval: 8 replies of all processes are no whole groups of 3"):
        trainers.GRPO(
            trainer.model, args=trainer.args, reward_funcs=[source()], ref_model=trainer.ref_model,
            eval_dataset=rows.train, train_dataset=rows.train, processing_class=trainer.processing_class,
        )  # fmt: skip


# --- whole stages -----------------------------------------------------------------------------------------------------


def online_stage(kind: str, data_folder: Path, start: str, **changes: Any) -> dict[str, Any]:
    train = {
        "max_steps": 2, "learning_rate": 1e-3, "max_completion_length": 8, "num_generations": 2, "beta": 0.04,
        "logging_steps": 1, "gradient_checkpointing": False,
    }  # fmt: skip
    return {
        "algorithm": kind,
        "model": start,
        "rewards": [{"name": "brief", "length": 2}, {"name": "letter", "regex": "e", "weight": 0.5}],
        "data": {"train": [{"path": str(data_folder / "prompts.jsonl")}], "eval_fraction": 0.25},
        "batch": {"global": 4, "per_device": 2},
        "train": train | changes.pop("train", {}),
    } | changes


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_trains_publishes_and_logs(
    kind: str, tiny_run: Path, run_recipe: Callable[..., Path], tiny_recipe: Any, data_folder: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe()
    recipe["stages"] = {
        "full": online_stage(kind, data_folder, str(tiny_run / "sft")),
        "adapter": online_stage(kind, data_folder, "stage:full", peft={"r": 4, "target_modules": "all-linear"}),
        "continued": online_stage(kind, data_folder, "stage:adapter", train={"learning_rate": 1e-2}),
    }
    run = run_recipe(recipe, tmp_path)
    for name in recipe["stages"]:
        manifest = files.verify_parent(run / name, deep=True)
        assert manifest["kind"] == "causal-lm"
        assert "eval_reward" in manifest["metrics"]
        assert not (run / name / "ref").exists()
        log = [json.loads(line) for line in (run / name / "log.jsonl").read_text().splitlines()]
        assert log[0]["kl"] == pytest.approx(0.0, abs=1e-5)
        assert set(log[0]["samples"][0]) == {"prompt", "reply", "score", "finished"}
        assert {"rewards/brief/mean", "rewards/letter/mean", "reward"} <= set(log[0])
    assert (run / "continued" / "adapter_config.json").exists()
    _, tokenizer = load_policy(run / "continued")
    assert templates.stop_ids(tokenizer) == templates.stop_ids(load_policy(tiny_run / "sft")[1])
    first, last = (load_file(run / name / "adapter_model.safetensors") for name in ("adapter", "continued"))
    assert first.keys() == last.keys()
    assert any(not torch.equal(first[name], last[name]) for name in first)


def test_the_reference_has_the_embeddings_of_a_new_template(
    run_recipe: Callable[..., Path], tiny_recipe: Any, data_folder: Path, tmp_path: Path
) -> None:
    """Upstream would load the reference from the folder in the policy's configuration, which has fewer rows."""
    recipe = tiny_recipe("base")
    recipe["chat_template"] = None
    recipe["stages"]["grpo"] = online_stage("grpo", data_folder, "stage:base", chat_template="chatml")
    run = run_recipe(recipe, tmp_path)
    assert json.loads((run / "grpo" / "log.jsonl").read_text().splitlines()[0])["kl"] == pytest.approx(0, abs=1e-5)


FAULTS = {
    "batch: {global: 6, per_device: 2}": (
        "batch.global: 6 replies are no whole groups of num_generations 4: the nearest legal values are 4 and 8"
    ),
    "train: {steps_per_generation: 3}": (
        "train.steps_per_generation: 3 x 2 replies are no whole groups of num_generations 4: "
        "the nearest legal values are 2 and 4"
    ),
    "train: {generation_batch_size: 6}": (
        "train.generation_batch_size: must fill whole forward passes (2 replies) with whole groups (num_generations "
        "4): the nearest legal values are 4 and 8"
    ),
    "data: {train: [{path: p.jsonl}], eval_fraction: 0.1}": (
        "batch.per_device_eval: 2 x 1 processes are no whole groups of 4 replies (num_generations_eval): "
        "the nearest legal value is 4"
    ),
    "train: {use_vllm: true}": (
        "train.use_vllm: cannot be set: replies are drawn by the model in training, in its own process; no vLLM"
    ),
    "train: {reward_weights: [1.0]}": "train.reward_weights: is not set here: it belongs in `rewards[].weight`",
    "train: {use_liger_kernel: true}": (
        "train.use_liger_kernel: cannot go with this trainer: both replace the forward pass; remove it"
    ),
    "train: {sync_ref_model: true}": (
        "train.sync_ref_model: cannot be used: checkpoints do not hold the moved reference, a resumed run would have "
        "another one"
    ),
    "train: {num_generations: 1}": "train.num_generations: must be at least 2, found 1",
    "train: {max_completion_length: null}": (
        "train.max_completion_length: needs a number: without one, generation stops where Transformers happens to"
    ),
    "train: {steps_per_generation: 2, generation_batch_size: 8}": (
        "train.generation_batch_size: says the same as steps_per_generation; give one of the two"
    ),
    "train: {loss_type: bnpo}": (
        "train.loss_type: bnpo divides by the tokens of one forward pass, so batch.per_device decides; take dapo"
    ),
    "train: {loss_type: luspo}": (
        "train.loss_type: luspo weighs whole sequences; set `importance_sampling_level: sequence`"
    ),
    "train: {importance_sampling_level: sequence}": (
        "train.importance_sampling_level: sequence cannot go with dapo; take `loss_type: grpo` (GSPO) or luspo"
    ),
    "train: {loss_type: cispo}": (
        "train.epsilon_high: is the largest weight of a token in cispo; give one above 1, for example 5.0"
    ),
    "peft: {target_modules: [q_proj, lm_head]}": (
        "peft.target_modules: lm_head would not be trained: TRL reads its weights past the adapter; leave it out"
    ),
    "peft: {trainable_token_indices: [3]}": (
        "peft.trainable_token_indices: cannot be read by TRL; write `modules_to_save: [embed_tokens]`"
    ),
    "train: {delta: 1.1}": "train.delta: must be above 1 + epsilon_high: below it, it would undo the clip range",
    "train: {loss_type: gpro}": (
        "train.loss_type: must be one of grpo, dr_grpo, dapo, bnpo, cispo, sapo, luspo, vespo, found \"gpro\" "
        "(did you mean grpo?)"
    ),
}  # fmt: skip


@pytest.mark.parametrize(("written", "message"), FAULTS.items(), ids=list(FAULTS))
def test_a_planted_fault_is_told_in_one_line(
    written: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from alignment.recipe.load import load_recipe

    monkeypatch.chdir(tmp_path)
    Path("p.jsonl").touch()
    given = dict(part.split(": ", 1) for part in [written])
    parts = {
        "batch": "{global: 8, per_device: 2}", "train": "{num_generations: 4}", "data": "{train: [{path: p.jsonl}]}",
        "rewards": "[{name: brief, length: 3}]",
    }  # fmt: skip
    if "train" in given and "num_generations" not in written:
        given["train"] = given["train"].replace("{", "{num_generations: 4, ", 1)
    text = "name: x\nstages:\n  tuned:\n    algorithm: grpo\n    model: org/model\n"
    Path("r.yaml").write_text(text + "".join(f"    {key}: {value}\n" for key, value in (parts | given).items()))
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    (line,) = [line for line in str(caught.value).splitlines() if "stages." in line]
    assert line.partition("stages.tuned.")[2] == message


def test_defaults_and_limits_of_the_rows() -> None:
    for kind in KINDS:
        train = full_train(Stage.model_validate({"algorithm": kind}))
        assert train["disable_dropout"] is True
        assert list(ALGORITHMS[kind].needs(train)) == []
        assert not {"reward_weights", "use_vllm", "generation_kwargs"} & set(train)
