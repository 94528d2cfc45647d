"""Preference alignment as a chain of stages: pretrain, SFT, reward model, PPO, DPO, KTO, evaluation."""

__version__ = "0.1.0"
