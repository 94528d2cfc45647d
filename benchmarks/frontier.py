"""Gold reward over KL in the quickstart's world: SFT; DPO, PPO and RLOO at several strengths; PPO on the gold reward,
and with other critics.

    python benchmarks/frontier.py RUN [--only dpo-0.1 ppo-0] [--jobs 2] [--out benchmarks/frontier]

RUN is the folder of a finished quickstart. Each setting is a run of its own beside it, with the same base, SFT and
reward model: it trains one stage and evaluates it. Writes the numbers (`.json`) and the figure (`.svg`), after figure 2
(left) of Rafailov et al. 2023 (arXiv:2305.18290). Beside what is true stands what the reward model said in the first
and in the last update that was logged: over-optimisation (Gao et al. 2022, arXiv:2210.10760) shows there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
SHARED = ("base", "sft", "reward")
COLOURS = {"sft": "#555555", "dpo": "#1f77b4", "ppo": "#d62728", "rloo": "#2ca02c", "gold": "#9467bd"}
SCORE = "rewards/scorer"  # the reward model's mean score of an update's replies, in the log
GOLD = {"function": "data/quickstart/gold.py:score", "name": "gold"}
Stage = dict[str, Any]


def variants(stages: dict[str, Stage]) -> dict[str, Stage]:
    """Every setting by its name: the quickstart's own stage with one key changed."""
    found: dict[str, Stage] = {}
    for beta in (0.03, 0.1, 0.3):
        found[f"dpo-{beta:g}"] = changed(stages["dpo"], beta=beta)
    for coefficient in (0, 0.03, 0.1, 0.3):
        found[f"ppo-{coefficient:g}"] = changed(stages["ppo"], kl_coef=coefficient)
    found["ppo-critic_policy"] = changed(stages["ppo"], critic_init="policy")
    found["ppo-critic_shared"] = changed(stages["ppo"], critic="shared")
    found["gold-0.1"] = changed(stages["ppo"]) | {"rewards": [GOLD]}
    for beta in (0.05, 0.1):
        found[f"rloo-{beta:g}"] = rloo(stages["ppo"], beta)
    return found


def changed(stage: Stage, **train: Any) -> Stage:
    """A copy with other `train:` keys."""
    own = copy.deepcopy(stage)
    own["train"] |= train
    return own


def rloo(ppo: Stage, beta: float) -> Stage:
    """RLOO with PPO's prompts, scorer, rate and number of replies per update, four to each prompt."""
    own = copy.deepcopy(ppo)
    old = own["train"]
    kept = ("max_steps", "learning_rate", "temperature", "lr_scheduler_type", "warmup_steps", "logging_steps")
    own["train"] = {key: old[key] for key in kept} | {
        "num_generations": 4, "max_completion_length": old["response_length"], "beta": beta,
        "num_iterations": old["num_ppo_epochs"], "gradient_checkpointing": False,
    }  # fmt: skip
    return own | {"algorithm": "rloo"}


