"""Games of text: worlds of so few tokens that all completions can be enumerated.

A token-level policy in such a world is a policy over its completions, and preferences over them are a game. A world is
a ``Completion`` of all its Y rows. A policy over it is log-probs [X, Y] in nats, with a row for each prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from alignjax.games.game import Game, from_matrix, win_probability
from alignjax.types import Array, Completion, LogProb, Params, Prompt


def enumerate_completions(vocabulary: int, length: int, eos: int) -> Completion:
    """Returns every completion over tokens 0 .. vocabulary-1 that ends with ``eos`` or at ``length`` tokens.

    Rows are in lexicographic order and right-padded, [Y, length].
    """
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


def prefix_numbers(world: Completion) -> np.ndarray:
    """Returns the number [Y, T] of the prefix before each token; equal prefixes share a number, the empty one is 0."""
    assigned: dict[tuple[int, ...], int] = {}
    rows = zip(np.asarray(world.tokens).tolist(), np.asarray(world.mask).sum(1), strict=True)
    numbers = np.zeros(world.tokens.shape, np.int32)
    for i, (row, size) in enumerate(rows):
        for n in range(size):
            numbers[i, n] = assigned.setdefault(tuple(row[:n]), len(assigned))
    return numbers


def tabular_log_prob(world: Completion) -> LogProb:
    """Returns the LogProb of a policy with a logit for each (prefix, token), params {"logits": [prefixes, V]}.

    It scores completions of the world, which it looks up by their tokens, and ignores the prompt.
    """
    numbers, length = prefix_numbers(world), world.tokens.shape[1]
    rows = jnp.where(world.mask, world.tokens, -1)

    def log_prob(params: Params, prompt: Prompt, completion: Completion) -> Array:
        """Returns log-probs [B, T] in nats, 0 on padding."""
        real = completion.mask[:, :length]
        tokens = jnp.where(real, completion.tokens[:, :length], -1)
        same = jnp.all(tokens[:, None] == rows[None], -1)
        prefix = jnp.asarray(numbers)[jnp.argmax(same, 1)]
        logp = jax.nn.log_softmax(params["logits"])[prefix, tokens]
        return jnp.where(real, logp, 0)

    return log_prob


def sequence_log_probs(log_prob: LogProb, params: Params, prompts: Prompt, world: Completion) -> Array:
    """Returns log pi(y | x) of every completion to every prompt, [X, Y] nats; ``log_prob`` is a table or a decoder."""
    count = world.tokens.shape[0]

    def score_world(tokens: Array, mask: Array) -> Array:
        """Returns log pi(y | x) of all completions to one prompt, [Y]."""
        prompt = Prompt(*(jnp.broadcast_to(row, (count, *row.shape)) for row in (tokens, mask)))
        return jnp.sum(log_prob(params, prompt, world), -1)

    return jnp.stack([score_world(t, m) for t, m in zip(prompts.tokens, prompts.mask, strict=True)])


def game_from_oracle(
    oracle: Callable[[str, str, str], float],
    prompts: Sequence[str],
    replies: Sequence[str],
    log_mu: Array,
    tau: float,
    rho: Array | None = None,
) -> Game:
    """Returns the game of a task's oracle, (prompt, reply, other) -> P(reply > other), over a decoder's completions.

    ``replies`` are the world's rows as text; ``log_mu`` [X, Y] are the decoder's ``sequence_log_probs``.
    """
    p = np.array([[[oracle(x, y, z) for z in replies] for y in replies] for x in prompts])
    mu = np.exp(np.asarray(log_mu, np.float64))
    return from_matrix(p, mu / mu.sum(-1, keepdims=True), tau, rho)


def next_token_log_probs(world: Completion, policy: Array, vocabulary: int) -> Array:
    """Returns log pi(token | prefix) [X, prefixes, V] of a policy over completions [X, Y].

    It adds up the completions that pass through each prefix and token; -inf where none does.
    """
    numbers = prefix_numbers(world)
    through = np.zeros((numbers.max() + 1, vocabulary, len(numbers)), bool)
    for y, n in zip(*np.nonzero(world.mask), strict=True):
        through[numbers[y, n], world.tokens[y, n], y] = True
    children = jax.nn.logsumexp(jnp.where(through[None], policy[:, None, None], -jnp.inf), axis=-1)
    return jax.nn.log_softmax(children, axis=-1)


def token_mixture(world: Completion, policy: Array, reference: Array, beta: float, vocabulary: int) -> Array:
    """Returns the geometric mixture token by token, as sampling makes it, [X, Y] nats (2312.00886, App. F.1).

    At each prefix it is softmax[(1 - beta) log pi + beta log mu]. ``game.mixture_policy`` mixes whole completions. The
    two differ, because the normaliser at each prefix depends on the path; they agree at beta 0 and 1.
    """
    first, second = (next_token_log_probs(world, logp, vocabulary) for logp in (policy, reference))
    possible = jnp.isfinite(first)
    mixed = jnp.where(
        possible, (1 - beta) * jnp.where(possible, first, 0) + beta * jnp.where(possible, second, 0), -jnp.inf
    )
    table = jax.nn.log_softmax(mixed, axis=-1)
    steps = table[:, prefix_numbers(world), world.tokens]
    return jnp.sum(jnp.where(world.mask[None], steps, 0), -1)


def nash_md_gradient(policy: Callable[[Params], Array], params: Params, game: Game, opponent: Array) -> Params:
    """Returns the expected Nash-MD-PG gradient by enumeration (2312.00886, Eq. 13), a tree like ``params``:

        sum_x rho(x) sum_y pi(y) grad log pi(y) (P(y > pi') - 1/2 - tau log[pi(y) / mu(y)]),

    for a policy over completions ``policy(params)`` [X, Y] against a fixed opponent [X, Y].
    """

    def surrogate(theta: Params) -> Array:
        """Returns a scalar with that gradient: everything but the last log pi(y) is held fixed."""
        logp = policy(theta)
        fixed = jax.lax.stop_gradient(logp)
        gain = win_probability(game, opponent) - 0.5 - game.tau * (fixed - game.log_mu)
        return jnp.sum(game.rho[:, None] * jnp.exp(fixed) * gain * logp)

    return jax.grad(surrogate)(params)
