"""The replies of a table's policies: what they depend on, their file, and what can be said of them without a judge."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignjax.distributed import storage
from alignjax.errors import UserError
from alignjax.fields import Kind, stage_input
from alignjax.pipeline.stages.writing import Writing
from alignjax.preferences.statistics import PAPER_SAMPLE, PAPER_WORDS, distinct_n, perplexity, word_count
from alignjax.tasks.task import Task

_NUMBER = (float, int)
REPLY_COLUMNS = {"text": (str,), "length": (int,), "kl": _NUMBER, "reference_logp": _NUMBER}
"""The columns of a file of replies, and the types of their values."""
_MADE_BY = "made_by"  # beside the columns: the digest of what they depend on


@dataclasses.dataclass(frozen=True)
class ReplySource:
    """What one policy's replies depend on, beside the task and the experiment's seed: its fingerprint names them."""

    name: str  # in the table; the policy draws with a key of its own
    writing: Writing
    prompts: int
    split: str
    seed: int
    policy: str = stage_input(Kind.POLICY)
    reference: str = stage_input(Kind.POLICY)


def has_replies(path: Path, digest: str) -> bool:
    """Returns whether a file holds the replies with this digest. Raises UserError when it is no JSON."""
    if storage.read_text(path) is None:
        return False
    found = storage.read_json(path)
    return not isinstance(found, dict) or found.get(_MADE_BY) == digest  # ``read_replies`` refuses what is no dict


def write_replies(path: Path, digest: str, columns: Sequence[Sequence[Any]]) -> None:
    """Writes the columns, in the order of ``REPLY_COLUMNS``."""
    storage.write_json(path, {_MADE_BY: digest, **dict(zip(REPLY_COLUMNS, map(list, columns), strict=True))})


def read_replies(path: Path, count: int) -> dict[str, list]:
    """Returns the columns of a replies file. Raises UserError when it is damaged."""
    columns = storage.read_json(path)

    def is_complete(name: str) -> bool:
        column = columns.get(name)
        right = REPLY_COLUMNS[name]
        return isinstance(column, list) and len(column) == count and all(type(x) in right for x in column)

    if not isinstance(columns, dict) or not all(map(is_complete, REPLY_COLUMNS)):
        raise UserError(f"{path} is damaged; remove it to have it written again")
    return columns


def reply_measures(
    task: Task, prompts: Sequence[str], written: Mapping[str, Any], replies: Mapping[str, Sequence[str]]
) -> dict[str, list[float | None]]:
    """Returns what can be said of each policy's replies without a judge; None: not measured.

    ``written`` are the columns of each policy's file, ``replies`` its cleaned texts. The entropy is the mean of
    -log pi(y), in nats a response, with log pi = (log pi - log mu) + log mu. distinct-n is that of 2307.12950, on as
    many words of each policy as the one with the fewest has; None for a policy that writes no words.
    """
    kl, logp, length = (
        [np.array(columns[name], float) for columns in written.values()] for name in ("kl", "reference_logp", "length")
    )
    words = {p: word_count(replies[p], PAPER_WORDS) for p in written}
    sample = min([PAPER_SAMPLE, *filter(None, words.values())])
    distinct = {
        f"distinct_{n}": [distinct_n(replies[p], n, PAPER_WORDS, sample) if words[p] else None for p in written]
        for n in (1, 2, 3)
    }
    return {
        "mean_length": [float(np.mean(column)) for column in length],
        "kl_to_reference": [finite(float(np.mean(column))) for column in kl],
        "mean_score": mean_scores(task, prompts, {p: replies[p] for p in written}),
        "mean_characters": [float(np.mean(list(map(len, replies[p])))) for p in written],
        **distinct,
        "perplexity": [finite(perplexity(*columns)) for columns in zip(logp, length, strict=True)],
        "entropy": [finite(-float(np.mean(a + b))) for a, b in zip(kl, logp, strict=True)],
    }


def mean_scores(task: Task, prompts: Sequence[str], replies: Mapping[str, Sequence[str]]) -> list[float | None]:
    """Returns every policy's mean by the task's own score; None where it has none."""
    if task.score is None:
        return [None] * len(replies)
    return [float(np.mean(list(map(task.score, prompts, texts)))) for texts in replies.values()]


def messages_of(task: Task, prompt: str) -> list[dict[str, str]] | None:
    """Returns the prompt as chat messages; None where the task's function refuses it."""
    try:
        return list(task.messages(prompt))
    except UserError:
        return None


def finite(value: float) -> float | None:
    """Returns the value; None where it is not finite, which JSON does not know."""
    return value if math.isfinite(value) else None
