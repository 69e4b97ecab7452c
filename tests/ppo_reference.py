"""PPO for language models in NumPy, float64: the referee of golden traces, written apart from the package.

``trace`` runs steps of PPO on given rollouts with a tabular actor-critic and returns every number. What the public
implementations do differently is in ``tests/ppo_presets.py``, as are the names O, T and A of their files. l is
log pi(y_n) at the temperature of the settings, in nats; V_n is the value before token n. Arrays over tokens are [B, T].
There is one rank: O, T and A whiten the rows of each rank apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from tests.ppo_presets import PRESETS, Array, Settings, masked_mean

__all__ = ["PRESETS", "Batch", "Estimate", "Parameters", "Rollout", "Settings", "Step", "Update", "example", "trace"]


class Parameters(NamedTuple):
    """A tabular actor-critic whose state is (column, previous token); before the first token that is token 0."""

    policy: Array  # W [T, V, V]: logits of token n after token y_{n-1} are W[n, y_{n-1}]
    value: Array  # v [T, V]: V_n = v[n, y_{n-1}]


class Rollout(NamedTuple):
    """Replies, given. The mask is a prefix of at least one column of each row."""

    tokens: Array  # [B, T] int
    mask: Array  # [B, T] bool
    scores: Array  # [B]
    finished: Array  # [B] bool


class Batch(NamedTuple):
    """A rollout as scored by the parameters that the step starts from, all [B, T]."""

    tokens: Array
    mask: Array
    logp: Array  # old log-probs; 0 where not ``scored``
    values: Array  # old values; 0 where not ``valued``
    kl: Array
    rewards: Array


class Estimate(NamedTuple):
    """What a minibatch learns from, all [rows, T]."""

    rewards: Array  # whitened where the settings say so
    advantages: Array  # whitened; 0 where not ``averaged``
    returns: Array  # advantages before whitening + old values


class Update(NamedTuple):
    """One minibatch: its numbers before the update, and the parameters after it."""

    estimate: Estimate
    ratio: Array  # [rows, T]
    policy_loss: float
    value_loss: float
    loss: float
    approx_kl: float  # nats a token
    clip_fraction: float
    value_clip_fraction: float
    gradient: Parameters  # before it is clipped
    parameters: Parameters


class Step(NamedTuple):
    """One rollout and what was learned from it."""

    batch: Batch
    kl_coefficient: float  # of this step's rewards
    next_kl_coefficient: float
    learning_rate: float
    updates: list[Update]


class State(NamedTuple):
    """Parameters and Adam's moments of them."""

    parameters: Parameters
    mean: Parameters
    square: Parameters
    count: int


def states_of(tokens: Array) -> tuple[Array, Array]:
    """Returns the indices (column, previous token) of each token's state, [1, T] and [B, T]."""
    previous = np.concatenate([np.zeros_like(tokens[:, :1]), tokens[:, :-1]], 1)
    return np.arange(tokens.shape[1])[None], previous


def log_probs(parameters: Parameters, tokens: Array, temperature: float) -> tuple[Array, Array]:
    """Returns l [B, T] and the probabilities of all tokens [B, T, V], of softmax(logits / temperature)."""
    logits = parameters.policy[states_of(tokens)] / temperature
    shifted = logits - logits.max(-1, keepdims=True)
    logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return np.take_along_axis(logp, tokens[..., None], -1)[..., 0], np.exp(logp)


def token_rewards(settings: Settings, coefficient: float, log_ratio: Array, rollout: Rollout) -> tuple[Array, Array]:
    """Returns the KL estimates k_n and the rewards -c k_n + score [n = place], [B, T] each.

    O:compute_rewards, T:679-685, A:_shape_reward.
    """
    scores = rollout.scores
    if settings.penalty is not None:
        scores = settings.unfinished(scores, rollout.finished, settings.penalty)
    kl = settings.kl(log_ratio)
    rewards = -coefficient * kl
    rewards[np.arange(len(rewards)), settings.score_place(rollout.mask)] += scores
    return kl, rewards


def gae(rewards: Array, values: Array, discount: float, lam: float) -> Array:
    """Returns A_n = d_n + discount lam A_{n+1}, d_n = r_n + discount V_{n+1} - V_n; A_T = V_T = 0 (O:327-335)."""
    advantages = np.zeros_like(rewards)
    following = value = np.zeros(len(rewards))
    for n in reversed(range(rewards.shape[1])):
        following = rewards[:, n] + discount * value - values[:, n] + discount * lam * following
        advantages[:, n], value = following, values[:, n]
    return advantages


