"""Bradley-Terry ratings of a pool from its win rates, in nats and as Elo points. NumPy on the host."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

ELO_POINTS = 400 / np.log(10)
"""Elo points a nat: 400 points are odds of 10 to 1."""
VIRTUAL_WINS = 0.5
"""Added to each side of every pair where the likelihood has no maximum."""
UNKNOWN_COUNT = 100
"""Comparisons that each cell counts as where their number is not known: it matters where virtual wins are added."""


class BradleyTerryFit(NamedTuple):
    """Rewards that explain a pool's win rates, and what they leave unexplained."""

    reward: np.ndarray  # [P] nats, mean 0
    residual: np.ndarray  # [P, P] rate - fitted; antisymmetric
    has_virtual_wins: bool

    @property
    def elo(self) -> np.ndarray:
        """Returns the ratings [P] in Elo points, mean 0."""
        return self.reward * ELO_POINTS

    @property
    def root_mean_square(self) -> float:
        """Returns the root of the mean squared residual over all pairs."""
        return float(np.sqrt(np.mean(self.residual[np.triu_indices(len(self.reward), 1)] ** 2)))


def fit_bradley_terry(rate: np.ndarray, count: np.ndarray | None = None) -> BradleyTerryFit:
    """Returns the rewards r of the largest likelihood (Bradley and Terry 1952; Zermelo 1929):

        argmax over r of sum over i < j of n_ij (q_ij log sigmoid(r_i - r_j) + (1 - q_ij) log sigmoid(r_j - r_i)),

    q = ``rate`` [P, P], n = ``count`` [P, P] comparisons, all alike when None. There is no maximum where the pool falls
    into two parts of which one never loses to the other (Ford 1957): the distance of the parts would be infinite. Then
    every pair gets ``VIRTUAL_WINS`` on each side. Copies of a policy get one reward, but change the others', since each
    copy's comparisons count.
    """
    rate = np.asarray(rate, np.float64)
    n = np.full(rate.shape, float(UNKNOWN_COUNT)) if count is None else np.asarray(count, np.float64)
    has_virtual_wins = not _is_strongly_connected(rate)
    wins = n * rate + (VIRTUAL_WINS if has_virtual_wins else 0.0)
    np.fill_diagonal(wins, 0.0)
    reward = _maximise(wins)
    return BradleyTerryFit(reward, rate - win_probabilities(reward), has_virtual_wins)


def win_probabilities(reward: np.ndarray) -> np.ndarray:
    """Returns sigmoid(r_i - r_j), [P, P], of rewards [P]; antisymmetric around 1/2 to the bit."""
    return 0.5 + 0.5 * np.tanh((reward[:, None] - reward[None]) / 2)


def _is_strongly_connected(rate: np.ndarray) -> bool:
    """Returns whether a chain of wins leads from every policy to every other."""
    reaches = (rate > 0) | np.eye(len(rate), dtype=bool)
    for _ in range(len(rate).bit_length()):
        reaches = reaches @ reaches
    return bool(reaches.all())


def _maximise(wins: np.ndarray) -> np.ndarray:
    """Returns the rewards [P], mean 0, of wins [P, P] by damped Newton steps from 0; the likelihood is concave."""
    matches, r = wins + wins.T, np.zeros(len(wins))

    def loss(r: np.ndarray) -> float:
        return float(np.sum(wins * np.logaddexp(0, r[None] - r[:, None])))

    for _ in range(100):
        p = win_probabilities(r)
        gradient = (wins - matches * p).sum(1)
        weight = matches * p * p.T
        information = np.diag(weight.sum(1)) - weight + weight.mean()  # the mean keeps sum r = 0, and it invertible
        step = np.linalg.solve(information, gradient)
        gain = gradient @ step
        size = 1.0
        while gain > 1e-9 * matches.sum() and loss(r + size * step) > loss(r) - 0.1 * size * gain and size > 1e-9:
            size /= 2
        r = r + size * step
        if np.max(abs(size * step)) < 1e-13:
            break
    return r - r.mean()
