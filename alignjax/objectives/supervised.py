"""Objectives with labels: preference models and next tokens."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp

from alignjax import losses
from alignjax.models.log_probs import LogitsFn, token_log_probs
from alignjax.types import (
    Array,
    Completion,
    Key,
    LogProb,
    Metrics,
    OrderedLogit,
    PackedTokens,
    Params,
    PreferenceBatch,
    Prompt,
)

PREFERENCE_MEANINGS = {
    "loss": "the mean loss of a pair, nats for the cross-entropy",
    "accuracy": "share of labels that the preference model agrees with; ties count 1/2",
}


def preference_loss(
    params: Params, batch: PreferenceBatch, key: Key, /, *, loss: Callable[..., Array], logit: OrderedLogit
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


def packed_next_token_loss(
    params: Params,
    batch: PackedTokens,
    key: Key,
    /,
    *,
    forward: Callable[[Params, Array, Array], Array],
    logits: LogitsFn,
) -> tuple[Array, Metrics]:
    """Returns the mean negative log-likelihood of the learned tokens in nats a token, and metrics.

    A token is predicted from the tokens before it in its own segment, so the first of each is not. ``forward`` and
    ``logits`` are a Model's.
    """
    segments, targets = batch.segments, batch.tokens[:, 1:]
    states = forward(params, batch.tokens, segments)[:, :-1]
    logp = token_log_probs(logits, params, states, targets)
    mask = (segments[:, 1:] > 0) & (segments[:, 1:] == segments[:, :-1])
    loss = losses.next_token(logp, mask if batch.learned is None else mask & batch.learned[:, 1:])
    return loss, {"nll": loss}
