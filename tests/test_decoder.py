"""The decoder: an independent NumPy forward, and invariance to padding, packing, caching and remat."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.models.decoder import TransformerConfig, decoder
from alignjax.models.layers import segment_positions
from alignjax.models.log_probs import log_prob
from alignjax.types import Tokens
from tests.conftest import TINY, ragged


def numpy_forward(params, tokens, c):
    """Logits [T, V] of one unpadded sequence in float64, written from the Llama equations with loops."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt(np.mean(x**2, -1, keepdims=True) + c.norm_eps) * scale

    def rotate(x, position):
        half = len(x) // 2
        out = np.empty_like(x)
        for i in range(half):
            angle = position * c.rope_theta ** (-i / half)
            out[i] = x[i] * np.cos(angle) - x[i + half] * np.sin(angle)
            out[i + half] = x[i + half] * np.cos(angle) + x[i] * np.sin(angle)
        return out

    x = p["embed"]["embedding"][tokens]
    for layer in range(c.layers):
        w = jax.tree.map(lambda v, layer=layer: v[layer], p["blocks"])
        h = norm(x, w["attention_norm"]["scale"])
        q, k, v = (h @ w[n]["kernel"] for n in "qkv")
        attended = np.zeros_like(q)
        for head in range(c.heads):
            q_part = slice(head * c.head_dim, (head + 1) * c.head_dim)
            group = head // (c.heads // c.kv_heads)
            kv_part = slice(group * c.head_dim, (group + 1) * c.head_dim)
            for t in range(len(x)):
                query = rotate(q[t, q_part], t)
                scores = np.array([query @ rotate(k[s, kv_part], s) for s in range(t + 1)]) / np.sqrt(c.head_dim)
                weights = np.exp(scores - scores.max())
                attended[t, q_part] = weights / weights.sum() @ v[: t + 1, kv_part]
        x = x + attended @ w["o"]["kernel"]
        h = norm(x, w["mlp_norm"]["scale"])
        gate = h @ w["gate"]["kernel"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ w["up"]["kernel"])) @ w["down"]["kernel"]
    head = p["head"]["kernel"] if "head" in p else p["embed"]["embedding"].T
    return norm(x, p["norm"]["scale"]) @ head


