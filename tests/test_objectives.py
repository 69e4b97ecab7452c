"""Objectives against exact gradients and stationary points, by enumeration of worlds of a few completions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax import losses
from alignjax.errors import UserError
from alignjax.games import game as games
from alignjax.games import solve
from alignjax.objectives import DirectAlignment, PreferenceGradient, RewardGradient, preference_loss, score_responses
from alignjax.types import Completion, PreferenceBatch, Prompt, Response, pair_batch
from tests.conftest import ragged
from tests.enumerated import (
    ACTIONS,
    COMPLETIONS,
    TAU,
    all_pairs,
    as_batch,
    as_policy,
    bradley_terry,
    descend,
    expected_gradient,
    independent_weights,
    intransitive,
    log_prob,
    one_step,
    relative_error,
    sequence_logp,
    step_mixture,
    table_of,
    tabular,
)

REWARDS = (0.3, -1.2, 2.0, 0.4)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def nash_md(tau=TAU):
    return PreferenceGradient(functools.partial(losses.nash_md, tau=tau))


def online_ipo(tau=TAU):
    return DirectAlignment(functools.partial(losses.online_ipo, tau=tau))


def reward_gradient(tau=TAU, bound=10.0):
    return RewardGradient(functools.partial(losses.regularized_policy_gradient, tau=tau), bound)


def negative(tree):
    return jax.tree.map(jnp.negative, tree)


def exact_gradient(params, reference, opponent):
    """d/d theta of P(pi > pi') - tau KL(pi, mu), pi' held fixed, summed over all completions."""

    def value(theta):
        logp, reference_logp = sequence_logp(theta), sequence_logp(reference)
        payoff = intransitive() @ jnp.exp(sequence_logp(opponent))
        return jnp.sum(jnp.exp(logp) * (payoff - TAU * (logp - reference_logp)))

    return jax.grad(value)(params)


# --- gradients of policy gradients ---


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_the_expected_gradient_of_nash_md_is_the_exact_one(beta):
    params, reference = tabular(1), tabular(2)
    opponent = step_mixture(params, reference, beta)
    batch = all_pairs(reference, intransitive())
    got = expected_gradient(nash_md(), params, batch, independent_weights(params, opponent))
    assert relative_error(negative(got), exact_gradient(params, reference, opponent)) < 1e-12


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_expected_gradient_of_a_reward_is_the_exact_one_for_every_baseline(beta):
    rewards, params, reference = jnp.asarray(REWARDS), tabular(1), tabular(2)

    def value(theta):
        logp = sequence_logp(theta)
        return jnp.sum(jnp.exp(logp) * (rewards - TAU * (logp - sequence_logp(reference))))

    batch = all_pairs(reference, bradley_terry(rewards), rewards)
    weights = independent_weights(params, step_mixture(params, reference, beta))
    for bound, low, high in ((10.0, 0.0, 1e-12), (1.0, 0.01, 9.0)):  # a bound that cuts is another objective
        got = expected_gradient(reward_gradient(bound=bound), params, batch, weights)
        assert low <= relative_error(negative(got), jax.grad(value)(params)) < high


def test_a_response_that_loses_outright_has_the_bound_for_a_penalty():
    prompt, completion = as_batch(COMPLETIONS)
    response = Response(completion, reference_logp=log_prob(tabular(2), prompt, completion))

    def gradient(rewards, valid):
        responses = tuple(
            dataclasses.replace(response, valid=jnp.asarray(column)) for column in zip(*valid, strict=True)
        )
        batch = PreferenceBatch(prompt, responses, jnp.full((4, 2, 2), 0.5), jnp.asarray(rewards))
        loss = reward_gradient(tau=0.0, bound=2.0)
        return jax.grad(lambda w: loss(w, batch, None, policy=as_policy(log_prob))[0])(tabular(1))

    outright = gradient(
        [[1.5, 9.0], [9.0, 0.7], [3.0, 9.0], [1.0, 0.0]], [(True, False), (False, True), (False, False), (True, True)]
    )
    inside = gradient([[2.0, 0.0], [-1.0, 1.0], [3.0, 3.0], [1.0, 0.0]], [(True, True)] * 4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), outright, inside)


def test_same_token_kl_would_be_a_wrong_gradient():
    """The well-scored_responses fault: each token answers for its own KL term alone."""

    def same_token(logp, reference_logp, mask, preference):
        ratio = jax.lax.stop_gradient(logp) - reference_logp
        return -jnp.sum(logp * (preference[:, None] - 0.5 - TAU * ratio), -1)

    params, reference = tabular(1), tabular(2)
    opponent = step_mixture(params, reference, 0.25)
    batch, weights = all_pairs(reference, intransitive()), independent_weights(params, opponent)
    got = expected_gradient(PreferenceGradient(same_token), params, batch, weights)
    assert relative_error(negative(got), exact_gradient(params, reference, opponent)) > 0.05


def test_a_tie_at_the_reference_has_no_gradient_at_all():
    """1/2 is the baseline: a sample with p = 1/2 moves nothing where policy and reference agree, to the bit."""
    params = tabular(1)
    tie, win = (all_pairs(params, jnp.full((4, 4), p)) for p in (0.5, 0.75))
    for row in range(16):
        weights = jnp.zeros(16).at[row].set(1.0)
        assert optax.tree.norm(expected_gradient(nash_md(), params, tie, weights)) == 0
        assert optax.tree.norm(expected_gradient(nash_md(), params, win, weights)) > 0.05


# --- stationary points ---


def regularised_nash(p, reference, tau):
    """The Nash policy of the regularised game over all completions, [Y], by the games' solver."""
    game = games.from_matrix(np.asarray(p), np.exp(sequence_logp(reference)), tau)
    return solve.regularised_nash(game).policy[0]


def test_following_the_expected_gradient_of_self_play_leads_to_the_regularised_nash():
    """pi* proportional to mu exp(P(y > pi*) / tau)."""
    reference, p = tabular(2), intransitive()
    batch = all_pairs(reference, p)
    solution = descend(lambda w: expected_gradient(nash_md(), w, batch, independent_weights(w, w)), reference, 2.0)
    pi = jnp.exp(sequence_logp(solution))
    fixed = jnp.exp(sequence_logp(reference) + p @ pi / TAU)
    np.testing.assert_allclose(pi, fixed / fixed.sum(), atol=1e-10)
    np.testing.assert_allclose(pi, regularised_nash(p, reference, TAU), atol=1e-10)


@pytest.mark.parametrize("seed", [5, 6])
def test_dpo_is_stationary_at_the_tilted_reference_whatever_pairs_it_is_given(seed):
    """pi proportional to mu exp(r / beta), for Bradley-Terry preferences and every full-support weight of pairs."""
    beta, rewards, reference = 0.5, jnp.asarray(REWARDS), tabular(2)
    weights = jax.nn.softmax(jax.random.normal(jax.random.key(seed), (16,)))
    objective = DirectAlignment(functools.partial(losses.dpo, beta=beta))
    batch = all_pairs(reference, bradley_terry(rewards))
    want = jax.nn.log_softmax(sequence_logp(reference) + rewards / beta)
    gradient = expected_gradient(objective, table_of(want), batch, weights)
    assert optax.tree.norm(gradient) < 1e-14
    assert optax.tree.norm(expected_gradient(objective, reference, batch, weights)) > 1e-2
    solution = descend(lambda w: expected_gradient(objective, w, batch, weights), tabular(3), 20.0)
    np.testing.assert_allclose(sequence_logp(solution), want, atol=1e-8)


def test_the_gradient_of_online_ipo_is_four_times_that_of_self_play():
    params, reference = tabular(1), tabular(2)
    batch, weights = all_pairs(reference, intransitive()), independent_weights(params, params)
    ipo = expected_gradient(online_ipo(), params, batch, weights)
    self_play = expected_gradient(nash_md(), params, batch, weights)
    assert relative_error(ipo, jax.tree.map(lambda g: 4 * g, self_play)) < 1e-12
    off_policy = expected_gradient(online_ipo(), params, batch, independent_weights(reference, reference))
    assert relative_error(off_policy, ipo) > 0.05


def test_following_online_ipo_leads_to_the_regularised_nash():
    reference, p = tabular(2), intransitive()
    batch = all_pairs(reference, p)
    solution = descend(lambda w: expected_gradient(online_ipo(), w, batch, independent_weights(w, w)), tabular(1), 0.5)
    np.testing.assert_allclose(jnp.exp(sequence_logp(solution)), regularised_nash(p, reference, TAU), atol=1e-10)


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.6])
def test_ipo_md_and_nash_md_end_where_the_mixture_is_the_nash_at_a_higher_temperature(beta):
    """tau / (1 - beta), in a world of one step: there the mixture of tokens is that of whole completions."""
    reference, p = one_step(2), intransitive(len(ACTIONS))
    batch = all_pairs(reference, p)

    def ipo_md(params):
        mixed = step_mixture(params, reference, beta)
        return expected_gradient(online_ipo(), params, batch, independent_weights(mixed, mixed))

    def policy_gradient(params):
        mixed = step_mixture(params, reference, beta)
        return expected_gradient(nash_md(), params, batch, independent_weights(params, mixed))

    ends = [descend(gradient, one_step(1), rate) for gradient, rate in ((ipo_md, 0.5), (policy_gradient, 2.0))]
    want = regularised_nash(p, reference, TAU / (1 - beta))
    for params in ends:
        mixed = jnp.exp(sequence_logp(step_mixture(params, reference, beta)))
        np.testing.assert_allclose(mixed, want, atol=1e-9)
    np.testing.assert_allclose(*map(sequence_logp, ends), atol=1e-8)
    if beta:
        assert np.abs(want - regularised_nash(p, reference, TAU)).max() > 0.01


