"""The bootstrap of a pool's ratings (Efron 1979): how much they depend on the prompts that happened to be drawn."""

from __future__ import annotations

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
    exploitabilities,
    nash_average,
    rate_pool,
)


class Intervals(NamedTuple):
    """95% intervals over resampled pools, by percentiles, and how often a thing is so among them."""

    replicates: int
    seed: int
    is_paired: bool  # the prompts are resampled, once for all cells; else each cell is binomial, on its own
    mass: np.ndarray  # [P, 2] low and high
    nash: np.ndarray  # [P, 2]
    elo: np.ndarray  # [P, 2] points, of the mean of the pool
    exploitability: np.ndarray  # [P, 2]
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
    """Returns ratings, clone effects and, with replicates and where the pool says how many comparisons it is of,
    intervals."""
    ratings = rate_pool(pool)
    known = pool.votes is not None or pool.comparisons is not None
    intervals = bootstrap(pool, ratings, replicates, seed) if replicates and known else None
    return RatedPool(title, pool, ratings, clone_effects(pool, ratings), intervals)


def resampled_rates(pool: Pool, replicates: int, seed: int) -> Iterator[np.ndarray]:
    """Yields the rates [P, P] of resampled pools.

    Where votes of each prompt are known, N prompts are drawn with replacement, the same for all cells: what two cells
    share stays shared. Else each cell is drawn from the binomial of its count, independently; this takes half wins of
    ties for whole ones, so its intervals are a little too wide where there are ties.
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
        _percentiles(exploitabilities(rates)),
        condorcet,
        np.array(cycles),
    )


def _is_cycle(rates: np.ndarray, policies: tuple[int, int, int]) -> np.ndarray:
    """Returns in which pools [B, P, P] the policies beat each other in this order, [B]."""
    i, j, k = policies
    return (rates[:, i, j] > 0.5) & (rates[:, j, k] > 0.5) & (rates[:, k, i] > 0.5)


def _percentiles(values: np.ndarray) -> np.ndarray:
    """Returns the 2.5% and the 97.5% percentile [P, 2] of values [B, P]."""
    return np.quantile(values, (0.025, 0.975), axis=0).T
