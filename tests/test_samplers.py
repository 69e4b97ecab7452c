"""Joint processes: K samplers draw together what each would draw alone, and each network reads its rows once."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.errors import UserError
from alignjax.sampling.process import geometric_mixture, sample
from alignjax.sampling.samplers import (
    Sampler,
    draw_responses,
    joint_process,
    mixture,
    moving_average,
    policy,
    reference,
)
from alignjax.types import Process, Role, Roles
from tests.conftest import ragged

VOCABULARY, WIDTH, LENGTH, STOP = 6, 8, 5, ((2,),)
PROMPT = ragged([[5, 1], [3, 4, 0], [1], [2, 5, 5, 3]])
KEY = jax.random.key(7)
TUPLES = [
    (policy, mixture(0.25)),
    (policy, policy),
    (policy, reference),
    (policy, moving_average),
    (mixture(0.3), mixture(0.3)),
    (mixture(0.6), policy, Sampler(Role.AVERAGE, 0.5), reference),
    (reference, mixture(0.125), moving_average, policy),
    (moving_average,),
]


def network(seed):
    """Parameters of a network whose next logits depend on every token so far."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (VOCABULARY, WIDTH), (WIDTH, WIDTH), (WIDTH, VOCABULARY)
    parts = dict(zip(("embed", "recur", "head"), map(jax.random.normal, keys, shapes), strict=True))
    return {**parts, "head": parts["head"] / 4}


ROLES = Roles(network(1), network(2), network(3), {})


def advance(params, state, token):
    return jnp.tanh(state @ params["recur"] + params["embed"][token])


def prefill(params, prompt):
    """The process that continues a prompt; the state of padding is the state before it."""
    state = jnp.zeros((len(prompt.tokens), WIDTH))
    for token, real in zip(prompt.tokens.T, prompt.mask.T, strict=True):
        state = jnp.where(real[:, None], advance(params, state, token), state)

    def step(state, token):
        state = advance(params, state, token)
        return state, state @ params["head"]

    return Process(step, state, state @ params["head"])


def alone(sampler, prompt=PROMPT):
    """The sampler's process by itself."""
    return geometric_mixture(prefill(ROLES[sampler.role], prompt), prefill(ROLES.reference, prompt), sampler.beta)


def response_keys(k, rows):
    """fold_in(fold_in(key, k), b) for every row b."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(KEY, k), jnp.arange(rows))


@partial(jax.jit, static_argnames=("samplers", "length"))
def together(samplers, prompt=PROMPT, length=LENGTH):
    process = joint_process(prefill, ROLES, samplers, prompt)
    return draw_responses(process, len(samplers), KEY, length, STOP)


@pytest.mark.parametrize("samplers", TUPLES, ids=lambda s: "-".join(f"{x.role.name}{x.beta:g}" for x in s))
def test_samplers_draw_together_what_each_draws_alone(samplers):
    samples = together(samplers)
    assert len(samples) == len(samplers)
    for k, (sampler, joint) in enumerate(zip(samplers, samples, strict=True)):
        single = jax.jit(lambda s=sampler, k=k: sample(alone(s), response_keys(k, 4), LENGTH, STOP))()
        np.testing.assert_array_equal(joint.completion.tokens, single.completion.tokens)
        np.testing.assert_array_equal(joint.completion.mask, single.completion.mask)
        np.testing.assert_array_equal(joint.finished, single.finished)
        np.testing.assert_allclose(joint.logp, single.logp, atol=1e-5)
    assert not np.array_equal(samples[0].completion.tokens, samples[-1].completion.tokens) or len(samples) == 1


@pytest.mark.parametrize("samplers", TUPLES[:6], ids=range(6))
def test_log_probs_are_those_of_the_enumerated_process(samplers):
    """All V^2 two-token sequences of each sampler, from the networks' equations in NumPy float64."""

    def log_softmax(x):
        return x - np.log(np.sum(np.exp(x - x.max()))) - x.max()

    def next_logits(params, tokens):
        state = np.zeros(WIDTH)
        for token in tokens:
            state = np.tanh(state @ params["recur"] + params["embed"][token])
        return log_softmax(state @ params["head"])

    roles = jax.tree.map(partial(np.asarray, dtype=np.float64), ROLES)
    prompts = [tokens[mask].tolist() for tokens, mask in zip(PROMPT.tokens, PROMPT.mask, strict=True)]

    def log_prob(sampler, context):
        own, mu = (next_logits(roles[role], context) for role in (sampler.role, Role.REFERENCE))
        return log_softmax((1 - sampler.beta) * own + sampler.beta * mu)

    for sampler, samples in zip(samplers, together(samplers, length=2), strict=True):
        for b, context in enumerate(prompts):
            first = log_prob(sampler, context)
            table = {
                (y, z): (first[y], log_prob(sampler, [*context, y])[z]) if y != 2 else (first[y], 0.0)
                for y, z in itertools.product(range(VOCABULARY), repeat=2)
            }
            total = sum(np.exp(sum(logp)) for (y, z), logp in table.items() if y != 2 or z == 0)
            assert total == pytest.approx(1)
            np.testing.assert_allclose(samples.logp[b], table[tuple(samples.completion.tokens[b].tolist())], atol=1e-5)


