"""The losses: one short function an equation. They know functions, never models.

An objective takes ``(params, batch, key)`` and, by keyword, its hyperparameters and the ``log_prob`` or
``logit`` function that a stage binds; it returns a scalar to minimise and metrics (batch means).
"""

from __future__ import annotations

import jax.numpy as jnp
import optax
from jax import lax

from alignjax.errors import UserError
from alignjax.types import Array, Key, LogProb, Metrics, Pair, Params, PreferenceLogit, Rollout


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
    loss, metrics = regularised(params, rollout, rollout.p - 0.5, log_prob, tau)
    return loss, {**metrics, "objective": metrics["preference"] - tau * metrics["kl"]}


def policy_gradient(
    params: Params, rollout: Rollout, key: Key, *, log_prob: LogProb, tau: float, bound: float
) -> tuple[Array, Metrics]:
    """The regularised policy gradient of a reward, without a critic (RLHF in 2312.00886, section 8): as ``nash_md``,
    with r(y) - r(y') in the place of P(y > y') - 1/2: the logit of P, where P is a Bradley-Terry model's.

    y' is the baseline, whoever writes it: it is independent of y. The difference is cut to [-bound, bound], which is
    the penalty of a reply that loses outright because it did not end.
    """
    if not (tau >= 0 and bound > 0):
        raise UserError(f"tau={tau} must not be negative, and bound={bound} must be positive")
    margin = jnp.clip(jnp.log(rollout.p) - jnp.log1p(-rollout.p), -bound, bound)
    return regularised(params, rollout, margin, log_prob, tau)


def regularised(params: Params, rollout: Rollout, gain: Array, log_prob: LogProb, tau: float) -> tuple[Array, Metrics]:
    """Policy gradient of a gain [B] minus tau times the KL to the reference, sampled and reward-to-go."""
    mask = rollout.y.mask
    logp = log_prob(params, rollout.prompt, rollout.y)
    ratio = jnp.where(mask, logp - rollout.ref_logp, 0.0)
    advantage = gain[:, None] - tau * reward_to_go(ratio)
    loss = -jnp.mean(sequence_sum(logp * lax.stop_gradient(advantage), mask))
    return loss, {
        "preference": jnp.mean(rollout.p),
        "kl": jnp.mean(sequence_sum(ratio, mask)),
        "length": jnp.mean(jnp.sum(mask, -1).astype(jnp.float32)),
    }
