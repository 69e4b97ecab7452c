"""Adapters: the base untouched and shared, the scale, the merge, and what is trained."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax import losses
from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.models import lora
from alignjax.models.build import build
from alignjax.models.log_probs import log_prob
from alignjax.models.lora import Lora
from alignjax.models.t5 import T5Config
from alignjax.objectives import PreferenceGradient
from alignjax.sampling.process import geometric_mixture
from alignjax.sampling.samplers import joint_process, mixture
from alignjax.training.collect import Frozen, roles_of
from alignjax.training.learn import init_state, make_learn
from alignjax.types import Response, pair_batch
from tests.conftest import TINY, ragged
from tests.enumerated import as_policy

T5 = T5Config(vocab_size=24, width=16, layers=1, decoder_layers=2, heads=4, head_dim=4, hidden=24)
SPEC = Lora(rank=3, alpha=12.0, targets=("q", "v", "down"))
PROMPT, REPLY = ragged([[5, 6, 7], [8, 9]], 4), ragged([[4, 2], [5, 6, 2]])


def randomized(adapters, key=5):
    """Adapters of the same shapes with every B away from zero."""
    leaves, tree = jax.tree.flatten(adapters)
    keys = jax.random.split(jax.random.key(key), len(leaves))
    return tree.unflatten([0.3 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


@pytest.fixture(scope="module", params=[TINY, T5], ids=["decoder", "t5"])
def world(request):
    """A model, its base, adapters, and its compiled log-probs."""
    model = build(request.param)
    base = model.init(jax.random.key(0))
    return model, base, randomized(lora.init_adapters(SPEC, base, jax.random.key(1))), jax.jit(log_prob(model))


def test_new_adapters_change_nothing(world):
    _, base, _, score = world
    adapters = lora.init_adapters(SPEC, base, jax.random.key(1))
    assert all(np.abs(x).max() > 0 for path, x in leaves(adapters) if path.endswith("/a"))
    adapted = lora.overlay(base, adapters, SPEC.scale)
    np.testing.assert_array_equal(score(adapted, PROMPT, REPLY), score(base, PROMPT, REPLY))


@pytest.mark.parametrize("world", [TINY], indirect=True)
def test_adapters_of_abstract_parameters_are_abstract(world):
    """Plans are made of shapes alone; the shapes and dtypes are those of the arrays."""
    _, base, adapters, _ = world
    abstract_base, abstract_adapters = (jax.eval_shape(lambda tree=tree: tree) for tree in (base, adapters))
    created = jax.eval_shape(lambda tree, key: lora.init_adapters(SPEC, tree, key), abstract_base, jax.random.key(1))
    assert created == abstract_adapters
    overlaid = lora.overlay(abstract_base, abstract_adapters, SPEC.scale)
    assert overlaid == jax.eval_shape(lambda: lora.overlay(base, adapters, SPEC.scale))


def test_a_merged_tree_is_the_same_function_at_the_given_scale(world):
    """Against W + (alpha / rank) A B written out, layer by layer."""
    _, base, adapters, score = world
    adapted = lora.overlay(base, adapters, SPEC.scale)
    by_hand = jax.tree.map(np.asarray, base)
    for path, part in by_projection(adapters):
        node = functools.reduce(lambda tree, name: tree[name], path, by_hand)
        node["kernel"] = np.stack(
            [w + 12.0 / 3 * a @ b for w, a, b in zip(node["kernel"], part["a"], part["b"], strict=True)]
        )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), lora.merge(adapted), by_hand)
    np.testing.assert_allclose(score(adapted, PROMPT, REPLY), score(by_hand, PROMPT, REPLY), atol=2e-5)
    assert np.abs(score(adapted, PROMPT, REPLY) - score(base, PROMPT, REPLY)).max() > 0.05


@pytest.mark.parametrize("world", [TINY], indirect=True)
def test_an_overlay_holds_the_base_s_own_arrays(world):
    """Policy, reference, preference model and opponent share one base in memory."""
    _, base, adapters, _ = world
    adapted = lora.overlay(base, adapters, SPEC.scale)
    shared = {path: x for path, x in leaves(adapted) if "/lora/" not in path}
    assert dict(leaves(base)).keys() == shared.keys()
    assert all(shared[path] is x for path, x in leaves(base))


def test_cached_decoding_with_adapters_equals_the_full_forward(world):
    model, base, adapters, score = world
    adapted = lora.overlay(base, adapters, SPEC.scale)

    @jax.jit
    def decoded(params):
        process = model.prefill(params, PROMPT, 3)
        _, logits = process.step(process.carry, REPLY.tokens[:, 0])
        return jnp.stack([process.logits, logits], 1)

    logp = jax.nn.log_softmax(decoded(adapted))
    chosen = np.take_along_axis(np.asarray(logp), np.asarray(REPLY.tokens)[:, :2, None], -1)[..., 0]
    np.testing.assert_allclose(chosen, score(adapted, PROMPT, REPLY)[:, :2], atol=2e-5)


@pytest.mark.parametrize("world", [TINY], indirect=True)
def test_the_mixture_s_reference_is_the_base_and_not_the_adapted_policy(world):
    """If policy and reference shared their adapters, every beta would give the policy."""
    model, base, adapters, _ = world

    def assemble(trained, frozen):
        return lora.overlay(frozen.base, trained, SPEC.scale)

    @functools.partial(jax.jit, static_argnames="beta")
    def mixture_logp(base, adapters, beta):
        state = init_state(adapters, optax.sgd(1.0), jax.random.key(0), False)
        roles = roles_of(state, Frozen(base, base), assemble)
        process = joint_process(lambda params, prompt: model.prefill(params, prompt, 3), roles, [mixture(beta)], PROMPT)
        return jax.nn.log_softmax(process.logits)

    adapted = lora.overlay(base, adapters, 4.0)
    sides = [model.prefill(params, PROMPT, 3) for params in (adapted, base)]
    policy, reference = (jax.nn.log_softmax(side.logits) for side in sides)
    np.testing.assert_allclose(mixture_logp(base, adapters, 1.0), reference, atol=2e-5)
    np.testing.assert_allclose(mixture_logp(base, adapters, 0.0), policy, atol=2e-5)
    half = mixture_logp(base, adapters, 0.5)
    np.testing.assert_allclose(half, jax.nn.log_softmax(geometric_mixture(*sides, 0.5).logits), atol=2e-5)
    assert np.abs(half - policy).max() > 0.01 and np.abs(half - reference).max() > 0.01


@pytest.mark.parametrize("world", [TINY], indirect=True)
def test_training_moves_the_adapters_alone_and_as_the_full_gradient_says(world):
    """dL/dB = scale A^T dL/dW and dL/dA = scale dL/dW B^T, of the gradient at the merged weights."""
    model, base, adapters, _ = world
    response = Response(REPLY, reference_logp=np.zeros(REPLY.mask.shape, np.float32))
    rows = pair_batch(PROMPT, response, response, np.array([0.9, 0.2], np.float32))
    gradient = PreferenceGradient(functools.partial(losses.nash_md, tau=0.1))
    objective = functools.partial(gradient, policy=as_policy(log_prob(model)))
    optimizer = optax.sgd(1.0)

    def assemble(trained, frozen):
        return lora.overlay(frozen.base, trained, SPEC.scale)

    learn = jax.jit(make_learn(objective, optimizer, assemble=assemble))
    state = init_state(adapters, optimizer, jax.random.key(0), False)
    after, _ = learn(state, Frozen(base), rows)
    merged = lora.merge(lora.overlay(base, adapters, SPEC.scale))
    full = jax.jit(jax.grad(lambda p: objective(p, rows, None)[0]))(merged)
    for path, part in by_projection(adapters):
        moved = functools.reduce(lambda tree, name: tree[name], path, after.params)["lora"]
        gradient = functools.reduce(lambda tree, name: tree[name], path, full)["kernel"]
        for side, want in (
            ("a", SPEC.scale * jnp.einsum("lio,lro->lir", gradient, part["b"])),
            ("b", SPEC.scale * jnp.einsum("lir,lio->lro", part["a"], gradient)),
        ):
            np.testing.assert_allclose(part[side] - moved[side], want, atol=2e-4, err_msg=str((path, side)))


def test_rules_claim_adapters_and_a_wrong_target_is_named(world):
    _, base, adapters, _ = world
    specs = sharding.shardings(adapters, lora.ADAPTER_RULES, sharding.make_mesh(sharding.Mesh(2, 2, 2)))
    assert all(spec.is_fully_replicated for spec in jax.tree.leaves(specs))
    with pytest.raises(UserError, match=r"'queries'.*down.*q"):
        lora.init_adapters(Lora(2, 4.0, ("q", "queries")), base, jax.random.key(0))
    for change in ({"rank": 0}, {"alpha": 0.0}, {"rank": 2.5}, {"targets": ()}):
        with pytest.raises(UserError, match=r"rank|alpha|target"):
            dataclasses.replace(SPEC, **change)
    assert Lora(2, 4.0, ("v", "q", "q")) == Lora(2, 4.0, ("q", "v"))


def leaves(tree):
    return [(sharding.path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]


def by_projection(adapters, path=()):
    """Yields (path of the projection, {"a", "b"}) for each adapter."""
    for name, part in adapters.items():
        if name == "lora":
            yield path, part
        else:
            yield from by_projection(part, (*path, name))
