"""A disk that refuses, recognised through whatever wrote to it, and told in one line."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignment.errors import StorageError
from alignment.pipeline import space

# torch's archive writer and C++ streams lose the reason, safetensors keeps it in its text.
FULL = re.compile(r"No space left on device|Disk quota exceeded|os error (28|122)")
FAILED = re.compile(
    r"Input/output error|Read-only file system|os error (5|30)\b|Stale file handle|inline_container\.cc|"
    r"PytorchStreamWriter|iostream error|unexpected pos"
)
UNTOLD = "a file could not be written"


@contextmanager
def told(folder: Path, needed: float) -> Iterator[None]:
    """Turn what a full or failing disk makes of a save into one StorageError.

    Args:
        folder: what is written to.
        needed: bytes of a checkpoint, for the message.
    """
    try:
        yield
    except Exception as error:
        found = reason(error)
        if found is None:
            raise
        text, full = found
        if text == UNTOLD:  # there it matters whether there is room
            with suppress(OSError):
                full = shutil.disk_usage(folder).free < needed
        raise StorageError(space.told(folder, text, full=full, needed=needed)) from error


def reason(error: BaseException) -> tuple[str, bool] | None:
    """What the disk said, and whether it is full; None if this is no error of storage."""
    said: tuple[str, bool] | None = None
    seen: BaseException | None = error
    while seen is not None:  # the first cause is the one that knows
        text = str(seen)
        if isinstance(seen, OSError) and seen.errno is not None and not isinstance(seen, FileNotFoundError):
            said = (seen.strerror or text, seen.errno in space.FULL)
        elif full := FULL.search(text):
            said = ("No space left on device" if "28" in full[0] else full[0], True)
        elif failed := FAILED.search(text):
            named = failed[0] if failed[0][0].isupper() and "Pytorch" not in failed[0] else UNTOLD
            said = said or (named, False)
        seen = seen.__cause__ or seen.__context__
    return said


def checkpoint_bytes(trainer: Any) -> float:
    """About how many bytes a checkpoint of this trainer takes."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    trained = sum(size for size, flag in sizes if flag)
    adapters = hasattr(trainer.model, "peft_config")
    saved = trained if adapters else sum(size for size, _ in sizes)
    return space.checkpoint_bytes(saved, trained, engine=trainer.is_deepspeed_enabled)
