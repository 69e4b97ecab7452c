"""Dynamics that seek the Nash policy of a game: one short update function each. ``simulation`` runs them.

A ``Dynamic`` is a pair of pure functions, as an optimiser is. An update turns a policy and a memory into the next ones,
given the game and P(y > opponent), exact or estimated. Letters: h is the step size, tau the regularisation,
p_t(y) = P(y > pi_t), theta = log pi. Policies are normalised log-probs [X, Y] in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from alignjax.games.game import Game, mixture_policy
from alignjax.types import Array, Key


class WinProbability(Protocol):
    """The preferences as a dynamic sees them."""

    def __call__(self, opponent: Array, call: int = 0, /) -> Array:
        """Returns P(y > opponent | x), [X, Y], of an opponent's log-probs [X, Y].

        ``call`` numbers the calls within one update, so that an estimate can draw anew for each.
        """
        ...


class Schedule(Protocol):
    """A step size that changes."""

    def __call__(self, t: Array, tau: Array, /) -> Array | float:
        """Returns the step size h of update t = 0, 1, ... in a game of regularisation tau."""
        ...


class Update(Protocol):
    """One update of a dynamic."""

    def __call__(self, wins: WinProbability, game: Game, t: Array, policy: Array, memory: Any, /) -> tuple[Array, Any]:
        """Returns the next policy [X, Y] and the next memory."""
        ...


class State(NamedTuple):
    """Where a dynamic stands."""

    step: Array  # [] int32: updates so far
    policy: Array  # [X, Y] nats: the last iterate
    memory: Any  # what else the dynamic keeps
    evaluations: Array  # [] int32: how often P(. > pi') was asked for


class Dynamic(NamedTuple):
    """An algorithm that seeks a Nash policy."""

    init_memory: Callable[[Game, Array], Any]  # (game, initial policy) -> memory
    update: Update
    evaluations: int = 1  # calls of ``wins`` in one update
    proposal: Callable[[State], Array] = lambda state: state.policy  # the policy that the dynamic proposes


def _no_memory(game: Game, policy: Array) -> Any:
    """Returns the memory of a dynamic that keeps nothing."""
    return ()


def _normalise(theta: Array) -> Array:
    """Returns log softmax along the actions."""
    return jax.nn.log_softmax(theta)


def _step_size(h: float | Schedule, t: Array, tau: Array) -> Array | float:
    """Returns the step size of update t."""
    return h(t, tau) if callable(h) else h


def theorem_1_step_size(t: Array, tau: Array) -> Array:
    """Returns h_t = 2 / (tau (t + 2)), with which KL(pi*, pi_T) <= 8 / (tau^2 (T + 1)) (2312.00886, Theorem 1)."""
    return 2 / (tau * (t + 2))


def mirror_step(centre: Array, h: Array | float, p: Array) -> Array:
    """Returns argmax over pi of h sum_y pi(y) p(y) - KL(pi, centre), [X, Y] nats: the step of mirror descent."""
    return _normalise(centre + h * p)


# --- regularised: the last iterate converges to pi*_tau ---


def exact_nash_md(h: float | Schedule) -> Dynamic:
    """Returns Nash-MD (2312.00886, Eq. 4-5), with the mixture pi^mu = pi^(1-h tau) mu^(h tau):

        pi' = argmax over pi of h P(pi > pi^mu) - KL(pi, pi^mu).

    Theorem 1: KL(pi*, pi') <= (1 - h tau) KL(pi*, pi) + 2 h^2. With a constant h the stationary point is not pi*_tau:
    there, the mixture is the Nash policy at tau / (1 - h tau).
    """

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        h_t = _step_size(h, t, game.tau)
        mixed = mixture_policy(policy, game.log_mu, h_t * game.tau)
        return mirror_step(mixed, h_t, wins(mixed)), memory

    return Dynamic(_no_memory, update)


def omd(h: float | Schedule) -> Dynamic:
    """Returns online mirror descent (2312.00886, Eq. 7-8): Nash-MD's centre, with preferences against pi_t itself.

    With a constant h the stationary point is pi*_tau; the policy cycles when h is much larger than tau.
    """

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        h_t = _step_size(h, t, game.tau)
        return mirror_step(mixture_policy(policy, game.log_mu, h_t * game.tau), h_t, wins(policy)), memory

    return Dynamic(_no_memory, update)


def exact_inpo() -> Dynamic:
    """Returns INPO (2407.00617): pi' ~ exp(p_t / eta) mu^(tau/eta) pi^(1-tau/eta), eta_t = tau (t + 2) / 2.

    In tabular form this is online mirror descent with h = 1 / eta, the step sizes of Nash-MD's theorem.
    """
    return omd(theorem_1_step_size)


def mmd(h: float, magnet_every: int | None = None) -> Dynamic:
    """Returns magnetic mirror descent: pi' ~ [pi rho^(h tau) e^(h p_t)]^(1/(1 + h tau)), the magnet rho being mu.

    With ``magnet_every`` = n it is MPO (2410.16714): rho <- pi after every n updates, which converges to the Nash
    policy without regularisation.
    """

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, magnet: Array) -> tuple[Array, Array]:
        a = game.tau
        new = _normalise((policy + h * a * magnet + h * wins(policy)) / (1 + h * a))
        return new, magnet if magnet_every is None else jnp.where((t + 1) % magnet_every == 0, new, magnet)

    return Dynamic(lambda game, policy: game.log_mu, update)


def wind(h: float) -> Dynamic:
    """Returns WIND (2410.20727): pi' ~ mu^(h tau/(1+h tau)) pi^(1/(1+h tau)) e^(h p_t/(1+h tau)).

    In tabular form this is magnetic mirror descent with the magnet mu.
    """
    return mmd(h)


def egpo(h: float) -> Dynamic:
    """Returns EGPO (2503.08942), an extragradient method: both half steps begin at theta,

        theta_half = (1 - h tau) theta + h tau log mu + h p_t,   theta' the same with p at pi_half.

    The last iterate converges linearly, as (1 - h tau)^T with h = 1 / (tau + 3). Two evaluations an update.
    """

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        centre = (1 - h * game.tau) * policy + h * game.tau * game.log_mu
        half = mirror_step(centre, h, wins(policy))
        return mirror_step(centre, h, wins(half, 1)), memory

    return Dynamic(_no_memory, update, evaluations=2)


def nash_mp(eta: float) -> Dynamic:
    """Returns Nash mirror-prox (2505.19731): pi_half = argmax P(pi > pi_k) - tau KL(pi, mu) - (tau/eta) KL(pi, pi_k).

    pi_{k+1} is the same against pi_half. The theorem has eta = 2 tau. Two evaluations an update.
    """

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        def proximal(p: Array) -> Array:
            """Returns the maximiser, given the win probabilities p."""
            return _normalise((eta * (game.log_mu + p / game.tau) + policy) / (1 + eta))

        return proximal(wins(proximal(wins(policy)), 1)), memory

    return Dynamic(_no_memory, update, evaluations=2)


def nash_ema(h: float, beta: float) -> Dynamic:
    """Returns Nash-EMA (2312.00886, section 7): preferences against the moving average of the parameters.

    Here the parameters are theta: average' = (1 - beta) theta' + beta average. beta = 0 is online mirror descent.
    """

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, average: Array) -> tuple[Array, Array]:
        new = mirror_step(mixture_policy(policy, game.log_mu, h * game.tau), h, wins(average))
        return new, _normalise((1 - beta) * new + beta * average)

    return Dynamic(lambda game, policy: policy, update)


def fictitious_play() -> Dynamic:
    """Returns smooth fictitious play: pi_avg' = ((t + 1) pi_avg + BR_tau(pi_avg)) / (t + 2), t = 0, 1, ...

    BR_tau is the best response in the regularised game. The reference is the first policy of the average.
    """

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        response = _normalise(game.log_mu + wins(policy) / game.tau)
        weight = 1 / (t + 2).astype(policy.dtype)
        return _normalise(jnp.logaddexp(policy + jnp.log1p(-weight), response + jnp.log(weight))), memory

    return Dynamic(_no_memory, update)


# --- without regularisation: the Nash policy of P ---


def multiplicative_weights(h: float | Schedule) -> Dynamic:
    """Returns self-play multiplicative weights, the tabular SPPO (2405.00675): pi' ~ pi e^(h p_t).

    The last iterate cycles; the proposal is the average of the iterates.
    """

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, average: Array) -> tuple[Array, Array]:
        weight = 1 / (t + 2).astype(policy.dtype)
        average = _normalise(jnp.logaddexp(average + jnp.log1p(-weight), policy + jnp.log(weight)))
        return mirror_step(policy, _step_size(h, t, game.tau), wins(policy)), average

    return Dynamic(lambda game, policy: policy, update, proposal=lambda state: state.memory)


def optimistic_weights(h: float) -> Dynamic:
    """Returns optimistic multiplicative weights (2512.24818): pi' ~ pi e^(h (2 p_t - p_{t-1}))."""

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, last: Array) -> tuple[Array, Array]:
        p = wins(policy)
        return mirror_step(policy, h, 2 * p - jnp.where(t == 0, p, last)), p

    return Dynamic(lambda game, policy: jnp.zeros_like(policy), update)


