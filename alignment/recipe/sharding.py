"""What a DeepSpeed file must not say, and what it must: each of these ends late or wrong, so it is refused early."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def deepspeed_problems(file: str) -> Iterator[str]:
    """Lines on a DeepSpeed file, without its place; a file that is no JSON object is reported elsewhere."""
    try:
        content = json.loads(Path(file).expanduser().read_bytes())
    except (OSError, ValueError):
        return
    if not isinstance(content, dict):
        yield f"{file}: is not a JSON object"
        return
    for key, place in (("optimizer", "train.optim"), ("scheduler", "train.lr_scheduler_type")):
        if key in content:
            yield f"{file}: `{key}` belongs to the recipe (`{place}`), which two of them would contradict; remove it"
    if _section(content, "fp16").get("enabled") is True:
        yield f"{file}: fp16 is not supported; remove the section, and choose bfloat16 or float32 in precision.compute"
    zero = _section(content, "zero_optimization")
    if zero.get("stage") == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:
        yield (
            f"{file}: ZeRO-3 saves no weights without `stage3_gather_16bit_weights_on_model_save: true`, and the stage "
            "could publish nothing; set it"
        )


def _section(content: dict[str, Any], key: str) -> dict[str, Any]:
    found = content.get(key)
    return found if isinstance(found, dict) else {}
