"""`alignment env`: versions, devices, and what is missing for what. Nothing heavy is imported.

Versions come from package metadata, devices from /dev and /proc, so the answer takes a tenth of a second on a login
node. `devices` asks torch as well.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignment.pipeline.launch import cpu_has_amx, gpus

PACKAGES = (
    "alignment-toolkit", "torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "datasets", "tokenizers",
    "safetensors", "bitsandbytes",
)  # fmt: skip

# (needed for, import name or program, is it a program, how to get it)
NEEDS = (
    ("launch.deepspeed", "deepspeed", False, "pip install deepspeed"),
    ("model.quantization", "bitsandbytes", False, "pip install 'alignment-toolkit[quant]'"),
    ("DeepSpeed's CPU Adam (offload, and DeepSpeed on CPU)", "g++", True, "apt-get install g++"),
    ("DeepSpeed's CPU Adam (offload, and DeepSpeed on CPU)", "ninja", True, "pip install ninja"),
    ("model.attention: flash_attention_2, and packing", "flash_attn", False, "pip install flash-attn"),
    ("train.use_liger_kernel", "liger_kernel", False, "pip install liger-kernel"),
    ("report_to: [tensorboard]", "tensorboard", False, "pip install tensorboard"),
    ("report_to: [wandb]", "wandb", False, "pip install wandb"),
    ("report_to: [trackio]", "trackio", False, "pip install trackio"),
)


def environment(*, devices: bool = False, env: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What this machine has: `{python, packages, cpu, gpus, missing: [{what, for, remedy}]}`."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "cpu": _cpu(),
        "gpus": _gpus(env),
        "missing": [
            {"what": what, "for": purpose, "remedy": remedy}
            for purpose, what, program, remedy in NEEDS
            if not _present(what, program)
        ],
    }
    if devices:
        found["torch"] = _torch()
    return found


def lines(found: Mapping[str, Any]) -> list[str]:
    """The same for a person."""
    cpu = found["cpu"]
    some = f"faster for large products only ({cpu['bfloat16']})" if cpu["bfloat16"] else "slow"
    fast = "fast (amx_bf16)" if cpu_has_amx() else f"{some}: precision.compute auto means float32 here"
    text = [f"python      {found['python']} on {found['platform']}"]
    text += [f"{name:<18}{version or 'not installed'}" for name, version in found["packages"].items()]
    text += [f"cpu         {cpu['cores']} cores, {cpu['memory_gib']} GiB; {cpu['model']}; bfloat16 is {fast}"]
    text += [f"gpu         {gpu}" for gpu in found["gpus"]] or ["gpu         none"]
    text += [f"torch       {line}" for line in found.get("torch", [])]
    for entry in found["missing"]:
        text.append(f"missing     {entry['what']}, for {entry['for']}: {entry['remedy']}")
    return text


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _present(what: str, program: bool) -> bool:
    if program and shutil.which(what) is not None:
        return True
    return importlib.util.find_spec(what) is not None if what.isidentifier() else False


def _cpu() -> dict[str, Any]:
    """Cores that we may use, memory, and which instructions there are for bfloat16, if any."""
    info = _read("/proc/cpuinfo")
    flags = set((re.search(r"^(?:flags|Features)\s*:(.*)$", info, re.MULTILINE) or [" ", " "])[1].split())
    model = re.search(r"^model name\s*:\s*(.*)$", info, re.MULTILINE)
    total = re.search(r"^MemTotal:\s*(\d+)", _read("/proc/meminfo"), re.MULTILINE)
    return {
        "model": model[1] if model else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(total[1]) / 2**20, 1) if total else None,
        "bfloat16": next((flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags), None),
    }


def _gpus(env: Mapping[str, str]) -> list[str]:
    """One line for each visible GPU; the model's name where the driver tells it."""
    names = [
        match[1].strip()
        for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
        if (match := re.search(r"^Model:\s*(.*)$", _read(str(path)), re.MULTILINE))
    ]
    return [f"{index}: {names[int(index)]}" if index.isdigit() and int(index) < len(names) else index
            for index in gpus(env)]  # fmt: skip


def _torch() -> list[str]:
    """What torch itself sees (this imports it)."""
    import torch

    if not torch.cuda.is_available():
        return [f"{torch.__version__}, no GPU, {torch.get_num_threads()} threads"]
    devices = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [f"{torch.__version__}, {d.name}, {d.total_memory / 2**30:.0f} GiB, {d.major}.{d.minor}" for d in devices]


def _read(path: str) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
