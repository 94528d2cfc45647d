"""The fields of upstream's configuration classes, read from their source and never imported.

Importing one class of TRL costs 8 to 13 seconds, and reading it with `ast` a tenth of one. The package is found with
a top-level `find_spec`; the module is parsed; base classes, enums and type names are followed through `from X import
Y`, also through the `__init__` of a package. An annotation becomes a type that a pydantic `TypeAdapter` checks: an enum
becomes its values, a nested dataclass a mapping, and what cannot be named without an import becomes `Any`.
"""

from __future__ import annotations

import ast
import builtins
import math
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property, reduce
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import ConfigDict, TypeAdapter, ValidationError

from alignment.errors import RecipeError

UNKNOWN: Any = type("Unknown", (), {"__repr__": lambda self: "UNKNOWN"})()  # a default that only an import would tell

_PLAIN_TYPES: dict[str, Any] = {
    **{name: getattr(builtins, name) for name in ("bool", "int", "float", "str", "dict", "list", "tuple", "object")},
    **{name: getattr(typing, name) for name in ("Any", "Dict", "List", "Tuple", "Mapping", "Sequence")},
    "object": Any,
}
_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}


@dataclass(frozen=True)
class Field:
    """One field of a configuration class.

    Attributes:
        name: the key in `train:` or `peft:`.
        annotation: the type, checkable by pydantic.
        default: its value where none is given; `UNKNOWN` where the source alone does not tell.
        choices: the allowed values where upstream lists them (an enum, or `metadata["choices"]`); else None.
    """

    name: str
    annotation: Any
    default: Any = UNKNOWN
    choices: tuple[Any, ...] | None = None

    @cached_property
    def _adapter(self) -> TypeAdapter[Any]:
        return TypeAdapter(self.annotation, config=ConfigDict(strict=True))

    def accepts(self, value: object) -> bool:
        """Tell whether a value read from YAML has this field's type, is finite, and is one of its choices."""
        if isinstance(value, float) and not math.isfinite(value):
            return False
        if self.choices is not None and value is not None and value not in self.choices:
            return False
        try:
            self._adapter.validate_python(value)
        except ValidationError:
            return False
        return True

    @property
    def expected(self) -> str:
        """The type in words: `a whole number or null`."""
        if self.choices is not None:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        return in_words(self.annotation)