def collect(
    settings: Settings, coefficient: float, parameters: Parameters, reference: Parameters, rollout: Rollout
) -> Batch:
    """Returns the rollout scored by the parameters and the reference (O:step, T:607-685, A:rollout)."""
    scored = settings.scored(rollout.mask)
    logp, reference_logp = (
        np.where(scored, log_probs(p, rollout.tokens, settings.temperature)[0], 0.0) for p in (parameters, reference)
    )
    values = np.where(settings.valued(rollout.mask), parameters.value[states_of(rollout.tokens)], 0.0)
    kl, rewards = token_rewards(settings, coefficient, logp - reference_logp, rollout)
    return Batch(rollout.tokens, rollout.mask, logp, values, kl, rewards)


def estimate(settings: Settings, batch: Batch) -> Estimate:
    """Returns rewards, advantages and value targets (O:loss, T:687-704, A:_estimate_advantage)."""
    averaged, valued, rewards = settings.averaged(batch.mask), settings.valued(batch.mask), batch.rewards
    if settings.whiten_rewards:
        rewards = np.where(valued, settings.whiten(rewards, valued, True), 0.0)
    advantages = gae(rewards, batch.values, settings.discount, settings.lam)
    whitened = np.where(averaged, settings.whiten(advantages, averaged, False), 0.0)
    return Estimate(rewards, whitened, advantages + batch.values)


def token_weights(mask: Array, micro_rows: int | None) -> Array:
    """Returns the weight of each token in the mean over blocks of rows of the blocks' masked means; they sum to 1."""
    rows = micro_rows or len(mask)
    counts = mask.reshape(-1, rows * mask.shape[1]).sum(1)
    return mask / np.repeat(counts, rows)[:, None] / len(counts)


def gradient_of(parameters: Parameters, batch: Batch, by_logits: Array, by_value: Array) -> Parameters:
    """Returns the gradient by the parameters from those by the logits [B, T, V] and by the values [B, T]."""
    gradient = Parameters(*map(np.zeros_like, parameters))
    np.add.at(gradient.policy, states_of(batch.tokens), by_logits)
    np.add.at(gradient.value, states_of(batch.tokens), by_value)
    return gradient


def policy_loss(
    settings: Settings, batch: Batch, advantages: Array, logp: Array
) -> tuple[float, Array, Array, float, float]:
    """Returns (loss, loss by l, rho, approximate KL, clip fraction) of

        mean max(-A rho, -A clip(rho, 1 - e, 1 + e)),   rho = exp(l - l_old),   KL ~ mean (l - l_old)^2 / 2.

    O:350-360, T:749-764, A:247-258.
    """
    scored, measured = settings.scored(batch.mask), settings.measured(batch.mask)
    weights = token_weights(settings.averaged(batch.mask), settings.micro_rows)
    log_ratio = np.where(scored, logp - batch.logp, 0.0)
    ratio = np.exp(log_ratio)
    free = -advantages * ratio
    held = -advantages * np.clip(ratio, 1 - settings.clip, 1 + settings.clip)
    # Where the held branch is larger it is constant: inside the clip the two are equal.
    by_logp = np.where(scored & (free >= held), weights * free, 0.0)
    loss = float((weights * np.maximum(free, held)).sum())
    return loss, by_logp, ratio, masked_mean(log_ratio**2 / 2, measured), masked_mean(held > free, measured)


def value_loss(settings: Settings, batch: Batch, returns: Array, values: Array) -> tuple[float, Array, float]:
    """Returns (loss, loss by V, clip fraction) of 1/2 mean max((V - R)^2, (clip(V, V_old - e, V_old + e) - R)^2).

    O:343-348, T:737-748, A:236-245.
    """
    weights = token_weights(settings.valued(batch.mask), settings.micro_rows)
    near = np.clip(values, batch.values - settings.value_clip, batch.values + settings.value_clip)
    free, held = (values - returns) ** 2, (near - returns) ** 2
    by_value = np.where(free >= held, weights * (values - returns), 0.0)
    return float((weights * np.maximum(free, held)).sum() / 2), by_value, float((weights * (held > free)).sum())


