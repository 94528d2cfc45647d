"""The memory plan: parameters against the models that Transformers builds, bytes against numbers computed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from alignment.cli import main
from alignment.errors import ModelError
from alignment.pipeline.memory import activations, plan, sizes
from alignment.pipeline.memory.activations import Pass
from alignment.pipeline.memory.peak import Estimate, estimate
from alignment.pipeline.memory.situation import GIB, Sharding, Situation, optimizer_state
from alignment.pipeline.memory.source import Machine, NotKnownError, sharding, source
from alignment.recipe.load import load_recipe
from alignment.recipe.schema import Recipe

ROOT = Path(__file__).resolve().parents[2]
TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "vocab_size": 100,
}  # fmt: skip
OWN = {
    "gpt2": {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": 100},
    "qwen3": {"head_dim": 16}, "gemma": {"head_dim": 16}, "gemma2": {"head_dim": 16}, "gemma3_text": {"head_dim": 16},
}  # fmt: skip
# Published configurations and parameter counts (the model cards, and `sum(p.numel())` of the released weights).
LLAMA_2_7B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000, "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_2_70B = LLAMA_2_7B | {
    "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
    "num_key_value_heads": 8,
}  # fmt: skip
LLAMA_65B = LLAMA_2_70B | {"intermediate_size": 22016, "num_key_value_heads": 64, "max_position_embeddings": 2048}
MISTRAL_7B = LLAMA_2_7B | {"model_type": "mistral", "intermediate_size": 14336, "num_key_value_heads": 8}
LLAMA_31_8B = LLAMA_2_7B | {"intermediate_size": 14336, "num_key_value_heads": 8, "vocab_size": 128256}
QWEN3_8B = LLAMA_31_8B | {
    "model_type": "qwen3", "intermediate_size": 12288, "num_hidden_layers": 36, "vocab_size": 151936, "head_dim": 128
}  # fmt: skip


def config_of(family: str) -> dict[str, Any]:
    """A tiny configuration of a family, with the keys that it has."""
    own = OWN.get(family, {})
    if family == "gpt2":
        return own
    base = {key: value for key, value in TINY.items() if family != "gpt_neox" or key != "num_key_value_heads"}
    return base | own


def situation(config: dict[str, Any], **changes: Any) -> Situation:
    """SFT with all weights, one row of 128 tokens, on one GPU in float32."""
    given: dict[str, Any] = {"method": "loss", "rows": 1, "length": 128, "compute": 4} | changes
    return Situation(size=sizes.read(None, config), **given)


def states(found: Estimate) -> float:
    """Weights, gradients and optimizer states on a rank."""
    return sum(one.weights + one.gradients + one.states for one in found.standing)


# --- sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", sorted(sizes.FAMILIES))
def test_parameters_are_those_of_the_model_that_transformers_builds(family: str, tied: bool) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    config = config_of(family) | {"tie_word_embeddings": tied, "pad_token_id": 0}
    built = AutoConfig.for_model(family, **config)
    scorer = AutoConfig.for_model(family, **config, num_labels=1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(built)
        classifier = AutoModelForSequenceClassification.from_config(scorer)
    size = sizes.read(family, config)
    assert size == sizes.read(None, built.to_dict()), "the recipe's keys and the written config.json say the same"
    assert size.parameters == sum(p.numel() for p in model.parameters())
    assert size.scorer_parameters == sum(p.numel() for p in classifier.parameters())
    assert size.positions == 64


@pytest.mark.parametrize("family", sorted(sizes.FAMILIES))
def test_an_adapter_has_the_parameters_that_peft_gives_it(family: str) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    built = AutoConfig.for_model(family, **config_of(family), pad_token_id=0)
    with torch.device("meta"):
        model = get_peft_model(
            AutoModelForCausalLM.from_config(built), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    adapter = sizes.lora(sizes.read(family, config_of(family)), {"r": 4, "target_modules": "all-linear"})
    assert adapter.parameters == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (LLAMA_2_7B, 6_738_415_616),
        (LLAMA_2_70B, 68_976_648_192),
        (MISTRAL_7B, 7_241_732_096),
        (LLAMA_31_8B, 8_030_261_248),
        (QWEN3_8B, 8_190_735_360),
        ({"model_type": "gpt2"}, 124_439_808),  # the defaults of its class
    ],
)
def test_parameters_of_published_models(config: dict[str, Any], parameters: int) -> None:
    assert sizes.read(None, config).parameters == parameters


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"model_type": "mixtral"}, "the size of a mixtral model is not known here"),
        ({}, "the size of a nameless model is not known here"),
        (LLAMA_2_7B | {"quantization_config": {"bits": 4}}, "stored quantized"),
        (LLAMA_2_7B | {"hidden_size": 0}, "hidden_size of a llama model must be a whole number above 0, found 0"),
        (LLAMA_2_7B | {"hidden_size": "4096"}, "found '4096'"),
    ],
)
def test_what_is_not_known_is_refused(config: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said.replace("(", r"\(")):
        sizes.read(None, config)


@pytest.mark.parametrize(
    ("peft", "said"),
    [
        ({"target_modules": ["q_prok"]}, "q_prok is no linear layer of a llama model's blocks"),
        ({"target_modules": ".*proj"}, "peft.target_modules is chosen in a way"),
        ({}, "peft.target_modules is chosen in a way"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"q_proj": 4}}, "peft.rank_pattern is chosen in a way"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["norm"]}, "the size of norm is not known here"),
        ({"target_modules": ["q_proj"], "r": 0}, "peft.r must be a whole number above 0"),
    ],
)
def test_an_adapter_that_is_not_known_is_refused(peft: dict[str, Any], said: str) -> None:
    with pytest.raises(ModelError, match=said):
        sizes.lora(sizes.read("llama", TINY), peft)


def test_an_adapter_on_named_layers() -> None:
    adapter = sizes.lora(sizes.read("llama", TINY), {"target_modules": ["q_proj", "v_proj"], "r": 8})
    assert adapter.parameters == 3 * (8 * (32 + 32) + 8 * (32 + 16))
    kept = sizes.lora(sizes.read("llama", TINY), {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]})
    assert kept.whole == 100 * 32


def test_quantized_matrices_take_the_bits_of_the_qlora_paper() -> None:
    """Dettmers et al. 2023: double quantization brings the scales from 0.5 to 0.127 bits a parameter."""
    size = sizes.read(None, LLAMA_2_7B)
    assert sizes.packed_bytes(size, 4, double=False) * 8 / size.linear_weights == pytest.approx(4.5)
    assert sizes.packed_bytes(size, 4, double=True) * 8 / size.linear_weights == pytest.approx(4.127, abs=5e-4)
    rows = 32 * (4096 * 4 + 11008 * 2 + 4096)
    assert sizes.packed_bytes(size, 8, double=True) == size.linear_weights + 4 * rows


# --- what stands ------------------------------------------------------------------------------------------------------


def test_adamw_in_float32_takes_sixteen_bytes_a_parameter() -> None:
    found = estimate(situation(LLAMA_2_7B))
    (policy,) = found.standing
    assert (policy.weights, policy.gradients, policy.states) == tuple(6_738_415_616 * size for size in (4, 4, 8))


@pytest.mark.parametrize(
    ("stage", "gigabytes"), [(1, 31.4), (2, 16.6), (3, 1.9)], ids=["optimizer", "gradients", "weights"]
)
def test_zero_gives_the_figures_of_its_paper(stage: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5 B parameters on 64 GPUs; without ZeRO 120 GB (10^9 bytes)."""
    found = estimate(situation(LLAMA_2_7B, compute=2, ranks=64, sharding=Sharding(stage)))
    scaled = states(found) * 7.5e9 / 6_738_415_616
    assert scaled / 1e9 == pytest.approx(gigabytes, abs=0.05)
    alone = estimate(situation(LLAMA_2_7B, ranks=64))
    assert states(alone) * 7.5e9 / 6_738_415_616 / 1e9 == pytest.approx(120)


