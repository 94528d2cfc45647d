"""The memory plan beside torch: predicted peak over measured peak of two training steps, for small random Llamas.

    python benchmarks/memory.py [--sizes 1m 5m 14m 30m] [--sides sft dpo reward ppo] [--only TEXT] [--detail]

Each case runs in a process of its own, on the CPU. Measured is the highest point of torch's CPU allocator, from the
`[memory]` events of `torch.profiler`, the making of the models included; predicted is what `alignment check --memory`
computes from the model's configuration, for a CPU. Rows are as long as the longest but for a few tokens, so that the
batch is padded, which is the worst case that the plan assumes. `--detail` prints the terms of each prediction.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import multiprocessing
import random
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from alignment.pipeline.memory import sizes
from alignment.pipeline.memory.activations import FLOAT32
from alignment.pipeline.memory.peak import Estimate, estimate
from alignment.pipeline.memory.situation import BFLOAT16, Frozen, Situation

# hidden, inner, layers, heads, key-value heads, vocabulary
SIZES = {
    "1m": (128, 352, 3, 4, 4, 1024), "5m": (256, 704, 5, 4, 2, 4096), "14m": (384, 1024, 6, 6, 6, 4096),
    "30m": (512, 1408, 8, 8, 4, 4096), "200m": (1024, 2816, 14, 16, 8, 8192),
}  # fmt: skip
SIDES = ("sft", "dpo", "reward", "ppo")
RANK, SHORTER = 16, 7


@dataclass(frozen=True)
class Case:
    """One training run."""

    side: str
    size: str
    adapter: bool
    bfloat16: bool
    checkpointing: bool
    rows: int = 2
    length: int = 256
    accumulation: int = 1
    tied: bool = True

    def __str__(self) -> str:
        flags = ["LoRA" if self.adapter else "full", "bf16" if self.bfloat16 else "fp32"]
        flags += ["checkpointing"] if self.checkpointing else []
        flags += [f"accumulate {self.accumulation}"] if self.accumulation > 1 else []
        flags += [] if self.tied else ["untied"]
        return f"{self.side} {self.size} {' '.join(flags)} {self.rows} x {self.length}"


def cases(chosen_sizes: list[str], sides: list[str]) -> Iterator[Case]:
    """Every algorithm and size, full and LoRA, plain and with bfloat16 and checkpointing; other batches at 5m."""
    for size, side, adapter in itertools.product(chosen_sizes, sides, (False, True)):
        for both in (False, True):
            yield Case(side, size, adapter, both, both)
        if size == "5m":
            plain = Case(side, size, adapter, False, False)
            yield replace(plain, bfloat16=True)
            yield replace(plain, checkpointing=True)
            yield replace(plain, rows=4, length=96, accumulation=2, tied=False)
            yield replace(plain, rows=1, length=512)


# --- predicted --------------------------------------------------------------------------------------------------------


def config(case: Case, vocabulary: int | None = None) -> dict[str, Any]:
    """The configuration of a case's model."""
    hidden, inner, layers, heads, kv_heads, vocab = SIZES[case.size]
    return {
        "model_type": "llama", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": vocabulary or vocab,
        "max_position_embeddings": 4096, "tie_word_embeddings": case.tied,
    }  # fmt: skip


def predicted(case: Case) -> Estimate:
    """What the plan says of a case."""
    size = sizes.read(None, config(case))
    adapter = sizes.lora(size, {"r": RANK, "target_modules": "all-linear"}) if case.adapter else None
    two = not case.adapter and case.side in ("dpo", "ppo")
    situation = Situation(
        method="loss", size=size, rows=case.rows, length=case.length,
        compute=BFLOAT16 if case.bfloat16 else FLOAT32, head="score" if case.side == "reward" else "tiles",
        lora=adapter, judges=(Frozen("reference", size),) if two else (), step_rows=case.rows * case.accumulation,
        scores_pairs=case.side in ("dpo", "reward"), checkpointing=case.checkpointing, cuda=False,
    )  # fmt: skip
    if case.side == "ppo":
        episodes = case.rows * case.accumulation
        situation = replace(
            situation, method="ppo", head="logits", prompt=case.length // 2, drawn=episodes, episodes=episodes,
            critic="adapter" if case.adapter else "model",
        )  # fmt: skip
    return estimate(situation)


# --- measured ---------------------------------------------------------------------------------------------------------


