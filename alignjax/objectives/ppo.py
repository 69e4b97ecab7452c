"""PPO: a policy and a critic that learn from one reward a response (1707.06347; for language models 1909.08593)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import ClassVar

import jax.numpy as jnp

from alignjax import losses
from alignjax.errors import POSITIVE, UserError, check_range
from alignjax.models.heads import apply_head, init_head
from alignjax.objectives.scoring import (
    KL_MEANING,
    LENGTH_MEANING,
    pay_invalid,
    require_behavior,
    require_reference,
    require_rewards,
    response_metrics,
)
from alignjax.types import (
    Array,
    Estimates,
    Extras,
    Key,
    Metrics,
    Pairs,
    Params,
    PolicyFunctions,
    PreferenceBatch,
    Response,
    Roles,
)

Places = Callable[[Array], Array]
"""The mask of a response's tokens [B, T] -> the places that something is done at, [B, T] bool."""
Whiten = Callable[[Array, Array], Array]
"""(x [B, T], places [B, T]) -> x, standardised over the places."""
Invalid = Callable[[Array, Array], Array]
"""(rewards [B, K], whether responses are valid [B, K]) -> the rewards that are paid, [B, K]."""


@dataclasses.dataclass(frozen=True)
class KLTarget:
    """Lets tau follow the KL of the collected responses (1909.08593, section 2.2)."""

    kl: float = 6.0  # nats a response
    horizon: float = 10_000.0  # responses: how slowly tau moves

    def __post_init__(self) -> None:
        check_range(self, POSITIVE, math.inf, "kl", "horizon")


