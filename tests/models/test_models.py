"""Loading what is there, refusing what is not, and adapters that merge to what they computed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from alignment.data import templates
from alignment.errors import ModelError, RecipeError
from alignment.models import load
from alignment.models.adapters import lora_config, merge
from alignment.models.load import compute_dtype, init_policy, load_policy, load_scorer, resize_embeddings
from alignment.models.tokenizer import fit, load_tokenizer, train_tokenizer
from alignment.recipe.schema import Quantization
from alignment.training.context import Context

TINY = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
}  # fmt: skip
TEXTS = ["the cat sat on the mat", "a dog ran in the sun", "what is the capital of France? Paris."] * 5


def tokenizer_of(*special: str) -> Any:
    return train_tokenizer(TEXTS, 300, special)


# --- tokenizers ---------------------------------------------------------------------------------------------------


def test_a_trained_tokenizer_is_deterministic_and_round_trips() -> None:
    one, two = tokenizer_of("<|im_start|>"), tokenizer_of("<|im_start|>")
    assert templates.digest(one) == templates.digest(two)
    text = "the cat — naïve 猫 <|im_start|>"
    assert one.decode(one(text)["input_ids"]) == text
    assert len(one("<|im_start|>")["input_ids"]) == 1
    assert (one.eos_token, one.pad_token) == ("<|endoftext|>", "<|pad|>")


def test_fit_makes_the_stop_token_eos_only_where_conversations_are_trained() -> None:
    base, chat = tokenizer_of(), tokenizer_of()
    assert fit(base, "chatml", conversational=False) == ["<|im_start|>", "<|im_end|>"]
    assert base.eos_token == "<|endoftext|>"
    fit(chat, "chatml", conversational=True)
    assert chat.eos_token == "<|im_end|>"
    assert fit(chat, "chatml", conversational=True) == []  # added once
    assert chat("<|im_end|>")["input_ids"] == [chat.eos_token_id]


@pytest.mark.parametrize("reserved", [True, False])
def test_pad_is_never_eos(reserved: bool) -> None:
    tokenizer = tokenizer_of()
    tokenizer.pad_token = tokenizer.eos_token = "<|endoftext|>"
    if not reserved:
        tokenizer.eos_token = tokenizer.pad_token = "<|pad|>"
    fit(tokenizer, "plain", conversational=True)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.pad_token == ("<|pad|>" if reserved else "<|endoftext|>")


def test_a_conversational_stage_without_a_template_is_refused() -> None:
    with pytest.raises(ModelError, match="no chat template: set `chat_template:`"):
        fit(tokenizer_of(), None, conversational=True)


# --- loading ------------------------------------------------------------------------------------------------------


def test_random_weights_follow_the_seed_and_rows_are_padded() -> None:
    tokenizer = tokenizer_of()
    torch.manual_seed(1)
    one = init_policy(TINY, tokenizer, attention="sdpa")
    torch.manual_seed(1)
    two = init_policy(TINY, tokenizer, attention="sdpa")
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.get_input_embeddings().weight.shape[0] == -(-len(tokenizer) // 64) * 64
    assert one.dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "message"),
    [({"hidden_size": 32}, "model_type is missing"), ({"model_type": "lama"}, "model.init.config: .*lama")],
)
def test_a_configuration_that_is_no_model_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        init_policy(config, tokenizer_of(), attention="sdpa")


@pytest.mark.parametrize("fault", ["no weights", "no tokenizer", "truncated", "missing tensor", "no folder"])
def test_a_broken_model_folder_is_one_clear_line(fault: str, tiny_policy: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    if fault != "no folder":
        shutil.copytree(tiny_policy, folder)
    weights = folder / "model.safetensors"
    if fault == "no weights":
        weights.unlink()
    elif fault == "no tokenizer":
        for path in folder.glob("tokenizer*"):
            path.unlink()
    elif fault == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif fault == "missing tensor":
        tensors = load_file(weights)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ModelError) as error:
        load_policy(folder)
    text = str(error.value)
    assert text.startswith(f"{folder}: ")
    assert "\n" not in text
    if fault == "missing tensor":
        assert (
            text == f"{folder}: 1 tensors are missing from its weights, the first is model.layers.1.mlp.up_proj.weight"
        )


def test_a_pickle_of_weights_is_not_opened(tiny_policy: Path, tmp_path: Path) -> None:
    folder, canary = tmp_path / "model", tmp_path / "canary"
    shutil.copytree(tiny_policy, folder)
    (folder / "model.safetensors").unlink()

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (canary,))

    torch.save(Payload(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError):
        load_policy(folder)
    assert not canary.exists()


def test_a_fresh_head_is_zero_and_a_missing_one_is_refused(tiny_policy: Path) -> None:
    model, tokenizer = load_scorer(tiny_policy, fresh_head=True)
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.tolist() == [[0.0]]
    with pytest.raises(ModelError, match=r"tensors are missing .* score.weight"):
        load_scorer(tiny_policy)


def test_embeddings_grow_and_never_shrink(tiny_policy: Path) -> None:
    model, tokenizer = load_policy(tiny_policy)
    rows = model.get_input_embeddings().weight.shape[0]
    assert resize_embeddings(model, tokenizer) is False
    tokenizer.add_tokens([f"<extra_{index}>" for index in range(rows)])
    before = model.get_input_embeddings().weight[:rows].clone()
    assert resize_embeddings(model, tokenizer) is True
    after = model.get_input_embeddings().weight
    assert after.shape[0] >= len(tokenizer)
    assert after.shape[0] % 64 == 0
    assert torch.equal(after[:rows], before)


def test_auto_precision_follows_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(load, "cpu_has_amx", lambda: True)
    assert compute_dtype("auto") == torch.bfloat16
    monkeypatch.setattr(load, "cpu_has_amx", lambda: False)
    assert compute_dtype("auto") == torch.float32
    assert compute_dtype("bfloat16") == torch.bfloat16


# --- adapters -----------------------------------------------------------------------------------------------------


def adapted(policy: Path, **settings: Any) -> Any:
    model, _ = load_policy(policy)
    torch.manual_seed(3)
    return get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **settings))


def test_an_adapter_merges_to_what_it_computed(tiny_policy: Path) -> None:
    model = adapted(tiny_policy, target_modules="all-linear").eval()
    ids = torch.arange(12)[None]
    before = model(input_ids=ids).logits
    merged = merge(model)
    assert torch.allclose(merged(input_ids=ids).logits, before, atol=1e-4)
    assert "lora" not in " ".join(merged.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_a_merge_that_changes_the_output_is_refused(tiny_policy: Path) -> None:
    model = adapted(tiny_policy, target_modules=["lm_head", "q_proj"]).eval()  # embeddings are tied here
    with pytest.raises(ModelError, match="merging the adapter changes its output by"):
        merge(model)


def test_an_adapter_with_a_missing_tensor_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    model = adapted(tiny_policy, target_modules=["q_proj"])
    model.save_pretrained(tmp_path)
    load_tokenizer(tiny_policy).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_policy)
    again, _ = load_policy(tmp_path)
    ids = torch.arange(12)[None]
    assert torch.allclose(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits, atol=1e-6)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    gone = sorted(tensors)[0]
    del tensors[gone]
    save_file(tensors, tmp_path / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match="adapter tensors are missing"):
        load_policy(tmp_path)


def test_peft_settings_of_a_scorer_and_of_added_tokens() -> None:
    assert lora_config({"r": 4}, scorer=True, added_tokens=(), tied=True).modules_to_save == ["score"]
    with pytest.raises(RecipeError, match=r"modules_to_save: \[embed_tokens, lm_head\]"):
        lora_config({"r": 4, "modules_to_save": ["embed_tokens"]}, scorer=False, added_tokens=("<x>",), tied=False)
    tied = lora_config({"r": 4, "modules_to_save": ["embed_tokens"]}, scorer=False, added_tokens=("<x>",), tied=True)
    assert tied.ensure_weight_tying
    with pytest.raises(RecipeError, match="peft: "):
        lora_config({"r": 4, "no_such_key": 1}, scorer=False, added_tokens=(), tied=True)


# --- the hub --------------------------------------------------------------------------------------------------------


def test_a_hub_model_at_a_commit_is_that_commit(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache stands in for it: two commits, of which the newer one is `main`."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshots = tmp_path / "models--org--tiny" / "snapshots"
    for commit in ("a" * 40, "b" * 40):
        shutil.copytree(tiny_policy, snapshots / commit)
    (tmp_path / "models--org--tiny" / "refs").mkdir()
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("b" * 40)
    assert load.snapshot("org/tiny", "a" * 40) == snapshots / ("a" * 40)
    spec = SimpleNamespace(parents={"sft": tmp_path / "sft"})
    context = Context(spec=spec, say=print, compute=torch.float32)  # type: ignore[arg-type]
    assert context.path_of(f"org/tiny@{'a' * 40}") == snapshots / ("a" * 40)
    assert context.path_of("org/tiny") == Path("org/tiny")
    assert context.path_of("stage:sft") == tmp_path / "sft"
    with pytest.raises(
        ModelError, match=f"^org/tiny@{'c' * 40}: cannot be had from the hub .Cannot find an appropriate"
    ):
        load.snapshot("org/tiny", "c" * 40)


# --- quantized weights ------------------------------------------------------------------------------------------------


def a_pass_between(folder: Path) -> tuple[float, list[str]]:
    """How far a pass without gradients is from one in training; the tensors that passing and saving changed."""
    model, tokenizer = load_policy(folder, quantization=Quantization(), compute=torch.float32)
    ids = torch.tensor([tokenizer("the cat sat on the mat")["input_ids"]])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        drawn = model(ids).logits
    after = model.state_dict()
    changed = [name for name, value in before.items() if not torch.equal(value, after[name])]
    trained = model.train()(inputs_embeds=model.get_input_embeddings()(ids).detach().requires_grad_()).logits
    return float((drawn - trained.detach()).abs().max()), changed


def test_quantized_weights_stay_as_they_were_quantized(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    torch.manual_seed(0)
    tokenizer = tokenizer_of()
    config = TINY | {"hidden_size": 64, "intermediate_size": 128}  # bitsandbytes repacks by 32 rows and 64 columns
    init_policy(config, tokenizer, attention="sdpa").save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    distance, changed = a_pass_between(tmp_path)
    assert changed == []
    assert distance < 1e-6

    # What is held off is there, and under this name.
    assert hasattr(modules.Linear4bit(64, 64), "support_avx512bf16_for_cpu")
    if modules.has_avx512bf16():
        monkeypatch.setattr(load, "_never_repack", lambda model: None)
        distance, changed = a_pass_between(tmp_path)
        assert changed
        assert distance > 1e-4
