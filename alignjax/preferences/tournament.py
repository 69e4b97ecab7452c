"""Everybody against everybody: win-rate matrices with exact intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alignjax.types import Judge


class WinRates(NamedTuple):
    """How often policy i beats policy j, ties counting 1/2, with a 95% interval."""

    rate: np.ndarray  # [P, P]
    low: np.ndarray  # [P, P]
    high: np.ndarray  # [P, P]


def clopper_pearson(wins: float, n: int, level: float = 0.95) -> tuple[float, float]:
    """Returns the exact binomial interval (Clopper and Pearson 1934); ``wins`` may be a half-integer, with ties."""
    from scipy import special  # here: only the end of a run needs it

    tail = (1 - level) / 2
    low = special.betaincinv(wins, n - wins + 1, tail) if wins > 0 else 0.0
    high = special.betaincinv(wins + 1, n - wins, 1 - tail) if wins < n else 1.0
    return float(low), float(high)


def win_rates(judge: Judge, prompts: Sequence[str], replies: Mapping[str, Sequence[str]]) -> WinRates:
    """Compares the replies of every two policies to the same prompts.

    A judge's probability is a vote for the likelier side; exactly 1/2 is a tie. A policy against itself is 1/2 by
    symmetry.
    """
    names, n = list(replies), len(prompts)
    rate, low, high = (np.full((len(names), len(names)), 0.5) for _ in range(3))
    for i, name in enumerate(names):
        for j in range(i):
            probabilities = judge(list(prompts), list(replies[name]), list(replies[names[j]]))
            votes = 0.5 + 0.5 * np.sign(probabilities - 0.5)
            rate[i, j] = float(np.mean(votes))
            low[i, j], high[i, j] = clopper_pearson(float(np.sum(votes)), n)
            rate[j, i], low[j, i], high[j, i] = 1 - rate[i, j], 1 - high[i, j], 1 - low[i, j]
    return WinRates(rate, low, high)
