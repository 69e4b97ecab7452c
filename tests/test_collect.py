"""Collecting: who writes, who is asked about what, in which order, and what a response that loses outright is worth."""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax.pipeline.stages.policy_data import collect_functions
from alignjax.preferences.preference_models import PreferenceModel
from alignjax.sampling.samplers import mixture, moving_average, policy, reference
from alignjax.training.collect import (
    Collector,
    Frozen,
    PreferenceView,
    complete_batch,
    hide_tokens,
    is_blank,
    roles_of,
)
from alignjax.training.learn import COLLECT, all_trained, init_state, step_key
from alignjax.training.shared_tree import SharedTree
from alignjax.types import Completion, Extras, PreferenceBatch, Process, Response, Role, Roles, Sample
from tests.conftest import ragged
from tests.enumerated import as_policy

# --- a world of known answers: each network writes its own token, the preference model reads a table ---

VOCABULARY, STOP, BLANK = 8, 2, 0
WRITTEN = {"policy": 5, "reference": 6, "average": 7}
PROMPT = ragged([[1, 3], [4], [3, 3, 1]])


def logits_toward(token, strength, second=STOP):
    """Logits [2, V] of a network: the first token of a response, and every later one."""
    noise = jax.random.normal(jax.random.key(token), (2, VOCABULARY))
    return noise.at[0, token].set(strength).at[1, second].set(strength)


def prefill(params, prompt, max_new_tokens):
    """The process that writes by a table, whatever the prompt."""
    first, later = (jnp.broadcast_to(row, (len(prompt.tokens), VOCABULARY)) for row in params["logits"])
    return Process(lambda carry, token: (carry, later), jnp.zeros(len(prompt.tokens)), first)


def log_prob(params, prompt, completion):
    """Log-probs [B, T] under ``prefill``."""
    table = jax.nn.log_softmax(params["logits"])[jnp.minimum(jnp.arange(completion.tokens.shape[1]), 1)]
    chosen = jnp.take_along_axis(table[None], completion.tokens[..., None], -1)[..., 0]
    return jnp.where(completion.mask, chosen, 0.0)


def preference_logit(params, prompt, first, second):
    """The table's entry for the first tokens, and for every token that is shown 100 for the first, -100 for the second
    if it is the stop token. It depends on the prompt."""
    stops = [100.0 * jnp.sum(side.mask & (side.tokens == STOP), -1) for side in (first, second)]
    table = params["table"] - params["table"].T
    return table[first.tokens[:, 0], second.tokens[:, 0]] * prompt.mask.sum(-1) + stops[0] - stops[1]


def reward(params, prompt, response):
    return params["reward"][response.tokens[:, 0]] + 100.0 * jnp.sum(response.mask & (response.tokens == STOP), -1)


TABLE = {"table": jax.random.normal(jax.random.key(0), (VOCABULARY, VOCABULARY)), "reward": jnp.arange(8.0) ** 2 / 20}
SURE = Roles(*({"logits": logits_toward(token, 40.0)} for token in WRITTEN.values()), TABLE)
PAIRWISE = PreferenceModel(dict, preference_logit, None)
REWARD = PreferenceModel(dict, preference_logit, reward)
ALL = ((0, 1), (0, 2), (1, 2))


def collector(samplers, *, scored=(0,), compared=((0, 1),), preference=PAIRWISE, unfinished_loses=True, unseen=(STOP,)):
    objective = types.SimpleNamespace(scored=scored, compared=compared, extras=Extras())
    model = types.SimpleNamespace(prefill=prefill)
    scorer = as_policy(log_prob)
    return Collector(model, samplers, 3, ((STOP,),), unseen, (BLANK,), objective, scorer, preference, unfinished_loses)


def collect(samplers, roles=SURE, prompt=PROMPT, key=0, **options):
    return collector(samplers, **options).collect(roles, prompt, jax.random.key(key))


def table_logit(first, second, prompt=PROMPT):
    """The logit that the preference model has for two responses with these first tokens, [B]."""
    table = np.asarray(TABLE["table"] - TABLE["table"].T)
    return table[first, second] * prompt.mask.sum(-1)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x)))


