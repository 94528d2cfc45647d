"""A worker with a fault in one rank: `accelerate launch planted_worker.py FAULT RANK STEP stage.yaml`."""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from alignment.errors import NonFiniteError
from alignment.training import nonfinite, ppo, rewards, trainers, worker


def plant(fault: str, rank: int, step: int) -> None:
    """NaN in the loss, in a gradient, or in a weight of one rank, at one step; in PPO's loss, or one of its rewards."""
    mine = int(os.environ["RANK"]) == rank
    compute = trainers.SFTTrainer.compute_loss
    before = nonfinite.Finite.on_pre_optimizer_step

    def loss(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = compute(self, *args, **kwargs)
        if not mine or self.state.global_step != step - 1 or not self.model.training:
            return found
        if fault == "gradient":
            return found + (next(self.model.parameters()).sum() * 0).sqrt()  # its derivative is 0 / 0
        return found * float("nan") if fault == "loss" else found

    def weight(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        before(self, args, state, control, **kwargs)
        if mine and fault == "weight" and state.global_step == step - 1:
            with torch.no_grad():
                next(self.trainer.model.parameters())[-1] = float("nan")  # in the update itself

    micro_batch, rollout, judge = ppo.PPOTrainer._micro_batch, ppo.PPOTrainer.rollout, rewards.judge_replies
    at = [0]

    def ppo_loss(self: Any, *args: Any) -> Any:
        found = micro_batch(self, *args)
        return (found[0] * float("nan"), *found[1:]) if mine and self.state.global_step == step - 1 else found

    def ppo_rollout(self: Any, *args: Any) -> Any:
        at[0] = self.state.global_step
        return rollout(self, *args)

    def reward(source: Any, rows: Any, *args: Any) -> Any:
        if mine and at[0] == step - 1:
            raise NonFiniteError(f"rewards: letters gave nan for {rewards.row_name(rows, 0)}")
        return judge(source, rows, *args)

    if fault == "ppo-loss":
        ppo.PPOTrainer._micro_batch = ppo_loss
    if fault == "ppo-reward":
        ppo.PPOTrainer.rollout, rewards.judge_replies = ppo_rollout, reward
    trainers.SFTTrainer.compute_loss = loss
    nonfinite.Finite.on_pre_optimizer_step = weight


if __name__ == "__main__":
    plant(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    sys.exit(worker.main(sys.argv[4:]))
