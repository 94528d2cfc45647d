"""What can go wrong, and the exit code that says so.

Every error a user can cause is a `UserError`: its text is one clear line (where, what was found, what to do), and it
carries the exit code with which `alignment` and the worker leave. Anything else that is raised is our own bug and
shows a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum


class ExitCode(IntEnum):
    """The exit codes of `alignment`, the same for the planner and for a worker (`status.json`)."""

    DONE = 0  # everything asked for is finished
    FAILED = 1  # a stage or a check failed
    BAD_INPUT = 2  # bad recipe or data, a changed recipe, a wrong chain, a limit passed
    NO_CHECKPOINT = 3  # checkpoints exist and none of them is whole
    STORAGE = 4  # no space, read-only, I/O error
    LOCKED = 5  # another live process holds the run
    NON_FINITE = 6  # a loss, gradient or weight is not finite
    HANG = 7  # a rank did not answer in time
    PREEMPTED = 85  # saved and left on a signal: start it again


class UserError(Exception):
    """An error whose text is meant for the person at the keyboard; `code` is the exit code."""

    code: ExitCode = ExitCode.FAILED


class RecipeError(UserError):
    """One or more problems in a recipe; `problems` holds one line for each, in file order."""

    code = ExitCode.BAD_INPUT

    def __init__(self, problems: str | Sequence[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class DataError(UserError):
    """Unusable data: an unreadable file, a wrong schema, too many dropped rows."""

    code = ExitCode.BAD_INPUT


class ChainError(UserError):
    """A stage that cannot follow its parents, or a run that differs from its recipe."""

    code = ExitCode.BAD_INPUT


class ModelError(UserError):
    """A model or tokenizer that cannot be loaded, or that read back differently after saving."""

    code = ExitCode.BAD_INPUT


class CheckpointError(UserError):
    """Checkpoints exist, and none of them is whole."""

    code = ExitCode.NO_CHECKPOINT


class StorageError(UserError):
    """The disk is full, read-only or failing."""

    code = ExitCode.STORAGE


class LockedError(UserError):
    """Another live process works on this run."""

    code = ExitCode.LOCKED


class NonFiniteError(UserError):
    """A loss, a gradient or a weight is not finite."""

    code = ExitCode.NON_FINITE


class Preempted(UserError):
    """The run saved its state and left because it was told to; the same command continues it."""

    code = ExitCode.PREEMPTED