def in_words(annotation: Any) -> str:
    """Say a type as a person would: `a list of text or null`."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return " or ".join(in_words(argument) for argument in arguments)
    if origin is Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if list in (origin, annotation):
        return f"a list of {in_words(arguments[0])}" if arguments else "a list"
    if tuple in (origin, annotation):
        return "a list"
    if dict in (origin, annotation):
        return "a mapping"
    return _WORDS.get(annotation, "any value")


class _Definition(NamedTuple):
    """A statement that gives a name its meaning, and the module it stands in."""

    module: str
    node: ast.stmt


def display_name(config: str) -> str:
    """`trl.trainer.dpo_config:DPOConfig` as users know it: `trl.DPOConfig`."""
    module, _, name = config.partition(":")
    return f"{module.partition('.')[0]}.{name}"


@cache
def fields(config: str) -> dict[str, Field]:
    """Read the fields that may be given to a configuration class, in the order of `dataclasses.fields`.

    Args:
        config: `package.module:Class`; the module that defines the class or one that imports it.

    Raises:
        RecipeError: the package is not installed, or has no such class.
    """
    module, _, name = config.partition(":")
    found = _find(module, name)
    if found is None or not isinstance(found.node, ast.ClassDef):
        raise RecipeError(f"the installed {module.partition('.')[0]} has no {display_name(config)}")
    return dict(_fields_of(found.module, found.node))


def _fields_of(module: str, node: ast.ClassDef) -> dict[str, Field]:
    """The fields of a class: those of its bases, last base first, overridden by its own."""
    result: dict[str, Field] = {}
    for base in reversed(node.bases):
        found = _find(module, base.id) if isinstance(base, ast.Name) else None
        if found is not None and isinstance(found.node, ast.ClassDef):
            result.update(_fields_of(found.module, found.node))
    if not _is_marked(node, "dataclass", "strict"):
        return result
    for statement in node.body:
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            field = _field(module, node, statement.target.id, statement)
            if field is not None:
                result[field.name] = field
    return result


def _field(module: str, owner: ast.ClassDef, name: str, statement: ast.AnnAssign) -> Field | None:
    """One field; None for a class variable and for what `__init__` does not take."""
    if "ClassVar" in ast.unparse(statement.annotation):
        return None
    annotation, choices = _annotation(module, statement.annotation), None
    value, given = statement.value, {}
    if isinstance(value, ast.Call):
        given = {keyword.arg: keyword.value for keyword in value.keywords}
        metadata = given.get("metadata")
        if isinstance(metadata, ast.Dict):
            for key, listed in zip(metadata.keys, metadata.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == "choices":
                    values = _literal(owner, listed)
                    choices = None if values is UNKNOWN else tuple(values)
        if _literal(owner, given.get("init")) is False:
            return None
        default = (
            _literal(owner, given["default"]) if "default" in given else _made(owner, given.get("default_factory"))
        )
    else:
        default = _literal(owner, value)
    if choices is None and get_origin(annotation) is Literal:
        choices = get_args(annotation)
    return Field(name, annotation, default, choices)


def _literal(owner: ast.ClassDef, node: ast.expr | None) -> Any:
    """The value of an expression; `UNKNOWN` where it takes more than the source.

    A name set in the class body is followed. Where it is set again under a condition (`default_optim`, by the version
    of torch), the last one counts: it stands for the newer version, and this project asks for a new one.
    """
    if isinstance(node, ast.Name):
        values = [
            inner.value
            for statement in owner.body
            for inner in ast.walk(statement)
            if isinstance(inner, ast.Assign) and any(ast.unparse(target) == node.id for target in inner.targets)
        ]
        return _literal(owner, values[-1]) if values else UNKNOWN
    try:
        return ast.literal_eval(node) if node is not None else UNKNOWN
    except ValueError:
        return UNKNOWN


def _made(owner: ast.ClassDef, factory: ast.expr | None) -> Any:
    """The value that a `default_factory` makes: `list`, `dict`, or a lambda around a literal."""
    if isinstance(factory, ast.Lambda):
        return _literal(owner, factory.body)
    if isinstance(factory, ast.Name) and factory.id in ("list", "dict"):
        return getattr(builtins, factory.id)()
    return UNKNOWN


def _annotation(module: str, node: ast.expr) -> Any:
    """The type an annotation stands for."""
    members = list(_members(node))
    if len(members) > 1:
        return _union(module, members)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            return _annotation(module, ast.parse(node.value, mode="eval").body)
        return type(None) if node.value is None else Any
    if isinstance(node, ast.Subscript):
        return _subscript(module, _last_name(node.value), node.slice)
    if isinstance(node, ast.Name):
        return _PLAIN_TYPES[node.id] if node.id in _PLAIN_TYPES else _class_type(module, node.id)
    return Any


def _members(node: ast.expr) -> Iterator[ast.expr]:
    """The members of a union, however it is written: `X | Y`, `Union[X, Y]`, `Optional[X]`."""
    if isinstance(node, ast.BinOp):
        yield from (*_members(node.left), *_members(node.right))
    elif isinstance(node, ast.Subscript) and _last_name(node.value) in ("Union", "Optional"):
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in parts:
            yield from _members(part)
        if _last_name(node.value) == "Optional":
            yield ast.Constant(None)
    else:
        yield node


def _union(module: str, members: list[ast.expr]) -> Any:
    """A union, in which an enum stands for its values: the `str` beside it is upstream's way to write them."""
    kinds = [_annotation(module, member) for member in members]
    if Any in kinds:
        return Any
    if any(isinstance(member, ast.Name) and _enum_values(module, member.id) for member in members):
        kinds = [kind for kind in kinds if kind is not str]
    return reduce(lambda left, right: Union[left, right], kinds)  # noqa: UP007 - Literal has no | at run time


def _subscript(module: str, name: str, inner: ast.expr) -> Any:
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if name == "Literal":
        return Literal[tuple(ast.literal_eval(part) for part in parts)]
    if name not in _PLAIN_TYPES:
        return Any
    return _PLAIN_TYPES[name][tuple(_annotation(module, part) for part in parts)]


