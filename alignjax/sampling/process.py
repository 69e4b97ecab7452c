"""Sampling from sequential processes. A process is a Step with its carry and its next logits.

Nash-MD's opponent is such a process, made of two: the sampler never learns that mixtures exist.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from alignjax.errors import POSITIVE, check_range
from alignjax.types import Array, Completion, Key, Step

Stop = tuple[tuple[int, ...], ...]
"""Token sequences, each of which ends a completion."""


class Process(NamedTuple):
    """A distribution over sequences: the next token has log-probs log_softmax(logits)."""

    step: Step
    carry: Any
    logits: Array  # [B, V]


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the defaults sample the process itself."""

    temperature: float = 1.0  # 0 is greedy
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # keep the fewest most likely tokens whose mass reaches top_p

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "temperature", "top_k")
        check_range(self, POSITIVE, 1, "top_p")


class Sample(NamedTuple):
    """What was drawn, and its log-probs under the process at temperature 1, unfiltered."""

    completion: Completion
    logp: Array  # [B, T] nats, zero on padding
    finished: Array  # [B] bool: a stop token was met


def geometric_mixture(policy: Process, reference: Process, beta: float | Array) -> Process:
    """The one-step-at-a-time geometric mixture, each side with its own cache.

    At every prefix, log pi_beta(y_n) = (1 - beta) log pi(y_n) + beta log mu(y_n) + c
    (2312.00886, Eq. 15 and App. F.1). This is not the sequence-level mixture pi^(1-beta) mu^beta / Z:
    its normalisers depend on the path. beta = 0 is the policy, beta = 1 the reference.
    """

    def mix(logits: Array, ref_logits: Array) -> Array:
        # Normalised first, so that a logit of -inf on one side cannot meet a zero weight (0 * inf).
        logp, ref_logp = jax.nn.log_softmax(logits), jax.nn.log_softmax(ref_logits)
        weighted = (weight(1 - beta, logp), weight(beta, ref_logp))
        return weighted[0] + weighted[1]

    def weight(w: float | Array, logp: Array) -> Array:
        return jnp.where(w == 0, 0.0, w * logp)

    def step(carry: Any, token: Array) -> tuple[Any, Array]:
        first, logits = policy.step(carry[0], token)
        second, ref_logits = reference.step(carry[1], token)
        return (first, second), mix(logits, ref_logits)

    return Process(step, (policy.carry, reference.carry), mix(policy.logits, reference.logits))


def keep(logits: Array, sampling: Sampling) -> Array:
    """Logits [B, V] at the temperature, -inf outside top-k, then outside top-p (1904.09751)."""
    logits = logits / sampling.temperature
    if sampling.top_k:
        floor = lax.top_k(logits, min(sampling.top_k, logits.shape[-1]))[0][:, -1:]
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    if sampling.top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        mass_before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        kept = jnp.sum(mass_before < sampling.top_p, axis=-1, keepdims=True)
        floor = jnp.take_along_axis(ordered, jnp.maximum(kept, 1) - 1, axis=-1)
        logits = jnp.where(logits < floor, -jnp.inf, logits)
    return logits


def draw(logits: Array, keys: Key, sampling: Sampling) -> Array:
    """One token a row, [B] int32; ``keys`` [B], so that a row's draw does not depend on its neighbours."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jax.vmap(jax.random.categorical)(keys, keep(logits, sampling)).astype(jnp.int32)


def ends(tokens: Array, index: Array, stop: Stop) -> Array:
    """Whether tokens [B, T], of which those up to ``index`` are drawn, end with one of the sequences; [B] bool."""
    met = jnp.zeros(tokens.shape[:1], bool)
    for sequence in stop:
        back = index - len(sequence) + 1
        tail = jnp.stack([lax.dynamic_index_in_dim(tokens, back + i, 1, False) for i in range(len(sequence))], axis=1)
        met = met | ((back >= 0) & jnp.all(tail == jnp.asarray(sequence, jnp.int32)[None], axis=1))
    return met


def sample(
    process: Process,
    keys: Key,
    max_new_tokens: int,
    stop: Stop,
    sampling: Sampling = Sampling(),
) -> Sample:
    """Draws until every row has met one of the ``stop`` sequences, in one compiled loop.

    Its tokens belong to the completion: they are scored, and their mask is true. Keys [B] are per row,
    folded with the token's index.
    """
    batch = process.logits.shape[0]

    def active(state: tuple) -> Array:
        index, *_, done = state
        return (index < max_new_tokens) & ~jnp.all(done)

    def body(state: tuple) -> tuple:
        index, carry, logits, tokens, mask, logp, done = state
        here = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
        token = jnp.where(done, 0, draw(logits, here, sampling))
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        tokens = lax.dynamic_update_index_in_dim(tokens, token, index, 1)
        mask = lax.dynamic_update_index_in_dim(mask, ~done, index, 1)
        logp = lax.dynamic_update_index_in_dim(logp, jnp.where(done, 0.0, chosen), index, 1)
        done = done | ends(tokens, index, stop)
        carry, logits = process.step(carry, token)
        return index + 1, carry, logits, tokens, mask, logp, done

    empty = jnp.zeros((batch, max_new_tokens), jnp.int32)
    state = (jnp.int32(0), process.carry, process.logits, empty, empty > 0, empty.astype(jnp.float32), empty[:, 0] > 0)
    *_, tokens, mask, logp, done = lax.while_loop(active, body, state)
    return Sample(Completion(tokens, mask), logp, done)
