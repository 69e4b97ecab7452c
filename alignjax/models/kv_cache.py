"""What decoding keeps of a layer, and how a prompt and then each token go through all layers with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax import lax

from alignjax.types import Array, Params


class Cache(NamedTuple):
    """Keys and values of one layer, [B, K, S, head_dim] each: a step reads them without moving them."""

    k: Array
    v: Array

    def written(self, k: Array, v: Array, slot: Array) -> Cache:
        """With the keys and values [B, K, T, head_dim] at ``slot`` and behind."""
        return Cache(*(lax.dynamic_update_slice_in_dim(old, new, slot, 2) for old, new in ((self.k, k), (self.v, v))))

    def read(self) -> tuple[Array, Array]:
        return self.k, self.v


class Stack(NamedTuple):
    """The same of all layers, [L, B, K, S, head_dim], as one of them sees it: only what is new is moved."""

    k: Array
    v: Array
    layer: Array  # [] int32

    def written(self, k: Array, v: Array, slot: Array) -> Stack:
        at = (self.layer, 0, 0, slot, 0)
        k, v = (lax.dynamic_update_slice(old, x[None], at) for old, x in ((self.k, k), (self.v, v)))
        return Stack(k, v, self.layer)

    def read(self) -> tuple[Array, Array]:
        k, v = (lax.dynamic_index_in_dim(x, self.layer, keepdims=False) for x in (self.k, self.v))
        return k, v


def unrolled(blocks: Params, frequency: np.ndarray, windows: np.ndarray):
    """How a prompt and how a token goes through the layers, one after the other, each with its own cache."""
    layers = [jax.tree.map(lambda w, i=i: w[i], blocks) for i in range(len(windows))]

    def read_all(read: Callable[..., tuple[Array, Cache]], x: Array) -> tuple[Array, tuple[Cache, ...]]:
        caches = []
        for weights, turns, window in zip(layers, frequency, windows, strict=True):
            x, cache = read(weights, x, turns, window)
            caches.append(cache)
        return x, tuple(caches)

    def write_all(write: Callable[..., tuple[Array, Cache]], x: Array, caches: tuple[Cache, ...]):
        written = []
        for weights, turns, window, cache in zip(layers, frequency, windows, caches, strict=True):
            x, cache = write(weights, x, turns, window, cache)
            written.append(cache)
        return x, tuple(written)

    return read_all, write_all


def scanned(blocks: Params, frequency: np.ndarray, windows: np.ndarray):
    """The same in loops, over one stack of caches."""
    numbers = np.arange(len(windows))

    def read_all(read: Callable[..., tuple[Array, Cache]], x: Array) -> tuple[Array, tuple[Array, Array]]:
        def layer(x: Array, one: tuple) -> tuple[Array, tuple[Array, Array]]:
            weights, turns, window = one
            x, cache = read(weights, x, turns, window)
            return x, cache.read()

        return lax.scan(layer, x, (blocks, frequency, windows))

    def write_all(write: Callable[..., tuple[Array, Stack]], x: Array, caches: tuple[Array, Array]):
        def layer(state: tuple[Array, Array, Array], one: tuple) -> tuple[tuple[Array, Array, Array], None]:
            x, k, v = state
            weights, turns, window, number = one
            x, stack = write(weights, x, turns, window, Stack(k, v, number))
            return (x, stack.k, stack.v), None

        (x, k, v), _ = lax.scan(layer, (x, *caches), (blocks, frequency, windows, numbers))
        return x, (k, v)

    return read_all, write_all
