"""PPO, TRL 1.12.0's and ours in turns: episodes per second and peak memory on the same models, prompts and lengths.

    python benchmarks/ppo.py [--sizes 0.7M 15M 100M] [--dtypes fp32 bf16] [--finish 0 0.5] [--repeats 3] [--env DIR]
    python benchmarks/ppo.py --model DIR --prompts FILE.jsonl         # a trained policy instead of random ones

Each measurement is a process of its own; the first update of each is a warm-up. TRL runs in its own environment, made
on the first call, and a second time with `gc.collect` stubbed out. Random Llamas never end a reply: `--finish` gives
their head a bias so that this share of replies ends within the response length (`ppo_common.bias_the_head`). Policy
and reference start equal; the reward model and the critic are random models of the same shape. `ours, one trunk` has
its values from a head on the policy instead (`critic: shared`): less work, so a row of its own. The last table sets our
seconds beside the least that the arithmetic allows (`ppo_floor.py`).
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from ppo_common import (
    DEFAULT_ENVIRONMENT,
    HERE,
    SIZES,
    call,
    environment,
    random_folders,
    random_prompts,
    text_prompts,
    trained_folders,
)

SIDES = ("trl", "trl without gc", "ours", "ours, one trunk")
Result = dict[str, Any]


# --- our side ---------------------------------------------------------------------------------------------------------


def run_ours(spec: dict[str, Any]) -> Result:
    """Some updates with our trainer; the same numbers as `ppo_trl.py speed` gives."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    from alignment.recipe.schema import Reward
    from alignment.training.ppo import PPOTrainer
    from alignment.training.ppo_config import PPOConfig
    from alignment.training.rewards import load_rewards

    class Watch(TrainerCallback):
        """When updates end, and what is logged."""

        def __init__(self) -> None:
            self.ends: list[float] = []
            self.logs: list[dict[str, float]] = []

        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.ends.append(time.perf_counter())

        def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
            self.logs.append(dict(logs or {}))

    folder, device = Path(spec["models"]), "cuda" if torch.cuda.is_available() else "cpu"
    kind = torch.bfloat16 if spec["dtype"] == "bf16-weights" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(folder / "policy", padding_side="left")
    texts = tokenizer.batch_decode(spec["prompts"])
    watch = Watch()
    with tempfile.TemporaryDirectory(prefix="ours-ppo-") as output:
        config = PPOConfig(
            output_dir=output,
            report_to="none",
            save_strategy="no",
            logging_steps=1,
            use_cpu=device == "cpu",
            bf16=spec["dtype"] == "bf16",
            disable_tqdm=True,
            critic="shared" if spec["one_trunk"] else "separate",
            **spec["arguments"],
        )
        trainer = PPOTrainer(
            AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=kind),
            config,
            Dataset.from_dict({"prompt_ids": spec["prompts"], "prompt": texts}),
            processing_class=tokenizer,
            reward_funcs=load_rewards(
                [Reward(name="reward", model=str(folder / "reward"), normalize="none")],
                path_of=Path,
                dtype=torch.float32 if spec["dtype"] == "fp32" else torch.bfloat16,
                device=device,
                batch_size=config.local_rollout_forward_batch_size,
                template=None,
            ),
            value_model=None
            if spec["one_trunk"]
            else AutoModelForSequenceClassification.from_pretrained(folder / "value", dtype=kind),
            ref_model=AutoModelForCausalLM.from_pretrained(folder / "reference", dtype=kind),
            callbacks=[watch],
        )
        loaded = resident_peak()
        trainer.train()
    seconds = [later - earlier for earlier, later in zip(watch.ends, watch.ends[1:], strict=False)]
    counted = seconds[1:]
    lines = [line for line in watch.logs if "time/update" in line][1:]
    parts = {name: sum(line[f"time/{name}"] for line in lines) / len(lines) for name in ("generate", "score", "update")}
    return {
        "episodes_per_second": spec["batch"] * len(counted) / sum(counted),
        "seconds_per_update": seconds,
        "parts": parts | {"rest": sum(counted) / len(counted) - sum(parts.values())},
        "peak_mib": resident_peak(),
        "loaded_mib": loaded,
        "gpu_peak_mib": torch.cuda.max_memory_allocated() / 2**20 if device == "cuda" else None,
        "floor": least_seconds(spec, trainer.ref_model.config, lines, device),
        "log": watch.logs[-1],
    }


