"""The records that everything is written in, and the call signatures of its functions.

Shape letters: B prompts (rows), T tokens, K responses a prompt, V vocabulary, D width.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

Params = dict[str, Any]
"""A nested dict of arrays."""
Key = jax.Array
"""A typed PRNG key (``jax.random.key``)."""
Array = jax.Array | np.ndarray
"""An array on the device, or on the host before it is placed."""
Metrics = dict[str, Array]
"""Scalars by name; each is a mean over the rows of a batch."""
Rules = tuple[tuple[str, jax.sharding.PartitionSpec], ...]
"""Sharding rules: (regular expression over a parameter's path, its PartitionSpec). The first match wins."""
Pairs = tuple[tuple[int, int], ...]
"""Indices (i, j) of responses to one prompt."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Tokens:
    """Padded token ids. Padding may stand left, right or between; it never changes a number."""

    tokens: Array  # [B, T] int32
    mask: Array  # [B, T] bool, false on padding


Prompt = Tokens
"""The tokens that a model conditions on; each row has at least one real token."""
Completion = Tokens
"""The tokens that a model is scored on, right-padded; the mask is true through the stop token."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PackedTokens:
    """Documents side by side in rows."""

    tokens: Array  # [B, T] int32
    segments: Array  # [B, T] int32: each token's document number in its row, from 1; 0 on padding
    learned: Array | None = None  # [B, T] bool: the tokens that are learned; None: all


class Process(NamedTuple):
    """A distribution over token sequences. The next token has log-probs ``log_softmax(logits)``."""

    step: Step
    carry: Any
    logits: Array  # [B, V]


class Sample(NamedTuple):
    """Sequences drawn from a Process."""

    completion: Completion  # [B, T]
    logp: Array  # [B, T] nats under the process at temperature 1, unfiltered; 0 on padding
    finished: Array  # [B] bool: a stop sequence was drawn


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Estimates:
    """What an objective with a critic makes of a response before the policy moves, in units of the reward."""

    value: Array  # [B, T] the critic's V_n before each token
    reward: Array  # [B, T] paid at each token
    advantage: Array  # [B, T] of each token
    target: Array  # [B, T] what the critic learns to estimate
    tau: Array  # [B] reward per nat of KL


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Response:
    """One response to each of B prompts, and what is known about it. None: not known, or not needed."""

    completion: Completion  # [B, T]
    behavior_logp: Array | None = None  # [B, T] nats at temperature 1 under the process that wrote it; 0 on padding
    reference_logp: Array | None = None  # [B, T] nats under the reference; 0 on padding
    finished: Array | None = None  # [B] bool: the response met a stop sequence
    valid: Array | None = None  # [B] bool: false where it loses to every valid response, whatever the model says of it
    estimates: Estimates | None = None  # of an objective with a critic, when the response was collected


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PreferenceBatch:
    """What every objective learns from: K responses to each of B prompts, and how they compare.

    Drawn responses and pairs read from disk (K = 2) have this one form.
    """

    prompt: Prompt  # [B, S]
    responses: tuple[Response, ...]  # K of them
    preference: Array  # [B, K, K] P(y_i > y_j | x); 1/2 where i = j and where the pair was not compared
    reward: Array | None = None  # [B, K] r(x, y_i) nats, of invalid responses too. None: no reward model
    compared: Pairs = dataclasses.field(default=((0, 1),), metadata={"static": True})  # i < j

    def probability(self, i: int, j: int) -> Array:
        """Returns P(y_i > y_j | x), [B]. Raises ValueError when the pair was not compared."""
        if i != j and (min(i, j), max(i, j)) not in self.compared:
            raise ValueError(f"responses {i} and {j} were not compared; this batch compares {self.compared}")
        return self.preference[:, i, j]

    def margin(self, i: int, j: int) -> Array:
        """Returns r(x, y_i) - r(x, y_j), [B] nats; infinite where one response is not valid, 0 where neither is.

        Raises ValueError without rewards.
        """
        if self.reward is None:
            raise ValueError("this batch has no rewards: its preference model is not a reward model")
        first, second = (jnp.ones(len(self.reward), bool) if v is None else v for v in (self.valid(i), self.valid(j)))
        outright = jnp.where(first, jnp.inf, -jnp.inf)
        unequal = jnp.where(first == second, 0.0, outright)
        return jnp.where(first & second, self.reward[:, i] - self.reward[:, j], unequal)

    def valid(self, i: int) -> Array | None:
        """Returns whether each response i is valid, [B] bool; None where all are."""
        return self.responses[i].valid


def pair_batch(prompt: Prompt, first: Response, second: Response, p: Array) -> PreferenceBatch:
    """Returns the batch of two responses with P(first > second) = p, [B]."""
    return PreferenceBatch(prompt, (first, second), preference_matrix({(0, 1): p}, len(p), 2))


def preference_matrix(probabilities: dict[tuple[int, int], Array], rows: int, count: int) -> Array:
    """Returns P(y_i > y_j), [B, K, K] with B = rows and K = count, from the [B] of some pairs i < j; 1/2 elsewhere.

    P + P' = 1 exactly: 1 - p has no rounding for p in [1/2, 1], nor has 1 - (1 - p).
    """
    matrix = jnp.full((rows, count, count), 0.5, jnp.result_type(jnp.float32, *probabilities.values()))
    for (i, j), p in probabilities.items():
        matrix = matrix.at[:, i, j].set(p).at[:, j, i].set(1 - p)
    return matrix


class Role(enum.IntEnum):
    """Indexes ``Roles``."""

    POLICY = 0
    REFERENCE = 1
    AVERAGE = 2


class Roles(NamedTuple):
    """The parameters of the networks that take part in collecting a batch."""

    policy: Params  # pi, the network that learns, and a critic beside it
    reference: Params  # mu, frozen
    average: Params  # the exponential moving average of pi; empty when nothing reads it
    preference: Params  # of the preference model, frozen
    controls: Params = {}  # noqa: RUF012 (nobody writes to it): what the objective adjusts itself (``Extras``)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that learning changes. Keys are ``fold_in(key, step)``."""

    step: Array  # [] int32, steps done
    params: Params  # the trained parameters
    opt_state: Any
    average: Params  # the exponential moving average of params; empty when nothing reads it
    key: Key  # the root key; it never advances
    controls: Params = dataclasses.field(default_factory=dict)  # what the objective adjusts itself (``Extras``)
    anchor: Params = dataclasses.field(default_factory=dict)  # where an extragradient step starts; empty without


class Step(Protocol):
    """One step of a sequential process."""

    def __call__(self, carry: Any, token: Array, /) -> tuple[Any, Array]:
        """Takes a token [B] int32; returns the next carry and the next logits [B, V]."""
        ...


class LogProb(Protocol):
    """Scores completions."""

    def __call__(self, params: Params, prompt: Prompt, completion: Completion, /) -> Array:
        """Returns log pi(y_n | x, y_<n), [B, T] nats at temperature 1, 0 on padding."""
        ...


class PreferenceLogit(Protocol):
    """Compares two responses."""

    def __call__(self, params: Params, prompt: Prompt, first: Completion, second: Completion, /) -> Array:
        """Returns the logit of P(first > second | prompt), [B]; it is odd under exchange of the responses."""
        ...


class OrderedLogit(Protocol):
    """Compares two responses in the order in which it is shown them. A PreferenceLogit is one."""

    def __call__(self, params: Params, prompt: Prompt, first: Completion, second: Completion, /) -> Array:
        """Returns the logit of P(first > second | prompt), [B]; it need not be odd under exchange of the responses."""
        ...


class Reward(Protocol):
    """Scores one response."""

    def __call__(self, params: Params, prompt: Prompt, response: Completion, /) -> Array:
        """Returns r(x, y), [B] nats."""
        ...


class PolicyFunctions(NamedTuple):
    """A policy's model as objectives use it. The parameters may have heads, or a critic, beside the backbone."""

    log_prob: LogProb
    states: Callable[[Params, Prompt, Completion], Array]  # -> [B, T, D]: what a critic reads before each token
    width: int  # D


class Loss(Protocol):
    """What ``learn`` minimises: an objective with its model bound."""

    def __call__(self, params: Params, batch: Any, key: Key, /) -> tuple[Array, Metrics]:
        """Returns the scalar loss and metrics."""
        ...


def no_heads(width: int) -> Params:
    """The ``heads`` of an objective without a critic."""
    return {}


def keep_batch(roles: Roles, batch: PreferenceBatch, policy: PolicyFunctions) -> PreferenceBatch:
    """The ``prepare`` of an objective that needs nothing more than was collected."""
    return batch


def no_controls() -> Params:
    """The ``controls`` of an objective whose settings stay as they are."""
    return {}


def keep_controls(controls: Params, batch: PreferenceBatch) -> Params:
    """The ``adapt`` of an objective whose settings stay as they are."""
    return controls


class Extras(NamedTuple):
    """What an algorithm with more than a loss adds to it."""

    heads: Callable[[int], Params] = no_heads
    """width -> the first heads that are trained beside the policy. A critic's is called "value"."""
    prepare: Callable[[Roles, PreferenceBatch, PolicyFunctions], PreferenceBatch] = keep_batch
    """Returns the batch with what must be computed before the policy moves, such as a critic's values."""
    controls: Callable[[], Params] = no_controls
    """() -> the first values of what the objective adjusts itself, such as a coefficient that follows the KL."""
    adapt: Callable[[Params, PreferenceBatch], Params] = keep_controls
    """(controls, batch) -> the controls after a batch was learned from."""
    last_epoch: tuple[str, ...] = ()
    """Metrics that are means over the last epoch of a batch; the others are over the first."""
    whole_minibatch: bool = False
    """Whether the loss of a minibatch is not the mean of those of its parts, so that ``accumulate`` would change it."""
    of_reference: tuple[int, ...] = ()
    """The responses that the reference must have written."""


class Objective(Protocol):
    """Scores a PreferenceBatch under params and hands arrays to a loss (see ``alignjax.objectives``)."""

    scored: tuple[int, ...]  # the responses whose reference log-probs it reads
    on_policy: tuple[int, ...]  # the responses that the policy itself must have written, for the gradient to be right
    compared: Pairs  # the pairs whose preference it reads
    rewarded: bool  # whether it reads rewards
    extras: Extras  # what it adds to a loss; Extras() where that is nothing
    meanings: dict[str, str]  # metric -> what it shows

    def __call__(
        self, params: Params, batch: PreferenceBatch, key: Key, /, *, policy: PolicyFunctions
    ) -> tuple[Array, Metrics]:
        """Returns the scalar loss and metrics."""
        ...


Judge = Callable[[list[str], list[str], list[str]], np.ndarray]
"""(prompts, replies, others) -> P(reply > other), [N]. A judge compares texts, so it needs nobody's tokenizer."""


def stack_rows(trees: Sequence[Any]) -> Any:
    """Returns the tree with rows a0, b0, ..., a1, b1, ...: n trees [B, ...] -> [B * n, ...].

    Rows that belong together stay side by side, so that a sharded batch stays where it is.
    """
    return jax.tree.map(lambda *xs: jnp.stack(xs, 1).reshape(-1, *xs[0].shape[1:]), *trees)
