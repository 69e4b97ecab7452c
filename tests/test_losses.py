"""Losses on arrays: where they are stationary, what carries a gradient, and that padding changes nothing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from alignjax.errors import UserError

P = jnp.array([0.0, 0.3, 0.5, 0.9, 1.0])


def derivative(loss, first, p):
    """d loss / d first, [B], with the other response's log-ratio at 0.4."""
    return jax.grad(lambda x: jnp.sum(loss(x, jnp.full_like(x, 0.4), p)))(first)


def test_dpo_is_stationary_where_its_sigmoid_is_the_label():
    p, beta = P[1:4], 0.2
    loss = functools.partial(losses.dpo, beta=beta)
    d = jnp.log(p / (1 - p)) / beta
    np.testing.assert_allclose(derivative(loss, d + 0.4, p), 0, atol=1e-6)
    assert np.all(derivative(loss, d + 0.5, p) > 1e-4) and np.all(derivative(loss, d + 0.3, p) < -1e-4)
    np.testing.assert_allclose(loss(d + 0.4, 0.4, p), -(p * jnp.log(p) + (1 - p) * jnp.log(1 - p)), rtol=1e-5)


@pytest.mark.parametrize(("loss", "scale"), [(losses.ipo, 1.0), (losses.online_ipo, 0.3)])
def test_ipo_is_stationary_at_its_margin_and_tau_of_it_is_the_online_one(loss, scale):
    tau = 0.3
    d = (2 * P - 1) / (2 * tau)  # finite for sure labels too
    loss = functools.partial(loss, tau=tau)
    np.testing.assert_allclose(derivative(loss, d + 0.4, P), 0, atol=1e-6)
    np.testing.assert_allclose(derivative(loss, d + 1.4, P), 2 * scale, rtol=1e-5)
    square = (d + 1) ** 2 - (2 * P - 1) * (d + 1) / tau + 1 / (4 * tau**2)
    np.testing.assert_allclose(loss(d + 1.4, 0.4, P), scale * square, rtol=1e-5)


@pytest.mark.parametrize(
    "loss",
    [
        functools.partial(losses.dpo, beta=0.2),
        functools.partial(losses.ipo, tau=0.3),
        functools.partial(losses.online_ipo, tau=0.3),
        lambda first, second, p: losses.opponent_ipo(first, second, p, 1 - p, tau=0.3),
    ],
)
def test_a_pair_in_the_other_order_has_the_same_loss(loss):
    first, second = jnp.array([1.0, -2.0, 0.3, 0.0, 5.0]), jnp.array([0.5, 0.5, -1.0, 0.0, 4.0])
    np.testing.assert_allclose(loss(first, second, P), loss(second, first, 1 - P), rtol=1e-5)


def test_xpo_lowers_the_reference_s_response_by_alpha_whatever_its_label():
    first, second = jnp.array([1.0, -2.0, 0.3, 0.0, 5.0]), jnp.array([0.5, 0.5, -1.0, 0.0, 4.0])
    slopes = [
        jax.grad(lambda *x, f=loss: jnp.sum(f(*x, P, beta=0.2)), (0, 1))(first, second)
        for loss in (losses.dpo, functools.partial(losses.xpo, alpha=0.07))
    ]
    np.testing.assert_array_equal(slopes[1][0], slopes[0][0])
    np.testing.assert_allclose(slopes[1][1], slopes[0][1] + 0.07, rtol=1e-6)


def test_an_opponent_s_pair_has_the_margin_of_its_win_probabilities():
    """Minimal, and 0, at d = (p - p') / tau."""
    p, other, tau = jnp.array([0.9, 0.5, 0.1]), jnp.array([0.3, 0.5, 0.4]), 0.2
    loss = functools.partial(losses.opponent_ipo, p=p, other_p=other, tau=tau)
    d = jnp.array([3.0, 0.0, -1.5])
    np.testing.assert_allclose(loss(d + 0.4, jnp.full(3, 0.4)), 0, atol=1e-6)
    np.testing.assert_allclose(loss(d + 1.4, jnp.full(3, 0.4)), 1, rtol=1e-5)


