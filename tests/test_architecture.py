"""The package's structure: imports run downwards, heavy libraries have one door each, functions are short."""

import ast
import collections
import functools
import subprocess
import sys
from pathlib import Path

import pytest

import alignjax
from tests.mutants.mutants import MUTANTS

ROOT = Path(alignjax.__file__).parent
FLOORS = [
    {"errors", "fields", "types"},
    {"losses", "games", "distributed"},
    {"models"},
    {"checkpoints", "tasks"},
    {"sampling", "preferences"},
    {"objectives", "labeling"},
    {"training"},
    {"reporting"},
    {"pipeline"},
    {"planning"},
    {"arguments", "terminal"},
    {"cli"},
    {"__main__"},
]
"""Lowest first. A room imports itself and rooms of lower floors."""
DOORS = {
    "orbax": {"training/checkpointing.py"},
    "tensorflow_datasets": {"training/data.py"},
    "grain": {"training/data.py"},
    "transformers": {"checkpoints/huggingface.py"},
    "requests": {"preferences/http_client.py"},
    "pyarrow": {"tasks/parquet.py"},
    "flax": {"models/decoder_modules.py", "models/functional.py", "models/layers.py", "models/t5_modules.py"},
}
LONGEST_FUNCTION = 40  # lines
FILES = sorted(ROOT.rglob("*.py"))


def name(path):
    """Returns a file's path inside the package."""
    return str(path.relative_to(ROOT))


@functools.cache
def parsed(path):
    """Returns a file's syntax tree."""
    return ast.parse(path.read_text())


def imported(path):
    """Yields the modules that a file imports: "alignjax.x.y" for those of this package."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def room(path):
    """Returns the folder, or the file, of the package that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def floor(room):
    """Returns the number of a room's floor."""
    return next(i for i, rooms in enumerate(FLOORS) if room in rooms)


def test_every_room_has_one_floor():
    rooms = {room(path) for path in FILES} - {"__init__"}
    assert sorted(rooms) == sorted(part for rooms in FLOORS for part in rooms)


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_run_downwards(path):
    if room(path) == "__init__":
        return
    for module in imported(path):
        parts = module.split(".")
        is_room = len(parts) > 1 and any(parts[1] in rooms for rooms in FLOORS)
        if parts[0] == "alignjax" and is_room and parts[1] != room(path):
            assert floor(parts[1]) < floor(room(path)), f"{name(path)} imports {module}"


def test_there_is_no_circle():
    graph = {name(p): set() for p in FILES}
    for path in FILES:
        for module in imported(path):
            parts = module.split(".")[1:] if module.startswith("alignjax.") else []
            for cut in range(len(parts), 0, -1):
                target = "/".join(parts[:cut]) + ".py"
                if target in graph:
                    graph[name(path)].add(target)
                    break
    done, order = set(), list(graph)
    for _ in order:
        done |= {n for n in order if graph[n] <= done}
    assert done == set(order), f"a circle among {sorted(set(order) - done)}"


@pytest.mark.parametrize("library", DOORS)
def test_heavy_libraries_have_one_door(library):
    users = {name(p) for p in FILES if any(m.split(".")[0] == library for m in imported(p))}
    assert users == DOORS[library]


def test_nothing_unpickles_and_no_torch_or_tensorflow():
    for path in FILES:
        found = {m.split(".")[0] for m in imported(path)} & {"pickle", "dill", "torch", "tensorflow", "absl", "chex"}
        assert not found, f"{name(path)} imports {found}"


def test_the_mathematics_imports_without_the_machinery():
    """On a bare accelerator image: objectives and decoding need JAX and optax alone."""
    heavy = ["orbax", "tensorflow_datasets", "grain", "transformers", "tensorflow", "torch"]
    code = (
        f"import sys, alignjax.objectives, alignjax.sampling.process; print([m for m in {heavy} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def definitions(path):
    """Yields the functions and classes of a file and the methods of its classes, without those inside functions."""
    for node in parsed(path).body:
        if isinstance(node, DEFINITIONS):
            yield node.name, node
        if isinstance(node, ast.ClassDef):
            yield from ((f"{node.name}.{part.name}", part) for part in node.body if isinstance(part, DEFINITIONS))


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def is_public(dotted):
    """Returns whether no part of a name begins with an underscore."""
    return not any(part.startswith("_") for part in dotted.split("."))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_no_function_is_long(path):
    functions = [node for node in ast.walk(parsed(path)) if isinstance(node, DEFINITIONS[:2])]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FUNCTION}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_everything_public_has_a_docstring(path):
    nodes = [("the module", parsed(path)), *((dotted, node) for dotted, node in definitions(path) if is_public(dotted))]
    assert not [dotted for dotted, node in nodes if not ast.get_docstring(node)]


def test_no_public_name_is_defined_in_two_modules():
    modules = collections.defaultdict(set)
    for path in FILES:
        for dotted, _ in definitions(path):
            if is_public(dotted) and "." not in dotted:
                modules[dotted].add(name(path))
    assert not {dotted: sorted(paths) for dotted, paths in modules.items() if len(paths) > 1}


def test_what_a_mutant_changes_stands_in_its_file_once():
    """``make mutants`` would end at another."""
    counts = {mutant.name: (ROOT.parent / mutant.file).read_text().count(mutant.old) for mutant in MUTANTS}
    assert set(counts.values()) == {1}, counts
    assert len(counts) == len(MUTANTS)
