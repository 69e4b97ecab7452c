"""Loss x batch -> objective: the only place where losses meet models.

An objective is a loss with its hyperparameters and an adapter. The adapter scores the responses that the loss reads
under the trained parameters and hands arrays to it. Drawn responses and pairs on disk have one form, PreferenceBatch.
A policy gradient needs responses that the policy itself has drawn; direct alignment runs on both.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp

from alignjax import losses
from alignjax.errors import POSITIVE, check_range
from alignjax.types import (
    Array,
    Completion,
    Key,
    LogProb,
    Metrics,
    Pairs,
    Params,
    PolicyFunctions,
    PreferenceBatch,
    PreferenceLogit,
    Prompt,
    Response,
    stack_rows,
)

_KL = "KL of the policy to the reference, nats a response, estimated from its samples"
_LENGTH = "tokens a response"


def no_heads(width: int) -> Params:
    """The ``heads`` of an objective without a critic."""
    return {}


def keep_batch(params: Params, batch: PreferenceBatch, policy: PolicyFunctions) -> PreferenceBatch:
    """The ``prepare`` of an objective that needs nothing more than was collected."""
    return batch


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
    heads: ClassVar[Callable[[int], Params]] = staticmethod(no_heads)
    prepare: ClassVar[Callable[..., PreferenceBatch]] = staticmethod(keep_batch)
    meanings: ClassVar[dict[str, str]] = {
        "preference": "P(y > y') of the policy's response over its opponent's, who may move with it",
        "kl": _KL,
        "length": _LENGTH,
    }

    def __call__(
        self, params: Params, batch: PreferenceBatch, key: Key, /, *, policy: PolicyFunctions
    ) -> tuple[Array, Metrics]:
        """Returns the mean loss and metrics."""
        response, preference = batch.responses[0], batch.probability(0, 1)
        logp, mask = policy.log_prob(params, batch.prompt, response.completion), response.completion.mask
        loss = jnp.mean(self.loss(logp, require_reference(response), mask, preference))
        return loss, {"preference": jnp.mean(preference), **_response_metrics(logp, response)}


@dataclasses.dataclass(frozen=True)
class RewardGradient:
    """A policy gradient of a reward: ``loss(logp, reference_logp, mask, r(y_0) - r(y_1))``.

    Response 1 is the baseline: it is independent of response 0, whoever writes it. The difference is clipped to
    [-bound, bound] nats; a response that loses outright has reward -inf, so that the bound is its penalty. With
    ``losses.regularized_policy_gradient`` it is RLHF of 2312.00886, section 8, without a critic.
    """

    loss: Callable[..., Array]  # ([B, T], [B, T], [B, T], [B]) -> [B]
    bound: float  # nats
    scored: ClassVar[tuple[int, ...]] = (0,)
    on_policy: ClassVar[tuple[int, ...]] = (0,)
    compared: ClassVar[Pairs] = ((0, 1),)
    rewarded: ClassVar[bool] = True
    heads: ClassVar[Callable[[int], Params]] = staticmethod(no_heads)
    prepare: ClassVar[Callable[..., PreferenceBatch]] = staticmethod(keep_batch)
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
        return loss, {**metrics, **_response_metrics(logp, response)}


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
    heads: ClassVar[Callable[[int], Params]] = staticmethod(no_heads)
    prepare: ClassVar[Callable[..., PreferenceBatch]] = staticmethod(keep_batch)
    meanings: ClassVar[dict[str, str]] = {
        "loss": "the mean loss of a pair",
        "accuracy": "share of pairs whose preferred response has the larger log-ratio; ties count 1/2",
        "log_ratio_margin": "log-ratio to the reference of the preferred response minus that of the other, nats",
        "kl": f"{_KL}, where the policy wrote them",
        "length": _LENGTH,
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
        return loss, {**metrics, **_response_metrics(logps[0], batch.responses[0])}


def score_responses(log_prob: LogProb, params: Params, batch: PreferenceBatch, numbers: tuple[int, ...]) -> list[Array]:
    """Returns log-probs [B, T] of the responses with these numbers, in one pass of B * len(numbers) rows."""
    completions = [batch.responses[k].completion for k in numbers]
    if len(completions) == 1:
        return [log_prob(params, batch.prompt, completions[0])]
    rows, prompts = stack_rows(completions), stack_rows([batch.prompt] * len(completions))
    logp = log_prob(params, prompts, rows)
    return list(jnp.moveaxis(logp.reshape(-1, len(completions), logp.shape[-1]), 1, 0))


def require_reference(response: Response) -> Array:
    """Returns the reference log-probs [B, T] of a response. Raises ValueError when it was not scored."""
    if response.reference_logp is None:
        raise ValueError("this response has no reference log-probs; the objective must list it in ``scored``")
    return response.reference_logp


def _response_metrics(logp: Array, response: Response) -> Metrics:
    """Returns the KL estimate and the length of responses with log-probs [B, T] under the policy."""
    mask = response.completion.mask
    return {
        "kl": jnp.mean(losses.sequence_sum(logp - require_reference(response), mask)),
        "length": jnp.mean(jnp.sum(mask, -1).astype(jnp.float32)),
    }


PREFERENCE_MEANINGS = {
    "loss": "the mean loss of a pair, nats for the cross-entropy",
    "accuracy": "share of labels that the preference model agrees with; ties count 1/2",
}


def preference_loss(
    params: Params, batch: PreferenceBatch, key: Key, /, *, loss: Callable[..., Array], logit: PreferenceLogit
) -> tuple[Array, Metrics]:
    """Returns the mean of ``loss(logit of P(y_0 > y_1), label)`` and metrics: how a preference model learns."""
    first, second = (response.completion for response in batch.responses)
    logits, p = logit(params, batch.prompt, first, second), batch.probability(0, 1)
    value = jnp.mean(loss(logits, p))
    agreement = jnp.sign(logits) * jnp.sign(p - 0.5)
    return value, {"loss": value, "accuracy": jnp.mean(0.5 + 0.5 * agreement)}


NEXT_TOKEN_MEANINGS = {"nll": "negative log-likelihood, nats a token of text"}


def next_token_loss(
    params: Params, batch: tuple[Prompt, Completion], key: Key, /, *, log_prob: LogProb
) -> tuple[Array, Metrics]:
    """Returns the mean negative log-likelihood of (prompt, completion) in nats a token, and metrics."""
    loss = losses.next_token(log_prob(params, *batch), batch[1].mask)
    return loss, {"nll": loss}
