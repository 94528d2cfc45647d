"""Preference alignment as a chain of stages: pretrain, SFT, reward model, PPO, DPO, KTO, evaluation."""

from typing import Any

__version__ = "0.1.0"
PPO = {"PPOTrainer": "alignment.training.ppo", "PPOConfig": "alignment.training.ppo_config"}


def __getattr__(name: str) -> Any:
    """`from alignment import PPOTrainer, PPOConfig`, without the cost of torch for those who do not."""
    if name in PPO:
        from importlib import import_module

        return getattr(import_module(PPO[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
