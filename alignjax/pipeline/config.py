"""Experiments are Python files: how one is loaded, how its leaves are set, and how it is described as JSON.

A tree is made of dataclasses, named tuples, dicts, tuples and ``functools.partial`` objects. Its leaves are numbers,
strings, booleans, enum members, None and tuples of one of these kinds. A leaf's path joins field names, keys, indices
and keyword names with dots: ``nash_md.objective.loss.tau``.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import enum
import functools
import hashlib
import importlib.util
import inspect
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

from alignjax.errors import UserError, one_line
from alignjax.fields import has_no_effect, is_stage_input


def load(path: str | Path, settings: Mapping[str, str]) -> Any:
    """Returns what ``get_config`` of an experiment file returns, with the settings applied.

    A setting that names a parameter of ``get_config`` is passed to it; every other one is the path of a leaf of what it
    returns. Raises UserError when the file does not run, and on a setting that does not fit.
    """
    parameters = inspect.signature(get_config := get_config_of(path)).parameters
    arguments = {
        name: _parse(text) if parameters[name].default is inspect.Parameter.empty
        else _coerce(name, text, parameters[name].default)
        for name, text in settings.items() if name in parameters
    }  # fmt: skip
    if missing := [name for name in required(get_config) if name not in arguments]:
        raise UserError(f"{path} needs a value for {missing[0]}; add --set {missing[0]}=...")
    try:
        experiment = get_config(**arguments)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        raise UserError(f"{_error_place(path, error)}: {_error_text(error)}") from error
    return override(experiment, {n: v for n, v in settings.items() if n not in parameters}, tuple(parameters))


def get_config_of(path: str | Path) -> Callable[..., Any]:
    """Returns the function ``get_config`` of an experiment file. Raises UserError when it has none."""
    get_config = getattr(load_module(path), "get_config", None)
    if get_config is None:
        raise UserError(f"{path} defines no get_config(); it must return an Experiment")
    if not isinstance(get_config, FunctionType):
        kind = type(get_config).__name__
        raise UserError(f"{path}: get_config is a {kind} and must be a function; write def get_config(): ...")
    return get_config


def required(get_config: Callable[..., Any]) -> list[str]:
    """Returns the names of the parameters that have no default."""
    parameters = inspect.signature(get_config).parameters.values()
    return [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]


def load_module(path: str | Path) -> ModuleType:
    """Returns the module of a file. Raises UserError when the file is missing or does not run."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; give the path of an experiment, such as experiments/quickstart.py")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    try:
        # Not through the loader: its bytecode cache takes two edits within a second for one.
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise UserError(f"{_error_place(path, error)} does not run: {_error_text(error)}") from error
    return module


def _error_place(path: str | Path, error: BaseException) -> str:
    """Returns the file, and its line that raised the error or called what raised it."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f"{path}, line {lines[-1]}" if lines else str(path)


def _error_text(error: BaseException) -> str:
    """Returns an error on one line, with its type unless it is a UserError."""
    return one_line(error) if isinstance(error, UserError) else f"{type(error).__name__}: {one_line(error)}"


def _parse(text: str) -> Any:
    """Returns the Python literal that the text is, or the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _children(node: Any) -> dict[str, Any] | None:
    """Returns the named parts of an inner node that can be set; None for a leaf."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.init}
    if isinstance(node, functools.partial):
        return {**{str(i): a for i, a in enumerate(node.args)}, **node.keywords}
    if isinstance(node, Mapping):
        return {str(k): v for k, v in node.items()}
    if isinstance(node, tuple):
        return dict(zip(getattr(node, "_fields", map(str, range(len(node)))), node, strict=True))
    return None


def _with_child(node: Any, name: str, value: Any) -> Any:
    """Returns the node with one part replaced."""
    if isinstance(node, functools.partial):
        args = tuple(value if str(i) == name else a for i, a in enumerate(node.args))
        keywords = {k: value if k == name else v for k, v in node.keywords.items()}
        return functools.partial(node.func, *args, **keywords)
    if isinstance(node, Mapping):
        return {k: value if str(k) == name else v for k, v in node.items()}
    if isinstance(node, tuple):
        parts = [value if k == name else v for k, v in (_children(node) or {}).items()]
        return type(node)(*parts) if hasattr(node, "_fields") else tuple(parts)
    return dataclasses.replace(node, **{name: value})


def _is_scalar(node: Any) -> bool:
    """Returns whether a node is a number, a string, a boolean or None."""
    return node is None or isinstance(node, bool | int | float | str)


def _is_leaf(node: Any) -> bool:
    """Returns whether a node is a scalar, or a tuple of scalars of one type."""
    return _is_scalar(node) or (type(node) is tuple and all(map(_is_scalar, node)) and len(set(map(type, node))) < 2)


def leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (path, value) of every leaf that can be set."""
    if _is_leaf(node):
        yield path, node
    else:
        for name, part in (_children(node) or {}).items():
            yield from leaves(part, f"{path}.{name}" if path else name)


