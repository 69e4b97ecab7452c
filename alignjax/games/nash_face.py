"""All Nash policies of one preference matrix without regularisation, and one that is chosen among them.

They are the polytope {pi : sum_y pi(y) A[y', y] <= 0 for every y'}, A = P - 1/2. In social choice a Nash policy of P is
a maximal lottery (Fishburn 1984). Host code in float64, as ``games.solve``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import optimize

from alignjax.errors import UserError

COPY = 1e-9
"""Two actions are copies of each other where no entry of their rows of P differs by more."""
_RANK = 1e-10  # a singular value below this share of the largest counts as zero


class NashFace(NamedTuple):
    """All Nash policies: point + directions t, for the t at which no mass is negative and no action is better."""

    advantage: np.ndarray  # [Y, Y] A, exactly antisymmetric
    point: np.ndarray  # [Y] a Nash policy that gives mass to every action that any of them gives mass to
    directions: np.ndarray  # [Y, K] orthonormal; K = 0 where the point is the only one

    @property
    def is_unique(self) -> bool:
        """Returns whether there is one Nash policy alone."""
        return self.directions.shape[1] == 0

    def constraints(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns (G [2Y, K], c [2Y]) of the rows G t <= c: masses are not negative, no action is better."""
        slack = np.clip(-self.advantage @ self.point, 0, None)
        return np.r_[-self.directions, self.advantage @ self.directions], np.r_[self.point, slack]


def nash_face(p: np.ndarray) -> NashFace:
    """Returns all Nash policies of P [Y, Y].

    By Tucker's theorem there is an x >= 0 with -A x >= 0 and x - A x >= 1. Since x'Ax = 0, of x(y) and -(A x)(y) one is
    zero. The actions where x is not are those that some Nash policy plays, and no other Nash policy plays more of
    them. A linear program finds x; on its actions the policies solve linear equations, to rounding. Raises UserError
    when the linear program is not solved.
    """
    p = np.asarray(p, np.float64)
    a = (p - p.T) / 2
    ahead = np.all((a > 0) | np.eye(len(a), dtype=bool), axis=1)
    x = ahead.astype(float) if ahead.any() else _complementary_solution(a)
    played = np.flatnonzero(x > 0)
    equations = np.r_[a[np.ix_(played, played)], np.ones((1, len(played)))]
    _, singular, rows = np.linalg.svd(equations)
    rank = int(np.sum(singular > _RANK * singular[0]))
    point, directions = np.zeros(len(a)), np.zeros((len(a), len(played) - rank))
    start = x[played] / x.sum()
    residual = np.r_[np.zeros(len(played)), 1.0] - equations @ start
    point[played] = start + np.linalg.lstsq(equations, residual, rcond=_RANK)[0]
    directions[played] = rows[rank:].T
    return NashFace(a, point, directions)


def _complementary_solution(a: np.ndarray) -> np.ndarray:
    """Returns Tucker's x [Y] of the antisymmetric A [Y, Y], exactly zero where -(A x) is positive."""
    n = len(a)
    scaled = a / max(abs(a).max(), 1e-300)
    bounds = np.r_[np.zeros(n), -np.ones(n)]
    result = optimize.linprog(np.ones(n), A_ub=np.r_[scaled, scaled - np.eye(n)], b_ub=bounds, method="highs")
    if not result.success:
        raise UserError(f"the linear program of {n} actions was not solved ({result.message})")
    return np.where(result.x > -scaled @ result.x, result.x, 0.0)


def mass_ranges(face: NashFace) -> tuple[np.ndarray, np.ndarray]:
    """Returns the least and the largest mass (low [Y], high [Y]) of each action over all Nash policies, by linear
    programs. Raises UserError when one is not solved."""
    low, high = face.point.copy(), face.point.copy()
    if face.is_unique:
        return low, high
    g, c = face.constraints()
    for y in np.flatnonzero(face.point):
        for bound, sign in ((low, 1.0), (high, -1.0)):
            result = optimize.linprog(sign * face.directions[y], A_ub=g, b_ub=c, bounds=(None, None), method="highs")
            if not result.success:
                raise UserError(f"the linear program of mass {y} was not solved ({result.message})")
            bound[y] = np.clip(face.point[y] + sign * result.fun, 0, 1)
    return low, high


def maximum_entropy(face: NashFace) -> np.ndarray:
    """Returns the Nash policy [Y] of the largest entropy, the limit of ``solve.regularised_nash`` with a uniform
    reference as tau -> 0.

    Newton's method with a logarithmic barrier, mu -> 1e-12, against the actions that are not played: they must not
    become better. The entropy itself keeps the masses positive.
    """
    if face.is_unique:
        return face.point
    played = face.point > 0
    g, c = (rows[len(played) :][~played] for rows in face.constraints())
    t = np.zeros(face.directions.shape[1])
    for mu in 10.0 ** -np.arange(2, 13) if len(c) else (0.0,):
        t = _newton_entropy(t, face.point[played], face.directions[played], g, c, mu)
    return face.point + face.directions @ t


def _newton_entropy(
    t: np.ndarray, point: np.ndarray, directions: np.ndarray, g: np.ndarray, c: np.ndarray, mu: float
) -> np.ndarray:
    """Returns argmin over t of sum p log p - mu sum log(c - G t), p = point + directions t, by damped Newton steps."""

    def value(t: np.ndarray) -> float:
        p, slack = point + directions @ t, c - g @ t
        if p.min() <= 0 or slack.min(initial=np.inf) <= 0:
            return np.inf
        return float(p @ np.log(p) - mu * np.log(slack).sum())

    for _ in range(100):
        p, slack = point + directions @ t, c - g @ t
        gradient = directions.T @ np.log(p) + mu * g.T @ (1 / slack) + directions.sum(0)
        hessian = directions.T @ (directions / p[:, None]) + mu * g.T @ (g / slack[:, None] ** 2)
        step = -np.linalg.solve(hessian, gradient)
        decrease = -gradient @ step
        # Close to the solution a value says no more than rounding does, and a whole step is right.
        allowed = np.inf if decrease < (0.01 * mu or 1e-9) else -0.1 * decrease
        sizes = (0.5**k for k in range(50))
        size = next((s for s in sizes if value(t + s * step) < value(t) + s * allowed), 0.0)
        t = t + size * step
        if not size or decrease < max(1e-6 * mu, 1e-22):
            break
    return t


def maximal_lottery(p: np.ndarray) -> np.ndarray:
    """Returns one Nash policy [Y] of P [Y, Y], which copies of actions do not change.

    Copies are taken as one action, the Nash policy of the largest entropy is chosen, and copies share their mass
    equally. (The largest entropy over all actions would give more to an action that has copies.)
    """
    p = np.asarray(p, np.float64)
    is_copy = np.all(abs(p[:, None] - p[None]) <= COPY, axis=-1)
    first = np.argmax(is_copy, axis=1)  # the first action that each is a copy of
    kept, group, count = np.unique(first, return_inverse=True, return_counts=True)
    masses = maximum_entropy(nash_face(p[np.ix_(kept, kept)]))
    return (masses / count)[group]
