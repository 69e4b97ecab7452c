"""The parts of the fuzz by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.fuzz import lines
from tests.fuzz.outcomes import Input


def _with_torch(module: str) -> Callable[[Path, int], Iterator[Input]]:
    """Returns the inputs of a module that imports torch, imported when they are asked for."""
    return lambda folder, seed: importlib.import_module(f"tests.fuzz.{module}").inputs(folder, seed)


PARTS: dict[str, Callable[[Path, int], Iterator[Input]]] = {
    "config": _with_torch("config"),
    "tokenizer": _with_torch("tokenizer"),
    "adapter": _with_torch("adapter"),
    "generation": _with_torch("generation"),
    "lines": lines.inputs,
}
"""Name -> (an empty folder, seed) -> the part's damaged inputs."""
