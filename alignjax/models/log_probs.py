"""Log-probs of given tokens, without ever holding logits [B, T, V]."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from alignjax.distributed import sharding
from alignjax.models.model import Model
from alignjax.types import Array, Completion, LogProb, Params, Prompt

P = jax.sharding.PartitionSpec
LOGITS = 2**27
"""How many logits a device makes at once, half a gibibyte in float32: a thousand tokens of a vocabulary of 131072,
enough that adding to the head's gradient, once a chunk, costs little beside computing what is added."""


def log_prob(model: Model, chunk: int | None = None) -> LogProb:
    """(params, prompt, completion) -> log pi(y_n | x, y_<n) [B, T], nats at temperature 1, zero on padding."""

    def of(params: Params, prompt: Prompt, completion: Completion) -> Array:
        states = model.predict(params, prompt, completion)
        logp = token_log_probs(model.unembed, params, states, completion.tokens, chunk)
        return jnp.where(completion.mask, logp, 0.0)

    return of


def token_log_probs(
    unembed: Callable[[Params, Array], Array],
    params: Params,
    states: Array,
    targets: Array,
    chunk: int | None = None,
) -> Array:
    """log pi(target) from states [B, T, D] and targets [B, T] -> [B, T] nats, never holding [B, T, V].

    ``chunk`` tokens at a time (None: as many as make LOGITS) are unembedded, and again in the backward pass. Under
    ``jax.set_mesh`` each device goes through its own rows: the head is gathered over them once, before the loop, and
    its gradient summed once, behind it; only the vocabulary's split over ``tensor`` talks within a chunk.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in sharding.AXES[:2] if axis in mesh.axis_names)  # where sharding.rows lays rows
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if parts == 1 or len(states) % parts:
        return in_chunks(unembed, params, states, targets, chunk)

    def mine(params: Params, states: Array, targets: Array) -> Array:
        # Cast here, the sum over devices that is a cast's transpose comes behind the loop; left to JAX, in it.
        return in_chunks(unembed, lax.pcast(params, axes, to="varying"), states, targets, chunk)

    spread = jax.shard_map(mine, in_specs=(P(), P(axes), P(axes)), out_specs=P(axes), axis_names=set(axes))
    return spread(params, states, targets)


def in_chunks(
    unembed: Callable[[Params, Array], Array], params: Params, states: Array, targets: Array, chunk: int | None
) -> Array:
    """``token_log_probs`` on one device. (A custom VJP holds and computes just as much, and can less.)"""
    tokens, width = targets.size, states.shape[-1]
    if chunk is None:
        chunk = max(1, LOGITS // jax.eval_shape(unembed, params, states[:1, 0]).shape[-1])
    count = -(-tokens // chunk)
    size = -(-tokens // count)  # as even as can be: the less is padding

    def some(arguments: tuple[Array, Array]) -> Array:
        logits = unembed(params, arguments[0])
        # Summed and not gathered: a gather's gradient is scattered into as many zeros again.
        chosen = jax.nn.one_hot(arguments[1], logits.shape[-1], dtype=bool)
        return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    padded = count * size - tokens
    x = jnp.pad(states.reshape(tokens, width), ((0, padded), (0, 0))).reshape(count, size, width)
    y = jnp.pad(targets.reshape(tokens), (0, padded)).reshape(count, size)
    logp = lax.map(jax.checkpoint(some, prevent_cse=False), (x, y))
    return logp.reshape(-1)[:tokens].reshape(targets.shape)
