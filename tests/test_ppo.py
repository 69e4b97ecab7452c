"""PPO against an independent implementation in NumPy, number by number, and the laws of its equations."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax import losses
from alignjax.errors import UserError
from alignjax.models.build import build
from alignjax.models.config import TransformerConfig
from alignjax.models.heads import apply_head
from alignjax.objectives import PPO, GroupGradient, KLTarget
from alignjax.training import presets
from alignjax.training.learn import LEARN, UpdateSchedule, batch_metrics, init_state, make_learn, step_key
from alignjax.training.loop import Loop
from alignjax.training.optimizer import Adam
from alignjax.types import Completion, PolicyFunctions, PreferenceBatch, Prompt, Response, Roles
from tests import ppo_reference
from tests.ppo_presets import PRESETS

STEPS, ROWS, COLUMNS, SIZE = 3, 8, 5, 4  # of ppo_reference.example


def previous_tokens(completion):
    return jnp.pad(completion.tokens[:, :-1], ((0, 0), (1, 0)))


def tabular(temperature):
    """The actor-critic of ``ppo_reference``: logits W[column, previous token], values v[column, previous token]."""

    def log_prob(params, prompt, completion):
        logits = params["policy"][jnp.arange(COLUMNS)[None], previous_tokens(completion)] / temperature
        logp = jnp.take_along_axis(jax.nn.log_softmax(logits), completion.tokens[..., None], -1)[..., 0]
        return jnp.where(completion.mask, logp, 0.0)

    def states(params, prompt, completion):
        return jax.nn.one_hot(jnp.arange(COLUMNS)[None] * SIZE + previous_tokens(completion), COLUMNS * SIZE)

    return PolicyFunctions(log_prob, states, COLUMNS * SIZE)


def parameters(tables):
    return {"policy": jnp.asarray(tables.policy), "value": {"kernel": jnp.asarray(tables.value.reshape(-1))}}


def collected(rollout, policy, params, reference, runs_on):
    """The rollout as a collected batch; where it ``runs_on``, the tokens after the end are real."""
    mask = np.ones_like(rollout.mask) if runs_on else rollout.mask
    completion, prompt = (
        Completion(rollout.tokens, mask),
        Prompt(np.ones((ROWS, 1), np.int32), np.ones((ROWS, 1), bool)),
    )
    old, mu = (policy.log_prob(p, prompt, completion) for p in (params, reference))
    response = Response(completion, old, mu, rollout.finished, rollout.finished)
    return PreferenceBatch(prompt, (response,), jnp.full((ROWS, 1, 1), 0.5), jnp.asarray(rollout.scores)[:, None], ())


MINUS_ONE = partial(losses.replaced_rewards, by=-1.0)  # as the referee has it
RATE = 0.3  # larger than any preset's, so that three steps move the parameters and clip


def preset(name):
    """(the preset, settings of the referee) of one source, at this file's learning rate."""
    settings = dataclasses.replace(PRESETS[name], micro_rows=None, learning_rate=RATE)  # ``Loop.accumulate`` has rows
    if name == "default":
        adam, loop = Adam(RATE, warmup=0, schedule="constant", b2=0.999, eps=1e-5), Loop(STEPS, ROWS, 1, 2, 2)
        return presets.Preset(PPO(tau=0.0067, invalid=MINUS_ONE), adam, loop, 1.0), settings
    found = getattr(presets, name)(STEPS, ROWS)
    found = found._replace(adam=dataclasses.replace(found.adam, lr=RATE))
    if name == "alpacafarm":  # five steps of warm-up are more than there are: one here
        found = found._replace(objective=dataclasses.replace(found.objective, tau=0.0067))
        found = found._replace(adam=dataclasses.replace(found.adam, warmup=1))
        settings = dataclasses.replace(settings, schedule=lambda step, steps: (steps - step) / (steps - 1) * (step > 0))
    return found, settings


