"""Nash-MD-PG against the exact gradient, by enumeration of a world of two tokens and two steps."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax import objectives
from alignjax.errors import UserError
from alignjax.sampling import samplers as rollout
from alignjax.types import Completion, Pair, Prompt, Rollout

COMPLETIONS = np.array(list(itertools.product((0, 1), repeat=2)), np.int32)  # [4, 2]
TAU = 0.3


def log_prob(params, prompt, completion):
    """A tabular policy: logits of the first token, and of the second given the first."""
    first = jax.nn.log_softmax(params["first"])[completion.tokens[:, 0]]
    second = jax.nn.log_softmax(params["second"])[completion.tokens[:, 0], completion.tokens[:, 1]]
    return jnp.where(completion.mask, jnp.stack([first, second], 1), 0.0)


def tabular(seed):
    a, b = jax.random.split(jax.random.key(seed))
    return {"first": jax.random.normal(a, (2,)), "second": jax.random.normal(b, (2, 2))}


def everything(rows=COMPLETIONS):
    ones = np.ones((len(rows), 1))
    return Prompt(np.int32(ones), ones > 0), Completion(rows, np.ones(rows.shape, bool))


def sequence_logp(params):
    return log_prob(params, *everything()).sum(1)  # [4]


def preference():
    """An intransitive matrix P[y, y'] = 1 - P[y', y]."""
    scores = np.random.default_rng(0).normal(size=(4, 4)) * 2
    return jax.nn.sigmoid(jnp.asarray(scores - scores.T))


def step_mixture(params, reference, beta):
    """The one-step-at-a-time mixture as a tabular policy: logits mixed at every prefix."""
    return jax.tree.map(
        lambda a, b: (1 - beta) * jax.nn.log_softmax(a) + beta * jax.nn.log_softmax(b), params, reference
    )


def exact_gradient(params, reference, opponent):
    """d/d theta of P(pi > pi') - tau KL(pi, mu), pi' held fixed, summed over all completions."""

    def value(theta):
        logp, ref = sequence_logp(theta), sequence_logp(reference)
        payoff = preference() @ jnp.exp(sequence_logp(opponent))
        return jnp.sum(jnp.exp(logp) * (payoff - TAU * (logp - ref)))

    return jax.grad(value)(params)


def expected_gradient(objective, params, reference, opponent):
    """Minus the objective's gradient, averaged over every y ~ pi and y' ~ pi' with its exact weight."""
    weights = jnp.exp(sequence_logp(params))[:, None] * jnp.exp(sequence_logp(opponent))[None]

    def one(y, other):
        prompt, completion = everything(COMPLETIONS[y][None])
        ref = log_prob(reference, prompt, completion)
        seen = Rollout(prompt, completion, completion, preference()[y, other][None], ref)
        return jax.grad(lambda p: objective(p, seen, None, log_prob=log_prob, tau=TAU)[0])(params)

    total = jax.tree.map(jnp.zeros_like, params)
    for y, other in itertools.product(range(4), repeat=2):
        total = jax.tree.map(lambda t, g, w=weights[y, other]: t - w * g, total, one(y, other))
    return total


def relative_error(a, b):
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, a, b))
    return float(difference / optax.tree.norm(b))


@pytest.mark.parametrize("beta", [0.0, 0.25, 1.0])
def test_expected_gradient_is_the_exact_one(beta):
    params, reference = tabular(1), tabular(2)
    opponent = step_mixture(params, reference, beta)
    got = expected_gradient(objectives.nash_md, params, reference, opponent)
    assert relative_error(got, exact_gradient(params, reference, opponent)) < 1e-5


@pytest.mark.parametrize("beta", [0.0, 1.0])
def test_the_expected_gradient_of_a_reward_is_the_exact_one_whoever_the_baseline(beta, monkeypatch):
    rewards = jnp.asarray([0.3, -1.2, 2.0, 0.4])
    monkeypatch.setitem(globals(), "preference", lambda: jax.nn.sigmoid(rewards[:, None] - rewards[None]))
    params, reference = tabular(1), tabular(2)

    def value(theta):
        logp = sequence_logp(theta)
        return jnp.sum(jnp.exp(logp) * (rewards - TAU * (logp - sequence_logp(reference))))

    for bound, low, high in ((10.0, 0.0, 1e-5), (1.0, 0.01, 9.0)):  # a bound that cuts is another objective
        objective = functools.partial(objectives.policy_gradient, bound=bound)
        got = expected_gradient(objective, params, reference, step_mixture(params, reference, beta))
        assert low <= relative_error(got, jax.grad(value)(params)) < high


