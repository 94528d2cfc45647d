"""What the checks of the first batch cost: seconds, share of a run of ten minutes, and how many steps they are worth.

python benchmarks/checks.py [--hidden 384 --layers 8] [--steps 6]
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/quickstart.yaml"
STAGES = ("base", "sft", "reward", "dpo")


def main() -> None:
    """Run a few steps of the quickstart's stages, in a larger model, and print what their manifests say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args()
    config = "stages.base.model.init.config"
    changes = [f"{config}.hidden_size={given.hidden}", f"{config}.num_hidden_layers={given.layers}",
               f"{config}.intermediate_size={given.hidden * 8 // 3}", f"{config}.num_attention_heads=6",
               f"{config}.num_key_value_heads=6"]  # fmt: skip
    for stage in STAGES:
        changes += [f"stages.{stage}.train.{key}" for key in (f"max_steps={given.steps}", "logging_steps=1")]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "alignment", "run", RECIPE, "--until", STAGES[-1], "--runs", folder]
        subprocess.run([*command, *(part for change in changes for part in ("--set", change))], cwd=ROOT, check=True)
        for stage in STAGES:
            place = Path(folder) / "quickstart" / stage
            checks = json.loads((place / "manifest.json").read_text())["checks"]
            lines = [json.loads(line) for line in (place / "log.jsonl").read_text().splitlines()]
            moments = [line["time"]["seconds"] for line in lines if "loss" in line]
            step = statistics.median(b - a for a, b in itertools.pairwise(moments))
            seconds = checks["seconds"]
            print(f"{stage:8} {len(checks['passed']):2} checks in {seconds:6.2f} s: {seconds / 6:5.2f} % of ten "
                  f"minutes, {seconds / step:5.1f} steps of {step:.2f} s")  # fmt: skip


if __name__ == "__main__":
    main()
