"""The encoder-decoder: relative positions, invariance to padding and neighbours, caching, preference forms."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.models.build import build, from_json, to_json
from alignjax.models.log_probs import log_prob
from alignjax.models.t5 import T5Config, _append_end_token
from alignjax.models.t5_modules import relative_buckets
from alignjax.preferences import preference_models as preference
from alignjax.types import Tokens
from tests.conftest import ragged

CONFIG = T5Config(vocab_size=24, width=16, layers=2, decoder_layers=3, heads=4, head_dim=4, hidden=24)
ROWS, REPLIES = [[5, 6, 7], [8, 9], [3, 4, 5, 6, 7], [10, 11, 12, 13]], [[4, 2], [5, 6, 2], [2], [7, 7, 7]]


@pytest.fixture(scope="module")
def model():
    return build(CONFIG)


@pytest.fixture(scope="module")
def params(model):
    return model.init(jax.random.key(0))


@pytest.fixture(scope="module")
def score(model):
    return jax.jit(log_prob(model))


def test_relative_buckets_are_the_paper_s():
    """Half of the buckets hold one distance each, the others widen as its logarithm; here in plain Python."""

    def bucket(distance, bidirectional, count=8, farthest=20):
        offset = 0
        if bidirectional:
            count //= 2
            offset, distance = (count if distance > 0 else 0), abs(distance)
        else:
            distance = max(-distance, 0)
        exact = count // 2
        if distance < exact:
            return offset + distance
        growth = math.log(distance / exact) / math.log(farthest / exact)
        return offset + min(exact + int(growth * (count - exact)), count - 1)

    config = dataclasses.replace(CONFIG, buckets=8, distance=20)
    distances = np.arange(-40, 41)
    for bidirectional in (True, False):
        got = relative_buckets(jnp.asarray(distances), config, bidirectional)
        assert got.tolist() == [bucket(int(d), bidirectional) for d in distances]


def test_padding_anywhere_changes_no_number(params, score):
    """Before, after and between the prompt's tokens; padded pieces that are joined have padding in between."""
    want = score(params, ragged(ROWS, 8), ragged(REPLIES, 4))
    left = score(params, ragged(ROWS, 8, "left", filler=17), ragged(REPLIES, 4, filler=9))
    spread = np.full((4, 8), 19, np.int32), np.zeros((4, 8), bool)
    for i, row in enumerate(ROWS):
        columns = np.sort(np.random.default_rng(i).permutation(8)[: len(row)])
        spread[0][i, columns], spread[1][i, columns] = row, True
    between = score(params, Tokens(*spread), ragged(REPLIES, 4))
    for got in (left, between):
        np.testing.assert_allclose(got, want, atol=1e-5)
    wide = score(params, ragged(ROWS, 11, filler=3), ragged(REPLIES, 6, filler=8))
    np.testing.assert_allclose(wide[:, :4], want, atol=1e-5)


def test_a_row_does_not_depend_on_its_neighbours(params, score):
    prompt, completion = ragged(ROWS, 8), ragged(REPLIES, 4)
    order = np.array([2, 0, 3, 1])
    permuted = score(params, *jax.tree.map(lambda x: x[order], (prompt, completion)))
    np.testing.assert_allclose(permuted, score(params, prompt, completion)[order], atol=1e-5)


def test_the_encoder_reads_the_end_token_after_the_prompt():
    source = _append_end_token(ragged(ROWS, 6, "left", filler=17), end_token=1)
    for row, tokens, mask in zip(ROWS, np.asarray(source.tokens), np.asarray(source.mask), strict=True):
        assert tokens[mask].tolist() == [*row, 1]
        assert mask.tolist() == [True] * (len(row) + 1) + [False] * (6 - len(row))


def test_cached_decoding_equals_the_full_pass(model, params):
    prompt, written = ragged(ROWS, 6, "left"), np.array([[3, 12, 4], [6, 1, 15], [9, 9, 9], [2, 7, 1]], np.int32)

    @jax.jit
    def cached_and_full(params):
        process = model.prefill(params, prompt, 4)
        logits, carry = [process.logits], process.carry
        for t in range(3):
            carry, next_logits = process.step(carry, written[:, t])
            logits.append(next_logits)
        completion = Tokens(np.pad(written, ((0, 0), (0, 1))), np.ones((4, 4), bool))
        full = model.logits(params, model.completion_states(params, prompt, completion))
        return jnp.stack(logits, 1), full, model.logits(params, model.last_state(params, prompt))

    cached, full, first = cached_and_full(params)
    np.testing.assert_allclose(cached, full, atol=2e-5)
    np.testing.assert_allclose(first, full[:, 0], atol=2e-5)


def test_a_later_token_changes_no_earlier_log_prob(params, score):
    a, b = (score(params, ragged([ROWS[0]], 8), ragged([reply], 4)) for reply in ([4, 5, 6, 7], [4, 5, 9, 7]))
    np.testing.assert_allclose(a[:, :2], b[:, :2], atol=1e-6)
    assert np.abs(a[:, 3] - b[:, 3]).max() > 1e-4


@pytest.mark.parametrize("form", [preference.pairwise, preference.choice, preference.pairwise_head,
                                  preference.bradley_terry])  # fmt: skip
def test_preference_forms_are_antisymmetric_over_an_encoder_decoder(model, params, form):
    built = form(model, preference.TemplateTokens((14,), (15,), (16,), 9, 8))
    full = {**params, **jax.tree.map(lambda x: x + 0.3, built.init_heads())}
    y, z = ragged(REPLIES, 4), ragged(REPLIES[::-1], 4)
    p, q = (preference.probability(x) for x in jax.jit(
        lambda w: (built.logit(w, ragged(ROWS), y, z), built.logit(w, ragged(ROWS), z, y)))(full))  # fmt: skip
    assert (p + q == 1).all() and np.abs(p - 0.5).max() > 1e-4


@pytest.mark.parametrize("tied", [True, False])
def test_rules_claim_every_parameter_and_are_all_used(tied):
    config = dataclasses.replace(CONFIG, tied=tied, gated=not tied)
    model = build(config)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    specs = sharding.shardings(shapes, model.rules, sharding.make_mesh(sharding.Mesh(2, 2, 2)))
    assert specs["decoder"]["cross_q"]["kernel"].spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    assert from_json(to_json(config)) == config


def test_the_initial_loss_is_near_uniform():
    for change in ({"tied": False, "scaled_output": False, "gated": True},):
        config = dataclasses.replace(CONFIG, vocab_size=512, width=64, layers=1, decoder_layers=1, **change)
        model = build(config)
        logp = jax.jit(log_prob(model))(
            model.init(jax.random.key(1)), ragged([list(range(20))]), ragged([list(range(30))])
        )
        assert abs(-logp.mean() - np.log(512)) < 0.7, change


@pytest.mark.parametrize("change", [{"family": "bart"}, {"buckets": 2}, {"end_token": 24}, {"activation": "swish"}])
def test_impossible_options_are_refused(change):
    with pytest.raises(UserError, match=next(iter(change))):
        dataclasses.replace(CONFIG, **change)
