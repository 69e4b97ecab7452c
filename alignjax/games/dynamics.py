"""Dynamics that look for the Nash policy of a game: one short step function each.

A ``Dynamic`` is a pair of pure functions, as an optimiser is. A step turns the state into the next one, given
the game and ``wins(opponent)`` -> P(y > opponent) [X, Y], exact or estimated; it says how often it asks.
Letters: h step size, tau regularisation, p_t(y) = P(y > pi_t), theta = log pi. Policies are normalised log-probs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.games import game as games
from alignjax.games.game import Game, mixture
from alignjax.types import Array, Key

Wins = Callable[..., Array]
"""(log-probs of an opponent [X, Y], which call of this step it is = 0) -> P(y > opponent | x) [X, Y]."""
Schedule = Callable[[Array, Array], Array | float]
"""(t = 0, 1, ..., the game's tau) -> a step size h."""


class State(NamedTuple):
    """Where a dynamic stands."""

    step: Array  # [] int32
    policy: Array  # [X, Y] nats: the last iterate
    memory: Any  # what else the dynamic keeps
    evaluations: Array  # [] int32: how often P(. > pi') was asked for


class Dynamic(NamedTuple):
    """``remember(game, policy)`` -> memory; ``move(wins, game, t, policy, memory)`` -> (policy, memory);
    ``evaluations``: calls of wins in one move; ``answer(state)``: the policy it proposes, mostly the last."""

    remember: Callable[[Game, Array], Any]
    move: Callable[[Wins, Game, Array, Array, Any], tuple[Array, Any]]
    evaluations: int = 1
    answer: Callable[[State], Array] = lambda state: state.policy


def init(dynamic: Dynamic, game: Game) -> State:
    """Starts at the reference."""
    return State(jnp.int32(0), game.log_mu, dynamic.remember(game, game.log_mu), jnp.int32(0))


def step(dynamic: Dynamic, state: State, game: Game, wins: Wins | None = None) -> State:
    """One step; with the exact preferences unless ``wins`` estimates them."""
    ask = wins or (lambda opponent, call=0: games.wins(game, opponent))
    policy, memory = dynamic.move(ask, game, state.step, state.policy, state.memory)
    return State(state.step + 1, policy, memory, state.evaluations + dynamic.evaluations)


def sampled(game: Game, key: Key, batch: int) -> Wins:
    """An unbiased estimate of P(y > pi'): every action meets ``batch`` opponents y' ~ pi', the same for all,
    and each meeting is judged once, 0 or 1."""

    def wins(opponent: Array, call: int = 0) -> Array:
        who, coin = jax.random.split(jax.random.fold_in(key, call))
        drawn = jax.random.categorical(who, opponent[:, None], axis=-1, shape=(opponent.shape[0], batch))
        p = jnp.take_along_axis(game.p, drawn[:, None], axis=-1)  # [X, Y, batch]
        return jnp.mean(jax.random.bernoulli(coin, p).astype(p.dtype), -1)

    return wins


def normalise(theta: Array) -> Array:
    return jax.nn.log_softmax(theta)


def nothing(game: Game, policy: Array) -> Any:
    return ()


def size(h: float | Schedule, t: Array, tau: Array) -> Array | float:
    return h(t, tau) if callable(h) else h


def theorem_1(t: Array, tau: Array) -> Array:
    """h_t = 2 / (tau (t + 2)), with which KL(pi*, pi_T) <= 8 / (tau^2 (T + 1)) (2312.00886, Theorem 1)."""
    return 2 / (tau * (t + 2))


def mirror(at: Array, h: Array | float, p: Array) -> Array:
    """argmax over pi of h P(pi > .) - KL(pi, at): the step all of these are made of."""
    return normalise(at + h * p)


# --- regularised: the last iterate goes to pi*_tau ---


def nash_md(h: float | Schedule) -> Dynamic:
    """Nash-MD (2312.00886, Eq. 4-5): pi' = argmax h P(pi > pi^mu) - KL(pi, pi^mu), pi^mu = pi^(1-h tau) mu^(h tau).

    Theorem 1: KL(pi*, pi') <= (1 - h tau) KL(pi*, pi) + 2 h^2. A constant step does not end at pi*_tau: it ends
    where its mixture is the Nash at tau / (1 - h tau).
    """

    def move(wins: Wins, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        h_t = size(h, t, game.tau)
        mixed = mixture(policy, game.log_mu, h_t * game.tau)
        return mirror(mixed, h_t, wins(mixed)), memory

    return Dynamic(nothing, move)


def omd(h: float | Schedule) -> Dynamic:
    """Online mirror descent (2312.00886, Eq. 7-8): Nash-MD's centre, but preferences against pi_t itself.

    A constant step has exactly pi*_tau as fixed point; it cycles when h is large beside tau.
    """

    def move(wins: Wins, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        h_t = size(h, t, game.tau)
        return mirror(mixture(policy, game.log_mu, h_t * game.tau), h_t, wins(policy)), memory

    return Dynamic(nothing, move)


def inpo() -> Dynamic:
    """INPO (2407.00617): pi' ~ exp(p_t / eta) mu^(tau/eta) pi^(1-tau/eta), eta_t = tau (t + 2) / 2.

    In a table this is online mirror descent with h = 1 / eta: the step sizes of Nash-MD's theorem.
    """
    return omd(theorem_1)


def mmd(h: float, magnet_every: int | None = None) -> Dynamic:
    """Magnetic mirror descent: pi' ~ [pi rho^(h tau) e^(h p_t)]^(1/(1 + h tau)), the magnet rho being mu.

    MPO (2410.16714) with ``magnet_every``: now and then rho <- pi, which leads to the Nash without
    regularisation.
    """

    def move(wins: Wins, game: Game, t: Array, policy: Array, magnet: Array) -> tuple[Array, Array]:
        a = game.tau
        new = normalise((policy + h * a * magnet + h * wins(policy)) / (1 + h * a))
        return new, magnet if magnet_every is None else jnp.where((t + 1) % magnet_every == 0, new, magnet)

    return Dynamic(lambda game, policy: game.log_mu, move)


def wind(h: float) -> Dynamic:
    """WIND (2410.20727): pi' ~ mu^(h tau/(1+h tau)) pi^(1/(1+h tau)) e^(h p_t/(1+h tau)); in a table, MMD to mu."""
    return mmd(h)


def egpo(h: float) -> Dynamic:
    """EGPO (2503.08942), an extragradient: both half steps start at theta,

        theta_half = (1 - h tau) theta + h tau log mu + h p_t,   theta' the same with p at pi_half.

    Last iterate linear, (1 - h tau)^T at h = 1 / (tau + 3). Two evaluations a step.
    """

    def move(wins: Wins, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        centre = (1 - h * game.tau) * policy + h * game.tau * game.log_mu
        half = mirror(centre, h, wins(policy))
        return mirror(centre, h, wins(half, 1)), memory

    return Dynamic(nothing, move, evaluations=2)


def nash_mp(eta: float) -> Dynamic:
    """Nash mirror-prox (2505.19731): pi_half = argmax P(pi > pi_k) - tau KL(pi, mu) - (tau/eta) KL(pi, pi_k),
    then pi_{k+1} the same against pi_half; eta = 2 tau. Two evaluations a step."""

    def move(wins: Wins, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        def proximal(p: Array) -> Array:
            return normalise((eta * (game.log_mu + p / game.tau) + policy) / (1 + eta))

        return proximal(wins(proximal(wins(policy)), 1)), memory

    return Dynamic(nothing, move, evaluations=2)


def nash_ema(h: float, beta: float) -> Dynamic:
    """Nash-EMA (2312.00886, section 7): preferences against the moving average of the parameters, here of theta:
    average' = (1 - beta) theta' + beta average. beta = 0 is online mirror descent."""

    def move(wins: Wins, game: Game, t: Array, policy: Array, average: Array) -> tuple[Array, Array]:
        new = mirror(mixture(policy, game.log_mu, h * game.tau), h, wins(average))
        return new, normalise((1 - beta) * new + beta * average)

    return Dynamic(lambda game, policy: policy, move)


def fictitious_play() -> Dynamic:
    """Smooth fictitious play: pi_avg' = (t pi_avg + BR_tau(pi_avg)) / (t + 1), the best response regularised."""

    def move(wins: Wins, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        answer = normalise(game.log_mu + wins(policy) / game.tau)
        weight = 1 / (t + 2).astype(policy.dtype)  # the reference counts as the first play
        return normalise(jnp.logaddexp(policy + jnp.log1p(-weight), answer + jnp.log(weight))), memory

    return Dynamic(nothing, move)


# --- without regularisation: the Nash of P ---


def multiplicative_weights(h: float | Schedule) -> Dynamic:
    """Self-play multiplicative weights, the tabular SPPO (2405.00675): pi' ~ pi e^(h p_t).

    The last iterate cycles; what it proposes is the average of its iterates.
    """

    def move(wins: Wins, game: Game, t: Array, policy: Array, average: Array) -> tuple[Array, Array]:
        weight = 1 / (t + 2).astype(policy.dtype)
        average = normalise(jnp.logaddexp(average + jnp.log1p(-weight), policy + jnp.log(weight)))
        return mirror(policy, size(h, t, game.tau), wins(policy)), average

    return Dynamic(lambda game, policy: policy, move, answer=lambda state: state.memory)


def optimistic_weights(h: float) -> Dynamic:
    """Optimistic multiplicative weights (2512.24818): pi' ~ pi e^(h (2 p_t - p_{t-1}))."""

    def move(wins: Wins, game: Game, t: Array, policy: Array, last: Array) -> tuple[Array, Array]:
        p = wins(policy)
        return mirror(policy, h, 2 * p - jnp.where(t == 0, p, last)), p

    return Dynamic(lambda game, policy: jnp.zeros_like(policy), move)


def comal(h: float, inner: int) -> Dynamic:
    """COMAL (2410.23223): the reference becomes the solution of the regularised game, again and again; the
    inner solver is online mirror descent (INPO), ``inner`` steps of it. Ends at the Nash of P."""

    def move(wins: Wins, game: Game, t: Array, policy: Array, reference: Array) -> tuple[Array, Array]:
        new = mirror(mixture(policy, reference, h * game.tau), h, wins(policy))
        return new, jnp.where((t + 1) % inner == 0, new, reference)

    return Dynamic(lambda game, policy: game.log_mu, move)


# --- gradient flows on a softmax policy: what the deep algorithms do in expectation ---


def softmax_gradient(policy: Array, gain: Array) -> Array:
    """d/d theta of sum_y pi(y) gain(y), gain held fixed: pi (gain - E gain); [X, Y]."""
    pi = jnp.exp(policy)
    return pi * (gain - jnp.sum(pi * gain, -1, keepdims=True))


def nash_md_pg(lr: float, beta: float) -> Dynamic:
    """Nash-MD-PG (2312.00886, Eq. 13-15): theta' = theta + lr E[grad log pi(y) (P(y > y') - 1/2 - tau log pi/mu)],
    y ~ pi, y' ~ pi^(1-beta) mu^beta. Ends where its mixture is the Nash at tau / (1 - beta)."""

    def move(wins: Wins, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        p = wins(mixture(policy, game.log_mu, beta))
        gain = p - 0.5 - game.tau * (policy - game.log_mu)
        return normalise(policy + lr * softmax_gradient(policy, gain)), memory

    return Dynamic(nothing, move)


def nash_md_pg_samples(game: Game, policy: Array, beta: float, key: Key, batch: int) -> Array:
    """The estimates of Eq. 13 one by one, [batch, X, Y]: y ~ pi, y' ~ the mixture, one 0/1 judgement each."""
    one, two, three = jax.random.split(key, 3)
    contexts = jnp.arange(policy.shape[0])
    y = jax.random.categorical(one, policy, shape=(batch, *contexts.shape))
    other = jax.random.categorical(two, mixture(policy, game.log_mu, beta), shape=y.shape)
    judged = jax.random.bernoulli(three, game.p[contexts, y, other]).astype(policy.dtype)
    ratio = (policy - game.log_mu)[contexts, y]
    score = jax.nn.one_hot(y, policy.shape[1], dtype=policy.dtype) - jnp.exp(policy)[None]
    return score * (judged - 0.5 - game.tau * ratio)[..., None]


def ipo_gradient(game: Game, policy: Array, sampler: Array, p: Array, tau: Array | float) -> Array:
    """d/d theta of the online IPO loss (2403.08635), both answers drawn from ``sampler`` and not differentiated:

        E[p L(y, y') + (1 - p) L(y', y)],   L(y, y') = -D + tau (D - D_mu)^2,   D = log pi(y) - log pi(y'),

    which is 4 m (tau (r - E_m r) - (P(y > m) - 1/2)) with r = log pi/mu and m the sampler; ``p`` = P(y > m).
    """
    m, r = jnp.exp(sampler), policy - game.log_mu
    return 4 * m * (tau * (r - jnp.sum(m * r, -1, keepdims=True)) - (p - 0.5))


def online_ipo(lr: float) -> Dynamic:
    """Online IPO as a flow: both answers from the policy. Its stationary point is pi*_tau."""
    return ipo_md(lr, beta=0.0)


def ipo_md(lr: float, beta: float) -> Dynamic:
    """IPO-MD (2403.08635): both answers from the mixture pi^(1-beta) mu^beta. Ends where Nash-MD-PG does."""

    def move(wins: Wins, game: Game, t: Array, policy: Array, memory: Any) -> tuple[Array, Any]:
        mixed = mixture(policy, game.log_mu, beta)
        return normalise(policy - lr * ipo_gradient(game, policy, mixed, wins(mixed), game.tau)), memory

    return Dynamic(nothing, move)


# --- many games at once ---


class Trace(NamedTuple):
    """Figures of a run after each recorded step, [games, seeds, records] (policy: [..., X, Y])."""

    step: Array
    evaluations: Array  # of P(. > pi'); times ``batch`` judgements of every action where sampled
    kl: Array  # KL_rho(pi*_tau, pi), nats
    gap: Array  # of the regularised game
    exploitability: Array  # of the game without regularisation
    policy: Array  # nats


def play(
    dynamic: Dynamic, games_: Game, nash: Array, records: tuple[int, ...], keys: Array | None = None, batch: int = 0
) -> Trace:
    """Runs a dynamic on a batch of games (leading axis of every leaf), in one compiled scan.

    ``records`` are the step counts after which figures are taken, increasing. ``nash`` [games, X, Y] are the
    log-policies that KL is measured to. With ``batch``, preferences are sampled: once for each of ``keys``.
    """
    keys = jax.random.split(jax.random.key(0), 1) if keys is None else keys
    inner = jnp.diff(jnp.asarray(records, jnp.int32), prepend=0)

    def one(game: Game, target: Array, key: Key) -> Trace:
        def advance(_: Array, state: State) -> State:
            wins = sampled(game, jax.random.fold_in(key, state.step), batch) if batch else None
            return step(dynamic, state, game, wins)

        def record(state: State, count: Array) -> tuple[State, Trace]:
            state = jax.lax.fori_loop(0, count, advance, state)
            policy = dynamic.answer(state)
            figures = games.kl(game, target, policy), games.gap(game, policy), games.exploitability(game, policy)
            return state, Trace(state.step, state.evaluations, *figures, policy)

        return jax.lax.scan(record, init(dynamic, game), inner)[1]

    seeds = jax.vmap(one, (None, None, 0))
    return jax.jit(jax.vmap(seeds, (0, 0, None)))(games_, nash, keys)


def stack(many: list[Game]) -> Game:
    """Games of the same shape as one batch."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *many)
