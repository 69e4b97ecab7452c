"""Worlds in which every completion can be written down: two tokens by two steps, and one step of V actions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignjax.types import Completion, PolicyFunctions, PreferenceBatch, Prompt, Response

COMPLETIONS = np.array(list(itertools.product((0, 1), repeat=2)), np.int32)  # [4, 2]
ACTIONS = np.arange(5, dtype=np.int32)[:, None]  # [5, 1]
TAU = 0.3


def log_prob(params, prompt, completion):
    """A tabular policy: logits of the first token and, of two steps, of the second given the first."""
    first = jax.nn.log_softmax(params["first"])[completion.tokens[:, 0]]
    steps = [first]
    if "second" in params:
        steps.append(jax.nn.log_softmax(params["second"])[completion.tokens[:, 0], completion.tokens[:, 1]])
    return jnp.where(completion.mask, jnp.stack(steps, 1), 0.0)


def tabular(seed):
    """A random policy of the world of two steps."""
    a, b = jax.random.split(jax.random.key(seed))
    return {"first": jax.random.normal(a, (2,)), "second": jax.random.normal(b, (2, 2))}


def one_step(seed):
    """A random policy of the world of one step."""
    return {"first": jax.random.normal(jax.random.key(seed), (len(ACTIONS),))}


def table_of(logp):
    """The policy of two steps whose completions have these log-probs [4]."""
    joint = jnp.reshape(logp, (2, 2))
    return {"first": jax.nn.logsumexp(joint, 1), "second": joint}


def completions_of(params):
    """Every completion of the policy's world: [Y, T] tokens."""
    return COMPLETIONS if "second" in params else ACTIONS


def as_batch(rows):
    """(prompts, completions) with these tokens [B, T]."""
    ones = np.ones((len(rows), 1))
    return Prompt(np.int32(ones), ones > 0), Completion(rows, np.ones(rows.shape, bool))


def sequence_logp(params):
    """log pi(y) of every completion, [Y] nats."""
    return log_prob(params, *as_batch(completions_of(params))).sum(1)


def intransitive(count=4, seed=0):
    """A matrix P[y, y'] = 1 - P[y', y] that no reward explains."""
    scores = np.random.default_rng(seed).normal(size=(count, count)) * 2
    return jax.nn.sigmoid(jnp.asarray(scores - scores.T))


def bradley_terry(rewards):
    """P[y, y'] = sigmoid(r(y) - r(y'))."""
    return jax.nn.sigmoid(rewards[:, None] - rewards[None])


def step_mixture(params, reference, beta):
    """The one-step-at-a-time mixture as a tabular policy: logits mixed at every prefix."""
    return jax.tree.map(
        lambda a, b: (1 - beta) * jax.nn.log_softmax(a) + beta * jax.nn.log_softmax(b), params, reference
    )


def all_pairs(reference, p, rewards=None):
    """The batch of all pairs of completions, Y * Y rows in the order of p [Y, Y]; every response is scored."""
    rows, count = completions_of(reference), len(p)
    prompt, first = as_batch(np.repeat(rows, count, 0))
    _, second = as_batch(np.tile(rows, (count, 1)))
    responses = tuple(Response(side, reference_logp=log_prob(reference, prompt, side)) for side in (first, second))
    half, flat = jnp.full(p.size, 0.5, p.dtype), p.reshape(-1)
    matrix = jnp.stack([jnp.stack([half, flat], 1), jnp.stack([1 - flat, half], 1)], 1)
    reward = None if rewards is None else jnp.stack([jnp.repeat(rewards, count), jnp.tile(rewards, count)], 1)
    return PreferenceBatch(prompt, responses, matrix, reward)


def expected_gradient(objective, params, batch, weights):
    """The gradient of the objective's expected loss over the pairs, each with its weight [Y, Y], which is constant."""

    def expected(theta):
        def loss(row):
            one = jax.tree.map(lambda x: x[None], row)
            return objective(theta, one, None, policy=as_policy(log_prob))[0]

        return jnp.sum(jax.lax.stop_gradient(weights).reshape(-1) * jax.vmap(loss)(batch))

    return jax.grad(expected)(params)


def independent_weights(first, second):
    """The weight [Y, Y] of each pair where the two policies write independently."""
    return jnp.exp(sequence_logp(first))[:, None] * jnp.exp(sequence_logp(second))[None]


def descend(gradient, params, rate=1.0, steps=4000):
    """The parameters after gradient descent along ``gradient(params)``."""
    step = lambda _, p: jax.tree.map(lambda x, g: x - rate * g, p, gradient(p))  # noqa: E731
    return jax.jit(lambda p: jax.lax.fori_loop(0, steps, step, p))(params)


def relative_error(a, b):
    """|a - b| / |b|."""
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, a, b))
    return float(difference / optax.tree.norm(b))


def as_policy(log_prob):
    """Returns what an objective is given, of a policy that has log-probs and no states."""
    return PolicyFunctions(log_prob, states=None, width=0)