MOVED = np.array([[0.3, -0.2, 0.5], [0.0, 1.0, -1.0]])
RATIO = np.array([[1.0, 0.4, -0.7], [0.2, 0.0, 0.6]])
GROUP = np.array(
    [[[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]], [[0.5, 0.0, 1.0], [1.0, 0.5, 0.6], [0.0, 0.4, 0.5]]]
)


def test_inpo_is_the_mean_square_over_pairs_written_out():
    """In log pi, log mu and log pi_t, each up to what cancels."""
    tau, eta, mu = 0.1, 0.25, np.array([[-1.0, -2.0, -0.5], [-3.0, -0.1, -2.0]])
    pi, pi_t, want = RATIO + mu, RATIO + mu - MOVED, np.zeros(2)
    for b in range(2):
        for i, j in ((0, 1), (0, 2), (1, 2)):
            d = (pi - tau / eta * mu - (eta - tau) / eta * pi_t)[b]
            squares = (d[i] - d[j] - 1 / (2 * eta)) ** 2, (d[i] - d[j] + 1 / (2 * eta)) ** 2
            want[b] += (GROUP[b, i, j] * squares[0] + GROUP[b, j, i] * squares[1]) / 3
    np.testing.assert_allclose(losses.inpo(MOVED, GROUP, RATIO, tau=tau, eta=eta), want, rtol=1e-5)


def test_sppo_is_the_mean_square_to_the_wins_over_the_others():
    eta, want = 0.7, np.zeros(2)
    for b in range(2):
        for k in range(3):
            wins = np.mean([GROUP[b, k, j] for j in range(3) if j != k])
            want[b] += (MOVED[b, k] - eta * (wins - 0.5)) ** 2 / 3
    np.testing.assert_allclose(losses.sppo(MOVED, GROUP, eta=eta), want, rtol=1e-5)


def test_reward_to_go_sums_this_token_and_later_ones():
    np.testing.assert_allclose(losses.reward_to_go(jnp.array([[1.0, 2.0, 4.0]])), [[7.0, 6.0, 4.0]])


def test_reinforce_weights_each_token_and_differentiates_log_probs_alone():
    logp, mask = jnp.array([[-1.0, -2.0, -3.0]]), jnp.array([[True, True, False]])

    def loss(logp, weight):
        return losses.reinforce(logp, weight * logp + 1.0, mask)[0]

    to_logp, to_weight = jax.grad(loss, (0, 1))(logp, 2.0)
    np.testing.assert_allclose(to_logp, [[1.0, 3.0, 0.0]])  # minus the advantage 2 logp + 1
    assert to_weight == 0


def test_the_gradient_of_each_token_is_the_gain_less_the_kl_from_there_on():
    logp, reference = (
        jnp.array([[-1.0, -2.0, -0.5], [-1.0, -1.5, 7.0]]),
        jnp.array([[-1.5, -1.0, -2.5], [-2.0, -1.0, 9.0]]),
    )
    mask, p, tau = jnp.array([[True, True, True], [True, True, False]]), jnp.array([0.9, 0.2]), 0.3
    gradient = jax.grad(lambda x: jnp.sum(losses.nash_md(x, reference, mask, p, tau=tau)))(logp)
    to_go = np.array([[0.5 - 1.0 + 2.0, -1.0 + 2.0, 2.0], [1.0 - 0.5, -0.5, 0.0]])
    want = -(np.array([[0.4], [-0.3]]) - tau * to_go) * np.asarray(mask)
    np.testing.assert_allclose(gradient, want, rtol=1e-5)
    gain = jax.grad(lambda x: jnp.sum(losses.regularized_policy_gradient(x, reference, mask, p - 0.5, tau=tau)))(logp)
    np.testing.assert_array_equal(gain, gradient)