# --- what objectives hand to their losses ---


def test_padding_and_its_log_probs_change_nothing():
    """The padding of the two responses holds different numbers, which would not cancel."""
    params, reference = tabular(1), tabular(2)
    prompt, first = as_batch(COMPLETIONS)
    second = Completion(first.tokens[::-1], first.mask)
    p = jnp.array([0.2, 0.9, 0.5, 0.6])
    matrix, reward = pair_batch(prompt, Response(first), Response(second), p).preference, jnp.stack([p, 1 - p], 1)

    def pad(x, filler):
        return jnp.pad(x, ((0, 0), (0, 3)), constant_values=filler)

    def padded_log_prob(params, prompt, completion):
        return pad(log_prob(params, prompt, Completion(completion.tokens[:, :2], completion.mask[:, :2])), 5.0)

    logps = [log_prob(reference, prompt, side) for side in (first, second)]
    tight = [Response(side, reference_logp=logp) for side, logp in zip((first, second), logps, strict=True)]
    loose = [
        Response(Completion(pad(side.tokens, 0), pad(side.mask, False)), reference_logp=pad(logp, filler))
        for side, logp, filler in zip((first, second), logps, (-3.0, -7.0), strict=True)
    ]
    for objective in (nash_md(), online_ipo(), reward_gradient()):

        def value(score, responses, objective=objective):
            batch = PreferenceBatch(prompt, tuple(responses), matrix, reward)
            return jax.value_and_grad(lambda w: objective(w, batch, None, policy=as_policy(score)), has_aux=True)(
                params
            )

        pair = value(log_prob, tight), value(padded_log_prob, loose)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-15), *pair)


