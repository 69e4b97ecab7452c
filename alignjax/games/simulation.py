"""Running dynamics: update by update, or on many games and seeds in one compiled scan."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.games.dynamics import Dynamic, State, WinProbability
from alignjax.games.game import Game, duality_gap, exploitability, kl, win_probability
from alignjax.types import Array, Key


def initial_state(dynamic: Dynamic, game: Game) -> State:
    """Returns the state at the reference, before the first update."""
    return State(jnp.int32(0), game.log_mu, dynamic.init_memory(game, game.log_mu), jnp.int32(0))


def update_state(dynamic: Dynamic, state: State, game: Game, wins: WinProbability | None = None) -> State:
    """Returns the state after one update, with the exact preferences unless ``wins`` estimates them."""
    ask = wins or (lambda opponent, call=0: win_probability(game, opponent))
    policy, memory = dynamic.update(ask, game, state.step, state.policy, state.memory)
    return State(state.step + 1, policy, memory, state.evaluations + dynamic.evaluations)


def sampled_win_probability(game: Game, key: Key, batch: int) -> WinProbability:
    """Returns an unbiased estimate of P(y > pi').

    Every action meets the same ``batch`` opponents y' ~ pi' of its context; each meeting is judged once, 0 or 1.
    """

    def wins(opponent: Array, call: int = 0) -> Array:
        """Returns the mean judgement of each action, [X, Y]."""
        opponent_key, judgement_key = jax.random.split(jax.random.fold_in(key, call))
        shape = (opponent.shape[0], batch)
        sampled = jax.random.categorical(opponent_key, opponent[:, None], axis=-1, shape=shape)
        p = jnp.take_along_axis(game.p, sampled[:, None], axis=-1)  # [X, Y, batch]
        return jnp.mean(jax.random.bernoulli(judgement_key, p).astype(p.dtype), -1)

    return wins


class Trace(NamedTuple):
    """Figures of a run after each recorded update, [games, seeds, records] (policy: [..., X, Y])."""

    step: Array
    evaluations: Array  # of P(. > pi'); when sampled, each is ``batch`` judgements of every action
    kl: Array  # KL_rho(pi*_tau, pi), nats
    gap: Array  # duality gap of the regularised game
    exploitability: Array  # in the game without regularisation
    policy: Array  # nats


def simulate(
    dynamic: Dynamic, games: Game, nash: Array, records: Sequence[int], keys: Array | None = None, batch: int = 0
) -> Trace:
    """Runs a dynamic on a batch of games (leading axis of every leaf) in one compiled scan; returns its figures.

    ``records`` are the increasing numbers of updates after which figures are taken. ``nash`` [games, X, Y] are the
    log-policies to which KL is measured. With ``batch`` > 0, preferences are sampled, once for each of ``keys``.
    """
    keys = jax.random.split(jax.random.key(0), 1) if keys is None else keys
    update_counts = jnp.diff(jnp.asarray(records, jnp.int32), prepend=0)

    def simulate_game(game: Game, target: Array, key: Key) -> Trace:
        """Returns the trace [records] of one game and one seed."""

        def advance(_: Array, state: State) -> State:
            """Returns the state after one update, with the exact or newly sampled preferences."""
            wins = sampled_win_probability(game, jax.random.fold_in(key, state.step), batch) if batch else None
            return update_state(dynamic, state, game, wins)

        def record(state: State, count: Array) -> tuple[State, Trace]:
            """Returns the state after ``count`` updates, and its figures."""
            state = jax.lax.fori_loop(0, count, advance, state)
            policy = dynamic.proposal(state)
            figures = kl(game, target, policy), duality_gap(game, policy), exploitability(game, policy)
            return state, Trace(state.step, state.evaluations, *figures, policy)

        return jax.lax.scan(record, initial_state(dynamic, game), update_counts)[1]

    over_seeds = jax.vmap(simulate_game, (None, None, 0))
    return jax.jit(jax.vmap(over_seeds, (0, 0, None)))(games, nash, keys)


def stack_games(games: Sequence[Game]) -> Game:
    """Returns games of the same shape as one batch: a leading axis in every leaf."""
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves)), *games)