@pytest.mark.parametrize("name", PRESETS)
def test_three_steps_of_ppo_are_the_referees_number_by_number(name):
    """Rewards, advantages, targets, losses, gradients, the KL coefficient and all parameters, after every batch."""
    with jax.enable_x64(True):
        found, settings = preset(name)
        first, mu, rollouts, _ = ppo_reference.example(settings, seed=3, steps=STEPS, rows=ROWS)
        objective, policy = found.objective, tabular(found.temperature)
        optimizer = found.adam.build(STEPS, found.loop.schedule.updates)
        loss = partial(objective, policy=policy)
        learn = jax.jit(make_learn(loss, optimizer, found.loop.schedule, extras=objective.extras))
        state = init_state(parameters(first), optimizer, jax.random.key(7), False, objective.extras.controls())
        keys = [step_key(dataclasses.replace(state, step=step), LEARN) for step in range(STEPS)]
        orders = np.array([row_orders(key, found.loop) for key in keys])
        trace = ppo_reference.trace(settings, first, mu, rollouts, orders)
        for step, rollout, order in zip(trace, rollouts, orders, strict=True):
            np.testing.assert_allclose(state.controls["tau"], step.kl_coefficient, rtol=1e-6)
            batch = collected(rollout, policy, state.params, parameters(mu), runs_on=name == "openai_2019")
            batch = objective.extras.prepare(Roles(state.params, {}, {}, {}, state.controls), batch, policy)
            check_estimates(objective, batch, step, order)
            check_first_update(loss, state.params, batch, step, order)
            state, metrics = learn(state, {}, batch)
            check_parameters(state.params, step.updates[-1].parameters)
            want = np.mean([update.value_loss for update in step.updates[: found.loop.minibatches]])
            np.testing.assert_allclose(metrics["value_loss"], want, rtol=1e-5)
        np.testing.assert_allclose(state.controls["tau"], trace[-1].next_kl_coefficient, rtol=1e-6)
        updates = [update for step in trace for update in step.updates]
        assert max(u.clip_fraction for u in updates) > 0.05 < max(u.value_clip_fraction for u in updates)


def row_orders(key, loop):
    """The rows of each minibatch as ``learn`` draws them, [epochs, minibatches, rows]."""
    epochs = [
        jax.random.permutation(jax.random.fold_in(key, e), ROWS) if loop.schedule.updates > 1 else np.arange(ROWS)
        for e in range(loop.epochs)
    ]
    return np.array(epochs).reshape(loop.epochs, loop.minibatches, -1)


def check_estimates(objective, batch, step, order):
    response = batch.responses[0]
    found = response.estimates
    np.testing.assert_allclose(objective.token_kl(response), step.batch.kl, atol=1e-6)
    np.testing.assert_allclose(found.reward, step.batch.rewards, atol=1e-6)
    np.testing.assert_allclose(found.value, step.batch.values, atol=1e-6)
    rows, want = order[0, 0], step.updates[0].estimate
    part = [
        np.asarray(x)[rows]
        for x in (response.completion.mask, found.reward, found.value, found.advantage, found.target)
    ]
    advantage, target = objective.advantages(*part[:3]) if objective.whiten_minibatches else part[3:]
    np.testing.assert_allclose(advantage, want.advantages, atol=1e-5)
    np.testing.assert_allclose(target, want.returns, atol=1e-5)