def test_a_reply_that_loses_outright_has_the_bound_for_a_penalty():
    prompt, completion = everything()
    ref = log_prob(tabular(2), prompt, completion)

    def gradient(p):
        seen = Rollout(prompt, completion, completion, jnp.asarray(p), ref)
        return jax.grad(lambda w: objectives.policy_gradient(w, seen, None, log_prob=log_prob, tau=0.0, bound=2.0)[0])(
            tabular(1)
        )

    inside = jax.nn.sigmoid(jnp.asarray([2.0, -2.0, 0.0, 1.0]))
    sure = gradient([1.0, 0.0, 0.5, float(inside[3])])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), sure, gradient(inside))


def test_same_token_kl_would_be_a_wrong_gradient():
    """The well-known fault: each token answers for its own KL term alone."""

    def same_token(params, rollout, key, *, log_prob, tau):
        logp = log_prob(params, rollout.prompt, rollout.y)
        ratio = jax.lax.stop_gradient(logp) - rollout.ref_logp
        return -jnp.mean(jnp.sum(logp * (rollout.p[:, None] - 0.5 - tau * ratio), -1)), {}

    params, reference = tabular(1), tabular(2)
    opponent = step_mixture(params, reference, 0.25)
    assert relative_error(
        expected_gradient(same_token, params, reference, opponent), exact_gradient(params, reference, opponent)
    ) > 0.05  # fmt: skip


def test_exact_gradient_ascent_reaches_the_nash_of_its_own_fixed_point():
    """Following the expected gradient in self-play, pi* proportional to mu exp(P(y > pi*) / tau)."""
    reference, table = tabular(2), preference()
    params = reference
    ascend = jax.jit(lambda p: jax.tree.map(lambda x, g: x + 2.0 * g, p, exact_gradient(p, reference, p)))
    for _ in range(3000):
        params = ascend(params)
    pi = np.exp(sequence_logp(params))
    nash = np.exp(sequence_logp(reference) + table @ pi / TAU)
    np.testing.assert_allclose(pi, nash / nash.sum(), atol=1e-4)


def test_reward_to_go_sums_what_is_to_come():
    np.testing.assert_allclose(objectives.reward_to_go(jnp.array([[1.0, 2.0, 4.0]])), [[7.0, 6.0, 4.0]])


def test_padding_and_its_log_probs_change_nothing():
    params, reference = tabular(1), tabular(2)
    prompt, completion = everything()
    padded = Completion(np.pad(COMPLETIONS, ((0, 0), (0, 3))), np.pad(completion.mask, ((0, 0), (0, 3))))

    def wide(params, prompt, completion):
        short = Completion(completion.tokens[:, :2], completion.mask[:, :2])
        return jnp.pad(log_prob(params, prompt, short), ((0, 0), (0, 3)), constant_values=5.0)

    p = jnp.array([0.2, 0.9, 0.5, 0.6])
    ref = log_prob(reference, prompt, completion)
    a = Rollout(prompt, completion, completion, p, ref)
    b = Rollout(prompt, padded, padded, p, jnp.pad(ref, ((0, 0), (0, 3)), constant_values=-3.0))
    one = jax.value_and_grad(lambda w: objectives.nash_md(w, a, None, log_prob=log_prob, tau=TAU)[0])(params)
    two = jax.value_and_grad(lambda w: objectives.nash_md(w, b, None, log_prob=wide, tau=TAU)[0])(params)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), one, two)


def test_preference_cross_entropy_is_minimal_at_the_label():
    """Against soft labels p the best constant logit is log p / (1 - p), and the loss there is the entropy."""
    p = jnp.array([0.3, 0.3])
    pair = Pair(None, None, None, p)
    loss = jax.grad(
        lambda z: objectives.preference_cross_entropy({}, pair, None, logit=lambda *_: jnp.stack([z, z]))[0]
    )
    assert abs(loss(jnp.log(0.3 / 0.7))) < 1e-6
    value, metrics = objectives.preference_cross_entropy({}, pair, None, logit=lambda *_: jnp.log(p / (1 - p)))
    np.testing.assert_allclose(value, -(0.3 * np.log(0.3) + 0.7 * np.log(0.7)), rtol=1e-6)
    assert metrics["accuracy"] == 1.0


def test_next_token_is_the_mean_over_real_tokens():
    logp = jnp.array([[-1.0, -2.0, -50.0], [-3.0, -50.0, -50.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    assert objectives.next_token(logp, mask)[0] == 2.0


def test_a_negative_tau_and_a_beta_that_is_no_weight_are_refused():
    with pytest.raises(UserError, match="tau=-1 must not be negative"):
        objectives.nash_md({}, None, None, log_prob=None, tau=-1)
    for tau, bound in ((-1, 1.0), (0.1, 0.0)):
        with pytest.raises(UserError, match="must not be negative, and bound"):
            objectives.policy_gradient({}, None, None, log_prob=None, tau=tau, bound=bound)
    for beta in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="is no weight of the reference"):
            rollout.mixture(lambda params: None, {}, {}, {}, beta=beta)
