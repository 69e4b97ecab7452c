"""Proximal policy optimisation on arrays (1707.06347; for language models 1909.08593).

y_n is token n of a response and V_n the critic's value before it. Arrays are [B, T] unless said otherwise; log-probs
and KLs are in nats, rewards and values in the reward model's nats.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax

from alignjax.types import Array


def k1(log_ratio: Array) -> Array:
    """Returns log pi/mu: for y ~ pi its mean is KL(pi, mu), exactly."""
    return log_ratio


def k2(log_ratio: Array) -> Array:
    """Returns (log pi/mu)^2 / 2: never negative, and biased by third order in the log-ratio.

    It estimates the value of the KL. Paid as a reward it does not have the KL's gradient, which k1 has.
    """
    return log_ratio**2 / 2


def k3(log_ratio: Array) -> Array:
    """Returns mu/pi - 1 - log mu/pi: never negative, and for y ~ pi its mean is KL(pi, mu), exactly.

    It estimates the value of the KL. Paid as a reward its gradient is that of KL(pi, mu) - KL(mu, pi), which vanishes
    to first order near the reference; in a loss it is that of KL(mu, pi).
    """
    return jnp.expm1(-log_ratio) + log_ratio


def clamped_k1(log_ratio: Array) -> Array:
    """Returns max(log pi/mu, 0), whose mean is above the KL. AlpacaFarm and the code of 2307.12950 use it."""
    return jnp.maximum(log_ratio, 0.0)


def real_tokens(mask: Array) -> Array:
    """Returns the mask as it is: the tokens of a response, its stop token included."""
    return mask


def one_past_the_end(mask: Array) -> Array:
    """Returns the real tokens and, where there is room, the place after them: the state there has read it all."""
    return mask | jnp.pad(mask[:, :-1], ((0, 0), (1, 0)), constant_values=True)


def all_places(mask: Array) -> Array:
    """Returns true everywhere, on padding too."""
    return jnp.ones_like(mask)


def last_place(mask: Array) -> Array:
    """Returns whether a place is the last true one of its row, [B, T] bool."""
    return mask & (jnp.cumsum(mask, -1) == jnp.sum(mask, -1, keepdims=True))


def below_the_lowest(reward: Array, valid: Array, *, margin: float) -> Array:
    """Returns the rewards with those of invalid responses ``margin`` nats below the lowest of a valid one.

    reward and valid are [B, K]; the lowest is that of the whole batch. Only differences of rewards mean something, so
    that a constant would be a penalty under one reward model and a prize under another. Without a valid response all
    are ``-margin``.
    """
    lowest = jnp.min(jnp.where(valid, reward, jnp.inf))
    return jnp.where(valid, reward, jnp.where(jnp.isfinite(lowest), lowest, 0.0) - margin)


def replaced_rewards(reward: Array, valid: Array, *, by: float) -> Array:
    """Returns the rewards with ``by`` in place of those of invalid responses, [B, K].

    Published PPO does so, with rewards that are centred on the reference's replies (1909.08593, 2403.17031).
    """
    return jnp.where(valid, reward, by)


def token_rewards(kl: Array, score: Array, last: Array, tau: Array | float) -> Array:
    """Returns -tau kl_n, plus the score [B] at the place that ``last`` is true at."""
    return jnp.where(last, score[:, None], 0.0) - tau * kl


def generalized_advantage(reward: Array, value: Array, *, discount: float, gae_lambda: float) -> Array:
    """Returns A_n = sum_k (discount gae_lambda)^k d_{n+k} with d_n = reward_n + discount V_{n+1} - V_n.

    V is 0 behind the last place. Rewards and values must be 0 where there is no token. At discount = gae_lambda = 1 it
    is reward-to-go minus V_n (1506.02438, Eq. 16).
    """
    following = jnp.pad(value[:, 1:], ((0, 0), (0, 1)))
    difference = reward + discount * following - value

    def step(after: Any, now: Any) -> tuple[Any, Any]:
        advantage = now + discount * gae_lambda * after
        return advantage, advantage

    _, advantages = lax.scan(step, jnp.zeros_like(difference[:, 0]), difference.T, reverse=True)
    return advantages.T


def masked_mean(x: Array, mask: Array) -> Array:
    """Returns the mean of x over the true places, a scalar; every place of the batch counts alike."""
    return jnp.sum(jnp.where(mask, x, 0.0)) / jnp.maximum(jnp.sum(mask), 1)


def whiten(x: Array, mask: Array, *, keep_mean: bool = False) -> Array:
    """Returns (x - mean) / sqrt(variance + 1e-8) over the true places of the whole batch, 0 elsewhere.

    With ``keep_mean`` the mean is added again.
    """
    mean = masked_mean(x, mask)
    scaled = (x - mean) * lax.rsqrt(masked_mean((x - mean) ** 2, mask) + 1e-8)
    return jnp.where(mask, scaled + mean if keep_mean else scaled, 0.0)


def clipped_gradient(logp: Array, behavior_logp: Array, advantage: Array, *, clip: float) -> Array:
    """Returns -min(r_n A_n, clip(r_n, 1 - clip, 1 + clip) A_n), r_n = pi(y_n) / pi_behavior(y_n) (1707.06347, Eq. 7).

    At r = 1 its gradient is that of -A_n log pi(y_n).
    """
    ratio = jnp.exp(logp - behavior_logp)
    return -jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - clip, 1 + clip) * advantage)


def clipped_value_loss(value: Array, old: Array, target: Array, *, clip: float) -> Array:
    """Returns max((V - G)^2, (V' - G)^2) / 2, with V' the value kept within ``clip`` of the one before learning."""
    near = old + jnp.clip(value - old, -clip, clip)
    return jnp.maximum((value - target) ** 2, (near - target) ** 2) / 2


def adapted_coefficient(tau: Array, kl: Array, rows: int, *, target: float, horizon: float, most: float = 0.2) -> Array:
    """Returns tau (1 + clip(kl / target - 1, -most, most) rows / horizon): it rises while the KL is above its target.

    kl: the mean KL of ``rows`` responses, nats a response; horizon: responses (1909.08593, section 2.2).
    """
    return tau * (1 + jnp.clip(kl / target - 1, -most, most) * rows / horizon)


def leave_one_out(reward: Array) -> Array:
    """Returns r_k minus the mean of the other K - 1 rewards to the prompt: [B, K] -> [B, K] (RLOO, 2402.14740)."""
    count = reward.shape[-1]
    return (reward - jnp.mean(reward, -1, keepdims=True)) * count / (count - 1)


def group_centered(reward: Array) -> Array:
    """Returns r_k minus the mean of the K rewards to the prompt, [B, K]; unbiased up to scale (2503.20783)."""
    return reward - jnp.mean(reward, -1, keepdims=True)


def group_standardized(reward: Array) -> Array:
    """Returns (r_k - mean) / (std + 1e-4) over the K rewards to the prompt: [B, K] -> [B, K] (GRPO, 2402.03300).

    The deviation is the sample's, with K - 1. Equal rewards give 0.
    """
    centered = group_centered(reward)
    return centered / (jnp.sqrt(jnp.sum(centered**2, -1, keepdims=True) / (reward.shape[-1] - 1)) + 1e-4)


def grpo(
    logp: Array, behavior_logp: Array, reference_logp: Array, advantage: Array, *, clip: float, tau: float
) -> Array:
    """Returns ``clipped_gradient`` plus tau k3(log pi/mu), [B, T] (2402.03300, Eq. 3); advantage [B, T] or [B, 1].

    On the policy's own samples the second term has the value of KL(pi, mu) and the gradient of KL(mu, pi).
    """
    return clipped_gradient(logp, behavior_logp, advantage, clip=clip) + tau * k3(logp - reference_logp)


def score_function(logp: Array, behavior_logp: Array, reference_logp: Array, advantage: Array) -> Array:
    """Returns -A_n log pi(y_n), [B, T]; no gradient flows through the advantage (Williams 1992)."""
    return -logp * lax.stop_gradient(advantage)


def sequence_mean(x: Array, mask: Array) -> Array:
    """Returns the mean over rows of each row's mean over its true places: a short response's tokens count more."""
    rows = jnp.sum(jnp.where(mask, x, 0.0), -1) / jnp.maximum(jnp.sum(mask, -1), 1)
    return jnp.mean(rows)


def mean_of_sums(x: Array, mask: Array, *, length: float = 1.0) -> Array:
    """Returns the mean over rows of each row's sum over its true places, divided by ``length``.

    A constant in place of the row's own length leaves the gradient unbiased up to scale (2503.20783).
    """
    return jnp.mean(jnp.sum(jnp.where(mask, x, 0.0), -1)) / length