def test_zero3_divides_everything_by_the_ranks() -> None:
    one = estimate(situation(LLAMA_2_7B, compute=2, ranks=1, sharding=Sharding(3)))
    eight = estimate(situation(LLAMA_2_7B, compute=2, ranks=8, sharding=Sharding(3)))
    assert states(eight) == pytest.approx(states(one) / 8)


def test_zero3_steps_on_a_billion_parameters_at_once() -> None:
    moments = {
        stage: estimate(situation(LLAMA_2_70B, compute=2, ranks=8, sharding=Sharding(stage))).moments
        for stage in (2, 3)
    }
    assert moments[3]["the optimizer's step"]["step"] == 6e9
    assert moments[2]["the optimizer's step"]["step"] == 6 * 68_976_648_192 / 8


@pytest.mark.parametrize(
    ("offload", "device", "host"),
    [(Sharding(2, True), 2, 16), (Sharding(3, True), 2 / 8, 16), (Sharding(3, True, True), 0, 18)],
    ids=["zero2", "zero3", "zero3 with weights"],
)
def test_offload_moves_to_the_host_what_deepspeed_says(offload: Sharding, device: float, host: float) -> None:
    """deepspeed/runtime/zero/stage3.py and stage_1_and_2.py, `estimate_zero?_model_states_mem_needs`."""
    found = estimate(situation(LLAMA_2_7B, compute=2, ranks=8, sharding=offload))
    assert states(found) == pytest.approx(device * 6_738_415_616)
    assert found.host * 8 == pytest.approx(host * 6_738_415_616)


