"""Key/value caches, and the two ways to run a decoder's layers over them: unrolled or in a scan.

Unrolled, each layer has a cache of its own; that is faster per token. Scanned, all layers share one stacked cache;
compile time does not grow with the number of layers. Shape letters as in ``layers``; L: layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from alignjax.types import Array, Params


class LayerCache(NamedTuple):
    """Keys and values of one layer, [B, K, S, h] each. A decode step reads them without a copy."""

    keys: Array
    values: Array

    def write(self, keys: Array, values: Array, slot: Array) -> LayerCache:
        """Returns the cache with T new keys and values [B, K, T, h] in the slots from ``slot`` on."""
        return LayerCache(
            lax.dynamic_update_slice_in_dim(self.keys, keys, slot, 2),
            lax.dynamic_update_slice_in_dim(self.values, values, slot, 2),
        )

    def read(self) -> tuple[Array, Array]:
        """Returns keys and values, [B, K, S, h] each."""
        return self.keys, self.values

    def extend(self, slots: int) -> LayerCache:
        """Returns the cache with that many empty slots appended."""
        room = ((0, 0), (0, 0), (0, slots), (0, 0))
        return LayerCache(jnp.pad(self.keys, room), jnp.pad(self.values, room))


class StackedCache(NamedTuple):
    """Keys and values of all layers, [L, B, K, S, h] each, as layer ``layer`` reads and writes them."""

    keys: Array
    values: Array
    layer: Array  # [] int32

    def write(self, keys: Array, values: Array, slot: Array) -> StackedCache:
        """Returns the cache with T new keys and values [B, K, T, h] in the layer's slots from ``slot`` on.

        Only the new entries are moved.
        """
        start = (self.layer, 0, 0, slot, 0)
        return StackedCache(
            lax.dynamic_update_slice(self.keys, keys[None], start),
            lax.dynamic_update_slice(self.values, values[None], start),
            self.layer,
        )

    def read(self) -> tuple[Array, Array]:
        """Returns the layer's keys and values, [B, K, S, h] each."""
        keys, values = (lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in (self.keys, self.values))
        return keys, values


class Layer(NamedTuple):
    """What is specific to one layer; or, with a leading axis [L, ...] on every array, to all layers."""

    weights: Params
    frequencies: Array  # [F] rotary frequencies, radians a token
    window: Array  # [] int32, tokens that the layer attends to


PrefillLayer = Callable[[Layer, Array], tuple[Array, LayerCache]]
"""(layer, x [B T, D]) -> (the layer's output [B T, D], its cache)."""
DecodeLayer = Callable[[Layer, Array, Any], tuple[Array, Any]]
"""(layer, x [B, D], its cache) -> (the layer's output [B, D], its cache with the new token)."""


class LayerLoop(NamedTuple):
    """A way to run layers one after the other.

    ``prepare(stacked layers)`` returns the layers as the other two functions take them.
    ``prefill(run, layers, x) -> (x, caches)`` runs a PrefillLayer through all layers.
    ``decode(run, layers, x, caches) -> (x, caches)`` runs a DecodeLayer through all layers.
    """

    prepare: Callable[[Layer], Any]
    prefill: Callable[[PrefillLayer, Any, Array], tuple[Array, Any]]
    decode: Callable[[DecodeLayer, Any, Array, Any], tuple[Array, Any]]


def _split_layers(layers: Layer) -> tuple[Layer, ...]:
    return tuple(
        Layer(jax.tree.map(lambda w, i=i: w[i], layers.weights), layers.frequencies[i], layers.window[i])
        for i in range(len(layers.window))
    )


def _prefill_unrolled(run: PrefillLayer, layers: tuple[Layer, ...], x: Array) -> tuple[Array, tuple[LayerCache, ...]]:
    caches = []
    for layer in layers:
        x, cache = run(layer, x)
        caches.append(cache)
    return x, tuple(caches)


def _decode_unrolled(
    run: DecodeLayer, layers: tuple[Layer, ...], x: Array, caches: tuple[LayerCache, ...]
) -> tuple[Array, tuple[LayerCache, ...]]:
    written = []
    for layer, cache in zip(layers, caches, strict=True):
        x, cache = run(layer, x, cache)
        written.append(cache)
    return x, tuple(written)


def _prefill_scanned(run: PrefillLayer, layers: Layer, x: Array) -> tuple[Array, tuple[Array, Array]]:
    def body(x: Array, layer: Layer) -> tuple[Array, tuple[Array, Array]]:
        x, cache = run(layer, x)
        return x, cache.read()

    return lax.scan(body, x, layers)


def _decode_scanned(
    run: DecodeLayer, layers: Layer, x: Array, caches: tuple[Array, Array]
) -> tuple[Array, tuple[Array, Array]]:
    def body(state: tuple[Array, Array, Array], inputs: tuple[Layer, Array]) -> tuple[Any, None]:
        x, keys, values = state
        layer, index = inputs
        x, cache = run(layer, x, StackedCache(keys, values, index))
        return (x, cache.keys, cache.values), None

    (x, keys, values), _ = lax.scan(body, (x, *caches), (layers, np.arange(len(layers.window))))
    return x, (keys, values)


UNROLLED = LayerLoop(_split_layers, _prefill_unrolled, _decode_unrolled)
"""One layer after the other; ``caches`` is a tuple of one LayerCache a layer."""
SCANNED = LayerLoop(lambda layers: layers, _prefill_scanned, _decode_scanned)
"""A scan over the layers; ``caches`` is (keys, values), [L, B, K, S, h] each."""
