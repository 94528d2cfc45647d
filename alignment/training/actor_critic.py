"""Policy and critic in one module, so that one optimizer, one engine and one checkpoint hold both.

Three forms with one interface:

    ActorCritic    two models: a causal LM and a scorer whose head is read at every token
    SharedTrunk    one causal LM, and a value head on the hidden states that its output layer reads
    SharedBase     LoRA: all roles are adapters on one frozen base (`shared_base.py`)

`forward` with `batch=` gives what PPO needs of a `Batch`; without it, the policy's own output, so that a module of any
form can be probed like the model it publishes. Letters: B rows, S tokens, T completion tokens, n drawn tokens of all
rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from alignment.models.load import HEAD
from alignment.training.objectives import entropy, log_probabilities
from alignment.training.rollout import Batch
from alignment.training.trainers import without_tied

CRITIC = "critic"  # the folder of the critic beside a published policy
HEAD_FILE = "value_head.safetensors"
DROPOUTS = ("attention_dropout", "attn_dropout", "dropout")  # floats that attention modules read themselves


class Output(NamedTuple):
    """What one pass says of the tokens of each completion."""

    log_probs: Tensor  # (B, T) of each token under the sampling distribution, 0 where masked
    values: Tensor  # (B, T + 1) of the state before each token, and after the last; anything beyond
    entropy: Tensor | None = None  # (B, T) nats, 0 where masked


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """The values (n,) of the drawn tokens where the mask (B, T) is true, 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


def switch_off_dropout(module: nn.Module) -> None:
    """Set every dropout rate to 0: with dropout the ratio of the first pass is not 1.

    Modules stay in training mode, which gradient checkpointing needs.
    """
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.p = 0.0
        for name in DROPOUTS:
            if isinstance(getattr(part, name, None), float):
                setattr(part, name, 0.0)


