"""Answers of a chat-completions endpoint, and the files that keep them.

An answer lies in a file named by the SHA-256 of its request's body: the model, the messages and the sampling settings.
The url is not part of it, because a server that moves gives the same answers.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.distributed import storage

Body = dict[str, Any]
"""The JSON of a request: {"model", "messages", "temperature", "max_tokens", ...}."""


class Answer(NamedTuple):
    """What the endpoint answered to one request."""

    text: str
    tokens: list[Any]  # of each position [token, [[token, log-prob in nats], ...]]; empty without log-probs
    prompt_tokens: int  # read by the endpoint; 0 where it does not say
    completion_tokens: int  # written by it
    tries: int  # requests that were sent for it; 0: it was kept

    @property
    def has_log_probs(self) -> bool:
        """Whether the endpoint gave log-probs of any token."""
        return any(pairs for _, pairs in self.tokens)


def request_digest(body: Body) -> str:
    """Returns the SHA-256 of a request's content, as 64 hexadecimal digits."""
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def parse_response(value: Any) -> Answer | None:
    """Returns the answer in the JSON of a response, without its tries; None when it has no choices or is damaged.

    A choice without text (a refusal, or a model that thought up to its last token) is an answer with an empty text.
    """
    try:
        choice, usage = value["choices"][0], value.get("usage") or {}
        positions = (choice.get("logprobs") or {}).get("content") or []
        tokens = [[p["token"], [[t["token"], t["logprob"]] for t in p.get("top_logprobs") or []]] for p in positions]
        read, written = (usage.get(f"{side}_tokens") or 0 for side in ("prompt", "completion"))
        return _checked(Answer(choice["message"].get("content") or "", tokens, read, written, tries=0))
    except (LookupError, TypeError, AttributeError):
        return None


def read_answer(path: Path, body: Body) -> Answer | None:
    """Returns the answer to the request that the file keeps; None when there is none, or the file is damaged."""
    try:
        kept = json.loads(storage.read_text(path) or "")
        return _checked(Answer(**kept["answer"])) if kept["request"] == body else None
    except (ValueError, LookupError, TypeError):
        return None


def is_log_prob(value: Any) -> bool:
    """Returns whether the value is a number below infinity; NaN is not."""
    return type(value) in (int, float) and value < math.inf


def _checked(answer: Answer) -> Answer | None:
    """Returns the answer; None when a part has another type."""
    numbers = (answer.prompt_tokens, answer.completion_tokens, answer.tries)
    positions = [(token, *pair) for token, pairs in answer.tokens for pair in pairs]
    fits = isinstance(answer.text, str) and all(type(number) is int and number >= 0 for number in numbers)
    named = all(isinstance(a, str) and isinstance(b, str) and is_log_prob(c) for a, b, c in positions)
    return answer if fits and named and isinstance(answer.tokens, list) else None


def write_answer(path: Path, body: Body, answer: Answer) -> None:
    """Keeps the answer to the request in the file, which is there whole or not at all."""
    storage.make_folder(path.parent)
    storage.write_json(path, {"request": body, "answer": answer._replace(tries=0)._asdict()})
