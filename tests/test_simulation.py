"""Gradients of the dynamics, exact and sampled, and simulations of many games at once, in float64 from fixed seeds."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.games import dynamics, simulation, solve
from alignjax.games import game as games
from tests.test_games import float64, random_game, random_policy

__all__ = ["float64"]  # the fixture is used here too


# --- gradients, exact and sampled ---


def test_the_policy_gradient_is_that_of_the_regularised_value():
    """d/d theta of P(pi > pi') - tau KL(pi, mu), pi' held fixed."""
    game, policy = random_game(4, 1, 5), random_policy(5, 1, 5)
    opponent = games.mixture_policy(policy, game.log_mu, 0.25)

    def value(theta):
        logp = jax.nn.log_softmax(theta)
        return games.value(game, logp, opponent) - game.tau * jnp.sum(jnp.exp(logp) * (logp - game.log_mu))

    move = dynamics.nash_md_pg(1.0, 0.25).update(partial(exact, game), game, 0, policy, ())[0]
    got = move - policy
    want = jax.grad(value)(policy)
    np.testing.assert_allclose(got - got.mean(), want - want.mean(), atol=1e-12)


def exact(game, opponent, call=0):
    return games.win_probability(game, opponent)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_the_ipo_gradient_is_that_of_its_definition(beta):
    game, policy = random_game(6, 1, 5), random_policy(7, 1, 5)
    mixed = games.mixture_policy(policy, game.log_mu, beta)

    def loss(theta):
        logp, m = jax.nn.log_softmax(theta)[0], jnp.exp(mixed[0])
        d = logp[:, None] - logp[None]
        ratio = logp - game.log_mu[0]
        square = (ratio[:, None] - ratio[None]) ** 2
        p = game.p[0]
        both = p * (-d + game.tau * square) + (1 - p) * (d + game.tau * square)
        return jnp.sum(m[:, None] * m[None] * both)

    got = dynamics.ipo_gradient(game, policy, mixed, games.win_probability(game, mixed), game.tau)
    np.testing.assert_allclose(got, jax.grad(loss)(policy), atol=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_sampled_nash_md_gradients_are_unbiased(beta):
    """The mean of 2 * 10^5 within 4 standard errors of the exact gradient, componentwise."""
    game, policy = random_game(8, 2, 4, 0.2), random_policy(9, 2, 4)
    samples = dynamics.nash_md_pg_samples(game, policy, beta, jax.random.key(0), 200_000)
    p = games.win_probability(game, games.mixture_policy(policy, game.log_mu, beta))
    want = dynamics.softmax_gradient(policy, p - 0.5 - game.tau * (policy - game.log_mu))
    samples = np.asarray(samples)
    error = np.std(samples, 0) / np.sqrt(len(samples))
    assert np.all(abs(samples.mean(0) - np.asarray(want)) < 4 * error)
    assert error.max() < 2e-3 < abs(want).max()


def test_sampled_preferences_are_unbiased_and_follow_their_key():
    game, opponent = random_game(8, 2, 4), random_policy(9, 2, 4)
    estimates = jax.vmap(lambda key: simulation.sampled_win_probability(game, key, 4)(opponent))(
        jax.random.split(jax.random.key(0), 50_000)
    )
    error = np.std(estimates, 0) / np.sqrt(len(estimates))
    assert np.all(abs(np.mean(estimates, 0) - games.win_probability(game, opponent)) < 4 * error)
    wins = simulation.sampled_win_probability(game, jax.random.key(1), 4)
    assert np.any(wins(opponent) != wins(opponent, 1)) and np.all(wins(opponent) == wins(opponent))


# --- many at once ---


def test_a_batch_of_games_and_seeds_equals_single_runs():
    many = [random_game(seed, 2, 4) for seed in range(3)]
    nash = np.stack([solve.regularised_nash(game).log_policy for game in many])
    keys = jax.random.split(jax.random.key(0), 2)
    run = partial(simulation.simulate, dynamics.egpo(0.2), records=(3, 10), batch=5)
    whole = run(simulation.stack_games(many), nash, keys=keys)
    assert whole.kl.shape == (3, 2, 2) and whole.policy.shape == (3, 2, 2, 2, 4)
    assert np.all(whole.evaluations[..., -1] == 20) and np.all(whole.step[..., -1] == 10)
    alone = run(simulation.stack_games(many[1:2]), nash[1:2], keys=keys[1:])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[1, 1], b[0, 0], rtol=1e-12), whole, alone)
    assert np.any(whole.policy[:, 0] != whole.policy[:, 1])


def test_a_simulation_equals_single_updates():
    game, md = random_game(1), dynamics.exact_nash_md(dynamics.theorem_1_step_size)
    nash = solve.regularised_nash(game).log_policy
    state = simulation.initial_state(md, game)
    for _ in range(7):
        state = simulation.update_state(md, state, game)
    trace = simulation.simulate(md, simulation.stack_games([game]), nash[None], (7,))
    np.testing.assert_allclose(trace.policy[0, 0, 0], state.policy, rtol=1e-12)
    for name, want in (
        ("kl", games.kl(game, nash, state.policy)),
        ("gap", games.duality_gap(game, state.policy)),
        ("exploitability", games.exploitability(game, state.policy)),
    ):
        np.testing.assert_allclose(getattr(trace, name)[0, 0, 0], want, rtol=1e-9)


def test_float32_follows_float64():
    game = random_game(2, 2, 4)
    nash = solve.regularised_nash(game).log_policy
    wide = simulation.simulate(dynamics.egpo(0.2), simulation.stack_games([game]), nash[None], (200,))
    with jax.enable_x64(False):
        game32 = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), game)
        narrow = simulation.simulate(
            dynamics.egpo(0.2), simulation.stack_games([game32]), jnp.asarray(nash[None], jnp.float32), (200,)
        )
    assert narrow.policy.dtype == jnp.float32
    np.testing.assert_allclose(narrow.policy, wide.policy, atol=1e-4)
