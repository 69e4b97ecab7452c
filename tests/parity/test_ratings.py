"""Ratings of pools against OpenSpiel: Nash averaging (the largest entropy), and Elo."""

import warnings

import numpy as np
import pytest

from alignjax.games import zoo
from alignjax.games.nash_face import maximal_lottery, maximum_entropy, nash_face
from alignjax.preferences.elo import fit_bradley_terry
from alignjax.preferences.ratings import nash_average
from tests.parity.conftest import NOTES, SEED

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import pyspiel
    from open_spiel.python.algorithms.elo import compute_ratings_from_matrices
    from open_spiel.python.algorithms.nash_averaging import nash_averaging


def openspiel_lottery(rate):
    """OpenSpiel's Nash policy of the largest entropy, [P], and the Nash averages against it."""
    a = (rate - rate.T) / 2
    game = pyspiel.create_matrix_game(a.tolist(), (-a).tolist())
    return tuple(map(np.ravel, nash_averaging(game)))


@pytest.mark.parametrize("family", ["cyclic", "unstructured", "transitive"])
def test_nash_averages_are_openspiel_s(family):
    worst = 0.0
    for size in (3, 5, 8):
        rate = zoo.RANDOM_PREFERENCES[family](SEED, 1, size)[0]
        _, theirs = openspiel_lottery(rate)
        worst = max(worst, abs(nash_average(rate, maximal_lottery(rate)) - theirs).max())
    NOTES.append(f"Nash averages of {family} pools: the largest difference is {worst:.1e}")
    assert worst < 1e-5


def test_the_largest_entropy_among_many_lotteries_is_openspiel_s():
    several, worst = 0, 0.0
    for seed in range(SEED, SEED + 12):
        rate = zoo.sparse(seed, 1, 6, density=0.4)[0]
        face = nash_face(rate)
        several += not face.is_unique
        mass, _ = openspiel_lottery(rate)
        worst = max(worst, abs(maximum_entropy(face) - mass).max())
    NOTES.append(f"the largest entropy in {several} pools of many lotteries: the largest difference is {worst:.1e}")
    assert several and worst < 1e-3


def test_elo_is_openspiel_s():
    """Voters with random orders: their wins as a matrix."""
    rng = np.random.default_rng(SEED)
    places = np.array([rng.permutation(5) for _ in range(41)])
    wins = (places[:, :, None] < places[:, None]).sum(0)
    elo = compute_ratings_from_matrices(wins, smoothing_factor=0.0)
    np.testing.assert_allclose(fit_bradley_terry(wins / 41 + 0.5 * np.eye(5)).elo, elo - elo.mean(), atol=0.5)
