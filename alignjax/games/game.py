"""Preference games over finitely many actions: values, best responses and gaps of policies.

Notation of 2312.00886: P(y > y' | x), reference mu, regularisation tau, contexts x ~ rho. A policy is its
log-probabilities [X, Y] in nats. All functions are differentiable; ``jax.vmap`` batches them over games.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.errors import UserError
from alignjax.types import Array


class Game(NamedTuple):
    """A regularised preference game of X contexts and Y actions. A batch of games has leading axes in every leaf."""

    p: Array  # [X, Y, Y] P(y > y' | x), antisymmetric around 1/2
    log_mu: Array  # [X, Y] nats, the reference
    tau: Array  # [] weight of the KL to the reference: preference per nat
    rho: Array  # [X] weights of the contexts, summing to 1


def from_matrix(p: Any, reference: Any = None, tau: float = 0.1, rho: Any = None) -> Game:
    """Returns the game of P [Y, Y] or [X, Y, Y]; reference [Y] or [X, Y] and rho [X] are uniform when None.

    Deviations up to 1e-6 from P + P' = 1, and of sums from 1, count as rounding and are corrected. Raises UserError,
    which names the entry of P, on one that is not a probability or not antisymmetric around 1/2; on weights that are
    not positive or do not sum to 1; and on a tau that is not positive.
    """
    p = np.asarray(p, np.float64)
    p = p[None] if p.ndim == 2 else p
    if p.ndim != 3 or p.shape[1] != p.shape[2] or 0 in p.shape:
        raise UserError(f"P has shape {p.shape}; it must be [Y, Y] or [X, Y, Y]")
    _refuse_entries(p, ~((p >= 0) & (p <= 1)), "is not in [0, 1]")
    mirrored = p.swapaxes(1, 2)
    _refuse_entries(p, abs(p + mirrored - 1) > 1e-6, "and its mirror image do not sum to 1")
    contexts, actions = p.shape[:2]
    mu = np.full(actions, 1 / actions) if reference is None else reference
    return Game(
        jnp.asarray((p + 1 - mirrored) / 2),
        jnp.asarray(np.log(_distribution("reference", mu, (contexts, actions)))),
        jnp.asarray(_require_positive("tau", tau)),
        jnp.asarray(_distribution("rho", np.full(contexts, 1 / contexts) if rho is None else rho, (contexts,))),
    )


def _refuse_entries(p: np.ndarray, wrong: np.ndarray, complaint: str) -> None:
    """Raises UserError with the first entry of P [X, Y, Y] where ``wrong`` [X, Y, Y] holds, and what is wrong."""
    if wrong.any():
        x, y, z = (int(i) for i in np.argwhere(wrong)[0])
        entry = f"P[{y}, {z}]" if len(p) == 1 else f"P[{x}, {y}, {z}]"
        raise UserError(f"{entry} = {p[x, y, z]:g} {complaint}; correct that entry")


def _distribution(name: str, weights: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Returns weights normalised along the last axis and broadcast to ``shape``.

    Raises UserError unless they are positive and sum to 1.
    """
    weights = np.asarray(weights, np.float64)
    if weights.shape not in (shape, shape[-1:]):
        raise UserError(f"{name} has shape {weights.shape}; it must be {shape}")
    if not np.all(weights > 0) or not np.allclose(weights.sum(-1), 1, atol=1e-6):
        raise UserError(f"{name} must be positive and sum to 1; {weights.ravel()[:8].tolist()} does not")
    return np.broadcast_to(weights / weights.sum(-1, keepdims=True), shape)


def _require_positive(name: str, value: float) -> float:
    """Returns the value. Raises UserError unless it is positive."""
    if not value > 0:
        raise UserError(f"{name}={value} must be positive")
    return float(value)


def from_rewards(rewards: Any, **options: Any) -> Game:
    """Returns the Bradley-Terry game P(y > y') = sigmoid(r(y) - r(y')) of rewards [Y] or [X, Y]."""
    r = np.asarray(rewards, np.float64)
    return from_matrix(1 / (1 + np.exp(r[..., None, :] - r[..., :, None])), **options)


def from_population(annotators: Any, masses: Any, **options: Any) -> Game:
    """Returns the game in which one of K types of annotators, drawn by ``masses`` [K], gives each judgement.

    ``annotators`` are the types' preferences [K, Y, Y] or [K, X, Y, Y]. Total orders may aggregate to a cycle
    (2312.00886, App. C.2).
    """
    annotators = np.asarray(annotators, np.float64)
    masses = _distribution("masses", masses, (len(annotators),))
    return from_matrix(np.tensordot(masses, annotators, 1), **options)


