"""Every entry of a JSON object, changed in every way that a damaged or unusual file might have it."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

Path = tuple[Any, ...]  # keys and indices from the root on
WHOLE = "as it is"
_REMOVED = object()
_BIG = 2**70
NESTED = {f"<{depth} deep>": "[" * depth + "]" * depth for depth in (300, 900, 940, 960, 970, 980, 990, 100_000)}
"""Texts that are written as lists of lists."""
_RAW = {"<1e400>": "1e400"} | NESTED  # texts that are written as another JSON value, which Python cannot write
_VALUES: dict[str, Any] = {
    "removed": _REMOVED, "null": None, "true": True, "false": False, "''": "", "nonsense": "nonsense",
    "[]": [], "{}": {}, "0": 0, "-1": -1, "1": 1, "0.5": 0.5, "2**70": _BIG, "-2**70": -_BIG,
    "1e400": "<1e400>", "NaN": float("nan"),
}  # fmt: skip
"""Values that replace any other."""


def entries(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields (path, value) of every entry of a JSON value, also inside lists and objects."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        yield (*path, key), part
        yield from entries(part, (*path, key))


def mutations(document: Any, known: Mapping[Path, Sequence[str]] = MappingProxyType({})) -> Iterator[tuple[str, str]]:
    """Yields (name, JSON text) of the document as it is, and with one entry changed, for every entry and change.

    ``known`` are other texts that stand at a path in good files.
    """
    whole = write(document)
    yield WHOLE, whole
    for path, value in entries(document):
        texts = {whole}
        for name, new in (_VALUES | _changes(value) | {text: text for text in known.get(path, ())}).items():
            text = write(replaced(document, path, new))
            if text not in texts:
                texts.add(text)
                yield f"{'.'.join(map(str, path))}={name}", text


def known_texts(documents: Sequence[Any]) -> dict[Path, list[str]]:
    """Returns the texts that stand at each path in any of the documents."""
    found: dict[Path, set[str]] = {}
    for document in documents:
        for path, value in entries(document):
            if isinstance(value, str):
                found.setdefault(path, set()).add(value)
    return {path: sorted(texts) for path, texts in found.items()}


def _changes(value: Any) -> dict[str, Any]:
    """Returns the changes of a value that depend on it."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return {"[value]": [value]}
    return {"[value]": [value], "value+1": value + 1, "value*2": value * 2, "value/2": value / 2, "text": str(value)}


def replaced(document: Any, path: Path, value: Any) -> Any:
    """Returns a copy of the document with another value at the path, or without the entry."""
    changed = copy.deepcopy(document)
    *parents, last = path
    part = changed
    for key in parents:
        part = part[key]
    if value is _REMOVED:
        del part[last]
    else:
        part[last] = value
    return changed


def write(document: Any) -> str:
    """Returns JSON text."""
    return re.sub(r'"(<[^"<>]*>)"', lambda match: _RAW.get(match[1], match[0]), json.dumps(document))
