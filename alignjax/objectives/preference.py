"""Policy gradients without a critic: of a preference, or of a reward."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp

from alignjax.errors import POSITIVE, check_range
from alignjax.objectives.scoring import KL_MEANING, LENGTH_MEANING, require_reference, response_metrics
from alignjax.types import Array, Extras, Key, Metrics, Pairs, Params, PolicyFunctions, PreferenceBatch


@dataclasses.dataclass(frozen=True)
class PreferenceGradient:
    """A policy gradient of a preference: ``loss(logp, reference_logp, mask, P(y_0 > y_1))``.

    Response 0 is the policy's own; response 1 is the opponent's and carries no gradient. With ``losses.nash_md`` and
    the samplers (policy, mixture(beta)) it is Nash-MD-PG (2312.00886, Eq. 13-15).
    """

    loss: Callable[..., Array]  # ([B, T], [B, T], [B, T], [B]) -> [B], for example partial(losses.nash_md, tau=0.02)
    scored: ClassVar[tuple[int, ...]] = (0,)
    on_policy: ClassVar[tuple[int, ...]] = (0,)
    compared: ClassVar[Pairs] = ((0, 1),)
    rewarded: ClassVar[bool] = False
    extras: ClassVar[Extras] = Extras()
    meanings: ClassVar[dict[str, str]] = {
        "preference": "P(y > y') of the policy's response over its opponent's, who may move with it",
        "kl": KL_MEANING,
        "length": LENGTH_MEANING,
    }

    def __call__(
        self, params: Params, batch: PreferenceBatch, key: Key, /, *, policy: PolicyFunctions
    ) -> tuple[Array, Metrics]:
        """Returns the mean loss and metrics."""
        response, preference = batch.responses[0], batch.probability(0, 1)
        logp, mask = policy.log_prob(params, batch.prompt, response.completion), response.completion.mask
        loss = jnp.mean(self.loss(logp, require_reference(response), mask, preference))
        return loss, {"preference": jnp.mean(preference), **response_metrics(logp, response)}


@dataclasses.dataclass(frozen=True)
class RewardGradient:
    """A policy gradient of a reward: ``loss(logp, reference_logp, mask, r(y_0) - r(y_1))``.

    Response 1 is the baseline: it is independent of response 0, whoever writes it. The difference is clipped to
    [-bound, bound] nats; between a valid response and an invalid one it is the bound. With
    ``losses.regularized_policy_gradient`` it is RLHF of 2312.00886, section 8, without a critic.
    """

    loss: Callable[..., Array]  # ([B, T], [B, T], [B, T], [B]) -> [B]
    bound: float  # nats
    scored: ClassVar[tuple[int, ...]] = (0,)
    on_policy: ClassVar[tuple[int, ...]] = (0,)
    compared: ClassVar[Pairs] = ((0, 1),)
    rewarded: ClassVar[bool] = True
    extras: ClassVar[Extras] = Extras()
    meanings: ClassVar[dict[str, str]] = {
        **PreferenceGradient.meanings,
        "margin": "r(y) - r(y') of the policy's response and its opponent's, clipped, nats",
    }

    def __post_init__(self) -> None:
        check_range(self, POSITIVE, float("inf"), "bound")

    def __call__(
        self, params: Params, batch: PreferenceBatch, key: Key, /, *, policy: PolicyFunctions
    ) -> tuple[Array, Metrics]:
        """Returns the mean loss and metrics."""
        response, margin = batch.responses[0], jnp.clip(batch.margin(0, 1), -self.bound, self.bound)
        logp, mask = policy.log_prob(params, batch.prompt, response.completion), response.completion.mask
        loss = jnp.mean(self.loss(logp, require_reference(response), mask, margin))
        metrics = {"preference": jnp.mean(batch.probability(0, 1)), "margin": jnp.mean(margin)}
        return loss, {**metrics, **response_metrics(logp, response)}
