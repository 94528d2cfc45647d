"""How large a model is, from its `config.json` alone: parameters and the shapes that decide memory, without torch.

    size = read("llama", json.loads(Path("model/config.json").read_text()))
    size.parameters, size.layer_parameters, size.linears

A family that is not in `FAMILIES` is refused: a count that is nearly right would be believed. Keys that a configuration
leaves out have the default of the installed Transformers, read from its source. `tests/pipeline/test_memory.py`
compares every family with the model that Transformers builds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from alignment.errors import ModelError
from alignment.recipe.upstream import UNKNOWN, fields, model_config

Norm = Literal["rms", "layer"]
Reads = Literal["attention-norm", "attention", "mlp-norm", "inner"]


@dataclass(frozen=True)
class Linear:
    """One linear layer of a block; `reads` names the tensor that it is given, which several may share."""

    name: str
    inputs: int
    outputs: int
    reads: Reads
    bias: bool = False

    @property
    def weights(self) -> int:
        """Elements of its matrix."""
        return self.inputs * self.outputs

    @property
    def parameters(self) -> int:
        """With the bias."""
        return self.weights + (self.outputs if self.bias else 0)


@dataclass(frozen=True)
class ModelSize:
    """The shapes of a causal language model.

    Attributes:
        family: its `model_type`.
        hidden, layers, heads, kv_heads, head_dim, inner, vocab: as the configuration names them.
        positions: tokens that it can read.
        linears: those of one block.
        norms: norms of the residual stream in one block.
        streams: how many different tensors they read (two norms of one tensor keep it once).
        head_norms: query and key are normed, too.
        norm: its kind.
        gated: the block multiplies a gate with the inner activations.
        activation: inner-sized tensors that the activation function keeps for its backward pass.
        tied: the output layer is the embedding.
        head_bias: the output layer has a bias.
        learned_positions: rows of a position embedding; 0 with rotary positions.
        dropouts: dropouts on the residual stream of a block that are above 0.
    """

    family: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    vocab: int
    positions: int
    linears: tuple[Linear, ...]
    norms: int
    streams: int
    head_norms: bool = False
    norm: Norm = "rms"
    gated: bool = True
    activation: int = 1
    tied: bool = False
    head_bias: bool = False
    learned_positions: int = 0
    dropouts: int = 0

    @property
    def norm_parameters(self) -> int:
        """Of one unit of width: a scale, and with LayerNorm a shift."""
        return 1 if self.norm == "rms" else 2

    @property
    def linear_weights(self) -> int:
        """Elements of the matrices of all blocks: what quantization packs and autocast copies."""
        return self.layers * sum(linear.weights for linear in self.linears)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one block; norms over heads have one scale for all heads."""
        widths = self.norms * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        return sum(linear.parameters for linear in self.linears) + self.norm_parameters * widths

    @property
    def embedding(self) -> int:
        """Elements of the embedding, and of the output layer's matrix."""
        return self.vocab * self.hidden

    @property
    def trunk(self) -> int:
        """Everything but the output layer: what a scorer has, but for its head."""
        ends = self.embedding + self.learned_positions * self.hidden + self.norm_parameters * self.hidden
        return ends + self.layers * self.layer_parameters

    @property
    def parameters(self) -> int:
        """Of the language model; tied weights count once."""
        head = (0 if self.tied else self.embedding) + (self.vocab if self.head_bias else 0)
        return self.trunk + head

    @property
    def scorer_parameters(self) -> int:
        """Of the sequence classifier with one output that stands on the same trunk."""
        return self.trunk + self.hidden

    @property
    def largest_linear(self) -> int:
        """Elements of the largest matrix of a block."""
        return max(linear.weights for linear in self.linears)