class ActorCritic(nn.Module):
    """A policy and a critic that is a model of its own.

    Args:
        policy: a causal LM.
        critic: a sequence classifier with one output; its head is read at every token.
        vocabulary: ids that can be drawn; the logits beyond belong to padding of the embedding.
    """

    def __init__(self, policy: PreTrainedModel, critic: PreTrainedModel | None, *, vocabulary: int):
        super().__init__()
        self.policy, self.critic = policy, critic
        self.vocabulary = vocabulary
        self.checkpointing: dict[str, Any] = {}
        switch_off_dropout(self)

    @property
    def config(self) -> Any:
        """The policy's configuration: DeepSpeed and the Trainer read sizes from it."""
        return self.policy.config

    @property
    def has_reference(self) -> bool:
        """Whether the reference stands on the same weights, so that no model of its own is needed."""
        return False

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """What only the critic uses."""
        assert self.critic is not None
        return self.critic.parameters()

    @contextmanager
    def as_policy(self) -> Iterator[PreTrainedModel]:
        """The policy for drawing replies."""
        yield self.policy

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        device: torch.device = self.policy.device
        return device

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        batch: Batch | None = None,
        temperature: float = 1.0,
        with_entropy: bool = False,
        **options: Any,
    ) -> Any:
        """See the module: `Output` of a batch, or the policy's plain output."""
        if batch is None:
            return self.policy(input_ids=input_ids, attention_mask=attention_mask, **options)
        logits, hidden = self._run(batch)
        drawn = Drawn.of(logits, batch, temperature=temperature, vocabulary=self.vocabulary)
        return Output(
            log_probs=drawn.log_probs(),
            values=self._values(hidden.gather(1, batch.states()[..., None].expand(-1, -1, hidden.shape[-1]))),
            entropy=drawn.entropy() if with_entropy else None,
        )

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Logits (1, n, V) of the policy and hidden states (B, S, H) of the critic."""
        assert self.critic is not None
        logits, _ = read(self.policy, batch)
        trunk = getattr(self.critic, self.critic.base_model_prefix)
        return logits, trunk(input_ids=batch.ids, use_cache=False).last_hidden_state

    def _values(self, hidden: Tensor) -> Tensor:
        # In float32 whatever is autocast: near values would become ties in bfloat16.
        head = self._head()
        with torch.autocast(hidden.device.type, enabled=False):
            return head(hidden.to(head.weight.dtype)).squeeze(-1).float()

    def _head(self) -> nn.Linear:
        head: nn.Linear = getattr(self.critic, HEAD)
        return head

    # --- what the Trainer asks of a model ---------------------------------------------------------------------------

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return bool(self.policy.is_activation_checkpointing)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """In every trained model; the options are kept for when it is switched on again."""
        self.checkpointing = options
        for model in self._models():
            model.activation_checkpointing_enable(**options)

    # TRL switches it off around generation, and on again, by the names that Transformers deprecates.
    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: Any = None) -> None:
        """As it was before it was switched off."""
        self.activation_checkpointing_enable(**self.checkpointing)

    def gradient_checkpointing_disable(self) -> None:
        """In every trained model."""
        for model in self._models():
            model.activation_checkpointing_disable()

    def _models(self) -> Iterator[PreTrainedModel]:
        yield self.policy
        if self.critic is not None:
            yield self.critic

    # --- files ------------------------------------------------------------------------------------------------------

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the policy at the root of `folder` and the critic under `critic/`, from a whole state dict."""
        self.policy.save_pretrained(folder, state_dict=without_tied(self.policy, under("policy.", state)))
        assert self.critic is not None
        self.critic.save_pretrained(folder / CRITIC, state_dict=under("critic.", state))

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote, every tensor of it.

        Raises:
            RuntimeError: a tensor is missing.
        """
        _load_whole(self.policy, folder)
        assert self.critic is not None
        _load_whole(self.critic, folder / CRITIC)


class SharedTrunk(ActorCritic):
    """A policy whose last hidden states a linear value head reads: half the arithmetic, one set of weights.

    The head starts at zero.
    """

    def __init__(self, policy: PreTrainedModel, *, vocabulary: int):
        super().__init__(policy, None, vocabulary=vocabulary)
        size = policy.config.get_text_config().hidden_size
        self.value_head = nn.Linear(size, 1, bias=False, device=policy.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """The value head."""
        return self.value_head.parameters()

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return read(self.policy, batch)

    def _head(self) -> nn.Linear:
        return self.value_head

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the policy at the root of `folder` and the value head under `critic/`."""
        self.policy.save_pretrained(folder, state_dict=without_tied(self.policy, under("policy.", state)))
        save_head(folder, state["value_head.weight"])

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote."""
        _load_whole(self.policy, folder)
        load_head(folder, self.value_head)


@dataclass(frozen=True)
class Drawn:
    """The sampling distributions (n, V) that the tokens of a batch were drawn from."""

    logits: Tensor
    batch: Batch

    @classmethod
    def of(cls, logits: Tensor, batch: Batch, *, temperature: float, vocabulary: int) -> Drawn:
        """From a model's logits (1, n, V): divided by the temperature, and without the rows that only pad the
        embedding, which are never drawn."""
        return cls(logits[0, :, :vocabulary].float() / temperature, batch)

    def log_probs(self) -> Tensor:
        """Of each token (B, T)."""
        rows, columns = self.batch.drawn()
        return spread(log_probabilities(self.logits, self.batch.ids[rows, columns + 1]), self.batch.mask)

    def entropy(self) -> Tensor:
        """Of each distribution (B, T), nats."""
        return spread(entropy(self.logits), self.batch.mask)


def read(model: Any, batch: Batch, *, blocks: int = 1) -> tuple[Tensor, Tensor]:
    """Logits (1, n, V) before each drawn token, and all that the output layer was offered (blocks * B, S, H).

    The output layer is the widest of a model and most positions need no logits: it is given the states before drawn
    tokens and no other. The hidden states are those and not `last_hidden_state`, because some architectures scale or
    cap their logits in `forward`.

    Args:
        blocks: read the rows so many times, one block under the other; the output layer sees the first one only.
    """
    rows, columns = batch.drawn()
    seen: list[Tensor] = []

    def hook(layer: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(inputs[0])
        return (inputs[0][rows, columns][None], *inputs[1:])

    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        logits = model(input_ids=batch.ids.repeat(blocks, 1), use_cache=False).logits
    finally:
        handle.remove()
    return logits, seen[0]


def save_head(folder: Path, weight: Tensor) -> None:
    """Write a value head under `critic/`."""
    (folder / CRITIC).mkdir(parents=True, exist_ok=True)
    save_file({"weight": weight.detach().cpu().contiguous()}, folder / CRITIC / HEAD_FILE)


def load_head(folder: Path, head: nn.Linear) -> None:
    """Read back what `save_head` wrote."""
    head.load_state_dict(load_file(folder / CRITIC / HEAD_FILE))


def under(prefix: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The part of a state dict below a prefix, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _load_whole(model: PreTrainedModel, folder: Path) -> None:
    """Every tensor of a safetensors folder, and no other; a tied one stands in the file once."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    missing, unexpected = model.load_state_dict(found, strict=False)
    model.tie_weights()
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    lost = sorted(set(missing) - tied)
    if lost or unexpected:
        raise RuntimeError(f"{folder}: not the weights of this model: {(lost or unexpected)[0]}")
