"""Episodes as a pass reads them: rows side by side, groups of like lengths, logits only where a token was drawn."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, PretrainedConfig

from alignment.training.actor_critic import Drawn, read
from alignment.training.rollout import Episodes, chunks

EPISODES = Episodes(
    rows=[{}, {}, {}],
    prompts=[[5, 6, 7], [8], [9, 10]],
    completions=[[11], [12, 13, 14], [15, 16]],
    texts=["", "", ""],
    finished=[True, False, True],
)


def test_a_batch_holds_each_prompt_with_its_completion_and_padding_on_the_right() -> None:
    batch = EPISODES.batch([1, 0], pad=0, device=torch.device("cpu"))
    assert batch.ids.tolist() == [[8, 12, 13, 14], [5, 6, 7, 11]]
    assert batch.starts.tolist() == [0, 2]
    assert batch.mask.tolist() == [[True, True, True], [True, False, False]]
    assert [part.tolist() for part in batch.drawn()] == [[0, 0, 0, 1], [0, 1, 2, 2]]
    assert batch.states().tolist() == [[0, 1, 2, 3], [2, 3, 3, 3]]
    assert EPISODES.batch([2, 0], pad=0, device=torch.device("cpu")).ids.tolist() == [[9, 10, 15, 16], [5, 6, 7, 11]]


def test_groups_are_of_like_lengths_and_no_larger_than_asked() -> None:
    lengths = [3, 9, 4, 8, 4, 8]
    assert chunks(lengths, 4) == [[1, 3, 5, 2], [4, 0]]
    assert chunks(lengths, 4, [0, 1, 2]) == [[1, 2, 0]]
    assert chunks(lengths, 1) == [[1], [3], [5], [2], [4], [0]]


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(  # caps its logits after the output layer
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, final_logit_softcapping=0.5, sliding_window=4,
        ),
        GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=32),  # absolute positions
    ],
    ids=["gemma2", "gpt2"],
)  # fmt: skip
def test_log_probabilities_are_those_of_each_episode_alone(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    batch = EPISODES.batch([0, 1, 2], pad=0, device=torch.device("cpu"))
    with torch.no_grad():
        logits, _ = read(model, batch)
        found = Drawn.of(logits, batch, temperature=0.7, vocabulary=30).log_probs()
        assert logits.shape == (1, 6, 32)
        for row, (prompt, reply) in enumerate(zip(EPISODES.prompts, EPISODES.completions, strict=True)):
            alone = model(input_ids=torch.tensor([[*prompt, *reply]])).logits[0, :, :30] / 0.7
            expected = alone.log_softmax(-1)[torch.arange(len(prompt) - 1, len(prompt) + len(reply) - 1), reply]
            torch.testing.assert_close(found[row, : len(reply)], expected)
            assert found[row, len(reply) :].tolist() == [0.0] * (3 - len(reply))
