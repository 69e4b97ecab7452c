"""``learn(state, frozen, batch) -> state, metrics``, one of the two pure functions of training.

The other is ``collect`` (``alignjax.training.collect``). ``learn`` is given an objective; it knows no model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from alignjax.types import Array, Extras, Key, Loss, Metrics, Params, TrainState

COLLECT, LEARN = 0, 1
"""Numbers folded into a step's key: COLLECT for drawing, LEARN for the objective."""

LEARN_MEANINGS = {"gradient_norm": "global norm of the gradient before clipping, the largest of a batch"}
"""What the metrics show that ``learn`` adds to the objective's."""

Assemble = Callable[[Params, Any], Params]
"""(trained parameters, frozen trees) -> the parameters that an objective takes."""
Learn = Callable[[TrainState, Any, Any], tuple[TrainState, Metrics]]
"""(state, frozen trees, batch) -> (state, metrics)."""


@dataclasses.dataclass(frozen=True)
class UpdateSchedule:
    """How ``learn`` goes through a batch: ``epochs`` times, in ``minibatches`` parts, each with one optimiser step.

    PPO (1707.06347) uses several of both; Nash-MD uses one of each, which keeps it on-policy. ``accumulate`` splits a
    minibatch again, for memory alone: its gradient is the mean over the parts.
    """

    epochs: int = 1
    minibatches: int = 1
    accumulate: int = 1

    @property
    def updates(self) -> int:
        """The optimiser steps of one ``learn``."""
        return self.epochs * self.minibatches


def step_key(state: TrainState, purpose: int) -> Key:
    """Returns the key of the state's step for COLLECT or LEARN."""
    return jax.random.fold_in(jax.random.fold_in(state.key, state.step), purpose)


def init_state(
    params: Params,
    optimizer: optax.GradientTransformation,
    key: Key,
    average: bool,
    controls: Params | None = None,
    anchor: bool = False,
) -> TrainState:
    """Returns the state before the first step. With ``average`` the moving average starts at the parameters; with
    ``anchor``, which extragradient steps need, so does the anchor."""
    copies = [jax.tree.map(jnp.array, params) if wanted else {} for wanted in (average, anchor)]
    return TrainState(jnp.int32(0), params, optimizer.init(params), copies[0], key, controls or {}, copies[1])


def all_trained(params: Params, frozen: Any) -> Params:
    """The Assemble of a model whose parameters are all trained."""
    return params


def make_learn(
    loss: Loss,
    optimizer: optax.GradientTransformation,
    schedule: UpdateSchedule = UpdateSchedule(),
    assemble: Assemble = all_trained,
    average_decay: float | None = None,
    extras: Extras = Extras(),
    extragradient: bool = False,
) -> Learn:
    """Returns ``learn``. It takes ``schedule.updates`` optimiser steps and moves the average once, to
    average_decay * average + (1 - average_decay) * params. With ``extragradient`` see ``at_anchor``.

    Where only adapters are trained, ``assemble`` lays them over a frozen base. ``extras`` are the objective's.
    Metrics are means over the first epoch, which meets every row once, or over the last for those that ``extras``
    names; the norm of the gradient is the largest of all updates.
    """
    gradient = accumulated_gradient(loss, assemble, schedule.accumulate)

    def update(state: TrainState, frozen: Any, batch: Any, key: Key) -> tuple[TrainState, Metrics]:
        grads, metrics = gradient(state.params, frozen, batch, key)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(grads)}
        return dataclasses.replace(state, params=params, opt_state=opt_state), metrics

    def learn(state: TrainState, frozen: Any, batch: Any) -> tuple[TrainState, Metrics]:
        key = step_key(state, LEARN)
        state = at_anchor(state) if extragradient else state
        if schedule.updates == 1:
            state, metrics = update(state, frozen, batch, key)
        else:
            state, metrics = over_minibatches(update, schedule, state, frozen, batch, key)
            metrics = batch_metrics(metrics, schedule, extras.last_epoch)
        average = state.average
        if average_decay is not None:
            average = jax.tree.map(lambda a, p: average_decay * a + (1 - average_decay) * p, average, state.params)
        controls = extras.adapt(state.controls, batch)
        return dataclasses.replace(state, step=state.step + 1, average=average, controls=controls), metrics

    return learn


def at_anchor(state: TrainState) -> TrainState:
    """Returns the state at the point from which an extragradient batch is learned from, with that point as its anchor.

    On even steps these are its parameters, which lead to the half point, and that writes the next batch. On odd steps
    it is the anchor: the second batch leads on from where the first one started (2503.08942). An optimiser with a
    memory, such as Adam, keeps it over both (1802.10551).
    """
    is_whole = state.step % 2 == 0
    start = jax.tree.map(lambda params, anchor: jnp.where(is_whole, params, anchor), state.params, state.anchor)
    return dataclasses.replace(state, params=start, anchor=start)


def over_minibatches(
    update: Callable[..., tuple[TrainState, Metrics]],
    schedule: UpdateSchedule,
    state: TrainState,
    frozen: Any,
    batch: Any,
    key: Key,
) -> tuple[TrainState, Metrics]:
    """Returns the state after ``schedule.updates`` updates, and the metrics of each, [updates].

    Every epoch shuffles the rows anew.
    """
    rows = len(jax.tree.leaves(batch)[0])

    def update_number(state: TrainState, number: Array) -> tuple[TrainState, Metrics]:
        epoch, part = number // schedule.minibatches, number % schedule.minibatches
        order = jax.random.permutation(jax.random.fold_in(key, epoch), rows).reshape(schedule.minibatches, -1)
        minibatch = jax.tree.map(lambda x: jnp.asarray(x)[order[part]], batch)
        return update(state, frozen, minibatch, jax.random.fold_in(key, schedule.epochs + number))

    return jax.lax.scan(update_number, state, jnp.arange(schedule.updates))


def batch_metrics(metrics: Metrics, schedule: UpdateSchedule, last_epoch: tuple[str, ...]) -> Metrics:
    """Returns the metrics of a batch from those of its updates, each [updates]; a NaN of the gradient stays."""
    first, last = slice(None, schedule.minibatches), slice(-schedule.minibatches, None)
    means = {name: jnp.mean(values[last if name in last_epoch else first]) for name, values in metrics.items()}
    return {**means, "gradient_norm": jnp.max(metrics["gradient_norm"])}


def accumulated_gradient(
    loss: Loss, assemble: Assemble, accumulate: int
) -> Callable[[Params, Any, Any, Key], tuple[Params, Metrics]]:
    """Returns (params, frozen, batch, key) -> (gradient, metrics), each the mean over ``accumulate`` parts of the rows.

    It is the whole batch's gradient where the objective is a mean over rows.
    """

    def gradient(params: Params, frozen: Any, batch: Any, key: Key) -> tuple[Params, Metrics]:
        def scalar(params: Params) -> tuple[Array, Metrics]:
            return loss(assemble(params, frozen), batch, key)

        return jax.grad(scalar, has_aux=True)(params)

    def accumulated(params: Params, frozen: Any, batch: Any, key: Key) -> tuple[Params, Metrics]:
        # Rows are dealt round-robin, so that each part stays spread over the whole mesh.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, accumulate)
        shapes = jax.eval_shape(gradient, params, frozen, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

        def add(total: Any, part: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, frozen, *part)), None

        total, _ = jax.lax.scan(add, zeros, (parts, keys))
        return jax.tree.map(lambda x: x / accumulate, total)

    return gradient if accumulate == 1 else accumulated
