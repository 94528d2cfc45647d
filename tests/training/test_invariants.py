"""The checks of the first batch: each one with its bug planted as it happened, and all of them on clean runs."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import Trainer, TrainerCallback

from alignment.models.load import compute_dtype
from alignment.pipeline import plan as planning
from alignment.pipeline import runs
from alignment.recipe.algorithms import ALGORITHMS
from alignment.recipe.invariants import INVARIANTS, SKIPPABLE
from alignment.recipe.load import load_recipe
from alignment.recipe.schema import Launch
from alignment.training import assemble, builders, deep, invariants, probe, worker
from alignment.training.context import Context
from alignment.training.invariants import CHECKS, Outcome
from alignment.training.subject import Subject

Recipe = Callable[..., dict[str, Any]]
Run = Callable[..., Path]
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def planned(recipe: dict[str, Any], folder: Path, stage: str) -> planning.StageSpec:
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False), encoding="utf-8")
    plan = planning.prepare(load_recipe(path), stage, runs=folder, run="planted", recipe_path=path)
    planning.write_stage(plan.spec)
    return plan.spec


@pytest.fixture
def subject(tiny_run: Path, tiny_recipe: Recipe, tmp_path: Path) -> Callable[..., Subject]:
    """A function that builds one tiny stage as its run would, up to the first step."""
    from accelerate.state import AcceleratorState, GradientState

    def build(algorithm: str, **changes: Any) -> Subject:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        stage = {"kto": "kto", "reward": "reward", "pretrain": "base", "sft": "sft", "ppo": "ppo"}.get(algorithm, "dpo")
        if stage != "base":
            changes.setdefault("model", str(tiny_run / ("base" if stage == "sft" else "sft")))
        changes["algorithm"] = algorithm
        spec = planned(tiny_recipe(stage, **{stage: changes}), tmp_path, stage)
        ctx, trainer = assemble.assembled(Context(spec=spec, say=lambda text: None, compute=_compute(spec)))
        return Subject(ctx, trainer)

    return build


def _compute(spec: planning.StageSpec) -> torch.dtype:
    return compute_dtype(spec.config.precision.compute)


def checked(subject: Subject, *names: str) -> Outcome:
    outcome = Outcome()
    with probe.untouched(subject.trainer):
        invariants.look(subject, [name for name in names if invariants.applies(name, subject.ctx)], outcome)
    return outcome


START = [name for name, row in INVARIANTS.items() if row.when == "start"]


# --- they do not misfire ------------------------------------------------------------------------------------------


def test_the_table_and_the_functions_are_the_same_checks() -> None:
    assert set(CHECKS) == {name for name, row in INVARIANTS.items() if row.when != "deep"}
    assert set(SKIPPABLE) < set(INVARIANTS)


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "reward"])
def test_nothing_is_wrong_in_bfloat16(
    name: str, tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    start = str(tiny_run / ("base" if name == "sft" else "sft"))
    recipe = tiny_recipe(name, **{name: {"model": start, "peft": LORA, "train": {"max_steps": 2}}})
    recipe["precision"] = {"compute": "bfloat16", "weights": "bfloat16"}
    record = runs.read_manifest(run_recipe(recipe, tmp_path) / name)["checks"]
    assert {"precision", "dropout", "padding", "row-alone", "gradients", "optimizer"} <= set(record["passed"])


@pytest.mark.parametrize("peft", [None, LORA], ids=["full", "lora"])
@pytest.mark.parametrize("algorithm", [row.name for row in ALGORITHMS.values() if row.schema not in (None, "prompts")])
def test_nothing_is_wrong_with_a_clean_stage(
    algorithm: str, peft: dict[str, Any] | None, subject: Callable[..., Subject]
) -> None:
    if algorithm == "pretrain" and peft:
        pytest.skip("random weights take no adapter")
    built = subject(algorithm, **({"peft": peft} if peft else {}))
    before = torch.random.get_rng_state()
    metrics = json.dumps(built.trainer._metrics["train"])
    outcome = checked(built, *START)
    assert outcome.broken == {}
    reasons = {"accumulation": "the loss of a row depends on the other rows of its forward pass"}
    assert outcome.skipped == (reasons if ALGORITHMS[algorithm].batch_dependent else {})
    assert {"embeddings", "unused-rows", "trainable", "precision", "dropout", "padding", "row-alone"} <= set(
        outcome.passed
    )
    if algorithm not in ("pretrain", "reward"):
        assert "stage" in outcome.passed
    # Nothing is left behind: random numbers, log, mode.
    assert torch.equal(torch.random.get_rng_state(), before)
    assert json.dumps(built.trainer._metrics["train"]) == metrics


def test_dpo_with_an_sft_term_depends_on_the_batch_and_says_so(subject: Callable[..., Subject]) -> None:
    built = subject("dpo", train={"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.3]})
    outcome = checked(built, *START)
    assert outcome.broken == {}
    assert outcome.skipped["accumulation"] == "the loss of a row depends on the other rows of its forward pass"


def test_padding_on_the_left_gives_the_first_token_of_a_row_nothing_to_be_predicted_from(
    subject: Callable[..., Subject],
) -> None:
    trainer = subject("pretrain").trainer  # every token has a label, the first one too
    row = [trainer.train_dataset[0]]
    trainer.model.get_output_embeddings().weight.data.mul_(50)  # far from uniform: one more token would show
    alone, padded = probe.measure(trainer, row), probe.measure(trainer, row, extra=5, left=True)
    assert padded["loss"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.parametrize("name", ["dpo", "kto"])
def test_precomputed_reference_numbers_are_compared_too(name: str, subject: Callable[..., Subject]) -> None:
    built = subject(name, train={"precompute_ref_log_probs": True})
    column = "ref_chosen_logps" if name == "dpo" else "ref_logps"
    assert checked(built, *START).broken == {}
    built = subject(name, train={"precompute_ref_log_probs": True})
    built.trainer.train_dataset = built.trainer.train_dataset.map(
        lambda row: {column: row[column] - 1.0}, keep_in_memory=True
    )
    assert list(checked(built, *START).broken) == ["reference"]


def test_a_run_says_and_records_what_holds(tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path,
                                           capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    changes = {"model": str(tiny_run / "sft"), "skip_checks": ["padding"]}
    run = run_recipe(tiny_recipe("kto", kto=changes), tmp_path)
    record = runs.read_manifest(run / "kto")["checks"]
    assert record["passed"] == [
        "embeddings", "unused-rows", "trained-tokens", "trainable", "precision", "dropout", "row-alone", "reference",
        "stage", "first-loss", "gradients", "optimizer",
    ]  # fmt: skip
    assert record["skipped"] == {"accumulation": "the loss of a row depends on the other rows of its forward pass"}
    assert record["off"] == ["padding"]
    said = capsys.readouterr().out
    assert "first loss 0.5000, as it must be (0.5000)" in said
    assert "checks     12 hold" in said
    assert "skipped    accumulation: the loss of a row depends" in said
    assert "skipped    padding: skip_checks names it" in said


@pytest.mark.parametrize("name", ["ppo", "rloo"])
def test_online_stages_are_checked_too(
    name: str, tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe, tmp_path: Path
) -> None:
    train = {"max_steps": 2, "learning_rate": 1e-3}
    train |= {"response_length": 8} if name == "ppo" else {"num_generations": 2, "max_completion_length": 8}
    recipe = tiny_recipe("ppo", ppo={"model": str(tiny_run / "sft"), "algorithm": name})
    recipe["stages"]["ppo"]["train"] = train
    record = runs.read_manifest(run_recipe(recipe, tmp_path) / "ppo")["checks"]
    wanted = {"embeddings", "unused-rows", "precision", "stage", "gradients", "optimizer"}
    assert wanted <= set(record["passed"])


def test_an_unknown_or_needed_check_cannot_be_left_out(tiny_recipe: Recipe, tmp_path: Path) -> None:
    from alignment.errors import RecipeError

    path = tmp_path / "recipe.yaml"
    for name, says in (("paddding", "is no check"), ("embeddings", "is always made")):
        path.write_text(yaml.safe_dump(tiny_recipe("base", base={"skip_checks": [name]})))
        with pytest.raises(RecipeError, match=f"{name} {says}"):
            load_recipe(path)


# --- each names its bug -------------------------------------------------------------------------------------------


def too_few_rows(built: Subject) -> None:
    """A tokenizer that grew, a model that was not resized (LF#7997)."""
    built.core.resize_token_embeddings(64)


def untied(built: Subject) -> None:
    """Resizing that leaves two tables where the base has one (peft#2898)."""
    head = built.core.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone())