@pytest.mark.parametrize(
    ("name", "size"),
    [("adamw_torch_fused", 8), ("adamw_bnb_8bit", 2), ("paged_adamw_8bit", 2), ("paged_adamw_32bit", 8), ("sgd", 0),
     ("lion_8bit", 1), ("lion_32bit", 4), ("galore_adamw", None)],
)  # fmt: skip
def test_optimizer_states(name: str, size: float | None) -> None:
    assert optimizer_state(name) == size


def test_lora_trains_the_adapter_only() -> None:
    size = sizes.read(None, LLAMA_2_7B)
    adapter = sizes.lora(size, {"r": 16, "target_modules": "all-linear"})
    assert adapter.parameters == 39_976_960  # 32 x 16 x (4 x 8192 + 3 x 15104)
    base, trained = estimate(situation(LLAMA_2_7B, lora=adapter, frozen=2)).standing
    assert (base.weights, base.gradients, base.states) == (2 * 6_738_415_616, 0, 0)
    assert trained.weights + trained.gradients + trained.states == 16 * 39_976_960
    packed, _ = estimate(situation(LLAMA_2_7B, lora=adapter, frozen=2, bits=4)).standing
    rest = 6_738_415_616 - size.linear_weights
    assert packed.weights == sizes.packed_bytes(size, 4, double=True) + 2 * rest


def test_qlora_of_65b_fits_where_its_paper_trained_it() -> None:
    """Dettmers et al. 2023: from above 780 GB to below 48 GB; LoRA on all linear layers, rank 64."""
    size = sizes.read(None, LLAMA_65B)
    assert size.parameters == 65_285_660_672
    adapter = sizes.lora(size, {"r": 64, "target_modules": "all-linear"})
    found = estimate(
        situation(LLAMA_65B, compute=2, lora=adapter, frozen=2, bits=4, length=512, state=2.0, attention="sdpa")
    )
    assert 32 * GIB < found.peak < 48 * GIB


# --- activations ------------------------------------------------------------------------------------------------------


def test_a_block_keeps_what_the_formula_of_megatron_says() -> None:
    """Korthikanti et al. 2022 (arXiv:2205.05198), section 4.1: 34 s b h bytes a layer, without its attention matrices.

    A GPT in 16 bits with dropout. Ours keeps one float32 for each head and token besides: what flash attention needs.
    """
    gpt = {"model_type": "gpt2", "activation_function": "gelu", "n_embd": 1024, "n_head": 16}
    size = sizes.read(None, gpt)
    p = Pass(size, rows=1, length=256, compute=2, stored=2, dropout=True)
    assert activations.kept_by_block(p) == 256 * (34 * 1024 + 4 * 16)


def test_activations_of_a_llama_by_hand() -> None:
    size = sizes.read("llama", TINY)
    p = Pass(size, rows=1, length=10, compute=4)
    norms = 2 * 2 * 32  # each its input and the normalised input
    inputs = 32 + 32 + 64  # of query, key and value; of gate and up; of down; that of o is attention's output
    attention = 32 + 16 + 16 + 32 + 4  # query, key, value, output; one number a head
    mlp = 3 * 64  # the gate, its activation, and what it multiplies
    assert activations.kept_by_block(p) == 4 * 10 * (norms + inputs + attention + mlp)
    # Padded: a mask for each pair of positions, and keys and values repeated for all heads.
    two = replace(p, rows=2)
    assert activations.kept_by_block(two) == 2 * (activations.kept_by_block(p) + 4 * 10 * 2 * 16) + 4 * 2 * 100
    assert activations.kept_by_blocks(two) == 3 * activations.kept_by_block(two)
    # Checkpointing keeps the input of each block.
    assert activations.kept_by_blocks(replace(two, checkpointing=True)) == 3 * 2 * 10 * 32 * 4
    assert activations.kept_by_blocks(replace(two, trained=False)) == 0


