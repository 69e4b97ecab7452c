"""A decoder-only transformer of the Llama family: RMSNorm, rotary, grouped queries, SwiGLU.

Layers are stacked along a leading axis [L, ...] and scanned in training; decoding unstacks them once
and keeps one cache per layer (carrying caches through a scan copies them at every token).
Shape letters: B rows, T tokens, S cache slots, D width, H query heads, K key/value heads, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from alignjax.models.functional import functional
from alignjax.types import TINY, Array, Completion, Key, Params, Prompt, Rules, UserError, in_range

P = jax.sharding.PartitionSpec

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matrix products
    "full": jax.checkpoint_policies.nothing_saveable,  # recompute the whole layer
}


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes and options; defaults are Llama's where Llama has one."""

    vocab_size: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    tied: bool = True
    initializer_range: float = 0.02
    compute_dtype: str = "float32"  # parameters stay float32; "bfloat16" casts inside the step
    remat: str = "none"  # a key of REMAT_POLICIES

    def __post_init__(self) -> None:
        in_range(self, 1, math.inf, "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "hidden")
        in_range(self, TINY, math.inf, "rope_theta", "norm_eps")
        if self.remat not in REMAT_POLICIES:
            raise UserError(f"remat={self.remat!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}")
        if self.compute_dtype not in COMPUTE_DTYPES:
            raise UserError(
                f"compute_dtype={self.compute_dtype!r} is unknown; choose one of {', '.join(COMPUTE_DTYPES)}"
            )


class Cache(NamedTuple):
    """Keys and values of one layer, [B, K, S, head_dim] each: a step reads them without moving them."""

    k: Array
    v: Array


class Carry(NamedTuple):
    """What decoding carries from token to token."""

    caches: tuple[Cache, ...]
    valid: Array  # [B, S] bool, slots that hold a real token
    position: Array  # [B] int32, the next token's rotary position
    slot: Array  # [] int32, the next token's cache slot


class Start(NamedTuple):
    """A prefilled prompt: a Step, its first carry and the first logits [B, V]."""

    step: Callable[[Carry, Array], tuple[Carry, Array]]
    carry: Any
    logits: Array


class Model(NamedTuple):
    """A language model as pure functions. An encoder-decoder offers the same six."""

    config: TransformerConfig
    init: Callable[[Key], Params]
    causal: Callable[[Params, Array, Array], Array]
    """(params, tokens [B, T], segments [B, T]) -> states [B, T, D]. Segment 0 is padding; a token
    attends to earlier tokens of its own segment alone, so several texts can share a row."""
    predict: Callable[[Params, Prompt, Completion], Array]
    """(params, prompt, completion) -> [B, T, D]: the state that predicts each completion token."""
    final: Callable[[Params, Prompt], Array]
    """(params, prompt) -> [B, D]: the state after each row's last token."""
    unembed: Callable[[Params, Array], Array]
    """(params, states [..., D]) -> logits [..., V], float32."""
    start: Callable[[Params, Prompt, int], Start]
    """(params, prompt, tokens to come) -> the process that continues the prompt."""
    rules: Rules


def rotary(x: Array, positions: Array, theta: float) -> Array:
    """Rotates x [B, T, N, head_dim] by its positions [B, T], pairs being (i, i + head_dim/2).

    RoFormer (2104.09864), in the half-split layout of Hugging Face.
    """
    half = x.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle).astype(x.dtype), jnp.sin(angle).astype(x.dtype)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def attend(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Softmax attention: q [B, T, H, h], k and v [B, K, S, h], mask [B, T, S] -> [B, T, H, h].

    H is a multiple of K: consecutive query heads share a key/value head (2305.13245).
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[1]
    # Heads of a group side by side with the queries: plain products over two batch axes, which is
    # several times faster on CPU than a five-axis einsum and the same to an accelerator.
    grouped = q.reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    scores = jnp.einsum("bkqd,bksd->bkqs", grouped, k).astype(jnp.float32) * dim**-0.5
    mask = jnp.tile(mask, (1, heads // kv_heads, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bkqs,bksd->bkqd", weights, v).reshape(batch, kv_heads, -1, length, dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape)


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c = self.config = config
        dtype = jnp.dtype(c.compute_dtype)

        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=False, dtype=dtype, rngs=rngs)

        def norm() -> nnx.RMSNorm:
            return nnx.RMSNorm(c.width, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)

        self.attention_norm, self.mlp_norm = norm(), norm()
        self.q = linear(c.width, c.heads * c.head_dim)
        self.k = linear(c.width, c.kv_heads * c.head_dim)
        self.v = linear(c.width, c.kv_heads * c.head_dim)
        self.o = linear(c.heads * c.head_dim, c.width)
        self.gate, self.up = linear(c.width, c.hidden), linear(c.width, c.hidden)
        self.down = linear(c.hidden, c.width)

    def __call__(
        self, x: Array, positions: Array, mask: Array, cache: Cache | None = None, slot: Array | None = None
    ) -> tuple[Array, Cache]:
        """x [B * T, D], flat so that every projection is one matrix product; positions [B, T].

        With a cache, writes the T new keys and values at ``slot`` and attends to all of it.
        """
        c = self.config
        h = self.attention_norm(x)
        q = rotary(self.q(h).reshape(*positions.shape, c.heads, c.head_dim), positions, c.rope_theta)
        k = rotary(self.k(h).reshape(*positions.shape, c.kv_heads, c.head_dim), positions, c.rope_theta)
        v = self.v(h).reshape(*positions.shape, c.kv_heads, c.head_dim)
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        if cache is not None and slot is not None:
            k = lax.dynamic_update_slice_in_dim(cache.k, k, slot, axis=2)
            v = lax.dynamic_update_slice_in_dim(cache.v, v, slot, axis=2)
        x = x + self.o(attend(q, k, v, mask).reshape(len(x), -1))
        h = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h)), Cache(k, v)


