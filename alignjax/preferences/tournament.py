"""Everybody against everybody: matrices of win rates with intervals, mean probabilities, length control, P_tau."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from alignjax.preferences.statistics import clopper_pearson, length_controlled_rate, mean_interval
from alignjax.types import Judge


class WinRates(NamedTuple):
    """How policy i compares with policy j, over the same N prompts."""

    rate: np.ndarray  # [P, P] how often i beats j, ties counting 1/2
    low: np.ndarray  # [P, P] of the rate's 95% interval
    high: np.ndarray  # [P, P]
    mean_probability: np.ndarray  # [P, P] mean of P(y_i > y_j)
    length_controlled: np.ndarray  # [P, P] ``length_controlled_rate`` of these P, lengths in characters
    probability: np.ndarray  # [P, P, N] P(y_i > y_j | x) of each prompt


def win_rates(judge: Judge, prompts: Sequence[str], replies: Mapping[str, Sequence[str]]) -> WinRates:
    """Compares the replies of every two policies to the same prompts.

    A judge's probability is a vote for the likelier side; exactly 1/2 is a tie. A policy against itself is 1/2 by
    symmetry. The judge is asked once for two policies: the values of (j, i) are 1 minus those of (i, j).
    """
    names, n = list(replies), len(prompts)
    rate, low, high, mean, controlled = (np.full((len(names), len(names)), 0.5) for _ in range(5))
    every = np.full((len(names), len(names), n), 0.5)
    lengths = {name: np.array([len(text) for text in texts]) for name, texts in replies.items()}
    for i, name in enumerate(names):
        for j in range(i):
            probabilities = judge(list(prompts), list(replies[name]), list(replies[names[j]]))
            votes = 0.5 + 0.5 * np.sign(probabilities - 0.5)
            rate[i, j] = float(np.mean(votes))
            low[i, j], high[i, j] = clopper_pearson(float(np.sum(votes)), n)
            rate[j, i], low[j, i], high[j, i] = 1 - rate[i, j], 1 - high[i, j], 1 - low[i, j]
            mean[i, j], every[i, j] = float(np.mean(probabilities)), probabilities
            mean[j, i], every[j, i] = 1 - mean[i, j], 1 - every[i, j]
            controlled[i, j] = length_controlled_rate(probabilities, lengths[name], lengths[names[j]])
            controlled[j, i] = 1 - controlled[i, j]
    return WinRates(rate, low, high, mean, controlled, every)


class RegularizedPreferences(NamedTuple):
    """P_tau of policy i over policy j."""

    preference: np.ndarray  # [P, P]
    low: np.ndarray  # [P, P] of its 95% interval
    high: np.ndarray  # [P, P]


def regularized_preferences(probability: np.ndarray, log_ratio: np.ndarray, tau: float) -> RegularizedPreferences:
    """Returns the regularised preferences of 2312.00886, Eq. 2, with Student's intervals over the prompts:

        P_tau(pi > pi') = P(pi > pi') - tau KL(pi, mu) + tau KL(pi', mu).

    ``probability`` [P, P, N] is P(y_i > y_j | x) of each prompt, ``log_ratio`` [P, N] is log pi_i(y_i) - log mu(y_i) in
    nats, whose mean estimates the KL. The interval is paired: it is that of the mean of the N sums. P_tau may leave
    [0, 1]. P_tau(i, j) + P_tau(j, i) = 1. With one prompt the interval is infinite.
    """
    values = probability - tau * (log_ratio[:, None] - log_ratio[None])
    ends = np.array([[mean_interval(value, (-np.inf, np.inf)) for value in row] for row in values])
    return RegularizedPreferences(values.mean(-1), ends[..., 0], ends[..., 1])
