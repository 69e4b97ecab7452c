"""The data formats once more, read in the plainest way: the referee of the package's readers.

Each function returns what one line means, given its JSON object, and raises Wrong where it means nothing. None is a
line that compares nothing.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

Read = Callable[[Any], Any]


class Wrong(Exception):
    """A line, or a text in it, has no meaning."""


def read_lines(text: str, read: Read) -> tuple[list[Any], int]:
    """Returns what the lines mean up to the first without a meaning, and the number of that line; 0: there is none."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(read(json_object(line)))
        except Wrong:
            return found, number
    return found, 0


def json_object(line: str) -> dict[str, Any]:
    """Returns the object of a line whose texts are all made of characters."""
    try:
        value = json.loads(line)
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair cannot be encoded
    except (ValueError, RecursionError):
        raise Wrong from None
    if not isinstance(value, dict):
        raise Wrong
    return value


def text(value: Any) -> str:
    """Returns a text that is not blank."""
    if not isinstance(value, str) or value.strip() == "":
        raise Wrong
    return value


def field(row: Any, name: str) -> Any:
    """Returns a field of an object."""
    if not isinstance(row, dict) or name not in row:
        raise Wrong
    return row[name]


def prompt(row: Any) -> str:
    """{"prompt": text}."""
    return text(field(row, "prompt"))


def opening(row: Any) -> tuple[str, str]:
    """{"prompt": text, "story": whole number}: two of ten stories are for tests, one for validation."""
    number = field(row, "story")
    if isinstance(number, str) and re.fullmatch(r"\s*[+-]?\d+\s*", number) and len(number) < 4000:
        number = int(number)
    if isinstance(number, float) and number == number // 1:
        number = int(number)
    if type(number) is not int:
        raise Wrong
    return ["test", "test", "validation", *["train"] * 7][number % 10], prompt(row)


def post(row: Any) -> str:
    """{"post" or "text": text, "title": text or nothing}."""
    title = row.get("title") if isinstance(row, dict) else None
    if title is not None and not isinstance(title, str):
        raise Wrong
    body = text(field(row, "text" if "text" in row else "post")).strip()
    return body if not (title or "").strip() else f"{title.strip()}\n\n{body}"


def share(value: Any) -> float:
    """Returns a number from 0 to 1."""
    if type(value) not in (int, float) or not 0 <= value <= 1:
        raise Wrong
    return float(value)


def comparison(row: Any) -> tuple[str, str, str, float]:
    """{"prompt", "first", "second", "p"}, or {"prompt", "chosen", "rejected"} with texts or messages."""
    chosen = ("chosen" in row or "rejected" in row) and not {"first", "second", "p"} & set(row)
    if not chosen:
        return prompt(row), text(field(row, "first")), text(field(row, "second")), share(field(row, "p"))
    asked = question(row)
    return asked, reply(field(row, "chosen"), asked), reply(field(row, "rejected"), asked), 1.0


def question(row: Any) -> str:
    """Returns a prompt that is a text, or the message of a user."""
    asked = field(row, "prompt")
    if isinstance(asked, list):
        ((role, asked),) = messages(asked, 1)
        if role != "user":
            raise Wrong
    return text(asked)


def demonstration(row: Any) -> tuple[str, str]:
    """{"prompt", "completion"} with texts or messages."""
    return question(row), reply(field(row, "completion"), question(row))


def summary(row: Any) -> tuple[str, str]:
    """A post with its author's summary."""
    return "summarize: " + post(row), text(field(row, "summary")).strip()


def messages(value: Any, *counts: int) -> list[tuple[str, str]]:
    """Returns (role, content) of so many messages."""
    if not isinstance(value, list) or len(value) not in counts:
        raise Wrong
    return [(field(message, "role"), text(field(message, "content"))) for message in value]


def reply(value: Any, asked: str) -> str:
    """Returns a text, or what the assistant says in messages: alone, or after the prompt."""
    if isinstance(value, str):
        return text(value)
    *earlier, (role, said) = messages(value, 1, 2)
    if role != "assistant" or earlier not in ([], [("user", asked)]):
        raise Wrong
    return said


def last_turn(dialogue: Any) -> tuple[str, str]:
    """Returns (prompt, last reply) of a dialogue."""
    before, found, after = text(dialogue).rpartition("Assistant:")
    if not found or not before.strip():
        raise Wrong
    return (before + found).strip(), after.strip()


def hh(row: Any) -> tuple[str, str, str, float] | None:
    """{"chosen": dialogue, "rejected": dialogue}."""
    (asked, good), (other, bad) = last_turn(field(row, "chosen")), last_turn(field(row, "rejected"))
    return (asked, good, bad, 1.0) if asked == other and good and bad else None


def hh_prompt(row: Any) -> str:
    """The prompt of the chosen dialogue; the rejected one is not read."""
    return last_turn(field(row, "chosen"))[0]


def tldr(row: Any) -> tuple[str, str, str, float]:
    """{"info": post, "summaries": [{"text"}, {"text"}], "choice": 0 or 1}."""
    summaries, choice = field(row, "summaries"), field(row, "choice")
    if not isinstance(summaries, list) or len(summaries) != 2 or type(choice) not in (int, float):
        raise Wrong
    first, second = (text(field(summary, "text")).strip() for summary in summaries)
    if choice not in (0, 1) or not isinstance(field(row, "info"), dict):
        raise Wrong
    return "summarize: " + post(row["info"]), first, second, 1.0 - choice