def foreign_ids(built: Subject) -> None:
    """A stale table, made with another tokenizer (axolotl#1265)."""
    built.trainer.train_dataset = built.trainer.train_dataset.map(
        lambda row: {"input_ids": [*row["input_ids"][:-1], 5000]}, keep_in_memory=True
    )


def pad_is_eos(built: Subject) -> None:
    """Padding masked by token value where pad is eos: the stop token is never a label (trl#1623, unsloth#416)."""
    theirs, stop = built.trainer.data_collator, built.ctx.tokenizer.eos_token_id

    def collate(rows: Any) -> Any:
        batch = theirs(rows)
        batch["labels"][batch["input_ids"] == stop] = -100
        return batch

    built.trainer.data_collator = collate


def all_ones(built: Subject) -> None:
    """The mask falls back to all ones: the user's turns are trained (Megatron-Bridge#3359)."""
    built.trainer.train_dataset = built.trainer.train_dataset.map(
        lambda row: {"labels": row["input_ids"]}, keep_in_memory=True
    )


def frozen_layer(built: Subject) -> None:
    """A layer that somebody froze."""
    built.core.model.layers[0].requires_grad_(False)


def base_not_frozen(built: Subject) -> None:
    """The base learns under its adapter."""
    built.core.model.norm.requires_grad_(True)


