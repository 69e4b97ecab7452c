"""An encoder-decoder by configuration: T5 1.0 (1910.10683), T5 v1.1, Flan-T5, mT5.

The encoder reads the prompt and its end token once; the decoder writes after one start token. Encoder and decoder
layers are stacked and scanned as the decoder-only ones are. Shape letters as in ``layers``; M: encoder positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from alignjax.distributed.sharding import by_rows
from alignjax.errors import POSITIVE, check_range
from alignjax.models.functional import Functional, functional
from alignjax.models.kv_cache import Cache
from alignjax.models.layers import ACTIVATIONS, COMPUTE_DTYPES, REMAT_POLICIES, Linear, Norm, attend, one_of
from alignjax.models.model import Model, Start
from alignjax.types import Array, Completion, Key, Params, Prompt, Rules, Tokens

P = jax.sharding.PartitionSpec


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes and options; defaults are T5 1.0's."""

    vocab_size: int
    width: int
    layers: int  # of the encoder
    decoder_layers: int
    heads: int
    head_dim: int
    hidden: int
    norm_eps: float = 1e-6
    activation: str = "relu"  # a key of ACTIVATIONS; v1.1: "gelu_tanh"
    gated: bool = False  # activation(gate) * up; v1.1: True
    tied: bool = True  # the embedding is the output projection
    scaled_output: bool = True  # states times width ** -0.5 before the output projection; v1.1: False
    buckets: int = 32  # of relative positions
    distance: int = 128  # tokens, from where on all distances share a bucket
    start_token: int = 0
    end_token: int = 1
    compute_dtype: str = "float32"  # "bfloat16" casts parameters inside the step
    remat: str = "none"  # a key of REMAT_POLICIES
    family: str = "t5"  # or "mt5": whose file format an exported checkpoint has

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "vocab_size", "width", "layers", "decoder_layers", "heads", "head_dim", "hidden")
        check_range(self, POSITIVE, math.inf, "norm_eps")
        check_range(self, 4, math.inf, "buckets")
        check_range(self, self.buckets // 2, math.inf, "distance")
        check_range(self, 0, self.vocab_size - 1, "start_token", "end_token")
        one_of(self, "remat", tuple(REMAT_POLICIES))
        one_of(self, "compute_dtype", COMPUTE_DTYPES)
        one_of(self, "activation", tuple(ACTIVATIONS))
        one_of(self, "family", ("t5", "mt5"))


class Carry(NamedTuple):
    """What decoding carries from token to token; the encoder's keys and values never change."""

    caches: tuple[Cache, ...]
    slot: Array  # [] int32, the next token's cache slot


def relative_buckets(distance: Array, config: T5Config, both_ways: bool) -> Array:
    """The bucket of each distance (key position - query position, tokens), int32.

    Half of the buckets are one distance each, the other half widen as its logarithm up to ``config.distance``;
    with ``both_ways`` the halves of all buckets look back and ahead, else what is ahead counts as 0 (1910.10683, 2.1).
    """
    count = config.buckets // 2 if both_ways else config.buckets
    ahead = jnp.where(distance > 0, count, 0) if both_ways else 0
    far = jnp.abs(distance) if both_ways else jnp.maximum(-distance, 0)
    exact = count // 2
    growth = jnp.log(jnp.maximum(far, 1).astype(jnp.float32) / exact) / math.log(config.distance / exact)
    wide = jnp.minimum(exact + (growth * (count - exact)).astype(jnp.int32), count - 1)
    return ahead + jnp.where(far < exact, far, wide)


def compact(prompt: Prompt, end: int) -> Tokens:
    """The prompt [B, T] with its real tokens moved to the front and the end token behind them, [B, T + 1]."""
    order = jnp.argsort(~jnp.asarray(prompt.mask), axis=1, stable=True)
    tokens = jnp.pad(jnp.take_along_axis(prompt.tokens, order, axis=1), ((0, 0), (0, 1)))
    length, slots = jnp.sum(prompt.mask, axis=1, keepdims=True), jnp.arange(tokens.shape[1])[None]
    return Tokens(jnp.where(slots == length, end, tokens), slots <= length)


class Block(nnx.Module):
    """One layer: x + attention(norm(x)); in the decoder, x + attention to the encoder's states; x + mlp(norm(x))."""

    def __init__(self, config: T5Config, decodes: bool, *, rngs: nnx.Rngs):
        c, inner = config, config.heads * config.head_dim
        self.config, self.decodes = config, decodes

        def linear(inputs: int, outputs: int, shrink: float = 1.0) -> Linear:
            init = nnx.initializers.normal(shrink * inputs**-0.5)
            return Linear(inputs, outputs, bias=False, dtype=c.compute_dtype, rngs=rngs, init=init)

        query = c.head_dim**-0.5  # what attention does not divide by
        self.attention_norm, self.mlp_norm = norm_of(c), norm_of(c)
        self.q, self.k = linear(c.width, inner, query), linear(c.width, inner)
        self.v, self.o = linear(c.width, inner), linear(inner, c.width)
        if decodes:
            self.cross_norm = norm_of(c)
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
        memory: Cache | None = None,
        memory_mask: Array | None = None,
        cache: Cache | None = None,
        slot: Array | None = None,
    ) -> tuple[Array, Cache]:
        """x [B, T, D], mask [B, T, S], bias [H, T, S]; memory: ``remember`` of the encoder's states, its mask
        [B, M]. With a cache, writes the T new keys and values at ``slot`` and attends to all of it."""
        h = self.attention_norm(x)
        here = Cache(self.split(self.k(h)), self.split(self.v(h)))
        if cache is not None and slot is not None:
            here = cache.written(*here.read(), slot)
        x = x + self.o(self.mixed(self.q(h), here, mask, bias))
        if memory is not None and memory_mask is not None:
            seen = jnp.broadcast_to(memory_mask[:, None], (*x.shape[:2], memory_mask.shape[1]))
            x = x + self.cross_o(self.mixed(self.cross_q(self.cross_norm(x)), memory, seen, None))
        return x + self.mlp(self.mlp_norm(x)), here

    def remember(self, states: Array) -> Cache:
        """The encoder's states [B, M, D] as this layer's keys and values."""
        return Cache(self.split(self.cross_k(states)), self.split(self.cross_v(states)))

    def split(self, x: Array) -> Array:
        """[B, T, H h] -> [B, H, T, h]."""
        return x.reshape(*x.shape[:2], self.config.heads, -1).swapaxes(1, 2)

    def mixed(self, q: Array, kv: Cache, mask: Array, bias: Array | None) -> Array:
        heads = q.reshape(*q.shape[:2], self.config.heads, -1)
        return attend(heads, kv.k, kv.v, mask, 1.0, bias=bias).reshape(q.shape)

    def mlp(self, h: Array) -> Array:
        act = ACTIVATIONS[self.config.activation]
        return self.down(act(self.gate(h)) * self.up(h) if self.config.gated else act(self.up(h)))


