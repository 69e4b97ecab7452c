"""Exact games: the numbers of the paper, identities of values and gaps, solutions with their certificates."""

import jax
import nashpy
import numpy as np
import pytest
from scipy import optimize

from alignjax.errors import UserError
from alignjax.games import game as games
from alignjax.games import solve, zoo

MU = (0.6, 0.3, 0.1)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def random_game(seed, contexts=2, actions=5, tau=0.1, family=zoo.unstructured):
    rho = zoo.random_reference(seed + 2000, 1, contexts)[0]
    reference = zoo.random_reference(seed + 1000, contexts, actions)
    return games.from_matrix(family(seed, contexts, actions), reference, tau, rho)


def random_policy(seed, contexts=2, actions=5):
    return np.log(zoo.random_reference(seed, contexts, actions))


# --- the worked examples of 2312.00886, to the digits given ---


def test_dice_and_voters_are_cycles():
    p = zoo.dice().p[0]
    np.testing.assert_allclose([p[0, 1], p[1, 2], p[2, 0]], 5 / 9, rtol=1e-15)
    np.testing.assert_allclose(solve.nash(zoo.dice()).policy, 1 / 3, atol=1e-12)
    p = zoo.voters().p[0]
    np.testing.assert_allclose([p[0, 1], p[1, 2], p[2, 0]], 2 / 3, rtol=1e-15)


@pytest.mark.parametrize(
    ("build", "tau", "want"),
    [
        (zoo.dice, 0.1, (0.6437, 0.2285, 0.1278)),
        (zoo.dice, 0.01, (0.4207, 0.2385, 0.3409)),
        (zoo.cycle, 0.1, (0.3048, 0.4247, 0.2705)),
        (zoo.cycle, 0.01, (0.3517, 0.2892, 0.3591)),
    ],
)
def test_regularised_nash_of_the_examples(build, tau, want):
    np.testing.assert_allclose(solve.regularised_nash(build(reference=MU, tau=tau)).policy[0], want, atol=5e-5)


def test_nash_of_the_cycle():
    np.testing.assert_allclose(solve.nash(zoo.cycle()).policy[0], np.array([4, 3, 4]) / 11, atol=1e-12)


def test_the_best_elo_is_not_the_best_win_rate():
    game = zoo.elo()
    p = game.p[0]
    np.testing.assert_allclose([p[1, 0], p[2, 0], p[2, 1]], [9 / 10, 2 / 3, 2 / 11], rtol=1e-14)
    share = np.linspace(0, 1 / 3, 301)
    family = np.stack([2 * share, share, 1 - 3 * share], 1)  # pi(y1) = 2 pi(y2)
    np.testing.assert_allclose(family[np.argmax(family @ zoo.ELO_REWARDS)], [2 / 3, 1 / 3, 0], atol=1e-12)
    worst = (family @ p @ family.T).min(1)
    np.testing.assert_allclose(family[np.argmax(worst)], [0, 0, 1], atol=1e-12)
    assert float(np.array([0, 0, 1.0]) @ p @ np.array([2 / 3, 1 / 3, 0])) == pytest.approx(50 / 99, abs=1e-10)


@pytest.mark.parametrize("epsilon", [-0.3, -0.1, 0.01, 0.1, 0.3])
def test_diversity(epsilon):
    game = zoo.diversity(epsilon)
    p = game.p[0]
    np.testing.assert_allclose([p[1, 0], p[0, 2], p[2, 1]], 2 / 3 + epsilon * np.array([-0.5, 0.25, 0.25]), rtol=1e-14)
    want = [1 / 3 + epsilon / 2, 1 / 3 + epsilon / 2, 1 / 3 - epsilon]
    np.testing.assert_allclose(solve.nash(game).policy[0], want, atol=1e-10)
    rewards = zoo.bradley_terry_rewards(game, game.log_mu)[0]
    assert np.argmax(rewards) == (0 if epsilon > 0 else 1)  # deterministic, and it flips


def test_diversity_regularised():
    got = solve.regularised_nash(zoo.diversity(0.1, tau=0.1)).policy[0]
    np.testing.assert_allclose(got, (0.4030, 0.3132, 0.2838), atol=5e-5)


def test_the_best_bradley_terry_reward_depends_on_the_sampler():
    """Theorem 2; and where P is Bradley-Terry it does not."""
    samplers = np.log([[[0.8, 0.1, 0.1]], [[0.1, 0.1, 0.8]]])
    first, second = (zoo.bradley_terry_rewards(zoo.cycle(), s) for s in samplers)
    assert np.argmax(first) != np.argmax(second)
    for sampler in samplers:
        got = zoo.bradley_terry_rewards(zoo.elo(), sampler)[0]
        np.testing.assert_allclose(got - got[0], zoo.ELO_REWARDS, atol=1e-6)


