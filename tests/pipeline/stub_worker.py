"""Stands in for `python -m alignment.train`: leaves the records of a worker, without training anything.

`behave` in the working directory says how: lines `STAGE WORD`, where WORD is `fail`, `nan`, `preempt` or `die`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from alignment.pipeline import runs
from alignment.pipeline.plan import read_stage


def main() -> int:
    spec = read_stage(Path(sys.argv[1]))
    with open("trace", "a") as trace:
        trace.write(f"{spec.stage}\n")
    print(f"stub works on {spec.stage}", flush=True)
    lines = Path("behave").read_text().splitlines() if Path("behave").exists() else []
    word = dict(line.split() for line in lines).get(spec.stage, "done")
    with runs.lock_stage(spec.output, spec.attempt):
        runs.write_status(spec.output, attempt=spec.attempt, state="running", code=0, step=2, steps=4)
        checkpoint = spec.output / "checkpoint-2"
        checkpoint.mkdir(exist_ok=True)
        (checkpoint / "model.safetensors").write_bytes(b"half trained")
        runs.seal(checkpoint, step=2, world_size=1, fingerprint_sha256=spec.fingerprint_sha256)
        if word == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if word == "sleep":
            signal.pause()
        ends = {
            "fail": ("failed", 1, "it broke"),
            "nan": ("failed", 6, "loss is nan"),
            "preempt": ("preempted", 85, "saved"),
        }
        if word in ends:
            state, code, message = ends[word]
            runs.write_status(spec.output, attempt=spec.attempt, state=state, code=code, message=message)
            return 1
        (spec.output / "model.safetensors").write_bytes(f"{spec.stage} of {spec.attempt}".encode())
        files = {name: entry for name, entry in runs.settle(spec.output).items() if name.endswith(".safetensors")}
        parents = {
            name: {"weights_sha256": (runs.read_manifest(folder) or {})["weights_sha256"]}
            for name, folder in spec.parents.items()
        }
        runs.write_manifest(spec.output, {
            "run": spec.run, "stage": spec.stage, "algorithm": spec.config.algorithm, "kind": "causal-lm",
            "fingerprint": spec.fingerprint, "fingerprint_sha256": spec.fingerprint_sha256, "files": files,
            "weights_sha256": runs.weights_sha256(files), "metrics": {"eval_loss": 1.25}, "parents": parents,
            "forced": list(spec.forced), "time": {"seconds": 1.5},
        })  # fmt: skip
        runs.write_status(spec.output, attempt=spec.attempt, state="done", code=0)
    return 0


sys.exit(main())