def test_autocast_keeps_a_copy_for_each_linear_and_one_of_each_matrix() -> None:
    size = sizes.read("llama", TINY)
    p = Pass(size, rows=1, length=10, compute=2, autocast=True)
    norms = 4 * (2 * 2 * 32)
    inputs = 2 * (3 * 32 + 2 * 32 + 64)  # query, key and value have one each, gate and up, too; down reads bfloat16
    attention = 2 * (32 + 16 + 16 + 32) + 4 * 4
    mlp = 2 * 3 * 64
    matrices = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    assert activations.kept_by_block(p) == 10 * (norms + inputs + attention + mlp) + matrices


def test_the_output_layer_works_on_tiles_and_not_on_all_logits() -> None:
    size = sizes.read(None, LLAMA_31_8B)
    p = Pass(size, rows=8, length=4096, compute=2, stored=2)
    forward, backward = activations.fused_head(p, trains_head=True)
    scored = 8 * 4095
    assert forward == 4096 * 32768 * 2 + scored * 4096 * 2
    assert backward == forward + scored * 4096 * 4 + 128256 * 4096 * 4
    assert activations.fused_head(p, trains_head=False)[1] == forward + scored * 4096 * 4
    assert forward < activations.whole_logits(p, scored, copies=1) / 20


@pytest.mark.parametrize(
    "change", [{"rows": 32}, {"length": 2048}, {"checkpointing": False}, {"attention": "eager"}, {"compute": 4}]
)
def test_more_work_takes_more(change: dict[str, Any]) -> None:
    start = {"rows": 16, "length": 1024, "compute": 2}
    assert estimate(situation(MISTRAL_7B, **start | change)).peak > estimate(situation(MISTRAL_7B, **start)).peak


def test_accumulating_holds_the_gradients_through_the_next_pass() -> None:
    once, summed = (estimate(situation(LLAMA_2_7B, step_rows=rows)).moments["the loss"] for rows in (1, 8))
    assert summed["gradients"] == 4 * 6_738_415_616
    assert "gradients" not in once


