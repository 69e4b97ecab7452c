"""Direct alignment: losses on log-ratios of whole responses, first and second [B] = log pi(y | x) - log mu(y | x),
nats.

p [B] is P(first > second): a hard (0, 1) or soft label, or a preference model's probability.
"""

from __future__ import annotations

import jax

from alignjax.errors import UserError
from alignjax.types import Array


def dpo(first: Array, second: Array, p: Array, *, beta: float) -> Array:
    """Returns -p log s(beta d) - (1 - p) log s(-beta d), [B], with d = first - second and s the sigmoid.

    Stationary where s(beta d) = p: pi is proportional to mu exp(r / beta) with r the Bradley-Terry reward of p
    (2305.18290, Eq. 7, with soft labels).
    """
    _check_positive("beta", beta)
    margin = beta * (first - second)
    return -p * jax.nn.log_sigmoid(margin) - (1 - p) * jax.nn.log_sigmoid(-margin)


def ipo(first: Array, second: Array, p: Array, *, tau: float) -> Array:
    """Returns p (d - 1 / (2 tau))^2 + (1 - p) (d + 1 / (2 tau))^2, [B], with d = first - second.

    Stationary where d = (2 p - 1) / (2 tau), which a sure label does not push to infinity (2310.12036).
    """
    _check_positive("tau", tau)
    margin, target = first - second, 1 / (2 * tau)
    return p * (margin - target) ** 2 + (1 - p) * (margin + target) ** 2


def online_ipo(first: Array, second: Array, p: Array, *, tau: float) -> Array:
    """Returns tau * ipo = tau d^2 - (2 p - 1) d + constant, [B], with d = first - second (2403.08635).

    With both responses drawn from pi, and no gradient through the drawing, its expected gradient is -4 times that of
    self-play: E[grad log pi(y) (P(y > y') - 1/2 - tau log[pi(y) / mu(y)])]. So it is stationary at the Nash policy at
    temperature tau. With both drawn from the mixture pi^(1-beta) mu^beta it is IPO-MD, which is stationary
    where Nash-MD-PG with that mixture is (``policy_gradient.nash_md``).
    """
    return tau * ipo(first, second, p, tau=tau)


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"{name}={value} must be positive")
