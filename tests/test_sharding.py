"""Meshes and sharding rules: every parameter has a rule, wrong sizes are refused, and the mesh changes no number."""

import dataclasses
import functools
from functools import partial

import jax
import numpy as np
import optax
import pytest

from alignjax import losses
from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.models.decoder import decoder
from alignjax.models.log_probs import log_prob
from alignjax.models.tokenizer import Tokenizer, pad
from alignjax.objectives import PreferenceGradient
from alignjax.preferences.preference_models import TemplateTokens, bradley_terry, pairwise, pairwise_head
from alignjax.sampling.generate import Generator, ReplyFormat, reply_writer
from alignjax.sampling.process import Sampling
from alignjax.sampling.samplers import mixture, policy
from alignjax.training import data
from alignjax.training.collect import Collector, Frozen, roles_of
from alignjax.training.learn import COLLECT, UpdateSchedule, all_trained, init_state, make_learn, step_key
from tests.conftest import TINY, compilations, ragged
from tests.enumerated import as_policy

P = jax.sharding.PartitionSpec


@pytest.mark.parametrize(("sizes", "shape"), [((-1, 1, 1), (8, 1, 1)), ((2, 2, 2), (2, 2, 2)), ((1, -1, 2), (1, 4, 2))])
def test_minus_one_means_the_rest(sizes, shape):
    assert tuple(sharding.make_mesh(sharding.Mesh(*sizes)).shape.values()) == shape


@pytest.mark.parametrize("sizes", [(3, 1, 1), (2, 2, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 1), (16, 1, 1)])
def test_a_mesh_that_does_not_divide_is_refused(sizes):
    with pytest.raises(UserError, match="mesh"):
        sharding.make_mesh(sharding.Mesh(*sizes))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("form", [None, pairwise, pairwise_head, bradley_terry])
def test_rules_are_total_and_live(tied, form):
    """Every parameter has a rule, and every rule has a parameter."""
    model = decoder(dataclasses.replace(TINY, tied=tied))
    shapes, rules = jax.eval_shape(model.init, jax.random.key(0)), model.rules
    if form:
        built = form(model, TemplateTokens((), (), (), 1))
        heads = jax.eval_shape(built.init_heads)
        shapes, rules = {**shapes, **heads}, (*((rf"^{head}/", P()) for head in heads), *model.rules)
    specs = sharding.shardings(shapes, rules, sharding.make_mesh(sharding.Mesh(2, 2, 2)))
    assert specs["blocks"]["q"]["kernel"].spec == P(None, "fsdp", "tensor")


def test_a_parameter_without_a_rule_and_a_rule_without_a_parameter_are_refused():
    mesh, tree = sharding.make_mesh(sharding.Mesh()), {"a": {"w": np.zeros((8, 8))}, "b": np.zeros(8)}
    with pytest.raises(UserError, match="claims b"):
        sharding.shardings(tree, (("a/w", P()),), mesh)
    with pytest.raises(UserError, match="'c'"):
        sharding.shardings(tree, (("a/w", P()), ("b", P()), ("c", P())), mesh)


def test_an_indivisible_dimension_is_named():
    mesh = sharding.make_mesh(sharding.Mesh(1, 1, 8))
    with pytest.raises(UserError, match="w: dimension 12 does not divide over tensor=8"):
        sharding.shardings({"w": np.zeros((16, 12))}, (("w", P(None, "tensor")),), mesh)


def test_optimiser_moments_lie_as_their_parameters_do(model, params):
    mesh = sharding.make_mesh(sharding.Mesh(2, 2, 2))
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    shapes = jax.eval_shape(lambda p: init_state(p, optimizer, jax.random.key(0), True), params)
    layout = sharding.shardings(shapes, sharding.matching_rules(model.rules, shapes.params), mesh, strict=False)
    moments = layout.opt_state[1][0].mu
    assert jax.tree.leaves(moments) == jax.tree.leaves(layout.params) == jax.tree.leaves(layout.average)
    assert layout.step.spec == P()


