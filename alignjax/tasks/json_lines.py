"""JSON-lines files that a person gives, plain or gzip: every line is looked at, and a wrong one told by its number."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from alignjax.errors import UserError

Row = Mapping[str, Any]
"""A line's JSON object."""
Compared = tuple[str, str, str, float]
"""(prompt, first, second, P(first is preferred)): a comparison that somebody made."""
Compare = Callable[[Row], Compared | None]
"""A row -> its comparison, or None where it compares nothing. A row of another form raises KeyError, or ValueError with
what is wrong in words that follow "line 3"."""
T = TypeVar("T")


def content(path: str) -> str:
    """A mark of what is in a file; empty where there is none, so that an experiment can be looked at without it."""
    if not Path(path).is_file():
        return ""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_rows(path: str, what: str, read: Callable[[Row], T]) -> list[T]:
    """What ``read`` makes of every row of a file of ``what``. Raises UserError where there is no such file, nothing in
    it, and on the first line that ``read`` refuses, by a KeyError or a ValueError."""
    if not path:
        raise UserError(f"no file of {what} is named; give the path of one, in JSON lines")
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if path.endswith(".gz") else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a JSON-lines file of {what}") from None
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # within a text there may be other ends of lines
        if line.strip():
            try:
                rows.append(read(object_of(line)))
            except KeyError as error:
                raise UserError(f"{path}, line {number} has no {error}; mend it") from None
            except ValueError as error:
                raise UserError(f"{path}, line {number} {error}; mend it") from None
    if not rows:
        raise UserError(f"{path} is empty; give a JSON-lines file of {what}")
    return rows


def object_of(line: str) -> Row:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise ValueError("is no JSON object")
    return found


def text_of(row: Row, name: str) -> str:
    """A field that must be a text with something in it."""
    text = row[name]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"has {name!r} without a text")
    return text


def compared(row: Row) -> Compared:
    """A row {"prompt", "first", "second", "p"} as it stands; p is a hard label, 0 or 1, or a soft one between."""
    p = row["p"]
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise ValueError(f"has 'p' {p!r}, which is no number from 0 to 1")
    return text_of(row, "prompt"), text_of(row, "first"), text_of(row, "second"), float(p)
