"""Known games: the worked examples of the papers with their numbers, and random families by seed."""

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
    """Returns the game P(y > y') = probability that die y shows more than die y'; different dice share no face."""
    faces = np.asarray(DICE)
    more = faces[:, None, :, None] > faces[None, :, None, :]
    equal = faces[:, None, :, None] == faces[None, :, None, :]
    return from_matrix(np.mean(more + 0.5 * equal, (-2, -1)), **options)


def voters(**options: Any) -> Game:
    """Returns the game of three annotators with total orders 1>2>3, 2>3>1, 3>1>2 (App. C.2).

    The majority is a cycle with links of 2/3.
    """
    orders = ((0, 1, 2), (1, 2, 0), (2, 0, 1))
    rank = np.array([np.argsort(order) for order in orders])
    matrices = 0.5 + 0.5 * np.sign(rank[:, None, :] - rank[:, :, None])
    return from_population(matrices, np.full(3, 1 / 3), **options)


ELO_REWARDS = (0.0, float(np.log(9)), float(np.log(2)))
"""The rewards of ``elo``."""


def elo(**options: Any) -> Game:
    """Returns the Bradley-Terry game of R = (0, log 9, log 2) (App. A).

    Among policies with pi(y1) = 2 pi(y2), the one with the largest expected R is (2/3, 1/3, 0). It loses to (0, 0, 1)
    with probability 50/99.
    """
    return from_rewards(ELO_REWARDS, **options)


def diversity(epsilon: float, **options: Any) -> Game:
    """Returns the game of three annotator types (section 3.2): y2 > y1, y1 > y3 and y3 > y2, all other pairs tied.

    Their masses are 1/3 - eps, 1/3 + eps/2, 1/3 + eps/2. The Nash policy is (1/3 + eps/2, 1/3 + eps/2, 1/3 - eps).
    """
    types = np.full((3, 3, 3), 0.5)
    for k, (winner, loser) in enumerate(((1, 0), (0, 2), (2, 1))):
        types[k, winner, loser], types[k, loser, winner] = 1, 0
    return from_population(types, (1 / 3 - epsilon, 1 / 3 + epsilon / 2, 1 / 3 + epsilon / 2), **options)


def cycle(**options: Any) -> Game:
    """Returns the game P(2 > 1) = .9, P(3 > 2) = .9, P(1 > 3) = .8, whose Nash policy is (4, 3, 4)/11."""
    return from_matrix([[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]], **options)


def rock_paper_scissors(**options: Any) -> Game:
    """Returns the deterministic game of three actions in which each beats the one before it."""
    return from_matrix([[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]], **options)


# --- random families: (seed, contexts, actions) -> P [X, Y, Y] ---


def _antisymmetric_logits(rng: np.random.Generator, contexts: int, actions: int, scale: float) -> np.ndarray:
    """Returns antisymmetric normal logits [X, Y, Y] with standard deviation ``scale``."""
    raw = rng.normal(size=(contexts, actions, actions))
    return scale * (raw - raw.swapaxes(1, 2)) / np.sqrt(2)


def transitive(seed: int, contexts: int, actions: int) -> np.ndarray:
    """Returns Bradley-Terry preferences with normal rewards of standard deviation 2."""
    r = np.random.default_rng(seed).normal(scale=2, size=(contexts, actions))
    return special.expit(r[:, :, None] - r[:, None, :])


def cyclic(seed: int, contexts: int, actions: int) -> np.ndarray:
    """Returns preferences of actions at random angles on a circle; each beats those up to half a turn behind it."""
    angle = np.random.default_rng(seed).uniform(high=2 * np.pi, size=(contexts, actions))
    return special.expit(4 * np.sin(angle[:, :, None] - angle[:, None, :]))


def unstructured(seed: int, contexts: int, actions: int) -> np.ndarray:
    """Returns preferences with normal logits for every pair: neither transitive nor a cycle."""
    return special.expit(_antisymmetric_logits(np.random.default_rng(seed), contexts, actions, 1.0))


def sparse(seed: int, contexts: int, actions: int, density: float = 0.1) -> np.ndarray:
    """Returns preferences in which all pairs tie but a share of about ``density``."""
    rng = np.random.default_rng(seed)
    decided = np.triu(rng.random((contexts, actions, actions)) < density, 1)
    logits = _antisymmetric_logits(rng, contexts, actions, 4.0)
    return special.expit(np.where(decided | decided.swapaxes(1, 2), logits, 0))


def near_deterministic(seed: int, contexts: int, actions: int) -> np.ndarray:
    """Returns preferences with normal logits of standard deviation 20: nearly every pair is decided."""
    return special.expit(_antisymmetric_logits(np.random.default_rng(seed), contexts, actions, 20.0))


RANDOM_PREFERENCES = {f.__name__: f for f in (transitive, cyclic, unstructured, sparse, near_deterministic)}
"""The random families by name."""


def random_reference(seed: int, contexts: int, actions: int, floor: float = 1e-3) -> np.ndarray:
    """Returns Dirichlet(1) references [X, Y]; no action is below about ``floor`` / actions."""
    weights = np.random.default_rng(seed).dirichlet(np.ones(actions), contexts) + floor / actions
    return weights / weights.sum(-1, keepdims=True)


# --- Bradley-Terry against games ---


def bradley_terry_rewards(game: Game, sampler: Array) -> np.ndarray:
    """Returns the rewards [X, Y], mean 0, of a Bradley-Terry model fitted to P on pairs drawn from ``sampler``:

        argmin over r of -E_{y, y'}[P log sigmoid(r(y) - r(y'))],   sampler: log-probs [X, Y].

    When P is no Bradley-Terry model, they depend on the sampler (2312.00886, Theorem 2).
    """
    contexts = zip(np.asarray(game.p, np.float64), np.exp(np.asarray(sampler, np.float64)), strict=True)
    return np.stack([_fit_rewards(p, weights) for p, weights in contexts])


def _fit_rewards(p: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the rewards [Y], mean 0, of one context: preferences [Y, Y], the sampler's probabilities [Y]."""
    pair_weights = np.outer(weights, weights)

    def loss_and_gradient(r: np.ndarray) -> tuple[float, np.ndarray]:
        """Returns the weighted cross-entropy of P and its gradient [Y]."""
        d = r[:, None] - r[None]
        slope = pair_weights * (special.expit(d) - p)
        return float(np.sum(pair_weights * (np.logaddexp(0, -d) + (1 - p) * d))), slope.sum(1) - slope.sum(0)

    initial = np.zeros(len(p))
    rewards = optimize.minimize(loss_and_gradient, initial, jac=True, method="BFGS", options={"gtol": 1e-12}).x
    return rewards - rewards.mean()
