"""Damaged lines of every data format, plain and compressed, against ``plain_readers``."""

from __future__ import annotations

import functools
import gzip
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from alignjax.pipeline.stages import LoadPairs
from alignjax.tasks import dialogue, stories, summary
from alignjax.tasks.json_lines import (
    ReadComparison,
    file_digest,
    read_comparison,
    read_demonstration,
    read_prompts,
    read_rows,
)
from tests.fuzz import plain_readers
from tests.fuzz.json_mutations import NESTED, WHOLE, entries, mutations, replaced, write
from tests.fuzz.outcomes import Disagreement, Input

LONG = "long " * 200_000
_INSERTED = {
    "NUL": b"\0", "ff": b"\xff", "U+2028": "\u2028".encode(), "half a pair": rb"\ud83d", "BOM": b"\xef\xbb\xbf",
    "CRLF": b"\r\n", "LF": b"\n", "CR": b"\r", "quote": b'"', "backslash": b"\\",
}  # fmt: skip
_WHOLE_LINES = {
    "empty": b"", "spaces": b" \t ", "U+2028": "\u2028".encode(), "NaN": b"NaN", "1e400": b"1e400", "null": b"null",
    "text": b'"text"', "list": b"[]", "object": b"{}", "lists": b"[" * 100_000, "objects": b'{"a":' * 100_000,
    "digits": b"9" * 10_000,
}  # fmt: skip


class Format(NamedTuple):
    """One kind of data file."""

    rows: tuple[dict[str, Any], ...]  # a good one of each form
    read: Callable[[str], Any]  # the package's reader: path -> what the lines mean
    plain: plain_readers.Read


def _comparisons(path: str, read: ReadComparison = read_comparison) -> list[Any]:
    """Returns a pairs file's comparisons as the stage reads them."""
    return LoadPairs(path, read).rows(SimpleNamespace(name="pairs"))  # type: ignore[arg-type]


def _openings(path: str) -> list[tuple[str, str]]:
    """Returns (split, opening) in the order of the splits."""
    splits = stories.read_openings(path, file_digest(path))
    return [(split, opening) for split, openings in splits.items() for opening in openings]