def first_tokens(batch):
    return [np.asarray(response.completion.tokens[:, 0]).tolist() for response in batch.responses]


@pytest.mark.parametrize(
    ("samplers", "writers"),
    [
        ((policy, reference), ("policy", "reference")),
        ((policy, moving_average), ("policy", "average")),
        ((reference, policy), ("reference", "policy")),
        ((mixture(1.0), moving_average), ("reference", "average")),
        ((policy, policy), ("policy", "policy")),
    ],
)
def test_each_response_is_written_by_its_sampler_and_the_first_is_asked_about_first(samplers, writers):
    """Entry [0, 1] is P(y_0 > y_1), and not the reverse."""
    batch = collect(samplers)
    first, second = (WRITTEN[writer] for writer in writers)
    assert first_tokens(batch) == [[first] * 3, [second] * 3]
    want = sigmoid(table_logit(first, second))
    np.testing.assert_allclose(batch.preference[:, 0, 1], want, rtol=1e-5)
    np.testing.assert_allclose(batch.preference[:, 1, 0], 1 - want, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(batch.probability(0, 1), batch.preference[:, 0, 1])
    if first != second:
        assert np.abs(want - 0.5).min() > 0.05
    jax.tree.map(np.testing.assert_array_equal, batch.prompt, PROMPT)


@pytest.mark.parametrize("scored", [(0,), (1,), (0, 1)])
def test_reference_log_probs_are_the_reference_s_of_those_responses_that_the_objective_reads(scored):
    batch = collect((policy, moving_average), scored=scored)
    for k, (response, role) in enumerate(zip(batch.responses, (SURE.policy, SURE.average), strict=True)):
        np.testing.assert_allclose(response.behavior_logp, log_prob(role, PROMPT, response.completion), atol=1e-6)
        if k not in scored:
            assert response.reference_logp is None
            continue
        want = log_prob(SURE.reference, PROMPT, response.completion)
        np.testing.assert_allclose(response.reference_logp, want, atol=1e-6)
        assert np.abs(want - response.behavior_logp)[:, 0].min() > 1


def test_stop_tokens_that_the_preference_model_never_saw_are_masked_for_it_alone():
    """Of a finished and an unfinished response the table alone counts; shown, the stop token would add 100."""
    samplers, roles = (policy, reference), SURE._replace(policy={"logits": logits_toward(5, 40.0, second=5)})
    for unseen, extra in (((STOP,), 0.0), ((), -100.0), ((STOP, 5), 0.0)):
        batch = collect(samplers, roles, unseen=unseen, unfinished_loses=False)
        assert [np.all(r.finished) for r in batch.responses] == [False, True]
        np.testing.assert_allclose(batch.probability(0, 1), sigmoid(table_logit(5, 6) + extra), rtol=1e-4, atol=1e-30)
        assert batch.responses[1].completion.tokens[:, 1].tolist() == [STOP] * 3
        assert np.asarray(batch.responses[1].completion.mask).sum(1).tolist() == [2] * 3  # the policy learns the stop
    shown = hide_tokens(Completion(jnp.array([[4, STOP, 5]]), jnp.array([[True, True, False]])), (STOP, 7))
    assert shown.mask.tolist() == [[True, False, False]] and shown.tokens.tolist() == [[4, STOP, 5]]


@pytest.mark.parametrize("preference", [PAIRWISE, REWARD], ids=["pairwise", "reward"])
def test_an_unfinished_response_loses_to_a_finished_one_and_ties_with_another_where_asked(preference):
    """Writers: the policy never stops, the reference and the average do."""
    roles = SURE._replace(policy={"logits": logits_toward(5, 40.0, second=5)})
    samplers, options = (policy, reference, policy), dict(compared=ALL, preference=preference)
    strict = collect(samplers, roles, unfinished_loses=True, **options)
    assert [np.unique(strict.probability(i, j)).tolist() for i, j in ALL] == [[0.0], [0.5], [1.0]]
    assert [np.unique(r.finished).tolist() for r in strict.responses] == [[False], [True], [False]]
    lenient = collect(samplers, roles, unfinished_loses=False, **options)
    values = np.asarray(TABLE["reward"])
    margin = values[5] - values[6] if preference is REWARD else table_logit(5, 6)
    np.testing.assert_allclose(lenient.probability(0, 1), np.broadcast_to(sigmoid(margin), 3), rtol=1e-5)
    assert np.all(lenient.probability(0, 2) == 0.5)
    if preference is REWARD:
        for batch in (strict, lenient):
            np.testing.assert_allclose(batch.reward, [[values[5], values[6], values[5]]] * 3, rtol=1e-6)
        assert strict.margin(0, 1).tolist() == [-np.inf] * 3 and strict.margin(0, 2).tolist() == [0.0] * 3
        np.testing.assert_allclose(lenient.margin(0, 1), [values[5] - values[6]] * 3, rtol=1e-5)


@pytest.mark.parametrize(
    ("written", "preference"),
    [((STOP, STOP), PAIRWISE), ((BLANK, STOP), REWARD), ((BLANK, BLANK), PAIRWISE)],
    ids=["empty", "blank, by rewards", "blank without end"],
)
def test_a_blank_response_loses_to_every_other_and_ties_with_another(written, preference):
    """The preference model was fitted on replies with text; what it says of others would be learned as if it were true.

    Here it prefers the blank response, to the reference's with probability 1.
    """
    first, second = written
    roles = SURE._replace(policy={"logits": logits_toward(first, 40.0, second)})
    fond = {**TABLE, "table": TABLE["table"].at[first].set(50.0).at[:, first].set(-50.0)}
    roles = roles._replace(preference={**fond, "reward": TABLE["reward"].at[first].set(50.0)})
    batch = collect(
        (policy, reference, policy), roles, compared=ALL, preference=preference, unfinished_loses=False, unseen=(STOP,)
    )
    assert first_tokens(batch) == [[first] * 3, [6] * 3, [first] * 3]
    assert [np.unique(batch.probability(i, j)).tolist() for i, j in ALL] == [[0.0], [0.5], [1.0]]


def test_a_completion_is_blank_if_only_blank_tokens_and_a_stop_sequence_are_in_it():
    """All completions of up to four tokens over a vocabulary of five, against the definition on lists."""
    stop, blank = ((2,), (3, 4)), (0, 1)
    rows = [list(row) for length in range(5) for row in itertools.product(range(5), repeat=length)]

    def without_stop(row):
        return [row, *(row[: -len(s)] for s in stop if tuple(row[-len(s) :]) == s)]

    want = [any(set(rest) <= set(blank) for rest in without_stop(row)) for row in rows]
    np.testing.assert_array_equal(is_blank(ragged(rows, 4), stop, blank), want)
    np.testing.assert_array_equal(is_blank(ragged(rows, 6), (*stop, (3, 4, 4, 4, 4, 4, 4)), blank), want)
    assert 30 < sum(want) < len(want) / 2


def test_rewards_are_each_response_s_own_and_preferences_follow_them():
    batch = collect((reference, policy, moving_average), compared=ALL, preference=REWARD)
    values = np.asarray(TABLE["reward"])[[6, 5, 7]]
    np.testing.assert_allclose(batch.reward, [values] * 3, rtol=1e-6)
    for i, j in ALL:
        np.testing.assert_allclose(batch.probability(i, j), [sigmoid(values[i] - values[j])] * 3, rtol=1e-5)
        np.testing.assert_allclose(batch.margin(j, i), [values[j] - values[i]] * 3, rtol=1e-5)
    with pytest.raises(ValueError, match="no rewards"):
        collect((policy, reference)).margin(0, 1)


def test_a_pair_that_was_not_compared_is_one_half_and_is_refused():
    batch = collect((policy, reference, moving_average), compared=((0, 2),))
    assert batch.compared == ((0, 2),)
    np.testing.assert_allclose(batch.probability(0, 2), sigmoid(table_logit(5, 7)), rtol=1e-5)
    np.testing.assert_allclose(batch.probability(2, 0), sigmoid(table_logit(7, 5)), rtol=1e-5)
    np.testing.assert_array_equal(batch.probability(1, 1), np.full(3, 0.5))
    for i, j in ((0, 1), (1, 0), (1, 2)):
        assert np.all(batch.preference[:, i, j] == 0.5)
        with pytest.raises(ValueError, match="were not compared"):
            batch.probability(i, j)


def test_an_objective_that_reads_rewards_alone_compares_no_pair():
    batch = collect((policy, reference, moving_average), compared=(), preference=REWARD)
    np.testing.assert_array_equal(batch.preference, np.full((3, 3, 3), 0.5))
    np.testing.assert_allclose(batch.reward, [np.asarray(TABLE["reward"])[[5, 6, 7]]] * 3, rtol=1e-6)


def test_preferences_of_both_orders_sum_to_one_exactly():
    noisy = Roles(*({"logits": logits_toward(token, 1.0, 4)} for token in WRITTEN.values()), TABLE)
    prompt = ragged([[1] * (1 + b % 5) for b in range(64)])
    batch = collect((policy, mixture(0.4), moving_average), noisy, prompt, compared=ALL, unfinished_loses=False)
    np.testing.assert_array_equal(
        batch.preference + jnp.swapaxes(batch.preference, 1, 2), np.ones((64, 3, 3), np.float32)
    )
    assert len(np.unique(batch.preference)) > 30


def test_no_gradient_flows_through_a_collected_batch():
    def total(roles):
        floats = [
            x
            for x in jax.tree.leaves(collect((policy, mixture(0.5)), roles, preference=REWARD, scored=(0, 1)))
            if jnp.issubdtype(jnp.asarray(x).dtype, jnp.floating)
        ]
        return sum(map(jnp.sum, floats))

    assert optax.tree.norm(jax.grad(total)(SURE)) == 0


# --- the step: its roles and its keys ---

NOISY = {name: {"logits": logits_toward(token, 1.5, 4)} for name, token in WRITTEN.items()}


def functions(samplers, **options):
    parts = types.SimpleNamespace(assemble=all_trained)
    functions = collect_functions(collector(samplers, **options), parts)
    return dict(zip(("collect", "draw", "compare"), map(jax.jit, functions), strict=True))


def state_at(step, params, average, key=3):
    state = init_state(params, optax.sgd(0.1), jax.random.key(key), False)
    return dataclasses.replace(state, step=jnp.int32(step), average=average)


def test_every_role_of_a_step_has_its_own_parameters():
    """Each network writes its own token; an exchange of two would write another's."""
    state = state_at(0, SURE.policy, SURE.average)
    frozen = Frozen(None, SURE.reference, TABLE)
    batch = functions((policy, reference, moving_average), compared=ALL, scored=(0, 1, 2))["collect"](
        state, SharedTree(frozen), PROMPT
    )
    assert first_tokens(batch) == [[5] * 3, [6] * 3, [7] * 3]
    for response in batch.responses:
        want = log_prob(SURE.reference, PROMPT, response.completion)
        np.testing.assert_allclose(response.reference_logp, want, atol=1e-5)
    np.testing.assert_allclose(batch.probability(1, 2), sigmoid(table_logit(6, 7)), rtol=1e-5)

    def assemble(params, frozen):
        return {"assembled": params, "over": frozen.base}

    roles = roles_of(state, frozen._replace(base={"b": 1}), assemble)
    assert roles[Role.POLICY] == {"assembled": state.params, "over": {"b": 1}}
    assert roles[Role.AVERAGE] == {"assembled": state.average, "over": {"b": 1}}
    assert roles[Role.REFERENCE] is SURE.reference and roles.preference is TABLE
    assert roles_of(dataclasses.replace(state, average={}), Frozen(), all_trained)[1:] == ({}, {}, {}, {})


def test_batches_of_two_steps_rows_of_one_prompt_and_samplers_of_one_network_draw_differently():
    draw, frozen = functions((policy, policy))["draw"], SharedTree(Frozen(None, NOISY["reference"], TABLE))
    prompt = ragged([[3, 4]] * 16)

    def tokens(step, key=3):
        samples = draw(state_at(step, NOISY["policy"], {}, key), frozen, prompt)
        return [np.asarray(s.completion.tokens) for s in samples]

    at_0, again, at_1, other_key = tokens(0), tokens(0), tokens(1), tokens(0, key=4)
    for k in (0, 1):
        np.testing.assert_array_equal(at_0[k], again[k])
        for other in (at_1, other_key):
            assert np.mean(np.any(at_0[k] != other[k], -1)) > 0.5
        assert len({tuple(row) for row in at_0[k].tolist()}) > 8
    assert np.mean(np.any(at_0[0] != at_0[1], -1)) > 0.5


def test_drawing_and_comparing_in_two_programs_is_collecting_in_one():
    """What the preference model reads lies between: here, the policy's own tokens without the stop token."""
    compiled = functions((policy, mixture(0.4)), scored=(0, 1))
    state, frozen = state_at(2, NOISY["policy"], {}), SharedTree(Frozen(None, NOISY["reference"], TABLE))
    samples = compiled["draw"](state, frozen, PROMPT)
    view = collector((policy, mixture(0.4))).view(PROMPT, samples)
    two = compiled["compare"](state, frozen, PROMPT, samples, view)
    assert not np.all(np.stack(view.accepted)) and np.any(np.stack(view.accepted))
    jax.tree.map(np.testing.assert_array_equal, two, compiled["collect"](state, frozen, PROMPT))
    roles = Roles(NOISY["policy"], NOISY["reference"], {}, TABLE)
    direct = collector((policy, mixture(0.4))).draw(roles, PROMPT, step_key(state, COLLECT))
    for a, b in zip(samples, direct, strict=True):
        np.testing.assert_array_equal(a.completion.tokens, b.completion.tokens)


def test_pairs_on_disk_are_completed_by_the_reference():
    first, second = ragged([[5, 2], [6], [4, 4, 2]], 3), ragged([[6, 2], [7, 5], [3]], 3)
    batch = PreferenceBatch(PROMPT, (Response(first), Response(second)), jnp.full((3, 2, 2), 0.5))
    for scored in ((0,), (0, 1)):
        objective = types.SimpleNamespace(scored=scored, extras=Extras())
        done = complete_batch(objective, as_policy(log_prob), SURE, batch)
        for k, side in enumerate((first, second)):
            if k in scored:
                np.testing.assert_array_equal(done.responses[k].reference_logp, log_prob(SURE.reference, PROMPT, side))
            else:
                assert done.responses[k].reference_logp is None
        np.testing.assert_array_equal(done.preference, batch.preference)


def test_a_refused_response_loses_to_an_accepted_one_and_ties_with_another():
    samples = [Sample(ragged([[5, 2]] * 3), jnp.zeros((3, 2)), jnp.ones(3, bool)) for _ in range(2)]
    accepted = jnp.array([True, False, False]), jnp.array([False, True, False])
    view = PreferenceView(PROMPT, tuple(s.completion for s in samples), accepted)

    def logit(params, prompt, first, second):
        return jnp.full(3, 2.0)

    compare = functools.partial(
        collector((policy, policy), preference=PreferenceModel(dict, logit, None)).compare,
        SURE, PROMPT, tuple(samples),
    )  # fmt: skip
    assert compare(view).probability(0, 1).tolist() == [1.0, 0.0, 0.5]
    every = jnp.ones(3, bool)
    asked = compare(dataclasses.replace(view, accepted=(every, every))).probability(0, 1)
    np.testing.assert_allclose(asked, [sigmoid(2.0)] * 3, rtol=1e-6)
    unfinished = [s._replace(finished=jnp.array([False, True, True])) for s in samples]
    both = collector((policy, policy)).compare(SURE, PROMPT, (unfinished[0], samples[1]), view)
    assert both.probability(0, 1).tolist() == [0.5, 0.0, 0.5]  # accepted and unfinished ties with refused
