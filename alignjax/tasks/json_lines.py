"""Text and JSON-lines files that a user gives, plain or gzip. Every line is checked; an error names the line."""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from alignjax.errors import UserError

Row = Mapping[str, Any]
"""The JSON object of a line."""
T = TypeVar("T")


class Comparison(NamedTuple):
    """Two replies to one prompt, compared by people or by a program."""

    prompt: str
    first: str
    second: str
    p: float  # P(first is preferred)


class ReadComparison(Protocol):
    """Reads a comparison in the form of one kind of file."""

    def __call__(self, row: Row, /) -> Comparison | None:
        """Returns the comparison of a row; None when the row compares nothing.

        Raises KeyError when a field is missing, and ValueError when a value is wrong, with words that can follow
        "line 3 ...".
        """
        ...


def file_digest(path: str) -> str:
    """Returns 16 hexadecimal digits of the SHA-256 of a file; "" when there is no file, which is no error."""
    if not Path(path).is_file():
        return ""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def read_text_file(path: str, kind: str) -> str:
    """Returns a UTF-8 text file, decompressed when its name ends in .gz.

    Raises UserError when it cannot be read; ``kind`` then says what to give: "a text file of stories".
    """
    try:
        raw = Path(path).read_bytes()
        return (gzip.decompress(raw) if path.endswith(".gz") else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give {kind}") from None


def read_rows(path: str, kind: str, read: Callable[[Row], T]) -> list[T]:
    """Returns ``read`` of the JSON object on each line of a file; blank lines are skipped.

    ``kind`` is the plural of what the lines are: "dialogues". Raises UserError when no file is named, when it cannot be
    read or holds no line, and on the first line that is no object or for which ``read`` raises KeyError or ValueError.
    """
    if not path:
        raise UserError(f"no file of {kind} is named; give the path of one, in JSON lines")
    text = read_text_file(path, f"a JSON-lines file of {kind}")
    rows = []
    for number, line in enumerate(text.split("\n"), 1):  # lines end at \n alone: a JSON text may hold U+2028
        if line.strip():
            try:
                rows.append(read(_parse_object(line)))
            except KeyError as error:
                raise UserError(f"{path}, line {number} has no {error}; mend it") from None
            except ValueError as error:
                raise UserError(f"{path}, line {number} {error}; mend it") from None
    if not rows:
        raise UserError(f"{path} holds no {kind}; give a JSON-lines file of them")
    return rows


def _parse_object(line: str) -> Row:
    """Returns the JSON object of a line. Raises ValueError when it is none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")
    return value


def require_text(row: Row, name: str) -> str:
    """Returns a field that must be a text. Raises KeyError when it is missing, ValueError when it is blank."""
    text = row[name]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"has {name!r} without a text")
    return text


def read_comparison(row: Row) -> Comparison:
    """Returns the comparison of a row {"prompt", "first", "second", "p"}.

    ``p`` = P(first is preferred) is a hard label, 0 or 1, or a soft one between. Raises KeyError and ValueError on
    another form (``ReadComparison``).
    """
    p = row["p"]
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise ValueError(f"has 'p' {p!r}, which is no number from 0 to 1")
    return Comparison(require_text(row, "prompt"), require_text(row, "first"), require_text(row, "second"), float(p))
