"""The bridge to text: worlds of so few tokens that all completions can be written down.

A token-level policy in such a world is a policy over its completions, and a preference over them is a game.
A world is a ``Completion`` of all its Y rows; a policy over it is log-probs [X, Y] in nats, one row a prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.games import game as games
from alignjax.games.game import Game, from_matrix
from alignjax.types import Array, Completion, LogProb, Params, Prompt


def completions(vocabulary: int, length: int, eos: int) -> Completion:
    """Every completion over tokens 0 .. vocabulary-1 that ends with ``eos`` or at ``length`` tokens, in
    lexicographic order; [Y, length], right-padded."""
    rows = [
        tokens
        for size in range(1, length + 1)
        for tokens in itertools.product(range(vocabulary), repeat=size)
        if eos not in tokens[:-1] and (size == length or tokens[-1] == eos)
    ]
    rows.sort()
    tokens, mask = np.zeros((len(rows), length), np.int32), np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = row, True
    return Completion(tokens, mask)


def prefixes(world: Completion) -> np.ndarray:
    """The number [Y, T] of the prefix that stands before each token; equal prefixes share a number."""
    known: dict[tuple[int, ...], int] = {}
    rows = zip(np.asarray(world.tokens).tolist(), np.asarray(world.mask).sum(1), strict=True)
    numbers = np.zeros(world.tokens.shape, np.int32)
    for i, (row, size) in enumerate(rows):
        for n in range(size):
            numbers[i, n] = known.setdefault(tuple(row[:n]), len(known))
    return numbers


def tabular(world: Completion) -> LogProb:
    """A policy with a logit for each (prefix, token), params {"logits": [prefixes, V]}: the LogProb of rows of
    the world, whatever the prompt. Rows are found by their tokens."""
    numbers, length = prefixes(world), world.tokens.shape[1]
    rows = jnp.where(world.mask, world.tokens, -1)

    def log_prob(params: Params, prompt: Prompt, completion: Completion) -> Array:
        real = completion.mask[:, :length]
        tokens = jnp.where(real, completion.tokens[:, :length], -1)
        same = jnp.all(tokens[:, None] == rows[None], -1)
        before = jnp.asarray(numbers)[jnp.argmax(same, 1)]
        logp = jax.nn.log_softmax(params["logits"])[before, tokens]
        return jnp.where(real, logp, 0)

    return log_prob


def sequences(log_prob: LogProb, params: Params, prompts: Prompt, world: Completion) -> Array:
    """log pi(y | x) of every completion to every prompt, [X, Y] nats, by any LogProb: a table or a decoder."""
    count = world.tokens.shape[0]

    def one(tokens: Array, mask: Array) -> Array:
        prompt = Prompt(*(jnp.broadcast_to(row, (count, *row.shape)) for row in (tokens, mask)))
        return jnp.sum(log_prob(params, prompt, world), -1)

    return jnp.stack([one(t, m) for t, m in zip(prompts.tokens, prompts.mask, strict=True)])


def from_oracle(
    oracle: Callable[[str, str, str], float],
    prompts: Sequence[str],
    replies: Sequence[str],
    log_mu: Array,
    tau: float,
    rho: Array | None = None,
) -> Game:
    """The game that a task's oracle, (prompt, reply, other) -> P(reply > other), makes of a decoder's
    completions: ``replies`` are the world's rows as text, ``log_mu`` [X, Y] the decoder's ``sequences``."""
    p = np.array([[[oracle(x, y, z) for z in replies] for y in replies] for x in prompts])
    mu = np.exp(np.asarray(log_mu, np.float64))
    return from_matrix(p, mu / mu.sum(-1, keepdims=True), tau, rho)


def next_tokens(world: Completion, policy: Array, vocabulary: int) -> Array:
    """log pi(token | prefix) [X, prefixes, V] of a policy over completions [X, Y], by adding up the completions
    through each prefix; -inf where no completion goes."""
    numbers = prefixes(world)
    through = np.zeros((numbers.max() + 1, vocabulary, len(numbers)), bool)
    for y, n in zip(*np.nonzero(world.mask), strict=True):
        through[numbers[y, n], world.tokens[y, n], y] = True
    children = jax.nn.logsumexp(jnp.where(through[None], policy[:, None, None], -jnp.inf), axis=-1)
    return jax.nn.log_softmax(children, axis=-1)


def step_mixture(world: Completion, policy: Array, reference: Array, beta: float, vocabulary: int) -> Array:
    """The mixture that decoding makes, one token at a time (2312.00886, App. F.1): at each prefix
    softmax[(1 - beta) log pi + beta log mu]. [X, Y]

    ``game.mixture`` is that of whole completions; they differ, because the normaliser at each prefix depends
    on the path. At beta 0 and 1 they agree.
    """
    one, other = (next_tokens(world, logp, vocabulary) for logp in (policy, reference))
    possible = jnp.isfinite(one)
    mixed = jnp.where(
        possible, (1 - beta) * jnp.where(possible, one, 0) + beta * jnp.where(possible, other, 0), -jnp.inf
    )
    table = jax.nn.log_softmax(mixed, axis=-1)
    steps = table[:, prefixes(world), world.tokens]
    return jnp.sum(jnp.where(world.mask[None], steps, 0), -1)


def nash_md_gradient(policy: Callable[[Params], Array], params: Params, game: Game, opponent: Array) -> Params:
    """The expected Nash-MD-PG gradient (2312.00886, Eq. 13) by enumeration, of a policy over completions
    ``policy(params)`` [X, Y] against a fixed opponent [X, Y]:

        sum_x rho sum_y pi(y) grad log pi(y) (P(y > pi') - 1/2 - tau log[pi(y) / mu(y)]).
    """

    def surrogate(theta: Params) -> Array:
        logp = policy(theta)
        fixed = jax.lax.stop_gradient(logp)
        gain = games.wins(game, opponent) - 0.5 - game.tau * (fixed - game.log_mu)
        return jnp.sum(game.rho[:, None] * jnp.exp(fixed) * gain * logp)

    return jax.grad(surrogate)(params)