class _Config:
    """A configuration with the defaults of its class behind it."""

    def __init__(self, model_type: str, given: Mapping[str, Any]):
        config = model_config(model_type)
        known = fields(config) if config is not None else {}
        self.model_type, self.given = model_type, given
        self.defaults = {name: field.default for name, field in known.items()}

    def get(self, key: str) -> Any:
        """The value, the class's default, or None."""
        value = self.given.get(key, self.defaults.get(key))
        return None if value is UNKNOWN else value

    def count(self, key: str) -> int:
        """A whole number above 0. Raises ModelError for anything else."""
        value = self.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{key} of a {self.model_type} model must be a whole number above 0, found {value!r}")
        return value

    def count_or(self, key: str, otherwise: int) -> int:
        """As `count`; `otherwise` where the key is missing or null."""
        return otherwise if self.get(key) is None else self.count(key)

    def above_zero(self, *keys: str) -> int:
        """How many of these rates are above 0."""
        return sum(bool(self.get(key)) for key in keys)


def read(model_type: str | None, config: Mapping[str, Any], *, vocab: int | None = None) -> ModelSize:
    """The size of the causal language model that a configuration describes.

    Args:
        model_type: its architecture; `config` may name it, too.
        vocab: embedding rows, where they do not follow from the configuration (random weights).

    Raises:
        ModelError: a family that is not known here, weights in a format that is not, or a value that is no size.
    """
    family = model_type or config.get("model_type")
    if not isinstance(family, str) or family not in FAMILIES:
        raise ModelError(
            f"the size of a {family or 'nameless'} model is not known here (known: {', '.join(sorted(FAMILIES))})"
        )
    if config.get("quantization_config"):
        raise ModelError("its weights are stored quantized, which is not known here; name the unquantized model")
    settings = dict(config) if vocab is None else {**config, "vocab_size": vocab}
    return FAMILIES[family](_Config(family, settings))


# --- the families -----------------------------------------------------------------------------------------------------


