"""Chunked log-probs: values and gradients of a plain softmax, in less memory, with little communication."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax.distributed import sharding
from alignjax.losses import nash_md
from alignjax.models import log_probs, lora
from alignjax.models.build import build
from alignjax.models.log_probs import log_prob, policy_functions, token_log_probs
from alignjax.models.lora import Lora
from alignjax.models.t5 import T5Config
from alignjax.objectives import PreferenceGradient
from alignjax.preferences.preference_models import TemplateTokens, pairwise
from alignjax.sampling import samplers as samplers_of
from alignjax.training.collect import Collector, Frozen, roles_of
from alignjax.training.learn import COLLECT, all_trained, init_state, make_learn, step_key
from tests.conftest import TINY, ragged

T5 = T5Config(vocab_size=24, width=16, layers=1, decoder_layers=1, heads=4, head_dim=4, hidden=24)
HEADS = {
    "tied": TINY,
    "untied, bfloat16": dataclasses.replace(TINY, tied=False, compute_dtype="bfloat16"),
    "capped": dataclasses.replace(TINY, logit_cap=1.5),
    "scaled": T5,
    "t5, untied": dataclasses.replace(T5, tied=False, scaled_output=False),
}
ROWS, LENGTH = 8, 7


def close(got, want, rtol=1e-5, atol=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol, atol), got, want)


def random_params(abstract):
    """Returns parameters of those shapes, so large that each changes the result."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(x.dtype), abstract)


