"""Losses against labels: next tokens and preferences."""

from __future__ import annotations

import jax.numpy as jnp
import optax

from alignjax.types import Array


def sequence_sum(per_token: Array, mask: Array) -> Array:
    """Returns sum_n x_n over the real tokens: x and mask [B, T] -> [B]."""
    return jnp.sum(jnp.where(mask, per_token, 0.0), axis=-1)


def next_token(logp: Array, mask: Array) -> Array:
    """Returns the mean negative log-likelihood, a scalar in nats a token, of log-probs [B, T] where mask is true.

    Every token counts alike, in a long row and in a short one. Minimal at the distribution of the data.
    """
    return -jnp.sum(jnp.where(mask, logp, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def preference_cross_entropy(logit: Array, p: Array) -> Array:
    """Returns -p log s(z) - (1 - p) log s(-z), [B] nats, with s the sigmoid.

    logit [B]: z, the logit of P(first > second); p [B]: the label, hard (0, 1) or soft. Minimal at s(z) = p, where it
    is the label's entropy. 2312.00886 section 7 for the pairwise model; with z = r(first) - r(second) it is the
    Bradley-Terry loss of 2307.12950 section 3.
    """
    return optax.sigmoid_binary_cross_entropy(logit, p)