def least_seconds(spec: dict[str, Any], config: Any, lines: list[dict[str, float]], device: str) -> dict[str, float]:
    """The floor of the mean update, at rates measured in this process."""
    import torch
    from ppo_floor import Counts, floor, measured_rates

    arguments, prompts = spec["arguments"], spec["prompts"]
    mean = {name: statistics.mean(line[f"completions/{name}_length"] for line in lines) for name in ("mean", "max")}
    counts = Counts(
        episodes=spec["batch"],
        prompts=spec["batch"] * statistics.mean(map(len, prompts)),
        drawn=spec["batch"] * mean["mean"],
        steps=mean["max"],
        passes=arguments["num_ppo_epochs"],
        optimizer_steps=arguments["num_ppo_epochs"] * arguments["num_mini_batches"],
    )
    rates = measured_rates(config, torch.float32 if spec["dtype"] == "fp32" else torch.bfloat16, device)
    return floor(config, counts, rates, one_trunk=spec["one_trunk"])


def resident_peak() -> float:
    """Largest resident memory of this process so far, MiB (Linux: getrusage would count the parent's, before exec)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


# --- both sides in turns ----------------------------------------------------------------------------------------------


def spec_of(options: argparse.Namespace, models: Path, prompts: list[list[int]], dtype: str) -> dict[str, Any]:
    """What both sides are told."""
    arguments = {
        "per_device_train_batch_size": options.rows,
        "gradient_accumulation_steps": options.batch // options.rows,
        "num_mini_batches": options.mini_batches,
        "num_ppo_epochs": options.epochs,
        "response_length": options.response_length,
        "total_episodes": options.batch * (options.updates + 1),
        "local_rollout_forward_batch_size": options.rollout_rows or options.batch,
        "temperature": 1.0,
        "learning_rate": 1e-6,  # small: the share of replies that end shall stay what it was made
        "seed": 1,
    }
    return {
        "models": str(models), "prompts": prompts, "dtype": dtype, "batch": options.batch, "arguments": arguments,
    }  # fmt: skip


def measure(side: str, spec: dict[str, Any], folder: Path, options: argparse.Namespace) -> Result | str:
    """One process; a string says why there is no result."""
    out, file = folder / "result.json", folder / "spec.json"
    out.unlink(missing_ok=True)
    spec = spec | {"out": str(out), "collect": side == "trl", "one_trunk": side == "ours, one trunk"}
    if side.startswith("ours"):
        command = [sys.executable, str(Path(__file__).resolve()), "--side", "ours", str(file)]
    else:
        spec["arguments"] = spec["arguments"] | {"stop_token": "eos"}
        command = [str(options.python), str(HERE / "ppo_trl.py"), "speed", str(file)]
    file.write_text(json.dumps(spec))
    problem = call(command, options.threads, options.timeout)
    return problem or json.loads(out.read_text())


def in_turns(name: str, spec: dict[str, Any], folder: Path, options: argparse.Namespace) -> dict[str, list[Result]]:
    """Every side once per repeat, one after the other; what fails is told and left out."""
    results: dict[str, list[Result]] = {side: [] for side in options.sides}
    for turn in range(options.repeats):
        for side in options.sides:
            result = measure(side, spec, folder, options)
            if isinstance(result, str):
                print(f"{name}, {side}, turn {turn + 1}: {result}", file=sys.stderr, flush=True)
                continue
            results[side].append(result)
            rate = result["episodes_per_second"]
            print(f"{name}, {side}, turn {turn + 1}: {rate:.2f} episodes/s", file=sys.stderr, flush=True)
    return results


def rate_cell(results: list[Result]) -> str:
    """Median of episodes per second, and its range."""
    rates = [result["episodes_per_second"] for result in results]
    return f"{statistics.median(rates):.2f} [{min(rates):.2f}, {max(rates):.2f}]" if rates else "–"


def median(results: list[Result], key: str) -> float | None:
    """Median of a number, None without results."""
    return statistics.median(result[key] for result in results) if results else None


def ratio(above: float | None, below: float | None) -> str:
    """A quotient, if there is one."""
    return f"{above / below:.2f}" if above and below else "–"


def print_tables(measured: dict[str, dict[str, list[Result]]], sides: list[str]) -> None:
    """Speed and memory, then where the seconds of one update went."""
    rate, peak = "episodes_per_second", "peak_mib"
    print("\n| model | " + " | ".join(sides) + " | ours / TRL | ours / TRL without gc | peak MiB | ours / TRL |")
    print("|---" * (len(sides) + 5) + "|")
    for name, results in measured.items():
        ours = results.get("ours", [])
        cells = [rate_cell(results[side]) for side in sides]
        for side in ("trl", "trl without gc"):
            cells.append(ratio(median(ours, rate), median(results.get(side, []), rate)))
        peaks = [median(results[side], peak) for side in sides]
        cells.append(", ".join(f"{found:.0f}" if found else "–" for found in peaks))
        cells.append(ratio(median(ours, peak), median(results.get("trl", []), peak)))
        print(f"| {name} | " + " | ".join(cells) + " |")
    print("\nseconds of one update\n")
    for name, results in measured.items():
        for side, found in results.items():
            if found:
                names = found[0]["parts"]
                parts = {part: statistics.median(result["parts"][part] for result in found) for part in names}
                text = ", ".join(f"{part} {seconds:.3f}" for part, seconds in parts.items())
                print(f"- {name}, {side}: {text}")
    print("\nseconds of one update over the least that its arithmetic and its bytes take\n")
    for name, results in measured.items():
        for side, found in results.items():
            if found and "floor" in found[0]:
                over = {
                    part: (
                        statistics.median(result["parts"][part] for result in found),
                        statistics.median(result["floor"][part] for result in found),
                    )
                    for part in found[0]["floor"]
                }
                text = ", ".join(f"{part} {took:.3f} / {least:.3f}" for part, (took, least) in over.items())
                print(f"- {name}, {side}: {text}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--side", nargs=2, metavar=("SIDE", "SPEC"), help=argparse.SUPPRESS)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["0.7M", "15M", "100M"])
    parser.add_argument("--model", help="folder of a trained policy, instead of random ones")
    parser.add_argument("--prompts", type=Path, help="with --model: JSON lines with `prompt` or `text`")
    parser.add_argument("--dtypes", nargs="+", choices=("fp32", "bf16", "bf16-weights"), default=["fp32", "bf16"])
    parser.add_argument(
        "--finish", nargs="+", type=float, default=[0.5], help="share of replies that end by themselves"
    )
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--updates", type=int, default=8, help="counted updates; one more is the warm-up")
    parser.add_argument("--batch", type=int, default=16, help="episodes per update")
    parser.add_argument("--rows", type=int, help="rows per forward and backward; default: a minibatch")
    parser.add_argument("--rollout-rows", type=int, help="rows at once without gradient; default: the batch")
    parser.add_argument("--mini-batches", type=int, default=1)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--prompt-length", type=int, default=24, help="longest prompt in tokens")
    parser.add_argument("--shortest-prompt", type=int, help="default: half of the longest")
    parser.add_argument("--response-length", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one process")
    parser.add_argument("--env", type=Path, default=DEFAULT_ENVIRONMENT, help="folder of TRL's environment")
    parser.add_argument("--out", type=Path, help="write every result there as JSON")
    options = parser.parse_args(arguments)
    options.rows = options.rows or options.batch
    if options.batch % options.rows or (options.mini_batches > 1 and options.rows != options.batch):
        # TRL steps once per `gradient_accumulation_steps` micro-batches, whatever num_mini_batches says.
        parser.error(
            "--rows must divide --batch; with --mini-batches TRL takes the steps asked for only without --rows"
        )
    if options.model and not options.prompts:
        parser.error("--model needs --prompts")
    return options


def main() -> None:
    """Make the models, run the sides, print the tables."""
    options = parse()
    if options.side:
        spec = json.loads(Path(options.side[1]).read_text())
        Path(spec["out"]).write_text(json.dumps(run_ours(spec)))
        return
    options.python = environment(options.env) if any("trl" in side for side in options.sides) else None
    measured: dict[str, dict[str, list[Result]]] = {}
    # More prompts than are used: TRL steps after every micro-batch of the update that draws the last of them.
    count = options.batch * (options.updates + 2)
    with tempfile.TemporaryDirectory(prefix="ppo-speed-") as made:
        folder = Path(made)
        for size in [options.model] if options.model else options.sizes:
            for finish in [None] if options.model else options.finish:
                models = folder / f"{Path(size).name}-{finish}"
                if options.model:
                    tokenizer = trained_folders(size, models)
                    prompts = text_prompts(options.prompts, tokenizer, count, options.prompt_length)
                else:
                    random_folders(SIZES[size], models, finish=finish, response_length=options.response_length)
                    lengths = (options.shortest_prompt or (options.prompt_length + 1) // 2, options.prompt_length)
                    prompts = random_prompts(SIZES[size].vocabulary, count, *lengths)
                for dtype in options.dtypes:
                    ends = "" if finish is None else f", {finish:.0%} end"
                    name = f"{Path(size).name} {dtype}{ends}"
                    measured[name] = in_turns(name, spec_of(options, models, prompts, dtype), folder, options)
                    if options.out:
                        options.out.write_text(json.dumps(measured, indent=1))
    print_tables(measured, options.sides)


if __name__ == "__main__":
    main()
