"""prompts -> Rollout: the policy answers, the opponent answers, P compares. All in one compiled step where they share
a tokenizer; else the answers become text between two compiled halves (``stages.optimise``)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from alignjax.errors import UserError
from alignjax.models.model import Model
from alignjax.preferences.models import probability
from alignjax.sampling.process import Process, Sample, Stop, geometric_mixture, sample
from alignjax.types import Array, Completion, Key, LogProb, Params, PreferenceLogit, Prompt, Rollout

Opponent = Callable[[Callable[[Params], Process], Params, Params, Params], Process]
"""(start, policy, reference, average) -> the process that answers; ``start(params)`` prefills a prompt."""


def mixture(start: Callable[[Params], Process], policy: Params, reference: Params, average: Params, *, beta: float):
    """Nash-MD's opponent pi^(1-beta) mu^beta (2312.00886, Eq. 15); beta 0 is self-play, 1 the reference."""
    if not 0 <= beta <= 1:
        raise UserError(f"beta={beta} is no weight of the reference; choose one from 0 to 1")
    return geometric_mixture(start(policy), start(reference), beta)


def self_play(start: Callable[[Params], Process], policy: Params, reference: Params, average: Params) -> Process:
    """beta = 0, without the second model's work."""
    return start(policy)


def best_response(start: Callable[[Params], Process], policy: Params, reference: Params, average: Params) -> Process:
    """beta = 1: the policy becomes a best response to the reference."""
    return start(reference)


def moving_average(start: Callable[[Params], Process], policy: Params, reference: Params, average: Params) -> Process:
    """Nash-EMA: the exponential moving average of what is trained, the policy's weights or its adapters' A and B, each
    by itself; needs ``average_decay``."""
    if not average:
        raise ValueError("the opponent moving_average needs average_decay; set it in the stage")
    return start(average)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Drawn:
    """What the policy and its opponent answered."""

    prompt: Prompt
    y: Sample
    opponent: Sample


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """The same as the preference model reads it: in its own tokens, without what it never saw in training."""

    prompt: Prompt
    y: Completion
    opponent: Completion
    answered: tuple[Array, Array] | None = None  # [B] each: not refused by the task's filter; None: not asked


Respond = Callable[[Params, Params, Any, Prompt, Key], Drawn]
"""(policy, its average, frozen trees, prompt, key) -> both answers, at temperature 1."""


def responder(model: Model, opponent: Opponent, max_new_tokens: int, stop: Stop) -> Respond:
    """A Respond. ``frozen`` holds the tree "reference"."""

    def respond(params: Params, average: Params, frozen: Any, prompt: Prompt, key: Key) -> Drawn:
        def start(weights: Params) -> Process:
            return Process(*model.start(weights, prompt, max_new_tokens))

        def draw(process: Process, number: int) -> Sample:
            rows = jax.random.fold_in(key, number)
            keys = jax.vmap(jax.random.fold_in, (None, 0))(rows, jnp.arange(prompt.tokens.shape[0]))
            return sample(process, keys, max_new_tokens, stop)

        y = draw(start(params), 0)
        other = draw(opponent(start, params, frozen["reference"], average), 1)
        return lax.stop_gradient(Drawn(prompt, y, other))

    return respond


def compared(
    log_prob: LogProb, logit: PreferenceLogit, unfinished_loses: bool, frozen: Any, drawn: Drawn, seen: Seen
) -> Rollout:
    """P of both answers, and the policy's under the reference. ``frozen`` holds "reference" and "preference". With
    ``unfinished_loses`` a response that met no end loses to one that did, and two such tie."""
    p = probability(logit(frozen["preference"], seen.prompt, seen.y, seen.opponent))
    if unfinished_loses:
        p = finished_first(p, drawn.y.finished, drawn.opponent.finished)
    if seen.answered is not None:
        p = finished_first(p, *seen.answered)
    ref_logp = log_prob(frozen["reference"], drawn.prompt, drawn.y.completion)
    return lax.stop_gradient(Rollout(drawn.prompt, drawn.y.completion, drawn.opponent.completion, p, ref_logp))


def collector(
    respond: Respond, log_prob: LogProb, logit: PreferenceLogit, unfinished_loses: bool, hidden: tuple[int, ...]
) -> Callable[[Params, Params, Any, Prompt, Key], Rollout]:
    """A Collect (runtime.train) where policy and preference model share a tokenizer: all in one compiled step.

    ``hidden`` are the stop tokens that P never saw in training, because the task's reply format has no such end: P is
    asked without them.
    """

    def collect(params: Params, average: Params, frozen: Any, prompt: Prompt, key: Key) -> Rollout:
        drawn = respond(params, average, frozen, prompt, key)
        y, other = (without(side.completion, hidden) for side in (drawn.y, drawn.opponent))
        return compared(log_prob, logit, unfinished_loses, frozen, drawn, Seen(prompt, y, other))

    return collect


def without(completion: Completion, hidden: tuple[int, ...]) -> Completion:
    """The completion with those tokens masked."""
    seen = ~jnp.isin(completion.tokens, jnp.asarray(hidden, jnp.int32))
    return Completion(completion.tokens, completion.mask & seen)


def finished_first(p: Array, y: Array, other: Array) -> Array:
    """p where both responses are finished; 1 or 0 where one is; 1/2 where neither is."""
    return jnp.where(y & other, p, 0.5 + 0.5 * (y.astype(p.dtype) - other.astype(p.dtype)))