@dataclasses.dataclass(frozen=True)
class PPO:
    """Clipped policy gradient with a critic, of the reward of response 0 less tau times the KL of every token.

    The score r(x, y), or what ``invalid`` makes of it where the response is not valid, is paid at its last token.
    Rewards, values and
    advantages are those of the policy that wrote; ``Loop(epochs=, minibatches=)`` says how often it learns from them.
    The defaults are the correct form. ``training.presets`` has the settings of published code, each of whose deviations
    is a value of a field here. Losses are means over the places of a minibatch, so parts of ``Loop.accumulate`` with
    fewer tokens weigh as much as others.
    """

    tau: float  # reward per nat; the first value where there is a ``target``
    kl: Callable[[Array], Array] = losses.k1  # a token's KL as it is paid, from log pi/mu; losses.clamped_k1 is biased
    target: KLTarget | None = None  # None: tau stays as it is
    discount: float = 1.0
    gae_lambda: float = 0.95
    clip: float = 0.2  # of the ratio
    value_clip: float = 0.2  # nats
    value_coefficient: float = 0.1
    invalid: Invalid | None = partial(losses.below_the_lowest, margin=1.0)  # None: its reward
    score_places: Places = losses.real_tokens  # the score is paid at the last of these
    value_places: Places = losses.real_tokens  # the critic is read and trained here; values elsewhere are 0
    policy_places: Places = losses.real_tokens  # the policy learns here
    whiten_rewards: Whiten | None = None
    whiten_advantages: Whiten | None = losses.whiten
    whiten_minibatches: bool = False  # over each minibatch, and not over the whole batch
    scored: ClassVar[tuple[int, ...]] = (0,)
    on_policy: ClassVar[tuple[int, ...]] = (0,)
    compared: ClassVar[Pairs] = ()
    rewarded: ClassVar[bool] = True
    meanings: ClassVar[dict[str, str]] = {
        "reward": "r(x, y), or what is paid for an invalid response, nats",
        "tau": "reward per nat of KL",
        "value_loss": "half the squared error of the critic, clipped, a token",
        "approximate_kl": "half the squared change of a token's log-prob since it was drawn, in the last epoch",
        "clipped": "share of tokens whose ratio is clipped, in the last epoch",
        "kl": KL_MEANING,
        "length": LENGTH_MEANING,
    }

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "tau", "value_coefficient")
        check_range(self, POSITIVE, math.inf, "clip", "value_clip")
        check_range(self, 0, 1, "discount", "gae_lambda")
        if self.kl in (losses.k2, losses.k3):
            raise UserError("PPO.kl is paid as a reward, and k2 and k3 have the KL's value but not its gradient there; "
                            "use losses.k1")  # fmt: skip
        if self.target and self.tau == 0:
            raise UserError("PPO.tau=0 stays 0, whatever the KL; give its first value, such as 0.15")

    @property
    def extras(self) -> Extras:
        """A value head, advantages before the policy moves, and tau, which may follow the KL."""
        last = ("approximate_kl", "clipped")
        return Extras(_value_head, self.prepare, self.controls, self.adapt, last, self.whiten_minibatches)

    def controls(self) -> Params:
        """Returns the first tau."""
        return {"tau": jnp.float32(self.tau)}

    def adapt(self, controls: Params, batch: PreferenceBatch) -> Params:
        """Returns tau for the next batch."""
        if self.target is None:
            return controls
        kl = jnp.mean(jnp.sum(self.token_kl(batch.responses[0]), -1))
        rows = len(batch.prompt.tokens)
        if rows >= 5 * self.target.horizon:
            raise UserError(f"PPO.target.horizon={self.target.horizon:g} lets tau change its sign in a batch of "
                            f"{rows}; raise it")  # fmt: skip
        return {
            "tau": losses.adapted_coefficient(
                controls["tau"], kl, rows, target=self.target.kl, horizon=self.target.horizon
            )
        }

    def prepare(self, roles: Roles, batch: PreferenceBatch, policy: PolicyFunctions) -> PreferenceBatch:
        """Returns the batch with rewards, values and advantages of the policy that wrote it."""
        batch = pay_invalid(batch, self.invalid)
        response, tau = batch.responses[0], roles.controls.get("tau", self.tau)
        mask = response.completion.mask
        last = losses.last_place(self.score_places(mask))
        reward = losses.token_rewards(self.token_kl(response), require_rewards(batch)[:, 0], last, tau)
        value = jnp.where(self.value_places(mask), self.values(roles.policy, batch, policy), 0.0)
        estimates = Estimates(value, reward, *self.advantages(mask, reward, value), jnp.broadcast_to(tau, len(mask)))
        response = dataclasses.replace(response, estimates=estimates)
        return dataclasses.replace(batch, responses=(response, *batch.responses[1:]))

    def token_kl(self, response: Response) -> Array:
        """Returns the estimate of each token's KL when the response was drawn, [B, T] nats, 0 on padding."""
        log_ratio = require_behavior(response) - require_reference(response)
        return jnp.where(response.completion.mask, self.kl(log_ratio), 0.0)

    def values(self, params: Params, batch: PreferenceBatch, policy: PolicyFunctions) -> Array:
        """Returns the critic's V_n before each token of response 0, [B, T]."""
        return apply_head(params["value"], policy.states(params, batch.prompt, batch.responses[0].completion))

    def advantages(self, mask: Array, reward: Array, value: Array) -> tuple[Array, Array]:
        """Returns advantages and the critic's targets, both [B, T], from rewards and values of the tokens."""
        if self.whiten_rewards:
            reward = self.whiten_rewards(reward, self.value_places(mask))
        advantage = losses.generalized_advantage(reward, value, discount=self.discount, gae_lambda=self.gae_lambda)
        whitened = self.whiten_advantages(advantage, self.policy_places(mask)) if self.whiten_advantages else advantage
        return whitened, advantage + value

    def __call__(
        self, params: Params, batch: PreferenceBatch, key: Key, /, *, policy: PolicyFunctions
    ) -> tuple[Array, Metrics]:
        """Returns the policy's loss plus ``value_coefficient`` times the critic's, and metrics."""
        response, estimates = batch.responses[0], batch.responses[0].estimates
        assert estimates is not None  # ``prepare`` has made them
        mask, old = response.completion.mask, require_behavior(response)
        advantage, target = estimates.advantage, estimates.target
        if self.whiten_minibatches:
            advantage, target = self.advantages(mask, estimates.reward, estimates.value)
        logp, value = policy.log_prob(params, batch.prompt, response.completion), self.values(params, batch, policy)
        actor = losses.clipped_gradient(logp, old, advantage, clip=self.clip)
        critic = losses.clipped_value_loss(value, estimates.value, target, clip=self.value_clip)
        value_loss = losses.masked_mean(critic, self.value_places(mask))
        loss = losses.masked_mean(actor, self.policy_places(mask)) + self.value_coefficient * value_loss
        is_clipped = jnp.abs(jnp.expm1(logp - old)) > self.clip
        metrics = {
            "reward": jnp.mean(require_rewards(batch)[:, 0]),
            "tau": jnp.mean(estimates.tau),
            "value_loss": value_loss,
            "approximate_kl": losses.masked_mean(losses.k2(logp - old), self.policy_places(mask)),
            "clipped": losses.masked_mean(is_clipped, self.policy_places(mask)),
        }
        return loss, {**metrics, **response_metrics(logp, response)}


def _value_head(width: int) -> Params:
    return {"value": init_head(width)}
