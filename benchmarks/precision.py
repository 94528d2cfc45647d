"""float32 against bfloat16 autocast on this machine: training steps of a small and a larger Llama, in turns.

    python benchmarks/precision.py [--steps 10]

What `precision.compute: auto` rests on: the ratio below 1 means that bfloat16 is slower.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {"2 M (quickstart)": (192, 4, 512, 1536), "30 M": (512, 8, 1408, 8192)}


def model(hidden: int, layers: int, inner: int, vocabulary: int) -> LlamaForCausalLM:
    """A random Llama with heads of 32."""
    heads = hidden // 32
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=inner,
        vocab_size=vocabulary,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def step(net: LlamaForCausalLM, ids: torch.Tensor, half: bool) -> float:
    """Seconds of one forward and backward pass."""
    started = time.perf_counter()
    with torch.autocast("cpu", torch.bfloat16, enabled=half):
        net(input_ids=ids, labels=ids).loss.backward()
    net.zero_grad()
    return time.perf_counter() - started


def main() -> None:
    """Print the ratio for each size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    steps = parser.parse_args().steps
    torch.manual_seed(0)
    print(
        f"median of {steps}, in turns, {torch.get_num_threads()} threads\n\n| model | float32 / bfloat16 |\n|---|---|"
    )
    for name, size in SIZES.items():
        net, ids = model(*size), torch.randint(0, size[-1], (16, 128))
        taken: dict[bool, list[float]] = {True: [], False: []}
        for turn in range(steps + 2):
            for half in (False, True):
                seconds = step(net, ids, half)
                if turn >= 2:
                    taken[half].append(seconds)
        print(f"| {name} | {statistics.median(taken[False]) / statistics.median(taken[True]):.2f} |")


if __name__ == "__main__":
    main()
