"""PPO's trainer on a tiny model: it learns, what must not matter does not, and each historic fault is named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from alignment.errors import NonFiniteError, RecipeError
from alignment.models.load import load_policy, load_scorer
from alignment.training import ppo, ppo_checks
from alignment.training.actor_critic import SharedTrunk
from alignment.training.objectives import gae, token_rewards
from alignment.training.ppo import PPOTrainer
from alignment.training.ppo_config import PPOConfig
from alignment.training.rollout import Batch, Rollout
from alignment.training.shared_base import SharedBase
from alignment.training.trainers import without_tied

LORA = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "lora_dropout": 0.0}
FORMS = ("separate", "trunk", "lora")


def letters(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """A reward that a few updates can raise: one point for each letter e of the first 20."""
    return [float(str(reply[0]["content"])[:20].count("e")) for reply in completions]


Make = Callable[..., PPOTrainer]


@pytest.fixture
def make(tiny_policy: Path, tiny_tokenizer: Any, tmp_path: Path, write_jsonl: Any) -> Make:
    """A function that makes a trainer of one of the three forms; keywords go to `PPOConfig`."""

    def trainer(form: str = "separate", *, reward: Any = letters, scale: float = 1.0, **settings: Any) -> PPOTrainer:
        torch.manual_seed(0)
        policy, _ = load_policy(tiny_policy)
        policy.get_output_embeddings().weight.data *= scale
        models: dict[str, Any] = {}
        if form == "lora":
            models["peft_config"] = LoraConfig(**LORA)
        else:
            models["ref_model"] = load_policy(tiny_policy)[0]
            if form == "trunk":
                settings["critic"] = "shared"
            else:
                models["value_model"] = load_scorer(tiny_policy, fresh_head=True)[0]
        words = "a b c d e f g h i j k l m n o p".split()
        rows = Dataset.from_list(
            [{"prompt": [{"role": "user", "content": f"Say {' '.join(words[: 1 + i % 7])} {i}"}]} for i in range(32)]
        )
        options = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 8, "max_steps": 2, "use_cpu": True,
            "response_length": 12, "learning_rate": 1e-3, "num_ppo_epochs": 2, "report_to": "none", "bf16": False,
            "save_strategy": "no", "disable_tqdm": True, "seed": 5,
        }  # fmt: skip
        return PPOTrainer(
            policy,
            PPOConfig(**options | settings),
            rows,
            processing_class=tiny_tokenizer,
            reward_funcs=reward,
            **models,
        )

    return trainer


def weights(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def lines(trainer: PPOTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "loss" in line]


def without_time(line: dict[str, float]) -> dict[str, float]:
    return {key: value for key, value in line.items() if not key.startswith("time/")}


# --- the first update -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_before_the_first_update_the_ratio_is_one_and_the_kl_zero(make: Make, form: str) -> None:
    trainer = make(form, max_steps=1, num_ppo_epochs=1, num_mini_batches=1)
    trainer.train()
    (line,) = lines(trainer)
    assert line["val/ratio"] == pytest.approx(1.0, abs=1e-6)
    assert line["policy/approxkl_avg"] == pytest.approx(0.0, abs=1e-10)
    assert line["policy/clipfrac_avg"] == 0.0
    assert line["objective/kl"] == pytest.approx(0.0, abs=1e-5)
    assert line["objective/rlhf_reward"] == pytest.approx(line["objective/scores"], abs=1e-5)
    assert line["rewards/letters"] == pytest.approx(line["objective/scores"])
    assert line["episode"] == 8


@pytest.mark.parametrize("form", FORMS)
def test_only_what_is_trained_moves(make: Make, form: str) -> None:
    trainer = make(form, num_ppo_epochs=4)  # the first step moves the head, the next what is below it, and so on
    before = weights(trainer)
    reference = {} if trainer.ref_model is None else {n: p.clone() for n, p in trainer.ref_model.named_parameters()}
    trainer.train()
    moved = {name for name, p in weights(trainer).items() if not torch.equal(p, before[name])}
    expected = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    assert moved == expected
    if form == "lora":
        assert all("lora" in name or name == "value_head.weight" for name in moved)
        assert {name.split(".")[-2] for name in moved if "lora" in name} == {"default", "critic"}
    for name, parameter in reference.items():
        assert torch.equal(parameter, dict(trainer.ref_model.named_parameters())[name]), name


def test_a_learning_rate_of_zero_changes_nothing(make: Make) -> None:
    trainer = make(learning_rate=0.0, max_steps=2)
    before = weights(trainer)
    trainer.train()
    assert all(torch.equal(p, before[name]) for name, p in weights(trainer).items())
    assert [line["objective/kl"] for line in lines(trainer)] == pytest.approx([0.0, 0.0], abs=1e-5)


def test_the_critic_has_its_own_learning_rate(make: Make) -> None:
    trainer = make(critic_learning_rate=0.5, learning_rate=1e-3, lr_scheduler_type="constant")
    trainer.create_optimizer()
    critic = {id(p) for p in trainer.model.critic_parameters()}
    for group in trainer.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == (0.5 if id(parameter) in critic else 1e-3)
    counted = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    assert counted == sum(p.requires_grad for p in trainer.model.parameters())


# --- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_micro_batches_do_not_change_the_update(make: Make, form: str) -> None:
    """1 x 8 rows, 8 x 1 and 3 + 3 + 2: the same weights after two updates of unequal replies."""
    runs = {}
    for rows in (8, 1):
        trainer = make(form, per_device_train_batch_size=rows, gradient_accumulation_steps=8 // rows, adam_epsilon=1e-3)
        trainer.train()
        runs[rows] = weights(trainer), lines(trainer)
    for name, expected in runs[8][0].items():
        torch.testing.assert_close(runs[1][0][name], expected, atol=1e-5, rtol=1e-4, msg=name)
    for ours, theirs in zip(runs[1][1], runs[8][1], strict=True):
        for key in ("loss/policy_avg", "loss/value_avg", "objective/scores", "policy/approxkl_avg"):
            assert ours[key] == pytest.approx(theirs[key], abs=1e-5), key


def test_how_many_rows_are_judged_at_once_does_not_matter(make: Make) -> None:
    """Only the draws depend on it; the passes that judge one set of replies do not."""
    trainer = make()
    trainer.train()
    rows = [dict(row) for row in trainer.train_dataset.select(range(8))]
    with trainer._seeded(0):
        episodes = trainer._generate(trainer.model_wrapped, rows)
    mask = torch.arange(12)[None] < torch.tensor([[len(ids)] for ids in episodes.completions])
    mask = mask[:, : max(map(len, episodes.completions))]
    whole = trainer._judge(trainer.model_wrapped, episodes, mask)
    trainer.settings.local_rollout_forward_batch_size = 3
    for first, second in zip(whole[:2], trainer._judge(trainer.model_wrapped, episodes, mask)[:2], strict=True):
        torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-5)


def test_weights_are_gathered_once_per_rollout(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many groups of prompts are drawn; under ZeRO-3 each gathering moves the whole model."""
    seen: list[bool] = []
    own = ppo.unwrap_model_for_generation

    def counted(*args: Any, gather_deepspeed3_params: bool, **options: Any) -> Any:
        seen.append(gather_deepspeed3_params)
        return own(*args, gather_deepspeed3_params=gather_deepspeed3_params, **options)

    monkeypatch.setattr(ppo, "unwrap_model_for_generation", counted)
    make(max_steps=2, local_rollout_forward_batch_size=3).train()
    assert seen == [True, True]