class Ends(nnx.Module):
    """The embedding, the last norm and, unless tied, the output projection."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.compute_dtype)
        scale = nnx.initializers.normal(c.initializer_range)
        self.embed = nnx.Embed(c.vocab_size, c.width, embedding_init=scale, dtype=dtype, rngs=rngs)
        self.norm = nnx.RMSNorm(c.width, epsilon=c.norm_eps, dtype=dtype, rngs=rngs)
        if not c.tied:
            self.head = nnx.Linear(c.width, c.vocab_size, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: Array, out: bool) -> Array:
        """Tokens [...] -> [..., D] when ``out`` is false; states [..., D] -> logits [..., V] when true."""
        if not out:
            return self.embed(x)
        logits = self.head(x) if hasattr(self, "head") else self.embed.attend(x)
        return logits.astype(jnp.float32)


def causal_mask(segments: Array) -> Array:
    """[B, T] segments -> [B, T, T]: query t sees key s <= t of its own, non-zero segment."""
    length = segments.shape[1]
    same = (segments[:, :, None] == segments[:, None, :]) & (segments[:, None, :] > 0)
    return same & jnp.tril(jnp.ones((1, length, length), bool))


def segment_positions(segments: Array) -> Array:
    """Index of each real token within its segment, [B, T] int32; padding anywhere does not count."""
    real = segments > 0
    count = jnp.cumsum(real, axis=1)
    first = real & (segments != jnp.pad(lax.cummax(jnp.asarray(segments), axis=1), ((0, 0), (1, 0)))[:, :-1])
    return count - lax.cummax(jnp.where(first, count, 0), axis=1)


def transformer(config: TransformerConfig) -> Model:
    """Builds the model's functions. Raises UserError on sizes that cannot be."""
    c = config
    if c.heads % c.kv_heads:
        raise UserError(f"heads={c.heads} is not a multiple of kv_heads={c.kv_heads}; make it one")
    if c.head_dim % 2:
        raise UserError(f"head_dim={c.head_dim} is odd; rotary positions need an even one")
    block = functional(lambda rngs: Block(c, rngs=rngs))
    ends = functional(lambda rngs: Ends(c, rngs=rngs))
    norm = functional(
        lambda rngs: nnx.RMSNorm(c.width, epsilon=c.norm_eps, dtype=jnp.dtype(c.compute_dtype), rngs=rngs)
    )

    def init(key: Key) -> Params:
        first, rest = jax.random.split(key)
        return {**ends.init(first), "blocks": jax.vmap(block.init)(jax.random.split(rest, c.layers))}

    def outer(params: Params) -> Params:
        return {name: value for name, value in params.items() if name != "blocks"}

    def causal(params: Params, tokens: Array, segments: Array) -> Array:
        positions, mask = segment_positions(segments), causal_mask(segments)

        def layer(x: Array, weights: Params) -> tuple[Array, None]:
            return block.apply(weights, x, positions, mask)[0], None

        if c.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[c.remat])
        x, _ = lax.scan(layer, ends.apply(outer(params), tokens.reshape(-1), False), params["blocks"])
        return norm.apply(params["norm"], x).reshape(*tokens.shape, -1)

    def unembed(params: Params, states: Array) -> Array:
        return ends.apply(outer(params), states, True)

    def predict(params: Params, prompt: Prompt, completion: Completion) -> Array:
        tokens = jnp.concatenate([prompt.tokens, completion.tokens], axis=1)
        mask = jnp.concatenate([prompt.mask, completion.mask], axis=1)
        states = causal(params, tokens, mask.astype(jnp.int32))
        length = prompt.tokens.shape[1]
        first = take_last(states[:, :length], prompt.mask)
        return jnp.concatenate([first[:, None], states[:, length:-1]], axis=1)

    def final(params: Params, prompt: Prompt) -> Array:
        return take_last(causal(params, prompt.tokens, prompt.mask.astype(jnp.int32)), prompt.mask)

    def start(params: Params, prompt: Prompt, max_new_tokens: int) -> Start:
        layers = [jax.tree.map(lambda w, i=i: w[i], params["blocks"]) for i in range(c.layers)]
        segments = prompt.mask.astype(jnp.int32)
        positions, mask = segment_positions(segments), causal_mask(segments)
        x = ends.apply(outer(params), prompt.tokens.reshape(-1), False)
        room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0))
        caches = []
        for weights in layers:
            x, cache = block.apply(weights, x, positions, mask)
            caches.append(Cache(jnp.pad(cache.k, room), jnp.pad(cache.v, room)))
        carry = Carry(
            caches=tuple(caches),
            valid=jnp.pad(prompt.mask, room[1:3]),
            position=segments.sum(1),
            slot=jnp.int32(prompt.tokens.shape[1]),
        )

        def step(carry: Carry, token: Array) -> tuple[Carry, Array]:
            valid = lax.dynamic_update_slice_in_dim(carry.valid, jnp.ones_like(carry.valid[:, :1]), carry.slot, axis=1)
            x, caches = ends.apply(outer(params), token, False), []
            for weights, cache in zip(layers, carry.caches, strict=True):
                x, cache = block.apply(weights, x, carry.position[:, None], valid[:, None], cache, carry.slot)
                caches.append(cache)
            logits = unembed(params, norm.apply(params["norm"], x))
            return Carry(tuple(caches), valid, carry.position + 1, carry.slot + 1), logits

        first = norm.apply(params["norm"], take_last(x.reshape(*prompt.tokens.shape, -1), prompt.mask))
        return Start(step, carry, unembed(params, first))

    return Model(c, init, causal, predict, final, unembed, start, RULES)


def take_last(states: Array, mask: Array) -> Array:
    """[B, T, D] -> [B, D]: the state of each row's last real token, wherever the padding lies."""
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]


RULES: Rules = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"blocks/(q|k|v|gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"blocks/(o|down)/kernel$", P(None, "tensor", "fsdp")),
    (r"blocks/\w+_norm/scale$", P()),
    (r"^norm/scale$", P()),
    (r"head/kernel$", P("fsdp", "tensor")),
)
"""Megatron's split of heads and hidden units over ``tensor``, everything else over ``fsdp``."""