@pytest.fixture(scope="module")
def nash_md_update(params, other_params):
    """Returns (mesh sizes) -> the parameters after two Nash-MD steps, and their metrics."""
    model = decoder(TINY)
    score = log_prob(model)
    objective = PreferenceGradient(partial(losses.nash_md, tau=0.1))
    form = pairwise(model, TemplateTokens((14,), (15,), (16,), 9))
    collector = Collector(model, (policy, mixture(0.3)), 6, ((2,),), (), (), objective, as_policy(score), form, True)
    optimizer = optax.adam(1e-2)
    rows = [[3 + i, 4 + i, *range(5, 5 + i % 3)] for i in range(8)]

    @functools.cache
    def run(sizes, accumulate=1):
        devices = jax.devices()[: max(1, int(np.prod(sizes)))]
        mesh = sharding.make_mesh(sharding.Mesh(*sizes), devices)
        shapes = jax.eval_shape(lambda p: init_state(p, optimizer, jax.random.key(0), False), params)
        layout = sharding.shardings(shapes, sharding.matching_rules(model.rules, shapes.params), mesh, strict=False)
        learn = make_learn(
            partial(objective, policy=as_policy(score)), optimizer, UpdateSchedule(accumulate=accumulate)
        )

        def collect_and_learn(state, frozen, prompt):
            roles = roles_of(state, frozen, all_trained)
            return learn(state, frozen, collector.collect(roles, prompt, step_key(state, COLLECT)))

        update = jax.jit(
            collect_and_learn,
            in_shardings=(layout, None, sharding.row_sharding(mesh)), out_shardings=(layout, sharding.replicated(mesh)),
        )  # fmt: skip
        with jax.set_mesh(mesh):
            place = partial(jax.device_put, device=layout.params)
            frozen = Frozen(None, place(other_params), place(other_params))
            state = jax.device_put(init_state(params, optimizer, jax.random.key(7), False), layout)
            batch = ragged(rows)
            with compilations() as warm:
                state, metrics = update(state, frozen, batch)
            assert warm, "the counter counts nothing"
            with compilations() as count:
                first_metrics = metrics
                state, metrics = update(state, frozen, batch)
            assert not count, f"compiled again after warm-up: {count}"
            both = jax.tree.map(float, [first_metrics, metrics])
        return jax.tree.map(np.asarray, state.params), both

    return run


@pytest.mark.parametrize("sizes", [(2, 2, 2), (1, 2, 4)])  # 4 parts of 2 heads of keys and values
def test_the_mesh_changes_no_number(nash_md_update, sizes):
    want, metrics = nash_md_update((1, 1, 1))
    got, sharded_metrics = nash_md_update(sizes)
    assert [set(row) for row in metrics] == [set(row) for row in sharded_metrics]
    for a, b in zip(metrics, sharded_metrics, strict=True):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=2e-3, atol=1e-4, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=2e-3), want, got)


def test_accumulated_gradients_are_those_of_the_whole_batch(nash_md_update):
    (want, metrics), (got, parts) = nash_md_update((1, 1, 1)), nash_md_update((1, 1, 1), accumulate=4)
    for a, b in zip(metrics, parts, strict=True):
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-3, atol=1e-5, err_msg=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-3), want, got)


def test_prompts_of_every_length_compile_once_a_bucket_and_never_again(model, params):
    """This holds for writing and for the batches of a training loop, in an order that changes the bucket every time."""
    mesh, buckets, letters = sharding.make_mesh(sharding.Mesh()), (8, 16, 32), Tokenizer(
        list, list, lambda ids: "", lambda piece: None, TINY.vocab_size, lambda folder: None
    )  # fmt: skip
    prompts = [[3 + i % 20 for i in range(length)] for length in np.random.default_rng(0).permutation(np.arange(1, 33))]
    with jax.set_mesh(mesh):
        generate = Generator(
            reply_writer(model, ((2,),), 4, Sampling(), mesh), params, letters, ReplyFormat(((2,),), ""),
            buckets=buckets, batch=8, key=jax.random.key(0), mesh=mesh, score=None, owner="test",
        )  # fmt: skip
        plan = data.plan_batches([len(row) for row in prompts], buckets, 8, 0)
        batches = data.load_batches(plan, lambda p: pad([prompts[i] for i in p.indices], p.length), mesh, 0, 16)
        score = log_prob(model)
        update = jax.jit(lambda p, prompt: jax.grad(lambda p: score(p, prompt, prompt).sum())(p))
        with compilations() as warm:
            generate(prompts, range(32), 0)
            shapes = {batch.tokens.shape: update(params, batch) for batch in batches}
        assert len(shapes) == len(buckets) and warm
        with compilations() as count:
            for seed in (1, 2):
                order = np.random.default_rng(seed).permutation(32)
                generate([prompts[i] for i in order], range(32), seed)
            for batch in data.load_batches(
                plan, lambda p: pad([prompts[i] for i in p.indices], p.length), mesh, 16, 48
            ):
                update(params, batch)
        assert not count, f"compiled again after warm-up: {count}"
