"""What each choice in PPO's passes and in its generation is worth: forms of the same work in turns, in one process.

    python benchmarks/ppo_passes.py [--sizes 0.7M 15M] [--repeats 7] [--threads 2]

A pass is forward and backward of a random policy and its critic over the episodes of one minibatch. Generation draws
replies of full length from the same policy. Every form computes the same numbers; the first round is not counted.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from ppo_common import SIZES
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from alignment.training.actor_critic import ActorCritic
from alignment.training.rollout import Episodes, chunks

PROMPTS, REPLY = (12, 24), 32


@dataclass(frozen=True)
class World:
    """Two models and what they read."""

    module: ActorCritic
    episodes: Episodes


def world(size: str, rows: int) -> World:
    """Random models; half of the replies end early."""
    config = SIZES[size].config()
    config.num_labels = 1
    generator = random.Random(1)

    def ids(length: int) -> list[int]:
        return [generator.randrange(3, config.vocab_size) for _ in range(length)]

    prompts = [ids(generator.randint(*PROMPTS)) for _ in range(rows)]
    replies = [ids(REPLY if generator.random() < 0.5 else generator.randint(1, REPLY - 1)) for _ in range(rows)]
    module = ActorCritic(LlamaForCausalLM(config), LlamaForSequenceClassification(config), vocabulary=config.vocab_size)
    return World(module, Episodes([{}] * rows, prompts, replies, [""] * rows, [True] * rows))


# --- one minibatch, forward and backward ------------------------------------------------------------------------------


def as_trl(world: World) -> Tensor:
    """Prompts padded on the left, replies on the right, with a mask; logits of every position."""
    episodes = world.episodes
    before, after = max(map(len, episodes.prompts)), max(map(len, episodes.completions))
    ids, mask = [], []
    for prompt, reply in zip(episodes.prompts, episodes.completions, strict=True):
        left, right = before - len(prompt), after - len(reply)
        ids.append([0] * left + [*prompt, *reply] + [0] * right)
        mask.append([0] * left + [1] * (len(prompt) + len(reply)) + [0] * right)
    given = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    given["position_ids"] = (given["attention_mask"].cumsum(1) - 1).clamp(min=0)
    kept = slice(before - 1, -1)
    logits = world.module.policy(**given, use_cache=False).logits[:, kept]
    log_probs = logits.float().log_softmax(-1).gather(2, given["input_ids"][:, before:, None])[..., 0]
    critic = world.module.critic
    assert critic is not None
    values = critic.score(critic.model(**given, use_cache=False).last_hidden_state)[:, kept, 0]
    real = given["attention_mask"][:, before:].bool()
    return log_probs[real].sum() + values[real].sum()


def ours(world: World, rows: Sequence[int]) -> Tensor:
    """As `PPOTrainer` reads them: padded on the right, no mask, logits before drawn tokens only."""
    batch = world.episodes.batch(rows, 0, torch.device("cpu"))
    out = world.module(batch=batch)
    return out.log_probs.sum() + out.values[:, :-1][batch.mask].sum()


def packed(world: World) -> Tensor:
    """All episodes in one row without padding; Transformers keeps them apart by their positions."""
    episodes, module = world.episodes, world.module
    pairs = list(zip(episodes.prompts, episodes.completions, strict=True))
    ids = torch.tensor([[token for prompt, reply in pairs for token in (*prompt, *reply)]])
    positions = torch.cat([torch.arange(length) for length in episodes.lengths()])[None]
    starts = torch.tensor([0, *episodes.lengths()]).cumsum(0)
    states = torch.cat([
        torch.arange(int(start) + len(prompt) - 1, int(start) + len(prompt) + len(reply) - 1)
        for start, (prompt, reply) in zip(starts, pairs, strict=False)
    ])  # fmt: skip
    hidden = module.policy.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0, states]
    log_probs = module.policy.lm_head(hidden).float().log_softmax(-1).gather(1, ids[0, states + 1, None])
    critic = module.critic
    assert critic is not None
    said = critic.model(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[0, states]
    return log_probs.sum() + critic.score(said).sum()


def in_parts(world: World, rows: int) -> Callable[[], float]:
    """Micro-batches of like lengths, each with its backward pass."""

    def run() -> float:
        total = 0.0
        for part in chunks(world.episodes.lengths(), rows):
            loss = ours(world, part)
            loss.backward()
            total += loss.item()
        return total

    return run


def whole(form: Callable[[World], Tensor], world: World) -> Callable[[], float]:
    """One pass with its backward pass."""

    def run() -> float:
        loss = form(world)
        loss.backward()
        return loss.item()

    return run


# --- generation -------------------------------------------------------------------------------------------------------


def generation(world: World, rows: int, **options: object) -> Callable[[], float]:
    """Replies of full length to so many prompts."""
    prompts = (list(world.episodes.prompts) * (1 + rows // len(world.episodes)))[:rows]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])

    def run() -> float:
        with torch.inference_mode():
            drawn = world.module.policy.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=REPLY, min_new_tokens=REPLY, do_sample=False,
                **options,
            )  # fmt: skip
        return float(drawn[:, width:].sum()) if rows == len(world.episodes) else 0.0

    return run


# --- in turns ---------------------------------------------------------------------------------------------------------


def in_turns(forms: dict[str, Callable[[], float]], repeats: int, module: ActorCritic) -> dict[str, float]:
    """Median seconds of each; all must find the same number, where they find one."""
    seconds: dict[str, list[float]] = {name: [] for name in forms}
    found = {}
    for _ in range(repeats + 1):
        for name, form in forms.items():
            module.zero_grad()
            started = time.perf_counter()
            found[name] = form()
            seconds[name].append(time.perf_counter() - started)
    first = next(iter(found.values()))
    for name, number in found.items():
        if number and abs(number - first) > 1e-4 * abs(first):
            sys.exit(f"{name}: found {number}, the first form {first}: not the same work")
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


def main() -> None:
    """Both tables for each size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.7M", "15M"])
    parser.add_argument("--rows", type=int, default=16, help="episodes of a minibatch")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for size in options.sizes:
        torch.manual_seed(0)
        made = world(size, options.rows)
        rows = options.rows
        passes = in_turns(
            {
                "both sides padded, mask, logits of all positions": whole(as_trl, made),
                "one side padded, no mask, logits before drawn tokens": in_parts(made, rows),
                "the same in 2 passes of like lengths": in_parts(made, rows // 2),
                "the same in 4 passes of like lengths": in_parts(made, rows // 4),
                "packed, no padding": whole(packed, made),
            },
            options.repeats, made.module,
        )  # fmt: skip
        made.module.eval()
        drawn = {
            name: seconds / count
            for count in (rows, 4 * rows, 16 * rows)
            for name, seconds in in_turns(
                {
                    f"{count} replies": generation(made, count),
                    f"{count} replies, static cache": generation(made, count, cache_implementation="static"),
                },
                max(1, options.repeats // 3), made.module,
            ).items()
        }  # fmt: skip
        for title, table in ((f"{size}: a pass over {rows} episodes", passes), (f"{size}: drawing one reply", drawn)):
            first = next(iter(table.values()))
            print(f"\n| {title} | seconds | over the first |\n|---|---|---|")
            for name, seconds in table.items():
                print(f"| {name} | {seconds:.4f} | {seconds / first:.2f} |", flush=True)


if __name__ == "__main__":
    main()
