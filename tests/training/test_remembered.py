"""What is written must be what was trained: names, shapes, and numbers."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from alignment.training.remembered import differences, remember


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.ModuleDict({"embed": nn.Embedding(8, 4), "middle": nn.Linear(4, 4), "score": nn.Linear(4, 1, bias=False)})
    made["middle"].requires_grad_(False)
    return made


def test_the_same_model_has_no_differences() -> None:
    trained = remember(model(), keep=True)
    assert list(differences(model(), trained, tolerance=0.0)) == []
    assert set(trained.sample) == {"embed.weight", "score.weight"}  # first and last: embeddings and heads


def test_a_shorter_embedding_is_named() -> None:
    read = model()
    read["embed"] = nn.Embedding(6, 4)
    assert list(differences(read, remember(model(), keep=True), tolerance=1e-4)) == [
        "embed.weight has the shape (6, 4), trained was (8, 4)"
    ]


def test_an_empty_tensor_as_zero_saves_it_is_named() -> None:
    read = model()
    read["score"].weight = nn.Parameter(torch.empty(0))
    (line,) = differences(read, remember(model(), keep=True), tolerance=1e-4)
    assert line == "score.weight has the shape (0,), trained was (1, 4)"


def test_a_missing_head_is_named() -> None:
    read = model()
    del read["score"]
    assert list(differences(read, remember(model(), keep=True), tolerance=1e-4)) == ["score.weight is missing"]


def test_other_numbers_are_named_and_rounding_is_not() -> None:
    trained, read = remember(model(), keep=True), model()
    read["score"].weight.data = read["score"].weight.data.bfloat16().float()
    assert list(differences(read, trained, tolerance=0.05)) == []
    read["score"].weight.data *= -1
    (line,) = differences(read, trained, tolerance=0.05)
    assert line == "score.weight differs by 2 of its largest number (allowed 0.05)"


def test_every_trained_tensor_is_compared_by_its_norm() -> None:
    """Also those between the sampled ones: an adapter has hundreds, and any of them can be lost."""
    layers = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(20))
    for layer in layers:
        nn.init.constant_(layer.weight, 2.0)
    trained = remember(layers, keep=True)
    assert "1.weight" not in trained.sample
    layers[1].weight.data.zero_()
    assert list(differences(layers, trained, tolerance=0.05)) == ["1.weight has the norm 0, in memory it has 2"]


def test_a_tensor_of_zeros_must_stay_zero() -> None:
    trained, read = remember(nn.Linear(2, 2), keep=True), nn.Linear(2, 2)
    trained.norms["bias"] = 0.0
    nn.init.ones_(read.bias)
    assert "bias has the norm 1.414, in memory it has 0" in differences(read, trained, tolerance=0.05)


def test_frozen_weights_in_another_form_are_left_out() -> None:
    trained, read = remember(model(), keep=True), model()
    read["middle"] = nn.Linear(2, 2)
    assert list(differences(read, trained, tolerance=0.0, frozen=False)) == []
    assert len(list(differences(read, trained, tolerance=0.0))) == 2


def test_a_rank_that_does_not_compare_keeps_nothing() -> None:
    nothing = remember(model(), keep=False)
    assert (nothing.norms, nothing.sample) == ({}, {})


def test_adapters_that_are_not_published_are_left_out(tiny_policy: Path) -> None:
    """References, critics and reward models stand on the same base, and are not in the file of the policy's adapter."""
    from peft import LoraConfig, get_peft_model

    from alignment.models.load import load_policy

    settings = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    torch.manual_seed(0)
    read = get_peft_model(load_policy(tiny_policy)[0], settings)
    torch.manual_seed(0)
    trained = get_peft_model(load_policy(tiny_policy)[0], settings)
    trained.add_adapter("reward-helpful", settings)
    remembered = remember(trained, keep=True)
    assert not any("reward-helpful" in name for name in remembered.shapes)
    assert any(".default." in name for name in remembered.sample)
    assert list(differences(read, remembered, tolerance=0.0)) == []
