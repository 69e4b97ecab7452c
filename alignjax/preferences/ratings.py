"""The game among policies: ratings of a pool from how often each policy beats each other one.

A pool is one symmetric zero-sum game: A = P - 1/2 over P policies. NumPy and SciPy on the host, in float64.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.errors import UserError
from alignjax.games.game import Game
from alignjax.games.nash_face import mass_ranges, maximal_lottery, nash_face
from alignjax.games.solve import certified_gap
from alignjax.preferences.elo import BradleyTerryFit, fit_bradley_terry

_ROUNDING = 0.01 + 1e-6  # P + P' = 1 up to this: published tables have two decimals


class Pool(NamedTuple):
    """P policies and how often each beats each other one."""

    policies: tuple[str, ...]
    rate: np.ndarray  # [P, P] how often i beats j; antisymmetric around 1/2 to the bit
    comparisons: np.ndarray | None = None  # [P, P] their number in each cell; None: not known
    votes: np.ndarray | None = None  # [P, P, N] of each prompt, whose mean is ``rate``; None: not known


def make_pool(policies: Sequence[str], rate: Any, count: Any = None) -> Pool:
    """Returns the pool of a matrix [P, P] and of the number of comparisons of each cell: one number, or [P, P].

    Where P + P' is not 1 because both were rounded, each takes half of the difference. Raises UserError, which names
    the cell, on a matrix that is not square, has an entry that is no probability, or a P + P' that is more than 0.01
    away from 1; on fewer than two policies, and on names that are empty or not unique; and on
    a count that is not symmetric, positive and whole.
    """
    names, p = tuple(policies), np.asarray(rate, np.float64)
    _check_names(names)
    if p.shape != (len(names), len(names)):
        raise UserError(f"the matrix has shape {list(p.shape)} and there are {len(names)} policies; "
                        "give a row and a column for each")  # fmt: skip
    for i, j in itertools.product(range(len(names)), repeat=2):
        cell = f"P({names[i]} > {names[j]}) = {p[i, j]:g}"
        if not 0 <= p[i, j] <= 1:
            percent = "; a percentage? divide by 100" if 1 < p[i, j] <= 100 else "; correct that cell"
            raise UserError(f"{cell} is not in [0, 1]{percent}")
        if i == j and abs(p[i, i] - 0.5) > _ROUNDING:
            raise UserError(f"{cell}, and a policy ties with itself; write 0.5")
        if abs(p[i, j] + p[j, i] - 1) > _ROUNDING:
            raise UserError(f"{cell} and P({names[j]} > {names[i]}) = {p[j, i]:g} do not sum to 1; correct one of them")
    return Pool(names, (p - p.T) / 2 + 0.5, None if count is None else _checked_count(names, count))


def _check_names(names: Sequence[Any]) -> None:
    if len(names) < 2:
        raise UserError(f"a pool needs two policies, and this one has {len(names)}; add policies to it")
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{name!r} is no name of a policy; give a text that is not empty")
        if names.count(name) > 1:
            raise UserError(f"two policies are named {name!r}; give each a name of its own")


def _checked_count(names: Sequence[str], count: Any) -> np.ndarray:
    """Returns the comparisons [P, P] of each cell; the diagonal holds the largest number, which nothing depends on."""
    n = np.asarray(count, np.float64)
    if n.shape not in ((), (len(names), len(names))):
        raise UserError(f"n has shape {list(n.shape)}; give one number, or one for each cell")
    n = np.broadcast_to(n, (len(names), len(names))).copy()
    np.fill_diagonal(n, 1.0)
    for i, j in itertools.product(range(len(names)), repeat=2):
        if not 1 <= n[i, j] < 2**53 or n[i, j] != math.floor(n[i, j]) or n[i, j] != n[j, i]:
            back = "" if n[i, j] == n[j, i] else f", the other way round {n[j, i]:g}"
            raise UserError(f"n of {names[i]} and {names[j]} is {n[i, j]:g}{back}; "
                            "give a positive whole number, the same both ways")  # fmt: skip
    np.fill_diagonal(n, n.max())
    return n


def pool_of_votes(policies: Sequence[str], votes: np.ndarray) -> Pool:
    """Returns the pool of the votes [P, P, N] of each prompt, in [0, 1] and 1/2 on a tie. Errors: ``make_pool``'s."""
    pool = make_pool(policies, np.mean(votes, -1), votes.shape[-1])
    return pool._replace(votes=(votes - votes.swapaxes(0, 1)) / 2 + 0.5)


class Lottery(NamedTuple):
    """A maximal lottery: a Nash policy over the pool. No policy beats it with more than 1/2."""

    mass: np.ndarray  # [P], ``maximal_lottery``'s choice
    low: np.ndarray  # [P] the least mass over all lotteries that are Nash; equal to ``high`` where there is one
    high: np.ndarray  # [P] the largest
    is_unique: bool
    gap: float  # its duality gap, in units of preference: 0 at an exact solution


class CyclicTriple(NamedTuple):
    """Three policies of which the first beats the second, the second the third and the third the first."""

    policies: tuple[int, int, int]
    links: tuple[float, float, float]  # how often the first beats the second, ...

    @property
    def weakest(self) -> float:
        """Returns the lowest of the three rates: the strength of the cycle."""
        return min(self.links)


