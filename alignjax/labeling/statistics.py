"""What can be said of labelled pairs: how often they are right, their bias to a position, lengths, agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.preferences.statistics import clopper_pearson


class JudgedPairs(NamedTuple):
    """The pairs of one way to label, and what a judge says of them."""

    rows: Sequence[Mapping[str, Any]]  # with the columns of a dataset of pairs
    judged: np.ndarray  # [N] P(first > second) by the judge
    dropped: int | None = None  # prompts without a pair; None: not known


class Share(NamedTuple):
    """A share with its exact 95% interval; None where it is a share of nothing."""

    value: float | None
    low: float
    high: float
    n: int


def share(hits: np.ndarray) -> Share:
    """Returns the share of true entries, [N] bool."""
    n, count = len(hits), int(np.sum(hits))
    return Share(count / n, *clopper_pearson(count, n), n) if n else Share(None, 0.0, 1.0, 0)


def label_accuracy(pairs: JudgedPairs) -> Share:
    """Returns how often the label's likelier side is the judge's, of the pairs where neither calls them equal."""
    labels = np.array([row["p"] for row in pairs.rows])
    decided = (labels != 0.5) & (pairs.judged != 0.5)
    return share((labels > 0.5)[decided] == (pairs.judged > 0.5)[decided])


def positive_below(pairs: JudgedPairs) -> Share:
    """Returns how often the judge calls the reply under the positive affix worse, of the pairs that have one.

    Equal replies count as not worse.
    """
    positive = np.array([row["positive"] for row in pairs.rows])
    known = positive >= 0
    first_is_worse = np.where(positive == 0, pairs.judged < 0.5, pairs.judged > 0.5)
    return share(first_is_worse[known])


def pair_statistics(pairs: JudgedPairs) -> dict[str, Any]:
    """Returns the figures of one way to label; lengths are in characters."""
    labels = np.array([row["p"] for row in pairs.rows])
    lengths = np.array([[len(row["first"]), len(row["second"])] for row in pairs.rows])
    preferred = np.where(labels > 0.5, 0, 1)
    decided, rows = labels != 0.5, np.arange(len(labels))
    return {
        "pairs": len(labels),
        "dropped": pairs.dropped,
        "judge_ties": float(np.mean(pairs.judged == 0.5)),
        "accuracy": label_accuracy(pairs)._asdict(),
        "positive_below": positive_below(pairs)._asdict(),
        "first_preferred": float(np.mean(labels)),
        "confidence": float(np.mean(np.abs(2 * labels - 1))),
        "preferred_characters": float(np.mean(lengths[rows, preferred][decided])) if decided.any() else None,
        "other_characters": float(np.mean(lengths[rows, 1 - preferred][decided])) if decided.any() else None,
    }


def agreement(first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]) -> Share:
    """Returns how often two ways to label prefer the same reply, of the pairs that both have, in whatever order."""

    def winners(rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, frozenset[str]], str]:
        return {
            (row["prompt"], frozenset((row["first"], row["second"]))): row["first" if row["p"] > 0.5 else "second"]
            for row in rows
            if row["p"] != 0.5
        }

    one, other = winners(first), winners(second)
    return share(np.array([one[pair] == other[pair] for pair in one.keys() & other.keys()], bool))
