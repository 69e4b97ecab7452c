"""A pairwise judge among several replies to one prompt, by a round robin: RewardBench 2 (2506.01937)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from alignjax.tasks.json_lines import Row, require_text
from alignjax.types import Judge


class BestOf(NamedTuple):
    """A prompt with replies that people called right and wrong."""

    prompt: str
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    subset: str

    @property
    def is_judged(self) -> bool:
        """Whether ``best_of_accuracy`` counts it: the subset "Ties" has a score of its own, on margins of rewards."""
        return self.subset.lower() != "ties"


class ReadBestOf(Protocol):
    """Reads a prompt with its replies in the form of one kind of file."""

    def __call__(self, row: Row, /) -> BestOf:
        """Returns the prompt of a row with its replies.

        Raises KeyError when a field is missing, and ValueError when a value is wrong, with words that can follow
        "line 3 ...".
        """
        ...


def read_best_of(row: Row) -> BestOf:
    """Returns a row {prompt, chosen: [], rejected: [], num_correct, total_completions, subset} of RewardBench 2.

    Raises ValueError when a value is wrong or the counts are not those of the lists (``ReadBestOf``).
    """
    chosen, rejected = (_read_texts(row, name) for name in ("chosen", "rejected"))
    if (row["num_correct"], row["total_completions"]) != (len(chosen), len(chosen) + len(rejected)):
        raise ValueError(f"has {len(chosen)} chosen of {len(chosen) + len(rejected)} replies, not "
                         f"{row['num_correct']!r} of {row['total_completions']!r}")  # fmt: skip
    return BestOf(require_text(row, "prompt"), chosen, rejected, require_text(row, "subset"))


def _read_texts(row: Row, name: str) -> tuple[str, ...]:
    """Returns a field that must be a list of texts, at least one."""
    texts = row[name]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"has {name!r} that is no list of texts")
    return tuple(texts)


def round_robin_best(judge: Judge, prompt: str, completions: Sequence[str]) -> tuple[int, ...]:
    """Returns the indices of the completions with the largest mean P of beating another; several where they tie.

    The judge is asked once for every two completions: P(y_j > y_i) is 1 - P(y_i > y_j). Of a Bradley-Terry judge the
    best is the completion with the largest reward.
    """
    return _best_of_each(judge, [prompt], [completions])[0]


def best_of_accuracy(judge: Judge, rows: Sequence[BestOf]) -> dict[str, float]:
    """Returns, for every subset, the share of the prompts whose best completion is a chosen one.

    Where k completions tie for the best, each chosen one among them counts 1/k, as RewardBench 2 scores rewards that
    tie. Rows of its subset "Ties" are left out: their score needs margins of rewards, which a pairwise judge does not
    have.
    """
    rows = [row for row in rows if row.is_judged]
    best = _best_of_each(judge, [row.prompt for row in rows], [(*row.chosen, *row.rejected) for row in rows])
    credits: dict[str, list[float]] = {}
    for row, winners in zip(rows, best, strict=True):
        right = sum(index < len(row.chosen) for index in winners) / len(winners)
        credits.setdefault(row.subset, []).append(right)
    return {subset: float(np.mean(values)) for subset, values in credits.items()}


def _best_of_each(judge: Judge, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> list[tuple[int, ...]]:
    """Returns ``round_robin_best`` of every prompt; the judge is asked once for all, so that it fills its batches."""
    games = [(k, i, j) for k, own in enumerate(completions) for i in range(len(own)) for j in range(i)]
    replies, others = ([completions[game[0]][game[side]] for game in games] for side in (1, 2))
    probabilities = judge([prompts[k] for k, _, _ in games], replies, others) if games else np.zeros(0)
    wins = [np.zeros(len(own)) for own in completions]
    for (k, i, j), p in zip(games, probabilities, strict=True):
        wins[k][i] += p
        wins[k][j] += 1 - p
    return [tuple(np.flatnonzero(np.isclose(own, own.max(), rtol=0, atol=1e-9)).tolist()) for own in wins]