def shared_reference(built: Subject) -> None:
    """Policy and reference are one object: the KL stays 0 (trl#2046)."""
    built.trainer.ref_model = built.trainer.model


def half_weights(built: Subject) -> None:
    """Loaded or cast to bfloat16: AdamW loses its updates (trl#5138)."""
    built.core.model.layers[1].to(torch.bfloat16)


def autocast(built: Subject) -> None:
    """Mixed precision that the recipe did not ask for (TRL sets bf16 where it is unset)."""
    inner = built.trainer.model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return inner(*args, **kwargs)

    built.trainer.model.forward = forward


def attention_drops(built: Subject) -> None:
    """A rate that attention reads itself, which disable_dropout does not reach (trl#204)."""
    for layer in built.core.model.layers:
        layer.self_attn.attention_dropout = 0.3


def switched_off(built: Subject) -> None:
    """Declared in the configuration, and not in effect."""
    built.core.config.attention_dropout = 0.3


def trains_padding(built: Subject) -> None:
    """Padding is in the loss (trl#2022; the textbook's KL: rlhf-book#216)."""
    theirs, compute = built.trainer.data_collator, built.trainer.compute_loss
    built.trainer.data_collator = theirs

    def loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return compute(model, {**inputs, "labels": inputs["input_ids"]}, *args, **kwargs)

    built.trainer.compute_loss = loss


def reads_the_last_column(built: Subject) -> None:
    """A reward read at a pad, since the model's pad id is another (trl#3750, trl#6805)."""
    built.core.config.get_text_config().pad_token_id = 3


def mean_of_means(built: Subject) -> None:
    """Each forward pass is averaged by itself, long rows or short (trl#2456, the accumulation bug of 2024)."""
    compute = built.trainer.compute_loss

    def loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return compute(model, inputs, *args, **{**kwargs, "num_items_in_batch": None})

    built.trainer.compute_loss = loss


