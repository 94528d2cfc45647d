"""LoRA PPO: one frozen base for policy, critic, reference and reward models, each an adapter on it or the base itself.

Switching goes through `models/roles.py`. A reward model whose adapter stands on the same weights as the policy's costs
its adapter and its head only.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from peft import LoraConfig, set_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from alignment.errors import ModelError
from alignment.models.load import HEAD
from alignment.models.roles import POLICY, Roles
from alignment.training.actor_critic import (
    CRITIC,
    ActorCritic,
    Drawn,
    load_head,
    read,
    save_head,
    switch_off_dropout,
    under,
)
from alignment.training.rollout import Batch

ADAPTER_FILE = "adapter_model.safetensors"


class SharedBase(ActorCritic):
    """LoRA: policy and critic are adapters on one frozen base, the reference is the base or a frozen adapter.

    One pass runs policy and critic as two blocks of rows (`models/roles.py`); the output layer sees the policy's only.
    The value head starts at zero.

    Args:
        model: a PEFT model whose adapter `default` is the policy.
        reference: the name of a frozen adapter; None: the base without any.
    """

    def __init__(self, model: Any, *, reference: str | None, vocabulary: int):
        super().__init__(model, None, vocabulary=vocabulary)
        self.reference = reference
        model.add_adapter(CRITIC, _copied(model.peft_config[POLICY]))
        self.roles = Roles(model)
        if reference is not None:
            self.roles.copy(reference, CRITIC)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(f".{POLICY}." in name or f".{CRITIC}." in name)
        size = model.config.get_text_config().hidden_size
        self.value_head = nn.Linear(size, 1, bias=False, device=model.device, dtype=torch.float32)
        nn.init.zeros_(self.value_head.weight)
        switch_off_dropout(self)

    @property
    def has_reference(self) -> bool:
        """Always: the base, or an adapter on it."""
        return True

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """The critic's adapter and its head."""
        yield from self.value_head.parameters()
        yield from (p for name, p in self.policy.named_parameters() if f".{CRITIC}." in name)

    @contextmanager
    def as_policy(self) -> Iterator[Any]:
        """The base with the policy's adapter on."""
        with self.roles.rows(POLICY):
            yield self.policy

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, *, batch: Batch | None = None,
        reference: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """As `ActorCritic`; with `reference`, its log-probabilities instead of the policy's."""
        if batch is None:
            with self.roles.rows(POLICY):
                return self.policy(input_ids=input_ids, attention_mask=attention_mask, **options)
        if not reference:
            return super().forward(batch=batch, **options)
        with self.roles.rows(self.reference):
            logits, _ = read(self.policy, batch)
        return Drawn.of(logits, batch, temperature=options["temperature"], vocabulary=self.vocabulary).log_probs()

    def _run(self, batch: Batch) -> tuple[Tensor, Tensor]:
        # Set until the next pass and not only during this one: checkpointed layers run again in the backward pass.
        self.roles.set(POLICY, CRITIC)
        logits, hidden = read(self.policy, batch, blocks=2)
        return logits, hidden.chunk(2)[1]

    def _head(self) -> nn.Linear:
        return self.value_head

    def save(self, folder: Path, state: Mapping[str, Tensor]) -> None:
        """Write the policy's adapter at the root of `folder`, the critic's and its head under `critic/`."""
        own = under("policy.", state)
        self.policy.save_pretrained(folder, state_dict=own, selected_adapters=[POLICY, CRITIC])
        save_head(folder, state["value_head.weight"])

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """What is trained, of the state that DeepSpeed saved of the whole module.

        The base was read from its own folder; of a quantized one the state holds entries that no module takes back.
        """
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        if strict and trained - state_dict.keys():
            raise RuntimeError(f"not the state of this module: {sorted(trained - state_dict.keys())[0]} is missing")
        kept = {name: tensor for name, tensor in state_dict.items() if name in trained}
        return super().load_state_dict(kept, strict=False, assign=assign)

    def load(self, folder: Path) -> None:
        """Read back what `save` wrote."""
        for name, where in ((POLICY, folder), (CRITIC, folder / CRITIC)):
            result = set_peft_model_state_dict(self.policy, load_file(where / ADAPTER_FILE), adapter_name=name)
            if result.unexpected_keys:
                raise RuntimeError(f"{where}: not this adapter: {result.unexpected_keys[0]}")
        load_head(folder, self.value_head)


class SharedScorer:
    """A reward model that is an adapter on a `SharedBase`, with the part of a scorer's interface that scoring needs.

    Args:
        folder: a reward stage's adapter, on the same weights as the policy's base.
        name: of its adapter.

    Raises:
        ModelError: the adapter has no score head, or does not fit.
    """

    def __init__(self, module: SharedBase, folder: Path, name: str):
        self.module, self.name = module, name
        stored = load_file(folder / ADAPTER_FILE)
        heads = [key for key in stored if key.endswith(f".{HEAD}.weight")]
        if len(heads) != 1:
            raise ModelError(f"{folder}: its adapter brings no `{HEAD}` head: not a reward model")
        weight = stored.pop(heads[0])
        config = _copied(LoraConfig.from_pretrained(str(folder)))
        config.task_type, config.inference_mode = "CAUSAL_LM", True
        module.policy.add_adapter(name, config)
        module.roles.adopt(module.policy)
        result = set_peft_model_state_dict(module.policy, stored, adapter_name=name)
        if result.unexpected_keys:
            raise ModelError(f"{folder}: its adapter does not fit the policy's base ({result.unexpected_keys[0]})")
        for key, parameter in module.policy.named_parameters():
            if f".{name}." in key:
                parameter.requires_grad_(False)
        self.score = nn.Linear(weight.shape[1], 1, bias=False, device=module.device, dtype=torch.float32)
        self.score.weight.data.copy_(weight)
        self.score.requires_grad_(False)

    @property
    def device(self) -> torch.device:
        """Where the base is."""
        return self.module.device

    @property
    def config(self) -> Any:
        """The base's."""
        return self.module.config

    def __call__(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> SimpleNamespace:
        """The score (B, 1) at the last real token of each row (padded on the right)."""
        base = self.module.policy.get_base_model()
        trunk = getattr(base, base.base_model_prefix)
        with self.module.roles.rows(self.name):
            out = trunk(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)
        hidden = out.last_hidden_state  # (B, S, H)
        rows, ends = torch.arange(len(input_ids), device=hidden.device), attention_mask.sum(-1) - 1
        return SimpleNamespace(logits=self.score.to(hidden.device)(hidden[rows, ends].float()))


def _copied(config: Any) -> Any:
    """The same kind of adapter for another role; it trains no whole modules."""
    own = copy.deepcopy(config)
    own.modules_to_save = None
    return own
