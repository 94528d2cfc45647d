"""What a forward pass keeps for its backward pass, tensor by tensor, and what an operation needs while it works.

Autograd keeps the inputs that a backward formula reads. For a block that is, with N tokens in a batch (rows x length):

    norm        its input in float32, and, where its scale is trained, the normalised input
    linear      its input, where its matrix or an adapter on it is trained; under autocast each linear casts a copy of
                its own, and casts the matrix, which the gradient of its input reads
    attention   query, key, value, output, one float32 per head and token; with padded rows the mask (rows x S x S), and
                keys and values repeated for all heads; `eager` the probabilities, too (rows x heads x S x S)
    activation  its input; gated, both factors of the product

`benchmarks/memory.py` compares these terms with what torch's allocator counts. B is rows, S tokens of a row, V the
vocabulary, H the hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

from alignment.pipeline.memory.sizes import Linear, Lora, ModelSize

FLOAT32 = 4
# trl/kernels/chunked_logprob.py: the output layer works on tiles of tokens x vocabulary.
TILE_TOKENS, TILE_VOCABULARY = 4096, 32768
# Without Triton (on a CPU) it holds this many float32 copies of a tile, backward (`_backward_tile`: logits, scaled,
# log-probabilities, probabilities, gradient, target, difference) and forward (`_forward_tile`: logits, scaled, masked,
# exponentials), and a mask of one byte.
TILES_BACKWARD, TILES_FORWARD = 7, 4


@dataclass(frozen=True)
class Pass:
    """One model, and the batch that goes through it.

    Attributes:
        size: the model.
        rows, length: of the batch.
        copies: each row stands in it so many times, for several adapters.
        compute: bytes of what a matrix product gives.
        stored: bytes of a weight of the model (norms and embedding, where the matrices are quantized).
        autocast: matrix products cast their operands to `compute`; off where the weights have that dtype.
        trained: all weights are trained.
        adapters: those that are trained, each on its share of the rows.
        quantized: the matrices are packed, and unpacked one at a time.
        attention: `sdpa`, `eager` or a flash attention.
        dropout: dropout is not switched off.
        cuda: on a GPU.
        checkpointing: blocks keep their input only, and run again in the backward pass.
        masked: an attention mask goes with rows of different lengths; PPO's own passes have none.
    """

    size: ModelSize
    rows: int
    length: int
    compute: int
    copies: int = 1
    stored: int = FLOAT32
    autocast: bool = False
    trained: bool = True
    adapters: tuple[Lora, ...] = ()
    quantized: bool = False
    attention: str = "sdpa"
    dropout: bool = False
    cuda: bool = True
    checkpointing: bool = False
    masked: bool = True

    @property
    def tokens(self) -> int:
        """N."""
        return self.rows * self.length

    @property
    def stream(self) -> int:
        """Bytes of an element of the residual stream: it has the dtype of the embedding."""
        return self.stored

    @property
    def normed(self) -> int:
        """Bytes of an element that a norm gives: autocast runs LayerNorm in float32, RMS norms as they stand."""
        return FLOAT32 if self.size.norm == "layer" and self.autocast else self.stream

    @property
    def padded(self) -> bool:
        """Whether a mask is built: rows differ in length, as they do in all but a batch of one."""
        return self.masked and self.rows > self.copies and self.attention in ("sdpa", "eager")


def kept_by_block(p: Pass) -> float:
    """Bytes that one block keeps."""
    if not (p.trained or p.adapters):
        return 0.0
    per_token = _norms(p) + _inputs(p) + _attention(p) + _mlp(p) + _dropouts(p)
    mask = p.rows * p.length**2 * p.compute if p.padded else 0
    return p.tokens * per_token + mask + _cast_weights(p)


def kept_by_blocks(p: Pass) -> float:
    """Bytes that all blocks keep until the backward pass begins."""
    if not (p.trained or p.adapters):
        return 0.0
    if p.checkpointing:
        return p.size.layers * p.tokens * p.size.hidden * p.stream
    return p.size.layers * kept_by_block(p)


def kept_behind_blocks(p: Pass) -> float:
    """Bytes that the last norm keeps."""
    return p.tokens * _norm(p, p.size.hidden) if p.trained or p.adapters else 0.0


def backward_of_block(p: Pass) -> float:
    """Bytes at work in the backward pass of a block, beside what it kept: the gradients inside the MLP.

    The product of a gated MLP has three gradients around it and is itself freed before; the residual stream has one.
    With an adapter the gradient of its input comes in the matrices' dtype, beside the base's and two of the output's.
    """
    inner = (2 if p.size.gated else 1) * p.size.inner * p.compute
    hidden = p.size.hidden * p.stream
    if p.adapters and p.autocast:
        inner = max(inner, p.size.inner * (FLOAT32 + p.compute))
        hidden += 2 * p.size.hidden * p.compute
    return p.tokens * (inner + hidden) + _unpacked(p)


def forward_at_work(p: Pass) -> float:
    """Bytes at work in a pass that keeps nothing: the widest moment of one block, its MLP."""
    inner = (3 if p.size.gated else 2) * p.size.inner * p.compute
    stream = p.size.hidden * (2 * p.stream + p.compute)
    mask = p.rows * p.length**2 * (1 + p.compute) if p.padded else 0
    cast = p.size.largest_linear * p.compute if p.autocast and p.stored != p.compute else 0
    return p.tokens * (inner + stream) + mask + max(cast, _unpacked(p))


def cast_copies(p: Pass) -> int:
    """Bytes of the copies of trained matrices that autocast makes once and keeps until the forward pass is over."""
    if not (p.trained and p.autocast and p.stored != p.compute):
        return 0
    return p.size.linear_weights * p.compute


# --- the output layer -------------------------------------------------------------------------------------------------


def fused_head(p: Pass, *, trains_head: bool) -> tuple[float, float]:
    """Bytes at work in TRL's output layer, which never holds all logits: (forward, backward).

    The buffer for a tile is 32,768 wide even for a smaller vocabulary. Backward, the gradients of its input and of its
    matrix are summed in float32. Scored are all tokens here: how many of them a mask leaves out is not known before.
    """
    tokens, size = p.rows * (p.length - 1), p.size
    tile = min(tokens, TILE_TOKENS)
    buffer = tile * TILE_VOCABULARY * p.compute
    hidden = tokens * size.hidden * p.normed
    cast = min(TILE_VOCABULARY, size.vocab) * size.hidden * p.compute if p.autocast and p.stored != p.compute else 0
    piece = tile * min(size.vocab, TILE_VOCABULARY)
    forward = backward = float(buffer + hidden + cast)
    backward += tokens * size.hidden * FLOAT32 + (size.embedding * FLOAT32 if trains_head else 0)
    if not p.cuda:
        forward += TILES_FORWARD * piece * FLOAT32
        backward += piece * (TILES_BACKWARD * FLOAT32 + 1)
    return forward, backward


def whole_logits(p: Pass, tokens: int, *, copies: int) -> float:
    """Bytes of so many float32 copies of the logits of `tokens` positions."""
    return copies * tokens * p.size.vocab * FLOAT32


# --- the terms of a block ---------------------------------------------------------------------------------------------


def _norm(p: Pass, width: int) -> float:
    """What a norm keeps of one token."""
    if p.size.norm == "layer":
        return width * p.normed
    normalised = width * (FLOAT32 if p.size.family.startswith("gemma") else p.stream)
    return width * FLOAT32 + (normalised if p.trained else 0)


def _norms(p: Pass) -> float:
    size = p.size
    stream = size.streams * _norm(p, size.hidden)
    heads = _norm(p, (size.heads + size.kv_heads) * size.head_dim) if size.head_norms else 0
    return stream + heads


def _inputs(p: Pass) -> float:
    """Inputs of the linear layers, which those that read the same tensor may share."""
    total = 0.0
    groups: dict[str, list[Linear]] = {}
    for linear in p.size.linears:
        groups.setdefault(linear.reads, []).append(linear)
    for reads, linears in groups.items():
        dtype = p.normed if reads.endswith("norm") else p.compute
        there_anyway = reads == "attention"  # its output is kept by attention itself
        if p.trained:
            copies = len(linears) if p.autocast and dtype != p.compute else 0 if there_anyway else 1
            total += copies * linears[0].inputs * p.compute
        for adapter in p.adapters:
            total += _adapter_inputs(p, adapter, linears, dtype, there_anyway=there_anyway) / len(p.adapters)
    return total


def _adapter_inputs(p: Pass, adapter: Lora, linears: list[Linear], dtype: int, *, there_anyway: bool) -> float:
    """What the adapter on linear layers with one input keeps of a token: its input and what its matrix A gives.

    Its matrices are float32: a bfloat16 input is cast up to them, and by autocast down again, a copy for each. On a
    quantized base PEFT leaves the casting to autocast.
    """
    hit = [linear for linear in linears if linear in adapter.linears]
    if not hit:
        return 0.0
    width = hit[0].inputs
    lower = len(hit) * adapter.rank * p.compute
    if p.dropout and adapter.dropout > 0:
        return len(hit) * width * (p.compute + 1) + lower  # the mask takes a byte
    if p.autocast and not (p.quantized and dtype == p.compute):
        return len(hit) * width * p.compute + lower
    return (0 if there_anyway else width * dtype) + lower


def _attention(p: Pass) -> float:
    size = p.size
    wide, narrow = size.heads * size.head_dim, size.kv_heads * size.head_dim
    if p.attention == "eager":
        probabilities = FLOAT32 + (p.compute if p.compute != FLOAT32 else 0)
        return 4 * wide * p.compute + size.heads * p.length * probabilities
    repeated = wide if p.padded and p.attention == "sdpa" else narrow
    return (2 * wide + 2 * repeated) * p.compute + size.heads * FLOAT32


def _mlp(p: Pass) -> float:
    return (p.size.activation + (2 if p.size.gated else 0)) * p.size.inner * p.compute


def _dropouts(p: Pass) -> float:
    return p.size.dropouts * p.size.hidden if p.dropout else 0


def _cast_weights(p: Pass) -> float:
    """The cast copies of a block's matrices, kept by its linear layers."""
    if not p.autocast or p.quantized or p.stored == p.compute:
        return 0.0
    return sum(linear.weights for linear in p.size.linears) * p.compute


def _unpacked(p: Pass) -> float:
    """A quantized matrix is unpacked for the time of its product."""
    return p.size.largest_linear * p.compute if p.quantized else 0.0