@pytest.mark.parametrize("loss", [losses.nash_md, losses.regularized_policy_gradient])
def test_padding_and_its_log_probs_change_nothing(loss):
    logp, reference = jnp.array([[-1.0, -2.0], [-3.0, -0.5]]), jnp.array([[-1.5, -1.0], [-2.0, -2.5]])
    mask, gain = jnp.array([[True, True], [True, False]]), jnp.array([0.9, 0.2])

    def wide(x, filler):
        return jnp.pad(x, ((0, 0), (0, 3)), constant_values=filler)

    short = loss(logp, reference, mask, gain, tau=0.3)
    np.testing.assert_allclose(loss(wide(logp, 5.0), wide(reference, -3.0), wide(mask, False), gain, tau=0.3), short)
    moved = reference.at[1, 1].set(np.nan)
    np.testing.assert_array_equal(loss(logp, moved, mask, gain, tau=0.3), short)


def test_preference_cross_entropy_is_minimal_at_the_label():
    """Against soft labels p the best logit is log p / (1 - p), and the loss there is the entropy."""
    p = jnp.array([0.3, 0.8])
    best = jnp.log(p / (1 - p))
    slope = jax.grad(lambda z: jnp.sum(losses.preference_cross_entropy(z, p)))
    np.testing.assert_allclose(slope(best), 0, atol=1e-6)
    np.testing.assert_allclose(slope(jnp.zeros(2)), 0.5 - p, rtol=1e-6)
    entropy = -(p * np.log(p) + (1 - p) * np.log(1 - p))
    np.testing.assert_allclose(losses.preference_cross_entropy(best, p), entropy, rtol=1e-6)


def test_next_token_is_the_mean_over_real_tokens():
    logp = jnp.array([[-1.0, -2.0, -50.0], [-3.0, -50.0, -50.0]])
    mask = jnp.array([[True, True, False], [True, False, False]])
    assert losses.next_token(logp, mask) == 2.0
    assert losses.sequence_sum(jnp.where(mask, logp, jnp.nan), mask).tolist() == [-3.0, -3.0]


def test_weights_out_of_range_are_refused():
    zeros = jnp.zeros((1, 1))
    for loss in (losses.nash_md, losses.regularized_policy_gradient):
        for tau in (-1, float("nan"), float("inf")):
            with pytest.raises(UserError, match=f"tau={tau} must be finite and not negative"):
                loss(zeros, zeros, zeros > 0, zeros[0], tau=tau)
    for weight in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"beta={weight} must be finite and positive"):
            losses.dpo(zeros[0], zeros[0], zeros[0], beta=weight)
        for loss in (losses.ipo, losses.online_ipo):
            with pytest.raises(UserError, match=f"tau={weight} must be finite and positive"):
                loss(zeros[0], zeros[0], zeros[0], tau=weight)
        with pytest.raises(UserError, match=f"tau={weight} must be finite and positive"):
            losses.opponent_ipo(zeros[0], zeros[0], zeros[0], zeros[0], tau=weight)
        with pytest.raises(UserError, match=f"eta={weight} must be finite and positive"):
            losses.inpo(zeros, zeros[None], zeros, tau=0.1, eta=weight)
        with pytest.raises(UserError, match=f"eta={weight} must be finite and positive"):
            losses.sppo(zeros, zeros[None], eta=weight)
    for weight in (-1.0, float("nan"), float("inf")):
        with pytest.raises(UserError, match=f"alpha={weight} must be finite and not negative"):
            losses.xpo(zeros[0], zeros[0], zeros[0], beta=0.1, alpha=weight)
        with pytest.raises(UserError, match=f"tau={weight} must be in"):
            losses.inpo(zeros, zeros[None], zeros, tau=weight, eta=0.1)
    with pytest.raises(UserError, match=r"tau=0.2 must be in \[0, eta=0.1\]"):
        losses.inpo(zeros, zeros[None], zeros, tau=0.2, eta=0.1)