def never_divided(built: Subject) -> None:
    """The Trainer takes the loss for one that is divided already: n times too large (trl PR#5710)."""
    built.trainer.loss_is_scaled_for_ga = True


def neighbours_count(built: Subject) -> None:
    """The loss is divided by the width of the batch, not by the tokens of the row."""
    compute = built.trainer.compute_loss

    def loss(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return compute(model, inputs, *args, **kwargs) * 40 / inputs["input_ids"].shape[1]

    built.trainer.compute_loss = loss


def rows_attend(built: Subject) -> None:
    """A layer mixes the rows of a batch (packing without boundaries: trl#805)."""
    built.core.model.layers[0].register_forward_hook(lambda module, args, output: output - output.mean(0, keepdim=True))


def other_reference(built: Subject) -> None:
    """The base as reference in place of the SFT model (LF#8459)."""
    with torch.no_grad():
        for parameter in built.trainer.ref_model.parameters():
            parameter.mul_(1.05)


def both_are_the_base(built: Subject) -> None:
    """Policy and reference are equal, and neither is the stage's model (LF#2087): the first loss looks right."""
    for model in (built.trainer.model, built.trainer.ref_model):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)


PLANTED: list[tuple[str, str, dict[str, Any], Callable[[Subject], None], str]] = [
    ("embeddings", "sft", {}, too_few_rows, "64 embedding rows for 3"),
    ("embeddings", "dpo", {}, untied, "tied in the base, and two tensors here"),
    ("unused-rows", "sft", {}, foreign_ids, "a row holds the id 5000, the tokenizer's largest is"),
    ("trained-tokens", "sft", {}, pad_is_eos, "the table says"),
    ("trained-tokens", "sft", {}, all_ones, "tokens are trained, the prompt too"),
    ("trainable", "sft", {}, frozen_layer, "weights are frozen: model.layers.0"),
    ("trainable", "dpo", {"peft": LORA}, base_not_frozen, "1 weights outside the adapter are trained"),
    ("trainable", "dpo", {}, shared_reference, "the reference shares"),
    ("precision", "sft", {}, half_weights, "trained weights are not float32: model.layers.1"),
    ("precision", "dpo", {}, autocast, "matrix products are computed in bfloat16, precision.compute asks for float32"),
    ("dropout", "dpo", {}, attention_drops, "model.layers.0.self_attn.attention_dropout = 0.3"),
    ("dropout", "reward", {}, attention_drops, "no dropout is declared"),
    ("dropout", "sft", {}, switched_off, "attention_dropout is declared, and two passes in training mode agree"),
    ("padding", "sft", {}, trains_padding, "5 more columns of padding on the right change a row: loss"),
    ("padding", "reward", {}, reads_the_last_column, "columns of padding on the right change a row: mean_reward"),
    ("row-alone", "sft", {}, neighbours_count, "2 rows alone against the same rows together: loss"),
    ("row-alone", "dpo", {}, rows_attend, "rows alone against the same rows together: logps/"),
    ("row-alone", "kto", {}, rows_attend, "logps/"),
    ("accumulation", "sft", {}, mean_of_means, "1 row x 2 passes against 2 rows x 1 pass: loss"),
    ("accumulation", "dpo", {}, never_divided, "1 row x 2 passes against 2 rows x 1 pass: loss 1.3863 against 0.69315"),
    ("accumulation", "reward", {}, never_divided, "1 row x 2 passes against 2 rows x 1 pass: loss"),
    ("reference", "dpo", {}, other_reference, "the reference; they start as the same weights"),
    ("reference", "kto", {}, other_reference, "the reference; they start as the same weights"),
    ("stage", "dpo", {}, both_are_the_base, "recorded"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "algorithm", "changes", "plant", "says"),
    PLANTED,
    ids=[f"{name}-{algorithm}-{plant.__name__}" for name, algorithm, _, plant, _ in PLANTED],
)
def test_a_planted_bug_is_named(
    name: str,
    algorithm: str,
    changes: dict[str, Any],
    plant: Callable[[Subject], None],
    says: str,
    subject: Callable[..., Subject],
) -> None:
    built = subject(algorithm, **changes)
    plant(built)
    outcome = checked(built, name)
    assert says in outcome.broken[name]
    assert outcome.broken[name].endswith(f"Usual causes: {INVARIANTS[name].cause}")
    with pytest.raises(invariants.InvariantError, match="would not train what it says"):
        invariants.require(outcome)