@pytest.mark.parametrize("form", FORMS)
def test_gradient_checkpointing_changes_nothing(make: Make, form: str) -> None:
    found = []
    for flag in (False, True):
        trainer = make(form, max_steps=1, gradient_checkpointing=flag)
        trainer.train()
        found.append(weights(trainer))
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_a_killed_run_resumes_bit_for_bit(make: Make, form: str, tmp_path: Path) -> None:
    def noisy(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
        return letters(prompts, completions)

    settings = {"max_steps": 5, "save_strategy": "steps", "save_steps": 2, "logging_steps": 2, "kl_target": 0.5}
    whole = make(form, reward=noisy, **settings)
    whole.train()
    again = make(form, reward=noisy, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    for name, expected in weights(whole).items():
        assert torch.equal(weights(again)[name], expected), name
    assert again.kl_coef == whole.kl_coef != whole.settings.kl_coef
    assert [without_time(line) for line in lines(again)] == [without_time(line) for line in lines(whole)]


# --- rewards ----------------------------------------------------------------------------------------------------------


def test_the_rewards_of_a_rollout_by_hand(make: Make) -> None:
    """Scores at the last token, the penalty for a cut reply, KL at every token, and the advantages from a loop."""
    trainer = make(missing_eos_penalty=2.0, kl_coef=0.3, whiten_advantages=False, lam=0.9, gamma=0.8)
    kept: list[Rollout] = []
    own = trainer.rollout
    trainer.rollout = lambda *args: kept.append(own(*args)) or kept[-1]  # type: ignore[func-returns-value]
    trainer.train()
    rollout = kept[1]  # after one update: the KL is not zero
    assert rollout.kl[rollout.mask].abs().max() > 1e-4
    assert not all(rollout.episodes.finished)
    raw = torch.tensor(letters([], [[{"content": text}] for text in rollout.episodes.texts]))
    expected = raw - 2.0 * ~torch.tensor(rollout.episodes.finished)
    torch.testing.assert_close(rollout.scores, expected)
    rewards = token_rewards(expected, rollout.log_probs - rollout.reference, rollout.mask, kl_coef=0.3)
    advantages, returns = gae(rewards, rollout.values, rollout.mask, gamma=0.8, lam=0.9)
    torch.testing.assert_close(rollout.advantages, advantages)
    torch.testing.assert_close(rollout.returns, returns)


def test_prompts_that_hold_the_end_token_are_not_taken_for_finished(make: Make) -> None:
    """Every ChatML prompt holds the end token; only the reply's own counts."""
    trainer = make(max_steps=1)
    stop = trainer.stops[0]
    assert all(stop in row["prompt_ids"] for row in trainer.train_dataset)
    trainer.train()
    (line,) = lines(trainer)
    assert line["completions/truncated_share"] == pytest.approx(1 - line["val/num_eos_tokens"] / 8)
    assert line["completions/truncated_share"] > 0


def test_a_cut_reply_is_bootstrapped_where_asked(make: Make) -> None:
    plain, boot = make(whiten_advantages=False), make(whiten_advantages=False, bootstrap_truncated=True)
    found = []
    for trainer in (plain, boot):
        trainer.train()
        rows = [dict(row) for row in trainer.train_dataset.select(range(8))]
        with trainer._seeded(9):
            found.append(trainer.rollout(trainer.model_wrapped, rows))
    cut = [index for index, done in enumerate(found[1].episodes.finished) if not done]
    assert cut
    assert float(found[1].scores[cut].abs().sum()) == 0.0  # the score of a broken reply is not used
    ended = [index for index, done in enumerate(found[1].episodes.finished) if done]
    if ended:
        torch.testing.assert_close(
            found[1].scores[ended].sum(),
            torch.tensor(letters([], [[{"content": found[1].episodes.texts[i]}] for i in ended])).sum(),
        )


# --- it learns, and it stops ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_it_learns(make: Make, form: str) -> None:
    # Under LoRA the output layer is frozen: random weights of 0.02 could say nothing but noise.
    rate, scale = (1e-2, 10.0) if form == "lora" else (3e-3, 1.0)
    trainer = make(
        form, max_steps=25, scale=scale, learning_rate=rate, per_device_train_batch_size=32, num_ppo_epochs=4,
        num_mini_batches=2, kl_coef=0.0, lr_scheduler_type="constant",
    )  # fmt: skip
    trainer.train()
    scores = [line["objective/scores"] for line in lines(trainer)]
    assert sum(scores[-3:]) / 3 > sum(scores[:3]) / 3 + 1.0, scores


def test_a_run_ends_at_max_kl_and_says_so(make: Make) -> None:
    trainer = make(max_steps=20, learning_rate=3e-2, max_kl=0.5, kl_coef=0.0)
    trainer.train()
    assert trainer.state.global_step < 20
    assert trainer.stopped is not None
    assert "max_kl is 0.5" in trainer.stopped


def test_an_update_leaves_its_passes_at_target_kl(make: Make) -> None:
    trainer = make(max_steps=1, learning_rate=3e-2, num_ppo_epochs=10, target_kl=0.01)
    trainer.train()
    assert 1 < lines(trainer)[0]["policy/minibatches"] < 10


def test_a_loss_that_is_not_finite_stops_the_run(make: Make) -> None:
    trainer = make()
    own = trainer._advantages

    def broken(*args: Any) -> Rollout:
        rollout = own(*args)
        rollout.returns[0, 0] = float("nan")
        return rollout

    trainer._advantages = broken  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError, match="step 1: returns of a reply are not finite; nothing was updated"):
        trainer.train()


# --- planted faults ---------------------------------------------------------------------------------------------------


def expect(trainer: PPOTrainer, words: str) -> None:
    with pytest.raises(ppo_checks.CheckError, match=words):
        trainer.train()


def test_a_reference_that_is_the_policy_is_refused(make: Make, tiny_policy: Path, tiny_tokenizer: Any) -> None:
    trainer = make()
    policy = trainer.model.policy
    with pytest.raises(RecipeError, match="is the policy itself"):
        PPOTrainer(
            policy, trainer.settings, trainer.train_dataset, processing_class=tiny_tokenizer, reward_funcs=letters,
            ref_model=policy, value_model=trainer.model.critic,
        )  # fmt: skip
    with pytest.raises(RecipeError, match="needs its reference passed"):
        PPOTrainer(
            policy, trainer.settings, trainer.train_dataset, processing_class=tiny_tokenizer, reward_funcs=letters,
            value_model=trainer.model.critic,
        )  # fmt: skip


def test_a_critic_that_would_not_be_used_is_refused(make: Make, tiny_tokenizer: Any) -> None:
    trainer = make()
    for settings, critic, words in (
        ({"critic": "shared"}, trainer.model.critic, "is not used with critic: shared"),
        ({}, None, "critic: separate needs one"),
    ):
        args = PPOConfig(output_dir="out", use_cpu=True, bf16=False, **settings)
        with pytest.raises(RecipeError, match=words):
            PPOTrainer(
                trainer.model.policy, args, trainer.train_dataset, processing_class=tiny_tokenizer,
                reward_funcs=letters, ref_model=trainer.ref_model, value_model=critic,
            )  # fmt: skip


def test_every_evaluation_prompt_is_answered(make: Make) -> None:
    trainer = make(per_device_eval_batch_size=8)
    before = trainer.controllers()
    numbers = trainer.evaluate(trainer.train_dataset.select(range(11)))
    assert numbers["eval_rewards/letters"] >= 0
    seen: list[int] = []
    own = trainer.rollout
    trainer.rollout = lambda model, rows: seen.append(len(rows)) or own(model, rows)  # type: ignore[func-returns-value]
    trainer.evaluate(trainer.train_dataset.select(range(11)))
    assert seen == [8, 3]
    assert trainer.controllers() == before


def test_a_reference_that_shares_weights_is_named(make: Make) -> None:
    trainer = make()
    trainer.ref_model.model.layers[0].mlp.up_proj.weight = trainer.model.policy.model.layers[0].mlp.up_proj.weight
    expect(trainer, "reference: it must not share weights with the policy")


def test_a_wrong_reference_is_named(make: Make) -> None:
    trainer = make()
    with torch.no_grad():
        trainer.ref_model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
    expect(trainer, "reference: policy and reference are the same weights, so their KL must be 0")


def test_dropout_is_named(make: Make) -> None:
    trainer = make()
    layer = trainer.model.policy.model.layers[0].mlp
    layer.down_proj = torch.nn.Sequential(torch.nn.Dropout(0.5), layer.down_proj)
    expect(trainer, "dropout: two passes over the same episodes must agree")


def test_another_temperature_in_training_is_named(make: Make) -> None:
    trainer = make(temperature=0.7)
    own = trainer._judge

    def other(*args: Any) -> Any:
        trainer.settings.temperature = 1.0
        found = own(*args)
        trainer.settings.temperature = 0.7
        return found

    trainer._judge = other  # type: ignore[method-assign]
    expect(trainer, "ratio: before the first update it must be 1")


def test_padding_that_is_seen_is_named(make: Make) -> None:
    """A model whose attention looks ahead."""
    trainer = make()
    for model in (trainer.model.policy, trainer.ref_model):
        for layer in model.model.layers:
            layer.self_attn.is_causal = False
    expect(trainer, "padding: a padded and an unpadded copy of one episode")


def test_a_reward_model_that_loses_the_replies_is_named(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make()
    monkeypatch.setattr(ppo_checks, "round_trip", lambda *args: "rewards: rm: its tokenizer loses a part of the reply")
    expect(trainer, "its tokenizer loses a part of the reply")


def test_dropout_of_the_model_is_switched_off(tiny_policy: Path) -> None:
    policy, _ = load_policy(tiny_policy)
    policy.model.layers[0].self_attn.attention_dropout = 0.3
    adapted = get_peft_model(policy, LoraConfig(**LORA | {"lora_dropout": 0.5}))
    module = SharedBase(adapted, reference=None, vocabulary=320)
    rates = [part.p for part in module.modules() if isinstance(part, torch.nn.Dropout)]
    assert set(rates) <= {0.0}
    assert policy.model.layers[0].self_attn.attention_dropout == 0.0


def test_batches_that_do_not_divide_are_refused(make: Make) -> None:
    with pytest.raises(ValueError, match="num_mini_batches 3 does not divide the 8 episodes"):
        make(num_mini_batches=3)
    with pytest.raises(RecipeError, match="32 prompts are fewer than the 64 episodes of one update"):
        make(gradient_accumulation_steps=8)


# --- roles on one base ------------------------------------------------------------------------------------------------


@pytest.fixture
def on_one_base(tiny_policy: Path) -> SharedBase:
    torch.manual_seed(0)
    policy, _ = load_policy(tiny_policy)
    module = SharedBase(get_peft_model(policy, LoraConfig(**LORA)), reference=None, vocabulary=320)
    with torch.no_grad():  # adapters and head that do something
        for name, parameter in module.named_parameters():
            if "lora_B" in name or name == "value_head.weight":
                parameter.normal_(std=0.1)
    return module


def some_batch() -> Batch:
    """Three rows of 9 tokens, 4 of them drawn; the first row is 3 tokens shorter."""
    ids = torch.randint(10, 300, (3, 9), generator=torch.Generator().manual_seed(2))
    return Batch(ids, starts=torch.tensor([1, 4, 4]), mask=torch.ones(3, 4, dtype=torch.bool))


def places(batch: Batch) -> torch.Tensor:
    """Row by row the columns of the states before each token and after the last."""
    return torch.tensor([[start + step for step in range(5)] for start in batch.starts.tolist()])


def test_each_role_sees_its_own_adapter(on_one_base: SharedBase) -> None:
    """One pass over blocks of rows against PEFT's own switching, one role at a time."""
    batch = some_batch()
    out = on_one_base(batch=batch)
    reference = on_one_base(batch=batch, reference=True, temperature=1.0)
    model, where, rows = on_one_base.policy, places(batch), torch.arange(3)[:, None]

    def log_probs(logits: torch.Tensor) -> torch.Tensor:
        chosen = torch.log_softmax(logits[rows, where[:, :-1], :320].float(), -1)
        return chosen.gather(-1, batch.ids[rows, where[:, 1:], None]).squeeze(-1)

    with on_one_base.roles.rows("default"):
        torch.testing.assert_close(out.log_probs, log_probs(model(input_ids=batch.ids).logits))
    with on_one_base.roles.rows(None):
        torch.testing.assert_close(reference, log_probs(model(input_ids=batch.ids).logits))
    with on_one_base.roles.rows("critic"):
        hidden = model(input_ids=batch.ids, output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(out.values, on_one_base.value_head(hidden[rows, where]).squeeze(-1))
    assert not torch.allclose(out.log_probs, reference)


def test_one_backward_pass_reaches_policy_and_critic(on_one_base: SharedBase) -> None:
    """The gradients of one pass over both are those of two passes, each with its own adapter only."""
    batch = some_batch()

    def gradients(which: str) -> dict[str, torch.Tensor]:
        on_one_base.zero_grad()
        out = on_one_base(batch=batch)
        loss = out.log_probs.sum() if which != "critic" else 0.0
        loss = loss + (out.values.square().sum() if which != "policy" else 0.0)
        loss.backward()
        return {name: p.grad.clone() for name, p in on_one_base.named_parameters() if p.grad is not None}

    both, policy, critic = gradients("both"), gradients("policy"), gradients("critic")
    for name, gradient in both.items():
        expected = critic[name] if "critic" in name or "value_head" in name else policy[name]
        torch.testing.assert_close(gradient, expected, msg=name)
        assert float(gradient.abs().sum()) > 0, name
    assert set(both) == {name for name, p in on_one_base.named_parameters() if p.requires_grad}


def test_no_switch_freezes_an_adapter(on_one_base: SharedBase) -> None:
    trained = {name for name, p in on_one_base.named_parameters() if p.requires_grad}
    batch = some_batch()
    on_one_base(batch=batch)
    on_one_base(batch=batch, reference=True, temperature=1.0)
    with on_one_base.as_policy() as policy:
        policy.generate(input_ids=batch.ids, max_new_tokens=2, do_sample=False, eos_token_id=2)
    assert {name for name, p in on_one_base.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"use_dora": True}, "variant of LoRA"),
        ({"modules_to_save": ["embed_tokens"]}, "trained beside its adapter"),
        ({"trainable_token_indices": [1, 2]}, "trained beside its adapter"),
    ],
)
def test_adapters_that_cannot_share_a_base_are_refused(tiny_policy: Path, keys: dict[str, Any], words: str) -> None:
    policy, _ = load_policy(tiny_policy)
    with pytest.raises(RecipeError, match=words):
        SharedBase(get_peft_model(policy, LoraConfig(**LORA | keys)), reference=None, vocabulary=320)


