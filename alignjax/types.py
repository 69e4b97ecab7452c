"""The records that everything else is written in: four pytrees and five function types."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Params = dict[str, Any]
"""Nested dict of arrays."""
Key = jax.Array
"""A typed PRNG key (``jax.random.key``)."""
Array = jax.Array | np.ndarray
"""On the device, or on the host on its way there."""
Metrics = dict[str, Array]
Batch = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Padded token ids. Where a prompt's padding lies (left, right, between) never changes a number."""

    tokens: Array  # [B, T] int32
    mask: Array  # [B, T] bool, false on padding


Prompt = Tokens
"""What is conditioned on; at least one token a row is real."""
Completion = Tokens
"""What is scored; its mask is true through the stop token, and right-padded."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pair:
    """Two responses to one prompt and the probability that the first is preferred."""

    prompt: Prompt
    first: Completion
    second: Completion
    p: Array  # [B] P(first > second | prompt), a hard (0, 1) or soft label


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rollout:
    """On-policy data: ``y`` from the policy, ``opponent`` from whom it is compared with."""

    prompt: Prompt
    y: Completion
    opponent: Completion
    p: Array  # [B] P(y > opponent | prompt)
    ref_logp: Array  # [B, T] nats, log-probs of y under the reference, zero on padding


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """All that an update changes. ``key`` is the root: keys are ``fold_in(key, step)``."""

    step: Array  # [] int32, updates done
    params: Params
    opt_state: Any
    average: Params  # exponential moving average of params; an empty dict when nobody asks for it
    key: Key  # never advanced


Objective = Callable[[Params, Batch, Key], tuple[Array, Metrics]]
"""(params, batch, key) -> (scalar loss, metrics), metrics being means over the batch."""
LogProb = Callable[[Params, Prompt, Completion], Array]
"""-> [B, T] nats, zero on padding."""
PreferenceLogit = Callable[[Params, Prompt, Completion, Completion], Array]
"""-> [B] logit of P(first > second | prompt), odd under exchange of the two responses."""
Step = Callable[[Any, Array], tuple[Any, Array]]
"""(carry, token [B] int32) -> (carry, logits [B, V]): one step of a sequential process."""


class Process(NamedTuple):
    """A distribution over sequences: the next token has log-probs log_softmax(logits).

    ``step(carry, token [B]) -> (carry, logits [B, V])`` appends a token to every row and returns the next logits.
    """

    step: Step
    carry: Any
    logits: Array  # [B, V]


Rules = tuple[tuple[str, jax.sharding.PartitionSpec], ...]
"""(regular expression over a parameter's path, its PartitionSpec); the first match wins."""
