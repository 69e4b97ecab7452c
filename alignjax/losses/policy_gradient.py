"""Policy gradients on the tokens of drawn responses. y_n is token n of y ~ pi; log-probs are in nats."""

from __future__ import annotations

import math

import jax.numpy as jnp
from jax import lax

from alignjax.errors import UserError
from alignjax.losses.supervised import sequence_sum
from alignjax.types import Array


def reward_to_go(per_token: Array) -> Array:
    """Returns G_n = sum_{m >= n} x_m, [B, T] -> [B, T]; x is 0 on padding."""
    return jnp.flip(jnp.cumsum(jnp.flip(per_token, -1), -1), -1)


def reinforce(logp: Array, advantage: Array, mask: Array) -> Array:
    """Returns -sum_n log pi(y_n) A_n, [B], whose gradient is minus sum_n grad log pi(y_n) A_n.

    logp, advantage and mask are [B, T]. No gradient flows through the advantage (Williams 1992).
    """
    return -sequence_sum(logp * lax.stop_gradient(advantage), mask)


def regularized_policy_gradient(logp: Array, reference_logp: Array, mask: Array, gain: Array, *, tau: float) -> Array:
    """Returns the loss [B] whose gradient is minus the estimate of grad (E[gain] - tau KL(pi, mu)):

        sum_n grad log pi(y_n) ( gain(y) - tau sum_{m >= n} log[pi(y_m) / mu(y_m)] ).

    logp, reference_logp, mask: [B, T]; gain: [B]; tau: units of the gain per nat. The log-ratio is the sampled one,
    and a token answers for the KL from its own place on (reward-to-go; 2312.00886 App. F.2): keeping only the term of
    the same token is a wrong gradient. Stationary at pi proportional to mu exp(gain / tau).
    """
    if not 0 <= tau < math.inf:
        raise UserError(f"tau={tau} must be finite and not negative")
    log_ratio = jnp.where(mask, logp - reference_logp, 0.0)
    return reinforce(logp, gain[:, None] - tau * reward_to_go(log_ratio), mask)


def nash_md(logp: Array, reference_logp: Array, mask: Array, preference: Array, *, tau: float) -> Array:
    """Returns the loss of Nash-MD-PG (2312.00886, Eq. 13-14), [B]; its gradient is minus the estimate

        sum_n grad log pi(y_n) ( P(y > y') - 1/2 - tau sum_{m >= n} log[pi(y_m) / mu(y_m)] ).

    logp, reference_logp, mask: [B, T] of y ~ pi; preference [B]: P(y > y') with y' from the mixture pi^(1-beta) mu^beta
    (Eq. 15). y' carries no gradient. 1/2 = P(y > y) is the baseline; there is no critic. Where pi is stationary,
    pi^(1-beta) mu^beta over whole responses is the Nash policy at temperature tau / (1 - beta). The opponent is drawn
    from the token-wise mixture (App. F.1), which is that one for responses of one token and another for longer ones.
    """
    return regularized_policy_gradient(logp, reference_logp, mask, preference - 0.5, tau=tau)
