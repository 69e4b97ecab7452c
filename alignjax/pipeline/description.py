"""What an experiment is made of, as JSON.

Fingerprints are digests of it. So it holds everything that can change a result: values, and the code of functions and
classes that a user wrote.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, MethodType
from typing import Any

import jax
import numpy as np

from alignjax.errors import UserError
from alignjax.fields import has_no_effect, is_stage_input

NameInput = Callable[[str], str]
"""The name of a stage -> what stands for it."""
_PACKAGE = __name__.split(".")[0]


def describe(node: Any, name_input: NameInput | None = None) -> Any:
    """Returns the tree as JSON: what a run resolved to.

    A function of this package becomes its name; a user's function or class also has a digest of its code. With
    ``name_input`` the result is what a fingerprint is made of: fields that cannot change a result are left out, and
    names of stages become what ``name_input`` returns for them. Raises UserError on a value without a lasting
    description.
    """
    if node is None or (isinstance(node, bool | int | float | str) and not isinstance(node, enum.Enum)):
        return node
    if isinstance(node, enum.Enum):
        return node.name
    if isinstance(node, functools.partial):
        return _describe_partial(node, name_input)
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return _describe_dataclass(node, name_input)
    if isinstance(node, Mapping):
        return {str(key): describe(value, name_input) for key, value in node.items()}
    if isinstance(node, tuple | list):
        names = getattr(node, "_fields", None) or map(str, range(len(node)))  # of a named tuple
        return {name: describe(part, name_input) for name, part in zip(names, node, strict=True)}
    if isinstance(node, set | frozenset):
        return sorted(str(describe(part, name_input)) for part in node)
    if isinstance(node, np.ndarray | np.generic | jax.Array):
        array = np.asarray(node)
        return f"{array.dtype}{list(array.shape)}#{_digest(array.tobytes())}"
    return describe_code(node) if callable(node) else _describe_other(node)


def _describe_partial(node: functools.partial, name_input: NameInput | None) -> dict[str, Any]:
    arguments = {str(i): describe(value, name_input) for i, value in enumerate(node.args)}
    keywords = {
        name if name != "function" else "function=": describe(node.keywords[name], name_input)
        for name in sorted(node.keywords)
    }
    return {"function": describe(node.func, name_input), **arguments, **keywords}


def _describe_dataclass(node: Any, name_input: NameInput | None) -> dict[str, Any]:
    fields = [field for field in dataclasses.fields(node) if name_input is None or not has_no_effect(field)]
    described = {field.name: _describe_field(field, getattr(node, field.name), name_input) for field in fields}
    if name_input is not None:
        described = {"type": type(node).__qualname__, **described}
    return described if _is_ours(type(node)) else {**described, "code": describe_code(type(node))}


def _describe_field(field: dataclasses.Field, value: Any, name_input: NameInput | None) -> Any:
    """Returns the description of a field's value, with the names of stages replaced by ``name_input``."""
    if name_input is None or value is None or not is_stage_input(field):
        return describe(value, name_input)
    if isinstance(value, Mapping):
        return {str(key): name_input(name) for key, name in value.items()}
    return name_input(value)


def _describe_other(node: Any) -> str:
    """Returns the text of a path, a dtype and the like. Raises UserError where it names a place in memory."""
    text = str(node) if isinstance(node, Path | np.dtype) else repr(node)
    if " at 0x" in text:
        raise UserError(f"{text} cannot stand in an experiment, whose record must be the same in the next run; "
                        "use a dataclass, a function, a number, a text or an array")  # fmt: skip
    return text


