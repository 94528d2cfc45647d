"""How long a dry run takes beside the imports that no planner can do without, in turns.

python benchmarks/planner.py [--times 15]
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPE = "recipes/quickstart.yaml"
COMMANDS = {
    "python -c 'import yaml, pydantic'": ["-c", "import yaml, pydantic"],
    "alignment --help": ["-m", "alignment", "--help"],
    f"alignment run {RECIPE} --dry-run": ["-m", "alignment", "run", RECIPE, "--dry-run"],
    "python -c 'import trl.trainer.dpo_config'": ["-c", "import trl.trainer.dpo_config"],
}


def once(arguments: list[str]) -> tuple[float, float]:
    """Wall and processor seconds of one fresh process."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return time.perf_counter() - started, processor


def main() -> None:
    """Run the commands in turns and print medians."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=15)
    times = parser.parse_args().times
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in COMMANDS}
    for turn in range(times + 1):
        for name, arguments in COMMANDS.items():
            result = once(arguments)
            if turn:  # the first turn warms the file cache
                taken[name].append(result)
    print(f"median of {times}, in turns\n\n| command | wall | processor |\n|---|---|---|")
    for name, results in taken.items():
        wall, processor = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"| `{name}` | {wall:.2f} s | {processor:.2f} s |")


if __name__ == "__main__":
    main()
