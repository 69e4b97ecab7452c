"""Exact solutions, each with a certificate: NumPy and SciPy on the host, in float64 whatever JAX's flags are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import linalg, optimize

from alignjax.errors import UserError
from alignjax.games.game import KL_SERIES, Game


class Solution(NamedTuple):
    """A policy and a certificate of how exact it is."""

    log_policy: np.ndarray  # [X, Y] nats; -inf where the probability is zero
    gap: float  # its duality gap, in units of preference: 0 at the exact solution

    @property
    def policy(self) -> np.ndarray:
        """Returns the probabilities [X, Y]."""
        return np.exp(self.log_policy)


def _advantage(game: Game) -> np.ndarray:
    """Returns A = P - 1/2, [X, Y, Y] float64, exactly antisymmetric."""
    p = np.asarray(game.p, np.float64)
    return (p - p.swapaxes(1, 2)) / 2


def nash(game: Game) -> Solution:
    """Returns a Nash policy without regularisation, by linear programming in each context:

        maximise v over pi subject to sum_y pi(y) A[y, y'] >= v for every y'; v = 0 at the solution.

    When several policies are Nash, this is one of them. Its gap is twice its exploitability. Raises UserError when the
    linear program is not solved.
    """
    rows = [_linear_program(a) for a in _advantage(game)]
    with np.errstate(divide="ignore"):
        log_policy = np.log(rows)
    return Solution(log_policy, certified_gap(game, log_policy))


def _linear_program(a: np.ndarray) -> np.ndarray:
    """Returns a Nash policy [Y] of the antisymmetric matrix A [Y, Y]."""
    n = len(a)
    result = optimize.linprog(
        np.r_[np.zeros(n), -1.0],
        A_ub=np.c_[-a.T, np.ones(n)],
        b_ub=np.zeros(n),
        A_eq=np.r_[np.ones(n), 0.0][None],
        b_eq=[1.0],
        bounds=[(0, None)] * n + [(None, None)],
        method="highs",
    )
    if not result.success:
        raise UserError(f"the linear program of {n} actions was not solved ({result.message})")
    policy = np.clip(result.x[:n], 0, None)
    return policy / policy.sum()


def certified_gap(game: Game, log_policy: np.ndarray, tau: float | None = None) -> float:
    """Returns the duality gap of a policy [X, Y] in float64, of the game regularised with ``tau``, or not regularised.

    In each context it is twice tau KL(pi, best response), or twice max A pi; contexts are weighted by rho.
    """
    halves = []
    for a, log_mu, row in zip(_advantage(game), np.asarray(game.log_mu, np.float64), log_policy, strict=True):
        gain = a @ np.exp(row)
        halves.append(gain.max() if tau is None else tau * _divergence(row, _log_softmax(log_mu + gain / tau)))
    return float(2 * np.asarray(game.rho, np.float64) @ halves)


def regularised_nash(game: Game, tau: float | None = None) -> Solution:
    """Returns the Nash policy of the regularised game, the root of

        log pi = log mu + A pi / tau + constant        (A = P - 1/2),

    by Newton's method along decreasing tau. With S = diag(pi) - pi pi', the equation of a step is
    (I - S A / tau) u = S r for the residual r; S^(1/2) A S^(1/2) is antisymmetric, so it is never singular.
    KL(pi, pi*_tau) <= gap / (2 tau). ``tau`` replaces the game's. Raises UserError when tau is not positive, or so
    small that the method stops.
    """
    tau = float(np.asarray(game.tau)) if tau is None else tau
    if not tau > 0:
        raise UserError(f"tau={tau} must be positive; without regularisation use nash")
    logs = np.asarray(game.log_mu, np.float64)
    rows = [_lower_tau(a, _log_softmax(log_mu), tau) for a, log_mu in zip(_advantage(game), logs, strict=True)]
    return Solution(np.stack(rows), certified_gap(game, np.stack(rows), tau))


def _lower_tau(a: np.ndarray, log_mu: np.ndarray, tau: float) -> np.ndarray:
    """Returns log pi, solved by Newton's method at one tau after another, each from the solution before.

    It begins at a tau where the reference is nearly the solution. A tau that fails is replaced by one between it and
    the last that was solved. At the last, ``tau``, it goes on until rounding stops it.
    """
    theta, solved_tau, next_tau = log_mu, np.inf, max(tau, 1.0)
    while True:
        solution, kl = _newton(a, log_mu, next_tau, theta, _BASIN if next_tau > tau else 0.0)
        solved = kl <= _BASIN
        if not solved and next_tau > 0.98 * solved_tau:
            raise UserError(f"Newton's method stopped at tau={solved_tau:g} before tau={tau:g}; use a larger tau")
        if not solved:
            next_tau = np.sqrt(next_tau * min(solved_tau, 4 * next_tau))
        elif next_tau == tau:
            return solution
        else:
            theta, solved_tau, next_tau = solution, next_tau, max(tau, next_tau / 4)


_BASIN = 1e-9  # KL in nats: well inside the quadratic convergence of the next step


def _newton(
    a: np.ndarray, log_mu: np.ndarray, tau: float, theta: np.ndarray, tolerance: float
) -> tuple[np.ndarray, float]:
    """Takes damped Newton steps from log pi = ``theta``; returns log pi and KL(pi, best response) in nats.

    It stops when that KL is at most ``tolerance`` or falls no more.
    """
    best = _log_softmax(log_mu + a @ np.exp(theta) / tau)
    kl = _divergence(theta, best)
    for _ in range(50):
        if kl <= tolerance:
            break
        direction = _newton_direction(a, tau, np.exp(theta), best - theta)
        for halvings in range(8):
            next_theta = _log_softmax(theta + 0.5**halvings * direction)
            next_best = _log_softmax(log_mu + a @ np.exp(next_theta) / tau)
            next_kl = _divergence(next_theta, next_best)
            if next_kl < kl:
                break
        else:
            break
        theta, best, kl = next_theta, next_best, next_kl
    return theta, kl


def _newton_direction(a: np.ndarray, tau: float, pi: np.ndarray, residual: np.ndarray) -> np.ndarray:
    """Returns the step in log pi, [Y].

    Actions below 1e-25 weigh nothing in S: the linear system leaves them out, and their step follows from the others.
    """
    k = np.flatnonzero(pi > 1e-25)
    p, r = pi[k], residual[k]
    inner = a[np.ix_(k, k)]
    matrix = -(p[:, None] * inner - np.outer(p, p @ inner)) / tau
    matrix[np.diag_indices_from(matrix)] += 1
    u = linalg.solve(matrix, p * r - p * (p @ r), overwrite_a=True, check_finite=False)
    return residual + a[:, k] @ u / tau


def _log_softmax(theta: np.ndarray) -> np.ndarray:
    """Returns log softmax of logits [Y]."""
    shifted = theta - theta.max()
    return shifted - np.log(np.sum(np.exp(shifted)))


def _divergence(theta: np.ndarray, other: np.ndarray) -> float:
    """Returns KL in nats of two log-policies [Y], computed as ``game.divergence`` does."""
    d = other - theta
    use_series = abs(d) < 0.5
    series_d = np.where(use_series, d, 0)
    series = np.exp(theta) * series_d**2 * np.polyval(KL_SERIES, series_d)
    return float(np.sum(np.where(use_series, series, np.exp(other) - np.exp(theta) - np.exp(theta) * d)))
