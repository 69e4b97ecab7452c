"""Text and JSON-lines files that a user gives, plain or gzip. Every line is checked; an error names the line.

A file of rows may be parquet too; an error then names the row, counted from 1.

Lines end at \\n alone: a JSON text, and a prompt, may hold other separators, such as U+2028.
"""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from alignjax.errors import UserError, short_repr
from alignjax.tasks import parquet

Row = Mapping[str, Any]
"""The JSON object of a line, or a row of a parquet file."""
T = TypeVar("T")
_MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # it begins with the mark of UTF-16
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
"""Byte order marks, and the codecs that read them as marks."""
_COMPARISONS = ("prompt, first, second, p", "prompt, chosen, rejected")


class Comparison(NamedTuple):
    """Two replies to one prompt, compared by people or by a program."""

    prompt: str
    first: str
    second: str
    p: float  # P(first is preferred)


class Demonstration(NamedTuple):
    """A prompt and a reply to imitate."""

    prompt: str
    reply: str


class ReadDemonstration(Protocol):
    """Reads a demonstration in the form of one kind of file."""

    def __call__(self, row: Row, /) -> Demonstration:
        """Returns the demonstration of a row. Raises KeyError and ValueError as a ``ReadComparison`` does."""
        ...


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
    return file_sha256(path)[:16]


def file_sha256(path: str) -> str:
    """Returns the SHA-256 of a file in hexadecimal digits; "" when there is no file, which is no error."""
    if not Path(path).is_file():
        return ""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sha256(path: str, found: str, expected: str) -> None:
    """Raises UserError when a file has another SHA-256 than the one that was given.

    An empty ``expected`` asks for nothing; an empty ``found`` says that there is no file, which its reader will tell.
    """
    if expected and (len(expected) != 64 or set(expected.lower()) - set("0123456789abcdef")):
        raise UserError(f"sha256={short_repr(expected)} is no SHA-256; give its 64 hexadecimal digits")
    if expected and found and expected.lower() != found:
        raise UserError(f"{path} has the SHA-256 {found}, not {expected.lower()}; fetch it again, or give its own")


def read_text_file(path: str, kind: str) -> str:
    """Returns a text file without its byte order mark, decompressed when its name ends in .gz.

    It is in UTF-8, or in UTF-16 where a mark says so. Raises UserError when it cannot be read, with the line of a byte
    that is no text; ``kind`` then says what to give: "a text file of stories".
    """
    try:
        raw = Path(path).read_bytes()
        raw = gzip.decompress(raw) if path.endswith(".gz") else raw
        return raw.decode(next((codec for mark, codec in _MARKS.items() if raw.startswith(mark)), "utf-8"))
    except UnicodeDecodeError as error:
        line = error.object[: error.start].decode(error.encoding, "ignore").count("\n") + 1
        raise UserError(f"{path} cannot be read (line {line} is not in {error.encoding}); give {kind}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read ({error}); give {kind}") from None


def read_rows(path: str, kind: str, read: Callable[[Row], T], skip_malformed: bool = False) -> list[T]:
    """Returns ``read`` of the JSON object on each line of a file, or of each row of a parquet file.

    Blank lines are skipped. ``kind`` is the plural of what the lines are: "dialogues". Raises UserError when no file is
    named, when it cannot be read or holds no line, and on the first line that is no object or for which ``read`` raises
    KeyError or ValueError. With ``skip_malformed`` such lines are left out with a warning, and only a file of nothing
    else is refused.
    """
    return [row for _, row in read_numbered_rows(path, kind, read, skip_malformed).rows]


class NumberedRows(NamedTuple, Generic[T]):
    """What a file of JSON lines, or a parquet file, holds."""

    rows: list[tuple[int, T]]  # line number, from 1, and what was read
    malformed: list[tuple[int, str]]  # line number, and what is wrong: "has no 'chosen'"


def read_numbered_rows(path: str, kind: str, read: Callable[[Row], T], skip_malformed: bool = False) -> NumberedRows[T]:
    """Returns the rows of a file with their line numbers, and its malformed lines, as ``read_rows`` reads them."""
    if not path:
        raise UserError(f"no file of {kind} is named; give the path of one, in JSON lines or parquet")
    is_parquet, found = path.endswith(parquet.SUFFIX), NumberedRows[T]([], [])
    for number, row in _parquet_rows(path, kind) if is_parquet else _json_lines(path, kind):
        try:
            found.rows.append((number, read(parse_object(row) if isinstance(row, str) else row)))
        except (KeyError, ValueError) as error:
            found.malformed.append((number, f"has no {error}" if isinstance(error, KeyError) else str(error)))
    _check_malformed(path, "row" if is_parquet else "line", found, skip_malformed)
    if not found.rows:
        raise UserError(f"{path} holds no {kind}; give a {'parquet' if is_parquet else 'JSON-lines'} file of them")
    return found


def _check_malformed(path: str, unit: str, found: NumberedRows[T], skip_malformed: bool) -> None:
    """Raises UserError on the first malformed line; where they are skipped and others are left, warns of it."""
    if not found.malformed:
        return
    number, reason = found.malformed[0]
    if not skip_malformed or not found.rows:
        raise UserError(f"{path}, {unit} {number} {reason}; correct it")
    warnings.warn(f"{path}: {len(found.malformed)} of {len(found.malformed) + len(found.rows)} {unit}s are malformed "
                  f"and were left out; {unit} {number} {reason}", stacklevel=2)  # fmt: skip