def _last_name(node: ast.expr) -> str:
    """`Optional` of `typing.Optional`."""
    return ast.unparse(node).rpartition(".")[2]


def _class_type(module: str, name: str) -> Any:
    """An enum as its values, a dataclass as a mapping, anything else as `Any`."""
    values = _enum_values(module, name)
    if values:
        return Literal[values]
    found = _find(module, name)
    if found is not None and isinstance(found.node, ast.ClassDef) and _is_marked(found.node, "dataclass"):
        return dict[str, Any]
    return Any


def _enum_values(module: str, name: str) -> tuple[Any, ...]:
    """The values of an enum; empty for any other name."""
    found = _find(module, name)
    if found is None or not isinstance(found.node, ast.ClassDef):
        return ()
    if not any("Enum" in ast.unparse(base) for base in found.node.bases):
        return ()
    return tuple(
        statement.value.value
        for statement in found.node.body
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Constant)
    )


def _is_marked(node: ast.ClassDef, *marks: str) -> bool:
    """Whether a class has a decorator of one of these names."""
    return any(mark in ast.unparse(decorator) for decorator in node.decorator_list for mark in marks)


def _find(module: str, name: str) -> _Definition | None:
    """The class, or other statement, that a name stands for in a module, followed through its imports."""
    for _ in range(8):  # as far as a re-export goes; a circle of imports ends here
        node = _names(module).get(name)
        if not isinstance(node, ast.ImportFrom):
            return _Definition(module, node) if node is not None else None
        target = node.module or ""
        if node.level:
            package = module if _is_package(module) else module.rpartition(".")[0]
            for _ in range(node.level - 1):
                package = package.rpartition(".")[0]
            target = f"{package}.{target}".strip(".")
        alias = next(alias for alias in node.names if (alias.asname or alias.name) == name)
        module, name = target, alias.name
    return None


@cache
def _names(module: str) -> dict[str, ast.stmt]:
    """What each top-level name of a module is: a class, an import or an assignment; `if` and `try` are looked into."""
    path = _source(module)
    if path is None:
        return {}
    names: dict[str, ast.stmt] = {}
    for statement in _flat(ast.parse(path.read_text(encoding="utf-8")).body):
        if isinstance(statement, ast.ClassDef):
            names[statement.name] = statement
        elif isinstance(statement, ast.ImportFrom):
            names.update({alias.asname or alias.name: statement for alias in statement.names})
        elif isinstance(statement, ast.Assign):
            for target in statement.targets:
                if isinstance(target, ast.Name):
                    names.setdefault(target.id, statement)
    return names


def _flat(statements: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in statements:
        if isinstance(statement, ast.If | ast.Try):
            yield from _flat([*statement.body, *statement.orelse, *getattr(statement, "finalbody", [])])
        else:
            yield statement


def _is_package(module: str) -> bool:
    path = _source(module)
    return path is not None and path.name == "__init__.py"


@cache
def _source(module: str) -> Path | None:
    """The source file of a module, found without importing anything; None where there is none."""
    top, *rest = module.split(".")
    spec = find_spec(top)
    if spec is None or spec.origin is None:
        return None
    base = Path(spec.origin).parent.joinpath(*rest)
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.is_file()), None)


def model_config(model_type: str) -> str | None:
    """The configuration class of a Transformers `model_type`, as `package.module:Class`; None where there is none."""
    name = model_type.replace("-", "_")
    if name not in model_types():
        return None
    module = f"transformers.models.{name}.configuration_{name}"
    for class_name, node in _names(module).items():
        if isinstance(node, ast.ClassDef) and any(
            ast.unparse(statement) == f"model_type = {model_type!r}" for statement in node.body
        ):
            return f"{module}:{class_name}"
    return None


@cache
def model_types() -> tuple[str, ...]:
    """The names of the architectures of the installed Transformers (their folders)."""
    root = _source("transformers.models")
    return tuple(sorted(path.name for path in root.parent.iterdir() if path.is_dir())) if root is not None else ()
