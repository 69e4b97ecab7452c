"""Direct alignment: losses on the log-ratios of two whole responses, drawn or stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp

from alignjax import losses
from alignjax.objectives.scoring import (
    KL_MEANING,
    LENGTH_MEANING,
    require_reference,
    response_metrics,
    score_responses,
)
from alignjax.types import Array, Extras, Key, Metrics, Pairs, Params, PolicyFunctions, PreferenceBatch


@dataclasses.dataclass(frozen=True)
class DirectAlignment:
    """A loss on the sequence log-ratios of a pair: ``loss(log pi/mu (y_0), log pi/mu (y_1), P(y_0 > y_1))``.

    With ``losses.dpo`` or ``losses.ipo`` it learns from pairs on disk, with ``losses.online_ipo`` from pairs that the
    samplers draw: (policy, policy) is online IPO, (mixture(beta), mixture(beta)) is IPO-MD (2403.08635).
    """

    loss: Callable[..., Array]  # ([B], [B], [B]) -> [B], for example partial(losses.dpo, beta=0.1)
    scored: ClassVar[tuple[int, ...]] = (0, 1)
    on_policy: ClassVar[tuple[int, ...]] = ()
    compared: ClassVar[Pairs] = ((0, 1),)
    rewarded: ClassVar[bool] = False
    extras: ClassVar[Extras] = Extras()
    meanings: ClassVar[dict[str, str]] = {
        "loss": "the mean loss of a pair",
        "accuracy": "share of pairs whose preferred response has the larger log-ratio; ties count 1/2",
        "log_ratio_margin": "log-ratio to the reference of the preferred response minus that of the other, nats",
        "kl": f"{KL_MEANING}, where the policy wrote them",
        "length": LENGTH_MEANING,
    }

    def __call__(
        self, params: Params, batch: PreferenceBatch, key: Key, /, *, policy: PolicyFunctions
    ) -> tuple[Array, Metrics]:
        """Returns the mean loss and metrics."""
        logps = score_responses(policy.log_prob, params, batch, self.scored)
        ratios = [
            losses.sequence_sum(logp - require_reference(response), response.completion.mask)
            for logp, response in zip(logps, batch.responses[:2], strict=True)
        ]
        p = batch.probability(0, 1)
        loss, sign = jnp.mean(self.loss(*ratios, p)), jnp.sign(p - 0.5)
        margin = sign * (ratios[0] - ratios[1])
        accuracy = jnp.mean(0.5 + 0.5 * jnp.sign(margin))
        metrics = {"loss": loss, "accuracy": accuracy, "log_ratio_margin": jnp.mean(margin)}
        return loss, {**metrics, **response_metrics(logps[0], batch.responses[0])}