def check_first_update(loss, params, batch, step, order):
    minibatch, update = jax.tree.map(lambda x: jnp.asarray(x)[order[0, 0]], batch), step.updates[0]
    (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, minibatch, None)
    np.testing.assert_allclose(value, update.loss, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(metrics["value_loss"], update.value_loss, rtol=1e-5)
    np.testing.assert_allclose(metrics["approximate_kl"], update.approx_kl, atol=1e-9)
    check_parameters(gradient, update.gradient, atol=1e-7)


def check_parameters(found, want, **options):
    options = options or {"rtol": 1e-5, "atol": 1e-6}
    np.testing.assert_allclose(found["policy"], want.policy, **options)
    np.testing.assert_allclose(found["value"]["kernel"], want.value.reshape(-1), **options)


# --- laws ---


def enumerated(seed=0, length=3, size=3):
    """All sequences of a random autoregressive pair pi, mu, with the probability and token log-ratios of each."""
    tables = [np.random.default_rng(seed + i).normal(size=(length, size, size)) for i in range(2)]
    logps = [table - np.log(np.exp(table).sum(-1, keepdims=True)) for table in tables]
    sequences = np.array(list(itertools.product(range(size), repeat=length)))
    previous = np.concatenate([np.zeros_like(sequences[:, :1]), sequences[:, :-1]], 1)
    pi, mu = (logp[np.arange(length)[None], previous, sequences] for logp in logps)
    return np.exp(pi.sum(1)), pi - mu


def test_k1_and_k3_are_unbiased_and_the_clamped_one_is_too_large():
    probability, log_ratio = enumerated()
    kl = np.sum(probability * log_ratio.sum(1))
    expected = {f: float(np.sum(probability * np.asarray(f(log_ratio)).sum(1))) for f in (losses.k1, losses.k3)}
    np.testing.assert_allclose(list(expected.values()), kl, rtol=1e-6)
    assert np.sum(probability * np.asarray(losses.clamped_k1(log_ratio)).sum(1)) > kl + 0.1
    assert np.all(np.asarray(losses.k2(log_ratio)) >= 0) and np.all(np.asarray(losses.k3(log_ratio)) >= 0)


def test_advantages_at_lambda_one_are_rewards_to_go_less_values_and_at_zero_one_step_errors():
    rng = np.random.default_rng(0)
    reward, value = rng.normal(size=(2, 4, 6)).astype(np.float32)
    whole = losses.generalized_advantage(reward, value, discount=1.0, gae_lambda=1.0)
    np.testing.assert_allclose(whole, losses.reward_to_go(reward) - value, atol=1e-5)
    step = losses.generalized_advantage(reward, value, discount=0.9, gae_lambda=0.0)
    np.testing.assert_allclose(step, reward + 0.9 * np.pad(value[:, 1:], ((0, 0), (0, 1))) - value, atol=1e-6)


def test_places_of_a_response():
    mask = jnp.array([[True, True, False, False], [True, True, True, True]])
    assert losses.one_past_the_end(mask).tolist() == [[True, True, True, False], [True] * 4]
    for places, last in ((mask, [1, 3]), (losses.one_past_the_end(mask), [2, 3]), (losses.all_places(mask), [3, 3])):
        assert np.argmax(losses.last_place(places), 1).tolist() == last
        assert np.sum(losses.last_place(places), 1).tolist() == [1, 1]


def test_whitening_has_mean_zero_and_variance_one_over_the_places_alone():
    rng = np.random.default_rng(0)
    x, mask = rng.normal(2.0, 3.0, (4, 5)), rng.random((4, 5)) < 0.6
    white, kept = (np.asarray(losses.whiten(jnp.asarray(x), jnp.asarray(mask), keep_mean=k)) for k in (False, True))
    np.testing.assert_allclose([white[mask].mean(), white[mask].std()], [0, 1], atol=1e-5)
    np.testing.assert_allclose(kept[mask] - white[mask], x[mask].mean(), rtol=1e-4)
    assert np.all(white[~mask] == 0) and np.all(kept[~mask] == 0)


@pytest.mark.parametrize(("kl", "factor"), [(60.0, 1.2), (6.6, 1.1), (6.0, 1.0), (0.0, 0.8)])
def test_tau_follows_the_kl_and_moves_by_a_fifth_at_most(kl, factor):
    found = losses.adapted_coefficient(jnp.float32(0.1), jnp.float32(kl), 512, target=6.0, horizon=512.0)
    np.testing.assert_allclose(found, 0.1 * factor, rtol=1e-5)


def test_baselines_of_a_group():
    reward = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32)
    others = [[np.mean(np.delete(row, k)) for k in range(4)] for row in reward]
    np.testing.assert_allclose(losses.leave_one_out(reward), reward - np.array(others), atol=1e-6)
    standard = np.asarray(losses.group_standardized(reward))
    np.testing.assert_allclose(standard.std(1, ddof=1), 1, rtol=1e-3)
    np.testing.assert_allclose(losses.leave_one_out(reward), losses.group_centered(reward) * 4 / 3, atol=1e-6)
    assert np.all(np.asarray(losses.group_standardized(np.ones((1, 3), np.float32))) == 0)


