"""Scalar heads, and the law that parameters beside the backbone change no number of the backbone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alignjax.models.build import build
from alignjax.models.heads import apply_head, init_head
from alignjax.models.log_probs import log_prob
from alignjax.models.t5 import T5Config
from tests.conftest import TINY, ragged

T5 = T5Config(vocab_size=24, width=16, layers=1, decoder_layers=2, heads=4, head_dim=4, hidden=24)
CONFIGS = {
    "decoder": TINY,
    "decoder, untied": dataclasses.replace(TINY, tied=False, positions="learned", context=16),
    "decoder, scanned": dataclasses.replace(TINY, decode="scanned"),
    "t5": T5,
    "t5, untied": dataclasses.replace(T5, tied=False),
}
PROMPT, COMPLETION = ragged([[5, 6, 7], [8, 9]], 4, "left"), ragged([[4, 2], [5, 6, 2]])


def test_a_new_head_returns_zero_in_float32():
    head = init_head(16)
    assert head["kernel"].shape == (16,) and head["kernel"].dtype == jnp.float32
    values = apply_head(head, jnp.ones((2, 3, 16), jnp.bfloat16))
    assert values.shape == (2, 3) and values.dtype == jnp.float32 and not values.any()


@pytest.mark.parametrize("shape", [(16,), (2, 16), (2, 3, 16)])
def test_a_head_is_linear_in_the_states(shape):
    rng = np.random.default_rng(0)
    states, kernel = rng.normal(size=shape).astype(np.float32), rng.normal(size=16).astype(np.float32)
    np.testing.assert_allclose(apply_head({"kernel": kernel}, states), (states * kernel).sum(-1), atol=1e-5)


def test_a_head_computes_bfloat16_states_in_float32():
    rng = np.random.default_rng(1)
    states, kernel = jnp.asarray(rng.normal(size=(5, 16)), jnp.bfloat16), rng.normal(size=16).astype(np.float32)
    want = np.asarray(states, np.float64) @ kernel.astype(np.float64)
    np.testing.assert_allclose(apply_head({"kernel": kernel}, states), want, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_beside_the_backbone_change_no_bit(name):
    """Heads lie at the top level of the parameters; every function of a model ignores them."""
    model = build(CONFIGS[name])

    @jax.jit
    def everything(params):
        process = model.prefill(params, PROMPT, 2)
        _, step_logits = process.step(process.carry, COMPLETION.tokens[:, 0])
        last = model.last_state(params, PROMPT)
        results = {
            "completion_states": model.completion_states(params, PROMPT, COMPLETION),
            "last_state": last,
            "logits": model.logits(params, last),
            "prefill": process.logits,
            "step": step_logits,
            "log_prob": log_prob(model, 3)(params, PROMPT, COMPLETION),
        }
        if model.forward is not None:
            results["forward"] = model.forward(params, PROMPT.tokens, PROMPT.mask.astype(jnp.int32))
        return results

    params = model.init(jax.random.key(0))
    heads = {"value": {"kernel": jnp.zeros(16)}, "reward": {"kernel": jnp.ones(16)}}
    jax.tree.map(np.testing.assert_array_equal, everything({**params, **heads}), everything(params))
