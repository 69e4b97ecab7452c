"""Log-probs of given tokens, without ever holding logits [B, T, V]."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from alignjax.models.model import Model
from alignjax.types import Array, Completion, LogProb, Params, Prompt


def log_prob(model: Model, chunk: int = 128) -> LogProb:
    """(params, prompt, completion) -> log pi(y_n | x, y_<n) [B, T], nats at temperature 1, zero on padding."""

    def of(params: Params, prompt: Prompt, completion: Completion) -> Array:
        states = model.predict(params, prompt, completion)
        logp = token_log_probs(model.unembed, params, states, completion.tokens, chunk)
        return jnp.where(completion.mask, logp, 0.0)

    return of


def token_log_probs(
    unembed: Callable[[Params, Array], Array], params: Params, states: Array, targets: Array, chunk: int
) -> Array:
    """log pi(target) from states [B, T, D] and targets [B, T] -> [B, T] nats, never holding [B, T, V].

    Rows of ``chunk`` positions at a time are unembedded, and again in the backward pass.
    """
    batch, length, width = states.shape
    chunk = min(chunk, length)
    padded = -length % chunk

    @jax.checkpoint
    def some(arguments: tuple[Array, Array]) -> Array:
        logits = unembed(params, arguments[0])
        chosen = jnp.take_along_axis(logits, arguments[1][..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    x = jnp.pad(states, ((0, 0), (0, padded), (0, 0))).reshape(batch, -1, chunk, width)
    y = jnp.pad(targets, ((0, 0), (0, padded))).reshape(batch, -1, chunk)
    logp = lax.map(some, (jnp.moveaxis(x, 1, 0), jnp.moveaxis(y, 1, 0)))
    return jnp.moveaxis(logp, 0, 1).reshape(batch, -1)[:, :length]
