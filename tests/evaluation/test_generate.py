"""Replies, KL and scores: seeded, the same in any batch where they must be, and nothing inherited in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from alignment.data import templates
from alignment.errors import ModelError
from alignment.evaluation.generate import Reply, batches, generate, kl_to, score
from alignment.models.generation import draw, vocabulary_size
from alignment.models.load import load_policy
from alignment.recipe.schema import Sampling

GREEDY = Sampling(temperature=0.0, max_new_tokens=12)
FREE = Sampling(temperature=1.0, max_new_tokens=12)


@pytest.fixture(scope="module")
def policy(tiny_policy: Path) -> Any:
    return load_policy(tiny_policy)


@pytest.fixture(scope="module")
def other(tiny_policy: Path) -> Any:
    """The same architecture with other weights."""
    model, _ = load_policy(tiny_policy)
    torch.manual_seed(1)
    with torch.no_grad():
        for weights in model.parameters():
            weights.add_(0.05 * torch.randn_like(weights))
    return model


@pytest.fixture(scope="module")
def prompts(tiny_tokenizer: Any) -> list[list[int]]:
    """Of different lengths."""
    questions = ["cat", "Tell me about the red sun and the river.", "dog?", "sleep " * 9, "king", "moon, tree, queen"]
    return [templates.encode_prompt(tiny_tokenizer, [{"role": "user", "content": text}]) for text in questions]


def test_batches_are_of_like_lengths_with_the_longest_first() -> None:
    assert batches([3, 9, 1, 9, 5], 2) == [[1, 3], [4, 0], [2]]


def run(policy: Any, prompts: list[list[int]], sampling: Sampling, size: int, seed: int = 0) -> list[Reply]:
    model, tokenizer = policy
    plan = batches([len(ids) for ids in prompts], size)
    return generate(model, tokenizer, prompts, plan, sampling, templates.stop_ids(tokenizer), seed=seed)


def test_greedy_replies_do_not_depend_on_the_batch(policy: Any, prompts: list[list[int]]) -> None:
    """Left padding is masked, and replies come back in the prompts' order."""
    alone = [run(policy, [ids], GREEDY, 1)[0] for ids in prompts]
    assert run(policy, prompts, GREEDY, 4) == alone
    assert run(policy, prompts, GREEDY, 6) == alone


def test_draws_depend_on_the_seed_alone(policy: Any, prompts: list[list[int]]) -> None:
    first = run(policy, prompts, FREE, 4, seed=5)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert run(policy, prompts, FREE, 4, seed=5) == first
    assert torch.equal(torch.get_rng_state(), before)  # the caller's generator is left alone
    assert run(policy, prompts, FREE, 4, seed=6) != first


def test_a_batch_is_drawn_alike_whatever_came_before_it(policy: Any, prompts: list[list[int]]) -> None:
    """Another model may stop sooner in an earlier batch; that must not shift the draws of the next."""
    model, tokenizer = policy
    stops = templates.stop_ids(tokenizer)
    plan = batches([len(ids) for ids in prompts], 3)
    whole = generate(model, tokenizer, prompts, plan, FREE, stops, seed=3)
    longest = Sampling(temperature=1.0, max_new_tokens=12)
    torch.manual_seed(4)  # seed 3, second batch
    second = draw(model, tokenizer, [prompts[index] for index in plan[1]], longest, stops)
    assert [list(whole[index].ids) for index in plan[1]] == second


def test_a_reply_ends_with_its_stop_token_and_its_text_does_not_show_it(prompts: list[list[int]], policy: Any) -> None:
    model, tokenizer = policy
    free = run(policy, prompts[:1], FREE, 1)[0]
    assert not free.finished
    assert len(free.ids) == FREE.max_new_tokens
    cut = next(place for place, token in enumerate(free.ids) if place and token not in free.ids[:place])
    reply = generate(model, tokenizer, prompts[:1], [[0]], FREE, [free.ids[cut]], seed=0)[0]
    assert reply.ids == free.ids[: cut + 1]
    assert reply.finished


def test_special_tokens_do_not_show_in_the_text(prompts: list[list[int]], tiny_policy: Path) -> None:
    model, tokenizer = load_policy(tiny_policy)
    with torch.no_grad():
        model.lm_head.weight.zero_()  # every id is as likely as another, so greedy takes the first: <|endoftext|>
    reply = generate(model, tokenizer, prompts[:1], [[0]], GREEDY, [0], seed=0)[0]
    assert (reply.ids, reply.text, reply.finished) == ((0,), "", True)


