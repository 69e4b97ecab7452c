"""The modules of T5: one encoder or decoder layer, what lies outside the layers, and relative positions.

Shape letters as in ``layers``; M: encoder positions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx

from alignjax.models.config import T5Config
from alignjax.models.kv_cache import LayerCache
from alignjax.models.layers import ACTIVATIONS, Linear, Norm, attend
from alignjax.types import Array, Params


class CrossMemory(NamedTuple):
    """The encoder's states as one decoder layer reads them."""

    cache: LayerCache  # keys and values, [B, H, M, h] each
    mask: Array  # [B, M] bool


def t5_norm(c: T5Config) -> Norm:
    """Returns the configuration's RMS norm."""
    return Norm(c.width, eps=c.norm_eps, dtype=c.compute_dtype)


class T5Block(nnx.Module):
    """One layer: x + attention(norm(x)); in the decoder, x + cross-attention(norm(x)); then x + mlp(norm(x))."""

    def __init__(self, config: T5Config, is_decoder: bool, *, rngs: nnx.Rngs):
        c, inner = config, config.heads * config.head_dim
        self.config = config

        def linear(inputs: int, outputs: int, factor: float = 1.0) -> Linear:
            init = nnx.initializers.normal(factor * inputs**-0.5)
            return Linear(inputs, outputs, bias=False, dtype=c.compute_dtype, rngs=rngs, init=init)

        query = c.head_dim**-0.5  # T5 has this factor in the initial query kernel, and none in its attention scores
        self.attention_norm, self.mlp_norm = t5_norm(c), t5_norm(c)
        self.q, self.k = linear(c.width, inner, query), linear(c.width, inner)
        self.v, self.o = linear(c.width, inner), linear(inner, c.width)
        if is_decoder:
            self.cross_norm = t5_norm(c)
            self.cross_q, self.cross_k = linear(c.width, inner, query), linear(c.width, inner)
            self.cross_v, self.cross_o = linear(c.width, inner), linear(inner, c.width)
        if c.gated:
            self.gate = linear(c.width, c.hidden)
        self.up, self.down = linear(c.width, c.hidden), linear(c.hidden, c.width)

    def __call__(
        self,
        x: Array,
        mask: Array,
        bias: Array,
        memory: CrossMemory | None = None,
        cache: LayerCache | None = None,
        slot: Array | None = None,
    ) -> tuple[Array, LayerCache]:
        """x [B, T, D], mask [B, T, S], bias [H, T, S] -> (x [B, T, D], the layer's cache).

        ``memory`` is what the decoder's layers attend to; the encoder's have none. Without a cache, S = T and the
        returned cache holds the T keys and values. With one, they are written from ``slot`` on, and attention reads
        all S slots.
        """
        h = self.attention_norm(x)
        new = LayerCache(self.split_heads(self.k(h)), self.split_heads(self.v(h)))
        cache = new if cache is None or slot is None else cache.write(*new.read(), slot)
        x = x + self.o(self.attention(self.q(h), cache, mask, bias))
        if memory is not None:
            memory_mask = jnp.broadcast_to(memory.mask[:, None], (*x.shape[:2], memory.mask.shape[1]))
            h = self.cross_norm(x)
            x = x + self.cross_o(self.attention(self.cross_q(h), memory.cache, memory_mask, None))
        return x + self.mlp(self.mlp_norm(x)), cache

    def cross_cache(self, states: Array) -> LayerCache:
        """The encoder's states [B, M, D] as this decoder layer's keys and values."""
        return LayerCache(self.split_heads(self.cross_k(states)), self.split_heads(self.cross_v(states)))

    def split_heads(self, x: Array) -> Array:
        """[B, T, H h] -> [B, H, T, h]."""
        return x.reshape(*x.shape[:2], self.config.heads, -1).swapaxes(1, 2)

    def attention(self, q: Array, cache: LayerCache, mask: Array, bias: Array | None) -> Array:
        """q [B, T, H h] -> [B, T, H h]; mask and bias as in ``__call__``."""
        heads = q.reshape(*q.shape[:2], self.config.heads, -1)
        return attend(heads, cache.keys, cache.values, mask, 1.0, bias=bias).reshape(q.shape)

    def mlp(self, x: Array) -> Array:
        """[B, T, D] -> [B, T, D]."""
        activation = ACTIVATIONS[self.config.activation]
        return self.down(activation(self.gate(x)) * self.up(x) if self.config.gated else activation(self.up(x)))


class T5EmbeddingAndHead(nnx.Module):
    """What lies outside the layers: the embedding that both sides share and, unless tied, the output projection."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = self.config = config
        # T5 1.0 starts the tied embedding at 1 and scales states down; an unscaled output must start small itself.
        embed, head = (nnx.initializers.normal(1.0 if c.scaled_output or not c.tied else c.width**-0.5),
                       nnx.initializers.normal(1.0 if c.scaled_output else c.width**-0.5))  # fmt: skip
        self.embed = nnx.Embed(c.vocab_size, c.width, embedding_init=embed, dtype=jnp.dtype(c.compute_dtype), rngs=rngs)
        if not c.tied:
            self.head = Linear(c.width, c.vocab_size, bias=False, dtype=c.compute_dtype, rngs=rngs, init=head)

    def embed_tokens(self, tokens: Array) -> Array:
        """Tokens [...] -> [..., D]."""
        return self.embed(tokens)

    def logits(self, states: Array) -> Array:
        """States [..., D] -> logits [..., V], accumulated and kept in float32."""
        c = self.config
        kernel = self.embed.embedding[...].T if c.tied else self.head.kernel[...]
        x = (states * c.width**-0.5 if c.scaled_output else states).astype(c.compute_dtype)
        return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def relative_buckets(distance: Array, config: T5Config, bidirectional: bool) -> Array:
    """Returns the bucket of each distance (key position - query position, tokens), int32 (1910.10683, section 2.1).

    Half of the buckets hold one distance each; the others widen as its logarithm, up to ``config.distance``.
    ``bidirectional`` gives half of all buckets to keys before the query and half to keys after it. Without it, keys
    after the query share the bucket of distance 0.
    """
    count = config.buckets // 2 if bidirectional else config.buckets
    offset = jnp.where(distance > 0, count, 0) if bidirectional else 0
    steps = jnp.abs(distance) if bidirectional else jnp.maximum(-distance, 0)
    exact = count // 2
    growth = jnp.log(jnp.maximum(steps, 1).astype(jnp.float32) / exact) / math.log(config.distance / exact)
    wide = jnp.minimum(exact + (growth * (count - exact)).astype(jnp.int32), count - 1)
    return offset + jnp.where(steps < exact, steps, wide)


def position_bias(table: Params, query_positions: Array, keys: int, config: T5Config, bidirectional: bool) -> Array:
    """Returns what relative positions add to attention scores, [H, T, S].

    Queries lie at ``query_positions`` [T], keys at 0 to S - 1 with S = ``keys``; the table is [buckets, H].
    """
    buckets = relative_buckets(jnp.arange(keys)[None] - query_positions[:, None], config, bidirectional)
    return table["embedding"][buckets].transpose(2, 0, 1)