def _said(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


FORMATS = {
    "prompts": Format(({"prompt": "A 😀 sat.", "id": 3},), read_prompts, plain_readers.prompt),
    "pairs": Format(
        (
            {"prompt": "A cat", "first": " sat.", "second": " flew.", "p": 0.25},
            {"prompt": "A cat", "chosen": " sat.", "rejected": " flew."},
            {
                "prompt": _said("user", "A cat"),
                "chosen": _said("user", "A cat") + _said("assistant", " sat."),
                "rejected": _said("assistant", " flew."),
            },
        ),
        _comparisons,
        plain_readers.comparison,
    ),
    "hh": Format(
        ({"chosen": "\n\nHuman: A\n\nAssistant: b", "rejected": "\n\nHuman: A\n\nAssistant: c"},),
        functools.partial(_comparisons, read=dialogue.read_hh_comparison),
        plain_readers.hh,
    ),
    "dialogues": Format(
        ({"chosen": "\n\nHuman: A\n\nAssistant: b"},),
        lambda path: dialogue.read_dialogue_prompts(path, file_digest(path)),
        plain_readers.hh_prompt,
    ),
    "replies": Format(
        (
            {"prompt": "A cat", "completion": " sat."},
            {"prompt": _said("user", "A cat"), "completion": _said("assistant", " sat.")},
        ),
        lambda path: read_rows(path, "replies", read_demonstration),
        plain_readers.demonstration,
    ),
    "summaries": Format(
        ({"title": "Mine", "post": "I ran.", "summary": " A run."},),
        lambda path: read_rows(path, "replies", summary.read_tldr_demonstration),
        plain_readers.summary,
    ),
    "openings": Format(({"prompt": "One day", "story": 13},), _openings, plain_readers.opening),
    "posts": Format(
        ({"title": "Mine", "post": "I ran.", "summary": "A run."}, {"text": "I ran."}),
        lambda path: [post.text for post in summary.read_posts(path, file_digest(path))],
        plain_readers.post,
    ),
    "tldr": Format(
        ({"info": {"title": "T", "post": "I ran."}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1},),
        functools.partial(_comparisons, read=summary.read_tldr_comparison),
        plain_readers.tldr,
    ),
}


def inputs(folder: Path, seed: int) -> Iterator[Input]:
    """Yields every damaged file; each is written into the folder when it is its turn."""
    rng = random.Random(seed)
    for (name, kind), suffix in itertools.product(FORMATS.items(), (".jsonl", ".jsonl.gz")):
        for form, row in enumerate(kind.rows):
            for change, line in _damaged_lines(row, rng).items():
                lines = [json.dumps(kind.rows[0]).encode(), line, json.dumps(row, ensure_ascii=False).encode(), b""]
                yield _line_input(f"{name} {form} {suffix} {change}", folder / f"a{suffix}", b"\n".join(lines), kind)
    yield from _text_inputs(folder, rng)
    yield from _damaged_archives(folder, rng)


def _damaged_lines(row: dict[str, Any], rng: random.Random) -> dict[str, bytes]:
    """Returns the line of a row, damaged in every way, by name."""
    found = {name: text.encode() for name, text in mutations(row)}
    for path, _ in entries(row):
        for name, value in {"long": LONG, **{text: text for text in NESTED}}.items():
            found[f"{path}={name}"] = write(replaced(row, path, value)).encode()
    for key, value in row.items():
        for name, other in {"the same": value, "text": "other", "number": 3, "null": None}.items():
            found[f"{key} twice, {name}"] = (
                json.dumps(row)[:-1] + f", {json.dumps(key)}: {json.dumps(other)}}}"
            ).encode()
    return found | _damaged_bytes(json.dumps(row, ensure_ascii=False).encode(), rng) | _WHOLE_LINES


def _damaged_bytes(line: bytes, rng: random.Random) -> dict[str, bytes]:
    """Returns a line without its end, without a byte, and with something inserted, at several places."""
    places = sorted({0, 1, len(line) - 1, *rng.sample(range(len(line)), 12)})
    found = {f"cut at {i}": line[:i] for i in places} | {f"without byte {i}": line[:i] + line[i + 1 :] for i in places}
    for i, (name, piece) in itertools.product([*places, len(line)], _INSERTED.items()):
        found[f"{name} at {i}"] = line[:i] + piece + line[i:]
    return found


def _line_input(name: str, path: Path, data: bytes, kind: Format) -> Input:
    """Returns a file of lines as an input; a refusal names the first line that means nothing."""
    rows, wrong = _read_plainly(data, kind.plain)

    def attempt() -> None:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        found = kind.read(str(path))
        if wrong:
            raise Disagreement(f"line {wrong} means nothing and is read")
        _compare(found, _in_order_of_splits(rows) if kind.read is _openings else rows)

    return Input(name, (str(path), f"line {wrong or 2} "), attempt, name.endswith(WHOLE))


def _read_plainly(data: bytes, read: plain_readers.Read) -> tuple[list[Any], int]:
    """Returns what the lines mean, and the number of the first line that means nothing, 0 where all do."""
    bad = _undecodable_line(data)
    return ([], bad) if bad else plain_readers.read_lines(data.decode(), read)


def _undecodable_line(data: bytes) -> int:
    """Returns the number of the first line that is not in UTF-8; 0: all are."""
    for number, line in enumerate(data.split(b"\n"), 1):
        try:
            line.decode()
        except UnicodeDecodeError:
            return number
    return 0


def _in_order_of_splits(rows: list[Any]) -> list[Any]:
    return [row for split in ("train", "validation", "test") for row in rows if row[0] == split]


def _compare(found: Any, expected: Any) -> None:
    """Raises Disagreement unless two readings are equal."""
    if found != expected:
        raise Disagreement(f"{str(found)[:200]} is read, {str(expected)[:200]} is meant")


def _text_inputs(folder: Path, rng: random.Random) -> Iterator[Input]:
    """Yields damaged text files: prompts, one a line, and stories."""
    prompts = "One day\nA ☃ sat.\nthe end\n".encode()
    told = "Once <|endoftext|>\nA ☃ sat. <|endoftext|>\n".encode()
    for suffix in ("", ".gz"):
        for change, data in _damaged_bytes(prompts, rng).items():
            yield _text_input(
                f"prompts .txt{suffix} {change}", folder / f"a.txt{suffix}", data, read_prompts, _lines_of
            )
        for change, data in _damaged_bytes(told, rng).items():
            path = folder / f"told.txt{suffix}"
            yield _text_input(f"stories {suffix} {change}", path, data, _read_stories, _stories_of)


def _read_stories(path: str) -> list[str]:
    return stories.read_stories(path, file_digest(path))


def _lines_of(text: str) -> list[str]:
    return [line.removesuffix("\r") for line in text.split("\n") if line.strip()]


def _stories_of(text: str) -> list[str]:
    *whole, _ = text.split("<|endoftext|>")
    return [story.strip() for story in whole if story.strip()]


def _text_input(
    name: str, path: Path, data: bytes, read: Callable[[str], list[str]], plain: Callable[[str], list[str]]
) -> Input:
    """Returns a text file as an input; a byte that is no text is refused by its line."""
    wrong = _undecodable_line(data)

    def attempt() -> None:
        path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
        _compare(read(str(path)), plain(data.decode("utf-8-sig")))

    return Input(name, (str(path), f"line {wrong} " if wrong else ""), attempt)


def _damaged_archives(folder: Path, rng: random.Random) -> Iterator[Input]:
    """Yields compressed files that are cut or have one changed byte: they are refused, or hold what they held."""
    path, line = folder / "damaged.jsonl.gz", json.dumps({"prompt": "A ☃ sat."}).encode() + b"\n"
    whole = gzip.compress(line * 3)
    for i in range(len(whole)):
        for name, data in {
            f"cut at {i}": whole[:i],
            f"byte {i}": whole[:i] + bytes([whole[i] ^ (1 << rng.randrange(8))]) + whole[i + 1 :],
        }.items():

            def attempt(data: bytes = data) -> None:
                path.write_bytes(data)
                _compare(read_prompts(str(path)), ["A ☃ sat."] * 3)

            yield Input(f"archive {name}", (str(path),), attempt)
