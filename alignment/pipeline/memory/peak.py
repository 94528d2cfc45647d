"""The peak of one stage on one rank: what stands in memory, what the batch adds, and the moment at which most is there.

    estimate(Situation(...)).peak          bytes on the device
    estimate(Situation(...)).host          bytes of host memory per rank (offload)

Bytes of a trained parameter: 4 weight + 4 gradient + 8 AdamW in float32; under ZeRO with bfloat16 2 + 2 + 12 (a float32
master and AdamW's two moments), of which stage 1 divides the 12 among the ranks, stage 2 the gradient too, stage 3 the
weight as well (Rajbhandari et al. 2020, arXiv:1910.02054, section 3); for its step ZeRO holds its share of the gradient
flat and in float32 besides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from alignment.pipeline.memory.activations import FLOAT32
from alignment.pipeline.memory.moments import moments
from alignment.pipeline.memory.situation import CONTEXT, CUT_OFFS, Frozen, Situation, Standing, Terms
from alignment.pipeline.memory.sizes import packed_bytes


@dataclass(frozen=True)
class Estimate:
    """What a stage needs on one rank."""

    standing: tuple[Standing, ...]
    moments: Mapping[str, Terms]
    host: float
    reserve: float

    @property
    def moment(self) -> str:
        """When most is there."""
        return max(self.moments, key=lambda name: sum(self.moments[name].values()))

    @property
    def terms(self) -> Terms:
        """What is there at that moment."""
        return {name: value for name, value in self.moments[self.moment].items() if value}

    @property
    def allocated(self) -> float:
        """Bytes of tensors at the peak."""
        return sum(self.terms.values())

    @property
    def peak(self) -> float:
        """With what a GPU needs beside tensors."""
        return self.allocated + self.reserve


def estimate(s: Situation) -> Estimate:
    """The peak of a stage and what makes it up."""
    standing = tuple(_standing(s))
    found = {name: {term: value for term, value in terms.items() if value} for name, terms in moments(s, standing)}
    highest = max(sum(terms.values()) for terms in found.values())
    reserve = CONTEXT + CUT_OFFS * highest if s.cuda else 0.0
    return Estimate(standing, found, sum(one.host for one in standing), reserve)


# --- what stands ------------------------------------------------------------------------------------------------------


def _standing(s: Situation) -> Iterator[Standing]:
    """Every model, with its share on this rank."""
    if s.method == "generate":
        yield Standing("model", "whole", _dtype(s.compute), False, s.size.parameters, s.size.parameters * s.compute)
    elif s.lora is None:
        trained = s.size.scorer_parameters if s.head == "score" else s.size.parameters
        yield _trained(s, "policy" if s.head != "score" else "reward model", "whole", trained)
    else:
        base = s.size.trunk if s.head == "score" else s.size.parameters
        yield _base(s, base)
        own = s.lora.parameters + s.lora.whole + (s.size.hidden if s.head == "score" else 0)
        yield _trained(s, "adapter", f"LoRA, rank {s.lora.rank}", own)
        if s.reference_adapter:
            yield Standing("reference", "frozen copy of the adapter", "float32", False, s.lora.parameters,
                           s.lora.parameters * FLOAT32)  # fmt: skip
    if s.critic == "model":
        yield _trained(s, "critic", "whole", s.size.scorer_parameters)
    elif s.critic == "adapter" and s.lora is not None:
        yield _trained(s, "critic", "LoRA and a head", s.lora.parameters + s.size.hidden)
    elif s.critic == "head":
        yield _trained(s, "critic", "head on the policy", s.size.hidden)
    for judge in s.judges:
        yield _judge(s, judge)


def _trained(s: Situation, name: str, what: str, parameters: int) -> Standing:
    """Trained weights with gradients and optimizer states, as ZeRO divides them. Without ZeRO they are float32."""
    z, count = s.sharding, parameters
    dtype = s.compute if s.engine else FLOAT32
    weights = gradients = count * float(dtype)
    states = count * s.state + (count * FLOAT32 if s.engine else 0)  # ZeRO steps on a float32 copy
    states /= s.ranks if s.engine else 1
    gradients /= s.ranks if z.stage >= 2 else 1
    weights /= s.ranks if z.stage == 3 else 1
    host = 0.0
    if z.offload_states:
        # The float32 gradient of the share is made where the step is.
        host, states, gradients = states + count * FLOAT32 / s.ranks, 0.0, 0.0 if z.stage >= 2 else gradients
    if z.offload_weights:
        host, weights = host + weights, 0.0
    return Standing(name, what, _dtype(dtype), True, count, weights, gradients, states, host)


def _base(s: Situation, parameters: int) -> Standing:
    """The frozen base under an adapter."""
    if s.bits is not None:
        rest = parameters - s.size.linear_weights
        packed = packed_bytes(s.size, s.bits, double=s.double)
        return Standing("base", "whole", f"{s.bits} bits", False, parameters, packed + rest * s.frozen)
    held = s.compute if s.engine else s.frozen
    share = s.ranks if s.sharding.stage == 3 else 1
    weights, host = parameters * held / share, 0.0
    if s.sharding.offload_weights:
        weights, host = 0.0, weights
    return Standing("base", "whole", _dtype(held), False, parameters, weights, host=host)


def _judge(s: Situation, judge: Frozen) -> Standing:
    parameters = judge.size.scorer_parameters if judge.scores else judge.size.parameters
    held = s.compute if judge.engine else s.frozen
    share = s.ranks if judge.engine and s.sharding.stage == 3 else 1
    weights, host = parameters * held / share, 0.0
    if judge.engine and s.sharding.offload_weights:
        weights, host = 0.0, weights
    return Standing(judge.name, "whole", _dtype(held), False, parameters, weights, host=host)


def _dtype(size: int) -> str:
    return "float32" if size == FLOAT32 else "bfloat16"
