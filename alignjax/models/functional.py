"""From a Flax NNX module to a pair of pure functions; the only place where the two worlds meet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from alignjax.types import Key, Params

LORA = "lora"  # beside a projection's kernel: its adapter {"a", "b"}, where it has one


class Functional(NamedTuple):
    """``init(key) -> params`` and ``apply(params, *args)``, params being a nested dict of arrays."""

    init: Callable[[Key], Params]
    apply: Callable[..., Any]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Splits the module that ``make(rngs)`` builds into its graph (static) and its parameters.

    ``apply`` merges inside the caller's ``jax.jit``, which costs nothing per step; ``nnx.jit`` and ``State`` objects
    never appear. Adapters that lie in the tree beside a projection's kernel are attached to it. ``method`` is what
    is called of the module.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: Key) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

    def apply(params: Params, *args: Any, method: str = "__call__") -> Any:
        adapters = {name: part[LORA] for name, part in params.items() if isinstance(part, dict) and LORA in part}
        plain = {n: {k: v for k, v in p.items() if k != LORA} if n in adapters else p for n, p in params.items()}
        module = nnx.merge(graph, plain)
        for name, pair in adapters.items():
            getattr(module, name).adapter = nnx.data((pair["a"], pair["b"]))
        return getattr(module, method)(*args)

    return Functional(init, apply)
