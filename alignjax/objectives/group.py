"""Policy gradients whose baseline is the other responses to the same prompt: RLOO and GRPO."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax.numpy as jnp

from alignjax import losses
from alignjax.errors import UserError, check_range
from alignjax.objectives.scoring import (
    KL_MEANING,
    LENGTH_MEANING,
    pay_invalid,
    require_behavior,
    require_reference,
    require_rewards,
    response_metrics,
    score_responses,
)
from alignjax.types import Array, Extras, Key, Metrics, Pairs, Params, PolicyFunctions, PreferenceBatch, Roles


@dataclasses.dataclass(frozen=True)
class GroupGradient:
    """A policy gradient of the rewards of K responses to each prompt, all the policy's: ``samplers=(policy,) * K``.

    RLOO (2402.14740): ``advantage=losses.leave_one_out``, ``loss=losses.score_function``, ``tau`` of the KL in the
    reward, ``average=losses.mean_of_sums``. GRPO (2402.03300): ``losses.group_standardized``,
    ``partial(losses.grpo, clip=.2, tau=.04)``, no KL in the reward, ``losses.sequence_mean``. Without its biases
    (2503.20783): ``losses.group_centered`` and ``partial(losses.mean_of_sums, length=...)``.
    """

    responses: int  # K
    advantage: Callable[[Array], Array]  # rewards [B, K] -> [B, K]
    loss: Callable[..., Array]  # (logp, behavior_logp, reference_logp [N, T], advantage [N, 1]) -> [N, T], N = B K
    average: Callable[[Array, Array], Array]  # (x, mask [N, T]) -> the loss
    tau: float = 0.0  # reward per nat of the KL of the whole response
    invalid: Callable[[Array, Array], Array] | None = partial(losses.below_the_lowest, margin=1.0)  # as of ``PPO``
    compared: ClassVar[Pairs] = ()
    rewarded: ClassVar[bool] = True
    meanings: ClassVar[dict[str, str]] = {
        "reward": "r(x, y), or what is paid for an invalid response, nats",
        "spread": "standard deviation of the rewards to one prompt, nats",
        "kl": KL_MEANING,
        "length": LENGTH_MEANING,
    }

    def __post_init__(self) -> None:
        if not isinstance(self.responses, int) or self.responses < 2:
            raise UserError(f"GroupGradient.responses={self.responses!r} must be a whole number from 2 on")
        check_range(self, 0, math.inf, "tau")

    @property
    def scored(self) -> tuple[int, ...]:
        """Every response."""
        return tuple(range(self.responses))

    @property
    def on_policy(self) -> tuple[int, ...]:
        """Every response."""
        return self.scored

    @property
    def extras(self) -> Extras:
        """What is paid for invalid responses is known before the policy moves."""
        return Extras(prepare=self.prepare)

    def prepare(self, roles: Roles, batch: PreferenceBatch, policy: PolicyFunctions) -> PreferenceBatch:
        """Returns the batch with the rewards that are paid."""
        return pay_invalid(batch, self.invalid)

    def __call__(
        self, params: Params, batch: PreferenceBatch, key: Key, /, *, policy: PolicyFunctions
    ) -> tuple[Array, Metrics]:
        """Returns the mean loss over all responses, and metrics."""
        responses, rewards = [batch.responses[k] for k in self.scored], require_rewards(batch)
        masks = [response.completion.mask for response in responses]
        ratios = [require_behavior(response) - require_reference(response) for response in responses]
        kl = jnp.stack([losses.sequence_sum(*pair) for pair in zip(ratios, masks, strict=True)], 1)
        advantage = self.advantage(rewards - self.tau * kl)
        logps = score_responses(policy.log_prob, params, batch, self.scored)
        per_token = [
            self.loss(logp, response.behavior_logp, response.reference_logp, advantage[:, k, None])
            for k, (logp, response) in enumerate(zip(logps, responses, strict=True))
        ]
        loss = self.average(jnp.concatenate(per_token), jnp.concatenate(masks))
        measured = [response_metrics(logp, response) for logp, response in zip(logps, responses, strict=True)]
        means = {name: jnp.mean(jnp.stack([m[name] for m in measured])) for name in measured[0]}
        return loss, {"reward": jnp.mean(rewards), "spread": jnp.mean(jnp.std(rewards, 1)), **means}
