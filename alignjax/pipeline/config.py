"""Experiments are Python files. This module loads one and sets any leaf of it.

A tree is made of dataclasses, named tuples, dicts, tuples and ``functools.partial`` objects. Its leaves are numbers,
strings, booleans, enum members, None, and tuples of values of one of these types. The path of a leaf joins field names,
keys, indices and keyword names with dots: ``nash_md.objective.loss.tau``, ``nash_md.data.samplers.1.beta``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

from alignjax.errors import UserError, one_line


def load(path: str | Path, settings: Mapping[str, str]) -> Any:
    """Runs ``get_config`` of an experiment file, applies the settings, and returns the experiment.

    A setting whose name is a parameter of ``get_config`` is passed to it. Every other setting is named by the path of a
    leaf. Raises UserError when the file does not run, or a setting does not apply.
    """
    get_config = load_get_config(path)
    parameters = inspect.signature(get_config).parameters
    arguments = {
        name: _parse_argument(text, parameters[name])
        if parameters[name].default is inspect.Parameter.empty
        else _convert(name, text, parameters[name].default)
        for name, text in settings.items()
        if name in parameters
    }
    if missing := [name for name in required_parameters(get_config) if name not in arguments]:
        raise UserError(f"{path} needs a value for {missing[0]}; add --set {missing[0]}=...")
    try:
        experiment = get_config(**arguments)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise UserError(f"{_file_and_line(path, error)}: {_error_text(error)}") from error
    leaf_settings = {name: text for name, text in settings.items() if name not in parameters}
    return override(experiment, leaf_settings, tuple(parameters))


def _parse_argument(text: str, parameter: inspect.Parameter) -> Any:
    """Returns the value of a parameter without a default: a text where it is annotated ``str``, else a literal."""
    return _expand_home(text) if parameter.annotation in (str, "str") else _parse_literal(text)


def _expand_home(text: str) -> str:
    """Returns the text; a path that begins with ``~/`` becomes one in the home folder."""
    return str(Path(text).expanduser()) if text.startswith("~/") else text


def load_get_config(path: str | Path) -> Callable[..., Any]:
    """Returns the function ``get_config`` of an experiment file. Raises UserError when the file has none."""
    get_config = getattr(load_module(path), "get_config", None)
    if get_config is None:
        raise UserError(f"{path} defines no get_config(); define a function get_config that returns an Experiment")
    if not isinstance(get_config, FunctionType):
        kind = type(get_config).__name__
        raise UserError(f"{path}: get_config has the type {kind} and must be a function; write def get_config(): ...")
    return get_config


def required_parameters(get_config: Callable[..., Any]) -> list[str]:
    """Returns the names of the parameters that have no default."""
    parameters = inspect.signature(get_config).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def load_module(path: str | Path) -> ModuleType:
    """Imports a file by its path. Raises UserError when it is missing or does not run."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the path of an experiment, such as experiments/quickstart.py")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        # The loader is not used: its bytecode cache misses the second of two edits within one second.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(f"{_file_and_line(path, error)} does not run: {_error_text(error)}") from error
    return module


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, value) of every leaf that can be set."""
    if _is_leaf(node):
        yield path, node
    else:
        for name, part in (_named_parts(node) or {}).items():
            yield from leaves(part, f"{path}.{name}" if path else name)


def override(tree: Any, settings: Mapping[str, str], parameters: tuple[str, ...] = ()) -> Any:
    """Returns the tree with leaves replaced by parsed text. A path may leave out the leading ``stages.``.

    Raises UserError on an unknown path, with the most similar names, and on a value of another type. ``parameters`` are
    further names that the message may suggest.
    """
    for path, text in settings.items():
        values = dict(leaves(tree))
        full_path = path if path in values else f"stages.{path}"
        if full_path not in values:
            names = [*parameters, *(name.removeprefix("stages.") for name in values)]
            raise UserError(f"unknown field {path!r}; {_suggestion(path, names)}")
        names = full_path.split(".")
        value = _convert(path, text, values[full_path], _optional_types(tree, names))
        try:
            tree = _replace_at(tree, names, value)
        except ValueError as error:  # a dataclass refuses a value of its field
            raise UserError(f"{path}={text}: {one_line(error)}") from error
    return tree


def display(value: Any) -> str:
    """Returns a leaf as ``--help`` shows it and ``--set`` takes it: an enum member by its name."""
    return value.name if isinstance(value, enum.Enum) else repr(value)


def _file_and_line(path: str | Path, error: BaseException) -> str:
    """Returns the file, with the last of its lines that is in the error's traceback."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _error_text(error: BaseException) -> str:
    """Returns an error on one line, with its type unless it is a UserError."""
    return one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"


