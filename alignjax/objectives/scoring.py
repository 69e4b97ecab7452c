"""What objectives share: they score the responses of a batch, and say how far the policy is from the reference."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp

from alignjax import losses
from alignjax.types import Array, LogProb, Metrics, Params, PreferenceBatch, Response, stack_rows

KL_MEANING = "KL of the policy to the reference, nats a response, estimated from its samples"
LENGTH_MEANING = "tokens a response"


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


def require_behavior(response: Response) -> Array:
    """Returns the log-probs [B, T] of a response under its writer. Raises ValueError when they are not known."""
    if response.behavior_logp is None:
        raise ValueError("this response has no log-probs under its writer; the objective must list it in ``on_policy``")
    return response.behavior_logp


def require_rewards(batch: PreferenceBatch) -> Array:
    """Returns r(x, y_k), [B, K]. Raises ValueError when there are none."""
    if batch.reward is None:
        raise ValueError("this batch has no rewards: its preference model is not a reward model")
    return batch.reward


def pay_invalid(batch: PreferenceBatch, invalid: Callable[[Array, Array], Array] | None) -> PreferenceBatch:
    """Returns the batch with the rewards [B, K] that ``invalid`` makes of rewards and validity; None leaves them.

    Raises ValueError without rewards.
    """
    reward = jnp.asarray(require_rewards(batch))
    if invalid is None:
        return batch
    every = [batch.valid(k) for k in range(len(batch.responses))]
    valid = jnp.stack([jnp.ones(len(reward), bool) if ok is None else jnp.asarray(ok) for ok in every], 1)
    return dataclasses.replace(batch, reward=invalid(reward, valid))


def response_metrics(logp: Array, response: Response) -> Metrics:
    """Returns the KL estimate and the length of responses with log-probs [B, T] under the policy."""
    mask = response.completion.mask
    return {
        "kl": jnp.mean(losses.sequence_sum(logp - require_reference(response), mask)),
        "length": jnp.mean(jnp.sum(mask, -1).astype(jnp.float32)),
    }
