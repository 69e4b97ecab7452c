"""Where each objective ends, through its adapter and loss, in worlds of a few completions: expectations are exact.

The referees are the games' solver and dynamics, SciPy, and sums written out in NumPy.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from scipy import optimize, special

import alignjax as aj
from alignjax import losses
from alignjax.games import dynamics, solve, zoo
from alignjax.games import game as games
from alignjax.training.learn import init_state, make_learn
from alignjax.types import Completion, PreferenceBatch, Response
from tests.enumerated import (
    ACTIONS,
    TAU,
    all_pairs,
    as_batch,
    as_policy,
    completions_of,
    descend,
    expected_gradient,
    independent_weights,
    intransitive,
    log_prob,
    one_step,
    relative_error,
    sequence_logp,
    step_mixture,
    tabular,
)
from tests.test_games import float64

__all__ = ["float64"]
BETA, DPO_BETA, ALPHA, ETA = 0.3, 0.5, 0.02, 0.8
REFERENCE, START = 2, 1  # seeds
with jax.enable_x64(True):
    CYCLIC = np.asarray(intransitive(len(ACTIONS)))


def nash_md():
    return aj.PreferenceGradient(functools.partial(losses.nash_md, tau=TAU))


def direct(loss, of_reference=(), **settings):
    return aj.DirectAlignment(functools.partial(loss, **settings), of_reference)


def opponent():
    return aj.OpponentAlignment(functools.partial(losses.opponent_ipo, tau=TAU))


def inpo(count=2, eta=ETA):
    return aj.IterativeAlignment(count, functools.partial(losses.inpo, tau=TAU, eta=eta), regularized=True)


def sppo(count=2, eta=0.2):
    return aj.IterativeAlignment(count, functools.partial(losses.sppo, eta=eta), regularized=False)


def all_groups(reference, p, count, writer):
    """The batch of all groups of ``count`` completions, Y ** count rows; the writer's log-probs are known."""
    rows = completions_of(reference)
    chosen = np.array(list(itertools.product(range(len(rows)), repeat=count)))
    sides = [as_batch(rows[column]) for column in chosen.T]
    responses = tuple(
        Response(side, behavior_logp=log_prob(writer, *both), reference_logp=log_prob(reference, *both))
        for both in sides
        for side in both[1:]
    )
    matrix = jnp.asarray(p)[chosen[:, :, None], chosen[:, None]]
    return PreferenceBatch(sides[0][0], responses, matrix, None, tuple(itertools.combinations(range(count), 2)))


def group_weights(*policies):
    """The probability of each of those rows where the policies write independently, [Y ** count]."""
    masses = [jnp.exp(sequence_logp(params)) for params in policies]
    return functools.reduce(lambda joint, mass: (joint[:, None] * mass[None]).reshape(-1), masses)


def game_of(reference, p=CYCLIC, tau=TAU):
    return games.from_matrix(np.asarray(p), np.exp(sequence_logp(reference)), tau)


def nash_at(tau, reference, p=CYCLIC):
    """log of the Nash policy at that temperature, [Y], by the games' solver."""
    return np.log(solve.regularised_nash(game_of(reference, p, tau)).policy[0])


def kl_to(want, got):
    return float(games.divergence(jnp.asarray(want), jnp.asarray(got)))


# --- what adapters hand to their losses ---


def ragged_group(params, reference, writer):
    """Two rows of three responses of two tokens, some of which are padding; log-probs on padding are NaN."""
    tokens = np.array([[[0, 1], [1, 0], [0, 0]], [[1, 1], [0, 1], [1, 0]]], np.int32)
    masks = np.array([[[1, 1], [1, 0], [1, 1]], [[1, 0], [1, 1], [1, 1]]], bool)
    prompt, _ = as_batch(tokens[:, 0])
    sides = [Completion(tokens[:, k], masks[:, k]) for k in range(3)]

    def padded(theta, side):
        return jnp.where(side.mask, log_prob(theta, prompt, side), jnp.nan)

    responses = tuple(
        Response(side, behavior_logp=padded(writer, side), reference_logp=padded(reference, side)) for side in sides
    )
    p = np.array([intransitive(3, seed) for seed in (4, 5)])
    sums = [
        np.stack([log_prob(theta, prompt, side).sum(1) for side in sides], 1) for theta in (params, reference, writer)
    ]
    return PreferenceBatch(prompt, responses, p, None, ((0, 1), (0, 2), (1, 2))), sums, p


