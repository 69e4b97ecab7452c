"""Direct alignment: losses on the log-ratios of whole responses, drawn or stored."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
from collections.abc import Callable
from typing import ClassVar

import jax.numpy as jnp

from alignjax import losses
from alignjax.errors import UserError
from alignjax.objectives.scoring import (
    KL_MEANING,
    LENGTH_MEANING,
    require_behavior,
    require_reference,
    response_metrics,
    score_responses,
)
from alignjax.types import Array, Extras, Key, Metrics, Pairs, Params, PolicyFunctions, PreferenceBatch, Response

_WRITER_KL = "KL of the process that wrote response 0 to the reference, nats a response, estimated from its samples"
_PAIR_MEANINGS = {
    "loss": "the mean loss of a pair",
    "accuracy": "share of pairs whose preferred response has the larger log-ratio; ties count 1/2",
    "log_ratio_margin": "log-ratio to the reference of the preferred response minus that of the other, nats",
    "length": LENGTH_MEANING,
}


@dataclasses.dataclass(frozen=True)
class DirectAlignment:
    """A loss on the sequence log-ratios of a pair: ``loss(log pi/mu (y_0), log pi/mu (y_1), P(y_0 > y_1))``.

    With ``losses.dpo`` or ``losses.ipo`` it learns from pairs on disk. From pairs that the samplers draw: with
    ``losses.online_ipo``, (policy, policy) is online IPO and (mixture(beta), mixture(beta)) is IPO-MD (2403.08635);
    with ``losses.dpo``, (policy, policy) is online DPO (2402.04792); with ``losses.xpo`` and ``of_reference=(1,)``,
    (policy, reference) is XPO (2405.21046).
    """

    loss: Callable[..., Array]  # ([B], [B], [B]) -> [B], for example partial(losses.dpo, beta=0.1)
    of_reference: tuple[int, ...] = ()  # the reference must have written these, and the policy the other; (): anybody
    scored: ClassVar[tuple[int, ...]] = (0, 1)
    compared: ClassVar[Pairs] = ((0, 1),)
    rewarded: ClassVar[bool] = False
    meanings: ClassVar[dict[str, str]] = {**_PAIR_MEANINGS, "kl": f"{KL_MEANING}, where the policy wrote them"}

    def __post_init__(self) -> None:
        if self.of_reference not in ((), (1,), (0, 1)):
            raise UserError(f"DirectAlignment.of_reference={self.of_reference!r} must be (1,), where the policy "
                            "writes the first response, (0, 1), or () where anybody may have written them")  # fmt: skip

    @property
    def on_policy(self) -> tuple[int, ...]:
        """The responses of the policy, where the reference must have written the others."""
        return tuple(k for k in self.scored if self.of_reference and k not in self.of_reference)

    @property
    def extras(self) -> Extras:
        """Who must have written the responses."""
        return Extras(of_reference=self.of_reference)

    def __call__(
        self, params: Params, batch: PreferenceBatch, key: Key, /, *, policy: PolicyFunctions
    ) -> tuple[Array, Metrics]:
        """Returns the mean loss and metrics."""
        logps = score_responses(policy.log_prob, params, batch, self.scored)
        ratios = reference_ratios(logps, batch.responses)
        p = batch.probability(0, 1)
        loss, sign = jnp.mean(self.loss(*ratios, p)), jnp.sign(p - 0.5)
        metrics = {"loss": loss, **pair_metrics(sign, *ratios)}
        return loss, {**metrics, **response_metrics(logps[0], batch.responses[0])}


@dataclasses.dataclass(frozen=True)
class OpponentAlignment:
    """A loss on a pair of which each response meets a third one, the opponent's:
    ``loss(log pi/mu (y_0), log pi/mu (y_1), P(y_0 > y_2), P(y_1 > y_2))``.

    With ``losses.opponent_ipo``, ``samplers=(policy,) * 3`` and ``TrainPolicy(extragradient=True)`` it is EGPO
    (2503.08942).
    The policy must write response 2. Anybody may write the others: that weights them, and moves no minimum.
    """

    loss: Callable[..., Array]  # ([B], [B], [B], [B]) -> [B], for example partial(losses.opponent_ipo, tau=0.1)
    scored: ClassVar[tuple[int, ...]] = (0, 1)
    on_policy: ClassVar[tuple[int, ...]] = (2,)
    compared: ClassVar[Pairs] = ((0, 2), (1, 2))
    rewarded: ClassVar[bool] = False
    extras: ClassVar[Extras] = Extras()
    meanings: ClassVar[dict[str, str]] = {
        **_PAIR_MEANINGS,
        "preference": "P(y > y'') of response 0 over its opponent's",
        "kl": _WRITER_KL,
    }

    def __call__(
        self, params: Params, batch: PreferenceBatch, key: Key, /, *, policy: PolicyFunctions
    ) -> tuple[Array, Metrics]:
        """Returns the mean loss and metrics."""
        logps = score_responses(policy.log_prob, params, batch, self.scored)
        ratios, first = reference_ratios(logps, batch.responses), batch.responses[0]
        p, other_p = batch.probability(0, 2), batch.probability(1, 2)
        loss, sign = jnp.mean(self.loss(*ratios, p, other_p)), jnp.sign(p - other_p)
        metrics = {"loss": loss, "preference": jnp.mean(p), **pair_metrics(sign, *ratios)}
        return loss, {**metrics, **response_metrics(require_behavior(first), first)}


@dataclasses.dataclass(frozen=True)
class IterativeAlignment:
    """A loss that fits one step of an iteration, from pi_t, to K responses that pi_t wrote: ``samplers=(policy,) * K``.

    A batch is an iteration, and ``Loop(epochs=, minibatches=)`` says how long it is fitted. The loss takes
    (log pi/pi_t [B, K], P [B, K, K]) and, where it is ``regularized``, log pi/mu [B, K]. INPO (2407.00617):
    ``losses.inpo``, regularized. SPPO (2405.00675): ``losses.sppo``, not regularized; the reference scores response 0
    alone, to measure the KL.
    """

    responses: int  # K
    loss: Callable[..., Array]  # -> [B], for example partial(losses.inpo, tau=0.1, eta=0.2)
    regularized: bool  # the loss reads log pi/mu too
    rewarded: ClassVar[bool] = False
    extras: ClassVar[Extras] = Extras(last_epoch=("moved",))
    meanings: ClassVar[dict[str, str]] = {
        "loss": "the mean loss of a prompt",
        "moved": "KL of pi_t, which wrote the batch, to the policy, nats a response, in the last epoch",
        "kl": _WRITER_KL,
        "length": LENGTH_MEANING,
    }

    def __post_init__(self) -> None:
        if not isinstance(self.responses, int) or self.responses < 2:
            raise UserError(f"IterativeAlignment.responses={self.responses!r} must be a whole number from 2 on")
        try:
            inspect.signature(self.loss).bind(*[None] * (3 if self.regularized else 2))
        except TypeError as error:
            raise UserError(f"IterativeAlignment.loss and regularized={self.regularized} do not fit ({error}); "
                            "a regularized loss takes log pi/mu last, another does not") from None  # fmt: skip

    @property
    def scored(self) -> tuple[int, ...]:
        """Every response where the loss reads the reference; the first alone, for its KL, where it does not."""
        return self.on_policy if self.regularized else (0,)

    @property
    def on_policy(self) -> tuple[int, ...]:
        """Every response."""
        return tuple(range(self.responses))

    @property
    def compared(self) -> Pairs:
        """Every pair."""
        return tuple(itertools.combinations(range(self.responses), 2))

    def __call__(
        self, params: Params, batch: PreferenceBatch, key: Key, /, *, policy: PolicyFunctions
    ) -> tuple[Array, Metrics]:
        """Returns the mean loss and metrics."""
        every, first = self.on_policy, batch.responses[0]
        logps = score_responses(policy.log_prob, params, batch, every)
        behavior = [require_behavior(batch.responses[k]) for k in every]
        moved = jnp.stack(sequence_ratios(logps, behavior, batch.responses), 1)
        preference = jnp.stack([jnp.stack([batch.probability(i, j) for j in every], 1) for i in every], 1)
        ratios = (jnp.stack(reference_ratios(logps, batch.responses), 1),) if self.regularized else ()
        loss = jnp.mean(self.loss(moved, preference, *ratios))
        metrics = {"loss": loss, "moved": -jnp.mean(moved)}
        return loss, {**metrics, **response_metrics(require_behavior(first), first)}


def sequence_ratios(logps: list[Array], others: list[Array], responses: tuple[Response, ...]) -> list[Array]:
    """Returns the sums over tokens of logp - other, [B] each, from log-probs [B, T] of the first responses."""
    triples = zip(logps, others, responses, strict=False)
    return [losses.sequence_sum(logp - other, response.completion.mask) for logp, other, response in triples]


def reference_ratios(logps: list[Array], responses: tuple[Response, ...]) -> list[Array]:
    """Returns log pi/mu, [B] each, from log-probs [B, T] of the first responses under the policy."""
    return sequence_ratios(logps, [require_reference(r) for r in responses[: len(logps)]], responses)


def pair_metrics(sign: Array, first: Array, second: Array) -> Metrics:
    """Returns the accuracy and margin of log-ratios [B], with the sign [B] of the preference for the first."""
    margin = sign * (first - second)
    return {"accuracy": jnp.mean(0.5 + 0.5 * jnp.sign(margin)), "log_ratio_margin": jnp.mean(margin)}
