"""A user's Python function, named in a recipe as `pkg.mod:fn` or `path/file.py:fn`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from alignment.errors import RecipeError


def load_hook(hook: str, place: str) -> Callable[..., Any]:
    """Import a hook; `place` is the key of the recipe that names it, for the message.

    Raises:
        RecipeError: no such file, module or function, or importing it fails.
    """
    where, _, name = hook.rpartition(":")
    try:
        module = _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
    except Exception as error:  # a user's module may raise anything while it is imported
        raise RecipeError(f"{place}: {hook}: cannot be imported ({described(error)})") from error
    function: Any = getattr(module, name, None)
    if not callable(function):
        raise RecipeError(f"{place}: {hook}: {where} has no function {name}")
    found: Callable[..., Any] = function
    return found


def _import_file(path: Path) -> ModuleType:
    """Import a Python file under a name of its own."""
    name = f"alignment_hook_{path.resolve().as_posix().replace('/', '_').removesuffix('.py')}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


def described(error: Exception) -> str:
    """An exception of the user's code in one line."""
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