def test_equal_wrong_models_pass_the_first_loss_and_not_the_stage(subject: Callable[..., Subject]) -> None:
    built = subject("dpo")
    both_are_the_base(built)
    outcome = checked(built, "reference", "stage")
    assert (outcome.passed, list(outcome.broken)) == (["reference"], ["stage"])


@contextmanager
def planted_into(monkeypatch: pytest.MonkeyPatch, plant: Callable[[Trainer], None]) -> Iterator[None]:
    """Change a trainer after it was built, inside a real run."""
    original = builders._common

    with monkeypatch.context() as patch:
        follow = worker.nonfinite.follow_rows
        patch.setattr(worker.nonfinite, "follow_rows", lambda trainer: (follow(trainer), plant(trainer))[0])
        assert builders._common is original
        yield


def cut_graph(trainer: Trainer) -> None:
    """Checkpointing that cuts the graph: nothing below the second layer learns (transformers#47254, trl#2514)."""

    def detach(module: Any, args: Any, output: Any) -> Any:
        return output.detach() if not isinstance(output, tuple) else tuple(part.detach() for part in output)

    probe.core_of(trainer).model.layers[0].register_forward_hook(detach)


def constant_loss(trainer: Trainer) -> None:
    """A loss that no weight changes (loss 0.0 of a wrong reference: LF#8974)."""
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *args, **kwargs: compute(*args, **kwargs) * 0.0 + 0.6931


def low_moments(trainer: Trainer) -> None:
    """Moments in bfloat16."""
    create = trainer.create_optimizer

    def created(*args: Any, **kwargs: Any) -> Any:
        made = create(*args, **kwargs)
        step = made.step

        def stepped(*a: Any, **k: Any) -> Any:
            result = step(*a, **k)
            for state in made.state.values():
                state["exp_avg"] = state["exp_avg"].bfloat16()
            return result

        made.step = stepped
        return made

    trainer.create_optimizer = created