def _suggestion(path: str, names: Sequence[str]) -> str:
    """Returns the advice for an unknown path: up to six similar names."""
    similar = difflib.get_close_matches(path, names, 3, 0.5)
    same_last_part = [name for name in names if name.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]]
    suggested = list(dict.fromkeys([*similar, *same_last_part[:3]]))
    return f"did you mean {', '.join(suggested)}?" if suggested else "alignjax run FILE --help shows all names"


def _named_parts(node: Any) -> dict[str, Any] | None:
    """Returns the parts of an inner node that can be set, by name; None for anything else."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.init}
    if isinstance(node, functools.partial):
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.keywords}
    if isinstance(node, Mapping):
        return {str(k): v for k, v in node.items()}
    if isinstance(node, tuple):
        return dict(zip(getattr(node, "_fields", map(str, range(len(node)))), node, strict=True))
    return None


def _replace_part(node: Any, name: str, value: Any) -> Any:
    """Returns the node with one part replaced."""
    if isinstance(node, functools.partial):
        args = tuple(value if str(i) == name else a for i, a in enumerate(node.args))
        keywords = {k: value if k == name else v for k, v in node.keywords.items()}
        return functools.partial(node.func, *args, **keywords)
    if isinstance(node, Mapping):
        return {k: value if str(k) == name else v for k, v in node.items()}
    if isinstance(node, tuple):
        parts = [value if k == name else v for k, v in (_named_parts(node) or {}).items()]
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    return dataclasses.replace(node, **{name: value})


def _replace_at(node: Any, names: list[str], value: Any) -> Any:
    """Returns the tree with the value at the path ``names``. (Names hold no dots: stage names may not.)"""
    if not names:
        return value
    part = (_named_parts(node) or {})[names[0]]
    return _replace_part(node, names[0], _replace_at(part, names[1:], value))


def _is_scalar(node: Any) -> bool:
    return node is None or isinstance(node, bool | int | float | str | enum.Enum)


def _is_leaf(node: Any) -> bool:
    return _is_scalar(node) or (type(node) is tuple and all(map(_is_scalar, node)) and len(set(map(type, node))) < 2)


def _optional_types(tree: Any, names: list[str]) -> list[str]:
    """Returns the types that a dataclass declares for a field of several, as ["float", "None"]; else nothing."""
    parent = functools.reduce(lambda node, name: (_named_parts(node) or {})[name], names[:-1], tree)
    fields = dataclasses.fields(parent) if dataclasses.is_dataclass(parent) else ()
    types = next((str(field.type).split(" | ") for field in fields if field.name == names[-1]), [])
    return types if {*types} <= _WORDS.keys() and len(types) > 1 else []


def _convert(path: str, text: str, old: Any, types: Sequence[str] = ()) -> Any:
    """Returns the text as a value of the old value's type, or of one of ``types``. Raises UserError when it is of
    another type."""
    if isinstance(old, enum.Enum):
        return _convert_enum(path, text, type(old))
    types = types or ([] if old is None else [type(old).__name__])
    value = _parse_literal(text)
    if "bool" in types and text.lower() in ("true", "false"):
        value = text.lower() == "true"
    if "tuple" in types and old:
        parts = value if isinstance(value, list | tuple) else (value,)
        return tuple(_convert(path, str(part), old[0]) for part in parts)
    if "float" in types and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if "str" in types and (isinstance(value, str) or _type_name(value) not in types):
        value = _expand_home(value if isinstance(value, str) else text)
    if types and _type_name(value) not in types:
        kinds = " or ".join(_WORDS.get(name, f"a {name}") for name in types)
        raise UserError(f"{path}={value!r} is not {kinds}; its value now is {old!r}")
    return value


_WORDS = {"int": "a whole number", "float": "a number", "bool": "True or False", "str": "a text", "None": "None"}


def _type_name(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def _convert_enum(path: str, text: str, kind: type[enum.Enum]) -> enum.Enum:
    """Returns the member with this name. Raises UserError when there is none."""
    if text not in kind.__members__:
        raise UserError(f"{path}={text!r} is not a {kind.__name__}; choose one of {', '.join(kind.__members__)}")
    return kind[text]


def _parse_literal(text: str) -> Any:
    """Returns the value of a Python literal, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text