def comal(h: float, inner: int) -> Dynamic:
    """Returns COMAL (2410.23223): the solution of the regularised game becomes its reference, again and again.

    The inner solver is ``inner`` updates of online mirror descent (INPO). Converges to the Nash policy of P.
    """

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, reference: Array) -> tuple[Array, Array]:
        new = mirror_step(mixture_policy(policy, reference, h * game.tau), h, wins(policy))
        return new, jnp.where((t + 1) % inner == 0, new, reference)

    return Dynamic(lambda game, policy: game.log_mu, update)


# --- gradient steps on a softmax policy: the expected updates of the deep algorithms ---


def softmax_gradient(policy: Array, gain: Array) -> Array:
    """Returns d/d theta of sum_y pi(y) gain(y) with gain held fixed: pi (gain - E gain), [X, Y]."""
    pi = jnp.exp(policy)
    return pi * (gain - jnp.sum(pi * gain, -1, keepdims=True))


def nash_md_pg(lr: float, beta: float) -> Dynamic:
    """Returns Nash-MD-PG (2312.00886, Eq. 13-15), with y ~ pi and y' ~ pi^(1-beta) mu^beta:

        theta' = theta + lr E[grad log pi(y) (P(y > y') - 1/2 - tau log pi(y)/mu(y))].

    At the stationary point the mixture is the Nash policy at tau / (1 - beta).
    """

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        p = wins(mixture_policy(policy, game.log_mu, beta))
        gain = p - 0.5 - game.tau * (policy - game.log_mu)
        return _normalise(policy + lr * softmax_gradient(policy, gain)), memory

    return Dynamic(_no_memory, update)


