"""Intervals of a pool's ratings: how much they depend on the prompts that were drawn (bootstrap: Efron 1979)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from alignjax.games.nash_face import maximal_lottery
from alignjax.preferences.elo import fit_bradley_terry
from alignjax.preferences.ratings import (
    CloneEffect,
    Pool,
    Ratings,
    clone_effects,
    condorcet_winner,
    nash_average,
    rate_pool,
)
from alignjax.preferences.statistics import clopper_pearson, mean_interval


class Intervals(NamedTuple):
    """95% intervals [P, 2], low and high, and how often a thing is so among resampled pools.

    Elo's is the percentile interval of the resampled pools. Mass and Nash average have no interval, only the range of
    the middle 95% of the resampled pools: they jump where policies are nearly equal, and the range then misses the
    truth more often than once in twenty. Exploitability's is ``exploitability_intervals``.
    """

    replicates: int
    seed: int
    is_paired: bool  # the prompts are resampled, once for all cells; else each cell is binomial, on its own
    mass: np.ndarray  # range
    nash: np.ndarray  # range
    elo: np.ndarray  # points, of the mean of the pool
    exploitability: np.ndarray
    condorcet: np.ndarray  # [P] how often each policy is the Condorcet winner; they sum to at most 1
    triples: np.ndarray  # [T] how often each of the pool's cyclic triples is a cycle, in the same direction


class RatedPool(NamedTuple):
    """A pool with everything that is said of it."""

    title: str  # who judged, or the file
    pool: Pool
    ratings: Ratings
    clones: tuple[CloneEffect, ...]
    intervals: Intervals | None


def rate_fully(title: str, pool: Pool, replicates: int, seed: int) -> RatedPool:
    """Returns ratings, clone effects and, with replicates, intervals.

    A pool that does not say how many comparisons its cells are of, or says one, has no intervals.
    """
    ratings = rate_pool(pool)
    known = pool.comparisons is not None and pool.comparisons.min() > 1
    intervals = bootstrap(pool, ratings, replicates, seed) if replicates and known else None
    return RatedPool(title, pool, ratings, clone_effects(pool, ratings), intervals)


def resampled_rates(pool: Pool, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the rates [P, P] of resampled pools.

    Where votes of each prompt are known, N prompts are drawn with replacement, the same for all cells: what two cells
    share stays shared. Else each cell is drawn from the binomial of its count, independently, with half wins of ties
    taken for whole ones. That is right for cells that share no prompt and no reply. The cells of a Tournament share
    both: then a policy's luck is the same against all others, and Elo varies more than these pools do.
    """
    rng, size = np.random.default_rng(seed), len(pool.policies)
    if pool.votes is not None:
        columns = pool.votes.reshape(size * size, -1)
        n = columns.shape[1]
        for _ in range(replicates):
            chosen = np.bincount(rng.integers(n, size=n), minlength=n)
            wins = (columns @ chosen).reshape(size, size)
            yield 0.5 + (wins - wins.T) / (2 * n)
        return
    assert pool.comparisons is not None  # ``rate_fully`` asks
    upper = np.triu_indices(size, 1)
    counts = pool.comparisons[upper].astype(np.int64)
    for _ in range(replicates):
        rate = np.zeros((size, size))
        rate[upper] = rng.binomial(counts, pool.rate[upper]) / counts - 0.5
        yield 0.5 + (rate - rate.T)


def bootstrap(pool: Pool, ratings: Ratings, replicates: int, seed: int) -> Intervals:
    """Returns the intervals of a pool whose votes or counts are known.

    All ratings of a replicate are of one resampled pool, so that their differences are paired too.
    """
    rates = np.stack(list(resampled_rates(pool, replicates, seed)))
    mass = np.stack([maximal_lottery(rate) for rate in rates])
    nash = np.stack([nash_average(rate, row) for rate, row in zip(rates, mass, strict=True)])
    elo = np.stack([fit_bradley_terry(rate, pool.comparisons).elo for rate in rates])
    winners = [condorcet_winner(rate) for rate in rates]
    condorcet = np.bincount([w for w in winners if w is not None], minlength=len(pool.policies)) / replicates
    cycles = [_is_cycle(rates, triple.policies).mean() for triple in ratings.triples]
    return Intervals(
        replicates,
        seed,
        pool.votes is not None,
        _percentiles(mass),
        _percentiles(nash),
        _percentiles(elo),
        exploitability_intervals(pool),
        condorcet,
        np.array(cycles),
    )


def exploitability_intervals(pool: Pool, level: float = 0.95) -> np.ndarray:
    """Returns the interval [P, 2] of each policy's exploitability, max over j of P(j > i) - 1/2.

    Its ends are the largest lower and the largest upper end of the intervals of P(j > i), each at 1 - (1 - level) /
    (P - 1), so that all hold at once, whatever the cells share (Bonferroni). They are Clopper and Pearson's for votes,
    which cover with at least ``level``, and Student's, which is approximate, for probabilities. Percentiles of
    resampled maxima would not cover: a maximum of noise is above the maximum of the truth.
    """
    size = len(pool.policies)
    each = 1 - (1 - level) / (size - 1)
    ends = np.full((size, size, 2), 0.5)
    for i, j in itertools.permutations(range(size), 2):
        ends[i, j] = _cell_interval(pool, i, j, each)
    return ends.max(0) - 0.5


def _cell_interval(pool: Pool, i: int, j: int, level: float) -> tuple[float, float]:
    """Returns the interval of P(i > j): exact for votes, Student's for probabilities."""
    assert pool.comparisons is not None  # ``rate_fully`` asks
    votes = None if pool.votes is None else pool.votes[i, j]
    if votes is None or np.isin(votes, (0.0, 0.5, 1.0)).all():
        n = int(pool.comparisons[i, j])
        return clopper_pearson(pool.rate[i, j] * n, n, level)
    return mean_interval(votes, (0.0, 1.0), level)


def _is_cycle(rates: np.ndarray, policies: tuple[int, int, int]) -> np.ndarray:
    """Returns in which pools [B, P, P] the policies beat each other in this order, [B]."""
    i, j, k = policies
    return (rates[:, i, j] > 0.5) & (rates[:, j, k] > 0.5) & (rates[:, k, i] > 0.5)


def _percentiles(values: np.ndarray) -> np.ndarray:
    """Returns the 2.5% and the 97.5% percentile [P, 2] of values [B, P]."""
    return np.quantile(values, (0.025, 0.975), axis=0).T