def one_token_world(objective, seed=0):
    """(exact gradient, expected gradient) of E[r] - tau KL for responses of one token, over all groups of responses."""
    size, count = 3, objective.responses
    rng = np.random.default_rng(seed)
    logits, mu, reward = rng.normal(size=(3, size))
    mu = mu - np.log(np.exp(mu).sum())

    def value(logits):
        logp = jax.nn.log_softmax(logits)
        return jnp.sum(jnp.exp(logp) * (jnp.asarray(reward) - objective.tau * (logp - mu)))

    def log_prob(params, prompt, completion):
        return jax.nn.log_softmax(params)[completion.tokens[:, 0]][:, None]

    groups = np.array(list(itertools.product(range(size), repeat=count)))
    one = np.ones((len(groups), 1), bool)
    logp = np.asarray(jax.nn.log_softmax(jnp.asarray(logits)))
    responses = tuple(
        Response(Completion(column[:, None], one), logp[column][:, None], mu[column][:, None]) for column in groups.T
    )
    batch = PreferenceBatch(
        Prompt(groups[:, :1], one), responses, jnp.zeros((len(groups), count, count)), reward[groups], ()
    )
    weight = np.exp(logp[groups].sum(1))
    weighted = dataclasses.replace(objective, average=lambda x, mask: jnp.sum(x[:, 0] * np.tile(weight, count)) / count)
    policy = PolicyFunctions(log_prob, None, 0)
    found = jax.grad(lambda p: weighted(p, batch, None, policy=policy)[0])(jnp.asarray(logits))
    return np.asarray(jax.grad(value)(jnp.asarray(logits))), -np.asarray(found)


@pytest.mark.parametrize("count", [2, 3])
def test_the_expected_gradient_of_rloo_is_the_exact_one(count):
    """Enumerated over all groups; the baseline of the other responses adds nothing to the mean."""
    rloo = GroupGradient(count, losses.leave_one_out, losses.score_function, losses.mean_of_sums, tau=0.3)
    exact, found = one_token_world(rloo)
    np.testing.assert_allclose(found, exact, atol=1e-6)


def test_the_expected_gradient_of_centred_grpo_is_the_exact_one_up_to_scale():
    """2503.20783: without the deviation and the length it is RLOO's times (K - 1) / K. With the deviation it is not."""
    loss = partial(losses.grpo, clip=0.2, tau=0.0)
    centred = GroupGradient(3, losses.group_centered, loss, losses.mean_of_sums)
    exact, found = one_token_world(centred)
    np.testing.assert_allclose(found * 3 / 2, exact, atol=1e-6)
    _, standard = one_token_world(dataclasses.replace(centred, advantage=losses.group_standardized))
    cosine = np.sum(standard * exact) / np.linalg.norm(standard) / np.linalg.norm(exact)
    assert cosine < 0.999


def test_grpos_kl_term_has_the_gradient_of_the_kl():
    """Over samples of pi, E grad k3 is the gradient of KL(mu, pi), not of KL(pi, mu). 2402.03300 uses it so."""
    logits, mu = np.random.default_rng(0).normal(size=(2, 3))
    mu = jax.nn.log_softmax(jnp.asarray(mu))

    def term(logits):
        logp = jax.nn.log_softmax(logits)
        held = jax.lax.stop_gradient(logp)
        return jnp.sum(jnp.exp(held) * losses.grpo(logp, held, mu, jnp.zeros(3), clip=0.2, tau=1.0))

    reverse = jax.grad(lambda x: jnp.sum(jnp.exp(mu) * (mu - jax.nn.log_softmax(x))))(jnp.asarray(logits))
    np.testing.assert_allclose(jax.grad(term)(jnp.asarray(logits)), reverse, atol=1e-6)


