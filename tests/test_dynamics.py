"""Dynamics against their theorems, their fixed points and one another, in float64 from fixed seeds."""

from itertools import cycle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.games import dynamics, simulation, solve, zoo
from alignjax.games import game as games
from tests.test_games import MU, float64, random_game, random_policy

__all__ = ["float64"]  # the fixture is used here too


def run_alone(dynamic, game, steps, tau=None, **options):
    """Returns (the policy proposed after ``steps`` updates, the trace) in one game."""
    target = solve.regularised_nash(game, tau).log_policy
    trace = simulation.simulate(dynamic, simulation.stack_games([game]), target[None], (steps,), **options)
    return trace.policy[0, 0, 0], trace


# --- Theorem 1 of 2312.00886 ---

STEPS = 40


def theorem_games(contexts, actions, count):
    """``count`` random games of every family, at four temperatures each, as one batch; and their Nash."""
    many = []
    for family in zoo.RANDOM_PREFERENCES.values():
        p = family(len(many), contexts * count, actions).reshape(count, contexts, actions, actions)
        mu = zoo.random_reference(len(many) + 1, count * contexts, actions).reshape(count, contexts, actions)
        rho = zoo.random_reference(len(many) + 2, count, contexts)
        many += [
            games.from_matrix(*game, r) for *game, r in zip(p, mu, cycle((0.03, 0.1, 0.3, 1.0)), rho, strict=False)
        ]
    return simulation.stack_games(many), np.stack([solve.regularised_nash(game).log_policy for game in many])


def slack_of_one_step(game, nash, key):
    """The bound minus the KL after one step of Nash-MD from a random policy with a random step size."""
    policy_key, step_key = jax.random.split(key)
    policy = jax.nn.log_softmax(2 * jax.random.normal(policy_key, game.log_mu.shape))
    h = jax.random.uniform(step_key) / game.tau
    after = simulation.update_state(dynamics.exact_nash_md(h), dynamics.State(0, policy, (), 0), game).policy
    return (1 - h * game.tau) * games.kl(game, nash, policy) + 2 * h**2 - games.kl(game, nash, after)


@pytest.mark.parametrize(("contexts", "actions", "count"), [(1, 3, 120), (3, 6, 100)])
def test_theorem_1_in_over_a_thousand_games(contexts, actions, count):
    """KL(pi*, pi_{t+1}) <= (1 - h tau) KL(pi*, pi_t) + 2 h^2 along the theorem's step sizes and from random
    policies with random ones; KL(pi*, pi_T) <= 8 / (tau^2 (T + 1)). In 600 + 500 games, a quarter at each tau.
    The smallest slack: 4.8e-3 along the theorem's steps, 1.3e-3 from anywhere, .195 of the bound."""
    batch, nash = theorem_games(contexts, actions, count)
    tau = np.asarray(batch.tau)[:, None]
    md = dynamics.exact_nash_md(dynamics.theorem_1_step_size)
    kl = np.asarray(simulation.simulate(md, batch, nash, tuple(range(1, STEPS + 1))).kl)[:, 0]
    h = 2 / (tau * (np.arange(1, STEPS) + 2))
    one_step = (1 - h * tau) * kl[:, :-1] + 2 * h**2 - kl[:, 1:]
    bound = 8 / (tau**2 * (np.arange(1, STEPS + 1) + 1)) - kl
    keys = jax.random.split(jax.random.key(1), len(nash))
    anywhere = np.asarray(jax.jit(jax.vmap(slack_of_one_step))(batch, nash, keys))
    smallest = {"one step": one_step.min(), "bound": bound.min(), "one step, anywhere": anywhere.min()}
    assert len(kl) == 5 * count and min(smallest.values()) > 0, smallest


# --- fixed points ---


@pytest.mark.parametrize(("h", "tau"), [(0.5, 0.3), (2.0, 0.3), (0.2, 0.05)])
def test_a_constant_step_of_nash_md_ends_at_another_temperature(h, tau):
    game = random_game(1, 2, 4, tau)
    policy, _ = run_alone(dynamics.exact_nash_md(h), game, 6000)
    want = solve.regularised_nash(game, tau / (1 - h * tau)).policy
    np.testing.assert_allclose(np.exp(games.mixture_policy(policy, game.log_mu, h * tau)), want, atol=1e-8)
    assert abs(np.exp(policy) - solve.regularised_nash(game).policy).max() > 1e-3


