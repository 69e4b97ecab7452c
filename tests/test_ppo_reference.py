"""The NumPy reference of PPO against the mathematics: expectations by enumeration, differences, loops, a golden."""

import dataclasses
import itertools

import jax
import numpy as np
import optax
import pytest

from tests import ppo_presets as presets
from tests import ppo_reference as ppo
from tests.ppo_presets import ALPACAFARM, DEFAULT, OPENAI_2019, PRESETS, TLDR_DETAILS

EVERY = pytest.mark.parametrize("settings", [pytest.param(s, id=name) for name, s in PRESETS.items()])
MASK = np.arange(5) < np.array([[3], [5], [1]])


def fast(settings, **changes):
    """The settings with a learning rate at which ratios and values leave their clips within a step."""
    return dataclasses.replace(settings, learning_rate=0.2, **changes)


def unwhitened(x, mask, keep_mean):
    """No whitening."""
    return x


def softmax(logits):
    """Probabilities over the last axis."""
    e = np.exp(logits - logits.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def differences(function, point, step=1e-6):
    """The gradient of function(point) by central differences."""
    gradient = np.zeros_like(point)
    for i in np.ndindex(point.shape):
        up, down = point.copy(), point.copy()
        up[i] += step
        down[i] -= step
        gradient[i] = (function(up) - function(down)) / (2 * step)
    return gradient


def test_expectations_of_the_kl_estimators_by_enumeration():
    random = np.random.RandomState(0)
    pi, mu = softmax(random.randn(2, 6))
    log_ratio, kl = np.log(pi / mu), np.sum(pi * np.log(pi / mu))
    np.testing.assert_allclose(np.sum(pi * presets.k1(log_ratio)), kl, rtol=1e-12)
    np.testing.assert_allclose(np.sum(pi * presets.k3(log_ratio)), kl, rtol=1e-12)
    assert presets.k3(log_ratio).min() >= 0 and np.any(presets.k1(log_ratio) < 0)
    bias = np.sum(pi * presets.clamped(log_ratio)) - kl
    np.testing.assert_allclose(bias, np.sum(pi * np.maximum(-log_ratio, 0)), rtol=1e-12)
    assert bias > 0.05


def test_k2_is_the_kl_to_second_order():
    random = np.random.RandomState(0)
    logits, change = random.randn(2, 6)
    errors = []
    for scale in (1e-2, 1e-3):
        pi, mu = softmax(logits), softmax(logits + scale * change)
        log_ratio = np.log(pi / mu)
        errors.append(abs(np.sum(pi * presets.k2(log_ratio)) / np.sum(pi * log_ratio) - 1))
    assert errors[0] < 2e-2 and errors[1] < errors[0] / 8


@pytest.mark.parametrize(
    ("settings", "rewards"),
    [
        (OPENAI_2019, [[-0.1, 0.1, -0.2, -0.2, 6.8], [-0.1, 0.1, -0.2, -0.2, -1.2], [-0.1, 0.1, -0.2, -0.2, 8.8]]),
        (TLDR_DETAILS, [[-0.1, 0.1, -0.2, 7, 0], [-0.1, 0.1, -0.2, -0.2, -1.2], [-0.1, 9, 0, 0, 0]]),
        (ALPACAFARM, [[-0.1, 0, 6.8, 0, 0], [-0.1, 0, -0.2, -0.2, -1.2], [8.9, 0, 0, 0, 0]]),
        (DEFAULT, [[-0.1, 0.1, 6.8, 0, 0], [-0.1, 0.1, -0.2, -0.2, -1.2], [8.9, 0, 0, 0, 0]]),
    ],
)
def test_rewards_of_three_replies_by_hand(settings, rewards):
    log_ratio = np.where(settings.scored(MASK), np.array([1.0, -1.0, 2.0, 2.0, 2.0]), 0)
    rollout = ppo.Rollout(np.zeros((3, 5), int), MASK, np.array([7.0, 8.0, 9.0]), np.array([True, False, True]))
    _, found = ppo.token_rewards(settings, 0.1, log_ratio, rollout)
    np.testing.assert_allclose(found, rewards, atol=1e-12)


def test_a_penalty_can_be_added_instead_and_left_out():
    rollout = ppo.Rollout(np.zeros((2, 1), int), np.ones((2, 1), bool), np.array([7.0, 8.0]), np.array([True, False]))
    for settings, scores in (
        (dataclasses.replace(DEFAULT, unfinished=presets.added), [7, 7]),
        (dataclasses.replace(DEFAULT, penalty=None), [7, 8]),
    ):
        _, found = ppo.token_rewards(settings, 0.1, np.zeros((2, 1)), rollout)
        np.testing.assert_allclose(found[:, 0], scores)


def test_whitening_over_the_real_tokens():
    x = np.random.RandomState(0).randn(3, 5) * 3 + 5
    for whiten in (presets.whiten_by_variance, presets.whiten_by_deviation):
        for keep_mean in (False, True):
            y = whiten(x, MASK, keep_mean)[MASK]
            np.testing.assert_allclose([y.mean(), y.std()], [x[MASK].mean() * keep_mean, 1], atol=1e-7)
        np.testing.assert_allclose(whiten(x, np.ones_like(MASK), False), (x - x.mean()) / x.std(), atol=1e-7)
    small = 1e-4 * np.array([[-1.0, 1.0]])  # where the two forms of epsilon part
    every = np.ones((1, 2), bool)
    np.testing.assert_allclose(presets.whiten_by_variance(small, every, False)[0, 1], 1 / np.sqrt(2), rtol=1e-12)
    np.testing.assert_allclose(presets.whiten_by_deviation(small, every, False)[0, 1], 1 / (1 + 1e-4), rtol=1e-12)


def test_advantages_are_the_discounted_sum_of_the_errors_of_one_step():
    rewards, values = np.random.RandomState(0).randn(2, 3, 5)
    to_go = np.cumsum(rewards[:, ::-1], 1)[:, ::-1]
    np.testing.assert_allclose(ppo.gae(rewards, values, 1.0, 1.0), to_go - values, rtol=1e-10)
    discount, lam = 0.9, 0.7
    errors = rewards + discount * np.pad(values[:, 1:], ((0, 0), (0, 1))) - values
    powers = np.arange(5)[None] - np.arange(5)[:, None]
    weights = np.where(powers >= 0, (discount * lam) ** np.maximum(powers, 0), 0)
    np.testing.assert_allclose(ppo.gae(rewards, values, discount, lam), errors @ weights.T, rtol=1e-10)


@pytest.mark.parametrize("settings", [OPENAI_2019, ALPACAFARM, dataclasses.replace(TLDR_DETAILS, whiten_rewards=True)])
def test_whitened_rewards_keep_their_mean(settings):
    parameters, reference, rollouts, _ = ppo.example(settings, seed=9)
    batch = ppo.collect(settings, 0.5, parameters, reference, rollouts[0])
    target, valued = ppo.estimate(settings, batch), settings.valued(batch.mask)
    one, other = batch.rewards[valued], target.rewards[valued]
    np.testing.assert_allclose([other.mean(), other.std()], [one.mean(), 1], atol=1e-6)
    np.testing.assert_allclose(np.corrcoef(one, other)[0, 1], 1, rtol=1e-12)
    assert np.all(target.rewards[~valued] == 0)
    advantages = ppo.gae(target.rewards, batch.values, settings.discount, settings.lam)
    np.testing.assert_allclose(target.returns, advantages + batch.values, rtol=1e-12)


def test_tldr_details_ends_with_the_value_after_the_last_token():
    settings = dataclasses.replace(TLDR_DETAILS, whiten=unwhitened)
    rollout = ppo.Rollout(np.array([[1, 3, 0, 0]]), np.arange(4)[None] < 2, np.array([7.0]), np.array([True]))
    value = np.zeros((4, 4))
    value[0, 0], value[1, 1], value[2, 3], value[3, 0] = 1, 2, 4, 100  # V_0 to V_3
    same = ppo.Parameters(np.zeros((4, 4, 4)), value)
    target = ppo.estimate(settings, ppo.collect(settings, 0.1, same, same, rollout))
    errors = [2 - 1, 4 - 2, 7 - 4]
    expected = [errors[0] + 0.95 * (errors[1] + 0.95 * errors[2]), errors[1] + 0.95 * errors[2], 0, 0]
    np.testing.assert_allclose(target.advantages[0], expected, rtol=1e-12)
    np.testing.assert_allclose(target.returns[0], [expected[0] + 1, expected[1] + 2, 7, 0], rtol=1e-12)


def uniform_world(settings, columns=3, size=2):
    """The uniform policy, a reference, random values, and every reply once: means are then expectations."""
    random = np.random.RandomState(0)
    tokens = np.array(list(itertools.product(range(size), repeat=columns)))
    every = np.ones(tokens.shape, bool)
    rollout = ppo.Rollout(tokens, every, random.randn(len(tokens)), every[:, 0])
    parameters = ppo.Parameters(np.zeros((columns, size, size)), random.randn(columns, size))
    reference = ppo.Parameters(random.randn(columns, size, size), parameters.value)
    settings = dataclasses.replace(settings, whiten=unwhitened, kl_coefficient=0.3)
    return settings, parameters, reference, rollout


def regularized_score(settings, policy, reference, rollout):
    """E[score - c sum_n k1], by enumeration of the replies."""
    rows = np.arange(rollout.tokens.shape[1])
    previous = np.pad(rollout.tokens[:, :-1], ((0, 0), (1, 0)))
    log_pi, log_mu = (
        np.log(softmax(w / settings.temperature))[rows, previous, rollout.tokens].sum(1) for w in (policy, reference)
    )
    return np.sum(np.exp(log_pi) * (rollout.scores - settings.kl_coefficient * (log_pi - log_mu)))


@pytest.mark.parametrize("settings", [DEFAULT, TLDR_DETAILS])
def test_the_first_gradient_is_that_of_the_expected_regularized_score(settings):
    settings, parameters, reference, rollout = uniform_world(dataclasses.replace(settings, lam=1.0))
    batch = ppo.collect(settings, settings.kl_coefficient, parameters, reference, rollout)
    update = ppo.evaluate(settings, parameters, batch, ppo.estimate(settings, batch))
    exact = differences(lambda w: regularized_score(settings, w, reference.policy, rollout), parameters.policy)
    np.testing.assert_allclose(-update.gradient.policy * rollout.tokens.shape[1], exact, atol=1e-8)


def test_a_clamped_kl_has_another_gradient():
    settings, parameters, reference, rollout = uniform_world(dataclasses.replace(ALPACAFARM, whiten_rewards=False))
    batch = ppo.collect(settings, settings.kl_coefficient, parameters, reference, rollout)
    update = ppo.evaluate(settings, parameters, batch, ppo.estimate(settings, batch))
    exact = differences(lambda w: regularized_score(settings, w, reference.policy, rollout), parameters.policy)
    assert np.abs(-update.gradient.policy * rollout.tokens.shape[1] - exact).max() > 1e-2


@EVERY
def test_gradients_equal_differences_of_the_loss_where_both_clips_hold(settings):
    settings = fast(settings)
    parameters, reference, rollouts, orders = ppo.example(settings, seed=1, steps=2)
    moved, clipped = np.random.RandomState(2), []
    for rows in orders[0].reshape(-1, orders.shape[-1]):
        batch = ppo.collect(settings, settings.kl_coefficient, parameters, reference, rollouts[0])
        part = ppo.Batch(*(x[rows] for x in batch))
        target = ppo.estimate(settings, part)
        at = ppo.Parameters(*(p + 0.4 * moved.randn(*p.shape) for p in parameters))
        update = ppo.evaluate(settings, at, part, target)
        clipped.append((update.clip_fraction, update.value_clip_fraction))
        for name in ("policy", "value"):

            def loss(x, name=name, at=at, part=part, target=target):
                return ppo.evaluate(settings, at._replace(**{name: x}), part, target).loss

            exact = differences(loss, getattr(at, name))
            np.testing.assert_allclose(getattr(update.gradient, name), exact, atol=1e-8)
    assert np.all(np.max(clipped, 0) > 0)


@EVERY
def test_losses_equal_loops_over_replies_and_tokens(settings):
    settings = fast(settings)
    parameters, reference, rollouts, orders = ppo.example(settings, seed=3)
    rows = orders[0, 0, 0]
    batch = ppo.Batch(*(x[rows] for x in ppo.collect(settings, 0.1, parameters, reference, rollouts[0])))
    target, at = ppo.estimate(settings, batch), ppo.Parameters(*(0.7 * p for p in parameters))
    update = ppo.evaluate(settings, at, batch, target)
    policy, value = loops(settings, at, batch, target)
    np.testing.assert_allclose([update.policy_loss, update.value_loss], [policy, value], rtol=1e-12)
    measured = settings.measured(batch.mask)
    outside = (target.advantages > 0) & (update.ratio > 1.2) | (target.advantages < 0) & (update.ratio < 0.8)
    np.testing.assert_allclose(update.approx_kl, np.mean(np.log(update.ratio[measured]) ** 2) / 2, rtol=1e-12)
    np.testing.assert_allclose(update.clip_fraction, np.mean(outside[measured]), rtol=1e-12)
    np.testing.assert_allclose(update.loss, policy + 0.1 * value, rtol=1e-12)


def loops(settings, at, batch, target):
    """The two losses, token by token and block by block, from the presets' descriptions alone."""
    blocks, rows = [], settings.micro_rows or len(batch.tokens)
    for first in range(0, len(batch.tokens), rows):
        policy, value = [], []
        for b in range(first, first + rows):
            length = int(batch.mask[b].sum())
            for n in range(5):
                previous = batch.tokens[b, n - 1] if n else 0
                p = softmax(at.policy[n, previous] / settings.temperature)[batch.tokens[b, n]]
                counts = settings.scored is presets.everything or n < length
                ratio = p / np.exp(batch.logp[b, n]) if counts else 1.0
                a, v, old, r = target.advantages[b, n], at.value[n, previous], batch.values[b, n], target.returns[b, n]
                if settings.averaged is presets.everything or n < length:
                    policy.append(max(-a * ratio, -a * min(max(ratio, 0.8), 1.2)))
                extra = settings.valued is presets.one_more
                if settings.valued is presets.everything or n < length + extra:
                    value.append(max((v - r) ** 2, (min(max(v, old - 0.2), old + 0.2) - r) ** 2) / 2)
        blocks.append((np.mean(policy), np.mean(value)))
    return np.mean(blocks, 0)


@EVERY
def test_the_first_minibatch_of_a_step_has_ratio_one(settings):
    for step in ppo.trace(fast(settings), *ppo.example(settings, seed=4)):
        first, last = step.updates[0], step.updates[-1]
        np.testing.assert_allclose(first.ratio, 1, atol=1e-12)
        assert first.approx_kl < 1e-24 and first.clip_fraction == 0
        if step.learning_rate:
            assert last.approx_kl > 1e-4


@pytest.mark.parametrize(("settings", "same"), [(DEFAULT, True), (TLDR_DETAILS, True), (ALPACAFARM, False)])
def test_padding_changes_nothing_but_in_alpacafarm(settings, same):
    settings = fast(settings)
    parameters, reference, rollouts, orders = ppo.example(settings, seed=5)
    others = [r._replace(tokens=np.where(r.mask, r.tokens, 3 - r.tokens)) for r in rollouts]
    one, other = (ppo.trace(settings, parameters, reference, r, orders)[-1].updates[-1] for r in (rollouts, others))
    differ = [np.abs(x - y).max() for x, y in zip(one.parameters, other.parameters, strict=True)]
    assert (max(differ) == 0) == same


def test_a_value_after_the_end_is_trained_by_tldr_details_alone():
    for settings, trained in ((TLDR_DETAILS, True), (DEFAULT, False)):
        parameters, reference, rollouts, orders = ppo.example(settings, seed=6, steps=1)
        short = rollouts[0]._replace(
            tokens=np.tile([3, 0, 0, 0, 0], (8, 1)), mask=np.tile(np.arange(5) < 1, (8, 1)), finished=np.ones(8, bool)
        )
        update = ppo.trace(settings, parameters, reference, [short], orders)[0].updates[0]
        states = {(int(n), int(y)) for n, y in np.argwhere(update.gradient.value)}
        assert states == ({(0, 0), (1, 3)} if trained else {(0, 0)})


def test_openai_2019_whitens_the_minibatch_and_the_others_the_rollout():
    for settings, alone in ((dataclasses.replace(OPENAI_2019, minibatches=2), True), (ALPACAFARM, False)):
        step = ppo.trace(settings, *ppo.example(settings, seed=7, steps=1))[0]
        means = [update.estimate.advantages.mean() for update in step.updates[:2]]  # the two halves of one epoch
        np.testing.assert_allclose(sum(means), 0, atol=1e-12)
        assert (abs(means[0]) < 1e-12) == alone


def test_the_adaptive_coefficient_moves_by_the_clipped_relative_error():
    adaptive = presets.AdaptiveKL(target=6.0, horizon=10_000)
    for kl, factor in ((6.0, 1.0), (6.6, 1.00512), (60.0, 1.01024), (-60.0, 0.98976)):
        np.testing.assert_allclose(adaptive(0.15, kl, 512), 0.15 * factor, rtol=1e-12)
    settings = fast(OPENAI_2019, adaptive_kl=presets.AdaptiveKL(target=0.6, horizon=100))
    steps, errors = ppo.trace(settings, *ppo.example(settings, seed=25)), []
    for step, after in itertools.pairwise(steps):
        errors.append(np.mean([sum(reply) for reply in step.batch.kl]) / 0.6 - 1)
        expected = step.kl_coefficient * (1 + np.clip(errors[-1], -0.2, 0.2) * 8 / 100)
        np.testing.assert_allclose([step.next_kl_coefficient, after.kl_coefficient], expected, rtol=1e-14)
    assert -0.2 < errors[0] < 0 and errors[1] > 0.2  # inside and outside the clip


def run_optimizer(settings, gradients, start):
    """The parameters after each gradient."""
    zeros = ppo.Parameters(*map(np.zeros_like, start))
    state, found = ppo.State(start, zeros, zeros, 0), []
    for gradient in gradients:
        state = ppo.descend(settings, 0.1, state, gradient)
        found.append(state.parameters)
    return found


@pytest.mark.parametrize("settings", [TLDR_DETAILS, ALPACAFARM])
def test_adam_is_optax(settings):
    random = np.random.RandomState(0)
    start, *gradients = (ppo.Parameters(random.randn(2, 3, 3), random.randn(2, 3)) for _ in range(5))
    clip = optax.clip_by_global_norm(settings.max_grad_norm) if settings.max_grad_norm else optax.identity()
    optimizer = optax.chain(clip, optax.adamw(0.1, eps=settings.eps, weight_decay=settings.weight_decay))
    with jax.enable_x64(True):
        state, parameters = optimizer.init(start), start
        for gradient, found in zip(gradients, run_optimizer(settings, gradients, start), strict=True):
            change, state = optimizer.update(gradient, state, parameters)
            parameters = optax.apply_updates(parameters, change)
            for x, y in zip(found, parameters, strict=True):  # torch's clip adds 1e-6 to the norm, optax's does not
                np.testing.assert_allclose(x, y, rtol=1e-6)


def test_tensorflows_adam_does_not_correct_epsilon():
    start = ppo.Parameters(np.zeros((1, 1, 1)), np.zeros((1, 1)))
    tiny = ppo.Parameters(np.full((1, 1, 1), 1e-5), np.full((1, 1), 1.0))
    found = run_optimizer(OPENAI_2019, [tiny], start)[0]
    # The first moments are 0.1 g and 0.001 g^2: the step is sqrt(0.001) / 0.1 x 0.1 g / (sqrt(0.001) g + eps).
    root = np.sqrt(0.001)
    np.testing.assert_allclose(found.policy, -0.1 * root * 1e-5 / (root * 1e-5 + 1e-5), rtol=1e-10)
    np.testing.assert_allclose(found.value, -0.1 * root / (root + 1e-5), rtol=1e-10)
    np.testing.assert_allclose(run_optimizer(TLDR_DETAILS, [tiny], start)[0].policy, -0.1 / 2, rtol=1e-10)


def test_learning_rates_of_ten_steps():
    rates = {name: [round(s.schedule(i, 10), 12) for i in range(10)] for name, s in PRESETS.items()}
    line = [1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert rates["openai_2019"] == rates["tldr_details"] == line
    assert rates["alpacafarm"] == [0, 0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4, 0.2]
    assert rates["default"] == [1] * 10


def numbers(settings):
    """Of the example with seed 0: sums of the updates' losses, KL and clip fractions; parameters; coefficient."""
    steps = ppo.trace(fast(settings), *ppo.example(settings, seed=0))
    updates = [u for step in steps for u in step.updates]
    sums = np.sum([[u.policy_loss, u.value_loss, u.approx_kl, u.clip_fraction] for u in updates], 0)
    weights = [np.cos(np.arange(p.size)).reshape(p.shape) for p in updates[-1].parameters]
    dots = [np.sum(w * p) for w, p in zip(weights, updates[-1].parameters, strict=True)]
    return [*sums, *dots, steps[-1].next_kl_coefficient]


GOLDEN = {
    "openai_2019": [-0.691680306217, 25.7348868583, 0.541439374581, 3.2, -6.77059335277, 2.34491706102, 0.149928011519],
    "tldr_details": [-1.51937473351, 9.30110723576, 0.17889975976, 1.15, -5.85303315714, 0.850055265662, 0.05],
    "alpacafarm": [-0.131869655371, 20.3169344022, 0.00734765773837, 0.05, -3.57553572766, 1.751150015, 0.0067],
    "default": [-0.737222026149, 11.3412521979, 0.207894134098, 2.80512820513, -3.84457033929, 0.887746612701, 0.0067],
}


@pytest.mark.parametrize("name", PRESETS)
def test_golden(name):
    np.testing.assert_allclose(numbers(PRESETS[name]), GOLDEN[name], rtol=1e-9)
