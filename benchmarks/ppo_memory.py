"""Peak memory of PPO with adapters on one base beside DPO with an adapter: same model, lengths and rows per pass.

    python benchmarks/ppo_memory.py [--millions 100] [--rows 4] [--prompt 64] [--reply 64]

Each side runs two steps in a process of its own. The peak is that of torch's CPU allocator, from the `[memory]` events
of `torch.profiler`. DPO passes chosen and rejected answers through the policy, PPO each reply through policy and
critic: as many sequences. PPO's reward is a function, so both hold policy and reference, and PPO a critic besides.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SIDES = ("dpo", "ppo")
LORA = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def policy(millions: int, tokenizer: Any) -> Any:
    """A random Llama of about so many million parameters."""
    from alignment.models.load import init_policy

    layers = max(2, round((millions * 1e6 - 8000 * 768) / (12 * 768 * 768)))
    config = {
        "model_type": "llama", "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": layers,
        "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 1024,
        "tie_word_embeddings": True, "vocab_size": 8000,
    }  # fmt: skip
    torch.manual_seed(0)
    return init_policy(config, tokenizer, attention="sdpa")


def tokenizer() -> Any:
    """A tokenizer of 8,000 tokens with a chat template, trained on random words."""
    from alignment.data import templates
    from alignment.models.tokenizer import fit, train_tokenizer

    letters = random.Random(0)
    words = ["".join(letters.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(20_000)]
    made = train_tokenizer([" ".join(words)], 8000, templates.template("chatml").special_tokens)
    fit(made, "chatml", conversational=True)
    return made


def trainer(side: str, options: argparse.Namespace, folder: str) -> Any:
    """Either trainer, for two steps."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig

    from alignment import PPOConfig, PPOTrainer
    from alignment.training import trainers

    words = tokenizer()
    draw = torch.Generator().manual_seed(1)

    def ids(count: int) -> list[int]:
        drawn: list[int] = torch.randint(300, 7000, (count,), generator=draw).tolist()
        return drawn

    common = {
        "output_dir": folder, "per_device_train_batch_size": options.rows, "max_steps": 2, "use_cpu": True,
        "bf16": False, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": False,
    }  # fmt: skip
    model, adapter = policy(options.millions, words), LoraConfig(**LORA)
    if side == "dpo":
        rows = [
            {"prompt_ids": ids(options.prompt), "chosen_ids": ids(options.reply), "rejected_ids": ids(options.reply)}
            for _ in range(2 * options.rows)
        ]
        args = DPOConfig(**common, max_length=options.prompt + options.reply)
        return trainers.DPO(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=words, peft_config=adapter
        )
    prompts = [{"prompt_ids": ids(options.prompt), "prompt": "x"} for _ in range(2 * options.rows)]
    settings = PPOConfig(**common, response_length=options.reply, num_ppo_epochs=1)
    return PPOTrainer(
        model, settings, Dataset.from_list(prompts), processing_class=words, reward_funcs=length, peft_config=adapter,
        stop_ids=[words.pad_token_id],  # as good as never drawn: every reply has full length
    )  # fmt: skip


def length(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Any reward will do."""
    return [float(len(str(completion)) % 7) for completion in completions]


def peak(run: Callable[[], Any]) -> int:
    """Bytes above the start at the highest point of torch's CPU allocator while `run` runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    totals = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
    return int(max(totals))


def main() -> None:
    """Run both sides and print the ratio."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--millions", type=int, default=100)
    parser.add_argument("--rows", type=int, default=4, help="rows per forward pass")
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--reply", type=int, default=64, help="tokens")
    parser.add_argument("--side", choices=SIDES, help="run this side only and print its bytes")
    options = parser.parse_args()
    if options.side:
        with tempfile.TemporaryDirectory() as folder:
            print(peak(lambda: trainer(options.side, options, folder).train()))
        return
    found = {}
    for side in SIDES:
        command = [sys.executable, __file__, *sys.argv[1:], "--side", side]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
        found[side] = int(done.stdout.strip().splitlines()[-1])
        print(f"{side}  {found[side] / 2**20:,.0f} MiB")
    print(f"ppo / dpo  {found['ppo'] / found['dpo']:.2f}")


if __name__ == "__main__":
    main()