class Ratings(NamedTuple):
    """What can be said of a pool's policies."""

    lottery: Lottery
    nash: np.ndarray  # [P] P(i > lottery) - 1/2, at most 0: the "Nash average" (1806.02643)
    fit: BradleyTerryFit
    triples: tuple[CyclicTriple, ...]  # the strongest first
    decided_triples: int  # of any three policies without a tie
    condorcet: int | None  # the policy that beats every other one
    exploitability: np.ndarray  # [P] max over j of P(j > i) - 1/2
    exploiter: tuple[int | None, ...]  # that j; None: nobody beats i


def rate_pool(pool: Pool) -> Ratings:
    """Returns the ratings of a pool."""
    a, lottery = pool.rate - 0.5, nash_lottery(pool.rate)
    triples, decided = cyclic_triples(pool.rate)
    exploiters = [int(j) if column[j] > 0 else None for column, j in zip(a.T, a.argmax(0), strict=True)]
    return Ratings(
        lottery,
        nash_average(pool.rate, lottery.mass),
        fit_bradley_terry(pool.rate, pool.comparisons),
        triples,
        decided,
        condorcet_winner(pool.rate),
        exploitabilities(pool.rate),
        tuple(exploiters),
    )


def nash_lottery(rate: np.ndarray) -> Lottery:
    """Returns the maximal lottery of a pool [P, P], the range of each mass over all of them, and a certificate."""
    face, mass = nash_face(rate), maximal_lottery(rate)
    with np.errstate(divide="ignore"):
        log_policy = np.log(mass)[None]
    game = Game(rate[None], np.zeros((1, len(rate))), np.ones(()), np.ones(1))  # its reference and tau are not read
    return Lottery(mass, *mass_ranges(face), face.is_unique, certified_gap(game, log_policy))


def nash_average(rate: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """Returns P(i > lottery) - 1/2, [P]: 0 for the policies that the lottery plays, at most 0 for the others."""
    return (rate - 0.5) @ mass


def exploitabilities(rate: np.ndarray) -> np.ndarray:
    """Returns max over j of P(j > i) - 1/2, [..., P], of pools [..., P, P]; 0 for a policy that nobody beats."""
    return (rate - 0.5).max(-2)


def condorcet_winner(rate: np.ndarray) -> int | None:
    """Returns the policy that beats every other one with more than 1/2; None where there is none."""
    winners = np.flatnonzero(np.sum(rate > 0.5, axis=1) == len(rate) - 1)
    return int(winners[0]) if len(winners) else None


def cyclic_triples(rate: np.ndarray) -> tuple[tuple[CyclicTriple, ...], int]:
    """Returns the triples of a pool [P, P] that form a cycle, the strongest first, and how many triples have no tie."""
    found, decided = [], 0
    for i, j, k in itertools.combinations(range(len(rate)), 3):
        if 0.5 in (rate[i, j], rate[j, k], rate[k, i]):
            continue
        decided += 1
        order = (i, j, k) if rate[i, j] > 0.5 else (i, k, j)
        links = tuple(float(rate[a, b]) for a, b in zip(order, (*order[1:], i), strict=True))
        if min(links) > 0.5:
            found.append(CyclicTriple(order, links))  # type: ignore[arg-type]  # three of each
    return tuple(sorted(found, key=lambda triple: -triple.weakest)), decided


class CloneEffect(NamedTuple):
    """How a copy of one policy changes the ratings of the other policies."""

    policy: int  # that has a copy
    nash: float  # the largest change of another policy's Nash average
    elo: float  # the largest change of another policy's Elo points, with the mean over the original policies at 0
    changed: int | None  # the policy whose Elo changes most; None: nobody's does
    exchanged: tuple[tuple[int, int], ...]  # pairs whose order by Elo is another one: (now ahead, now behind)


def clone_effects(pool: Pool, ratings: Ratings) -> tuple[CloneEffect, ...]:
    """Returns what a copy of each policy in turn changes: nothing under Nash, in general something under Elo."""
    return tuple(_clone_effect(pool, ratings, i) for i in range(len(pool.policies)))


def _clone_effect(pool: Pool, ratings: Ratings, policy: int) -> CloneEffect:
    size = len(pool.policies)
    members = [*range(size), policy]
    rate = pool.rate[np.ix_(members, members)]
    count = None if pool.comparisons is None else pool.comparisons[np.ix_(members, members)]
    others = np.arange(size) != policy
    nash = nash_average(rate, maximal_lottery(rate))[:size] - ratings.nash
    elo = fit_bradley_terry(rate, count).elo[:size]
    elo -= elo.mean()
    moves = np.where(others, abs(elo - ratings.fit.elo), 0.0)
    old = ratings.fit.elo[:, None] - ratings.fit.elo[None]
    ahead = (elo[:, None] - elo[None] > _SAME_ELO) & (old < -_SAME_ELO)
    changed = int(moves.argmax()) if moves.max() > _SAME_ELO else None
    exchanged = tuple((int(i), int(j)) for i, j in np.argwhere(ahead))
    return CloneEffect(policy, float(abs(nash[others]).max()), float(moves.max()), changed, exchanged)


_SAME_ELO = 1e-6  # points: far above rounding, far below what anybody reads
