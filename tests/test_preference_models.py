"""Preference models: exact antisymmetry, the contexts they read, all forms, and which can be intransitive."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.errors import UserError
from alignjax.preferences import preference_models
from alignjax.types import Completion, Tokens, stack_rows
from tests.conftest import ragged

TEMPLATE = preference_models.TemplateTokens(before=(14,), between=(15, 16), question=(17,), answer=9, other=11)
FIRST, SECOND = [[4, 2], [5, 6, 2], [2], [7, 7, 7]], [[3, 3, 2], [5, 6, 2], [8, 2], [7, 7]]


FORMS = ("pairwise", "choice", "pairwise_head", "one_order", "bradley_terry")


def build(form, model, params):
    """(preference model, parameters), with heads away from their zero start."""
    preference = getattr(preference_models, form)(model, TEMPLATE)
    heads = jax.tree.map(lambda x: jax.random.normal(jax.random.key(1), x.shape), preference.init_heads())
    return preference, {**params, **heads}


@pytest.fixture(scope="module", params=FORMS)
def form(request, model, params):
    """(compiled logit, parameters)."""
    preference, full = build(request.param, model, params)
    return jax.jit(preference.logit), full


def test_probabilities_of_both_orders_sum_to_one_exactly(form, prompt):
    logit, params = form
    first, second = ragged(FIRST), ragged(SECOND)
    p = preference_models.probability(logit(params, prompt, first, second))
    q = preference_models.probability(logit(params, prompt, second, first))
    np.testing.assert_array_equal(p + q, np.ones(4, np.float32))
    assert np.abs(np.asarray(p) - 0.5)[[0, 2, 3]].min() > 1e-4


def test_equal_responses_tie_exactly(form, prompt):
    logit, params = form
    np.testing.assert_array_equal(logit(params, prompt, ragged(FIRST), ragged(FIRST, 7, filler=3)), np.zeros(4))


def test_logits_of_random_pairs_are_odd_to_the_bit(form):
    """Pairs of all lengths, some equal, in tensors of two widths."""
    logit, params = form
    rng = np.random.default_rng(0)

    def rows(longest):
        return [rng.integers(0, 4, rng.integers(1, longest + 1)).tolist() for _ in range(64)]

    prompt, first, second = ragged(rows(5), 5), rows(7), rows(4)
    second[::8] = [row[:4] for row in first[::8]]
    equal = np.array([a == b for a, b in zip(first, second, strict=True)])
    first, second = ragged(first, 7, filler=9), ragged(second, 4, filler=1)
    forward, reverse = logit(params, prompt, first, second), logit(params, prompt, second, first)
    np.testing.assert_array_equal(forward, -reverse)
    np.testing.assert_array_equal(forward == 0, equal)
    assert 4 < equal.sum() < 32
    p, q = preference_models.probability(forward), preference_models.probability(reverse)
    np.testing.assert_array_equal(p + q, np.ones(64, np.float32))


def test_antisymmetric_makes_a_margin_odd_that_is_not():
    """The margin is asked about each pair in lexicographic order alone, whichever order it is given in."""

    def margin(params, prompt, first, second):
        return jnp.sum(first.tokens * first.mask, -1) / 7 + jnp.sum(second.mask, -1) * 0.1 + 1.0

    logit = preference_models.antisymmetric(margin)
    first, second = ragged(FIRST), ragged(SECOND)
    forward, reverse = logit({}, None, first, second), logit({}, None, second, first)
    np.testing.assert_array_equal(forward, -reverse)
    assert np.sign(forward).tolist() == [-1, 0, 1, -1]
    want = margin({}, None, second, first)[0], margin({}, None, first, second)[2], margin({}, None, second, first)[3]
    np.testing.assert_array_equal(np.abs(forward)[[0, 2, 3]], want)


def test_probability_is_the_sigmoid_and_its_complement_is_exact():
    x = jnp.concatenate([jnp.linspace(-30, 30, 4001), jnp.float32(2.0) ** -jnp.arange(1, 100.0)])
    np.testing.assert_allclose(preference_models.probability(x), jax.nn.sigmoid(x), atol=1e-7)
    np.testing.assert_array_equal(
        preference_models.probability(x) + preference_models.probability(-x), np.ones(len(x), np.float32)
    )


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


def context_state(model, params, x, first, second):
    """The state after the context written out: prompt, before, first, between, second, question."""
    return model.last_state(params, ragged([[*x, 14, *first, 15, 16, *second, 17]]))


@pytest.mark.parametrize("name", FORMS[:4])
def test_a_pairwise_logit_is_the_score_after_the_context_in_one_order_less_that_in_the_other(model, params, name):
    """The score is the answer's logit, half the log-odds of the answers, a head's, or half the answer's logit."""
    x, y, z = [5, 6], [4, 2], [3, 8, 2]
    preference, full = build(name, model, params)

    def score(a, b):
        state = context_state(model, params, x, a, b)
        logits = model.logits(params, state)[0]
        scores = {"pairwise": logits[9], "choice": 0.5 * (logits[9] - logits[11]), "one_order": 0.5 * logits[9]}
        return scores[name] if name in scores else (state @ full["pairwise"]["kernel"])[0]

    logit = preference.logit(full, ragged([x]), ragged([y]), ragged([z]))
    np.testing.assert_allclose(logit[0], score(y, z) - score(z, y), rtol=1e-5, atol=1e-5)
    assert preference.reward is None


