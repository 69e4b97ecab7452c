"""Sampling from sequential processes.

A Process is a step with its carry and its next logits. The mixture of two processes is a process again, so the sampler
never learns that mixtures exist.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alignjax.errors import POSITIVE, check_range
from alignjax.types import Array, Completion, Key, Process, Sample

StopSequences = tuple[tuple[int, ...], ...]
"""Token sequences, each of which ends a completion."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn from logits; the defaults sample the process itself."""

    temperature: float = 1.0  # 0 is greedy; else from 1e-6 to 1e6
    top_k: int = 0  # 0 keeps all tokens
    top_p: float = 1.0  # keeps the fewest most likely tokens whose mass reaches top_p

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "top_k")
        if self.temperature != 0:  # a quotient beyond float32 would be no logit
            check_range(self, 1e-6, 1e6, "temperature")
        check_range(self, POSITIVE, 1, "top_p")


def geometric_mean(logits: Sequence[Array], weights: Sequence[float | Array]) -> Array:
    """Returns sum_i w_i log_softmax(logits_i), [..., V]: the logits of prod_i pi_i^{w_i} at one prefix.

    With weights (1 - beta, beta) it is one step of the token-wise mixture of 2312.00886, Eq. 15 and App. F.1. Logits
    are normalised first, so that -inf on one side never meets a zero weight (0 * inf).
    """

    def weighted(x: Array, weight: float | Array) -> Array:
        return jnp.where(weight == 0, 0.0, weight * jax.nn.log_softmax(x))

    first, *rest = (weighted(x, weight) for x, weight in zip(logits, weights, strict=True))
    return sum(rest, start=first)


def geometric_mixture(policy: Process, reference: Process, beta: float | Array) -> Process:
    """Returns the one-step-at-a-time geometric mixture; each side keeps its own cache.

    At every prefix, log pi_beta(y_n) = (1 - beta) log pi(y_n) + beta log mu(y_n) + c (2312.00886, Eq. 15 and App. F.1).
    This is not the sequence-level mixture pi^(1-beta) mu^beta / Z: its normalisers depend on the path. beta = 0 is the
    policy, beta = 1 the reference.
    """

    def mix(logits: Array, reference_logits: Array) -> Array:
        return geometric_mean((logits, reference_logits), (1 - beta, beta))

    def step(carry: Any, token: Array) -> tuple[Any, Array]:
        policy_carry, logits = policy.step(carry[0], token)
        reference_carry, reference_logits = reference.step(carry[1], token)
        return (policy_carry, reference_carry), mix(logits, reference_logits)

    return Process(step, (policy.carry, reference.carry), mix(policy.logits, reference.logits))


def filter_logits(logits: Array, sampling: Sampling) -> Array:
    """Returns logits [B, V] at the temperature, -inf outside top-k and then outside top-p (1904.09751)."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        floor = lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        mass_above = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        count = jnp.sum(mass_above < sampling.top_p, axis=-1, keepdims=True)
        floor = jnp.take_along_axis(ordered, jnp.maximum(count, 1) - 1, axis=-1)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits


def draw_token(logits: Array, keys: Key, sampling: Sampling) -> Array:
    """Returns one token a row, [B] int32. ``keys`` is [B], so that a row's draw does not depend on its neighbours."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, filter_logits(logits, sampling)).astype(jnp.int32)


def ends_with(tokens: Array, index: Array, stop: StopSequences) -> Array:
    """Returns whether tokens[:, : index + 1] ends with one of the stop sequences: tokens [B, T] -> [B] bool."""
    matched = jnp.zeros(tokens.shape[:1], bool)
    for sequence in stop:
        offset = index - len(sequence) + 1
        tail = jnp.stack([lax.dynamic_index_in_dim(tokens, offset + i, 1, False) for i in range(len(sequence))], axis=1)
        equal = jnp.all(tail == jnp.asarray(sequence, jnp.int32)[None], axis=1)
        matched = matched | ((offset >= 0) & equal)
    return matched


def sample(
    process: Process, keys: Key, max_new_tokens: int, stop: StopSequences, sampling: Sampling = Sampling()
) -> Sample:
    """Draws tokens until every row has met a stop sequence, in one compiled loop.

    The stop sequence belongs to the completion: it is scored, and its mask is true. ``keys`` is [B], one a row; token n
    is drawn with ``fold_in(keys[b], n)``.
    """
    batch = process.logits.shape[0]

    def unfinished(state: tuple) -> Array:
        index, *_, done = state
        return (index < max_new_tokens) & ~jnp.all(done)

    def draw_next(state: tuple) -> tuple:
        index, carry, logits, tokens, mask, logp, done = state
        token_keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        token = jnp.where(done, 0, draw_token(logits, token_keys, sampling))
        token_logp = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        tokens = lax.dynamic_update_index_in_dim(tokens, token, index, 1)
        mask = lax.dynamic_update_index_in_dim(mask, ~done, index, 1)
        logp = lax.dynamic_update_index_in_dim(logp, jnp.where(done, 0.0, token_logp), index, 1)
        done = done | ends_with(tokens, index, stop)
        carry, logits = process.step(carry, token)
        return index + 1, carry, logits, tokens, mask, logp, done

    tokens = jnp.zeros((batch, max_new_tokens), jnp.int32)
    initial = (
        jnp.int32(0), process.carry, process.logits, tokens, tokens > 0, tokens.astype(jnp.float32), tokens[:, 0] > 0
    )  # fmt: skip
    *_, tokens, mask, logp, done = lax.while_loop(unfinished, draw_next, initial)
    return Sample(Completion(tokens, mask), logp, done)
