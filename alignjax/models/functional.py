"""From a Flax NNX module to a pair of pure functions. NNX objects never leave this module's functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import nnx

from alignjax.types import Key, Params

LORA = "lora"
"""The key of an adapter {"a": A, "b": B}; it lies beside the "kernel" of the projection that it adapts."""


class Functional(NamedTuple):
    """A module as two functions: ``init(key) -> params`` and ``apply(params, *args, method=None) -> output``.

    ``params`` is a nested dict of arrays. ``method`` is a method of the module's class; None calls the module itself.
    """

    init: Callable[[Key], Params]
    apply: Callable[..., Any]


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> Functional:
    """Returns the module that ``make(rngs)`` builds as pure functions.

    The module is split once into its graph, which is static, and its parameters. ``apply`` merges the two inside the
    caller's ``jax.jit``, where merging costs nothing at run time.
    """
    graph, _ = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))

    def init(key: Key) -> Params:
        return nnx.to_pure_dict(nnx.state(make(nnx.Rngs(key)), nnx.Param))

    def apply(params: Params, *args: Any, method: Callable[..., Any] | None = None) -> Any:
        own, adapters = _split_adapters(params)
        module = nnx.merge(graph, own)
        for name, adapter in adapters.items():
            getattr(module, name).adapter = nnx.data((adapter["a"], adapter["b"]))
        return module(*args) if method is None else method(module, *args)

    return Functional(init, apply)


def _split_adapters(params: Params) -> tuple[Params, dict[str, Params]]:
    """Returns the module's own parameters and, by projection, the adapters that lie among them."""
    adapters = {name: part[LORA] for name, part in params.items() if isinstance(part, dict) and LORA in part}
    own = dict(params)
    for name in adapters:
        own[name] = {key: value for key, value in params[name].items() if key != LORA}
    return own, adapters
