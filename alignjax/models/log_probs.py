"""Log-probs of given tokens, computed without ever holding logits [B, T, V]."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from alignjax.distributed import sharding
from alignjax.models.model import Model
from alignjax.types import Array, Completion, LogProb, Params, PolicyFunctions, Prompt

_LOGITS_PER_CHUNK = 2**27
"""The most logits that a device holds at once by default: half a gibibyte in float32, a thousand tokens of a
vocabulary of 131072. Every chunk adds to the head's gradient; chunks of this size keep that cost low."""

LogitsFn = Callable[[Params, Array], Array]
"""(params, states [..., D]) -> logits [..., V]; ``Model.logits`` is one."""


def log_prob(model: Model, chunk: int | None = None) -> LogProb:
    """Returns (params, prompt, completion) -> log pi(y_t | x, y_<t), [B, T] nats at temperature 1, 0 on padding.

    ``chunk`` is as in ``token_log_probs``.
    """

    def score(params: Params, prompt: Prompt, completion: Completion) -> Array:
        states = model.completion_states(params, prompt, completion)
        logp = token_log_probs(model.logits, params, states, completion.tokens, chunk)
        return jnp.where(completion.mask, logp, 0.0)

    return score


def token_log_probs(
    logits_fn: LogitsFn, params: Params, states: Array, targets: Array, chunk: int | None = None
) -> Array:
    """Returns log softmax(logits)[target], [B, T] nats, from states [B, T, D] and targets [B, T].

    Logits are computed for ``chunk`` tokens at a time, and again in the backward pass. None takes chunks of at most
    2^27 logits.

    Under ``jax.set_mesh`` each device loops over its own rows. The head is gathered over data and fsdp once, before
    the loop, and its gradient is summed once, after it. Within a chunk, devices communicate only over ``tensor``,
    which splits the vocabulary.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in sharding.AXES[:2] if axis in mesh.axis_names)  # the axes that split rows
    parts = math.prod(mesh.shape[axis] for axis in axes)
    if parts == 1 or len(states) % parts:
        return _log_probs_in_chunks(logits_fn, params, states, targets, chunk)

    def score_own_rows(params: Params, states: Array, targets: Array) -> Array:
        # The transpose of this cast sums the gradient over devices. It must lie here, outside the loop: JAX would
        # otherwise insert the cast, and so the sum, inside the loop.
        params = lax.pcast(params, axes, to="varying")
        return _log_probs_in_chunks(logits_fn, params, states, targets, chunk)

    score = jax.shard_map(
        score_own_rows,
        in_specs=(P(), P(axes), P(axes)),
        out_specs=P(axes),
        axis_names=set(axes),
    )
    return score(params, states, targets)


def _log_probs_in_chunks(
    logits_fn: LogitsFn, params: Params, states: Array, targets: Array, chunk: int | None
) -> Array:
    """``token_log_probs`` on one device. A custom VJP would need as much memory and time, and be less general."""
    tokens, width = targets.size, states.shape[-1]
    if chunk is None:
        chunk = max(1, _LOGITS_PER_CHUNK // jax.eval_shape(logits_fn, params, states[:1, 0]).shape[-1])
    count = -(-tokens // chunk)
    size = -(-tokens // count)  # chunks as even as possible leave the least padding

    def score_chunk(inputs: tuple[Array, Array]) -> Array:
        states, targets = inputs
        logits = logits_fn(params, states)
        # A masked sum and not a gather: the gradient of a gather is a scatter into an array of zeros [N, V].
        chosen = jax.nn.one_hot(targets, logits.shape[-1], dtype=bool)
        return jnp.sum(jnp.where(chosen, logits, 0.0), axis=-1) - jax.nn.logsumexp(logits, axis=-1)

    padded = count * size - tokens
    chunked_states = jnp.pad(states.reshape(tokens, width), ((0, padded), (0, 0))).reshape(count, size, width)
    chunked_targets = jnp.pad(targets.reshape(tokens), (0, padded)).reshape(count, size)
    logp = lax.map(jax.checkpoint(score_chunk, prevent_cse=False), (chunked_states, chunked_targets))
    return logp.reshape(-1)[:tokens].reshape(targets.shape)


def policy_functions(model: Model, critic: Model | None = None) -> PolicyFunctions:
    """Returns a model as objectives use it: its log-probs and, for a critic, its states.

    A critic of its own reads ``critic``'s states, under the parameters at ``params["critic"]``.
    """
    if critic is None:
        return PolicyFunctions(log_prob(model), model.completion_states, model.config.width)

    def states(params: Params, prompt: Prompt, completion: Completion) -> Array:
        return critic.completion_states(params["critic"], prompt, completion)

    return PolicyFunctions(log_prob(model), states, critic.config.width)
