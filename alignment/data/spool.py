"""Rows, and numbers about rows, that memory need not hold: written once in order, read back by number.

A `Spool` keeps what pickle can write, `Numbers` keeps rows of one numpy array; both lie in an unnamed temporary file
(of a spool what goes beyond `HELD` bytes), so that a stage of ten million rows needs no more memory than one of ten
thousand but for a few bytes a row. `View` shows the rows of a sequence as something else when they are asked for.
"""

from __future__ import annotations

import pickle
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar, overload

import numpy as np

from alignment.errors import StorageError

HELD = 64 * 2**20  # bytes of a spool that stay in memory

T = TypeVar("T")
U = TypeVar("U")


@contextmanager
def _room() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"{tempfile.gettempdir()}: cannot hold the rows: {error.strerror or error}; name another place with TMPDIR"
        ) from error


class Spool(Sequence[T], Generic[T]):
    """A list that can only grow, of things that are pickled; 8 bytes of memory for each."""

    def __init__(self, items: Iterable[T] = ()) -> None:
        self._file = tempfile.SpooledTemporaryFile(HELD)  # noqa: SIM115 (it lives as long as the spool)
        weakref.finalize(self, self._file.close)
        self._ends = array("q", [0])
        self._at_end = True
        self.extend(items)

    def append(self, item: T) -> None:
        """Add one thing."""
        data = pickle.dumps(item, pickle.HIGHEST_PROTOCOL)
        with _room():
            if not self._at_end:
                self._file.seek(self._ends[-1])
                self._at_end = True
            self._file.write(data)
        self._ends.append(self._ends[-1] + len(data))

    def extend(self, items: Iterable[T]) -> None:
        """Add several things."""
        for item in items:
            self.append(item)

    def __len__(self) -> int:
        return len(self._ends) - 1

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        begin, end = self._ends[index], self._ends[index + 1]
        with _room():
            self._at_end = False
            self._file.seek(begin)
            data = self._file.read(end - begin)
        found: T = pickle.loads(data)  # of this process's own making
        return found


class Numbers:
    """The rows of one numpy array, added in batches; no memory but that of the array when it is asked for.

    Args:
        dtype, shape: of the array and of one row.
    """

    def __init__(self, dtype: Any, *shape: int) -> None:
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as this)
        weakref.finalize(self, self._file.close)
        self._dtype, self._shape = np.dtype(dtype), shape
        self._count = 0

    def add(self, rows: Any) -> None:
        """Add rows, (n, *shape)."""
        values = np.ascontiguousarray(rows, self._dtype).reshape(-1, *self._shape)
        with _room():
            self._file.seek(0, 2)
            self._file.write(values.tobytes())
        self._count += len(values)

    def __len__(self) -> int:
        return self._count

    @property
    def array(self) -> Any:
        """All rows: a map of the file, of which the system keeps in memory what is used and there is room for."""
        if not self._count:
            return np.empty((0, *self._shape), self._dtype)
        with _room():
            self._file.flush()
            return np.memmap(self._file, self._dtype, "r", shape=(self._count, *self._shape))


class View(Sequence[U], Generic[T, U]):
    """The items of a sequence as a function shows them, when they are asked for; a slice is a list."""

    def __init__(self, items: Sequence[T], shown: Callable[[T], U]) -> None:
        self._items, self._shown = items, shown

    def __len__(self) -> int:
        return len(self._items)

    @overload
    def __getitem__(self, index: int) -> U: ...
    @overload
    def __getitem__(self, index: slice) -> list[U]: ...
    def __getitem__(self, index: int | slice) -> U | list[U]:
        if isinstance(index, slice):
            return [self[at] for at in range(*index.indices(len(self)))]
        return self._shown(self._items[index])