class Ends(nnx.Module):
    """The shared embedding and, unless tied, the output projection."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs):
        c = self.config = config
        # T5 1.0 starts the tied embedding at 1 and scales states down; an unscaled output must start small itself.
        embed, head = (nnx.initializers.normal(1.0 if c.scaled_output or not c.tied else c.width**-0.5),
                       nnx.initializers.normal(1.0 if c.scaled_output else c.width**-0.5))  # fmt: skip
        self.embed = nnx.Embed(c.vocab_size, c.width, embedding_init=embed, dtype=jnp.dtype(c.compute_dtype), rngs=rngs)
        if not c.tied:
            self.head = Linear(c.width, c.vocab_size, bias=False, dtype=c.compute_dtype, rngs=rngs, init=head)

    def __call__(self, tokens: Array) -> Array:
        return self.embed(tokens)

    def logits(self, states: Array) -> Array:
        """States [..., D] -> logits [..., V], accumulated in float32."""
        c = self.config
        kernel = self.embed.embedding[...].T if c.tied else self.head.kernel[...]
        x = (states * c.width**-0.5 if c.scaled_output else states).astype(c.compute_dtype)
        return jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32)


def block_of(c: T5Config, decodes: bool) -> Functional:
    return functional(lambda rngs: Block(c, decodes, rngs=rngs))


def norm_of(c: T5Config) -> Norm:
    return Norm(c.width, eps=c.norm_eps, dtype=c.compute_dtype)


def bias(table: Params, queries: Array, keys: int, c: T5Config, both_ways: bool) -> Array:
    """What queries at positions [T] add to the scores of keys at 0 to S - 1: [H, T, S]."""
    buckets = relative_buckets(jnp.arange(keys)[None] - queries[:, None], c, both_ways)
    return table["embedding"][buckets].transpose(2, 0, 1)


def outer(params: Params) -> Params:
    return {name: params[name] for name in ("embed", "head") if name in params}


def scanned(layer: Callable[[Array, Params], Array], x: Array, stacked: Params, c: T5Config) -> Array:
    """x through the stacked layers."""
    if c.remat != "none":
        layer = jax.checkpoint(layer, policy=REMAT_POLICIES[c.remat])
    return lax.scan(lambda x, weights: (by_rows(layer(x, weights)), None), by_rows(x), stacked)[0]


def encoder(config: T5Config) -> Callable[[Params, Prompt], tuple[Array, Array]]:
    """(params, prompt [B, T]) -> the encoder's states [B, T + 1, D] of the prompt, moved to the front, and its end
    token; and their mask."""
    c = config
    block = block_of(c, False)
    ends, norm = functional(lambda rngs: Ends(c, rngs=rngs)), functional(lambda rngs: norm_of(c))

    def encode(params: Params, prompt: Prompt) -> tuple[Array, Array]:
        read = compact(prompt, c.end_token)
        length = read.tokens.shape[1]
        mask = jnp.broadcast_to(read.mask[:, None], (len(read.tokens), length, length))
        near = bias(params["encoder_bias"], jnp.arange(length), length, c, True)

        def layer(x: Array, weights: Params) -> Array:
            return block.apply(weights, x, mask, near)[0]

        x = scanned(layer, ends.apply(outer(params), read.tokens), params["encoder"], c)
        return norm.apply(params["encoder_norm"], x), read.mask

    return encode


def first_params(config: T5Config) -> Callable[[Key], Params]:
    """key -> parameters at T5's scales, layers stacked."""
    c = config
    norm = functional(lambda rngs: norm_of(c))
    blocks = {"encoder": (False, c.layers), "decoder": (True, c.decoder_layers)}

    def init(key: Key) -> Params:
        keys = dict(
            zip(("ends", "encoder", "decoder", "encoder_bias", "decoder_bias"), jax.random.split(key, 5), strict=True)
        )
        params = functional(lambda rngs: Ends(c, rngs=rngs)).init(keys["ends"])
        for name, (decodes, layers) in blocks.items():
            block = block_of(c, decodes)
            table = c.width**-0.5 * jax.random.normal(keys[f"{name}_bias"], (c.buckets, c.heads))
            params |= {
                name: jax.vmap(block.init)(jax.random.split(keys[name], layers)),
                f"{name}_norm": norm.init(key),
                f"{name}_bias": {"embedding": table},
            }
        return params

    return init


