"""Experiments are Python files. Here: loading one, reaching any of its leaves, naming what it resolved to.

A tree is made of dataclasses, named tuples, dicts, tuples and ``functools.partial`` objects; its leaves
are numbers, strings, booleans and None. A leaf's path joins field names, keys, indices and keyword names
with dots: ``nash_md.objective.tau``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import functools
import hashlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from alignjax.types import UserError


def load(path: str | Path, settings: Mapping[str, str]) -> Any:
    """Runs ``get_config`` of an experiment file and applies the settings.

    A setting that names a parameter of ``get_config`` is passed to it; every other one is the path of a
    leaf of what it returns. Raises UserError.
    """
    get_config = getattr(load_module(path), "get_config", None)
    if get_config is None:
        raise UserError(f"{path} defines no get_config(); it must return an Experiment")
    parameters = inspect.signature(get_config).parameters
    arguments = {
        name: parse(text) if parameters[name].default is inspect.Parameter.empty
        else coerce(name, text, parameters[name].default)
        for name, text in settings.items() if name in parameters
    }  # fmt: skip
    named = [p for p in parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    missing = [p.name for p in named if p.default is p.empty and p.name not in arguments]
    if missing:
        raise UserError(f"{path} needs a value for {missing[0]}; add --set {missing[0]}=...")
    try:
        experiment = get_config(**arguments)
    except UserError as error:
        raise UserError(f"{path}: {one_line(error)}") from error
    except Exception as error:  # as in load_module
        raise UserError(f"{path}: {type(error).__name__}: {one_line(error)}") from error
    return override(experiment, {n: v for n, v in settings.items() if n not in parameters})


def load_module(path: str | Path) -> ModuleType:
    """Imports a file by its path. Raises UserError when it is missing or does not run."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the path of an experiment, such as experiments/quickstart.py")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        # Not through the loader: its bytecode cache takes two edits within a second for one.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except Exception as error:  # a user's file may raise anything; the line says which file and what
        raise UserError(f"{path} does not run: {type(error).__name__}: {one_line(error)}") from error
    return module


def one_line(error: BaseException | str) -> str:
    """An error's message on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def parse(text: str) -> Any:
    """A Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def children(node: Any) -> dict[str, Any] | None:
    """The named parts of an inner node, or None for a leaf."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
    if isinstance(node, functools.partial):
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.keywords}
    if isinstance(node, Mapping):
        return {str(k): v for k, v in node.items()}
    if isinstance(node, tuple):
        return dict(zip(getattr(node, "_fields", map(str, range(len(node)))), node, strict=True))
    return None


def with_child(node: Any, name: str, value: Any) -> Any:
    """The node with one part replaced."""
    if isinstance(node, functools.partial):
        args = tuple(value if str(i) == name else a for i, a in enumerate(node.args))
        keywords = {k: value if k == name else v for k, v in node.keywords.items()}
        return functools.partial(node.func, *args, **keywords)
    if isinstance(node, Mapping):
        return {k: value if str(k) == name else v for k, v in node.items()}
    if isinstance(node, tuple):
        parts = [value if k == name else v for k, v in (children(node) or {}).items()]
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    return dataclasses.replace(node, **{name: value})


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """(path, value) of every leaf that can be set."""
    parts = children(node)
    if parts is not None:
        for name, part in parts.items():
            yield from leaves(part, f"{path}.{name}" if path else name)
    elif node is None or isinstance(node, bool | int | float | str):
        yield path, node


def override(tree: Any, settings: Mapping[str, str]) -> Any:
    """The tree with leaves replaced by parsed text. A path may leave out the leading ``stages.``.

    Raises UserError on an unknown path, with the nearest ones, and on a value of another type.
    """
    for path, text in settings.items():
        known = dict(leaves(tree))
        full = path if path in known else f"stages.{path}"
        if full not in known:
            short = [name.removeprefix("stages.") for name in known]
            near = difflib.get_close_matches(path, short, 3, 0.5)
            near += [n for n in short if n.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]][:3]
            hint = f"did you mean {', '.join(dict.fromkeys(near))}?" if near else "see run FILE --help for the names"
            raise UserError(f"unknown field {path!r}; {hint}")
        value = coerce(path, text, known[full])
        try:
            tree = replace_at(tree, full.split("."), value)
        except ValueError as error:  # what a dataclass says of its own fields
            raise UserError(f"{path}={text}: {one_line(error)}") from error
    return tree


def coerce(path: str, text: str, old: Any) -> Any:
    """The text as a value of the old one's type. Raises UserError when it is another."""
    value = parse(text)
    if isinstance(old, bool) and text.lower() in ("true", "false"):
        value = text.lower() == "true"
    if isinstance(old, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if isinstance(old, str) and not isinstance(value, str):
        value = text
    if old is not None and type(value) is not type(old):
        raise UserError(f"{path}={value!r} is not a {type(old).__name__}; its value now is {old!r}")
    return value


def replace_at(node: Any, names: list[str], value: Any) -> Any:
    if not names:
        return value
    # Path parts may themselves hold dots only in dict keys, which stage names may not.
    child = (children(node) or {})[names[0]]
    return with_child(node, names[0], replace_at(child, names[1:], value))


def describe(node: Any) -> Any:
    """The tree as JSON: what a run resolved to. Functions become their names, and those from outside this
    package carry a hash of their own source (not of what they call), so that an edited objective is noticed."""
    if isinstance(node, functools.partial):
        return {"function": describe(node.func), **{k: describe(v) for k, v in (children(node) or {}).items()}}
    parts = children(node)
    if parts is not None:
        return {name: describe(part) for name, part in parts.items()}
    if callable(node):
        return function_name(node)
    return node if isinstance(node, bool | int | float | str | None) else str(node)


def function_name(function: Callable[..., Any]) -> str:
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__qualname__)
    cells = [describe(c.cell_contents) for c in getattr(function, "__closure__", None) or ()]
    if (module or "").split(".")[0] == __name__.split(".")[0]:
        return f"{module}.{name}" + (f"#{hashlib.sha256(repr(cells).encode()).hexdigest()[:12]}" if cells else "")
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return f"{module}.{name}"
    return f"{name}#{hashlib.sha256((source + repr(cells)).encode()).hexdigest()[:12]}"