def test_a_bradley_terry_logit_is_the_difference_of_rewards_after_each_response(model, params):
    x, y, z = [5, 6], [4, 2], [3, 8, 2]
    preference, full = build("bradley_terry", model, params)
    rewards = [model.last_state(params, ragged([[*x, *row]])) @ full["reward"]["kernel"] for row in (y, z)]
    np.testing.assert_allclose(preference.reward(full, ragged([x]), ragged([y])), rewards[0], atol=1e-5)
    logit = preference.logit(full, ragged([x]), ragged([y]), ragged([z]))
    np.testing.assert_allclose(logit, rewards[0] - rewards[1], atol=1e-5)


def test_the_papers_form_is_fitted_to_the_logit_of_one_order_and_asked_in_both(model, params):
    """The other forms are fitted to what is asked."""
    x, y, z = [5, 6], [4, 2], [3, 8, 2]
    preference, full = build("one_order", model, params)

    def shown(a, b):
        return model.logits(params, context_state(model, params, x, a, b))[0, 9]

    rows = [ragged([row]) for row in (x, y, z)]
    one, other = preference.fitted(full, *rows)[0], preference.fitted(full, rows[0], rows[2], rows[1])[0]
    np.testing.assert_allclose((one, other), (shown(y, z), shown(z, y)), rtol=1e-5, atol=1e-5)
    assert abs(one + other) > 0.01  # it is not odd
    np.testing.assert_allclose(preference.logit(full, *rows)[0], (one - other) / 2, rtol=1e-5, atol=1e-5)
    for form in set(FORMS) - {"one_order"}:
        odd, _ = build(form, model, params)
        assert odd.ordered is None and odd.fitted is odd.logit


def test_a_choice_needs_both_answers(model):
    with pytest.raises(UserError, match="needs both answers"):
        preference_models.choice(model, TEMPLATE._replace(other=None))


def test_bradley_terry_is_transitive_and_the_pairwise_forms_need_not_be(model, params):
    """Logits around a triangle sum to zero for a reward model alone."""
    x = ragged([[5, 6]])
    sides = [ragged([row]) for row in ([4, 2, 0], [3, 8, 2], [7, 7, 2])]

    def around(form):
        preference, full = build(form, model, params)
        return sum(preference.logit(full, x, sides[i], sides[(i + 1) % 3])[0] for i in range(3))

    assert abs(around("bradley_terry")) < 1e-4
    for form in FORMS[:4]:
        assert abs(around(form)) > 1e-3


@pytest.mark.parametrize("name", ["pairwise_head", "bradley_terry"])
def test_a_new_head_prefers_nothing(model, params, prompt, name):
    preference = getattr(preference_models, name)(model, TEMPLATE)
    heads = preference.init_heads()
    full = {**params, **heads}
    np.testing.assert_array_equal(preference.logit(full, prompt, ragged(FIRST), ragged(SECOND)), np.zeros(4))
    (head,) = heads
    assert jax.tree.map(np.shape, heads[head]) == {"kernel": (model.config.width,)}
    assert preference_models.pairwise(model, TEMPLATE).init_heads() == {}


def test_lexicographic_order_is_that_of_the_first_difference():
    a = Completion(jnp.array([[1, 5, 0], [1, 2, 9], [1, 2, 3]]), jnp.array([[1, 1, 0], [1, 1, 0], [1, 1, 1]], bool))
    b = Completion(jnp.array([[1, 4, 7], [1, 2, 4], [1, 2, 0]]), jnp.array([[1, 1, 1], [1, 1, 0], [1, 1, 1]], bool))
    assert preference_models.lexicographic_order(a, b).tolist() == [1, 0, 1]
    assert preference_models.lexicographic_order(b, a).tolist() == [-1, 0, -1]


def test_stacked_rows_interleave():
    a, b = Tokens(jnp.array([[1], [3]]), jnp.ones((2, 1), bool)), Tokens(jnp.array([[2], [4]]), jnp.ones((2, 1), bool))
    assert stack_rows([a, b]).tokens[:, 0].tolist() == [1, 2, 3, 4]
    assert stack_rows([a, b, a]).tokens[:, 0].tolist() == [1, 2, 1, 3, 4, 3]