# --- identities ---


def test_values_are_antisymmetric_and_average_the_preferences():
    game, pi, other = random_game(0), random_policy(1), random_policy(2)
    for value in (games.value, games.regularised_value):
        assert float(value(game, pi, other) + value(game, other, pi)) == pytest.approx(1, abs=1e-14)
    p, rho = np.asarray(game.p), np.asarray(game.rho)
    expected = sum(
        rho[x] * np.exp(pi[x, y] + other[x, z]) * p[x, y, z]
        for x in range(2) for y in range(5) for z in range(5)
    )  # fmt: skip
    assert float(games.value(game, pi, other)) == pytest.approx(float(expected), abs=1e-14)


def test_the_best_response_is_best_and_the_gap_is_what_it_gains():
    game, pi = random_game(3), random_policy(4)
    best = games.best_response(game, pi)
    gain = float(games.regularised_value(game, best, pi))
    assert float(games.duality_gap(game, pi)) == pytest.approx(2 * (gain - 0.5), abs=1e-14)
    rng = np.random.default_rng(0)
    for scale in (1e-3, 0.1, 2):
        policy = jax.nn.log_softmax(best + scale * rng.normal(size=best.shape))
        assert float(games.regularised_value(game, policy, pi)) < gain


def test_exploitability_is_the_best_pure_answer():
    game, pi = random_game(5), random_policy(6)
    best = [max(sum(np.asarray(game.p)[x, y] * np.exp(pi[x])) for y in range(5)) for x in range(2)]
    assert float(games.exploitability(game, pi)) == pytest.approx(float(np.dot(game.rho, best)) - 0.5, abs=1e-14)


@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 30.0])
def test_divergence_is_the_kl(scale):
    rng = np.random.default_rng(0)
    pi, other = (jax.nn.log_softmax(scale * rng.normal(size=6)) for _ in range(2))
    p, q = (np.exp(np.asarray(x, np.longdouble)) for x in (pi, other))
    p, q = p / p.sum(), q / q.sum()
    exact = np.sum(p * (np.log(p) - np.log(q)))
    assert float(games.divergence(pi, other)) == pytest.approx(float(exact), rel=1e-5, abs=1e-30)
    pure = np.array([0.0, -np.inf])
    assert float(games.divergence(pure, np.log([0.5, 0.5]))) == pytest.approx(np.log(2), abs=1e-14)
    assert float(games.divergence(pure, pure)) == 0


def test_a_population_is_the_mean_of_its_annotators_and_scores_order_texts():
    rng = np.random.default_rng(0)
    types = rng.uniform(size=(2, 3, 3))
    types = (types + 1 - types.swapaxes(1, 2)) / 2
    game = games.from_population(types, (0.25, 0.75))
    np.testing.assert_allclose(game.p[0], 0.25 * types[0] + 0.75 * types[1], rtol=1e-12)
    game = games.from_scores(["a", "bbb", "ccc"], len)
    np.testing.assert_array_equal(game.p[0], [[0.5, 0, 0], [1, 0.5, 0.5], [1, 0.5, 0.5]])
    soft = games.from_scores(["a", "bbb"], len, sharpness=0.5)
    assert float(soft.p[0, 1, 0]) == pytest.approx(1 / (1 + np.exp(-1)))


@pytest.mark.parametrize("family", zoo.RANDOM_PREFERENCES.values(), ids=list(zoo.RANDOM_PREFERENCES))
def test_random_families_are_games_and_follow_their_seed(family):
    p, again, other = (family(k, 2, 6) for k in (0, 0, 1))
    np.testing.assert_array_equal(p, again)
    assert np.any(p != other)
    assert games.from_matrix(p).p.shape == (2, 6, 6)


def test_rounding_is_corrected_and_larger_deviations_are_refused():
    game = games.from_matrix([[0.5, 0.3 + 3e-7], [0.7, 0.5]], reference=[0.4, 0.6 + 5e-7], rho=[1 + 5e-7])
    p = np.asarray(game.p[0])
    np.testing.assert_array_equal(p + p.T, 1)
    assert float(np.exp(game.log_mu).sum()) == pytest.approx(1, abs=1e-15) and float(game.rho[0]) == 1
    with pytest.raises(UserError, match=r"P\[0, 1\]"):
        games.from_matrix([[0.5, 0.3 + 1e-5], [0.7, 0.5]])


