"""Models from disk or hub: a policy (causal LM) or a scorer (sequence classification), full or adapter.

Weights come from safetensors only, and every tensor the architecture asks for must be in the file: Transformers fills
a missing one with random numbers and says so in a warning nobody reads. The one exception is the head of a scorer
that is about to be trained, which starts at zero.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from alignment.errors import ModelError
from alignment.models.tokenizer import load_tokenizer, own_code
from alignment.pipeline import folders
from alignment.pipeline.launch import cpu_has_amx
from alignment.recipe.schema import Quantization

ADAPTER_CONFIG = "adapter_config.json"
ROWS_MULTIPLE = 64  # embedding rows: matrix products on GPUs like multiples of 64
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
HEAD = "score"
LOADED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]  # of a hub model; no pickles, no code


def compute_dtype(choice: Literal["auto", "bfloat16", "float32"]) -> torch.dtype:
    """The autocast dtype: `auto` is bfloat16 where this device multiplies it faster, else float32.

    On CPUs only AMX counts: AVX-512 BF16 doubles large matrix products, and autocast's casts eat that on small models
    (`benchmarks/precision.py`).
    """
    if choice != "auto":
        return DTYPES[choice]
    if torch.cuda.is_available():
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if cpu_has_amx() else torch.float32


def is_adapter(path: str | Path) -> bool:
    """Does this folder hold an adapter rather than a whole model?"""
    return (Path(path) / ADAPTER_CONFIG).is_file()


def adapter_base(path: str | Path) -> str:
    """The folder or hub name of the model that an adapter folder stands on.

    Raises:
        ModelError: the adapter names no base.
    """
    base = folders.read_object(Path(path) / ADAPTER_CONFIG).get("base_model_name_or_path")
    if not base:
        raise ModelError(f"{path}/{ADAPTER_CONFIG}: base_model_name_or_path is missing")
    if is_adapter(str(base)):
        raise ModelError(f"{path}: its base {base} is itself an adapter that was not merged; merge that first")
    return str(base)


def snapshot(name: str, commit: str) -> Path:
    """The folder of a hub model at one commit: from the cache, else fetched, without weights that are pickles.

    Raises:
        ModelError: the hub cannot be reached, or has no such model or commit.
    """
    try:
        return Path(snapshot_download(name, revision=commit, allow_patterns=LOADED))
    except (OSError, ValueError) as error:
        raise ModelError(f"{name}@{commit}: cannot be had from the hub ({_one_line(error)})") from error


def base_revision(path: str | Path) -> str | None:
    """The commit of a hub model that an adapter folder stands on, where it is known."""
    found = folders.read_object(Path(path) / ADAPTER_CONFIG).get("revision")
    return str(found) if found else None


def load_config(path: str, revision: str | None = None) -> PretrainedConfig:
    """The text configuration of a model folder or hub name.

    Raises:
        ModelError: there is none.
    """
    try:
        config = AutoConfig.from_pretrained(path, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(own_code(path, error) or f"{path}: no usable config.json ({_one_line(error)})") from error
    return config.get_text_config()


def init_policy(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase, *, attention: str) -> PreTrainedModel:
    """A causal LM with random float32 weights, drawn from torch's current seed.

    The embedding has one row per id of the tokenizer, rounded up to a multiple of 64.

    Raises:
        ModelError: the configuration does not describe a model.
    """
    settings = dict(config)
    model_type = settings.pop("model_type", None)
    if model_type is None:
        raise ModelError("model.init.config: model_type is missing (for instance llama)")
    rows = -(-len(tokenizer) // ROWS_MULTIPLE) * ROWS_MULTIPLE
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    try:
        built = AutoConfig.for_model(model_type, **{**ids, **settings, "vocab_size": rows})
        return AutoModelForCausalLM.from_config(built, attn_implementation=attention, dtype=torch.float32)
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise ModelError(f"model.init.config: {_one_line(error)}") from error


def load_policy(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    quantization: Quantization | None = None,
    compute: torch.dtype = torch.bfloat16,
    trainable: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A causal LM with its tokenizer, in eval mode; an adapter folder gives a `PeftModel` on its base.

    Args:
        compute: what quantized weights are multiplied in.
        trainable: the adapter will be trained on (a full model always can be).

    Raises:
        ModelError: no weights, a missing tensor, another kind of model, an unknown architecture.
    """
    _require_sound(path)
    tokenizer = load_tokenizer(path, revision)
    if is_adapter(path):
        base = _load(
            adapter_base(path), base_revision(path), AutoModelForCausalLM, dtype, attention, quantization, compute,
            fresh_head=False,
        )  # fmt: skip
        return _attach(base, path, tokenizer, trainable=trainable), tokenizer
    model = _load(path, revision, AutoModelForCausalLM, dtype, attention, quantization, compute, fresh_head=False)
    return model.eval(), tokenizer


