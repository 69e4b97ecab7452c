"""Preference games over finitely many actions, and what can be said of a policy in one.

Notation of 2312.00886: P(y > y' | x), reference mu, regularisation tau, contexts x ~ rho. A policy is its
log-probabilities [X, Y] in nats. Everything is differentiable, and batched by ``jax.vmap`` over games.
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
    """A regularised preference game. Leading axes are a batch, to be mapped over."""

    p: Array  # [X, Y, Y] P(y > y' | x), antisymmetric around 1/2
    log_mu: Array  # [X, Y] nats, the reference
    tau: Array  # [] weight of the KL to the reference, in units of preference a nat
    rho: Array  # [X] weights of the contexts, summing to 1


def from_matrix(p: Any, reference: Any = None, tau: float = 0.1, rho: Any = None) -> Game:
    """A game from P [Y, Y] or [X, Y, Y]; reference [Y] or [X, Y] and rho [X] are uniform where None.

    Raises UserError naming the first entry that is not a probability or not antisymmetric around 1/2.
    """
    p = np.asarray(p, np.float64)
    p = p[None] if p.ndim == 2 else p
    if p.ndim != 3 or p.shape[1] != p.shape[2] or 0 in p.shape:
        raise UserError(f"P has shape {p.shape}; it must be [Y, Y] or [X, Y, Y]")
    refuse(p, ~((p >= 0) & (p <= 1)), "is not in [0, 1]")
    other = p.swapaxes(1, 2)
    refuse(p, abs(p + other - 1) > 1e-6, "and its mirror image do not sum to 1")
    contexts, actions = p.shape[:2]
    mu = np.full(actions, 1 / actions) if reference is None else reference
    return Game(
        jnp.asarray((p + 1 - other) / 2),
        jnp.asarray(np.log(distribution("reference", mu, (contexts, actions)))),
        jnp.asarray(positive("tau", tau)),
        jnp.asarray(distribution("rho", np.full(contexts, 1 / contexts) if rho is None else rho, (contexts,))),
    )


def refuse(p: np.ndarray, wrong: np.ndarray, words: str) -> None:
    if wrong.any():
        x, y, z = (int(i) for i in np.argwhere(wrong)[0])
        where = f"P[{y}, {z}]" if len(p) == 1 else f"P[{x}, {y}, {z}]"
        raise UserError(f"{where} = {p[x, y, z]:g} {words}; mend that entry")


def distribution(name: str, weights: Any, shape: tuple[int, ...]) -> np.ndarray:
    """Positive weights that sum to 1 along the last axis, broadcast to the shape."""
    weights = np.asarray(weights, np.float64)
    if weights.shape not in (shape, shape[-1:]):
        raise UserError(f"{name} has shape {weights.shape}; it must be {shape}")
    if not np.all(weights > 0) or not np.allclose(weights.sum(-1), 1, atol=1e-6):
        raise UserError(f"{name} must be positive and sum to 1; {weights.ravel()[:8].tolist()} does not")
    return np.broadcast_to(weights / weights.sum(-1, keepdims=True), shape)


def positive(name: str, value: float) -> float:
    if not value > 0:
        raise UserError(f"{name}={value} must be positive")
    return float(value)


def from_rewards(rewards: Any, **options: Any) -> Game:
    """Bradley-Terry: P(y > y') = sigmoid(r(y) - r(y')), rewards [Y] or [X, Y]."""
    r = np.asarray(rewards, np.float64)
    return from_matrix(1 / (1 + np.exp(r[..., None, :] - r[..., :, None])), **options)


def from_population(annotators: Any, masses: Any, **options: Any) -> Game:
    """Annotator types with matrices [K, Y, Y] (or [K, X, Y, Y]) and masses [K]: a judgement is that of one
    drawn at random. Total orders may aggregate to a cycle (2312.00886, App. C.2)."""
    annotators = np.asarray(annotators, np.float64)
    masses = distribution("masses", masses, (len(annotators),))
    return from_matrix(np.tensordot(masses, annotators, 1), **options)


def from_scores(texts: Sequence[str], score: Callable[[str], float], sharpness: float = np.inf, **options: Any) -> Game:
    """Actions are texts; P = sigmoid(sharpness * difference of scores), by default the better one for sure
    and ties 1/2."""
    scores = np.array([score(text) for text in texts], np.float64)
    difference = scores[:, None] - scores[None]
    if np.isinf(sharpness):
        return from_matrix(0.5 + 0.5 * np.sign(difference), **options)
    return from_matrix(1 / (1 + np.exp(-sharpness * difference)), **options)


def wins(game: Game, opponent: Array) -> Array:
    """P(y > pi' | x) = sum over y' of P(y > y' | x) pi'(y' | x); [X, Y]."""
    return jnp.einsum("xyz,xz->xy", game.p, jnp.exp(opponent))


def value(game: Game, policy: Array, opponent: Array) -> Array:
    """P(pi > pi') under rho."""
    return jnp.sum(game.rho * jnp.sum(jnp.exp(policy) * wins(game, opponent), -1))


def kl(game: Game, policy: Array, other: Array) -> Array:
    """KL_rho(pi, pi') in nats: the expectation over contexts."""
    return jnp.sum(game.rho * divergence(policy, other))


def divergence(policy: Array, other: Array) -> Array:
    """KL(pi, pi') along the last axis, as the sum of p (e^d - 1 - d), d = log p'/p: every term is
    non-negative, and near equality nothing cancels."""
    p, q = jnp.exp(policy), jnp.exp(other)
    inside = p > 0
    d = jnp.where(inside, other - jnp.where(inside, policy, 0), 0)
    near = jnp.abs(d) < 0.5
    small = jnp.where(near, d, 0)
    terms = jnp.where(near, p * small**2 * jnp.polyval(jnp.asarray(TAYLOR, p.dtype), small), q - p - p * d)
    return jnp.sum(jnp.where(inside, terms, q), -1)


TAYLOR = [1 / math.factorial(k) for k in range(17, 1, -1)]
"""(e^d - 1 - d) / d^2, the highest power first; exact to rounding for |d| < 1/2."""


def regularised_value(game: Game, policy: Array, opponent: Array) -> Array:
    """P_tau(pi > pi') = P(pi > pi') - tau KL(pi, mu) + tau KL(pi', mu) (2312.00886, Eq. 2)."""
    cost = kl(game, policy, game.log_mu) - kl(game, opponent, game.log_mu)
    return value(game, policy, opponent) - game.tau * cost


def best_response(game: Game, opponent: Array) -> Array:
    """argmax over pi of P_tau(pi > pi'): log pi(y) = log mu(y) + P(y > pi') / tau + constant."""
    return jax.nn.log_softmax(game.log_mu + wins(game, opponent) / game.tau)


def gap(game: Game, policy: Array) -> Array:
    """The duality gap max P_tau(pi' > pi) - min P_tau(pi > pi') of the regularised game.

    The game is symmetric, so both sides weigh the same; and max P_tau(pi' > pi) - 1/2 =
    tau KL(pi, best response to pi), which is zero at the Nash alone and bounds tau KL(pi, pi*_tau).
    """
    return 2 * game.tau * kl(game, policy, best_response(game, policy))


def exploitability(game: Game, policy: Array) -> Array:
    """How far the best answer gets beyond 1/2 in the game without regularisation: max P(pi' > pi) - 1/2,
    half its duality gap."""
    return jnp.sum(game.rho * jnp.max(wins(game, policy), -1)) - 0.5


def mixture(policy: Array, reference: Array, beta: Array | float) -> Array:
    """The geometric mixture pi^(1-beta) mu^beta / Z of whole actions (2312.00886, Eq. 4 and 15)."""
    return jax.nn.log_softmax((1 - beta) * policy + beta * reference)
