"""A decoder-only transformer by configuration: Llama, Mistral, Qwen, Gemma, GPT-2, GPT-NeoX.

Layers are stacked along a leading axis [L, ...] and scanned in training; decoding unstacks them once and keeps one
cache per layer, or scans them too, over one stack of caches: slower a token, and compiled as fast however deep.
Shape letters as in ``layers``.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from alignjax.distributed.sharding import by_rows
from alignjax.errors import POSITIVE, UserError, check_range
from alignjax.models.functional import functional
from alignjax.models.kv_cache import Cache, Stack, scanned, unrolled
from alignjax.models.layers import (
    ACTIVATIONS,
    COMPUTE_DTYPES,
    REMAT_POLICIES,
    Linear,
    Norm,
    attend,
    capped,
    causal_mask,
    near,
    one_of,
    segment_positions,
    take_last,
)
from alignjax.models.model import Model, Start
from alignjax.models.rope import RopeScaling, rotary, stretched
from alignjax.types import Array, Completion, Key, Params, Prompt, Rules

P = jax.sharding.PartitionSpec
PROJECTIONS = ("q", "k", "v", "o", "gate", "up", "down")
UNBOUNDED = 2**30  # the window, in tokens, of a layer that sees everything


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
    compute_dtype: str = "float32"  # "bfloat16" casts parameters inside the step
    remat: str = "none"  # a key of REMAT_POLICIES
    decode: str = "unrolled"  # or "scanned": the compile time does not grow with the layers
    # What sets the families apart.
    family: str = "llama"  # whose names and file format an exported checkpoint has
    norm: str = "rms"  # or "layer": centred, with a bias
    norm_offset: float = 0.0  # added to every norm's scale (Gemma: 1)
    biases: tuple[str, ...] = ()  # the projections that have one: some of q, k, v, o, gate, up, down
    activation: str = "silu"  # a key of ACTIVATIONS
    gated: bool = True  # activation(gate) * up; else activation(up)
    parallel: bool = False  # attention and MLP both read the layer's input (GPT-NeoX)
    post_norms: bool = False  # norms after attention and MLP too (Gemma)
    head_norms: bool = False  # norms over each query and key head (Qwen 3, Gemma 3)
    positions: str = "rotary"  # or "learned": a table of ``context`` positions (GPT-2)
    context: int = 2048  # tokens of context that a checkpoint was made for; rotary positions go beyond
    rotary_dim: int | None = None  # of head_dim, the first so many are rotated; None: all
    rope_scaling: RopeScaling = RopeScaling()
    windows: tuple[int, ...] = ()  # tokens each layer sees, itself included; UNBOUNDED: all. Empty: all layers all
    windowed_theta: float | None = None  # the rope_theta of layers with a window, unscaled (Gemma 3)
    query_scale: float | None = None  # of attention scores; None: head_dim ** -0.5
    attention_cap: float | None = None  # scores become cap * tanh(score / cap) (Gemma 2)
    logit_cap: float | None = None  # and logits
    embed_scale: float = 1.0  # of embedded tokens (Gemma: sqrt(width))

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "vocab_size", "width", "layers", "heads", "kv_heads", "head_dim", "hidden")
        check_range(self, POSITIVE, math.inf, "rope_theta", "norm_eps", "embed_scale")
        check_range(self, 1, math.inf, "context")
        for name in ("rotary_dim", "windowed_theta", "query_scale", "attention_cap", "logit_cap"):
            if getattr(self, name) is not None:
                check_range(self, POSITIVE, math.inf, name)
        if self.windows:
            check_range(self, 1, UNBOUNDED, "windows")
        if unknown := set(self.biases) - set(PROJECTIONS):
            raise UserError(f"biases names {min(unknown, key=str)!r}, which is no projection; choose from "
                            f"{', '.join(PROJECTIONS)}")  # fmt: skip
        one_of(self, "remat", tuple(REMAT_POLICIES))
        one_of(self, "compute_dtype", COMPUTE_DTYPES)
        one_of(self, "activation", tuple(ACTIVATIONS))
        one_of(self, "decode", ("unrolled", "scanned"))
        one_of(self, "norm", ("rms", "layer"))
        one_of(self, "positions", ("rotary", "learned"))

    @property
    def rotated(self) -> int:
        """How many of a head's dimensions are rotated."""
        return 0 if self.positions == "learned" else self.rotary_dim or self.head_dim


