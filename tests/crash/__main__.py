"""Starts the crash test (`run.py`) with the faults preloaded: compiles `shim.c`, and becomes the test."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Never returns."""
    library = Path(tempfile.mkdtemp(prefix="crash-shim-")) / "shim.so"
    subprocess.run(["cc", "-O2", "-fPIC", "-shared", "-o", str(library), str(HERE / "shim.c"), "-ldl"], check=True)
    settings = {
        "LD_PRELOAD": str(library), "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "DS_ACCELERATOR": "cpu",
        "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]  # the package of this very checkout
    settings["PYTHONPATH"] = os.pathsep.join(paths)
    command = [sys.executable, str(HERE / "run.py"), *sys.argv[1:]]
    os.execve(sys.executable, command, {**os.environ, **settings})


if __name__ == "__main__":
    main()
