"""Direct alignment: losses on log-ratios of whole responses, nats.

first and second [B] are log pi(y | x) - log mu(y | x) of two responses. p [B] is P(first > second): a hard (0, 1) or
soft label, or a preference model's probability. Losses of a group of K responses, which pi_t wrote, take arrays [B, K]:
moved = log pi(y_k | x) - log pi_t(y_k | x), and preference [B, K, K] = P(y_i > y_j | x), which is 1/2 where i = j.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.errors import UserError
from alignjax.types import Array


def dpo(first: Array, second: Array, p: Array, *, beta: float) -> Array:
    """Returns -p log s(beta d) - (1 - p) log s(-beta d), [B], with d = first - second and s the sigmoid.

    Stationary where s(beta d) = p: pi is proportional to mu exp(r / beta) with r the Bradley-Terry reward of p
    (2305.18290, Eq. 7, with soft labels). Online DPO (2402.04792) draws both responses from pi. Where P has no such
    reward, r is then the Bradley-Terry fit of P on pairs drawn from pi itself (``games.zoo.bradley_terry_rewards``).
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


def xpo(first: Array, second: Array, p: Array, *, beta: float, alpha: float) -> Array:
    """Returns dpo + alpha second, [B] (2405.21046): the policy writes the first response, the reference the second.

    alpha >= 0 is the weight of exploration: the reference's responses lose log-prob, whatever their label. With
    g(y) = pi(y) E[s(beta d(y, y')) - P(y > y')] - mu(y) E[s(beta d(y'', y)) - P(y'' > y)], where y' ~ mu, y'' ~ pi and
    d is the difference of log-ratios, it is stationary where beta g = alpha (pi - mu). Keep alpha well below beta: a
    response that the policy's beat with P > 1 - alpha / beta loses log-prob without end.
    """
    _check_not_negative("alpha", alpha)
    return dpo(first, second, p, beta=beta) + alpha * second


def opponent_ipo(first: Array, second: Array, p: Array, other_p: Array, *, tau: float) -> Array:
    """Returns (d - (p - other_p) / tau)^2, [B], with d = first - second, p = P(y > y'') and other_p = P(y' > y'').

    y'' is the opponent's response: the loss of EGPO (2503.08942), which adds ``TrainPolicy(extragradient=True)``.
    Whoever writes y and y', it is minimal in expectation at the best response, mu exp(P(y > pi'') / tau). So with
    y'' ~ pi it is stationary at the Nash policy at temperature tau. With y and y' uniform over Y responses, a step lr
    along its gradient on the logits is (1 - h tau) log pi + h (tau log mu + P(y > pi'')) with h = 4 lr / (tau Y).
    """
    _check_positive("tau", tau)
    return (first - second - (p - other_p) / tau) ** 2


def inpo(moved: Array, preference: Array, log_ratio: Array, *, tau: float, eta: float) -> Array:
    """Returns the mean over all pairs i < j of p (d - 1 / (2 eta))^2 + (1 - p) (d + 1 / (2 eta))^2, [B], with

        d = D[log pi] - (tau / eta) D[log mu] - (1 - tau / eta) D[log pi_t],   D[f] = f(y_i) - f(y_j),

    and log_ratio [B, K] = log pi/mu (2407.00617). tau and eta >= tau: preference per nat; eta is the inverse of the
    step size. In expectation it is minimal at pi proportional to mu^(tau / eta) pi_t^(1 - tau / eta)
    exp(P(y > pi_t) / eta): a step of mirror descent, which stays at the Nash policy at temperature tau.
    """
    _check_positive("eta", eta)
    if not 0 <= tau <= eta:
        raise UserError(f"tau={tau} must be in [0, eta={eta}]: mu has the weight tau / eta in a step")
    blend = (1 - tau / eta) * moved + tau / eta * log_ratio
    i, j = np.triu_indices(blend.shape[-1], 1)
    return jnp.mean(ipo(blend[:, i], blend[:, j], preference[:, i, j], tau=eta), -1)


def sppo(moved: Array, preference: Array, *, eta: float) -> Array:
    """Returns the mean over k of (moved_k - eta (P(y_k > pi_t) - 1/2))^2, [B] (2405.00675).

    P(y_k > pi_t) is estimated by the mean over the other K - 1 responses. eta is the step size, nats per preference. In
    expectation it is minimal where log pi/pi_t = eta (P(y > pi_t) - 1/2) - KL(pi_t, pi) pi/pi_t. That is the step of
    multiplicative weights, pi_t exp(eta P(y > pi_t)), but for terms of the third order in eta. The last policy cycles;
    the average of the policies approaches the Nash policy without regularisation.
    """
    _check_positive("eta", eta)
    wins = (jnp.sum(preference, -1) - 0.5) / (moved.shape[-1] - 1)
    return jnp.mean((moved - eta * (wins - 0.5)) ** 2, -1)


def _check_not_negative(name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise UserError(f"{name}={value} must be finite and not negative")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise UserError(f"{name}={value} must be finite and positive")