def nash_md_pg_samples(game: Game, policy: Array, beta: float, key: Key, batch: int) -> Array:
    """Returns ``batch`` estimates of the gradient of Nash-MD-PG (2312.00886, Eq. 13), [batch, X, Y].

    Each draws y ~ pi, y' ~ the mixture, and one judgement, 0 or 1, in every context.
    """
    policy_key, opponent_key, judgement_key = jax.random.split(key, 3)
    contexts = jnp.arange(policy.shape[0])
    y = jax.random.categorical(policy_key, policy, shape=(batch, *contexts.shape))
    other = jax.random.categorical(opponent_key, mixture_policy(policy, game.log_mu, beta), shape=y.shape)
    judgement = jax.random.bernoulli(judgement_key, game.p[contexts, y, other]).astype(policy.dtype)
    ratio = (policy - game.log_mu)[contexts, y]
    score = jax.nn.one_hot(y, policy.shape[1], dtype=policy.dtype) - jnp.exp(policy)[None]
    return score * (judgement - 0.5 - game.tau * ratio)[..., None]


def ipo_gradient(game: Game, policy: Array, sampler: Array, p: Array, tau: Array | float) -> Array:
    """Returns d/d theta of the online IPO loss (2403.08635), [X, Y]; the samples are not differentiated:

        E[p L(y, y') + (1 - p) L(y', y)],   L(y, y') = -D + tau (D - D_mu)^2,   D = log pi(y) - log pi(y'),

    with y, y' ~ m. It is 4 m (tau (r - E_m r) - (P(y > m) - 1/2)) with r = log pi/mu; ``sampler`` is log m, ``p`` is
    P(y > m).
    """
    m, r = jnp.exp(sampler), policy - game.log_mu
    return 4 * m * (tau * (r - jnp.sum(m * r, -1, keepdims=True)) - (p - 0.5))


def exact_online_ipo(lr: float) -> Dynamic:
    """Returns online IPO (2403.08635): both responses from the policy. The stationary point is pi*_tau."""
    return ipo_md(lr, beta=0.0)


def ipo_md(lr: float, beta: float) -> Dynamic:
    """Returns IPO-MD (2403.08635): both responses from the mixture pi^(1-beta) mu^beta.

    The stationary point is that of Nash-MD-PG.
    """

    def update(wins: WinProbability, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        mixed = mixture_policy(policy, game.log_mu, beta)
        return _normalise(policy - lr * ipo_gradient(game, policy, mixed, wins(mixed), game.tau)), memory

    return Dynamic(_no_memory, update)