def frequencies(config: TransformerConfig) -> np.ndarray:
    """Rotary frequencies of every layer, [L, rotated / 2] radians a token, float32."""
    half = config.rotated // 2
    exponent = -np.arange(half, dtype=np.float64) / max(half, 1)
    everywhere = stretched(config.rope_theta**exponent, config.rope_scaling)
    if config.windowed_theta is None:
        return np.tile(everywhere, (config.layers, 1)).astype(np.float32)
    near = config.windowed_theta**exponent
    return np.stack([near if w < UNBOUNDED else everywhere for w in config.windows]).astype(np.float32)


class Carry(NamedTuple):
    """What decoding carries from token to token."""

    caches: tuple[Cache, ...] | tuple[Array, Array]  # one a layer; or all layers' keys and values
    valid: Array  # [B, S] bool, slots that hold a real token
    position: Array  # [B] int32, the next token's position
    slot: Array  # [] int32, the next token's cache slot


def norm_of(c: TransformerConfig, width: int | None = None) -> Norm:
    """The configuration's norm, over ``width`` dimensions (or the model's)."""
    return Norm(
        width or c.width, eps=c.norm_eps, dtype=c.compute_dtype, offset=c.norm_offset, centred=c.norm == "layer"
    )


class Block(nnx.Module):
    """One layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c = self.config = config

        def linear(name: str, inputs: int, outputs: int) -> Linear:
            return Linear(inputs, outputs, bias=name in c.biases, dtype=c.compute_dtype, rngs=rngs)

        self.attention_norm, self.mlp_norm = norm_of(c), norm_of(c)
        if c.post_norms:
            self.attention_post_norm, self.mlp_post_norm = norm_of(c), norm_of(c)
        if c.head_norms:
            self.q_norm, self.k_norm = norm_of(c, c.head_dim), norm_of(c, c.head_dim)
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
        frequency: Array,
        cache: Cache | Stack | None = None,
        slot: Array | None = None,
    ) -> tuple[Array, Cache | Stack]:
        """x [B * T, D], flat so that every projection is one matrix product; positions [B, T].

        With a cache, writes the T new keys and values at ``slot`` and attends to all of it.
        """
        c = self.config
        mixed, cache = self.attention(self.attention_norm(x), positions, mask, frequency, cache, slot)
        if c.post_norms:
            mixed = self.attention_post_norm(mixed)
        if c.parallel:
            return x + mixed + self.mlp(self.mlp_norm(x)), cache
        x = x + mixed
        out = self.mlp(self.mlp_norm(x))
        return x + (self.mlp_post_norm(out) if c.post_norms else out), cache

    def attention(self, h, positions, mask, frequency, cache, slot) -> tuple[Array, Cache | Stack]:
        c = self.config
        q = self.q(h).reshape(*positions.shape, c.heads, c.head_dim)
        k = self.k(h).reshape(*positions.shape, c.kv_heads, c.head_dim)
        v = self.v(h).reshape(*positions.shape, c.kv_heads, c.head_dim).swapaxes(1, 2)
        if c.head_norms:
            q, k = self.q_norm(q), self.k_norm(k)
        if c.rotated:
            q, k = rotary(q, positions, frequency), rotary(k, positions, frequency)
        k = k.swapaxes(1, 2)
        cache = Cache(k, v) if cache is None else cache.written(k, v, slot)
        k, v = cache.read()
        mixed = attend(q, k, v, mask, c.query_scale or c.head_dim**-0.5, c.attention_cap)
        return self.o(mixed.reshape(len(h), -1)), cache

    def mlp(self, h: Array) -> Array:
        c = self.config
        act = ACTIVATIONS[c.activation]
        return self.down(act(self.gate(h)) * self.up(h) if c.gated else act(self.up(h)))


class Ends(nnx.Module):
    """The embedding, the last norm and, unless tied, the output projection."""

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs):
        c, dtype = config, jnp.dtype(config.compute_dtype)
        self.config = config
        scale = nnx.initializers.normal(c.initializer_range)
        self.embed = nnx.Embed(c.vocab_size, c.width, embedding_init=scale, dtype=dtype, rngs=rngs)
        self.norm = norm_of(c)
        if c.positions == "learned":
            self.positions = nnx.Embed(c.context, c.width, embedding_init=scale, dtype=dtype, rngs=rngs)
        if not c.tied:
            self.head = Linear(c.width, c.vocab_size, bias=False, dtype=c.compute_dtype, rngs=rngs)

    def __call__(self, x: Array, positions: Array | None) -> Array:
        """Tokens [...] at positions [...] -> [..., D]; without positions, states [..., D] -> logits [..., V]."""
        c = self.config
        if positions is not None:
            x = self.embed(x)
            if c.embed_scale != 1.0:
                x = x * jnp.asarray(c.embed_scale, x.dtype)
            return x + self.positions(positions) if c.positions == "learned" else x
        kernel = self.embed.embedding[...].T if c.tied else self.head.kernel[...]
        x = x.astype(c.compute_dtype)
        # Accumulated and kept in float32: a logit rounded to bfloat16 is a log-prob wrong in its second digit.
        return capped(jnp.dot(x, kernel.astype(x.dtype), preferred_element_type=jnp.float32), c.logit_cap)


def check_sizes(config: TransformerConfig) -> None:
    """Raises UserError on sizes that do not go together."""
    c = config
    if c.heads % c.kv_heads:
        raise UserError(f"heads={c.heads} is not a multiple of kv_heads={c.kv_heads}; make it one")
    if c.rotated % 2 or c.rotated > c.head_dim:
        raise UserError(f"rotary positions need an even part of head_dim={c.head_dim}, not {c.rotated}")
    if c.windows and len(c.windows) != c.layers:
        raise UserError(f"windows has {len(c.windows)} entries for {c.layers} layers; give one each")
    if c.windowed_theta is not None and not c.windows:
        raise UserError("windowed_theta is set and no layer has a window; set windows")


def transformer(config: TransformerConfig) -> Model:
    """Builds the model's functions. Raises UserError on sizes that cannot be."""
    c = config
    check_sizes(c)
    block = functional(lambda rngs: Block(c, rngs=rngs))
    ends = functional(lambda rngs: Ends(c, rngs=rngs))
    norm = functional(lambda rngs: norm_of(c))
    frequency, windows = frequencies(c), np.asarray(c.windows or [UNBOUNDED] * c.layers, np.int32)

    def init(key: Key) -> Params:
        first, rest = jax.random.split(key)
        return {**ends.init(first), "blocks": jax.vmap(block.init)(jax.random.split(rest, c.layers))}

    def outer(params: Params) -> Params:
        return {name: value for name, value in params.items() if name != "blocks"}

    def embed(params: Params, tokens: Array, positions: Array) -> Array:
        return by_rows(ends.apply(outer(params), tokens.reshape(-1), positions.reshape(-1)))

    def check_length(length: int) -> None:
        if c.positions == "learned" and c.context < length:
            raise UserError(f"the model has {c.context} positions and a row has room for {length} tokens; "
                            "lower the buckets or max_new_tokens")  # fmt: skip

    def seen(mask: Array, queries: Array, keys: Array, window: Array) -> Array:
        return near(mask, queries, keys, window) if c.windows else mask

    def causal(params: Params, tokens: Array, segments: Array) -> Array:
        check_length(tokens.shape[1])
        positions, mask = segment_positions(segments), causal_mask(segments)

        def layer(x: Array, one: tuple[Params, Array, Array]) -> tuple[Array, None]:
            weights, turns, window = one
            x, _ = block.apply(weights, x, positions, seen(mask, positions, positions, window), turns)
            return by_rows(x), None

        if c.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[c.remat])
        x, _ = lax.scan(layer, embed(params, tokens, positions), (params["blocks"], frequency, windows))
        return norm.apply(params["norm"], x).reshape(*tokens.shape, -1)

    def unembed(params: Params, states: Array) -> Array:
        return ends.apply(outer(params), states, None)

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
        check_length(prompt.tokens.shape[1] + max_new_tokens)
        through = scanned if c.decode == "scanned" else unrolled
        segments = prompt.mask.astype(jnp.int32)
        positions, mask = segment_positions(segments), causal_mask(segments)
        room = ((0, 0), (0, 0), (0, max_new_tokens), (0, 0))

        def read(weights: Params, x: Array, turns: Array, window: Array) -> tuple[Array, Cache]:
            x, cache = block.apply(weights, x, positions, seen(mask, positions, positions, window), turns)
            return by_rows(x), Cache(*(jnp.pad(part, room) for part in cache.read()))

        read_all, write_all = through(params["blocks"], frequency, windows)
        x, caches = read_all(read, embed(params, prompt.tokens, positions))
        carry = Carry(
            caches=caches,
            valid=jnp.pad(prompt.mask, room[1:3]),
            position=segments.sum(1),
            slot=jnp.int32(prompt.tokens.shape[1]),
        )

        def step(carry: Carry, token: Array) -> tuple[Carry, Array]:
            valid = lax.dynamic_update_slice_in_dim(carry.valid, jnp.ones_like(carry.valid[:, :1]), carry.slot, axis=1)
            here, slots = carry.position[:, None], jnp.cumsum(valid, axis=1) - 1

            def write(weights: Params, x: Array, turns: Array, window: Array, cache: Any) -> tuple[Array, Any]:
                return block.apply(
                    weights, x, here, seen(valid[:, None], here, slots, window), turns, cache, carry.slot
                )

            x, caches = write_all(write, embed(params, token, carry.position), carry.caches)
            logits = unembed(params, norm.apply(params["norm"], x))
            return Carry(caches, valid, carry.position + 1, carry.slot + 1), logits

        first = norm.apply(params["norm"], take_last(x.reshape(*prompt.tokens.shape, -1), prompt.mask))
        return Start(step, carry, unembed(params, first))

    return Model(c, init, causal, predict, final, unembed, start, rules(c))


def rules(c: TransformerConfig) -> Rules:
    """Megatron's split of heads and hidden units over ``tensor``, everything else over ``fsdp``."""
    divides = c.vocab_size % 8 == 0  # an odd vocabulary is not split: the width is, over both axes
    inner, outer = sorted(set(c.biases) - {"o", "down"}), sorted(set(c.biases) & {"o", "down"})
    return (
        (r"embed/embedding$", P("tensor", "fsdp") if divides else P(None, ("fsdp", "tensor"))),
        (r"blocks/(q|k|v|gate|up)/kernel$", P(None, "fsdp", "tensor")),
        (r"blocks/(o|down)/kernel$", P(None, "tensor", "fsdp")),
        (r"norm/(scale|bias)$", P()),
        *([(rf"blocks/({'|'.join(inner)})/bias$", P(None, "tensor"))] if inner else []),
        *([(rf"blocks/({'|'.join(outer)})/bias$", P())] if outer else []),
        *([(r"positions/embedding$", P(None, "fsdp"))] if c.positions == "learned" else []),
        *([] if c.tied else [(r"head/kernel$", P("fsdp", "tensor") if divides else P(("fsdp", "tensor"), None))]),
    )
