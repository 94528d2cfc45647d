"""Files that are whole or absent, and what they hash to.

Every record of a run is written by `write_text` or `write_json`: a temporary file beside it, fsync, rename, fsync of
the folder. A reader therefore sees the old record or the new one, never half of one, and a kill leaves at most a hidden
temporary file, which the next holder of the stage's lock sweeps away.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from alignment.errors import DataError, StorageError, UserError

HASH_MEMO = Path(".cache") / "hashes.json"  # under the runs folder
_MEMO_LIMIT = 20_000  # entries; beyond it the memo starts anew
_RACY_NS = 100_000_000  # a file changed less than this ago may change again within one tick of its time stamp


@contextmanager
def storage(path: Path, doing: str = "write") -> Iterator[None]:
    """Turn an operating system error about `path` into a `StorageError` of one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason += "; free some space and run the same command again"
        elif error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            reason += "; name another place with --runs DIR"
        raise StorageError(f"{path}: cannot {doing}: {reason}") from error


def canonical(value: Any) -> bytes:
    """The one byte sequence of a JSON value: sorted keys, no blanks, UTF-8. NaN and infinity are a ValueError."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def digest(value: Any) -> str:
    """SHA-256 of the canonical JSON of a value, in hexadecimal."""
    return hashlib.sha256(canonical(value)).hexdigest()


def write_text(path: Path, text: str) -> None:
    """Replace `path` by `text` in one step that survives a kill and a power cut. The mode follows the umask."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with storage(path):
        try:
            # Not tempfile: its files are 0600 whatever the umask says, and the next stage may be another user's.
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by the JSON of `value` (sorted keys, indent 1); numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(value), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """JSON has no NaN; a metric that is one must not cost the record it stands in."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json(path: Path, *, schema: int, error: type[UserError]) -> dict[str, Any] | None:
    """Read a record; None if there is none. Raises `error` when it is damaged or of a schema that we do not know."""
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as failure:
        raise StorageError(f"{path}: cannot read: {failure.strerror}") from failure
    try:
        value = json.loads(raw)
    except ValueError as failure:  # also UnicodeDecodeError
        raise error(f"{path}: damaged: not JSON ({failure})") from failure
    except RecursionError:
        raise error(f"{path}: damaged: nested too deeply") from None
    if not isinstance(value, dict):
        raise error(f"{path}: damaged: a JSON object was expected, found {type(value).__name__}")
    if value.get("schema") != schema:
        raise error(f"{path}: schema {value.get('schema')!r}: this version of alignment reads schema {schema}")
    return value


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: Path) -> None:
    """Remove the temporary files that a killed writer left in `folder`."""
    for leftover in folder.glob(".*.tmp"):
        with suppress(OSError):
            leftover.unlink()


def settle(folder: Path) -> dict[str, dict[str, Any]]:
    """Make everything under `folder` durable and readable as the umask says, and return `{name: {size, sha256}}`.

    The hash is taken from a second read, after fsync. Modes are set because safetensors writes through a temporary
    file of mode 0600 (huggingface/safetensors#782; drop this when that is fixed).
    """
    table = {}
    with storage(folder):
        mode = 0o666 & ~_umask()
        for path in sorted(folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            path.chmod(mode)
            with open(path, "rb") as file:
                os.fsync(file.fileno())
                table[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        for inner in (*(path for path in folder.rglob("*") if path.is_dir() and not path.is_symlink()), folder):
            sync_folder(inner)
    return table


def fault(
    folder: Path,
    table: dict[str, dict[str, Any]],
    *,
    deep: bool,
    hash_of: Callable[[Path], str] | None = None,
) -> str | None:
    """What is wrong with the files of `table` under `folder`: a reason, or None. `deep` compares contents too.

    Args:
        hash_of: gives a file's hash; default: the file is read.
    """
    for name, entry in sorted(table.items()):
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts or path.is_symlink():
            return f"{name}: leads out of the folder"
        try:
            size = path.stat().st_size
            if size != entry["size"]:
                return f"{name}: {size} bytes, recorded were {entry['size']}"
            if deep and (hash_of or _sha256)(path) != entry["sha256"]:
                return f"{name}: content differs from the recorded hash"
        except FileNotFoundError:
            return f"{name}: missing"
        except OSError as error:
            return f"{name}: cannot read: {error.strerror}"
    return None


def _umask() -> int:
    """The process's umask, read without setting it (setting is seen by every thread)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- hashes of inputs, memoised ----------------------------------------------------------------------------------------


def file_hash(path: Path, runs: Path) -> str:
    """SHA-256 of a file's content, memoised under `runs` by device, inode, size and time stamps.

    Raises:
        DataError: the file cannot be read, or changes while it is read.
    """
    known = known_hash(path, runs)
    if known is not None:
        return known
    try:
        before = _identity(path)
        value = _sha256(path)
        after = _identity(path)
    except OSError as error:
        raise DataError(f"{path}: cannot read: {error.strerror}") from error
    if before != after:
        raise DataError(f"{path}: changed while it was read")
    if time.time_ns() - path.stat().st_ctime_ns > _RACY_NS:
        memo = _read_memo(runs)
        memo = {} if len(memo) >= _MEMO_LIMIT else memo
        with storage(runs / HASH_MEMO):
            (runs / HASH_MEMO).parent.mkdir(parents=True, exist_ok=True)
        # Two planners may write at the same time: the later one wins, and the other's entries are hashed once more.
        write_json(runs / HASH_MEMO, {**memo, before: value})
    return value


def known_hash(path: Path, runs: Path) -> str | None:
    """The memoised hash of a file, or None if it was not hashed since it last changed."""
    try:
        return _read_memo(runs).get(_identity(path))
    except OSError:
        return None


def _identity(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev}:{stat.st_ino}:{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}"


def _read_memo(runs: Path) -> dict[str, str]:
    """The memo; anything unreadable counts as empty, because it can be made again."""
    try:
        memo = json.loads((runs / HASH_MEMO).read_bytes())
    except (OSError, ValueError):
        return {}
    return memo if isinstance(memo, dict) else {}