def load_scorer(
    path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    attention: str = "sdpa",
    quantization: Quantization | None = None,
    compute: torch.dtype = torch.bfloat16,
    fresh_head: bool = False,
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """A sequence classifier with one output and its tokenizer, in eval mode.

    Args:
        compute: what quantized weights are multiplied in.
        fresh_head: `path` is a causal LM that is about to become a reward model: the head starts at zero.

    Raises:
        ModelError: as `load_policy`; also a model with other than one output.
    """
    _require_sound(path)
    tokenizer = load_tokenizer(path, revision)
    kind = AutoModelForSequenceClassification
    if is_adapter(path):
        base = _load(
            adapter_base(path), base_revision(path), kind, dtype, attention, quantization, compute, fresh_head=True
        )
        model: PreTrainedModel | PeftModel = _attach(base, path, tokenizer, trainable=False)
    else:
        model = _load(path, revision, kind, dtype, attention, quantization, compute, fresh_head=fresh_head)
    if model.config.num_labels != 1:
        raise ModelError(f"{path}: a reward model has one output, this one has {model.config.num_labels}")
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return model.eval(), tokenizer


def _require_sound(path: str | Path) -> None:
    """Look at a local folder before anything of it is loaded; a hub name is left to the hub's own checks."""
    if Path(path).is_dir():
        folders.require_sound(Path(path))


def resize_embeddings(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Give every id of the tokenizer an embedding row, rounded up to a multiple of 64; did anything change?"""
    rows = model.get_input_embeddings().weight.shape[0] if not is_deepspeed_zero3_enabled() else _rows(model)
    if len(tokenizer) <= rows:
        return False
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=ROWS_MULTIPLE)
    return True


def _rows(model: PreTrainedModel) -> int:
    """Embedding rows when the weights are sharded and the local tensor is empty."""
    return int(model.config.get_text_config().vocab_size)


def _load(
    path: str | Path,
    revision: str | None,
    kind: Any,
    dtype: torch.dtype,
    attention: str,
    quantization: Quantization | None,
    compute: torch.dtype,
    *,
    fresh_head: bool,
) -> PreTrainedModel:
    """`from_pretrained`, with the checks that it leaves out."""
    _require_sound(path)  # the base of an adapter comes here first
    options: dict[str, Any] = {
        "revision": revision, "dtype": dtype, "attn_implementation": attention, "trust_remote_code": False,
        "use_safetensors": True,
    }  # fmt: skip
    if kind is AutoModelForSequenceClassification:
        options["num_labels"] = 1 if fresh_head else None
        options = {key: value for key, value in options.items() if value is not None}
    if quantization is not None:
        options["quantization_config"] = bitsandbytes_config(quantization, compute)
    try:
        model, info = kind.from_pretrained(str(path), output_loading_info=True, **options)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            own_code(path, error) or f"{path}: cannot be loaded as a model ({_one_line(error)})"
        ) from error
    missing = sorted(set(info["missing_keys"]) - ({f"{HEAD}.weight"} if fresh_head else set()))
    if missing:
        raise ModelError(f"{path}: {len(missing)} tensors are missing from its weights, the first is {missing[0]}")
    if fresh_head and f"{HEAD}.weight" in info["missing_keys"]:
        _zero_head(model)
    if quantization is not None:
        _never_repack(model)
    return model


def _never_repack(model: PreTrainedModel) -> None:
    """Keep 4-bit weights as they were quantized.

    On a CPU with AVX512-BF16, bitsandbytes (`Linear4bit.forward`, since bitsandbytes#1804) repacks them in the first
    pass without gradients and multiplies them in bfloat16, whatever `compute` says: its log-probabilities are other
    ones than those of a training pass. Saving packs them back with rounded scales, and under ZeRO-3 fails. This can go
    when upstream lets it be switched off.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def bitsandbytes_config(quantization: Quantization, compute: torch.dtype) -> BitsAndBytesConfig:
    """The bitsandbytes settings of a recipe's `model.quantization`."""
    if quantization.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=compute,
    )


def _zero_head(model: PreTrainedModel) -> None:
    """Start the score head at zero: the first Bradley-Terry loss is then exactly ln 2."""
    head = getattr(model, HEAD, None)
    if head is None:
        raise ModelError(f"{type(model).__name__} has no `{HEAD}` head; such a model cannot become a reward model here")
    if is_deepspeed_zero3_enabled():
        import deepspeed

        with deepspeed.zero.GatheredParameters([head.weight], modifier_rank=0):
            torch.nn.init.zeros_(head.weight)
    else:
        torch.nn.init.zeros_(head.weight)


def _attach(
    base: PreTrainedModel, path: str | Path, tokenizer: PreTrainedTokenizerBase, *, trainable: bool
) -> PeftModel:
    """Put the adapter in `path` on its base; every tensor of the adapter's file must arrive."""
    resize_embeddings(base, tokenizer)
    try:
        model = PeftModel.from_pretrained(base, str(path), is_trainable=trainable)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"{path}: its adapter does not fit its base ({_one_line(error)})") from error
    with safe_open(Path(path) / "adapter_model.safetensors", framework="pt") as file:
        stored = set(file.keys())
    here = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    absent = sorted(here - stored)
    if not stored or absent:
        raise ModelError(f"{path}: adapter tensors are missing from its file, the first is {(absent or ['all'])[0]}")
    return model.eval()


def _one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:300] if text else type(error).__name__
