"""Export: one whole model that computes what the adapter computed, or nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from alignment.data import templates
from alignment.errors import ChainError, ModelError
from alignment.models.load import load_policy, load_scorer
from alignment.pipeline import runs
from alignment.serving import export as module
from alignment.serving.export import export
from alignment.serving.kind import kind_of
from alignment.training.rewards import stored_scale

PROBE = torch.arange(1, 30)[None]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=PROBE).logits


@pytest.fixture
def adapter(tiny_policy: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that makes a stage folder with a random adapter."""

    def make(scorer: bool = False, **settings: Any) -> Path:
        load = load_scorer if scorer else load_policy
        model, tokenizer = load(tiny_policy, **({"fresh_head": True} if scorer else {}))
        config = LoraConfig(
            r=4, target_modules=settings.pop("target_modules", ["q_proj", "v_proj"]), init_lora_weights=False,
            task_type="SEQ_CLS" if scorer else "CAUSAL_LM", modules_to_save=["score"] if scorer else None, **settings,
        )  # fmt: skip
        torch.manual_seed(3)
        adapted = get_peft_model(model, config)
        if scorer:
            torch.nn.init.normal_(adapted.get_base_model().score.modules_to_save["default"].weight)
        folder = tmp_path / "stage"
        adapted.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def test_a_merged_adapter_computes_what_the_adapter_computed(
    adapter: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_policy: Path
) -> None:
    stage, out = adapter(), tmp_path / "out"
    assert export(stage, out) == out
    assert not (out / "adapter_config.json").exists()
    expected = logits(load_policy(stage)[0])
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    assert not isinstance(merged, PeftModel)
    assert torch.allclose(logits(merged), expected, atol=1e-4)
    assert not torch.allclose(logits(load_policy(tiny_policy)[0]), expected, atol=1e-2)  # the adapter does something
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("causal-lm, ")
    assert said[0].endswith(f"adapter merged into {tiny_policy}")
    assert said[1].startswith("read back: the same probe ids, logits within 0; answers end with <|im_end|>")
    assert len(said) == 2  # the command prints the folder after them


def test_template_and_stop_ids_are_the_trained_ones(adapter: Callable[..., Path], tmp_path: Path) -> None:
    out = export(adapter(), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert "<|im_start|>" in tokenizer.chat_template
    settings = json.loads((out / "generation_config.json").read_text())
    assert settings["eos_token_id"] == templates.stop_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in settings["eos_token_id"]
    assert settings["pad_token_id"] == tokenizer.pad_token_id


def test_a_bases_sampling_leftovers_are_not_exported(tiny_policy: Path, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(tiny_policy, stage)
    GenerationConfig(do_sample=True, temperature=0.1, eos_token_id=77).save_pretrained(stage)
    settings = json.loads((export(stage, tmp_path / "out") / "generation_config.json").read_text())
    assert "temperature" not in settings
    assert 77 not in settings["eos_token_id"]


def test_a_whole_model_is_exported_bit_by_bit(tiny_policy: Path, tmp_path: Path) -> None:
    out = export(tiny_policy, tmp_path / "deep" / "out")
    assert torch.equal(logits(load_policy(out)[0]), logits(load_policy(tiny_policy)[0]))


def test_a_reward_model_is_exported_with_its_head(adapter: Callable[..., Path], tmp_path: Path) -> None:
    stage = adapter(scorer=True)
    out = export(stage, tmp_path / "out")
    expected = logits(load_scorer(stage)[0])
    assert expected.abs().item() > 1e-3
    assert logits(load_scorer(out)[0]).item() == pytest.approx(expected.item(), abs=1e-5)
    assert kind_of(out) == "sequence-classification"


def test_the_scale_of_an_adapters_scores_is_exported(adapter: Callable[..., Path], tmp_path: Path) -> None:
    stage = adapter(scorer=True)
    digest = runs.digest({})
    described = {"stage": "reward", "kind": "reward", "fingerprint": {}, "fingerprint_sha256": digest, "files": {}}
    runs.write_manifest(stage, described | {"model": {"score_mean": 1.5, "score_std": 0.25}})
    assert stored_scale(stage, load_scorer(stage)[0]) == (1.5, 0.25)
    out = export(stage, tmp_path / "out")
    assert stored_scale(out, load_scorer(out)[0]) == (1.5, 0.25)


@pytest.mark.filterwarnings("ignore::UserWarning")  # PEFT warns of exactly this
def test_an_adapter_on_tied_embeddings_is_refused(adapter: Callable[..., Path], tmp_path: Path) -> None:
    """PEFT merges it into both ends of the tied matrix (transformers#45127): the merged model is another one."""
    stage = adapter(target_modules=["q_proj", "lm_head"])
    with pytest.raises(ModelError, match=r"merging the adapter changes its output by .* tied"):
        export(stage, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_nothing_is_overwritten(tiny_policy: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="out: exists already; nothing is overwritten") as caught:
        export(tiny_policy, out)
    assert caught.value.code == 2
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ModelError, match="exists already"):
        export(tiny_policy, tmp_path / "file")


def test_an_empty_folder_may_stand_there(tiny_policy: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (export(tiny_policy, tmp_path / "out") / "model.safetensors").is_file()


def test_a_model_that_reads_back_differently_is_not_published(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = module._save

    def damage(exported: Any, folder: Path) -> None:
        with torch.no_grad():
            exported.model.model.norm.weight.mul_(1.01)
        save(exported, folder)

    monkeypatch.setattr(module, "_save", damage)
    with pytest.raises(ModelError, match="reads back as another model, logits differ by"):
        export(tiny_policy, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_reads_back_differently_is_not_published(
    tiny_policy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = module._save

    def damage(exported: Any, folder: Path) -> None:
        save(exported, folder)
        (folder / "chat_template.jinja").unlink()

    monkeypatch.setattr(module, "_save", damage)
    with pytest.raises(ModelError, match="reads back with other ids for the same conversation"):
        export(tiny_policy, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_damaged_stage_is_refused(tiny_policy: Path, tmp_path: Path) -> None:
    stage = tmp_path / "stage"
    shutil.copytree(tiny_policy, stage)
    (stage / "manifest.json").write_text('{"schema": 1')
    with pytest.raises(ChainError, match="damaged"):
        export(stage, tmp_path / "out")


def test_a_quantized_base_is_refused(adapter: Callable[..., Path], tmp_path: Path, monkeypatch: Any) -> None:
    stage = adapter()
    load = module.load_policy

    def quantized(*args: Any, **options: Any) -> Any:
        model, tokenizer = load(*args, **options)
        model.config.quantization_config = {"load_in_4bit": True}
        return model, tokenizer

    monkeypatch.setattr(module, "load_policy", quantized)
    with pytest.raises(ModelError, match="stored quantized, and merging into those would lose the change"):
        export(stage, tmp_path / "out")


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ({}, "holds no model"),
        ({"config.json": {"architectures": ["BertForMaskedLM"]}}, r"neither a causal LM nor .* \(BertForMaskedLM\)"),
        ({"config.json": {}}, "no architecture named"),
        ({"config.json": []}, "a JSON object was expected"),
        ({"adapter_config.json": {"task_type": "TOKEN_CLS"}}, "an adapter for TOKEN_CLS"),
    ],
)
def test_a_folder_that_holds_another_kind_of_model_is_refused(files: dict[str, Any], line: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(ModelError, match=line):
        kind_of(tmp_path)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: no such folder"):
        export(tmp_path / "nowhere", tmp_path / "out")
