"""Exact solutions on the host in float64, each with its certificate. NumPy and SciPy, no JAX flags needed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import linalg, optimize

from alignjax.errors import UserError
from alignjax.games.game import TAYLOR, Game


class Solution(NamedTuple):
    """A policy and how exact it is."""

    log_policy: np.ndarray  # [X, Y] nats; -inf where the probability is zero
    gap: float  # the duality gap that is left, in units of preference

    @property
    def policy(self) -> np.ndarray:
        return np.exp(self.log_policy)


def advantage(game: Game) -> np.ndarray:
    """A = P - 1/2 [X, Y, Y], exactly antisymmetric in float64."""
    p = np.asarray(game.p, np.float64)
    return (p - p.swapaxes(1, 2)) / 2


def nash(game: Game) -> Solution:
    """A Nash policy without regularisation, by linear programming in each context:

        maximise v over pi subject to sum_y pi(y) A[y, y'] >= v for every y'; v = 0 at the solution.

    Where several policies are Nash, this is one of them. Its gap is twice its exploitability.
    """
    rows = []
    for a in advantage(game):
        n = len(a)
        found = optimize.linprog(
            np.r_[np.zeros(n), -1.0],
            A_ub=np.c_[-a.T, np.ones(n)],
            b_ub=np.zeros(n),
            A_eq=np.r_[np.ones(n), 0.0][None],
            b_eq=[1.0],
            bounds=[(0, None)] * n + [(None, None)],
            method="highs",
        )
        if not found.success:
            raise UserError(f"the linear program of {n} actions was not solved ({found.message})")
        policy = np.clip(found.x[:n], 0, None)
        rows.append(policy / policy.sum())
    with np.errstate(divide="ignore"):
        log_policy = np.log(rows)
    return Solution(log_policy, duality_gap(game, log_policy))


def duality_gap(game: Game, log_policy: np.ndarray, tau: float | None = None) -> float:
    """max P(pi' > pi) - min P(pi > pi'): of the game regularised with ``tau``, or without regularisation.

    In each context twice max A pi, or twice tau KL(pi, best response); weighted by rho.
    """
    miss = []
    for a, log_mu, row in zip(advantage(game), np.asarray(game.log_mu, np.float64), log_policy, strict=True):
        wins = a @ np.exp(row)
        miss.append(wins.max() if tau is None else tau * divergence(row, normalise(log_mu + wins / tau)))
    return float(2 * np.asarray(game.rho, np.float64) @ miss)


def regularised_nash(game: Game, tau: float | None = None) -> Solution:
    """The Nash policy of the regularised game, the root of

        log pi = log mu + A pi / tau + constant        (A = P - 1/2),

    by Newton's method along decreasing tau. With S = diag(pi) - pi pi', the equation of a step is
    (I - S A / tau) u = S r for the residual r; S^(1/2) A S^(1/2) is antisymmetric, so it is never singular.
    KL(pi, pi*_tau) <= gap / (2 tau). ``tau`` replaces the game's where given.
    """
    tau = float(np.asarray(game.tau)) if tau is None else tau
    if not tau > 0:
        raise UserError(f"tau={tau} must be positive; without regularisation use nash")
    logs = np.asarray(game.log_mu, np.float64)
    rows = [descend(a, normalise(log_mu), tau) for a, log_mu in zip(advantage(game), logs, strict=True)]
    return Solution(np.stack(rows), duality_gap(game, np.stack(rows), tau))


def descend(a: np.ndarray, log_mu: np.ndarray, tau: float) -> np.ndarray:
    """Newton at one tau after another, from where the reference is nearly the solution down to ``tau``; there
    it goes on to rounding. Returns log pi."""
    theta, reached, target = log_mu, np.inf, max(tau, 1.0)
    while True:
        moved, miss = newton(a, log_mu, target, theta, BASIN if target > tau else 0.0)
        arrived = miss <= BASIN
        if not arrived and target > 0.98 * reached:
            raise UserError(f"Newton's method stopped at tau={reached:g} before tau={tau:g}; use a larger tau")
        if not arrived:
            target = np.sqrt(target * min(reached, 4 * target))
        elif target == tau:
            return moved
        else:
            theta, reached, target = moved, target, max(tau, target / 4)


BASIN = 1e-9  # KL in nats: well inside the quadratic convergence of the next step


def newton(a: np.ndarray, log_mu: np.ndarray, tau: float, theta: np.ndarray, enough: float) -> tuple[np.ndarray, float]:
    """Damped Newton steps until KL(pi, best response) is ``enough`` or falls no more; (log pi, that KL)."""
    best = normalise(log_mu + a @ np.exp(theta) / tau)
    miss = divergence(theta, best)
    for _ in range(50):
        if miss <= enough:
            break
        direction = newton_direction(a, tau, np.exp(theta), best - theta)
        for halving in range(8):
            moved = normalise(theta + 0.5**halving * direction)
            answer = normalise(log_mu + a @ np.exp(moved) / tau)
            fallen = divergence(moved, answer)
            if fallen < miss:
                break
        else:
            break
        theta, best, miss = moved, answer, fallen
    return theta, miss


def newton_direction(a: np.ndarray, tau: float, pi: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """The step in log pi. Actions below 1e-25 weigh nothing in S: they follow, and the system is small."""
    k = np.flatnonzero(pi > 1e-25)
    p, r = pi[k], residual[k]
    inner = a[np.ix_(k, k)]
    matrix = -(p[:, None] * inner - np.outer(p, p @ inner)) / tau
    matrix[np.diag_indices_from(matrix)] += 1
    u = linalg.solve(matrix, p * r - p * (p @ r), overwrite_a=True, check_finite=False)
    return residual + a[:, k] @ u / tau


def normalise(theta: np.ndarray) -> np.ndarray:
    """log softmax."""
    shifted = theta - theta.max()
    return shifted - np.log(np.sum(np.exp(shifted)))


def divergence(theta: np.ndarray, other: np.ndarray) -> float:
    """KL in nats, in the form of game.divergence."""
    d = other - theta
    near = abs(d) < 0.5
    small = np.where(near, d, 0)
    terms = np.exp(theta) * small**2 * np.polyval(TAYLOR, small)
    return float(np.sum(np.where(near, terms, np.exp(other) - np.exp(theta) - np.exp(theta) * d)))
