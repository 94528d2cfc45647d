"""The moments of a training step at which most may be there, and what is there at each.

Backward, what is kept shrinks while the gradients grow, both steadily, so only the ends of the pass count. PPO and the
trainers that draw their own replies have moments before it: drawing, and judging what was drawn.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from alignment.pipeline.memory import activations
from alignment.pipeline.memory.activations import FLOAT32, Pass
from alignment.pipeline.memory.situation import BFLOAT16, LOGITS_AT_ONCE, Situation, Standing, Terms


def trained_pass(s: Situation) -> Pass:
    """The pass through the model that is trained."""
    stored = s.compute if s.engine else FLOAT32 if s.lora is None else s.frozen
    adapters = () if s.lora is None else (s.lora,) * (2 if s.critic == "adapter" else 1)
    return Pass(
        s.size, rows=s.sequences * max(1, len(adapters)), length=s.length, compute=s.compute,
        copies=max(1, len(adapters)), stored=stored, autocast=s.compute == BFLOAT16 and not s.engine,
        trained=s.lora is None, adapters=adapters, quantized=s.bits is not None, attention=s.attention,
        dropout=s.dropout, cuda=s.cuda, checkpointing=s.checkpointing, masked=s.method != "ppo",
    )  # fmt: skip


def moments(s: Situation, standing: Sequence[Standing]) -> Iterator[tuple[str, Terms]]:
    """What is there at each moment that may be the highest."""
    still: Terms = {"weights": sum(one.weights for one in standing), "optimizer": sum(one.states for one in standing)}
    if s.method == "generate":
        yield from ((name, still | terms) for name, terms in _drawing(s, autocast=False))
        if s.judges:
            yield "the KL to the baseline", still | _kl(s)
        return
    gradients = sum(one.gradients for one in standing)
    still |= _engine_buffers(s, standing, gradients)
    if s.method in ("ppo", "online"):
        autocast = s.cuda and s.compute == BFLOAT16 and not s.engine
        yield from ((name, still | terms) for name, terms in _drawing(s, autocast=autocast))
    if s.method == "ppo":
        still["rollout"] = s.episodes * (s.length - s.prompt) * 9 * FLOAT32  # the tensors of training/rollout.py
        yield from ((name, still | terms) for name, terms in _judging(s))
    before = gradients if s.accumulates else 0.0
    for name, terms in _passes(s, gradients, before):
        yield name, still | terms
    yield "the optimizer's step", still | {"gradients": gradients, "step": _step(s, standing)}


def _passes(s: Situation, gradients: float, before: float) -> Iterator[tuple[str, Terms]]:
    """The forward and backward pass of a micro-batch; `before`: the gradients of those before it."""
    p = trained_pass(s)
    trunks = 2 if s.critic == "model" else 1
    kept = trunks * (activations.kept_by_blocks(p) + activations.kept_behind_blocks(p))
    one = activations.kept_by_block(p)
    forward, backward, head_gradient = _head(s, p)
    copies = trunks * activations.cast_copies(p)
    if s.checkpointing:  # else the copies are part of what is kept
        terms = {"gradients": before, "activations": kept, "bfloat16 copies": copies, "logits": forward}
        yield "the end of the forward pass", terms
    if any(judge.name == "reference" for judge in s.judges) and s.method != "ppo":
        still_kept = {"gradients": before, "activations": kept}
        yield "the reference's pass", still_kept | {"passing": activations.forward_at_work(_frozen_pass(s, p))}
        yield "the reference's logits", still_kept | {"logits": forward}
    yield "the loss", {"gradients": before, "activations": kept, "logits": backward}
    again = one if s.checkpointing else 0.0
    working = activations.backward_of_block(p)
    yield "the backward pass of the last block", {
        "gradients": before + head_gradient, "activations": kept + again, "passing": working,
    }  # fmt: skip
    yield "the backward pass of the first block", {
        "gradients": gradients * (1 - _late(s)), "activations": one, "passing": working,
    }  # fmt: skip
    yield "the embedding's gradient", {"gradients": gradients + _gradient_temporary(s)}


def _late(s: Situation) -> float:
    """The share of the gradients that is not there yet when the first block begins: its own and the embedding's."""
    if s.lora is not None or s.accumulates:
        return 0.0
    own = s.size.scorer_parameters if s.head == "score" else s.size.parameters
    trained = own + (s.size.scorer_parameters if s.critic == "model" else 0)
    tied = s.size.tied and s.head != "score"
    return (s.size.layer_parameters + (0 if tied else s.size.embedding)) / trained


def _head(s: Situation, p: Pass) -> tuple[float, float, float]:
    """Bytes of the output layer at work forward and backward, and of its gradient afterwards."""
    if s.head == "score":
        return 0.0, 0.0, 0.0
    trains = s.lora is None or s.lora.whole > 0
    gradient = s.size.embedding * (p.compute if s.engine else FLOAT32) if trains and s.sharding.stage < 2 else 0.0
    if s.head == "tiles":
        forward, backward = activations.fused_head(p, trains_head=trains)
        return forward, backward, gradient
    # PPO (training/actor_critic.py, `read`): logits before drawn tokens only, their copy in float32 at the temperature,
    # and three more in the backward pass of logsumexp (difference, exponential, product).
    reply = s.rows * (s.length - s.prompt)
    raw = reply * s.size.vocab * s.compute
    kept = s.size.embedding * s.compute if p.autocast and p.stored != p.compute else 0  # the output layer's, cast
    forward = kept + raw + activations.whole_logits(p, reply, copies=1)
    return forward, kept + activations.whole_logits(p, reply, copies=4), gradient