def test_values_on_the_policys_trunk_come_from_its_last_hidden_states(tiny_policy: Path) -> None:
    policy, _ = load_policy(tiny_policy)
    module = SharedTrunk(policy, vocabulary=320)
    with torch.no_grad():
        module.value_head.weight.normal_()
    batch = some_batch()
    out = module(batch=batch)
    hidden = policy.model(input_ids=batch.ids).last_hidden_state[torch.arange(3)[:, None], places(batch)]
    torch.testing.assert_close(out.values, module.value_head(hidden).squeeze(-1))


# --- as a stage -------------------------------------------------------------------------------------------------------


def test_files_hold_a_json_of_controllers(make: Make, tmp_path: Path) -> None:
    trainer = make(max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    record = json.loads((tmp_path / "out" / "checkpoint-1" / "ppo.json").read_text())
    assert record["kl_coef"] == trainer.kl_coef
    assert (tmp_path / "out" / "checkpoint-1" / "critic" / "model.safetensors").is_file()


def test_a_tied_tensor_is_written_once(tiny_policy: Path, tmp_path: Path) -> None:
    """A state dict that was gathered from ZeRO holds copies of both names."""
    policy, _ = load_policy(tiny_policy)
    state = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= state.keys()
    kept = without_tied(policy, state)
    assert set(state) - set(kept) == {"lm_head.weight"}
    policy.save_pretrained(tmp_path, state_dict=kept)
    read = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(read.lm_head.weight, policy.lm_head.weight)