def test_adapters_hand_over_sums_over_tokens_and_preferences_by_their_numbers():
    params, reference, writer = tabular(1), tabular(2), tabular(3)
    batch, (pi, mu, pi_t), p = ragged_group(params, reference, writer)
    policy, handed = as_policy(log_prob), []

    def spy(*arrays):
        handed[:] = map(np.asarray, arrays)
        return jnp.arange(2.0)

    kl, length = np.mean((pi_t - mu)[:, 0]), 1.5  # of response 0, under its writer
    loss, metrics = aj.IterativeAlignment(3, lambda a, b, c: spy(a, b, c), True)(params, batch, None, policy=policy)
    for got, want in zip(handed, (pi - pi_t, p, pi - mu), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    want = {"loss": 0.5, "moved": np.mean(pi_t - pi), "kl": kl, "length": length}
    assert loss == 0.5 and metrics == pytest.approx(want) and metrics.keys() == inpo().meanings.keys()
    aj.IterativeAlignment(2, lambda a, b: spy(a, b), False)(params, batch, None, policy=policy)
    for got, want in zip(handed, ((pi - pi_t)[:, :2], p[:, :2, :2]), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)

    loss, metrics = aj.OpponentAlignment(spy)(params, batch, None, policy=policy)
    for got, want in zip(handed, ((pi - mu)[:, 0], (pi - mu)[:, 1], p[:, 0, 2], p[:, 1, 2]), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-12)
    margin = np.sign(p[:, 0, 2] - p[:, 1, 2]) * ((pi - mu)[:, 0] - (pi - mu)[:, 1])
    want = {"preference": p[:, 0, 2].mean(), "accuracy": np.mean(margin > 0), "log_ratio_margin": margin.mean()}
    assert metrics == pytest.approx({"loss": 0.5, "kl": kl, "length": length, **want})
    assert metrics.keys() == opponent().meanings.keys()


def test_the_reference_scores_what_a_loss_reads_and_the_kl_of_one_response():
    params, reference = tabular(1), tabular(2)
    batch, *_ = ragged_group(params, reference, reference)
    lean = dataclasses.replace(
        batch,
        responses=(batch.responses[0], *(dataclasses.replace(r, reference_logp=None) for r in batch.responses[1:])),
    )
    assert sppo(3).scored == (0,) and inpo(3).scored == sppo(3).on_policy == inpo(3).on_policy == (0, 1, 2)
    policy = as_policy(log_prob)
    assert sppo(3)(params, lean, None, policy=policy)[0] == sppo(3)(params, batch, None, policy=policy)[0]
    with pytest.raises(ValueError, match="no reference log-probs"):
        inpo(3)(params, lean, None, policy=policy)
    two = dataclasses.replace(batch, compared=((0, 1), (0, 2)))
    for objective in (inpo(3), sppo(3), opponent()):
        with pytest.raises(ValueError, match="responses 1 and 2 were not compared"):
            objective(params, two, None, policy=policy)


# --- one token: objectives that learn from each batch once ---


def tilted_by_its_own_rewards(logp, reference):
    """mu exp(r / beta), r the Bradley-Terry fit of P on pairs that the policy itself writes."""
    rewards = zoo.bradley_terry_rewards(game_of(reference), logp[None])[0]
    return special.log_softmax(sequence_logp(reference) + rewards / DPO_BETA)


def xpo_root(logp, reference):
    """The policy near logp at which beta g = alpha (pi - mu); sums over y and y' in NumPy, solved by SciPy."""
    log_mu, p = np.asarray(sequence_logp(reference)), np.asarray(CYCLIC)
    mu = np.exp(log_mu)

    def residual(logits):
        pi = special.softmax(logits)
        ratio = np.log(pi) - log_mu
        slope = DPO_BETA * (special.expit(DPO_BETA * (ratio[:, None] - ratio)) - p)  # d loss(y, y') / d ratio(y)
        gained = [pi[y] * sum(mu[z] * slope[y, z] for z in range(5)) for y in range(5)]
        gained = gained - np.array([mu[z] * sum(pi[y] * slope[y, z] for y in range(5)) for z in range(5)])
        return gained + ALPHA * (mu - pi) + (np.sum(logits) / 5) * np.ones(5)  # logits with mean 0

    found = optimize.root(residual, np.asarray(logp) - np.mean(logp), tol=1e-13)
    assert found.success and np.abs(residual(found.x)).max() < 1e-12
    return special.log_softmax(found.x)


def own(params, reference):
    return params


def mixed(params, reference):
    return step_mixture(params, reference, BETA)


def frozen(params, reference):
    return reference


ONE_TOKEN = {
    "Nash-MD": (nash_md(), (own, mixed), 2.0, mixed, lambda _, mu: nash_at(TAU / (1 - BETA), mu)),
    "IPO-MD": (direct(losses.online_ipo, tau=TAU), (mixed, mixed), 0.5, mixed,
               lambda _, mu: nash_at(TAU / (1 - BETA), mu)),
    "self-play": (nash_md(), (own, own), 2.0, own, lambda _, mu: nash_at(TAU, mu)),
    "online IPO": (direct(losses.online_ipo, tau=TAU), (own, own), 0.5, own, lambda _, mu: nash_at(TAU, mu)),
    "opponent": (opponent(), (own, own, own), 0.1, own, lambda _, mu: nash_at(TAU, mu)),
    "opponent, explored": (opponent(), (frozen, own, own), 0.1, own, lambda _, mu: nash_at(TAU, mu)),
    "online DPO": (direct(losses.dpo, beta=DPO_BETA), (own, own), 20.0, own, tilted_by_its_own_rewards),
    "XPO": (direct(losses.xpo, (1,), beta=DPO_BETA, alpha=ALPHA), (own, frozen), 5.0, own, xpo_root),
}  # fmt: skip
"""name -> (objective, who writes each response, rate, the policy that is compared, (its log-probs, mu) -> its referee).
"""


@functools.cache
def end_of(name):
    """(log-probs of the compared policy, norm of the gradient there) after descent, and the reference."""
    objective, writers, rate, compared, _ = ONE_TOKEN[name]
    reference = one_step(REFERENCE)
    batch = all_groups(reference, CYCLIC, len(writers), reference)

    def gradient(params):
        weights = group_weights(*(writer(params, reference) for writer in writers))
        return expected_gradient(objective, params, batch, weights)

    end = descend(gradient, one_step(START), rate, 6000)
    return sequence_logp(compared(end, reference)), float(optax.tree.norm(jax.jit(gradient)(end))), reference


@pytest.mark.parametrize("name", ONE_TOKEN)
def test_an_objective_ends_where_its_paper_says(name):
    logp, norm, reference = end_of(name)
    assert norm < 1e-9
    assert kl_to(ONE_TOKEN[name][-1](logp, reference), logp) < 1e-12
    others = [nash_at(tau, reference) for tau in (TAU, TAU / (1 - BETA))]
    apart = [kl_to(other, logp) for other in others]
    assert sum(kl < 1e-4 for kl in apart) == (name not in ("online DPO", "XPO"))  # the referees differ


def test_exploration_moves_the_end_of_xpo():
    """Without it the end is that of DPO on pairs of the policy and the reference."""
    plain = direct(losses.dpo, beta=DPO_BETA)
    reference = one_step(REFERENCE)
    batch = all_groups(reference, CYCLIC, 2, reference)
    end = descend(lambda w: expected_gradient(plain, w, batch, group_weights(w, reference)), one_step(START), 5.0, 6000)
    logp = sequence_logp(end)
    assert kl_to(end_of("XPO")[0], logp) > 1e-3
    gap = [np.exp(sequence_logp(reference)) @ x for x in (logp, end_of("XPO")[0])]
    assert gap[1] < gap[0]  # the reference's responses have lost log-prob


# --- two tokens ---


def test_nash_md_over_two_tokens_ends_at_the_best_response_to_its_own_mixture_of_tokens():
    """pi proportional to mu exp(P(y > m) / tau), m mixed token by token: by a damped iteration over completions."""
    reference, p = jax.tree.map(lambda x: 2 * x, tabular(3)), np.asarray(intransitive(seed=2))
    batch = all_pairs(reference, p)

    def gradient(params):
        return expected_gradient(nash_md(), params, batch, independent_weights(params, mixed(params, reference)))

    def of_tokens(logp, log_mu):
        """The mixture token by token, [4] nats, of log-probs [4] of the completions 00, 01, 10, 11."""
        joint = [x.reshape(2, 2) for x in (logp, log_mu)]
        first = [special.logsumexp(x, 1) for x in joint]
        second = [x - part[:, None] for x, part in zip(joint, first, strict=True)]
        steps = [special.log_softmax((1 - BETA) * a + BETA * b, -1) for a, b in (first, second)]
        return (steps[0][:, None] + steps[1]).reshape(4)

    got, log_mu = (np.asarray(sequence_logp(x)) for x in (descend(gradient, tabular(START), 2.0, 6000), reference))
    ends = []
    for mixture in (of_tokens, lambda logp, log_mu: special.log_softmax((1 - BETA) * logp + BETA * log_mu)):
        logp = log_mu
        for _ in range(300):
            logp = special.log_softmax(0.9 * logp + 0.1 * (log_mu + p @ np.exp(mixture(logp, log_mu)) / TAU))
        ends.append(logp)
    assert kl_to(ends[0], got) < 1e-12
    assert kl_to(ends[1], got) > 1e-5  # mixed over whole completions it would be another
    whole = special.log_softmax((1 - BETA) * ends[1] + BETA * log_mu)
    assert kl_to(nash_at(TAU / (1 - BETA), reference, p), whole) < 1e-12


# --- iterations: a batch is written by pi_t and fitted until nothing moves ---


def fit(objective, writer, reference, p, rounds):
    """The policy at which the expected loss over all groups that ``writer`` writes is stationary, by Newton's method,
    which starts at the writer."""
    batch = all_groups(reference, p, objective.responses, writer)
    weights = group_weights(*[writer] * objective.responses)
    start, unravel = ravel_pytree(writer)

    def gradient(flat):
        return ravel_pytree(expected_gradient(objective, unravel(flat), batch, weights))[0]

    def newton(_, flat):
        return flat - jnp.linalg.pinv(jax.jacobian(gradient)(flat), rtol=1e-10) @ gradient(flat)

    return unravel(jax.lax.fori_loop(0, rounds, newton, start))


def iterate(objective, reference, p, steps, rounds):
    """log-probs of the first policy and of those fitted to what the one before writes, [steps + 1, Y]."""

    def step(params, _):
        fitted = fit(objective, params, reference, p, rounds)
        return fitted, sequence_logp(fitted)

    _, passed = jax.jit(lambda start: jax.lax.scan(step, start, None, steps))(reference)
    return np.concatenate([sequence_logp(reference)[None], passed])


def tabular_steps(dynamic, game, steps):
    """The same, of a dynamic of games that starts at the reference."""
    policy, memory, passed = game.log_mu, dynamic.init_memory(game, game.log_mu), [game.log_mu[0]]
    for t in range(steps):
        wins = lambda opponent, call=0: games.win_probability(game, opponent)  # noqa: E731
        policy, memory = dynamic.update(wins, game, jnp.asarray(t), policy, memory)
        passed.append(policy[0])
    return np.stack(passed)


def test_inpo_steps_as_mirror_descent_and_ends_at_the_regularised_nash():
    reference = one_step(REFERENCE)
    passed = iterate(inpo(), reference, CYCLIC, 60, rounds=2)
    np.testing.assert_allclose(passed, tabular_steps(dynamics.omd(1 / ETA), game_of(reference), 60), atol=1e-9)
    assert kl_to(nash_at(TAU, reference), passed[-1]) < 1e-8 < 1e-3 < kl_to(nash_at(TAU, reference), passed[1])


def test_a_step_of_inpo_over_two_tokens_is_that_over_whole_completions():
    reference, p = tabular(REFERENCE), intransitive()
    passed = iterate(inpo(), reference, p, 3, rounds=6)
    np.testing.assert_allclose(passed, tabular_steps(dynamics.omd(1 / ETA), game_of(reference, p), 3), atol=1e-9)


@pytest.mark.parametrize("build", [inpo, sppo])
def test_more_responses_have_the_same_expected_gradient(build):
    params, reference, writer = one_step(START), one_step(REFERENCE), one_step(3)
    two, three = (
        expected_gradient(build(n), params, all_groups(reference, CYCLIC, n, writer), group_weights(*[writer] * n))
        for n in (2, 3)
    )
    assert relative_error(three, two) < 1e-12


def test_a_step_of_sppo_is_the_solution_of_its_equation_and_almost_one_of_multiplicative_weights():
    """log pi/pi_t + c pi/pi_t = eta (P(y > pi_t) - 1/2), with the c of a pi that sums to 1; the rest is eta cubed."""
    reference, apart = one_step(REFERENCE), []
    log_mu, p = np.asarray(sequence_logp(reference)), np.asarray(CYCLIC)
    for eta in (0.4, 0.2, 0.1):
        target = eta * (p @ np.exp(log_mu) - 0.5)

        def moved(c, target=target):
            return target - special.lambertw(c * np.exp(target)).real

        c = optimize.brentq(lambda c: np.exp(log_mu) @ np.exp(moved(c)) - 1, 0, 1, xtol=1e-15)
        got = iterate(sppo(eta=eta), reference, CYCLIC, 1, rounds=6)[1]
        np.testing.assert_allclose(got, log_mu + moved(c), atol=1e-9)
        assert c == pytest.approx(np.exp(log_mu) @ (log_mu - got), rel=1e-6)  # KL(pi_t, pi)
        step = tabular_steps(dynamics.multiplicative_weights(eta), game_of(reference), 1)[1]
        apart.append(np.abs(got - step).max())
    assert apart[0] / apart[1] == pytest.approx(8, rel=0.15) and apart[1] / apart[2] == pytest.approx(8, rel=0.1)


def test_the_average_of_sppo_s_policies_approaches_the_nash_and_the_last_one_does_not():
    eta, steps = 0.2, 400
    uniform = {"first": jnp.zeros(len(ACTIONS))}
    passed, game = iterate(sppo(eta=eta), uniform, CYCLIC, steps, rounds=4), game_of(uniform)

    def exploitability(policies):
        return float(games.exploitability(game, jnp.log(jnp.mean(jnp.exp(policies), 0))[None]))

    for count in (100, steps):
        bound = np.log(len(ACTIONS)) / (eta * count) + eta / 8  # that of multiplicative weights
        assert exploitability(passed[:count]) < bound
    assert exploitability(passed) < 0.3 * exploitability(passed[-1:])
    exact = tabular_steps(dynamics.multiplicative_weights(eta), game, 5)
    np.testing.assert_allclose(passed[:6], exact, atol=5e-3)


# --- extragradient steps ---


def test_the_gradient_against_an_opponent_is_the_tabular_step_up_to_a_factor():
    """y and y' uniform, y'' from a third policy: 4 / Y times the centred log pi/mu - P(y > pi'') / tau."""
    params, reference, third = one_step(START), one_step(REFERENCE), one_step(3)
    uniform = {"first": jnp.zeros(len(ACTIONS))}
    batch = all_groups(reference, CYCLIC, 3, third)
    got = expected_gradient(opponent(), params, batch, group_weights(uniform, uniform, third))["first"]
    ratio = np.asarray(sequence_logp(params) - sequence_logp(reference))
    error = ratio - np.asarray(CYCLIC) @ np.exp(sequence_logp(third)) / TAU
    np.testing.assert_allclose(got, 4 / len(ACTIONS) * (error - error.mean()), rtol=1e-12)


def test_egpo_is_the_tabular_extragradient_step_for_step_and_linear():
    """Through ``make_learn``: half points are the tabular ones too, and each is what writes the next batch."""
    reference, count, h, steps = one_step(REFERENCE), len(ACTIONS), 1 / (TAU + 3), 220
    game, batch = game_of(reference), all_pairs(reference, CYCLIC)
    responses = tuple(Response(r.completion, r.reference_logp, r.reference_logp) for r in batch.responses)

    def collect(params):
        """All pairs alike, and the win probabilities against ``params`` in the place of a drawn opponent's."""
        wins = CYCLIC @ jnp.exp(sequence_logp(params))
        sides = jnp.repeat(wins, count), jnp.tile(wins, count)
        matrix = jnp.full((count**2, 3, 3), 0.5).at[:, 0, 2].set(sides[0]).at[:, 1, 2].set(sides[1])
        return PreferenceBatch(batch.prompt, (*responses, responses[0]), matrix, None, ((0, 2), (1, 2)))

    optimizer = optax.sgd(h * TAU * count / 4)
    learn = make_learn(functools.partial(opponent(), policy=as_policy(log_prob)), optimizer, extragradient=True)

    @jax.jit
    def step(state):
        return learn(state, None, collect(state.params))[0]

    passed = [init_state(one_step(START), optimizer, jax.random.key(0), False, anchor=True)]
    for _ in range(2 * steps):
        passed.append(step(passed[-1]))
    logps = np.stack([sequence_logp(state.params) for state in passed])
    policy = logps[0][None]
    wins = lambda other, call=0: games.win_probability(game, other)  # noqa: E731
    for t in range(steps):
        centre = (1 - h * TAU) * policy + h * TAU * game.log_mu
        half = special.log_softmax(centre + h * wins(policy))
        np.testing.assert_allclose(logps[2 * t + 1], half[0], atol=1e-10)
        policy, _ = dynamics.egpo(h).update(wins, game, jnp.asarray(t), policy, ())
        np.testing.assert_allclose(logps[2 * t + 2], policy[0], atol=1e-10)
    want = nash_at(TAU, reference)
    kls = np.array([kl_to(want, logp) for logp in logps[::2]])
    assert np.all(kls <= kls[0] * (1 - h * TAU) ** np.arange(steps + 1) + 1e-15) and kls[-1] < 1e-8