def test_an_invalid_response_is_paid_less_than_every_valid_one_whatever_the_offset():
    completion = Completion(np.zeros((3, 1), np.int32), np.ones((3, 1), bool))
    zeros, valid = np.zeros((3, 1)), np.array([True, False, True])
    response = Response(completion, zeros, zeros, valid, valid)
    reward = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)
    other = dataclasses.replace(response, valid=~valid)
    roles, policy = (
        Roles({"value": {"kernel": np.zeros(1)}}, {}, {}, {}),
        PolicyFunctions(None, lambda *_: zeros[..., None], 1),
    )
    for offset in (0.0, -50.0):
        batch = PreferenceBatch(completion, (response, other), jnp.zeros((3, 2, 2)), reward + offset)

        def paid(objective, batch=batch, offset=offset):
            return np.asarray(objective.extras.prepare(roles, batch, policy).reward - offset).tolist()

        assert paid(PPO(tau=0.0)) == [[1, 0], [0, 4], [5, 0]]
        group = GroupGradient(2, losses.leave_one_out, losses.score_function, losses.mean_of_sums)
        assert paid(group) == [[1, 0], [0, 4], [5, 0]]
        assert paid(dataclasses.replace(group, invalid=None)) == reward.tolist()
        published = paid(PPO(tau=0.0, invalid=partial(losses.replaced_rewards, by=-1.0)))
        assert published == [[1, -1 - offset], [-1 - offset, 4], [5, -1 - offset]]
    nothing = losses.below_the_lowest(jnp.asarray(reward), jnp.zeros((3, 2), bool), margin=1.0)
    assert np.all(nothing == -1.0)


def test_ppo_is_paid_what_was_prepared():
    """The score of the first response, of three, lies at its last token."""
    completion = Completion(np.zeros((2, 3), np.int32), np.array([[True, True, False], [True, True, True]]))
    zeros = np.zeros((2, 3))
    responses = (Response(completion, zeros, zeros, None, np.array([True, False])), Response(completion))
    batch = PreferenceBatch(completion, responses, jnp.zeros((2, 2, 2)), np.array([[4.0, 7.0], [9.0, 8.0]]))
    roles, policy = (
        Roles({"value": {"kernel": np.zeros(1)}}, {}, {}, {}),
        PolicyFunctions(None, lambda *_: zeros[..., None], 1),
    )
    prepared = PPO(tau=0.1).extras.prepare(roles, batch, policy)
    assert prepared.responses[0].estimates.reward.tolist() == [[0, 4, 0], [0, 0, 3]]


def test_averages_over_tokens():
    x, mask = jnp.array([[1.0, 3.0], [5.0, 9.0]]), jnp.array([[True, True], [True, False]])
    assert losses.masked_mean(x, mask) == 3.0  # of tokens
    assert losses.sequence_mean(x, mask) == 3.5  # of rows' means
    assert losses.mean_of_sums(x, mask) == 4.5 and losses.mean_of_sums(x, mask, length=3.0) == 1.5


@pytest.mark.parametrize("field", ["tau", "clip", "gae_lambda", "discount", "value_clip"])
def test_settings_of_ppo_out_of_range_are_refused(field):
    with pytest.raises(UserError, match=rf"PPO\.{field}=-1.0"):
        PPO(**{"tau": 0.1, field: -1.0})


