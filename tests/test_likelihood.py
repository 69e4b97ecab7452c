"""Chunked log-probs: the plain softmax's values and gradients, in less memory, with little talk between devices."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alignjax import objectives
from alignjax.distributed import sharding
from alignjax.models import log_probs as likelihood
from alignjax.models import lora
from alignjax.models.build import build
from alignjax.models.log_probs import log_prob, token_log_probs
from alignjax.models.lora import Lora
from alignjax.models.t5 import T5Config
from alignjax.preferences import models as preference
from alignjax.sampling import samplers as rollout
from alignjax.training import learn as train
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


def filled(shapes):
    """Parameters of those shapes, large enough to matter."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.4, x.shape).astype(x.dtype), shapes)


def shapes_of(model):
    return jax.eval_shape(model.init, jax.random.key(0))


def plain(unembed, params, states, targets):
    """The referee: the whole log-softmax."""
    return jnp.take_along_axis(jax.nn.log_softmax(unembed(params, states)), targets[..., None], -1)[..., 0]


def drawn(length=LENGTH):
    """States, targets and cotangents."""
    rng = np.random.default_rng(1)
    states = rng.normal(0, 3, (ROWS, length, TINY.width)).astype(np.float32)
    return states, rng.integers(0, 23, (ROWS, length)), rng.normal(size=(ROWS, length)).astype(np.float32)


def loss(score, unembed, params, states, targets, weights):
    logp = score(unembed, params, states, targets)
    return jnp.sum(weights * logp), logp


def gradient(score, unembed):
    """(params, states, targets, weights) -> gradients of both, and log-probs."""
    return jax.grad(functools.partial(loss, score, unembed), (0, 1), has_aux=True)


@pytest.mark.parametrize("name", HEADS)
def test_values_and_gradients_are_the_plain_softmax_s(name):
    """Of every parameter and state, whether chunks divide the tokens or not."""
    model, chunks = build(HEADS[name]), (5, 14, None) if name == "tied" else (5,)

    @jax.jit
    def both(*arguments):
        chunked = [gradient(functools.partial(token_log_probs, chunk=n), model.unembed)(*arguments) for n in chunks]
        return chunked, gradient(plain, model.unembed)(*arguments)

    chunked, want = both(filled(shapes_of(model)), *drawn())
    assert sum(x.any() for x in jax.tree.leaves(want[0][0])) == 1  # the head alone
    for got in chunked:
        # In bfloat16 the chunks' sums are kept in float32, the whole one is rounded: by 2^-8 of it.
        close(got, want, *((2**-7, 2e-2) if "bfloat16" in name else ()))


def test_integer_leaves_and_stopped_gradients_on_a_mesh():
    """A head of leaves of several kinds, some of which take no part in the gradient."""
    rng = np.random.default_rng(2)
    floats = {name: rng.normal(size=(16, 24)).astype(np.float32) for name in ("w", "fixed")}
    order = np.arange(24, dtype=np.int32)[::-1]

    def of(score, floats, order, *rest):
        def unembed(params, states):
            return (states @ (params["w"] + jax.lax.stop_gradient(params["fixed"])))[..., params["order"]]

        whole = lambda params, *rest: score(unembed, {**params, "order": order}, *rest)  # noqa: E731
        return gradient(lambda _, *rest: whole(*rest), None)(floats, *rest)

    with jax.set_mesh(sharding.make_mesh(sharding.Mesh(2, 2, 2))):
        got = jax.jit(functools.partial(of, functools.partial(token_log_probs, chunk=3)))(floats, order, *drawn())
    want = jax.jit(functools.partial(of, plain))(floats, order, *drawn())
    close(got, want)
    assert not got[0][0]["fixed"].any() and got[0][0]["w"].any()


def test_adapters_over_a_frozen_head_and_padding():
    """Their gradient is the plain one through the whole model, and what lies in the padding changes no number."""
    model, spec = build(TINY), Lora(2, 4.0, ("q", "down"))
    base = filled(shapes_of(model))
    small = filled(jax.eval_shape(functools.partial(lora.init, spec), base, jax.random.key(1)))
    prompt, replies = ragged([[5, 6, 7], [8, 9]]), [[4, 2], [5, 6, 7, 8, 2]]

    def states(small, reply):
        return model.predict(lora.overlay(base, small, spec.scale), prompt, reply)

    def masked(states, reply):
        return jnp.where(reply.mask, plain(model.unembed, base, states, reply.tokens), 0.0)

    def chunked(states, reply):
        return log_prob(model._replace(predict=lambda *_: states), 3)(base, prompt, reply)

    @jax.jit
    def of(small, reply):
        x, pull = jax.vjp(lambda small: states(small, reply), small)
        whole, parts = (jax.value_and_grad(lambda x, f=f: jnp.mean(f(x, reply) ** 2))(x) for f in (masked, chunked))
        return (whole[0], pull(whole[1])), (parts[0], pull(parts[1])), chunked(x, reply)

    want, _, _ = of(small, ragged(replies))
    _, got, logp = of(small, reply := ragged(replies, filler=9))
    close(got, want)
    assert not logp[~reply.mask].any() and logp[reply.mask].all()