def from_scores(texts: Sequence[str], score: Callable[[str], float], sharpness: float = np.inf, **options: Any) -> Game:
    """Returns the game whose actions are texts, with P = sigmoid(sharpness * difference of scores).

    With infinite sharpness the higher score wins for certain, and ties are 1/2.
    """
    scores = np.array([score(text) for text in texts], np.float64)
    difference = scores[:, None] - scores[None]
    if np.isinf(sharpness):
        return from_matrix(0.5 + 0.5 * np.sign(difference), **options)
    return from_matrix(1 / (1 + np.exp(-sharpness * difference)), **options)


def win_probability(game: Game, opponent: Array) -> Array:
    """Returns P(y > pi' | x) = sum over y' of P(y > y' | x) pi'(y' | x), [X, Y]."""
    return jnp.einsum("xyz,xz->xy", game.p, jnp.exp(opponent))


def value(game: Game, policy: Array, opponent: Array) -> Array:
    """Returns P(pi > pi') = sum over x of rho(x) sum over y of pi(y | x) P(y > pi' | x), []."""
    return jnp.sum(game.rho * jnp.sum(jnp.exp(policy) * win_probability(game, opponent), -1))


def kl(game: Game, policy: Array, other: Array) -> Array:
    """Returns KL_rho(pi, pi') = sum over x of rho(x) KL(pi(x), pi'(x)) in nats, []."""
    return jnp.sum(game.rho * divergence(policy, other))


def divergence(policy: Array, other: Array) -> Array:
    """Returns KL(pi, pi') in nats along the last axis: [..., Y] -> [...].

    It is the sum of p (e^d - 1 - d) with d = log p'/p: every term is non-negative, and nothing cancels when the two are
    nearly equal. Where p = 0 the term is p'.
    """
    p, q = jnp.exp(policy), jnp.exp(other)
    in_support = p > 0
    d = jnp.where(in_support, other - jnp.where(in_support, policy, 0), 0)
    use_series = jnp.abs(d) < 0.5
    series_d = jnp.where(use_series, d, 0)
    series = p * series_d**2 * jnp.polyval(jnp.asarray(KL_SERIES, p.dtype), series_d)
    terms = jnp.where(use_series, series, q - p - p * d)
    return jnp.sum(jnp.where(in_support, terms, q), -1)


KL_SERIES = [1 / math.factorial(k) for k in range(17, 1, -1)]
"""Coefficients of (e^d - 1 - d) / d^2, the highest power first; exact to rounding for |d| < 1/2."""


def regularised_value(game: Game, policy: Array, opponent: Array) -> Array:
    """Returns P_tau(pi > pi') = P(pi > pi') - tau KL(pi, mu) + tau KL(pi', mu) (2312.00886, Eq. 2)."""
    cost = kl(game, policy, game.log_mu) - kl(game, opponent, game.log_mu)
    return value(game, policy, opponent) - game.tau * cost


def best_response(game: Game, opponent: Array) -> Array:
    """Returns argmax over pi of P_tau(pi > pi'): log pi(y) = log mu(y) + P(y > pi') / tau + constant, [X, Y] nats."""
    return jax.nn.log_softmax(game.log_mu + win_probability(game, opponent) / game.tau)


def duality_gap(game: Game, policy: Array) -> Array:
    """Returns the duality gap max P_tau(pi' > pi) - min P_tau(pi > pi') of the regularised game, [].

    The game is symmetric, so both terms are equally far from 1/2, and max P_tau(pi' > pi) - 1/2 =
    tau KL(pi, best response to pi). This is zero at the Nash policy alone and bounds tau KL(pi, pi*_tau).
    """
    return 2 * game.tau * kl(game, policy, best_response(game, policy))


def exploitability(game: Game, policy: Array) -> Array:
    """Returns max P(pi' > pi) - 1/2 in the game without regularisation, half of its duality gap, []."""
    return jnp.sum(game.rho * jnp.max(win_probability(game, policy), -1)) - 0.5


def mixture_policy(policy: Array, reference: Array, beta: Array | float) -> Array:
    """Returns the geometric mixture pi^(1-beta) mu^beta / Z of whole actions, [X, Y] nats (2312.00886, Eq. 4, 15)."""
    return jax.nn.log_softmax((1 - beta) * policy + beta * reference)