def test_the_models_own_generation_config_is_not_used_and_not_lost(tiny_policy: Path, prompts: list[list[int]]) -> None:
    model, tokenizer = load_policy(tiny_policy)
    plain = run((model, tokenizer), prompts, FREE, 4)
    own = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=9.0, min_new_tokens=4, max_length=20)
    model.generation_config = own
    assert run((model, tokenizer), prompts, FREE, 4) == plain
    assert model.generation_config is own


def test_ids_beyond_the_tokenizer_are_never_drawn(tiny_tokenizer: Any, prompts: list[list[int]]) -> None:
    rows = vocabulary_size(tiny_tokenizer) + 64
    torch.manual_seed(0)
    model = LlamaForCausalLM(_config(rows)).eval()
    with torch.no_grad():
        model.lm_head.weight[-64:] = 50 * model.lm_head.weight[:64]
    drawn = run((model, tiny_tokenizer), prompts, FREE, 6)
    assert max(token for reply in drawn for token in reply.ids) < rows - 64
    model.config.vocab_size = rows - 64  # the fault: without the mask they are drawn all the time
    faulty = run((model, tiny_tokenizer), prompts, FREE, 6)
    assert max(token for reply in faulty for token in reply.ids) >= rows - 64


def _config(rows: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=rows, max_position_embeddings=256,
    )  # fmt: skip


def test_a_prompt_without_room_for_a_reply_is_refused(policy: Any, prompts: list[list[int]]) -> None:
    with pytest.raises(ModelError, match=r"max_new_tokens 250 exceed its 256 positions; lower max_new_tokens"):
        run(policy, prompts, Sampling(max_new_tokens=250), 4)


# -- KL ----------------------------------------------------------------------------------------------------------------


def test_kl_is_the_sum_over_the_reply_of_both_models_distributions(
    policy: Any, other: Any, prompts: list[list[int]]
) -> None:
    """Against one unpadded forward pass per reply, written out."""
    model, tokenizer = policy
    replies = run(policy, prompts, FREE, 4)
    values = kl_to(other, model, tokenizer, prompts, replies, batch_size=4)
    size = vocabulary_size(tokenizer)
    for prompt, reply, value in zip(prompts, replies, values, strict=True):
        ids = torch.tensor([[*prompt, *reply.ids]])
        with torch.no_grad():
            ours, theirs = (
                one(input_ids=ids).logits[0, len(prompt) - 1 : -1, :size].double().log_softmax(-1)
                for one in (model, other)
            )
        assert value == pytest.approx(float((ours.exp() * (ours - theirs)).sum()), rel=1e-3)
    assert values.min() > 0


def test_kl_to_itself_is_exactly_zero(policy: Any, prompts: list[list[int]]) -> None:
    model, tokenizer = policy
    replies = run(policy, prompts, FREE, 4)
    assert not kl_to(model, model, tokenizer, prompts, replies, batch_size=6).any()


def test_kl_does_not_depend_on_how_many_logits_are_held(
    policy: Any, other: Any, prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = policy
    replies = run(policy, prompts, FREE, 6)
    whole = kl_to(other, model, tokenizer, prompts, replies, batch_size=6)
    monkeypatch.setattr("alignment.evaluation.generate.LOGITS_AT_ONCE", 1)
    assert kl_to(other, model, tokenizer, prompts, replies, batch_size=6) == pytest.approx(whole, rel=1e-4)


# -- scores ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scorer(tiny_tokenizer: Any) -> Any:
    config = _config(vocabulary_size(tiny_tokenizer))
    config.num_labels, config.pad_token_id = 1, tiny_tokenizer.pad_token_id
    torch.manual_seed(0)
    return LlamaForSequenceClassification(config).eval()


def test_scores_do_not_depend_on_the_batch(scorer: Any, tiny_tokenizer: Any, prompts: list[list[int]]) -> None:
    with torch.no_grad():
        alone = [float(scorer(input_ids=torch.tensor([ids])).logits) for ids in prompts]
    assert len(set(alone)) == len(alone)
    assert score(scorer, tiny_tokenizer, prompts, batch_size=4) == pytest.approx(alone, abs=1e-5)


def test_a_bfloat16_scorer_scores_in_float32(scorer: Any, tiny_tokenizer: Any, prompts: list[list[int]]) -> None:
    """Eight bits make ties of near pairs; the head's dtype is put back afterwards."""
    scorer.to(torch.bfloat16)
    values = score(scorer, tiny_tokenizer, prompts, batch_size=2)
    rounded = torch.tensor(values).to(torch.bfloat16).double().numpy()
    assert (np.abs(values - rounded) > 0).any()
    assert scorer.score.weight.dtype == torch.bfloat16
