"""Training as two pure functions, and the loop that calls them. It is handed an objective; it knows no model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from alignjax.types import Array, Batch, Key, Metrics, Objective, Params, TrainState

Collect = Callable[[Params, Params, Any, Batch, Key], Batch]
"""(params, their average, frozen trees, raw batch, key) -> the batch an objective takes."""
Whole = Callable[[Params, Any], Params]
"""(trained parameters, frozen trees) -> the parameters that an objective takes."""
Update = Callable[[TrainState, Any, Batch], tuple[TrainState, Metrics]]


def given(params: Params, average: Params, frozen: Any, batch: Batch, key: Key) -> Batch:
    """The Collect of offline objectives: the data is the batch."""
    return batch


def trained(params: Params, frozen: Any) -> Params:
    """The Whole of a model that is trained whole."""
    return params


def init(params: Params, optimizer: optax.GradientTransformation, key: Key, average: bool) -> TrainState:
    """The state before the first update. With ``average`` the moving average starts at the parameters."""
    copy = jax.tree.map(jnp.array, params) if average else {}
    return TrainState(jnp.int32(0), params, optimizer.init(params), copy, key)


@jax.tree_util.register_pytree_with_keys_class
class Once:
    """A tree as an argument of a compiled function. A leaf that stands in it several times, as a base does under some
    adapters, is given once: the compiler cannot know that two arguments are one array, and finds room for both."""

    def __init__(self, tree: Any):
        found, self.form = jax.tree_util.tree_flatten_with_path(tree)
        unique: dict[int, tuple[int, Any, str]] = {}  # the leaf's number, itself, and the first of its names
        for path, leaf in found:
            unique.setdefault(id(leaf), (len(unique), leaf, jax.tree_util.keystr(path, simple=True, separator=".")))
        self.where = tuple(unique[id(leaf)][0] for _, leaf in found)
        self.leaves, self.names = ([one[i] for one in unique.values()] for i in (1, 2))

    def tree(self) -> Any:
        return jax.tree.unflatten(self.form, [self.leaves[i] for i in self.where])

    def tree_flatten_with_keys(self) -> tuple[list[tuple[Any, Any]], Any]:
        keys = map(jax.tree_util.GetAttrKey, self.names)
        return list(zip(keys, self.leaves, strict=True)), (self.form, self.where, tuple(self.names))

    @classmethod
    def tree_unflatten(cls, how: Any, leaves: Iterable[Any]) -> Once:
        self = object.__new__(cls)
        self.leaves, (self.form, self.where, self.names) = list(leaves), how
        return self


def make_update(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    collect: Collect = given,
    accumulate: int = 1,
    average_decay: float | None = None,
    whole: Whole = trained,
) -> Update:
    """One update: collect a batch, average the gradient over ``accumulate`` parts of it (each part counts
    alike: the whole batch's gradient where the objective is a mean over rows), step, and move

        average <- average_decay * average + (1 - average_decay) * params.

    Keys are fold_in(state.key, state.step), then 0 for collecting and 1 for the objective. Where only adapters are
    trained, ``whole`` lays them over a frozen base.
    """

    def gradient(params: Params, frozen: Any, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        def loss(params: Params) -> tuple[Array, Metrics]:
            return objective(whole(params, frozen), batch, key)

        grads, metrics = jax.grad(loss, has_aux=True)(params)
        return grads, metrics

    def accumulated(params: Params, frozen: Any, batch: Batch, key: Key) -> tuple[Params, Metrics]:
        if accumulate == 1:
            return gradient(params, frozen, batch, key)

        def part(total: Any, one: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradient(params, frozen, *one)), None

        # Rows are dealt round-robin, so that each part stays spread over the whole mesh.
        parts = jax.tree.map(lambda x: x.reshape(-1, accumulate, *x.shape[1:]).swapaxes(0, 1), batch)
        keys = jax.random.split(key, accumulate)
        first = jax.eval_shape(gradient, params, frozen, jax.tree.map(lambda x: x[0], parts), key)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
        total, _ = jax.lax.scan(part, zeros, (parts, keys))
        return jax.tree.map(lambda x: x / accumulate, total)

    def update(state: TrainState, frozen: Any, raw: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(state.key, state.step)
        average = whole(state.average, frozen) if state.average else state.average
        batch = collect(whole(state.params, frozen), average, frozen, raw, jax.random.fold_in(key, 0))
        grads, metrics = accumulated(state.params, frozen, batch, jax.random.fold_in(key, 1))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        average = state.average
        if average_decay is not None:
            average = jax.tree.map(lambda a, p: average_decay * a + (1 - average_decay) * p, average, params)
        metrics = {**metrics, "gradient_norm": optax.tree.norm(grads)}
        return TrainState(state.step + 1, params, opt_state, average, state.key), metrics

    return update


def fit(
    state: TrainState,
    start: int,
    frozen: Any,
    data: Iterable[Batch],
    update: Update,
    every: Callable[[TrainState, int, Metrics], None],
) -> TrainState:
    """Applies the compiled ``update`` to each batch, from step ``start``. ``every(state, steps_done,
    metrics)`` sees each result; the loop itself never waits for the device."""
    for step, batch in enumerate(data, start):
        state, metrics = update(state, frozen, batch)
        every(state, step + 1, metrics)
    return state