def evaluate(settings: Settings, parameters: Parameters, batch: Batch, target: Estimate) -> Update:
    """Returns the losses of a minibatch, policy + value_coefficient value in all, and their gradient.

    The parameters are passed on (O:loss, T:731-756, A:compute_loss).
    """
    logp, probabilities = log_probs(parameters, batch.tokens, settings.temperature)
    policy, by_logp, ratio, kl, clipped = policy_loss(settings, batch, target.advantages, logp)
    values = parameters.value[states_of(batch.tokens)]
    value, by_value, value_clipped = value_loss(settings, batch, target.returns, values)
    one_hot = np.eye(probabilities.shape[-1])[batch.tokens]
    by_logits = by_logp[..., None] * (one_hot - probabilities) / settings.temperature
    gradient = gradient_of(parameters, batch, by_logits, settings.value_coefficient * by_value)
    loss = policy + settings.value_coefficient * value
    return Update(target, ratio, policy, value, loss, kl, clipped, value_clipped, gradient, parameters)


def norm(gradient: Parameters) -> float:
    """Returns the Euclidean norm of all entries."""
    return float(np.sqrt(sum((g**2).sum() for g in gradient)))


def descend(settings: Settings, rate: float, state: State, gradient: Parameters) -> State:
    """Returns theta (1 - rate weight_decay) - rate adam(gradient), the gradient's norm clipped in torch's form."""
    if settings.max_grad_norm is not None:
        scale = min(1.0, settings.max_grad_norm / (norm(gradient) + 1e-6))
        gradient = Parameters(*(g * scale for g in gradient))
    count = state.count + 1
    mean = Parameters(*(0.9 * m + 0.1 * g for m, g in zip(state.mean, gradient, strict=True)))
    square = Parameters(*(0.999 * s + 0.001 * g**2 for s, g in zip(state.square, gradient, strict=True)))
    parameters = Parameters(
        *(
            p * (1 - rate * settings.weight_decay) - rate * settings.adam(m, s, count, settings.eps)
            for p, m, s in zip(state.parameters, mean, square, strict=True)
        )
    )
    return State(parameters, mean, square, count)


def trace(
    settings: Settings, parameters: Parameters, reference: Parameters, rollouts: Sequence[Rollout], orders: Array
) -> list[Step]:
    """Returns every number of the steps of PPO on given rollouts.

    orders [steps, epochs, minibatches, rows]: the rows of each minibatch. Old log-probs and values are those of the
    parameters at the start of the step.
    """
    assert orders.shape[:3] == (len(rollouts), settings.epochs, settings.minibatches)
    zeros = Parameters(*map(np.zeros_like, parameters))
    state, coefficient, steps = State(parameters, zeros, zeros, 0), settings.kl_coefficient, []
    for index, (rollout, order) in enumerate(zip(rollouts, orders, strict=True)):
        batch = collect(settings, coefficient, state.parameters, reference, rollout)
        whole = estimate(settings, batch)
        rate, updates = settings.learning_rate * settings.schedule(index, len(rollouts)), []
        for rows in order.reshape(-1, order.shape[-1]):
            part = Batch(*(x[rows] for x in batch))
            target = estimate(settings, part) if settings.per_minibatch else Estimate(*(x[rows] for x in whole))
            update = evaluate(settings, state.parameters, part, target)
            state = descend(settings, rate, state, update.gradient)
            updates.append(update._replace(parameters=state.parameters))
        kl, used = float(batch.kl.sum(1).mean()), coefficient
        if settings.adaptive_kl is not None:
            coefficient = settings.adaptive_kl(coefficient, kl, len(batch.kl))
        steps.append(Step(batch, used, coefficient, rate, updates))
    return steps


def example(
    settings: Settings, seed: int, steps: int = 3, rows: int = 8
) -> tuple[Parameters, Parameters, list[Rollout], Array]:
    """Returns (parameters, reference, rollouts, orders) for ``trace``: five columns, four tokens, replies of 1 to 5.

    The stream of RandomState is frozen, so a golden of it stays. Token 3 ends a reply; a full row may lack it. The
    columns after the end hold tokens that a sampler wrote on, as in O; the mask says which are real.
    """
    random, columns, size = np.random.RandomState(seed), 5, 4
    parameters = Parameters(random.randn(columns, size, size), random.randn(columns, size))
    reference = Parameters(parameters.policy + 0.5 * random.randn(columns, size, size), parameters.value)
    rollouts = []
    for _ in range(steps):
        tokens, lengths = random.randint(0, size - 1, (rows, columns)), random.randint(1, columns + 1, rows)
        finished = (lengths < columns) | (random.rand(rows) < 0.5)
        tokens[finished, lengths[finished] - 1] = size - 1
        rollouts.append(Rollout(tokens, np.arange(columns) < lengths[:, None], random.randn(rows), finished))
    orders = [[random.permutation(rows) for _ in range(settings.epochs)] for _ in range(steps)]
    return parameters, reference, rollouts, np.array(orders).reshape(steps, settings.epochs, settings.minibatches, -1)
