"""The quickstart on several seeds: the required numbers, one line each.

    python benchmarks/quickstart.py [--seeds 42 43 44] [--runs DIR]

Each seed is a run of its own (`--run quickstart-SEED --set seed=SEED`); finished stages are not run again. Prints a
Markdown table; exit status 1 if a seed misses a requirement.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = (
    "seed",
    "gold of SFT and of base",
    "win rate of DPO",
    "win rate of PPO",
    "facts of SFT",
    "facts of DPO",
    "facts of PPO",
    "KL of DPO, of PPO",
    "reward model",
    "best possible",
    "minutes",
)


def run(seed: int, runs: Path) -> tuple[dict[str, float], float]:
    """One seed's metrics of the last stage, and the minutes that this call took."""
    name = f"quickstart-{seed}"
    started = time.monotonic()
    command = [sys.executable, "-m", "alignment", "run", "recipes/quickstart.yaml", "--runs", str(runs), "--run", name]
    subprocess.run([*command, "--set", f"seed={seed}"], cwd=ROOT, check=True)
    metrics = json.loads((runs / name / "evaluate" / "metrics.json").read_text())
    return metrics, (time.monotonic() - started) / 60


def holds(metrics: dict[str, float]) -> bool:
    """Every number that is required of the quickstart."""
    return (
        all(metrics[f"win_rate/{name}"] >= 0.70 and metrics[f"win_rate_low/{name}"] > 0.60 for name in ("dpo", "ppo"))
        and metrics["facts/dpo"] >= metrics["facts/sft"]
        and metrics["accuracy/best_possible"] - metrics["accuracy/reward"] <= 0.03
        and metrics["gold_low/sft"] > metrics["gold_high/base"]
    )


def row(seed: int, m: dict[str, float], minutes: float) -> list[str]:
    """One line of the table."""
    return [
        str(seed),
        f"{m['gold/sft']:.2f} [{m['gold_low/sft']:.2f}, {m['gold_high/sft']:.2f}] and {m['gold/base']:.2f} "
        f"[{m['gold_low/base']:.2f}, {m['gold_high/base']:.2f}]",
        *(
            f"{m[f'win_rate/{name}']:.3f} [{m[f'win_rate_low/{name}']:.3f}, {m[f'win_rate_high/{name}']:.3f}]"
            for name in ("dpo", "ppo")
        ),
        f"{m['facts/sft']:.3f}",
        f"{m['facts/dpo']:.3f}",
        f"{m['facts/ppo']:.3f}",
        f"{m['kl/dpo']:.1f}, {m['kl/ppo']:.1f}",
        f"{m['accuracy/reward']:.3f}",
        f"{m['accuracy/best_possible']:.3f}",
        f"{minutes:.1f}",
    ]


def main() -> int:
    """Run the seeds and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--runs", type=Path, default=ROOT / "runs")
    options = parser.parse_args()
    results = {seed: run(seed, options.runs.absolute()) for seed in options.seeds}
    print(f"\n| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for seed, (metrics, minutes) in results.items():
        print(f"| {' | '.join(row(seed, metrics, minutes))} |")
    return 0 if all(holds(metrics) for metrics, _ in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