@pytest.mark.parametrize(
    ("p", "options", "message"),
    [
        ([[0.5, 0.2], [0.7, 0.5]], {}, r"P\[0, 1\] = 0.2 and its mirror image do not sum to 1"),
        ([[0.5, 0.2], [0.8, 0.4]], {}, r"P\[1, 1\] = 0.4"),
        ([[0.5, -0.1], [1.1, 0.5]], {}, r"P\[0, 1\] = -0.1 is not in \[0, 1\]"),
        ([[[0.5]], [[np.nan]]], {}, r"P\[1, 0, 0\] = nan is not in"),
        ([0.5], {}, r"shape \(1,\)"),
        ([[0.5, 0.5]], {}, r"shape \(1, 1, 2\)"),
        ([[0.5]], {"reference": [0.5, 0.5]}, r"reference has shape \(2,\)"),
        ([[0.5, 0.5], [0.5, 0.5]], {"reference": [1.0, 0.0]}, "reference must be positive"),
        ([[0.5]], {"rho": [0.7]}, "rho must be positive and sum to 1"),
        ([[0.5]], {"tau": 0.0}, "tau=0.0 must be positive"),
    ],
)
def test_arrays_that_are_no_game_are_refused_and_the_first_wrong_entry_is_named(p, options, message):
    with pytest.raises(UserError, match=message):
        games.from_matrix(p, **options)


# --- solutions ---


@pytest.mark.parametrize("family", zoo.RANDOM_PREFERENCES.values(), ids=list(zoo.RANDOM_PREFERENCES))
@pytest.mark.parametrize("tau", [1.0, 0.1, 0.01, 0.001, 0.0001])
def test_the_regularised_nash_is_its_own_best_response(family, tau):
    """log pi = log mu + P(y > pi) / tau + constant, written out; and the certificate says so."""
    for seed, actions in ((0, 2), (1, 7), (2, 60)):
        game = random_game(seed, 2, actions, tau, family)
        solution = solve.regularised_nash(game)
        raw = game.log_mu + np.einsum("xyz,xz->xy", game.p, solution.policy) / tau
        raw = np.exp(raw - raw.max(1, keepdims=True))
        np.testing.assert_allclose(solution.policy, raw / raw.sum(1, keepdims=True), atol=1e-11)
        assert solution.gap < 1e-12 and float(games.duality_gap(game, solution.log_policy)) < 1e-12


def test_the_gap_bounds_the_distance_to_the_nash():
    """tau KL(pi, pi*) <= gap / 2, with pi* from another method: SciPy's root of the same equation."""
    game = random_game(7, 1, 4, 0.2)

    def residual(theta):
        return jax.nn.log_softmax(theta) - games.best_response(game, jax.nn.log_softmax(theta)[None])[0]

    root = optimize.root(residual, np.zeros(4), tol=1e-13)
    want = jax.nn.log_softmax(root.x)
    np.testing.assert_allclose(solve.regularised_nash(game).log_policy[0], want, atol=1e-10)
    for seed in range(20):
        pi = random_policy(seed, 1, 4)
        assert float(games.kl(game, pi, want[None])) <= float(games.duality_gap(game, pi)) / (2 * 0.2)


@pytest.mark.parametrize("tau", [None, 0.01, 0.3])
def test_certificates_are_the_gaps_of_any_policy(tau):
    game, pi = random_game(8, 3, 5, tau or 1.0), random_policy(9, 3, 5)
    want = 2 * games.exploitability(game, pi) if tau is None else games.duality_gap(game, pi)
    assert solve.certified_gap(game, pi, tau) == pytest.approx(float(want), rel=1e-12)


def test_the_linear_program_agrees_with_another_solver():
    """nashpy's linear program, on games with one Nash (antisymmetric, odd, generic)."""
    for seed in range(10):
        game = random_game(seed, 1, 5)
        row, _ = nashpy.Game(np.asarray(game.p[0]) - 0.5).linear_program()
        solution = solve.nash(game)
        np.testing.assert_allclose(solution.policy[0], row, atol=1e-9)
        assert solution.gap == pytest.approx(2 * float(games.exploitability(game, solution.log_policy)), abs=1e-12)
        assert solution.gap < 1e-9


def test_the_regularised_nash_goes_to_the_nash_as_tau_falls():
    game = random_game(3, 1, 5)
    want = solve.nash(game).policy
    errors = [abs(solve.regularised_nash(game, tau).policy - want).max() for tau in (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 5e-4
