"""What the cache of the hub on this machine holds, read as files: nothing is downloaded, and nothing heavy imported.

A hub name without a commit is whatever its newest one is: another model tomorrow. A stage resolves it once, loads
everything from that commit, goes on from it after a stop, and records it.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from alignment.recipe.schema import is_commit


def snapshot(name: str, revision: str | None) -> Path | None:
    """The folder of a hub model's files; None if nothing of that revision is here."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = Path(os.environ.get("HF_HUB_CACHE") or Path(home, "hub")).expanduser()
    folder = cache / f"models--{name.replace('/', '--')}"
    wanted = revision or "main"
    with contextlib.suppress(OSError):  # a commit is its own name
        wanted = (folder / "refs" / wanted).read_text(encoding="utf-8").strip()
    found = folder / "snapshots" / wanted
    return found if found.is_dir() else None


def advice(name: str, revision: str | None = None) -> str:
    """What to say of a hub name that no commit pins: what it stands for here, and how it is pinned."""
    found = snapshot(name, revision)
    commit = found.name if found is not None and is_commit(found.name) else "COMMIT"
    what = "its newest commit is loaded" if revision is None else f"whatever {revision!r} is by then is loaded"
    return f"{name} is not pinned: {what}; for a result that can be repeated write `{name}@{commit}`"
