"""Games worth knowing: the papers' worked examples with their numbers, and random families by seed."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import optimize, special

from alignjax.games.game import Game, from_matrix, from_population, from_rewards
from alignjax.types import Array

# --- worked examples of 2312.00886 ---

DICE = ((2, 4, 9), (1, 6, 8), (3, 5, 7))
"""Three dice (App. C.1): 1 beats 2, 2 beats 3 and 3 beats 1, each with 5/9."""


def dice(**options: Any) -> Game:
    """P(y > y') = probability that die y shows more than die y'; no two faces are equal but on the same die."""
    faces = np.asarray(DICE)
    more = faces[:, None, :, None] > faces[None, :, None, :]
    equal = faces[:, None, :, None] == faces[None, :, None, :]
    return from_matrix(np.mean(more + 0.5 * equal, (-2, -1)), **options)


def voters(**options: Any) -> Game:
    """Three annotators with total orders 1>2>3, 2>3>1, 3>1>2: the majority is a cycle with links of 2/3 (App. C.2)."""
    orders = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    rank = np.array([np.argsort(order) for order in orders])
    matrices = 0.5 + 0.5 * np.sign(rank[:, None, :] - rank[:, :, None])
    return from_population(matrices, np.full(3, 1 / 3), **options)


ELO_REWARDS = (0.0, float(np.log(9)), float(np.log(2)))


def elo(**options: Any) -> Game:
    """Bradley-Terry with R = (0, log 9, log 2) (App. A). Among policies with pi(y1) = 2 pi(y2), the one of
    the largest expected R, (2/3, 1/3, 0), loses to (0, 0, 1) with 50/99."""
    return from_rewards(ELO_REWARDS, **options)


def diversity(epsilon: float, **options: Any) -> Game:
    """Three annotator types (section 3.2): y2 > y1, y1 > y3 and y3 > y2, all other pairs tied; masses
    1/3 - eps, 1/3 + eps/2, 1/3 + eps/2. The Nash is (1/3 + eps/2, 1/3 + eps/2, 1/3 - eps)."""
    types = np.full((3, 3, 3), 0.5)
    for k, (winner, loser) in enumerate(((1, 0), (0, 2), (2, 1))):
        types[k, winner, loser], types[k, loser, winner] = 1, 0
    return from_population(types, (1 / 3 - epsilon, 1 / 3 + epsilon / 2, 1 / 3 + epsilon / 2), **options)


def cycle(**options: Any) -> Game:
    """P(2 > 1) = .9, P(3 > 2) = .9, P(1 > 3) = .8; Nash (4, 3, 4)/11."""
    return from_matrix([[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]], **options)


def rock_paper_scissors(**options: Any) -> Game:
    """Deterministic: each beats the one before it."""
    return from_matrix([[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]], **options)


# --- random families: (seed, contexts, actions) -> P [X, Y, Y] ---


def normal_scores(rng: np.random.Generator, contexts: int, actions: int, scale: float) -> np.ndarray:
    """Antisymmetric normal logits [X, Y, Y]."""
    raw = rng.normal(size=(contexts, actions, actions))
    return scale * (raw - raw.swapaxes(1, 2)) / np.sqrt(2)


def transitive(seed: int, contexts: int, actions: int) -> np.ndarray:
    """Bradley-Terry with normal rewards."""
    r = np.random.default_rng(seed).normal(scale=2, size=(contexts, actions))
    return special.expit(r[:, :, None] - r[:, None, :])


def cyclic(seed: int, contexts: int, actions: int) -> np.ndarray:
    """Actions on a circle at random angles; each beats those up to half a turn behind it."""
    angle = np.random.default_rng(seed).uniform(high=2 * np.pi, size=(contexts, actions))
    return special.expit(4 * np.sin(angle[:, :, None] - angle[:, None, :]))


def mixed(seed: int, contexts: int, actions: int) -> np.ndarray:
    """Normal logits for every pair: neither transitive nor a cycle."""
    return special.expit(normal_scores(np.random.default_rng(seed), contexts, actions, 1.0))


def sparse(seed: int, contexts: int, actions: int, density: float = 0.1) -> np.ndarray:
    """Most pairs tie."""
    rng = np.random.default_rng(seed)
    chosen = np.triu(rng.random((contexts, actions, actions)) < density, 1)
    scores = normal_scores(rng, contexts, actions, 4.0)
    return special.expit(np.where(chosen | chosen.swapaxes(1, 2), scores, 0))


def near_deterministic(seed: int, contexts: int, actions: int) -> np.ndarray:
    """Normal logits of scale 20: nearly every pair is decided."""
    return special.expit(normal_scores(np.random.default_rng(seed), contexts, actions, 20.0))


FAMILIES = {f.__name__: f for f in (transitive, cyclic, mixed, sparse, near_deterministic)}
"""To go through them all."""


def random_reference(seed: int, contexts: int, actions: int, floor: float = 1e-3) -> np.ndarray:
    """Dirichlet(1) references [X, Y], no action below about ``floor`` / actions."""
    weights = np.random.default_rng(seed).dirichlet(np.ones(actions), contexts) + floor / actions
    return weights / weights.sum(-1, keepdims=True)


# --- Bradley-Terry against games ---


def bradley_terry_rewards(game: Game, sampler: Array) -> np.ndarray:
    """The rewards [X, Y], mean 0, that a Bradley-Terry model fits to P when pairs are drawn from ``sampler``
    (log-probs [X, Y]): argmin over r of -E_{y, y'}[P log sigmoid(r(y) - r(y'))].

    Where no Bradley-Terry model is P, they depend on the sampler (2312.00886, Theorem 2).
    """

    def fit(p: np.ndarray, weights: np.ndarray) -> np.ndarray:
        pairs = np.outer(weights, weights)

        def loss(r: np.ndarray) -> tuple[float, np.ndarray]:
            d = r[:, None] - r[None]
            slope = pairs * (special.expit(d) - p)
            return float(np.sum(pairs * (np.logaddexp(0, -d) + (1 - p) * d))), slope.sum(1) - slope.sum(0)

        found = optimize.minimize(loss, np.zeros(len(p)), jac=True, method="BFGS", options={"gtol": 1e-12}).x
        return found - found.mean()

    pairs = zip(np.asarray(game.p, np.float64), np.exp(np.asarray(sampler, np.float64)), strict=True)
    return np.stack([fit(p, weights) for p, weights in pairs])
