"""The modules of the decoder-only transformer: one layer, and what lies outside the layers.

Shape letters as in ``layers``.
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from alignjax.models.config import TransformerConfig
from alignjax.models.kv_cache import LayerCache, StackedCache
from alignjax.models.layers import ACTIVATIONS, Linear, Norm, attend, soft_cap
from alignjax.models.rope import apply_rotary
from alignjax.types import Array


def _norm(c: TransformerConfig, width: int) -> Norm:
    return Norm(width, eps=c.norm_eps, dtype=c.compute_dtype, offset=c.norm_offset, centred=c.norm == "layer")


class DecoderBlock(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c = self.config = config

        def linear(name: str, inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, bias=name in c.biases, dtype=c.compute_dtype, rngs=rngs)

        self.attention_norm, self.mlp_norm = _norm(c, c.width), _norm(c, c.width)
        if c.post_norms:
            self.attention_post_norm, self.mlp_post_norm = _norm(c, c.width), _norm(c, c.width)
        if c.head_norms:
            self.q_norm, self.k_norm = _norm(c, c.head_dim), _norm(c, c.head_dim)
        self.q = linear("q", c.width, c.heads * c.head_dim)
        self.k = linear("k", c.width, c.kv_heads * c.head_dim)
        self.v = linear("v", c.width, c.kv_heads * c.head_dim)
        self.o = linear("o", c.heads * c.head_dim, c.width)
        if c.gated:
            self.gate = linear("gate", c.width, c.hidden)
        self.up, self.down = linear("up", c.width, c.hidden), linear("down", c.hidden, c.width)

    def __call__(
        self,
        x: Array,
        positions: Array,
        mask: Array,
        frequencies: Array,
        cache: LayerCache | StackedCache | None = None,
        slot: Array | None = None,
    ) -> tuple[Array, LayerCache | StackedCache]:
        """x [B T, D], positions [B, T], mask [B, T, S], frequencies [F] -> (x [B T, D], the layer's cache).

        x is flat, so that every projection is one matrix product. Without a cache, S = T and the returned cache holds
        the T keys and values. With one, they are written from ``slot`` on, and attention reads all S slots.
        """
        c = self.config
        attended, cache = self.attention(self.attention_norm(x), positions, mask, frequencies, cache, slot)
        if c.post_norms:
            attended = self.attention_post_norm(attended)
        if c.parallel:
            return x + attended + self.mlp(self.mlp_norm(x)), cache
        x = x + attended
        transformed = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(transformed) if c.post_norms else transformed), cache

    def attention(
        self,
        x: Array,
        positions: Array,
        mask: Array,
        frequencies: Array,
        cache: LayerCache | StackedCache | None,
        slot: Array | None,
    ) -> tuple[Array, LayerCache | StackedCache]:
        """Self-attention; arguments and results as in ``__call__``."""
        c = self.config
        q = self.q(x).reshape(*positions.shape, c.heads, c.head_dim)
        k = self.k(x).reshape(*positions.shape, c.kv_heads, c.head_dim)
        v = self.v(x).reshape(*positions.shape, c.kv_heads, c.head_dim).swapaxes(1, 2)
        if c.head_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.rotated:
            q, k = apply_rotary(q, positions, frequencies), apply_rotary(k, positions, frequencies)
        k = k.swapaxes(1, 2)
        cache = LayerCache(k, v) if cache is None or slot is None else cache.write(k, v, slot)
        keys, values = cache.read()
        attended = attend(q, keys, values, mask, c.query_scale or c.head_dim**-0.5, c.attention_cap)
        return self.o(attended.reshape(len(x), -1)), cache

    def mlp(self, x: Array) -> Array:
        """x [B T, D] -> [B T, D]."""
        activation = ACTIVATIONS[self.config.activation]
        return self.down(activation(self.gate(x)) * self.up(x) if self.config.gated else activation(self.up(x)))


class EmbeddingAndHead(nnx.Module):
    """What lies outside the layers: the embedding, the last norm and, unless tied, the output projection."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.compute_dtype)
        self.config = config
        init = nnx.initializers.normal(c.initializer_range)
        self.embed = nnx.Embed(c.vocab_size, c.width, embedding_init=init, dtype=dtype, rngs=rngs)
        self.norm = _norm(c, c.width)
        if c.positions == "learned":
            self.positions = nnx.Embed(c.context, c.width, embedding_init=init, dtype=dtype, rngs=rngs)
        if not c.tied:
            self.head = Linear(c.width, c.vocab_size, bias=False, dtype=c.compute_dtype, rngs=rngs)

    def embed_tokens(self, tokens: Array, positions: Array) -> Array:
        """Tokens [...] at positions [...] -> [..., D]."""
        c, x = self.config, self.embed(tokens)
        if c.embed_scale != 1.0:
            x = x * jnp.asarray(c.embed_scale, x.dtype)
        return x + self.positions(positions) if c.positions == "learned" else x

    def normalize(self, x: Array) -> Array:
        """The last layer's output [..., D] -> states [..., D]."""
        return self.norm(x)

    def logits(self, states: Array) -> Array:
        """States [..., D] -> logits [..., V], float32."""
        c = self.config
        kernel = self.embed.embedding[...].T if c.tied else self.head.kernel[...]
        x = states.astype(c.compute_dtype)
        # Accumulated and kept in float32: rounding a logit to bfloat16 spoils the second digit of its log-prob.
        return soft_cap(jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32), c.logit_cap)