@pytest.mark.parametrize(
    ("name", "plant", "says"),
    [
        ("gradients", cut_graph, "trained weights receive no gradient"),
        ("gradients", constant_loss, "the norm of all gradients is exactly 0"),
        ("optimizer", low_moments, "the optimizer's state is bfloat16"),
    ],
)
def test_a_bug_of_the_first_step_is_named(
    name: str, plant: Callable[[Trainer], None], says: str, tiny_run: Path, run_recipe: Run, tiny_recipe: Recipe,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with planted_into(monkeypatch, plant):
        run = run_recipe(tiny_recipe("dpo", dpo={"model": str(tiny_run / "sft")}), tmp_path, expect=1)
    said = capsys.readouterr().err
    assert f"  - {name}: " in said
    assert says in said
    assert not (run / "dpo" / "manifest.json").exists()


# --- deep -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "reward"])
def test_the_deep_checks_hold_on_a_clean_stage(name: str, tiny_run: Path, tiny_recipe: Recipe, tmp_path: Path) -> None:
    start = str(tiny_run / ("base" if name == "sft" else "sft"))
    outcome = deep.check_stage(planned(tiny_recipe(name, **{name: {"model": start}}), tmp_path, name))
    assert outcome.broken == {}
    deeper = {"learning-rate-zero", "accumulated-gradients", "stage-rows"}
    assert deeper <= {*outcome.passed, *outcome.skipped}
    assert "learning-rate-zero" in outcome.passed
    if name in ("sft", "dpo"):
        assert deeper <= set(outcome.passed)


@pytest.mark.parametrize(
    ("launch", "named"),
    [({}, None), ({"processes": 2}, "2 processes"), ({"processes": 2, "deepspeed": "z.json"}, "z.json"),
     ({"accelerate": "fsdp.yaml"}, "fsdp.yaml")],
)  # fmt: skip
def test_deep_says_what_one_process_cannot_show(launch: dict[str, Any], named: str | None) -> None:
    lines = deep._launched("sft", Launch.model_validate(launch))
    assert lines == ([] if named is None else [
        f"stages.sft: checked in one process, not under {named}: the run checks its first batch there"
    ])  # fmt: skip


def test_deep_finds_what_moves_without_a_learning_rate(
    tiny_run: Path, tiny_recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = assemble.assembled

    class Decay(TrainerCallback):
        """Weight decay outside the optimizer."""

        def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            with torch.no_grad():
                model.model.norm.weight.mul_(0.999)

    def built(ctx: Any) -> Any:
        ctx, trainer = original(ctx)
        trainer.add_callback(Decay())
        return ctx, trainer

    monkeypatch.setattr(assemble, "assembled", built)
    outcome = deep.check_stage(planned(tiny_recipe("sft", sft={"model": str(tiny_run / "base")}), tmp_path, "sft"))
    assert "changed 1 of " in outcome.broken["learning-rate-zero"]
    assert "model.norm.weight" in outcome.broken["learning-rate-zero"]


def test_deep_compares_the_gradients_and_the_stage(
    subject: Callable[..., Subject],
) -> None:
    built = subject("dpo")
    built.trainer.create_optimizer_and_scheduler(1)
    clean = list(deep.accumulated_gradients(built))
    assert clean == []
    never_divided(built)
    (found,) = deep.accumulated_gradients(built)
    assert "the norms are as 1 to 2" in found
    other = subject("dpo")
    both_are_the_base(other)
    assert "a training row under the start against" in next(deep.stage_rows(other))


# --- what a reader is told ------------------------------------------------------------------------------------------


def test_the_page_has_the_table(root: Path) -> None:
    page = (root / "recipes" / "checks.md").read_text()
    for name, row in INVARIANTS.items():
        when = row.when + (", offline" if row.kind == "offline" else "")
        assert f"| `{name}` | {row.holds} | {when} | {row.cause} |\n" in page, name
    assert "(checks.md)" in (root / "recipes" / "README.md").read_text()


def test_a_young_run_says_what_its_log_shows() -> None:
    from types import SimpleNamespace

    from alignment.training.early import Early

    said: list[str] = []
    early = Early("dpo", said.append)
    for step in range(1, 41):
        state: Any = SimpleNamespace(is_world_process_zero=True, global_step=step, max_steps=1000)
        logs = {"loss": 0.0, "grad_norm": 0.0, "rewards/accuracies": 1.0 if step > 1 else 0.0}
        early.on_log(None, state, None, logs=logs)  # type: ignore[arg-type]
        assert len(said) == (0 if step < 10 else 3)  # once each
    assert "error    loss-zero, steps 1 to 10: loss is exactly 0 in 10 of 10 lines. No token carries loss" in said[0]
    assert "gradient-zero, steps 1 to 10: grad_norm is exactly 0" in said[1]
    assert "warning    accuracy-one, steps 2 to 6: rewards/accuracies is 1 from step 2 on" in said[2]
    assert "stages.dpo." in said[0]


def test_check_deep_from_the_command_line(
    tiny_run: Path, tiny_recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from alignment.cli import main

    recipe = tiny_recipe("sft", "dpo", "ppo", sft={"model": str(tiny_run / "base")})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    assert main(["check", str(path), "--deep", "--runs", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "ok           stages.sft: 15 hold: embeddings, " in said
    assert "learning-rate-zero" in said
    assert "not checked  stages.dpo: sft must be finished first" in said
    assert "not checked  stages.ppo: ppo is checked on its first rollout, in the run" in said
    assert not (tmp_path / "tiny").exists()