def _frozen_pass(s: Situation, p: Pass) -> Pass:
    """The reference's pass over the same batch, in the dtype in which it stands."""
    engine = next(judge.engine for judge in s.judges if judge.name == "reference")
    stored = s.compute if engine else s.frozen
    autocast = s.compute == BFLOAT16 and not engine
    return replace(p, rows=p.rows // p.copies, copies=1, stored=stored, trained=False, adapters=(), autocast=autocast)


def _drawing(s: Situation, *, autocast: bool) -> Iterator[tuple[str, Terms]]:
    """Keys and values of every token so far; the pass over the prompts, and the logits of the next token."""
    stored = s.compute if s.method == "generate" or s.engine else FLOAT32 if s.lora is None else s.frozen
    compute = stored if not autocast else s.compute
    width = s.size.kv_heads * s.size.head_dim
    a_token = s.size.layers * width * (max(stored, compute) + compute)  # rotary positions keep keys in the wider dtype
    held: Terms = {}
    if autocast and s.lora is None:
        held["bfloat16 copies"] = (s.size.linear_weights + s.size.embedding) * s.compute
    if s.sharding.stage == 3:
        trunks = s.size.parameters + (s.size.scorer_parameters if s.critic == "model" else 0)
        held["gathered weights"] = trunks * s.compute
    p = Pass(s.size, s.drawn, s.prompt, compute, stored=stored, autocast=autocast, trained=False,
             attention=s.attention, cuda=s.cuda, quantized=s.bits is not None)  # fmt: skip
    prompts = {"key-value cache": s.drawn * s.prompt * a_token, "passing": activations.forward_at_work(p)}
    yield "reading the prompts", held | prompts
    cache = s.drawn * s.length * a_token * (1 + 1 / s.size.layers)  # a layer's is copied to grow by a token
    # Logits, their float32 copy, the same at the temperature, without suppressed ids, and their probabilities.
    logits = s.drawn * s.size.vocab * (compute + 4 * FLOAT32)
    yield "drawing replies", held | {"key-value cache": cache, "logits": logits}


def _kl(s: Situation) -> Terms:
    """Evaluation's KL (evaluation/metrics.py, `sequence_kl`): two logits, and five float32 tensors of their size."""
    reply = s.length - s.prompt
    rows = min(s.drawn, max(1, LOGITS_AT_ONCE // ((reply + 1) * s.size.vocab)))
    p = Pass(s.size, rows, s.length, s.compute, stored=s.compute, trained=False, attention=s.attention, cuda=s.cuda)
    logits = rows * (reply + 1) * s.size.vocab * (2 * s.compute + 5 * FLOAT32)
    return {"logits": logits, "passing": activations.forward_at_work(p)}


def _judging(s: Situation) -> Iterator[tuple[str, Terms]]:
    """PPO's passes without gradient over a part of the rollout: policy and critic, then the reference."""
    rows = min(s.drawn, s.episodes)
    p = trained_pass(s)
    p = replace(p, rows=rows * p.copies, checkpointing=False)
    reply = rows * (s.length - s.prompt)
    raw = reply * s.size.vocab * s.compute
    copies = activations.cast_copies(p) * (2 if s.critic == "model" else 1)
    passing = activations.forward_at_work(p)
    yield "judging the replies", {"passing": passing, "logits": raw, "bfloat16 copies": copies}
    # The logits, and four copies for the entropy: log-probabilities, their exponential, clamped ones, the product.
    hidden = p.tokens * p.size.hidden * p.stream
    five = activations.whole_logits(p, reply, copies=5)
    yield "the entropy of the replies", {"logits": five, "bfloat16 copies": copies, "passing": hidden}
    yield "judging by the reference", {
        "passing": activations.forward_at_work(_reference_of_ppo(s, p)),
        "logits": raw + activations.whole_logits(p, reply, copies=2),
    }  # fmt: skip


def _reference_of_ppo(s: Situation, p: Pass) -> Pass:
    if any(judge.name == "reference" for judge in s.judges):
        return _frozen_pass(s, p)
    return replace(p, rows=p.rows // p.copies, copies=1, trained=False)


def _engine_buffers(s: Situation, standing: Sequence[Standing], gradients: float) -> Terms:
    """What data parallelism holds beside the models."""
    if s.ranks > 1 and not s.engine:
        return {"communication": gradients}  # DDP copies gradients into buckets
    if not s.engine:
        return {}
    bucket = s.size.hidden**2 if s.sharding.bucket is None else s.sharding.bucket
    terms: Terms = {"communication": 2 * bucket * s.compute}  # one is filled while the other is sent (overlap_comm)
    if s.sharding.stage == 3:
        held = sum(one.parameters for one in standing if one.trained or one.name == "base")
        terms["gathered weights"] = min(held, s.sharding.live) * s.compute
    return terms


def _gradient_temporary(s: Situation) -> float:
    """A gradient that is computed beside the one it is added to: the embedding's, of tied weights or accumulating."""
    if s.lora is not None or s.sharding.stage >= 2:
        return 0.0
    tied = s.size.tied and s.head != "score"
    return s.size.embedding * float(s.compute if s.engine else FLOAT32) if tied or s.accumulates else 0.0


def _step(s: Situation, standing: Sequence[Standing]) -> float:
    """Copies of the step: the gradients of ZeRO's share, flat and in float32; all square roots at once with foreach."""
    trained = sum(one.parameters for one in standing if one.trained)
    if s.engine and s.sharding.offload_states:
        return 0.0
    if s.engine:
        share = trained / s.ranks
        at_once = min(share, s.sharding.sub_group) if s.sharding.stage == 3 else share
        return at_once * (s.compute + FLOAT32)
    return trained * float(FLOAT32) if s.foreach and s.cuda else 0.0
