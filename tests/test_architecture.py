"""The floors of the house: imports run downwards, and each heavy library has its one door."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import alignjax

ROOT = Path(alignjax.__file__).parent
FLOORS = [
    {"types", "config"},
    {"runtime", "games"},
    {"models", "objectives", "decoding"},
    {"preference", "labeling", "generation", "rollout", "judges", "tournament", "tasks"},
    {"report", "stages"},
    {"plan", "run", "export", "sample"},
    {"commands", "__main__"},
]
DOORS = {
    "orbax": {"runtime/checkpoint.py"},
    "tensorflow_datasets": {"runtime/data.py"},
    "grain": {"runtime/data.py"},
    "transformers": {"models/huggingface.py"},
    "flax": {"models/functional.py", "models/layers.py", "models/transformer.py", "models/t5.py"},
}
FILES = sorted(ROOT.rglob("*.py"))


def name(path):
    return str(path.relative_to(ROOT))


def imported(path):
    """Top-level names a file imports, those of this package as "alignjax.x"."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def floor(part):
    found = [i for i, parts in enumerate(FLOORS) if part in parts]
    assert found, f"{part} stands on no floor"
    return found[0]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_never_run_upwards(path):
    mine = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if mine == "__init__":
        return
    for module in imported(path):
        parts = module.split(".")
        if (
            parts[0] == "alignjax"
            and len(parts) > 1
            and (ROOT / parts[1]).with_suffix(".py").exists() | (ROOT / parts[1]).is_dir()
        ):
            assert floor(parts[1]) <= floor(mine), f"{name(path)} imports {module}"


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
