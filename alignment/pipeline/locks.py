"""One writer at a time: a lock file that the operating system frees when its holder dies.

`flock` decides; the content only tells who holds it. A holder that leaves in order empties the file, so content behind
a free lock means that its writer was killed. On a network file system `flock` reaches other hosts only where the mount
supports it (NFS from Linux 2.6.12 on; Lustre with `-o flock`).
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignment.errors import LockedError
from alignment.pipeline.files import storage, sweep

LOCK = "lock"


@contextmanager
def lock(folder: Path, attempt: str = "", *, say: Callable[[str], None] = print) -> Iterator[None]:
    """Hold `folder/lock` while the block runs; a killed holder's lock is taken over, and `say` is told.

    Raises:
        LockedError: another live process holds it; the text names its pid and host.
        StorageError: the lock file cannot be written.
    """
    path = folder / LOCK
    with storage(path):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        if not _flock(descriptor, path):
            raise LockedError(f"{folder}: in use by {_who(_holder(path))}; wait for it, or stop it")
        killed = _content(path)
        if killed:
            say(f"{folder}: taken over from {_who(killed)}, which was killed")
        sweep(folder)
        with storage(path):
            _write(descriptor, {"pid": os.getpid(), "host": socket.gethostname(), "start": _now(), "attempt": attempt})
        try:
            yield
        finally:
            with suppress(OSError):  # a failing disk: the block's own error says so
                os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)


def holder(folder: Path) -> dict[str, Any] | None:
    """Who holds `folder/lock` now (pid, host, start, attempt; empty if it did not say), or None. Takes nothing over."""
    path = folder / LOCK
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return None if _flock(descriptor, path) else _holder(path)
    finally:
        os.close(descriptor)


def refuse_if_held(folder: Path) -> None:
    """Raise LockedError, naming the holder, if another live process holds `folder/lock`."""
    found = holder(folder)
    if found is not None:
        raise LockedError(f"{folder}: in use by {_who(found)}; wait for it, or stop it")


def _flock(descriptor: int, path: Path) -> bool:
    """Try to take the lock; False if somebody has it. A file system without locks is a StorageError."""
    with storage(path, "lock"):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _holder(path: Path) -> dict[str, Any]:
    """The content of a held lock; its holder may still be writing it, so wait for that a moment."""
    for _ in range(20):
        content = _content(path)
        if content:
            return content
        time.sleep(0.01)
    return {}


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(descriptor: int, content: dict[str, Any]) -> None:
    """In place, not by rename: the lock is on this very file."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, json.dumps(content, sort_keys=True).encode(), 0)
    os.fsync(descriptor)


def _who(content: dict[str, Any]) -> str:
    if not content:
        return "another process"
    return f"process {content.get('pid')} on {content.get('host')} (since {content.get('start')})"


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