def override(tree: Any, settings: Mapping[str, str], parameters: tuple[str, ...] = ()) -> Any:
    """Returns the tree with leaves replaced by parsed text. A path may leave out the leading ``stages.``.

    Raises UserError on an unknown path, with the nearest ones (``parameters`` are names that can be set elsewhere), and
    on a value of another type.
    """
    for path, text in settings.items():
        known = dict(leaves(tree))
        full = path if path in known else f"stages.{path}"
        if full not in known:
            short = [*parameters, *(name.removeprefix("stages.") for name in known)]
            near = difflib.get_close_matches(path, short, 3, 0.5)
            near += [n for n in short if n.rsplit(".", 1)[-1] == path.rsplit(".", 1)[-1]][:3]
            hint = f"did you mean {', '.join(dict.fromkeys(near))}?" if near else "see run FILE --help for the names"
            raise UserError(f"unknown field {path!r}; {hint}")
        names = full.split(".")
        value = _coerce(path, text, known[full], _declared_types(tree, names))
        try:
            tree = _replace_at(tree, names, value)
        except ValueError as error:  # what a dataclass says of its own fields
            raise UserError(f"{path}={text}: {one_line(error)}") from error
    return tree


def _declared_types(tree: Any, names: list[str]) -> list[str]:
    """Returns the types that a dataclass declares for a field that may be None, as ["float", "None"]; else nothing."""
    parent = functools.reduce(lambda node, name: (_children(node) or {})[name], names[:-1], tree)
    fields = dataclasses.fields(parent) if dataclasses.is_dataclass(parent) else ()
    kinds = next((str(field.type).split(" | ") for field in fields if field.name == names[-1]), [])
    return kinds if "None" in kinds else []


def _coerce(path: str, text: str, old: Any, kinds: Sequence[str] = ()) -> Any:
    """Returns the text as a value of the old one's type, or of one of the declared types.

    Raises UserError when it has another type.
    """
    if isinstance(old, enum.Enum):
        return _member(path, text, type(old))
    kinds = kinds or ([] if old is None else [type(old).__name__])
    value = _parse(text)
    if "bool" in kinds and text.lower() in ("true", "false"):
        value = text.lower() == "true"
    if "tuple" in kinds and old:
        parts = value if isinstance(value, list | tuple) else (value,)
        return tuple(_coerce(path, str(part), old[0]) for part in parts)
    if "float" in kinds and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if "str" in kinds and not isinstance(value, str) and not (value is None and "None" in kinds):
        value = text
    if kinds and ("None" if value is None else type(value).__name__) not in kinds:
        raise UserError(f"{path}={value!r} is not a {' or '.join(kinds)}; its value now is {old!r}")
    return value


def _member(path: str, text: str, kind: type[enum.Enum]) -> enum.Enum:
    """Returns the member of an enum with this name. Raises UserError when there is none."""
    if text not in kind.__members__:
        raise UserError(f"{path}={text!r} is unknown; choose one of {', '.join(kind.__members__)}")
    return kind[text]


def _replace_at(node: Any, names: list[str], value: Any) -> Any:
    """Returns the node with the leaf at the path replaced."""
    if not names:
        return value
    # Path parts may themselves hold dots only in dict keys, which stage names may not.
    child = (_children(node) or {})[names[0]]
    return _with_child(node, names[0], _replace_at(child, names[1:], value))


def describe(node: Any, name_input: Callable[[str], str] | None = None) -> Any:
    """Returns the tree as JSON: what a run resolved to.

    A function becomes its name; one from outside this package also carries a digest of its code, so that an edited
    objective is noticed. With ``name_input`` the result is what a fingerprint is made of: fields that cannot change a
    result are left out, and names of stages become what ``name_input`` returns for them.
    """
    if isinstance(node, functools.partial):
        keywords = {name: describe(value, name_input) for name, value in (_children(node) or {}).items()}
        return {"function": describe(node.func, name_input), **keywords}
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        fields = [f for f in dataclasses.fields(node) if name_input is None or not has_no_effect(f)]
        described = {f.name: _describe_field(f, getattr(node, f.name), name_input) for f in fields}
        return described if name_input is None else {"type": type(node).__qualname__, **described}
    if isinstance(node, enum.Enum):
        return node.name
    if (parts := _children(node)) is not None:
        return {name: describe(part, name_input) for name, part in parts.items()}
    if callable(node):
        return function_name(node)
    return node if _is_scalar(node) else str(node)


def _describe_field(field: dataclasses.Field, value: Any, name_input: Callable[[str], str] | None) -> Any:
    if name_input is None or value is None or not is_stage_input(field):
        return describe(value, name_input)
    if isinstance(value, Mapping):
        return {str(key): name_input(name) for key, name in value.items()}
    return name_input(value)


def function_name(function: Callable[..., Any], above: tuple[Any, ...] = ()) -> str:
    """Returns module.name of a function of this package; of a user's function its name and a digest of its code.

    The code is its source, what it closes over, and the constants and functions of its file that it mentions. ``above``
    are the functions that mention it.
    """
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__qualname__)
    parts: list[Any] = [describe(c.cell_contents) for c in getattr(function, "__closure__", None) or ()]
    if (module or "").split(".")[0] == __name__.split(".")[0]:
        return f"{module}.{name}" + (f"#{_digest(repr(parts))}" if parts else "")
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return f"{module}.{name}"
    if isinstance(function, FunctionType):
        for mention in sorted(_mentioned_names(function.__code__) & set(function.__globals__)):
            value = function.__globals__[mention]
            if isinstance(value, FunctionType) and value.__module__ == module and value not in (function, *above):
                parts.append(function_name(value, (function, *above)))
            elif _is_scalar(value) or (isinstance(value, tuple | list) and all(map(_is_scalar, value))):
                parts.append((mention, value))
    return f"{name}#{_digest(source + repr(parts))}"


def _mentioned_names(code: CodeType) -> set[str]:
    """Returns the names that a function and the functions inside it look up."""
    return set(code.co_names).union(*(_mentioned_names(part) for part in code.co_consts if isinstance(part, CodeType)))


def _digest(text: str) -> str:
    """Returns twelve hexadecimal digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
