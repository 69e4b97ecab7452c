"""The losses: one short function an equation. They know functions, never models.

An objective takes ``(params, batch, key)`` and, by keyword, its hyperparameters and the ``log_prob`` or
``logit`` function that a stage binds; it returns a scalar to minimise and metrics (batch means).
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import lax

from alignjax.types import Array, Key, LogProb, Metrics, Pair, Params, PreferenceLogit, Rollout, UserError


def sequence_sum(per_token: Array, mask: Array) -> Array:
    """[B, T] -> [B], padding excluded."""
    return jnp.sum(jnp.where(mask, per_token, 0.0), axis=-1)


def reward_to_go(per_token: Array) -> Array:
    """[B, T] -> [B, T]: G_n = sum of the terms with index m >= n."""
    return jnp.flip(jnp.cumsum(jnp.flip(per_token, -1), -1), -1)


def next_token(logp: Array, mask: Array) -> tuple[Array, Metrics]:
    """Mean negative log-likelihood, nats a token, of log-probs [B, T] where the mask is true."""
    loss = -jnp.sum(jnp.where(mask, logp, 0.0)) / jnp.maximum(jnp.sum(mask), 1)
    return loss, {"nll": loss}


def preference_cross_entropy(params: Params, pair: Pair, key: Key, *, logit: PreferenceLogit) -> tuple[Array, Metrics]:
    """-p log P(first > second) - (1 - p) log P(second > first), labels hard or soft.

    2312.00886 section 7 for the pairwise model; with ``logit`` = r(first) - r(second) it is the
    Bradley-Terry loss (2307.12950 section 3).
    """
    logits = logit(params, pair.prompt, pair.first, pair.second)
    loss = jnp.mean(optax.sigmoid_binary_cross_entropy(logits, pair.p))
    agree = jnp.sign(logits) * jnp.sign(pair.p - 0.5)
    return loss, {"loss": loss, "accuracy": jnp.mean(0.5 + 0.5 * agree)}


def nash_md(params: Params, rollout: Rollout, key: Key, *, log_prob: LogProb, tau: float) -> tuple[Array, Metrics]:
    """Nash-MD-PG (2312.00886, Eq. 13-14 and App. F.2): its gradient is minus the estimate

        sum_n grad log pi(y_n) * ( P(y > y') - 1/2 - tau * sum_{m >= n} log[pi(y_m) / mu(y_m)] ),

    averaged over the batch. 1/2 is the baseline P(y > y); y' carries no gradient; the log-ratio is the
    sampled one, and a token is answerable for the KL from its own place on (reward-to-go).
    """
    if not tau >= 0:
        raise UserError(f"tau={tau} must not be negative")
    mask = rollout.y.mask
    logp = log_prob(params, rollout.prompt, rollout.y)
    ratio = jnp.where(mask, lax.stop_gradient(logp) - rollout.ref_logp, 0.0)
    advantage = rollout.p[:, None] - 0.5 - tau * reward_to_go(ratio)
    loss = -jnp.mean(sequence_sum(logp * lax.stop_gradient(advantage), mask))
    kl = jnp.mean(sequence_sum(ratio, mask))
    preference = jnp.mean(rollout.p)
    return loss, {
        "preference": preference,
        "kl": kl,
        "objective": preference - tau * kl,
        "length": jnp.mean(jnp.sum(mask, -1).astype(jnp.float32)),
    }