def big(length):
    """A decoder with a head larger than the rest of it, and what its loss takes, parameters as shapes."""
    model = build(dataclasses.replace(TINY, vocab_size=4096, tied=False))
    return model, (shapes_of(model), *drawn(length))


def test_the_largest_temporary_does_not_grow_with_the_logits():
    """Some chunks' logits, and O(T D) of states: four times the tokens add no more than that."""

    def temporary(length):
        model, shapes = big(length)
        of = jax.jit(gradient(functools.partial(token_log_probs, chunk=128), model.unembed))
        return of.lower(*shapes).compile().memory_analysis().temp_size_in_bytes

    short, long = temporary(128), temporary(512)
    states = 4 * ROWS * TINY.width  # bytes a position
    assert long - short <= 3 * 384 * states
    assert long < 4 * (4 * 128 * 4096) + 3 * 512 * states < 4 * ROWS * 512 * 4096 / 4


def test_a_chunk_is_as_large_as_its_bound_allows(monkeypatch):
    """Its logits are at most LOGITS, and no chunk is much smaller than another."""
    monkeypatch.setattr(likelihood, "LOGITS", 20 * 4096)
    model, shapes = big(7)  # 56 tokens: three chunks of 19
    text = str(jax.make_jaxpr(gradient(token_log_probs, model.unembed))(*shapes))
    assert {int(n) for n in re.findall(r"f32\[(\d+),4096\]", text)} <= {19, TINY.width}


def computations(text):
    """name -> body of each computation of an HLO module."""
    blocks = re.split(r"\n(?=%|ENTRY )", text)
    return {m.group(1): block for block in blocks if (m := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", block))}


def talk(text):
    """Elements that each collective of a compiled program gives out: (those inside loops, the others)."""
    bodies, inside = computations(text), set()
    new = set(re.findall(r"(?:body|condition)=%?([\w.\-]+)", text))
    while new:
        inside |= new
        called = {name for one in new for name in re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", bodies[one])}
        new = called - inside
    found = ([], [])
    for name, body in bodies.items():
        for shape in re.findall(r" = (.*?) (?:all-|reduce-scatter|collective-permute)[\w\-]*\(", body):
            sizes = [np.prod([int(n) for n in dims.split(",") if n]) for dims in re.findall(r"\w\[([\d,]*)\]", shape)]
            found[name not in inside].append(int(sum(sizes)))
    return found


@pytest.fixture(scope="module")
def on_the_mesh():
    """A model, and the gradient compiled for data 2, fsdp 2, tensor 2."""
    model, shapes = big(LENGTH)
    mesh = sharding.make_mesh(sharding.Mesh(2, 2, 2))
    layout, rows = sharding.shardings(shapes[0], model.rules, mesh), sharding.rows(mesh)
    with jax.set_mesh(mesh):
        of = jax.jit(
            gradient(functools.partial(token_log_probs, chunk=4), model.unembed),
            in_shardings=(layout, rows, rows, rows), out_shardings=((layout, rows), rows),
        )  # fmt: skip
        return model, of.lower(*shapes).compile()


def test_the_mesh_changes_no_gradient(on_the_mesh):
    model, compiled = on_the_mesh
    arguments = (filled(shapes_of(model)), *drawn())
    want = jax.jit(gradient(plain, model.unembed))(*arguments)
    close(compiled(*jax.device_put(arguments, compiled.input_shardings[0])), want)


def test_the_head_travels_once_and_logits_never(on_the_mesh):
    """Within a chunk devices say to each other what a token's states and normaliser are (their parts of the
    vocabulary); the head, gathered over its rows, and its gradient, summed, lie outside the loop."""
    inside, outside = talk(on_the_mesh[1].as_text())
    head = TINY.width * 4096 // 2
    assert inside and max(inside) <= 4 * TINY.width
    assert sorted(outside) == [head, head]


def test_an_update_captures_no_array():
    """A program's text has the length of its operations, whatever the model's width (of as many digits)."""

    def text(width):
        model = build(dataclasses.replace(TINY, width=width, layers=1))
        score = log_prob(model)
        asked = preference.pairwise(model, preference.TemplateTokens((14,), (15,), (16,), 9)).logit
        draw = rollout.responder(model, functools.partial(rollout.mixture, beta=0.3), 4, ((2,),))
        optimizer = optax.adam(1e-2)
        update = train.make_update(
            functools.partial(objectives.nash_md, log_prob=score, tau=0.1), optimizer,
            rollout.collector(draw, score, asked, True, ()),
        )  # fmt: skip
        params = shapes_of(model)
        state = jax.eval_shape(lambda p: train.init(p, optimizer, jax.random.key(7), False), params)
        frozen = {"reference": params, "preference": params}
        return jax.jit(update).lower(state, frozen, ragged([[3, 4, 5]] * 2)).as_text()

    narrow, wide = text(32), text(64)
    assert len(wide) == len(narrow)
