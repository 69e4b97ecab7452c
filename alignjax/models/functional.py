"""From a Flax NNX module to a pair of pure functions; the only place where the two worlds meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from alignjax.types import Key, Params


class Functional(NamedTuple):
    """``init(key) -> params`` and ``apply(params, *args)``, params being a nested dict of arrays."""

    init: Callable[[Key], Params]
    apply: Callable[..., Any]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Splits the module that ``make(rngs)`` builds into its graph (static) and its parameters.

    ``apply`` merges inside the caller's ``jax.jit``, which costs nothing per step; ``nnx.jit`` and
    ``State`` objects never appear.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: Key) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

    def apply(params: Params, *args: Any) -> Any:
        return nnx.merge(graph, params)(*args)

    return Functional(init, apply)