def measured(case: Case) -> int:
    """Bytes at the highest point, in a process of its own."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(_peak, (case,))


def _peak(case: Case) -> int:
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
        ):
            trainer(case, folder).train()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    return int(max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"))


def tokenizer(vocabulary: int) -> Any:
    """A tokenizer of that many ids, trained on made-up words."""
    from alignment.data import templates
    from alignment.models.tokenizer import fit, train_tokenizer

    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 8))) for _ in range(20_000)]
    texts = [" ".join(words[start : start + 40]) for start in range(0, len(words), 40)]
    made = train_tokenizer(texts, vocabulary, templates.template("chatml").special_tokens)
    fit(made, "chatml", conversational=True)
    assert len(made) == vocabulary, f"the tokenizer has {len(made)} ids"
    return made


def trainer(case: Case, folder: str) -> Any:
    """The trainer of a case, for two steps, as `training/builders.py` makes it."""
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, RewardConfig, SFTConfig

    from alignment import PPOConfig, PPOTrainer
    from alignment.training import trainers

    words = tokenizer(SIZES[case.size][-1])
    draw = random.Random(1)
    common = {
        "output_dir": folder, "per_device_train_batch_size": case.rows, "max_steps": 2, "use_cpu": True,
        "bf16": case.bfloat16, "report_to": "none", "save_strategy": "no", "disable_tqdm": True,
        "gradient_checkpointing": case.checkpointing, "gradient_accumulation_steps": case.accumulation,
    }  # fmt: skip
    count, prompt = 2 * case.rows * case.accumulation, case.length // 2
    reply, scorer = case.length - prompt, case.side == "reward"
    adapter = LoraConfig(
        r=RANK, target_modules="all-linear", task_type="SEQ_CLS" if scorer else "CAUSAL_LM",
        modules_to_save=["score"] if scorer else None,
    ) if case.adapter else None  # fmt: skip
    given = {"processing_class": words, "peft_config": adapter}

    def ids(count: int) -> list[int]:
        return [draw.randrange(300, len(words)) for _ in range(count)]

    def short(index: int) -> int:
        return 0 if index % case.rows == 0 else SHORTER

    if case.side == "sft":
        rows = [ids(case.length - short(index)) for index in range(count)]
        labelled = [{"input_ids": row, "labels": [-100] * prompt + row[prompt:]} for row in rows]
        args = SFTConfig(**common, max_length=case.length)
        return trainers.SFT(model=model(case, words), args=args, train_dataset=Dataset.from_list(labelled), **given)
    second = model(case, words) if case.side in ("dpo", "ppo") and adapter is None else None
    if case.side == "ppo":
        prompts = [{"prompt_ids": ids(prompt - short(index)), "prompt": "x"} for index in range(count)]
        settings = PPOConfig(**common, response_length=reply, num_ppo_epochs=1)
        return PPOTrainer(
            model(case, words), settings, Dataset.from_list(prompts), reward_funcs=length, ref_model=second,
            value_model=model(case, words, scorer=True) if adapter is None else None, stop_ids=[words.pad_token_id],
            **given,
        )  # fmt: skip
    if scorer:
        pairs = [{"chosen_ids": ids(case.length), "rejected_ids": ids(case.length - SHORTER)} for _ in range(count)]
        args = RewardConfig(**common, max_length=case.length)
        start = model(case, words, scorer=True)
        return trainers.Reward(model=start, args=args, train_dataset=Dataset.from_list(pairs), **given)
    pairs = [
        {"prompt_ids": ids(prompt), "chosen_ids": ids(reply), "rejected_ids": ids(reply - SHORTER)}
        for _ in range(count)
    ]
    args = DPOConfig(**common, max_length=case.length)
    return trainers.DPO(
        model=model(case, words), ref_model=second, args=args, train_dataset=Dataset.from_list(pairs), **given
    )  # fmt: skip


def model(case: Case, words: Any, *, scorer: bool = False) -> Any:
    """A random Llama, as a language model or as a scorer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(0)
    kind = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    built = AutoConfig.for_model(
        **config(case), pad_token_id=words.pad_token_id, eos_token_id=words.eos_token_id, bos_token_id=None,
        **({"num_labels": 1} if scorer else {}),
    )  # fmt: skip
    return kind.from_config(built, attn_implementation="sdpa", dtype=torch.float32)


def length(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """Any reward will do."""
    return [float(len(str(completion)) % 7) for completion in completions]


def main() -> None:
    """Print the table, and how far off the predictions are."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1m", "5m", "14m", "30m"])
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--only", default="", help="cases with this text in their line")
    parser.add_argument("--detail", action="store_true", help="the terms of each prediction, too")
    options = parser.parse_args()
    import alignment.training.ppo  # noqa: F401 - imported once, before the processes of the cases

    chosen = [case for case in cases(options.sizes, options.sides) if options.only in str(case)]
    ratios = []
    print("| case | predicted MiB | measured MiB | ratio | at |\n|---|---|---|---|---|")
    for case in chosen:
        plan, found = predicted(case), measured(case)
        ratios.append(plan.allocated / found)
        print(
            f"| {case} | {plan.allocated / 2**20:,.1f} | {found / 2**20:,.1f} | {ratios[-1]:.3f} | {plan.moment} |",
            flush=True,
        )
        if options.detail:
            for moment, terms in sorted(plan.moments.items(), key=lambda item: -sum(item[1].values()))[:3]:
                shown = ", ".join(f"{name} {value / 2**20:.1f}" for name, value in terms.items())
                print(f"    {moment}: {sum(terms.values()) / 2**20:.1f} = {shown}")
    off = [abs(ratio - 1) for ratio in ratios]
    print(
        f"\n{len(ratios)} cases: median error {statistics.median(off):.1%}, largest {max(off):.1%}, "
        f"{sum(error <= 0.15 for error in off)} within 15 %"
    )


if __name__ == "__main__":
    main()