@pytest.mark.parametrize("build", [dynamics.nash_md_pg, dynamics.ipo_md])
@pytest.mark.parametrize("beta", [0.0, 0.125, 0.5])
def test_nash_md_pg_and_ipo_md_end_at_another_temperature(build, beta):
    tau, lr = 0.3, 5.0 if build is dynamics.nash_md_pg else 1.0
    game = random_game(2, 2, 4, tau)
    policy, _ = run_alone(build(lr, beta), game, 20_000)
    want = solve.regularised_nash(game, tau / (1 - beta)).policy
    np.testing.assert_allclose(np.exp(games.mixture_policy(policy, game.log_mu, beta)), want, atol=1e-8)


REGULARISED = {
    "omd": dynamics.omd(0.2),
    "mmd": dynamics.mmd(0.2),
    "wind": dynamics.wind(0.2),
    "egpo": dynamics.egpo(1 / 3.2),
    "nash_mp": dynamics.nash_mp(0.4),
    "nash_ema": dynamics.nash_ema(0.2, 0.5),
    "online_ipo": dynamics.exact_online_ipo(1.0),
    "nash_md": dynamics.exact_nash_md(dynamics.theorem_1_step_size),
    "inpo": dynamics.exact_inpo(),
    "fictitious_play": dynamics.fictitious_play(),
}


@pytest.mark.parametrize("name", REGULARISED)
def test_the_last_iterate_goes_to_the_regularised_nash(name):
    game = random_game(3, 2, 4, 0.2)
    _, trace = run_alone(REGULARISED[name], game, 5000)
    averaging = name in ("nash_md", "inpo", "fictitious_play")  # step sizes that fall: no linear rate
    assert 0 <= float(trace.kl[0, 0, 0]) < (1e-5 if averaging else 1e-15)
    assert float(trace.gap[0, 0, 0]) < 1e-5


UNREGULARISED = {
    "mpo": (dynamics.mmd(0.5, magnet_every=200), 1e-6),
    "comal": (dynamics.comal(0.5, 200), 1e-6),
    "optimistic_weights": (dynamics.optimistic_weights(0.5), 1e-6),
    "sppo": (dynamics.multiplicative_weights(lambda t, tau: 1 / jnp.sqrt(t + 1)), 1e-2),
}


@pytest.mark.parametrize("name", UNREGULARISED)
def test_dynamics_without_regularisation_go_to_the_nash_of_p(name):
    dynamic, bound = UNREGULARISED[name]
    game = zoo.cycle(reference=MU, tau=0.2)
    policy, trace = run_alone(dynamic, game, 10_000)
    assert float(trace.exploitability[0, 0, 0]) < bound
    if bound < 1e-3:
        np.testing.assert_allclose(np.exp(policy), solve.nash(game).policy, atol=1e-3)


def test_the_last_iterate_of_multiplicative_weights_does_not_converge():
    game = zoo.rock_paper_scissors(reference=MU)
    state = simulation.initial_state(dynamics.multiplicative_weights(0.1), game)
    exploitability = []
    for _ in range(300):
        state = simulation.update_state(dynamics.multiplicative_weights(0.1), state, game)
        exploitability.append(float(games.exploitability(game, state.policy)))
    assert min(exploitability[200:]) > 0.1


# --- one step, written out in probabilities as the papers do ---

H, TAU, T = 0.7, 0.2, 3