def train(run: Path, recipe: dict[str, Any], name: str, stage: Stage) -> tuple[Path, str]:
    """One setting's run folder and its stage there: RUN itself where it is the recipe's own, else a run of its own."""
    for own_name, own_stage in recipe["stages"].items():
        if stage == own_stage:
            return run, own_name
    name = name.replace(".", "_")  # a stage's name has no dot
    folder = run.parent / f"{run.name}-{name}"
    own = copy.deepcopy(recipe)
    evaluate = own["stages"]["evaluate"] | {"models": ["stage:sft", f"stage:{name}"]}
    own["stages"] = {key: own["stages"][key] for key in SHARED} | {name: stage, "evaluate": evaluate}
    own["seed"] = yaml.safe_load((run / "recipe.yaml").read_text()).get("seed", own["seed"])
    if not folder.exists():
        folder.mkdir()
        for key in SHARED:
            shutil.copytree(run / key, folder / key)
    path = run.parent / f"{folder.name}.yaml"
    path.write_text(yaml.safe_dump(own, sort_keys=False))
    command = [sys.executable, "-m", "alignment", "run", str(path), "--runs", str(run.parent), "--run", folder.name]
    subprocess.run([*command, "--quiet"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder, name


def read(folder: Path, stage: str, name: str) -> dict[str, Any]:
    """One model's place in the figure."""
    metrics = json.loads((folder / "evaluate" / "metrics.json").read_text())
    keys = ("gold", "gold_low", "gold_high", "kl", "facts", "win_rate", "length")
    scores = [round(line[SCORE], 4) for line in log_lines(folder / stage) if SCORE in line]
    said = {"first_score": scores[0], "last_score": scores[-1]} if scores else {}
    return {"name": name} | {key: round(metrics.get(f"{key}/{stage}", 0.0), 4) for key in keys} | said


def log_lines(stage: Path) -> list[dict[str, Any]]:
    """What a stage logged."""
    return [json.loads(line) for line in (stage / "log.jsonl").read_text().splitlines()]


def draw(points: list[dict[str, Any]]) -> str:
    """The figure as SVG: KL to the right (as its square root), gold upwards, the interval of gold as a bar."""
    wide, high, left, top = 640, 400, 60, 20
    most = max(p["kl"] for p in points) * 1.15 or 1.0
    low, top_gold = min(p["gold_low"] for p in points), max(p["gold_high"] for p in points)

    def x(kl: float) -> float:
        return left + math.sqrt(max(kl, 0.0) / most) * (wide - left - 20)

    def y(gold: float) -> float:
        return top + (top_gold - gold) / (top_gold - low) * (high - top - 50)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{wide}" height="{high}" font-family="sans-serif" '
        'font-size="12">',
        f'<rect width="{wide}" height="{high}" fill="white"/>',
        f'<path d="M{left} {top}V{high - 50}H{wide - 20}" fill="none" stroke="black"/>',
        f'<text x="{(wide + left) / 2}" y="{high - 12}" text-anchor="middle">KL to SFT (nats per reply)</text>',
        f'<text x="16" y="{high / 2}" transform="rotate(-90 16 {high / 2})" text-anchor="middle">gold reward</text>',
    ]
    for step in range(6):
        kl, gold = most * (step / 5) ** 2, low + (top_gold - low) * step / 5
        parts.append(f'<text x="{x(kl):.0f}" y="{high - 34}" text-anchor="middle">{kl:.1f}</text>')
        parts.append(f'<text x="{left - 6}" y="{y(gold) + 4:.0f}" text-anchor="end">{gold:.2f}</text>')
    taken: list[tuple[float, float]] = []  # where labels are
    for p in sorted(points, key=lambda p: -p["gold"]):
        at, height = x(p["kl"]) + 7, y(p["gold"]) + 4
        while any(abs(at - other) < 100 and abs(height - line) < 12 for other, line in taken):
            height += 2
        taken.append((at, height))
        colour = COLOURS[p["name"].partition("-")[0]]
        parts.append(
            f'<path d="M{x(p["kl"]):.1f} {y(p["gold_low"]):.1f}V{y(p["gold_high"]):.1f}" stroke="{colour}"/>'
            f'<circle cx="{x(p["kl"]):.1f}" cy="{y(p["gold"]):.1f}" r="4" fill="{colour}"/>'
            f'<text x="{at:.1f}" y="{height:.1f}" fill="{colour}">{p["name"]}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Run what is missing, then write numbers and figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--only", nargs="+", help="these settings, dpo-0.1 for example; default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, each with one thread if above 1")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "frontier")
    options = parser.parse_args()
    run, recipe = options.run.absolute(), yaml.safe_load((ROOT / "recipes" / "quickstart.yaml").read_text())
    if options.jobs > 1:
        os.environ["OMP_NUM_THREADS"] = "1"
    chosen = {name: stage for name, stage in variants(recipe["stages"]).items() if name in (options.only or [name])}
    with ThreadPoolExecutor(options.jobs) as pool:
        places = list(pool.map(lambda name: train(run, recipe, name, chosen[name]), chosen))
    points = [read(run, "sft", "sft"), *(read(*place, name) for name, place in zip(chosen, places, strict=True))]
    options.out.with_suffix(".json").write_text(json.dumps(points, indent=1) + "\n")
    options.out.with_suffix(".svg").write_text(draw(points))
    for p in points:
        print(p)


if __name__ == "__main__":
    main()
