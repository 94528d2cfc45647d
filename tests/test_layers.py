"""Imports point down only, and the planner costs no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# What each part may import of the toolkit, outside functions and inside them.
BELOW = {
    "errors": set(),
    "recipe": {"errors"},
    "pipeline": {"errors", "recipe"},
    "data": {"errors", "recipe", "pipeline"},
    "models": {"errors", "recipe", "pipeline", "data"},
    "evaluation": {"errors", "recipe", "pipeline", "data", "models"},
    "training": {"errors", "recipe", "pipeline", "data", "models", "evaluation"},
    "serving": {"errors", "recipe", "pipeline", "data", "models"},
}
HEAVY = {"torch", "transformers", "trl", "peft", "datasets", "accelerate", "deepspeed", "numpy", "pyarrow"}
TORCH_FREE = (
    "recipe",
    "pipeline",
    "cli.py",
    "commands.py",
    "__main__.py",
    "environment.py",
    "checking.py",
    "verifying.py",
    "statuscli.py",
    "datacli.py",
    "errors.py",
    "__init__.py",
)


def modules(root: Path) -> list[Path]:
    return sorted((root / "alignment").rglob("*.py"))


def imported(path: Path, *, top_only: bool) -> set[str]:
    """Names of modules imported in a file; with `top_only` not those inside functions or `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    if top_only:
        nodes = list(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_imports_point_down(root: Path) -> None:
    wrong = []
    for path in modules(root):
        part = path.relative_to(root / "alignment").parts[0].removesuffix(".py")
        if part not in BELOW:
            continue
        for name in imported(path, top_only=part == "evaluation"):
            if name.startswith("alignment."):
                target = name.split(".")[1]
                if target not in BELOW[part] | {part}:
                    wrong.append(f"{path.relative_to(root)} imports {name}")
    assert wrong == []


def test_the_planner_imports_nothing_heavy_at_the_top(root: Path) -> None:
    wrong = []
    for path in modules(root):
        if path.relative_to(root / "alignment").parts[0] in TORCH_FREE:
            heavy = {name.split(".")[0] for name in imported(path, top_only=True)} & HEAVY
            wrong += [f"{path.relative_to(root)} imports {name}" for name in heavy]
    assert wrong == []


@pytest.mark.parametrize("command", [["--help"], ["run", "recipes/quickstart.yaml", "--dry-run"], ["runs"]])
def test_the_planner_runs_without_torch(command: list[str], root: Path, tmp_path: Path) -> None:
    code = (
        "import sys, runpy\n"
        f"sys.argv = ['alignment', *{command!r}]\n"
        "try:\n    runpy.run_module('alignment', run_name='__main__')\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"heavy = sorted(set(sys.modules) & {HEAVY!r})\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_no_file_is_long(root: Path) -> None:
    assert [f"{p.relative_to(root)}" for p in modules(root) if len(p.read_text().splitlines()) > 450] == []
