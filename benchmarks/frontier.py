"""Gold reward over KL in the quickstart's world: SFT, DPO for several beta, PPO for several kl_coef.

    python benchmarks/frontier.py RUN [--dpo 0.02 0.05 0.2] [--ppo 0.03 0.1 0.3] [--out benchmarks/frontier]

RUN is the folder of a finished quickstart. Each setting is a run of its own beside it, which shares what does not
change and trains one stage and the evaluation. Writes the numbers (`.json`) and the figure (`.svg`), after figure 2
(left) of Rafailov et al. 2023 (arXiv:2305.18290).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
KEYS = {"dpo": "beta", "ppo": "kl_coef"}
COLOURS = {"sft": "#555555", "dpo": "#1f77b4", "ppo": "#d62728"}


def point(run: Path, stage: str, value: float) -> dict[str, Any]:
    """Gold and KL of one setting; finished runs are read, not run again."""
    folder = run.parent / f"{run.name}-{stage}-{value:g}"
    if not folder.exists():
        shutil.copytree(run, folder)
        for name in (stage, "evaluate"):
            shutil.rmtree(folder / name)
    key = f"stages.{stage}.train.{KEYS[stage]}={value}"
    command = [sys.executable, "-m", "alignment", "run", "recipes/quickstart.yaml", "--runs", str(run.parent)]
    subprocess.run([*command, "--run", folder.name, "--set", key], cwd=ROOT, check=True)
    metrics = json.loads((folder / "evaluate" / "metrics.json").read_text())
    return read(metrics, stage) | {KEYS[stage]: value}


def read(metrics: dict[str, float], stage: str) -> dict[str, Any]:
    """One model's place in the figure."""
    names = ("gold", "gold_low", "gold_high", "kl", "facts", "win_rate")
    found = {name: metrics.get(f"{name}/{stage}") for name in names}
    return {"stage": stage} | {name: round(value, 4) for name, value in found.items() if value is not None}


def draw(points: list[dict[str, Any]]) -> str:
    """The figure as SVG: KL to the right, gold upwards, the interval of gold as a bar."""
    wide, high, left, top = 560, 360, 60, 20
    most = max(p["kl"] for p in points) * 1.1 or 1.0
    low, top_gold = min(p["gold_low"] for p in points), max(p["gold_high"] for p in points)

    def x(kl: float) -> float:
        return left + kl / most * (wide - left - 20)

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
        kl, gold = most * step / 5, low + (top_gold - low) * step / 5
        parts.append(f'<text x="{x(kl):.0f}" y="{high - 34}" text-anchor="middle">{kl:.1f}</text>')
        parts.append(f'<text x="{left - 6}" y="{y(gold) + 4:.0f}" text-anchor="end">{gold:.2f}</text>')
    for p in points:
        colour, label = COLOURS[p["stage"]], p["stage"]
        if label in KEYS:
            label += f" {KEYS[label]} {p[KEYS[label]]:g}"
        parts.append(
            f'<path d="M{x(p["kl"]):.1f} {y(p["gold_low"]):.1f}V{y(p["gold_high"]):.1f}" stroke="{colour}"/>'
            f'<circle cx="{x(p["kl"]):.1f}" cy="{y(p["gold"]):.1f}" r="4" fill="{colour}"/>'
            f'<text x="{x(p["kl"]) + 7:.1f}" y="{y(p["gold"]) + 4:.1f}" fill="{colour}">{label}</text>'
        )
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    """Run what is missing, then write numbers and figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--dpo", type=float, nargs="*", default=[0.02, 0.05, 0.2])
    parser.add_argument("--ppo", type=float, nargs="*", default=[0.03, 0.1, 0.3])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "frontier")
    options = parser.parse_args()
    run = options.run.absolute()
    points = [read(json.loads((run / "evaluate" / "metrics.json").read_text()), "sft")]
    points += [point(run, stage, value) for stage in KEYS for value in getattr(options, stage)]
    options.out.with_suffix(".json").write_text(json.dumps(points, indent=1) + "\n")
    options.out.with_suffix(".svg").write_text(draw(points))
    for p in points:
        print(p)


if __name__ == "__main__":
    main()