def _llama_like(
    config: _Config, *, qkv_bias: bool = False, out_bias: bool = False, head_norms: bool = False,
    norms: int = 2, mlp_bias: bool = False,
) -> ModelSize:  # fmt: skip
    """Rotary attention with shared key and value heads, a gated MLP, RMS norms."""
    hidden, heads = config.count("hidden_size"), config.count("num_attention_heads")
    kv_heads = config.count_or("num_key_value_heads", heads)
    head_dim = config.count_or("head_dim", hidden // heads)
    inner, wide, narrow = config.count("intermediate_size"), heads * head_dim, kv_heads * head_dim
    linears = (
        Linear("q_proj", hidden, wide, "attention-norm", qkv_bias),
        Linear("k_proj", hidden, narrow, "attention-norm", qkv_bias),
        Linear("v_proj", hidden, narrow, "attention-norm", qkv_bias),
        Linear("o_proj", wide, hidden, "attention", out_bias),
        Linear("gate_proj", hidden, inner, "mlp-norm", mlp_bias),
        Linear("up_proj", hidden, inner, "mlp-norm", mlp_bias),
        Linear("down_proj", inner, hidden, "inner", mlp_bias),
    )
    return ModelSize(
        family=config.model_type, hidden=hidden, layers=config.count("num_hidden_layers"), heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, inner=inner, vocab=config.count("vocab_size"),
        positions=config.count("max_position_embeddings"), linears=linears, norms=norms, streams=norms,
        head_norms=head_norms, tied=bool(config.get("tie_word_embeddings")),
    )  # fmt: skip


def _llama(config: _Config) -> ModelSize:
    bias = bool(config.get("attention_bias"))
    return _llama_like(config, qkv_bias=bias, out_bias=bias, mlp_bias=bool(config.get("mlp_bias")))


def _mistral(config: _Config) -> ModelSize:
    return _llama_like(config)


def _qwen2(config: _Config) -> ModelSize:
    return _llama_like(config, qkv_bias=True)


def _qwen3(config: _Config) -> ModelSize:
    bias = bool(config.get("attention_bias"))
    return _llama_like(config, qkv_bias=bias, out_bias=bias, head_norms=True)


def _gemma(config: _Config) -> ModelSize:
    bias = bool(config.get("attention_bias"))
    return _llama_like(config, qkv_bias=bias, out_bias=bias)


def _gemma2(config: _Config) -> ModelSize:
    bias = bool(config.get("attention_bias"))
    return _llama_like(config, qkv_bias=bias, out_bias=bias, norms=4)


def _gemma3(config: _Config) -> ModelSize:
    bias = bool(config.get("attention_bias"))
    return _llama_like(config, qkv_bias=bias, out_bias=bias, norms=4, head_norms=True)


def _phi3(config: _Config) -> ModelSize:
    """As Llama, with one matrix for query, key and value and one for gate and up."""
    size = _llama_like(config)
    wide, narrow = size.heads * size.head_dim, size.kv_heads * size.head_dim
    linears = (
        Linear("qkv_proj", size.hidden, wide + 2 * narrow, "attention-norm"),
        Linear("o_proj", wide, size.hidden, "attention"),
        Linear("gate_up_proj", size.hidden, 2 * size.inner, "mlp-norm"),
        Linear("down_proj", size.inner, size.hidden, "inner"),
    )
    return _changed(size, linears=linears, dropouts=config.above_zero("resid_pdrop") * 2)


def _phi(config: _Config) -> ModelSize:
    """Attention and MLP beside each other behind one LayerNorm, a bias everywhere."""
    size = _llama_like(config, qkv_bias=True)
    hidden, inner, wide = size.hidden, size.inner, size.heads * size.head_dim
    linears = (
        *size.linears[:3],
        Linear("dense", wide, hidden, "attention", bias=True),
        Linear("fc1", hidden, inner, "attention-norm", bias=True),
        Linear("fc2", inner, hidden, "inner", bias=True),
    )
    if config.get("qk_layernorm"):
        raise ModelError("a phi model with qk_layernorm is not known here")
    return _changed(
        size, linears=linears, norms=1, streams=1, norm="layer", gated=False, head_bias=True,
        activation=_kept(config.get("hidden_act")), dropouts=config.above_zero("resid_pdrop") * 2,
    )  # fmt: skip


def _gpt_neox(config: _Config) -> ModelSize:
    hidden, heads, inner = (config.count(key) for key in ("hidden_size", "num_attention_heads", "intermediate_size"))
    bias = bool(config.get("attention_bias"))
    linears = (
        Linear("query_key_value", hidden, 3 * hidden, "attention-norm", bias),
        Linear("dense", hidden, hidden, "attention", bias),
        Linear("dense_h_to_4h", hidden, inner, "mlp-norm", bias=True),
        Linear("dense_4h_to_h", inner, hidden, "inner", bias=True),
    )
    return ModelSize(
        family=config.model_type, hidden=hidden, layers=config.count("num_hidden_layers"), heads=heads, kv_heads=heads,
        head_dim=hidden // heads, inner=inner, vocab=config.count("vocab_size"),
        positions=config.count("max_position_embeddings"), linears=linears, norms=2,
        streams=1 if config.get("use_parallel_residual") else 2, norm="layer", gated=False,
        activation=_kept(config.get("hidden_act")), tied=bool(config.get("tie_word_embeddings")),
        dropouts=config.above_zero("hidden_dropout") * 2,
    )  # fmt: skip


def _gpt2(config: _Config) -> ModelSize:
    hidden, heads = config.count("n_embd"), config.count("n_head")
    inner = config.count_or("n_inner", 4 * hidden)
    linears = (
        Linear("c_attn", hidden, 3 * hidden, "attention-norm", bias=True),
        Linear("attn.c_proj", hidden, hidden, "attention", bias=True),
        Linear("c_fc", hidden, inner, "mlp-norm", bias=True),
        Linear("mlp.c_proj", inner, hidden, "inner", bias=True),
    )
    return ModelSize(
        family=config.model_type, hidden=hidden, layers=config.count("n_layer"), heads=heads, kv_heads=heads,
        head_dim=hidden // heads, inner=inner, vocab=config.count("vocab_size"), positions=config.count("n_positions"),
        linears=linears, norms=2, streams=2, norm="layer", gated=False,
        activation=_kept(config.get("activation_function")), tied=bool(config.get("tie_word_embeddings")),
        learned_positions=config.count("n_positions"), dropouts=config.above_zero("resid_pdrop") * 2,
    )  # fmt: skip


def _kept(activation: Any) -> int:
    """Inner-sized tensors that an activation keeps: its input, and `gelu_new`, written out in Python, three more."""
    return 4 if activation == "gelu_new" else 1


def _changed(size: ModelSize, **changes: Any) -> ModelSize:
    return ModelSize(**{**size.__dict__, **changes})


FAMILIES: dict[str, Callable[[_Config], ModelSize]] = {
    "llama": _llama, "mistral": _mistral, "qwen2": _qwen2, "qwen3": _qwen3, "smollm3": _llama, "gemma": _gemma,
    "gemma2": _gemma2, "gemma3_text": _gemma3, "phi": _phi, "phi3": _phi3, "gpt_neox": _gpt_neox, "gpt2": _gpt2,
}  # fmt: skip


# --- adapters ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Lora:
    """What an adapter adds to a model.

    Attributes:
        rank, dropout: its own.
        linears: the linear layers of a block that it changes.
        whole: elements of modules that are trained in full beside it (`modules_to_save`).
    """

    rank: int
    linears: tuple[Linear, ...]
    dropout: float = 0.0
    whole: int = 0
    layers: int = 1

    @property
    def parameters(self) -> int:
        """Of the matrices A and B; without `whole`."""
        return self.layers * sum(self.rank * (linear.inputs + linear.outputs) for linear in self.linears)


def lora(size: ModelSize, peft: Mapping[str, Any]) -> Lora:
    """The adapter that a stage's `peft:` puts on a model.

    Raises:
        ModelError: targets that are chosen in a way that only the model itself tells.
    """
    unknown = [key for key in ("layers_to_transform", "rank_pattern", "layers_pattern", "target_parameters",
                               "exclude_modules", "use_dora") if peft.get(key)]  # fmt: skip
    targets = peft.get("target_modules")
    if unknown or not (targets == "all-linear" or isinstance(targets, list | tuple | set)):
        key = unknown[0] if unknown else "target_modules"
        raise ModelError(f"peft.{key} is chosen in a way whose size is not known here; a list of names, or all-linear")
    rank = peft.get("r", 8)
    if not isinstance(rank, int) or rank < 1:
        raise ModelError(f"peft.r must be a whole number above 0, found {rank!r}")
    names = [linear.name for linear in size.linears] if targets == "all-linear" else list(targets or ())
    hit = tuple(linear for linear in size.linears if any(_matches(linear.name, str(name)) for name in names))
    strange = [name for name in names if not any(_matches(linear.name, str(name)) for linear in size.linears)]
    if strange:
        raise ModelError(f"peft.target_modules: {strange[0]} is no linear layer of a {size.family} model's blocks")
    kept = [name for name in peft.get("modules_to_save") or () if name != "score"]
    other = [name for name in kept if name not in ("embed_tokens", "lm_head", "wte", "embed_in")]
    if other:
        raise ModelError(f"peft.modules_to_save: the size of {other[0]} is not known here")
    dropout = peft.get("lora_dropout") or 0.0
    return Lora(rank, hit, float(dropout), len(kept) * size.embedding, size.layers)


def _matches(module: str, target: str) -> bool:
    """PEFT compares the end of the dotted name."""
    return module == target or module.endswith(f".{target}")


def packed_bytes(size: ModelSize, bits: int, *, double: bool) -> int:
    """Bytes of the matrices of all blocks quantized by bitsandbytes, scales included.

    4 bits: half a byte, and a float32 scale for 64 elements; `double` packs the scales into a byte each, with a float32
    scale for 256 of them (Dettmers et al. 2023, arXiv:2305.14314, section 3). 8 bits: a byte, and a float32 scale for
    each row.
    """
    if bits == 8:
        rows = size.layers * sum(linear.outputs for linear in size.linears)
        return size.linear_weights + 4 * rows
    scale = (1 + 4 / 256) / 64 if double else 4 / 64
    return math.ceil(size.linear_weights * (0.5 + scale))