def abstract_params(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def plain_log_probs(logits_fn, params, states, targets):
    """``token_log_probs`` from logits [B, T, V]."""
    return jnp.take_along_axis(jax.nn.log_softmax(logits_fn(params, states)), targets[..., None], -1)[..., 0]


def random_inputs(length=LENGTH):
    """Returns states, targets and weights of the log-probs."""
    rng = np.random.default_rng(1)
    states = rng.normal(0, 3, (ROWS, length, TINY.width)).astype(np.float32)
    return states, rng.integers(0, 23, (ROWS, length)), rng.normal(size=(ROWS, length)).astype(np.float32)


def loss(score, logits_fn, params, states, targets, weights):
    logp = score(logits_fn, params, states, targets)
    return jnp.sum(weights * logp), logp


def gradient(score, logits_fn):
    """Returns (params, states, targets, weights) -> (gradients of params and states, log-probs)."""
    return jax.grad(functools.partial(loss, score, logits_fn), (0, 1), has_aux=True)


@pytest.mark.parametrize("name", HEADS)
def test_values_and_gradients_are_the_plain_softmax_s(name):
    """For every parameter and state, whether or not chunks divide the tokens."""
    model, chunks = build(HEADS[name]), (5, 14, None) if name == "tied" else (5,)

    @jax.jit
    def chunked_and_plain(*arguments):
        chunked = [gradient(functools.partial(token_log_probs, chunk=n), model.logits)(*arguments) for n in chunks]
        return chunked, gradient(plain_log_probs, model.logits)(*arguments)

    chunked, want = chunked_and_plain(random_params(abstract_params(model)), *random_inputs())
    assert sum(x.any() for x in jax.tree.leaves(want[0][0])) == 1  # the head alone
    for got in chunked:
        # In bfloat16, sums over chunks are kept in float32; the sum without chunks is rounded, by 2^-8 of itself.
        close(got, want, *((2**-7, 2e-2) if "bfloat16" in name else ()))


def test_integer_leaves_and_stopped_gradients_on_a_mesh():
    """The head's parameters may be integers, or have no gradient."""
    rng = np.random.default_rng(2)
    floats = {name: rng.normal(size=(16, 24)).astype(np.float32) for name in ("w", "fixed")}
    order = np.arange(24, dtype=np.int32)[::-1]

    def gradients(score, floats, order, *inputs):
        def logits_fn(params, states):
            return (states @ (params["w"] + jax.lax.stop_gradient(params["fixed"])))[..., params["order"]]

        def score_with_order(_, params, *rest):
            return score(logits_fn, {**params, "order": order}, *rest)

        return gradient(score_with_order, None)(floats, *inputs)

    with jax.set_mesh(sharding.make_mesh(sharding.Mesh(2, 2, 2))):
        chunked = functools.partial(token_log_probs, chunk=3)
        got = jax.jit(functools.partial(gradients, chunked))(floats, order, *random_inputs())
    want = jax.jit(functools.partial(gradients, plain_log_probs))(floats, order, *random_inputs())
    close(got, want)
    assert not got[0][0]["fixed"].any() and got[0][0]["w"].any()


def test_adapters_over_a_frozen_head_and_padding():
    """The adapters' gradient equals the plain one through the whole model; padding changes no number."""
    model, spec = build(TINY), Lora(2, 4.0, ("q", "down"))
    base = random_params(abstract_params(model))
    abstract_adapters = jax.eval_shape(functools.partial(lora.init_adapters, spec), base, jax.random.key(1))
    adapters = random_params(abstract_adapters)
    prompt, replies = ragged([[5, 6, 7], [8, 9]]), [[4, 2], [5, 6, 7, 8, 2]]

    def states_of(adapters, completion):
        return model.completion_states(lora.overlay(base, adapters, spec.scale), prompt, completion)

    def plain(states, completion):
        logp = plain_log_probs(model.logits, base, states, completion.tokens)
        return jnp.where(completion.mask, logp, 0.0)

    def chunked(states, completion):
        return log_prob(model._replace(completion_states=lambda *_: states), 3)(base, prompt, completion)

    @jax.jit
    def losses_and_gradients(adapters, completion):
        states, pull_back = jax.vjp(lambda adapters: states_of(adapters, completion), adapters)

        def through_adapters(score):
            loss, cotangent = jax.value_and_grad(lambda states: jnp.mean(score(states, completion) ** 2))(states)
            return loss, pull_back(cotangent)

        return through_adapters(plain), through_adapters(chunked), chunked(states, completion)

    want, _, _ = losses_and_gradients(adapters, ragged(replies))
    _, got, logp = losses_and_gradients(adapters, completion := ragged(replies, filler=9))
    close(got, want)
    assert not logp[~completion.mask].any() and logp[completion.mask].all()


def large_head(length):
    """Returns a decoder whose head is larger than the rest, and abstract arguments of its gradient."""
    model = build(dataclasses.replace(TINY, vocab_size=4096, tied=False))
    return model, (abstract_params(model), *random_inputs(length))


def test_the_largest_temporary_does_not_grow_with_the_logits():
    """Memory holds some chunks' logits and O(T D) of states: four times the tokens add no more than the states."""

    def temporary_bytes(length):
        model, arguments = large_head(length)
        compiled = jax.jit(gradient(functools.partial(token_log_probs, chunk=128), model.logits))
        return compiled.lower(*arguments).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(128), temporary_bytes(512)
    states = 4 * ROWS * TINY.width  # bytes a position
    assert long - short <= 3 * 384 * states
    assert long < 4 * (4 * 128 * 4096) + 3 * 512 * states < 4 * ROWS * 512 * 4096 / 4


def test_a_chunk_is_as_large_as_its_bound_allows(monkeypatch):
    """Its logits are at most _LOGITS_PER_CHUNK, and all chunks have nearly the same size."""
    monkeypatch.setattr(log_probs, "_LOGITS_PER_CHUNK", 20 * 4096)
    model, arguments = large_head(7)  # 56 tokens: three chunks of 19
    text = str(jax.make_jaxpr(gradient(token_log_probs, model.logits))(*arguments))
    assert {int(n) for n in re.findall(r"f32\[(\d+),4096\]", text)} <= {19, TINY.width}


def computations(text):
    """Returns {name: body} of the computations of an HLO module."""
    blocks = re.split(r"\n(?=%|ENTRY )", text)
    return {m.group(1): block for block in blocks if (m := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", block))}


def loop_computations(text):
    """Returns the names of the computations that run inside a loop."""
    bodies, inside = computations(text), set()
    new = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
    while new:
        inside |= new
        called = set()
        for name in new:
            called.update(re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", bodies[name]))
        new = called - inside
    return inside


def collective_sizes(text):
    """Returns the elements that each collective of a compiled program returns: (inside loops, outside loops)."""
    inside, sizes = loop_computations(text), ([], [])
    for name, body in computations(text).items():
        for shape in re.findall(r" = (.*?) (?:all-|reduce-scatter|collective-permute)[\w\-]*\(", body):
            parts = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\w\[([\d,]*)\]", shape)]
            sizes[name not in inside].append(int(sum(parts)))
    return sizes


@pytest.fixture(scope="module")
def on_the_mesh():
    """A model, and the gradient compiled for data 2, fsdp 2, tensor 2."""
    model, arguments = large_head(LENGTH)
    mesh = sharding.make_mesh(sharding.Mesh(2, 2, 2))
    layout, rows = sharding.shardings(arguments[0], model.rules, mesh), sharding.row_sharding(mesh)
    with jax.set_mesh(mesh):
        compiled = jax.jit(
            gradient(functools.partial(token_log_probs, chunk=4), model.logits),
            in_shardings=(layout, rows, rows, rows), out_shardings=((layout, rows), rows),
        )  # fmt: skip
        return model, compiled.lower(*arguments).compile()


def test_the_mesh_changes_no_gradient(on_the_mesh):
    model, compiled = on_the_mesh
    arguments = (random_params(abstract_params(model)), *random_inputs())
    want = jax.jit(gradient(plain_log_probs, model.logits))(*arguments)
    close(compiled(*jax.device_put(arguments, compiled.input_shardings[0])), want)


def test_the_head_travels_once_and_logits_never(on_the_mesh):
    """Within a chunk, devices exchange states and normalisers of tokens, since each has a part of the vocabulary.

    Outside the loop, the head is gathered once and its gradient is summed once.
    """
    inside, outside = collective_sizes(on_the_mesh[1].as_text())
    head = TINY.width * 4096 // 2
    assert inside and max(inside) <= 4 * TINY.width
    assert sorted(outside) == [head, head]


def test_an_update_captures_no_array():
    """The text of a program with no array in it does not grow with the model's width."""

    def text(width):
        model = build(dataclasses.replace(TINY, width=width, layers=1))
        form, policy = pairwise(model, TemplateTokens((14,), (15,), (16,), 9)), policy_functions(model)
        objective = PreferenceGradient(functools.partial(nash_md, tau=0.1))
        samplers, optimizer = (samplers_of.policy, samplers_of.mixture(0.3)), optax.adam(1e-2)
        collector = Collector(model, samplers, 4, ((2,),), (), (), objective, policy, form, True)
        learn = make_learn(functools.partial(objective, policy=policy), optimizer)

        def step(state, frozen, prompt):
            roles = roles_of(state, frozen, all_trained)
            return learn(state, frozen, collector.collect(roles, prompt, step_key(state, COLLECT)))

        params = abstract_params(model)
        state = jax.eval_shape(lambda p: init_state(p, optimizer, jax.random.key(7), False), params)
        return jax.jit(step).lower(state, Frozen(None, params, params), ragged([[3, 4, 5]] * 2)).as_text()

    narrow, wide = text(32), text(64)
    assert len(wide) == len(narrow)