def _json_lines(path: str, kind: str) -> Iterator[tuple[int, str]]:
    """Yields (number, text) of the lines that are not blank. Raises UserError when the file cannot be read."""
    text = read_text_file(path, f"a JSON-lines file of {kind}")
    if text.lstrip().startswith("["):
        raise UserError(f"{path} is a JSON array; give a JSON-lines file of {kind}: one object a line")
    yield from ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def _parquet_rows(path: str, kind: str) -> Iterator[tuple[int, Row]]:
    """Yields (number, row) of a parquet file. Raises UserError when it cannot be read."""
    yield from enumerate(parquet.read_parquet(path, kind), 1)


def parse_object(line: str) -> Row:
    """Returns the JSON object of a text. Raises ValueError when it is none, and when a text in it cannot be encoded."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError("is no JSON object")
    if "\\ud" in line.lower() and any("\ud800" <= c <= "\udfff" for c in json.dumps(value, ensure_ascii=False)):
        raise ValueError("has half of a surrogate pair (\\ud800 to \\udfff), which is no character")
    return value


def read_prompts(path: str, name: str = "prompt") -> list[str]:
    """Returns the prompts of a file: JSON lines {"prompt": text}, or of a name in .txt one prompt a line.

    ``name`` is what the texts are called, in the lines and in messages. Blank lines are skipped. Raises UserError as
    ``read_rows`` does, and when the file's name ends in neither .txt nor .jsonl.
    """
    stem = path.removesuffix(".gz")
    if not path or stem.endswith(".jsonl"):
        return read_rows(path, f"{name}s", lambda row: require_text(row, name))
    if not stem.endswith(".txt"):
        raise UserError(
            f'{path}: name it .jsonl, with {{"{name}": text}} on each line, or .txt, with one {name} a line'
        )
    lines = [line.removesuffix("\r") for line in read_text_file(path, f"one {name} a line").split("\n")]
    if not (prompts := [line for line in lines if line.strip()]):
        raise UserError(f"{path} holds no {name}s; write one a line")
    return prompts


def require_text(row: Row, name: str) -> str:
    """Returns a field that must be a text. Raises KeyError when it is missing, ValueError when it is blank."""
    text = row[name]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"has {name!r} without a text")
    return text


def read_comparison(row: Row) -> Comparison:
    """Returns the comparison of a row {"prompt", "first", "second", "p"} or {"prompt", "chosen", "rejected"}.

    ``p`` = P(first is preferred) is a hard label, 0 or 1, or a soft one between. ``chosen`` and ``rejected`` are texts,
    or chats that end in the replies; the prompt is a text, or a chat of one message. Raises ValueError on another form
    (``ReadComparison``).
    """
    is_chosen = bool({"chosen", "rejected"} & row.keys()) and not {"first", "second", "p"} & row.keys()
    names = _COMPARISONS[is_chosen].split(", ")
    if missing := [name for name in reversed(names) if name not in row]:
        forms = " or ".join(f"{{{form}}}" for form in _COMPARISONS)
        raise ValueError(f"has no {missing[0]!r}; a comparison is {forms}")
    if is_chosen:
        return _read_chosen(row)
    p = row["p"]
    if isinstance(p, bool) or not isinstance(p, int | float) or not 0 <= p <= 1:
        raise ValueError(f"has 'p' {short_repr(p)}, which is no number from 0 to 1")
    return Comparison(require_text(row, "prompt"), require_text(row, "first"), require_text(row, "second"), float(p))


def _read_chosen(row: Row) -> Comparison:
    """Returns the comparison of a row {"prompt", "chosen", "rejected"}. Raises ValueError on another form."""
    prompt = _read_prompt(row)
    asked = [("user", prompt)]
    return Comparison(prompt, read_reply(row, "chosen", asked), read_reply(row, "rejected", asked), 1.0)


def read_demonstration(row: Row) -> Demonstration:
    """Returns the demonstration of a row {"prompt", "completion"}.

    The prompt is a text, or a chat of one message; the completion is a text, or a chat that ends in it. Raises KeyError
    or ValueError on another form (``ReadDemonstration``).
    """
    prompt = _read_prompt(row)
    return Demonstration(prompt, read_reply(row, "completion", [("user", prompt)]))


def _read_prompt(row: Row) -> str:
    """Returns a prompt that is a text, or a chat of one message. Raises KeyError or ValueError when it is neither."""
    if not isinstance(row["prompt"], list):
        return require_text(row, "prompt")
    (role, prompt), *others = read_chat(row, "prompt")
    if role != "user" or others:
        raise ValueError("has a 'prompt' of other messages than one of the user; give the stage a ``read``")
    return prompt


def read_reply(row: Row, name: str, asked: Sequence[tuple[str, str]]) -> str:
    """Returns a reply that is a text, or the last message of a chat, which may begin with the prompt's messages.

    ``asked`` are the (role, content) of those. Raises KeyError when the field is missing, and ValueError when it is
    neither.
    """
    if not isinstance(row[name], list):
        return require_text(row, name)
    *earlier, (role, reply) = read_chat(row, name)
    if role != "assistant" or earlier not in ([], list(asked)):
        raise ValueError(f"has {name!r} that is no message of the assistant, alone or after the prompt's")
    return reply


def read_chat(row: Row, name: str) -> list[tuple[str, str]]:
    """Returns (role, content) of messages. Raises ValueError when the field is no list of them, or one is blank."""
    messages = row[name]
    if not messages or not all(isinstance(message, dict) and "role" in message for message in messages):
        raise ValueError(f"has {name!r} that is no list of messages {{role, content}}")
    try:
        return [(message["role"], require_text(message, "content")) for message in messages]
    except (KeyError, ValueError):
        raise ValueError(f"has {name!r} with a message without a text") from None