def test_only_k1_has_the_gradient_of_the_kl_when_it_is_paid_as_a_reward():
    """E[grad log pi (y) k(y)], for one token. k3's is that of KL(pi, mu) - KL(mu, pi), so PPO refuses it."""
    logits, mu = np.random.default_rng(0).normal(size=(2, 4))
    mu = jax.nn.log_softmax(jnp.asarray(mu))

    def paid(estimator):
        def surrogate(logits):
            logp = jax.nn.log_softmax(logits)
            held = jax.lax.stop_gradient(logp)
            return jnp.sum(jnp.exp(held) * logp * estimator(held - mu))

        return np.asarray(jax.grad(surrogate)(jnp.asarray(logits)))

    def forward(x):
        return jnp.sum(jnp.exp(jax.nn.log_softmax(x)) * (jax.nn.log_softmax(x) - mu))

    def reverse(x):
        return jnp.sum(jnp.exp(mu) * (mu - jax.nn.log_softmax(x)))

    kl, other = (np.asarray(jax.grad(f)(jnp.asarray(logits))) for f in (forward, reverse))
    np.testing.assert_allclose(paid(losses.k1), kl, atol=1e-6)
    np.testing.assert_allclose(paid(losses.k3), kl - other, atol=1e-6)
    for estimator in (losses.k2, losses.k3):
        with pytest.raises(UserError, match="not its gradient"):
            PPO(tau=0.1, kl=estimator)


def test_a_batch_shows_its_largest_gradient_and_what_is_asked_of_its_last_epoch():
    updates = {"gradient_norm": jnp.array([1.0, 2.0, jnp.nan, 3.0]), "clipped": jnp.arange(4.0), "kl": jnp.arange(4.0)}
    found = batch_metrics(updates, UpdateSchedule(epochs=2, minibatches=2), ("clipped",))
    assert np.isnan(found["gradient_norm"]) and found["clipped"] == 2.5 and found["kl"] == 0.5
    fine = batch_metrics({"gradient_norm": jnp.array([1.0, 4.0, 2.0])}, UpdateSchedule(epochs=3), ())
    assert fine["gradient_norm"] == 4.0


@pytest.mark.parametrize("places", [losses.all_places, losses.one_past_the_end, losses.real_tokens])
def test_no_value_depends_on_how_much_padding_there_is(places):
    """Nor does one behind the end of a response, which the presets of published code learn from."""
    config = TransformerConfig(vocab_size=8, width=16, layers=2, heads=2, kv_heads=1, head_dim=8, hidden=32)
    model = build(config)
    params = jax.tree.map(lambda x: 3 * x, model.init(jax.random.key(0)))
    completion = Completion(np.array([[3, 4, 0, 0, 0]], np.int32), np.array([[True, True, False, False, False]]))
    short, long = (
        Prompt(np.pad([[5, 6, 7]], ((0, 0), (n, n))).astype(np.int32), np.pad([[True] * 3], ((0, 0), (n, n))))
        for n in (0, 6)
    )
    head = {"kernel": np.random.default_rng(0).normal(size=16).astype(np.float32)}
    mask = np.asarray(places(completion.mask))
    values = [apply_head(head, model.completion_states(params, prompt, completion)) for prompt in (short, long)]
    np.testing.assert_allclose(*(np.asarray(v)[mask] for v in values), atol=1e-4)


def test_a_tau_that_would_stay_zero_is_refused():
    with pytest.raises(UserError, match="stays 0"):
        PPO(tau=0.0, target=KLTarget())


def test_a_horizon_that_is_shorter_than_a_batch_is_refused():
    completion = Completion(np.zeros((8, 1), np.int32), np.ones((8, 1), bool))
    zeros = np.zeros((8, 1))
    batch = PreferenceBatch(completion, (Response(completion, zeros, zeros),), jnp.zeros((8, 1, 1)), zeros)
    with pytest.raises(UserError, match="raise it"):
        PPO(tau=0.1, target=KLTarget(horizon=1.6)).adapt({"tau": jnp.float32(0.1)}, batch)
    with pytest.raises(UserError, match="whole number"):
        GroupGradient(2.5, losses.leave_one_out, losses.score_function, losses.mean_of_sums)