def describe_code(node: Any, users: tuple[Any, ...] = ()) -> str:
    """Returns module.name of a function or class of this package, and name#digest of a user's.

    The digest covers the source, defaults, closures, and what the code uses of its own file: constants, functions and
    classes. A method or a callable object counts with the values that it holds. ``users`` are the functions and classes
    that use this one; they are not described again.
    """
    if isinstance(node, MethodType):
        return f"{describe_code(node.__func__, users)} of {describe(node.__self__)}"
    if not isinstance(node, type | FunctionType):
        values = describe(vars(node)) if hasattr(node, "__dict__") else ""
        return f"{describe_code(type(node), users)} with {values}" if not inspect.isbuiltin(node) else node.__name__
    parts = list(_code_parts(node, (*users, node)))
    if _is_ours(node):
        return f"{node.__module__}.{node.__qualname__}" + (f"#{_digest(repr(parts).encode())}" if parts else "")
    return f"{node.__qualname__}#{_digest((_source(node) + repr(parts)).encode())}"


def _source(node: Any) -> str:
    """Returns the source of a function, or of the functions and plain values of a class.

    Where the source is not at hand, as in a notebook, it is the compiled code.
    """
    if isinstance(node, FunctionType):
        try:
            return textwrap.dedent(inspect.getsource(node))
        except (OSError, TypeError, SyntaxError):
            return _compiled(node.__code__)
    members = {name: getattr(member, "__func__", member) for name, member in vars(node).items()}
    values = [(name, member) for name, member in members.items() if isinstance(member, bool | int | float | str)]
    return repr(values) + "".join(_source(member) for member in members.values() if isinstance(member, FunctionType))


def _compiled(code: CodeType) -> str:
    """Returns the bytecode with its names and constants."""
    constants = (_compiled(part) if isinstance(part, CodeType) else repr(part) for part in code.co_consts)
    return f"{code.co_code.hex()}{code.co_names}{code.co_varnames}{list(constants)}"


def _code_parts(node: Any, users: tuple[Any, ...]) -> Iterator[Any]:
    """Yields descriptions of everything that the code of a function or class depends on, beside its source."""
    if isinstance(node, type):
        if not _is_ours(node):
            bases = [base for base in node.__mro__[1:-1] if not _is_ours(base) and base not in users]
            yield from (describe_code(base, users) for base in bases if base.__module__ == node.__module__)
            for name, member in vars(node).items():
                function = getattr(member, "__func__", member)  # of a class method or static method
                if isinstance(function, FunctionType) and function.__module__ == node.__module__:
                    yield name, list(_code_parts(function, users))
        return
    yield from (_value_part(cell.cell_contents, node, users) for cell in node.__closure__ or ())
    if _is_ours(node):
        return
    yield from (_value_part(value, node, users) for value in (node.__defaults__ or ()))
    yield from ((name, _value_part(value, node, users)) for name, value in sorted((node.__kwdefaults__ or {}).items()))
    for name in sorted(_used_names(node.__code__) & set(node.__globals__)):
        part = _value_part(node.__globals__[name], node, users)
        if part is not None:
            yield name, part


def _value_part(value: Any, user: Any, users: tuple[Any, ...]) -> Any:
    """Returns the description of a value that code uses; None for what another module defines."""
    if isinstance(value, type | FunctionType):
        own = value.__module__ == user.__module__ and not _is_ours(value)
        return describe_code(value, users) if own and value not in users else getattr(value, "__qualname__", None)
    plain = isinstance(value, bool | int | float | str | tuple | list | dict | set | frozenset | np.ndarray | jax.Array)
    if value is None or plain or dataclasses.is_dataclass(value) or isinstance(value, functools.partial):
        return describe(value)
    return describe_code(value, users) if callable(value) and isinstance(value, MethodType) else None


def _is_ours(node: Any) -> bool:
    return (node.__module__ or "").split(".")[0] in (_PACKAGE, "builtins")


def _used_names(code: CodeType) -> set[str]:
    """Returns the global names and attributes that a function, and the functions inside it, look up."""
    return set(code.co_names).union(*(_used_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _digest(content: bytes) -> str:
    """Returns the first 12 hexadecimal digits of the SHA-256."""
    return hashlib.sha256(content).hexdigest()[:12]
