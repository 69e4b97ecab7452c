"""Preference models: exact antisymmetry, the contexts they see, both forms, and that they can be intransitive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.preferences import models as preference
from alignjax.types import Completion, Tokens
from tests.conftest import ragged

TEMPLATE = preference.TemplateTokens(before=(14,), between=(15, 16), question=(17,), answer=9)
FIRST, SECOND = [[4, 2], [5, 6, 2], [2], [7, 7, 7]], [[3, 3, 2], [5, 6, 2], [8, 2], [7, 7]]


@pytest.fixture(scope="module", params=["pairwise", "bradley_terry"])
def form(request, model, params):
    """(compiled logit, parameters), the reward head away from its zero start."""
    built = getattr(preference, request.param)(model, TEMPLATE)
    full = built.extend(params, jax.random.key(0))
    if "reward" in full:
        full = {**full, "reward": {"kernel": jax.random.normal(jax.random.key(1), (16,))}}
    return jax.jit(built.logit), full


def test_probabilities_of_both_orders_sum_to_one_exactly(form, prompt):
    logit, params = form
    first, second = ragged(FIRST), ragged(SECOND)
    p = preference.probability(logit(params, prompt, first, second))
    q = preference.probability(logit(params, prompt, second, first))
    np.testing.assert_array_equal(p + q, np.ones(4, np.float32))
    assert np.abs(np.asarray(p) - 0.5)[[0, 2, 3]].min() > 1e-4


def test_equal_responses_tie_exactly(form, prompt):
    logit, params = form
    np.testing.assert_array_equal(logit(params, prompt, ragged(FIRST), ragged(FIRST, 7, filler=3)), np.zeros(4))


def test_probability_is_the_sigmoid_and_its_complement_is_exact():
    x = jnp.concatenate([jnp.linspace(-30, 30, 4001), jnp.float32(2.0) ** -jnp.arange(1, 100.0)])
    np.testing.assert_allclose(preference.probability(x), jax.nn.sigmoid(x), atol=1e-7)
    np.testing.assert_array_equal(preference.probability(x) + preference.probability(-x), np.ones(len(x), np.float32))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_changes_a_logit(form, prompt, side):
    logit, params = form
    rows = [[5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [10, 11, 12, 13]]
    want = logit(params, prompt, ragged(FIRST), ragged(SECOND))
    got = logit(params, ragged(rows, 8, side, 19), ragged(FIRST, 5, filler=6), ragged(SECOND, 4, filler=1))
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_batch_order_changes_nothing(form, prompt):
    logit, params = form
    order = np.array([3, 1, 0, 2])
    args = (prompt, ragged(FIRST), ragged(SECOND))
    mixed = logit(params, *jax.tree.map(lambda x: x[order], args))
    np.testing.assert_allclose(mixed, logit(params, *args)[order], atol=1e-5)


def test_pairwise_is_the_answers_logit_after_both_orders(model, params):
    """The context written out: prompt, before, first, between, second, question."""
    x, y, z = [5, 6], [4, 2], [3, 8, 2]

    def score(a, b):
        context = ragged([[*x, 14, *a, 15, 16, *b, 17]])
        return model.unembed(params, model.final(params, context))[0, 9]

    logit = preference.pairwise(model, TEMPLATE).logit(params, ragged([x]), ragged([y]), ragged([z]))
    np.testing.assert_allclose(logit[0], score(y, z) - score(z, y), atol=1e-5)


def test_bradley_terry_is_transitive_and_pairwise_need_not_be(model, params):
    """Logits around a triangle sum to zero for a reward model alone."""
    x = ragged([[5, 6]])
    sides = [ragged([row]) for row in ([4, 2, 0], [3, 8, 2], [7, 7, 2])]

    def around(form):
        built = form(model, TEMPLATE)
        full = {**built.extend(params, jax.random.key(0))}
        if "reward" in full:
            full["reward"] = {"kernel": jnp.ones(16)}
        return sum(built.logit(full, x, sides[i], sides[(i + 1) % 3])[0] for i in range(3))

    assert abs(around(preference.bradley_terry)) < 1e-5
    assert abs(around(preference.pairwise)) > 1e-3


def test_a_new_reward_head_prefers_nothing(model, params, prompt):
    built = preference.bradley_terry(model, TEMPLATE)
    start = built.extend(params, jax.random.key(0))
    np.testing.assert_array_equal(built.logit(start, prompt, ragged(FIRST), ragged(SECOND)), np.zeros(4))


def test_lexicographic_orders_by_the_first_difference():
    a = Completion(jnp.array([[1, 5, 0], [1, 2, 9], [1, 2, 3]]), jnp.array([[1, 1, 0], [1, 1, 0], [1, 1, 1]], bool))
    b = Completion(jnp.array([[1, 4, 7], [1, 2, 4], [1, 2, 0]]), jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], bool))
    assert preference.lexicographic(a, b).tolist() == [1, 0, 1]
    assert preference.lexicographic(b, a).tolist() == [-1, 0, -1]


def test_twice_interleaves_rows():
    a, b = Tokens(jnp.array([[1], [3]]), jnp.ones((2, 1), bool)), Tokens(jnp.array([[2], [4]]), jnp.ones((2, 1), bool))
    assert preference.twice(a, b).tokens[:, 0].tolist() == [1, 2, 3, 4]