def written_out(p, pi, mu, last):
    """Returns name -> (dynamic, memory before update T, the policy after it); ``p(pi)`` = P(y > pi)."""

    def norm(x):
        return x / x.sum(-1, keepdims=True)

    h = 2 / (TAU * (T + 2))
    mixed = norm(pi ** (1 - h * TAU) * mu ** (h * TAU))
    half = norm(pi ** (1 - H * TAU) * mu ** (H * TAU) * np.exp(H * p(pi)))
    eta = 2 * TAU
    prox = norm((mu * np.exp(p(pi) / TAU)) ** (eta / (1 + eta)) * pi ** (1 / (1 + eta)))
    best = norm(mu * np.exp(p(pi) / TAU))
    magnetic = norm((pi * last ** (H * TAU) * np.exp(H * p(pi))) ** (1 / (1 + H * TAU)))
    return {
        "nash_md": (dynamics.exact_nash_md(dynamics.theorem_1_step_size), (), norm(mixed * np.exp(h * p(mixed)))),
        "omd": (dynamics.omd(dynamics.theorem_1_step_size), (), norm(mixed * np.exp(h * p(pi)))),
        "inpo": (dynamics.exact_inpo(), (), norm(np.exp(h * p(pi)) * mu ** (TAU * h) * pi ** (1 - TAU * h))),
        "mmd": (dynamics.mmd(H), np.log(last), magnetic),
        "mpo": (dynamics.mmd(H, magnet_every=T + 1), np.log(last), magnetic),
        "egpo": (dynamics.egpo(H), (), norm(pi ** (1 - H * TAU) * mu ** (H * TAU) * np.exp(H * p(half)))),
        "nash_mp": (
            dynamics.nash_mp(eta), (),
            norm((mu * np.exp(p(prox) / TAU)) ** (eta / (1 + eta)) * pi ** (1 / (1 + eta))),
        ),
        "nash_ema": (
            dynamics.nash_ema(H, 0.9), np.log(last),
            norm(pi ** (1 - H * TAU) * mu ** (H * TAU) * np.exp(H * p(last))),
        ),
        "fictitious_play": (dynamics.fictitious_play(), (), ((T + 1) * pi + best) / (T + 2)),
        "weights": (dynamics.multiplicative_weights(H), np.log(last), norm(pi * np.exp(H * p(pi)))),
        "optimistic": (dynamics.optimistic_weights(H), last, norm(pi * np.exp(H * (2 * p(pi) - last)))),
        "comal": (dynamics.comal(H, T + 1), np.log(last),
                  norm(pi ** (1 - H * TAU) * last ** (H * TAU) * np.exp(H * p(pi)))),
    }  # fmt: skip


