"""All that decides the memory of a stage, as numbers: what `source.py` finds out and `peak.py` adds up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from alignment.pipeline.memory.activations import FLOAT32
from alignment.pipeline.memory.sizes import Lora, ModelSize

BFLOAT16 = 2
GIB = 2**30
LOGITS_AT_ONCE = 2**26  # numbers of one model's logits that an evaluation holds at a time: 256 MiB in float32
# What a GPU process needs beside tensors: the CUDA context, cuBLAS and NCCL, and the allocator's cut-offs.
CONTEXT, CUT_OFFS = 1.0 * GIB, 0.03
# Bytes of optimizer state for a parameter, by the beginning of `train.optim`; the first that fits.
OPTIMIZERS = (
    ("adamw_torch_8bit", 2.0), ("adamw_8bit", 2.0), ("adamw_bnb_8bit", 2.0), ("paged_adamw_8bit", 2.0),
    ("adamw", 8.0), ("paged_adamw", 8.0), ("lion_8bit", 1.0), ("paged_lion_8bit", 1.0), ("lion", 4.0),
    ("paged_lion", 4.0), ("sgd", 0.0), ("adagrad", 4.0), ("rmsprop", 4.0),
)  # fmt: skip

Terms = dict[str, float]
Critic = Literal["model", "adapter", "head"]


@dataclass(frozen=True)
class Sharding:
    """A DeepSpeed file, as far as memory goes.

    Attributes:
        stage: of ZeRO; 0 without DeepSpeed.
        offload_states, offload_weights: they stand in host memory.
        bucket: elements of a bucket of gradients; None: hidden x hidden, which the Trainer fills in.
        live: weights that stage 3 may hold gathered at once.
        sub_group: elements of its share that stage 3 steps on at once.
    """

    stage: int = 0
    offload_states: bool = False
    offload_weights: bool = False
    bucket: int | None = None
    live: int = 1_000_000_000
    sub_group: int = 1_000_000_000


@dataclass(frozen=True)
class Frozen:
    """A model that only judges: a reward model, or the reference.

    `engine`: DeepSpeed holds it, in the engine's dtype, and shards it in stage 3.
    """

    name: str
    size: ModelSize
    scores: bool = False
    engine: bool = False


@dataclass(frozen=True)
class Situation:
    """All that decides the memory of a stage.

    Attributes:
        method: how it works: `loss` (one pass forward and backward), `online` (draws replies first), `ppo`, `generate`.
        size: of the model that is trained, or of the largest that generates.
        head: what stands on the trunk: `tiles` (TRL's output layer), `logits`, `score`.
        rows, length: sequences of a forward pass, and tokens of the longest.
        prompt: of these, tokens of the longest prompt (`online`, `ppo`, `generate`).
        drawn: replies that are drawn at once.
        episodes: replies of an update on this rank.
        compute, frozen: bytes of matrix products, and of a frozen weight.
        lora: the adapter, if one is trained; else all weights are.
        reference_adapter: the reference is a frozen copy of the adapter.
        critic: `model`, `adapter`, `head` on the policy, or None.
        judges: reference and reward models that are models of their own.
        bits, double: quantization of the frozen base.
        state: bytes of optimizer state for a parameter.
        foreach: the optimizer works on all tensors at once, with copies.
        step_rows: rows of an optimizer step on this rank; more than `rows`: gradients of several passes are summed.
        drawn_by_pass: passes for which replies are drawn at once, where the recipe says so.
        scores_pairs: rows hold two sequences (DPO, reward models).
        buckets: data parallel without DeepSpeed holds the gradients a second time.
    """

    method: Literal["loss", "online", "ppo", "generate"]
    size: ModelSize
    rows: int
    length: int
    compute: int
    head: Literal["tiles", "logits", "score"] = "tiles"
    frozen: int = FLOAT32
    prompt: int = 0
    drawn: int = 0
    episodes: int = 0
    lora: Lora | None = None
    reference_adapter: bool = False
    critic: Critic | None = None
    judges: tuple[Frozen, ...] = ()
    bits: int | None = None
    double: bool = True
    state: float = 8.0
    foreach: bool = False
    step_rows: int = 0
    drawn_by_pass: int | None = None
    scores_pairs: bool = False
    attention: str = "sdpa"
    dropout: bool = False
    checkpointing: bool = True
    ranks: int = 1
    sharding: Sharding = Sharding()
    cuda: bool = True

    @property
    def engine(self) -> bool:
        """Whether DeepSpeed holds the trained model."""
        return self.sharding.stage > 0

    @property
    def accumulates(self) -> bool:
        """Whether an optimizer step sums the gradients of several passes."""
        return self.step_rows > self.rows

    @property
    def sequences(self) -> int:
        """Sequences of a forward pass."""
        return self.rows * (2 if self.scores_pairs else 1)


@dataclass(frozen=True)
class Standing:
    """One model in memory: bytes on this rank."""

    name: str
    what: str
    dtype: str
    trained: bool
    parameters: int
    weights: float = 0.0
    gradients: float = 0.0
    states: float = 0.0
    host: float = 0.0


def optimizer_state(name: str) -> float | None:
    """Bytes of optimizer state for a parameter; None for an optimizer that is not known here."""
    return next((size for start, size in OPTIMIZERS if name.startswith(start)), None)
