"""Says while a run is young what its log already shows: some rules of `alignment report --diagnose`, in words.

A loss of exactly 0, an accuracy of 1 from the first steps, gradients of norm 0 and a loss that does not move are no
errors: a run may be meant so. They are said once, when ten lines are logged, and again at every doubling if new.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from alignment.evaluation.diagnose import judge
from alignment.evaluation.series import LINES, Series

AT_ONCE = ("loss-zero", "gradient-zero", "accuracy-one", "non-finite")
LATER = ("loss-flat", "margins-flat")  # the rate may still be rising: from the middle of the run on


class Early(TrainerCallback):
    """Looks at the first logged lines, and at all of them each time their number has doubled."""

    def __init__(self, stage: str, say: Callable[[str], None]):
        self.stage, self.say = stage, say
        self.entries: list[dict[str, Any]] = []
        self.next = LINES
        self.said: set[str] = set()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Collect a line of training, and judge where there are enough."""
        if not state.is_world_process_zero or not logs or "loss" not in logs:
            return
        self.entries.append({"step": state.global_step, **logs})
        if len(self.entries) < self.next:
            return
        self.next *= 2
        rules = (*AT_ONCE, *LATER) if 2 * state.global_step >= state.max_steps else AT_ONCE
        for found in judge(self.stage, Series(tuple(self.entries))).findings:
            if found.rule in rules and found.rule not in self.said:
                self.said.add(found.rule)
                where = f"steps {found.steps[0]} to {found.steps[1]}"
                self.say(f"  {found.severity}    {found.rule}, {where}: {found.shows}. {_sentence(found.cause)}. "
                         f"{_sentence(found.remedy)}")  # fmt: skip


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