@pytest.mark.parametrize(
    ("samplers", "readers"),
    [
        ((policy, mixture(0.25)), {"policy": 2, "reference": 1}),
        ((policy, policy), {"policy": 2}),
        ((policy, reference), {"policy": 1, "reference": 1}),
        ((policy, moving_average), {"policy": 1, "average": 1}),
        ((mixture(0.3), mixture(0.3)), {"policy": 2, "reference": 2}),
        ((mixture(0.0), mixture(1.0)), {"policy": 1, "reference": 1}),
        ((mixture(0.6), policy, Sampler(Role.AVERAGE, 0.5), reference), {"policy": 2, "reference": 3, "average": 1}),
    ],
)
def test_each_network_prefills_and_steps_once_with_one_row_for_each_sampler_that_reads_it(samplers, readers):
    """A network that no sampler reads need not exist."""
    calls = []

    def counting(params, prompt):
        name = next(name for name, tree in ROLES._asdict().items() if tree is params)
        process, rows = prefill(params, prompt), len(prompt.tokens)
        calls.append(("prefill", name, rows))

        def step(carry, token):
            calls.append(("step", name, len(token)))
            return process.step(carry, token)

        return process._replace(step=step)

    roles = Roles(*(tree if name in readers else {} for name, tree in ROLES._asdict().items()))
    process = joint_process(counting, roles, samplers, PROMPT)
    process.step(process.carry, jnp.zeros(4 * len(samplers), jnp.int32))
    want = [(purpose, name, 4 * count) for name, count in readers.items() for purpose in ("prefill", "step")]
    assert sorted(calls) == sorted(want)


def test_a_mixture_with_all_its_weight_on_one_network_is_that_network_to_the_bit():
    jax.tree.map(np.testing.assert_array_equal, together((mixture(0.0), mixture(1.0))), together((policy, reference)))


def test_a_response_depends_on_its_prompt_and_its_row_alone():
    """Not on the other rows, on other samplers or on padding; rows with one prompt differ."""
    samplers = (policy, mixture(0.25))
    samples = together(samplers)
    padded = together(samplers, ragged([[5, 1], [3, 4, 0], [0], [4]], 9, "left", 3))
    with_reference = together((policy, reference))
    for b in (0, 1):
        for k in (0, 1):
            np.testing.assert_array_equal(samples[k].completion.tokens[b], padded[k].completion.tokens[b])
        np.testing.assert_array_equal(samples[0].completion.tokens[b], with_reference[0].completion.tokens[b])
    same = together((policy, policy), ragged([[5, 1]] * 8))
    rows = [tuple(row.tolist()) for response in same for row in response.completion.tokens]
    assert len(set(rows)) > 8


def test_nash_md_s_samplers_of_a_decoder_are_its_policy_and_its_mixture(model, params, other_params, prompt):
    samplers = (policy, mixture(0.3))

    @jax.jit
    def draw():
        roles = Roles(params, other_params, {}, {})
        process = joint_process(lambda p, x: model.prefill(p, x, LENGTH), roles, samplers, prompt)
        return draw_responses(process, 2, KEY, LENGTH, STOP)

    @jax.jit
    def separate():
        own, mu = (model.prefill(p, prompt, LENGTH) for p in (params, other_params))
        processes = own, geometric_mixture(own, mu, 0.3)
        return tuple(sample(x, response_keys(k, 4), LENGTH, STOP) for k, x in enumerate(processes))

    for joint, single in zip(draw(), separate(), strict=True):
        np.testing.assert_array_equal(joint.completion.tokens, single.completion.tokens)
        np.testing.assert_allclose(joint.logp, single.logp, atol=1e-5)


def test_a_weight_outside_zero_to_one_is_refused():
    for beta in (-0.1, 1.5, float("nan")):
        with pytest.raises(UserError, match="the weight of the reference"):
            mixture(beta)
    assert policy.weights() == mixture(0).weights() == {Role.POLICY: 1.0}
    assert reference.weights() == mixture(1).weights() == {Role.REFERENCE: 1.0}
    assert mixture(0.25).weights() == {Role.POLICY: 0.75, Role.REFERENCE: 0.25}