@pytest.mark.parametrize(("build", "scored"), [(nash_md, 1), (reward_gradient, 1), (online_ipo, 2)])
def test_a_response_is_scored_only_where_the_loss_reads_it_and_all_in_one_pass(build, scored):
    """A response that the objective does not list has no reference log-probs, and is not missed."""
    objective, params, reference = build(), tabular(1), tabular(2)
    batch = all_pairs(reference, intransitive(), jnp.asarray(REWARDS))
    assert objective.scored == tuple(range(scored))
    rows = []

    def counting(params, prompt, completion):
        rows.append(len(completion.tokens))
        return log_prob(params, prompt, completion)

    scored_responses = tuple(r if k < scored else Response(r.completion) for k, r in enumerate(batch.responses))
    lean = PreferenceBatch(batch.prompt, scored_responses, batch.preference, batch.reward)
    loss, _ = objective(params, lean, None, policy=as_policy(counting))
    assert rows == [16 * scored]
    assert loss == objective(params, batch, None, policy=as_policy(log_prob))[0]
    unscored = PreferenceBatch(
        batch.prompt, tuple(Response(r.completion) for r in scored_responses), batch.preference, batch.reward
    )
    with pytest.raises(ValueError, match="no reference log-probs"):
        objective(params, unscored, None, policy=as_policy(log_prob))


def test_responses_scored_together_have_their_own_log_probs():
    params, batch = tabular(1), all_pairs(tabular(2), intransitive())
    for numbers in ((0, 1), (1, 0), (1,)):
        for k, logp in zip(numbers, score_responses(log_prob, params, batch, numbers), strict=True):
            np.testing.assert_array_equal(logp, log_prob(params, batch.prompt, batch.responses[k].completion))