# --- from a recipe ----------------------------------------------------------------------------------------------------


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data_folder: Path) -> Callable[..., Recipe]:
    """A function that loads a recipe whose model is a folder with this config.json and nothing else."""
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def load(stages: dict[str, dict[str, Any]], config: dict[str, Any] | None = None, **recipe: Any) -> Recipe:
        if config is not None:
            (tmp_path / "model").mkdir(exist_ok=True)
            (tmp_path / "model/config.json").write_text(json.dumps(config))
            recipe = {"model": str(tmp_path / "model")} | recipe
        rows = {"sft": "sft", "ppo": "prompts", "grpo": "prompts", "kto": "unpaired"}
        for stage in stages.values():
            if stage["algorithm"] != "evaluate":
                file = rows.get(stage["algorithm"], "preferences")
                stage["data"] = {"train": [{"path": str(data_folder / f"{file}.jsonl")}]}
        content = {"name": "x", "precision": {"compute": "bfloat16"}, **recipe, "stages": stages}
        (tmp_path / "x.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return load_recipe(tmp_path / "x.yaml")

    return load


def names(recipe: Recipe, stage: str, machine: Machine | None = None) -> dict[str, bool]:
    """The models that stand in memory, and whether each is trained."""
    found = source(recipe, stage, machine or Machine(1))
    return {one.name: one.trained for one in estimate(found.situation).standing}


def test_the_roles_of_each_algorithm(write: Callable[..., Recipe]) -> None:
    lora = {"r": 8, "target_modules": "all-linear"}
    on = {"batch": {"global": 8, "per_device": 8}}
    rewards = [{"name": "rm", "model": "stage:reward"}, {"name": "short", "length": 9}]
    recipe = write(
        {
            "sft": {"algorithm": "sft"},
            "adapter": {"algorithm": "sft", "peft": lora},
            "reward": {"algorithm": "reward"},
            "reward_lora": {"algorithm": "reward", "peft": lora},
            "dpo": {"algorithm": "dpo", "model": "stage:sft"},
            "dpo_new": {"algorithm": "dpo", "model": "stage:sft", "peft": lora},
            "dpo_on": {"algorithm": "dpo", "model": "stage:adapter"},
            "ppo": {"algorithm": "ppo", "model": "stage:sft", "rewards": rewards, **on},
            "ppo_lora": {"algorithm": "ppo", "peft": lora, "rewards": [{"name": "rm", "model": "stage:reward_lora"}]},
            "ppo_other": {"algorithm": "ppo", "model": "stage:sft", "peft": lora,
                          "rewards": [{"name": "rm", "model": "stage:reward_lora"}]},
            "ppo_merged": {"algorithm": "ppo", "model": "stage:adapter", "peft": lora,
                           "rewards": [{"name": "rm", "model": "stage:reward_lora"}]},
            "grpo": {"algorithm": "grpo", "model": "stage:sft", "rewards": rewards, "train": {"beta": 0.0}, **on},
            "evaluate": {"algorithm": "evaluate", "models": ["stage:sft", "stage:dpo"], "baseline": "stage:sft",
                         "prompts": [{"path": str(ROOT / "data/quickstart/eval.jsonl")}]},
        },
        LLAMA_2_7B,
    )  # fmt: skip
    assert names(recipe, "sft") == {"policy": True}
    assert names(recipe, "adapter") == {"base": False, "adapter": True}
    assert names(recipe, "reward") == {"reward model": True}
    assert names(recipe, "dpo") == {"policy": True, "reference": False}
    assert names(recipe, "dpo_new") == {"base": False, "adapter": True}
    assert names(recipe, "dpo_on") == {"base": False, "adapter": True, "reference": False}
    assert names(recipe, "ppo") == {"policy": True, "critic": True, "reference": False, "reward rm": False}
    # An adapter on the policy's own base costs nothing that counts; on another base it brings a model.
    assert names(recipe, "ppo_lora") == {"base": False, "adapter": True, "critic": True}
    assert names(recipe, "ppo_other") == {"base": False, "adapter": True, "critic": True, "reward rm": False}
    # An adapter that is not trained on is merged into the base, which is another one then.
    assert names(recipe, "ppo_merged") == {"base": False, "adapter": True, "critic": True, "reward rm": False}
    assert names(recipe, "grpo") == {"policy": True, "reward rm": False}
    assert names(recipe, "evaluate") == {"model": False, "baseline": False}


def test_the_reference_is_sharded_where_an_engine_holds_it(write: Callable[..., Recipe]) -> None:
    rewards = [{"name": "short", "length": 9}]
    recipe = write(
        {"dpo": {"algorithm": "dpo"}, "ppo": {"algorithm": "ppo", "rewards": rewards}},
        LLAMA_2_7B, launch={"processes": 8, "deepspeed": str(ROOT / "ds_configs/zero3.json")},
    )  # fmt: skip
    for stage in ("dpo", "ppo"):
        found = estimate(source(recipe, stage, Machine(8)).situation)
        reference = next(one for one in found.standing if one.name == "reference")
        assert reference.weights == 2 * 6_738_415_616 / 8


@pytest.mark.parametrize(
    ("file", "found"),
    [("zero1", Sharding(1)), ("zero2", Sharding(2)), ("zero3", Sharding(3)), ("zero2_offload", Sharding(2, True)),
     ("zero3_offload", Sharding(3, True, True))],
)  # fmt: skip
def test_the_shipped_deepspeed_files_are_read(file: str, found: Sharding) -> None:
    assert sharding(str(ROOT / f"ds_configs/{file}.json")) == found


def test_a_hub_name_is_not_known_until_its_config_is_in_the_cache(write: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = write({"sft": {"algorithm": "sft"}, "dpo": {"algorithm": "dpo", "model": "stage:sft"}}, model="org/big")
    with pytest.raises(NotKnownError, match=r"`hf download org/big config.json` fetches that file"):
        source(recipe, "dpo", Machine(1))
    # A finished parent's folder says it, too.
    (tmp_path / "run/sft").mkdir(parents=True)
    (tmp_path / "run/sft/config.json").write_text(json.dumps(MISTRAL_7B))
    parent = source(recipe, "dpo", Machine(1), run=tmp_path / "run").situation
    assert parent.size.parameters == 7_241_732_096
    snapshot = tmp_path / "hub/models--org--big/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs/main").write_text("abc")
    (snapshot / "config.json").write_text(json.dumps(LLAMA_31_8B))
    assert source(recipe, "dpo", Machine(1)).situation.size.parameters == 8_030_261_248


def test_an_adapter_folder_stands_on_its_base(write: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    keys = {"base_model_name_or_path": str(tmp_path / "model"), "r": 4, "target_modules": ["q_proj"]}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(keys))
    recipe = write({"dpo": {"algorithm": "dpo", "model": str(tmp_path / "adapter")}}, LLAMA_2_7B)
    found = source(recipe, "dpo", Machine(1)).situation
    assert found.lora is not None
    assert found.lora.parameters == 32 * 4 * 8192
    assert found.reference_adapter


def test_random_weights_have_the_rows_of_their_tokenizer() -> None:
    recipe = load_recipe(ROOT / "recipes/tiny/chain.yaml")
    assert source(recipe, "base", Machine(1)).situation.size.vocab % 64 == 0


def test_what_the_recipe_does_not_limit_is_said(write: Callable[..., Recipe]) -> None:
    stages = {"ppo": {"algorithm": "ppo", "rewards": [{"name": "short", "length": 9}], "train": {}}}
    found = source(write(stages, LLAMA_2_7B), "ppo", Machine(1))
    assert found.assumed == ("prompts of up to 512 tokens: nothing in the recipe limits them",)
    assert (found.situation.prompt, found.situation.length) == (512, 512 + 256)
    stages["ppo"]["train"] = {"prompt_length": 100, "optim": "galore_adamw"}
    found = source(write(stages, LLAMA_2_7B), "ppo", Machine(1))
    assert found.situation.length == 100 + 256
    assert found.assumed == ("the optimizer galore_adamw takes 8 bytes a parameter, as AdamW",)


# --- does it fit ------------------------------------------------------------------------------------------------------


def full(write: Callable[..., Recipe], config: dict[str, Any] = LLAMA_2_7B, **stage: Any) -> Recipe:
    batch = {"global": 128, "per_device": 8}
    return write({"sft": {"algorithm": "sft", "batch": batch, "train": {"max_length": 2048}} | stage}, config)


def test_the_largest_batch_and_the_longest_row_fit_and_one_more_does_not(write: Callable[..., Recipe]) -> None:
    far = LLAMA_2_7B | {"max_position_embeddings": 131_072}
    recipe = full(write, far, peft={"r": 16, "target_modules": "all-linear"}, precision={"weights": "bfloat16"})
    found = plan.assess(recipe, "sft", Machine(4), memory=40 * GIB)
    assert found.fits and found.found is not None and found.rows is not None and found.length is not None
    s = found.found.situation
    assert 32 % found.rows == 0
    assert estimate(plan.with_rows(s, found.rows)).peak <= 40 * GIB
    assert found.rows == 32 or estimate(plan.with_rows(s, found.rows * 2)).peak > 40 * GIB
    assert estimate(replace(s, length=found.length)).peak <= 40 * GIB
    assert estimate(replace(s, length=found.length + 1)).peak > 40 * GIB


def test_the_cheapest_change_comes_first_and_makes_it_fit(write: Callable[..., Recipe]) -> None:
    recipe = full(write)
    alone = plan.assess(recipe, "sft", Machine(1), memory=80 * GIB)  # 108 GB of weights, gradients and states
    assert alone.fits is False and alone.rows is None and alone.length is None
    assert [change.key.split(":")[0] for change in alone.changes] == ["peft"]
    eight = plan.assess(recipe, "sft", Machine(8), memory=80 * GIB)
    assert [change.key for change in eight.changes] == ["launch.deepspeed: ds_configs/zero2.json"]
    tight = plan.assess(recipe, "sft", Machine(8), memory=24 * GIB)
    assert tight.changes[0].key == "launch.deepspeed: ds_configs/zero3.json"
    assert tight.changes[1].key.startswith("batch.per_device: ")
    for found in (alone, eight, tight):
        assert found.memory is not None
        assert estimate(found.changes[-1].situation).peak <= found.memory
    # Nothing known here puts 70 B of weights on one small GPU.
    assert plan.assess(full(write, LLAMA_2_70B), "sft", Machine(1), memory=8 * GIB).changes == ()


def test_a_smaller_batch_is_taken_where_it_is_enough(write: Callable[..., Recipe]) -> None:
    recipe = full(write, peft={"r": 16, "target_modules": "all-linear"}, train={"max_length": 4096})
    need = plan.assess(recipe, "sft", Machine(1)).estimate
    assert need is not None
    found = plan.assess(recipe, "sft", Machine(1), memory=0.9 * need.peak)
    assert [change.key for change in found.changes] == ["batch.per_device: 4"]
    assert found.changes[0].cost == "more passes of fewer rows"


def test_kto_says_that_a_smaller_batch_changes_the_result(write: Callable[..., Recipe]) -> None:
    recipe = write({"kto": {"algorithm": "kto", "batch": {"global": 64, "per_device": 32},
                            "peft": {"r": 8, "target_modules": "all-linear"}}}, LLAMA_2_7B)  # fmt: skip
    need = plan.assess(recipe, "kto", Machine(1)).estimate
    assert need is not None
    changes = plan.assess(recipe, "kto", Machine(1), memory=0.9 * need.peak).changes
    assert "the result differs" in changes[0].cost


# --- the commands -----------------------------------------------------------------------------------------------------


def check(capsys: pytest.CaptureFixture[str], tmp_path: Path, *words: str) -> tuple[int, str, str]:
    code = main(["check", str(tmp_path / "x.yaml"), *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_check_says_what_stands_where(
    write: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full(write)
    code, out, err = check(capsys, tmp_path, "--gpus", "8", "--memory", "80")
    assert code == 2
    assert "sft (sft): 8 GPUs, data parallel, bfloat16, checkpointing, 8 rows of up to 2,048 tokens" in out
    assert "policy       trained, whole, 6.74 B parameters, float32: weights 25.1 GB, gradients 25.1 GB" in out
    assert "does not fit 80.0 GB" in out
    assert "launch.deepspeed: ds_configs/zero2.json would make it fit" in err
    wanted = f"launch.deepspeed={ROOT}/ds_configs/zero2.json"
    code, out, err = check(capsys, tmp_path, "--gpus", "8", "--memory", "80", "--set", wanted)
    assert (code, err) == (0, "")
    assert "8 GPUs, ZeRO-2" in out and "fits         80.0 GB; largest batch.per_device" in out


def test_check_prints_the_plan_as_json(
    write: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full(write)
    code, out, _ = check(capsys, tmp_path, "--gpus", "1", "--memory", "200", "--json")
    found = json.loads(out)["memory"]["sft"]
    assert code == 0
    assert found["fits"] is True
    assert found["models"][0]["optimizer"] == 8 * 6_738_415_616
    assert sum(found["terms"].values()) + found["reserve"] == pytest.approx(found["peak"], abs=10)


def test_a_model_that_is_not_here_is_no_failure(
    write: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write({"sft": {"algorithm": "sft"}}, model="org/big")
    code, out, _ = check(capsys, tmp_path, "--memory", "80")
    assert code == 0
    assert "sft: memory not known: org/big is not on this machine" in out


@pytest.mark.parametrize("words", [["--gpus", "0"], ["--memory", "-1"], ["--memory", "nan"], ["--gpus", "many"]])
def test_numbers_that_are_none_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["check", str(ROOT / "recipes/quickstart.yaml"), *words])
    assert left.value.code == 2
    assert "invalid number above 0 value" in capsys.readouterr().err


def test_a_dry_run_says_it_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert main(["run", "recipes/tiny/chain.yaml", "--runs", str(tmp_path), "--dry-run"]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("  memory")]
    assert len(told) == 6
    assert all("MB per " in line for line in told)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_plan_or_names_the_model_that_is_missing(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    recipe = load_recipe(path)
    for name in recipe.stages:
        found = plan.assess(recipe, name, Machine(8), memory=80 * GIB)
        assert found.fits or "is not on this machine" in (found.unknown or ""), f"{name}: {plan.lines(found)}"