NAMES = [
    "nash_md",
    "omd",
    "inpo",
    "mmd",
    "mpo",
    "egpo",
    "nash_mp",
    "nash_ema",
    "fictitious_play",
    "weights",
    "optimistic",
    "comal",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_step_is_the_papers_formula(name):
    game = random_game(11, 2, 5, TAU)
    pi, last = np.exp(random_policy(12)), np.exp(random_policy(13))

    def p(policy):
        return np.einsum("xyz,xz->xy", game.p, policy)

    dynamic, memory, want = written_out(p, pi, np.exp(game.log_mu), last)[name]
    asked = []
    state = dynamics.State(jnp.int32(T), np.log(pi), memory, jnp.int32(0))
    wins = lambda opponent, call=0: (asked.append(call), games.win_probability(game, opponent))[1]  # noqa: E731
    after = simulation.update_state(dynamic, state, game, wins)
    np.testing.assert_allclose(np.exp(after.policy), want, rtol=1e-10)
    assert asked == list(range(dynamic.evaluations)) and int(after.evaluations) == len(asked)
    if name in ("mpo", "comal"):  # the step before a multiple: the reference moves
        np.testing.assert_allclose(after.memory, after.policy)
    if name == "mmd":
        np.testing.assert_allclose(after.memory, np.log(last))
    if name == "nash_ema":
        average = np.exp(0.1 * after.policy + 0.9 * np.log(last))
        np.testing.assert_allclose(np.exp(after.memory), average / average.sum(-1, keepdims=True), rtol=1e-10)
    if name == "weights":  # the average counts pi_0 ... pi_t alike
        np.testing.assert_allclose(np.exp(after.memory), ((T + 1) * last + pi) / (T + 2), rtol=1e-10)
    if name == "optimistic":
        np.testing.assert_allclose(after.memory, p(pi))


def test_the_first_optimistic_step_has_no_forecast():
    game = random_game(11, 2, 5, TAU)
    optimistic, plain = dynamics.optimistic_weights(H), dynamics.multiplicative_weights(H)
    first, second = (
        simulation.update_state(d, simulation.initial_state(d, game), game).policy for d in (optimistic, plain)
    )
    np.testing.assert_allclose(first, second, rtol=1e-12)


# --- rates ---


@pytest.mark.parametrize(
    ("dynamic", "want", "within"),
    [
        (dynamics.omd(0.5), 0.53, 0.1),
        (dynamics.mmd(0.5), 0.52, 0.1),
        (dynamics.mmd(0.04), 3.3e-2, 0.1),
        (dynamics.exact_nash_md(dynamics.theorem_1_step_size), 2.2e-2, 0.1),
        (dynamics.egpo(1 / 3.01), 0.0, 1e-16),
        (dynamics.nash_mp(0.02), 0.0, 1e-16),
    ],
    ids=["omd", "mmd", "mmd 4 tau", "nash_md", "egpo", "nash_mp"],
)
def test_rock_paper_scissors_separates_the_dynamics(dynamic, want, within):
    """Deterministic, tau = .01, 3000 steps from (.6, .3, .1): KL(pi*, pi)."""
    game = zoo.rock_paper_scissors(reference=MU, tau=0.01)
    kl = float(run_alone(dynamic, game, 3000)[1].kl[0, 0, 0])
    assert abs(kl - want) <= within * (want or 1)


def test_nash_md_on_the_cycle_to_the_digits_given():
    game = zoo.cycle(reference=MU, tau=0.1)
    nash = solve.regularised_nash(game).log_policy
    md = dynamics.exact_nash_md(dynamics.theorem_1_step_size)
    kl = simulation.simulate(md, simulation.stack_games([game]), nash[None], (10, 100, 1000, 10_000)).kl[0, 0]
    np.testing.assert_allclose(kl, [3.4e-3, 9.1e-5, 7.7e-7, 7.8e-9], rtol=0.02)


def rate(dynamic, game, records):
    """The factor a step by which KL falls, fitted to log KL over the records above rounding."""
    nash = solve.regularised_nash(game).log_policy
    kl = np.asarray(simulation.simulate(dynamic, simulation.stack_games([game]), nash[None], records).kl[0, 0])
    above = kl > 1e-20
    return np.exp(np.polyfit(np.array(records)[above], np.log(kl[above]), 1)[0]), kl


@pytest.mark.parametrize("tau", [0.01, 0.1, 0.5])
@pytest.mark.parametrize("build", [zoo.rock_paper_scissors, zoo.cycle, zoo.dice])
def test_egpo_and_nash_mp_are_linear_within_their_bounds(build, tau):
    game = build(reference=MU, tau=tau)
    records = tuple(range(5, 1500, 5))
    h = 1 / (tau + 3)
    fitted, kl = rate(dynamics.egpo(h), game, records)
    assert fitted <= 1 - h * tau
    fitted, _ = rate(dynamics.nash_mp(2 * tau), game, records)
    assert fitted <= 1 / (1 + 2 * tau)  # two queries a step: (1 + 2 tau)^(-N/2)
    assert kl[0] > kl[-1]


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_inpo_keeps_its_bound(tau):
    """KL <= 32 C^2 / (tau^2 (T + 1)), C = max(B tau, 1), B the largest log-ratio seen."""
    many = [random_game(seed, 1, 4, tau) for seed in range(20)]
    nash = np.stack([solve.regularised_nash(game).log_policy for game in many])
    trace = simulation.simulate(dynamics.exact_inpo(), simulation.stack_games(many), nash, tuple(range(1, 60)))
    ratio = np.asarray(trace.policy)[:, 0] - np.stack([game.log_mu for game in many])[:, None]
    largest = np.maximum(1, tau * abs(ratio).max((1, 2, 3)))[:, None]
    assert np.all(np.asarray(trace.kl)[:, 0] <= 32 * largest**2 / (tau**2 * (np.arange(1, 60) + 1)))