def test_the_opponent_s_tokens_do_not_enter_a_policy_gradient():
    params, batch = tabular(1), all_pairs(tabular(2), intransitive(), jnp.asarray(REWARDS))
    for objective in (nash_md(), reward_gradient()):
        other = Response(Completion(jnp.zeros((16, 2), jnp.int32), jnp.zeros((16, 2), bool)))
        changed = PreferenceBatch(batch.prompt, (batch.responses[0], other), batch.preference, batch.reward)
        gradients = [
            jax.grad(lambda w, b=b, f=objective: f(w, b, None, policy=as_policy(log_prob))[0])(params)
            for b in (batch, changed)
        ]
        jax.tree.map(np.testing.assert_array_equal, *gradients)


def test_metrics_are_what_their_meanings_say():
    """The preference, margins, accuracies, KL and lengths of four pairs, written out."""
    params, reference = tabular(1), tabular(2)
    prompt, first = as_batch(COMPLETIONS)
    second = Completion(first.tokens[::-1], first.mask)
    responses = tuple(Response(side, reference_logp=log_prob(reference, prompt, side)) for side in (first, second))
    p, reward = jnp.array([0.9, 0.2, 0.5, 0.6]), jnp.array([[3.0, 0.0], [0.0, 0.5], [1.0, 1.0], [0.0, -9.0]])
    batch = pair_batch(prompt, *responses, p)
    batch = PreferenceBatch(prompt, responses, batch.preference, reward)
    ratio = np.asarray(sequence_logp(params) - sequence_logp(reference))
    margin, sign = ratio - ratio[::-1], np.array([1, -1, 0, 1])  # response 1 has the reversed order
    common = {"kl": np.mean(ratio), "length": 2.0}
    accuracy = {"accuracy": np.mean(0.5 + 0.5 * np.sign(sign * margin)), "log_ratio_margin": np.mean(sign * margin)}
    clipped = {"preference": 0.55, "margin": (1.0 - 0.5 + 0.0 + 1.0) / 4}
    cases = (nash_md(), {"preference": 0.55}), (reward_gradient(bound=1.0), clipped), (online_ipo(), accuracy)
    for objective, want in cases:
        loss, metrics = objective(params, batch, None, policy=as_policy(log_prob))
        assert metrics.keys() == objective.meanings.keys()
        assert metrics.pop("loss", loss) == loss
        assert {name: float(value) for name, value in metrics.items()} == pytest.approx({**want, **common}, rel=1e-6)


def test_a_preference_model_learns_the_mean_loss_of_its_logits():
    p = jnp.array([0.3, 0.3, 0.8, 0.5])
    sides = [ragged([[1, 2]] * 4), ragged([[3]] * 4)]
    batch = pair_batch(Prompt(np.zeros((4, 1), np.int32), np.ones((4, 1), bool)), *map(Response, sides), p)

    def value(logits):
        def logit(params, prompt, first, second):
            assert prompt is batch.prompt and first is sides[0] and second is sides[1]
            return jnp.asarray(logits)

        return preference_loss({}, batch, None, loss=losses.preference_cross_entropy, logit=logit)

    loss, metrics = value(jnp.log(p / (1 - p)))
    np.testing.assert_allclose(loss, -np.mean(p * np.log(p) + (1 - p) * np.log(1 - p)), rtol=1e-6)
    assert metrics["loss"] == loss
    assert metrics["accuracy"] == (1 + 1 + 1 + 0.5) / 4
    assert value([1.0, -1.0, 0.0, 2.0])[1]["accuracy"] == (0 + 1 + 0.5 + 0.5) / 4


def test_settings_out_of_range_are_refused():
    batch = all_pairs(tabular(2), intransitive())
    with pytest.raises(UserError, match="tau=-1 must be finite and not negative"):
        nash_md(tau=-1)(tabular(1), batch, None, policy=as_policy(log_prob))
    for bound in (0.0, -1.0, float("nan")):
        with pytest.raises(UserError, match=r"RewardGradient\.bound"):
            reward_gradient(bound=bound)
    with pytest.raises(ValueError, match="no rewards"):
        reward_gradient()(tabular(1), batch, None, policy=as_policy(log_prob))
