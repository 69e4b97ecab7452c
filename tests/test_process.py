"""Sampling: the mixture's endpoints, the distribution sampled from, stopping, filters and independence of rows."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from alignjax.models.decoder import decoder
from alignjax.models.log_probs import log_prob
from alignjax.sampling.process import Sampling, ends_with, filter_logits, geometric_mean, geometric_mixture, sample
from alignjax.types import Completion, Process
from tests.conftest import TINY, ragged

LENGTH, STOP = 8, ((2,),)


@pytest.fixture(scope="module")
def draw(model):
    """(policy, reference, prompt, keys, beta) -> Sample from the mixture; the policy alone for beta None."""

    @partial(jax.jit, static_argnames=("beta", "sampling"))
    def run(policy, reference, prompt, keys, beta=None, sampling=Sampling()):
        process = model.prefill(policy, prompt, LENGTH)
        if beta is not None:
            process = geometric_mixture(process, model.prefill(reference, prompt, LENGTH), beta)
        return sample(process, keys, LENGTH, STOP, sampling)

    return run


def keys(count=4, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


@pytest.mark.parametrize(("beta", "index"), [(0.0, 0), (1.0, 1)])
def test_the_mixture_with_all_the_weight_on_one_process_is_that_process(
    draw, params, other_params, prompt, beta, index
):
    own = (params, other_params)[index]
    mixed, alone = draw(params, other_params, prompt, keys(), beta=beta), draw(own, own, prompt, keys())
    np.testing.assert_array_equal(mixed.completion.tokens, alone.completion.tokens)
    np.testing.assert_allclose(mixed.logp, alone.logp, atol=1e-5)


def test_a_token_that_is_impossible_under_a_side_without_weight_stays_possible():
    """-inf and a weight of 0 do not meet; with a weight the token is impossible."""
    logits, barred = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[0.0, -jnp.inf, 1.0]])
    for weights, want in (((1.0, 0.0), jax.nn.log_softmax(logits)), ((0.0, 1.0), jax.nn.log_softmax(barred))):
        np.testing.assert_allclose(geometric_mean((logits, barred), weights), want, rtol=1e-6)
    assert np.isneginf(geometric_mean((logits, barred), (0.5, 0.5)))[0].tolist() == [False, True, False]


def test_the_mixture_is_geometric_at_every_prefix(model, draw, params, other_params, prompt):
    """Its log-probs are those of softmax[(1 - beta) log pi + beta log mu] on the full forward pass."""
    beta = 0.3
    sampled = draw(params, other_params, prompt, keys(), beta=beta)
    logits = [
        jax.nn.log_softmax(model.logits(p, model.completion_states(p, prompt, sampled.completion)))
        for p in (params, other_params)
    ]
    mixed = jax.nn.log_softmax((1 - beta) * logits[0] + beta * logits[1])
    chosen = np.take_along_axis(np.asarray(mixed), np.asarray(sampled.completion.tokens)[..., None], -1)[..., 0]
    np.testing.assert_allclose(sampled.logp, np.where(sampled.completion.mask, chosen, 0), atol=1e-5)


def test_log_probs_of_a_sample_are_the_models_at_temperature_one(model, draw, params, prompt):
    for sampling in (Sampling(), Sampling(temperature=0.5, top_k=5, top_p=0.8)):
        sampled = draw(params, params, prompt, keys(), sampling=sampling)
        np.testing.assert_allclose(sampled.logp, log_prob(model)(params, prompt, sampled.completion), atol=1e-5)


def test_greedy_takes_the_likeliest_token_of_the_full_forward(model, draw, params, prompt):
    sampled = draw(params, params, prompt, keys(), sampling=Sampling(temperature=0.0))
    best = np.argmax(model.logits(params, model.completion_states(params, prompt, sampled.completion)), -1)
    mask = np.asarray(sampled.completion.mask)
    np.testing.assert_array_equal(np.asarray(sampled.completion.tokens)[mask], best[mask])


def test_samples_follow_the_enumerated_distribution(params, other_params):
    """All 3^2 completions of a mixture over the first three tokens: chi-square at 20,000 draws."""
    tiny = decoder(dataclasses.replace(TINY, vocab_size=3, layers=1))
    policy, reference = (jax.tree.map(lambda x: 2 * x, tiny.init(jax.random.key(i))) for i in (5, 6))
    prompt, count, beta = ragged([[1, 2]] * 20_000), 20_000, 0.4

    @jax.jit
    def run(row_keys):
        sides = (tiny.prefill(p, prompt, 2) for p in (policy, reference))
        return sample(geometric_mixture(*sides, beta), row_keys, 2, ())

    sampled = np.asarray(run(keys(count)).completion.tokens)
    counts = np.bincount(sampled[:, 0] * 3 + sampled[:, 1], minlength=9)
    every = np.array(list(itertools.product(range(3), repeat=2)), np.int32)
    completion = Completion(every, np.ones((9, 2), bool))
    nine = ragged([[1, 2]] * 9)
    logits = [
        jax.nn.log_softmax(tiny.logits(p, tiny.completion_states(p, nine, completion))) for p in (policy, reference)
    ]
    mixed = np.asarray(jax.nn.log_softmax((1 - beta) * logits[0] + beta * logits[1]))
    expected = count * np.exp(np.take_along_axis(np.float64(mixed), every[..., None], -1)[..., 0].sum(1))
    assert expected.min() > 5
    assert stats.chisquare(counts, expected * count / expected.sum()).pvalue > 1e-3


def test_a_row_depends_on_its_prompt_and_key_alone(draw, params, prompt):
    order = np.array([2, 0, 3, 1])
    in_order = draw(params, params, prompt, keys())
    permuted = draw(params, params, jax.tree.map(lambda x: x[order], prompt), keys()[order])
    np.testing.assert_array_equal(permuted.completion.tokens, in_order.completion.tokens[order])
    wide = draw(params, params, ragged([[5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [10, 11, 12, 13]], 9, "left", 20), keys())
    np.testing.assert_array_equal(wide.completion.tokens, in_order.completion.tokens)


def test_a_completion_ends_with_its_stop_token_and_nothing_follows(draw, params):
    sampled = draw(params, params, ragged([[5, 6]] * 64), keys(64))
    for tokens, mask, done in zip(
        *map(np.asarray, (sampled.completion.tokens, sampled.completion.mask, sampled.finished)), strict=True
    ):
        where = np.flatnonzero(tokens[mask] == 2)
        assert list(where) == ([mask.sum() - 1] if done else [])
        assert mask.sum() == LENGTH or done
        assert np.all(np.diff(mask.astype(int)) <= 0) and np.all(tokens[~mask] == 0)
    assert 0 < np.mean(np.asarray(sampled.finished)) < 1


def test_the_loop_stops_when_every_row_has_met_a_stop_token():
    """A process that counts its steps and always says "stop" takes one."""
    logits = jnp.full((3, 4), -50.0).at[:, 2].set(50.0)
    counted = []
    process = Process(lambda carry, token: (carry + 1, logits), jnp.int32(0), logits)

    def step(carry, token):
        jax.debug.callback(lambda: counted.append(1))
        return process.step(carry, token)

    sampled = sample(process._replace(step=step), keys(3), 100, STOP)
    jax.effects_barrier()
    assert len(counted) == 1 and np.asarray(sampled.completion.mask).sum() == 3


def test_top_k_keeps_the_k_largest_and_top_p_the_fewest_that_reach_p():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]))
    np.testing.assert_array_equal(np.isfinite(filter_logits(logits, Sampling(top_k=2)))[0], [False, True, False, True])
    np.testing.assert_array_equal(
        np.isfinite(filter_logits(logits, Sampling(top_p=0.7)))[0], [False, True, False, True]
    )
    np.testing.assert_array_equal(np.isfinite(filter_logits(logits, Sampling(top_p=0.8)))[0], [False, True, True, True])
    np.testing.assert_array_equal(
        np.isfinite(filter_logits(logits, Sampling(top_p=0.5)))[1], [True, False, False, False]
    )
    np.testing.assert_allclose(filter_logits(logits, Sampling(temperature=0.5))[0], 2 * logits[0])


def test_a_stop_sequence_of_several_tokens_ends_a_row_where_it_is_complete():
    """A process that writes a fixed text: the response ends after 5 6 7, and not at 5 6 8 or at a half at the end."""
    script = np.array([[5, 6, 8, 5, 6, 7, 9, 9], [1, 5, 5, 6, 7, 1, 1, 1], [9, 9, 9, 9, 9, 9, 5, 6]])
    logits = 50.0 * np.eye(12, dtype=np.float32)[script]  # [B, T, V]

    def step(index, token):
        return index + 1, jax.lax.dynamic_index_in_dim(logits, index + 1, 1, keepdims=False)

    sampled = jax.jit(lambda: sample(Process(step, 0, logits[:, 0]), keys(3), 8, ((5, 6, 7), (4,))))()
    assert sampled.completion.mask.sum(1).tolist() == [6, 5, 8] and sampled.finished.tolist() == [True, True, False]
    assert sampled.completion.tokens[0, :6].tolist() == [5, 6, 8, 5, 6, 7]
    assert not ends_with(np.array([[7, 5, 6]]), np.int32(0), ((5, 6, 7),)).any()  # nothing stands in front