def t5(config: T5Config) -> Model:
    """Builds the model's functions."""
    c = config
    encode = encoder(c)
    block = block_of(c, True)
    ends, norm = functional(lambda rngs: Ends(c, rngs=rngs)), functional(lambda rngs: norm_of(c))

    def decode(params: Params, prompt: Prompt, written: Array) -> Array:
        """The decoder's states [B, 1 + N, D] after the start token and each of the tokens ``written`` [B, N]."""
        memory, memory_mask = encode(params, prompt)
        tokens = jnp.pad(written, ((0, 0), (1, 0)), constant_values=c.start_token)
        length = tokens.shape[1]
        mask = jnp.broadcast_to(np.tril(np.ones((length, length), bool))[None], (len(tokens), length, length))
        near = bias(params["decoder_bias"], jnp.arange(length), length, c, False)

        def layer(x: Array, weights: Params) -> Array:
            remembered = block.apply(weights, memory, method="remember")
            return block.apply(weights, x, mask, near, remembered, memory_mask)[0]

        x = scanned(layer, ends.apply(outer(params), tokens), params["decoder"], c)
        return norm.apply(params["decoder_norm"], x)

    def unembed(params: Params, states: Array) -> Array:
        return ends.apply(outer(params), states, method="logits")

    def predict(params: Params, prompt: Prompt, completion: Completion) -> Array:
        return decode(params, prompt, completion.tokens[:, :-1])

    def final(params: Params, prompt: Prompt) -> Array:
        return decode(params, prompt, jnp.zeros((len(prompt.tokens), 0), jnp.int32))[:, 0]

    def start(params: Params, prompt: Prompt, max_new_tokens: int) -> Start:
        memory, memory_mask = encode(params, prompt)
        layers = [jax.tree.map(lambda w, i=i: w[i], params["decoder"]) for i in range(c.decoder_layers)]
        remembered = [block.apply(weights, memory, method="remember") for weights in layers]
        room, rows = max_new_tokens + 1, len(prompt.tokens)
        empty = jnp.zeros((rows, c.heads, room, c.head_dim), c.compute_dtype)

        def step(carry: Carry, token: Array) -> tuple[Carry, Array]:
            mask = jnp.broadcast_to((jnp.arange(room) <= carry.slot)[None, None], (rows, 1, room))
            near = bias(params["decoder_bias"], carry.slot[None], room, c, False)
            x, caches = ends.apply(outer(params), token)[:, None], []
            for weights, kv, cache in zip(layers, remembered, carry.caches, strict=True):
                x, cache = block.apply(weights, x, mask, near, kv, memory_mask, cache, carry.slot)
                caches.append(cache)
            states = norm.apply(params["decoder_norm"], x)[:, 0]
            return Carry(tuple(caches), carry.slot + 1), unembed(params, states)

        first = Carry(tuple(Cache(empty, empty) for _ in layers), jnp.int32(0))
        carry, logits = step(first, jnp.full((rows,), c.start_token, jnp.int32))
        return Start(step, carry, logits)

    return Model(
        c,
        first_params(c),
        None,
        predict,
        final,
        unembed,
        start,
        RULES if c.tied else (*RULES, (r"head/kernel$", P("fsdp", "tensor"))),
    )


RULES: Rules = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"(encoder|decoder)_bias/embedding$", P()),
    (r"(encoder|decoder)/(cross_)?(q|k|v|gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"(encoder|decoder)/(cross_)?(o|down)/kernel$", P(None, "tensor", "fsdp")),
    (r"norm/scale$", P()),
)
"""As the decoder-only model's."""