@pytest.mark.parametrize("tied", [True, False])
def test_equals_an_independent_forward(tied):
    c = dataclasses.replace(TINY, tied=tied)
    model = decoder(c)
    params = jax.tree.map(lambda x: x * 1.5, model.init(jax.random.key(3)))
    tokens = np.array([3, 9, 1, 4, 22, 0, 7])
    states = model.forward(params, tokens[None], np.ones((1, 7), np.int32))
    np.testing.assert_allclose(model.logits(params, states)[0], numpy_forward(params, tokens, c), atol=2e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_never_changes_a_number(model, params, prompt, side):
    rows = [[5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [10, 11, 12, 13]]
    completion = ragged([[4, 2], [5, 6, 2], [2], [7, 7, 7]])
    short = log_prob(model)(params, prompt, completion)
    wide = log_prob(model)(
        params, ragged(rows, 9, side, filler=17), ragged([[4, 2], [5, 6, 2], [2], [7, 7, 7]], 6, filler=9)
    )
    np.testing.assert_allclose(wide[:, :3], short, atol=1e-6)
    assert np.all(np.asarray(wide[:, 3:]) == 0)


def test_a_row_does_not_depend_on_its_neighbours(model, params, prompt):
    completion = ragged([[4, 2], [5, 6, 2], [2], [7, 7, 7]])
    order = np.array([2, 0, 3, 1])
    permuted = log_prob(model)(params, *jax.tree.map(lambda x: x[order], (prompt, completion)))
    np.testing.assert_allclose(permuted, log_prob(model)(params, prompt, completion)[order], atol=1e-6)


def test_packed_documents_do_not_attend_to_each_other(model, params):
    a, b = [3, 4, 5, 6], [7, 8, 9]
    tokens, segments = np.array([[*a, *b, 0]]), np.array([[1] * 4 + [2] * 3 + [0]])
    packed = model.forward(params, tokens, segments)[0]
    for document, columns in ((a, slice(0, 4)), (b, slice(4, 7))):
        alone = model.forward(params, np.array([document]), np.ones((1, len(document)), np.int32))[0]
        np.testing.assert_allclose(packed[columns], alone, atol=1e-5)


def test_positions_count_the_real_tokens_of_each_segment():
    segments = jnp.array([[0, 1, 1, 0, 1, 2, 2, 0], [3, 3, 3, 0, 0, 0, 0, 0]])
    assert segment_positions(segments)[0, jnp.array([1, 2, 4, 5, 6])].tolist() == [0, 1, 2, 0, 1]
    assert segment_positions(segments)[1, :3].tolist() == [0, 1, 2]


def test_a_later_token_changes_no_earlier_state(model, params):
    tokens, ones = np.array([[3, 4, 5, 6, 7]]), np.ones((1, 5), np.int32)
    changed = np.array([[3, 4, 5, 9, 7]])
    a, b = model.forward(params, tokens, ones), model.forward(params, changed, ones)
    np.testing.assert_array_equal(a[:, :3], b[:, :3])
    assert np.abs(a[:, 3:] - b[:, 3:]).max() > 1e-3


@pytest.mark.parametrize("decode", ["unrolled", "scanned"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_cached_decoding_equals_the_full_forward(model, params, side, decode):
    prompt = ragged([[5, 6, 7], [8, 9]], 5, side, filler=11)
    completion = np.array([[3, 12, 4, 9], [6, 1, 1, 15]])
    process = decoder(dataclasses.replace(TINY, decode=decode)).prefill(params, prompt, 4)
    logits, carry = [process.logits], process.carry
    for t in range(3):
        carry, next_logits = process.step(carry, completion[:, t])
        logits.append(next_logits)
    states = model.completion_states(params, prompt, Tokens(completion, np.ones((2, 4), bool)))
    np.testing.assert_allclose(np.stack(logits, 1), model.logits(params, states), atol=1e-5)


@pytest.mark.parametrize("remat", ["dots", "full"])
def test_remat_changes_no_gradient(params, remat):
    tokens, ones = np.array([[3, 4, 5, 6, 7]]), np.ones((1, 5), np.int32)

    def gradient(name):
        model = decoder(dataclasses.replace(TINY, remat=name))
        return jax.grad(lambda p: (model.forward(p, tokens, ones) ** 2).sum())(params)

    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), gradient(remat), gradient("none"))


def test_bfloat16_computes_over_float32_parameters(params):
    half = decoder(dataclasses.replace(TINY, compute_dtype="bfloat16"))
    assert {x.dtype for x in jax.tree.leaves(half.init(jax.random.key(0)))} == {np.dtype("float32")}
    tokens, ones = np.array([[3, 4, 5, 6, 7]]), np.ones((1, 5), np.int32)
    low, high = half.forward(params, tokens, ones), decoder(TINY).forward(params, tokens, ones)
    assert low.dtype == jnp.bfloat16
    # One rounding is 2^-9 of a value; states are of the order of 1 and pass some twenty roundings.
    assert np.abs(low.astype(jnp.float32) - high).mean() < 0.04


@pytest.mark.parametrize("tied", [True, False])
def test_an_odd_vocabulary_is_split_by_its_width(tied):
    """GPT-2's vocabulary of 50257 tokens divides over no mesh axis; the width does."""
    model = decoder(dataclasses.replace(TINY, vocab_size=23, tied=tied))
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    specs = sharding.shardings(shapes, model.rules, sharding.make_mesh(sharding.Mesh(2, 2, 2)))
    assert not specs["embed"]["embedding"].is_fully_replicated


@pytest.mark.parametrize("change", [{"kv_heads": 3}, {"head_dim": 5}, {"remat": "some"}])
def test_impossible_sizes_are_refused(change):
    with pytest.raises(UserError):
        decoder(dataclasses.replace(TINY, **change))


def test_initial_loss_is_near_uniform():
    model = decoder(TransformerConfig(512, 64, 2, 4, 2, 16, 128))
    params = model.init(jax.random.key(0))
    logits = model.logits(params, model.forward(params, np.arange(32)[None], np.ones((1, 32), np.int32)))
    entropy = -jnp.sum(jax.nn.softmax(logits) * jax.nn.log_softmax(logits), -1).mean()
    assert abs(entropy - np.log(512)) < 0.1
