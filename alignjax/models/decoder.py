"""A decoder-only transformer: Llama, Mistral, Qwen, Gemma, GPT-2 and GPT-NeoX, told apart by options.

Read ``decoder`` first, which makes a Model of the functions below it: ``_embed``, ``_forward``, ``_logits``,
``_prefill``, ``_decode_step``. The layers themselves are in ``decoder_modules``.

The parameters of all layers are stacked along a leading axis [L, ...], over which ``_forward`` scans.
Shape letters as in ``layers``.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from alignjax.distributed.sharding import constrain_rows
from alignjax.errors import UserError
from alignjax.models.config import UNBOUNDED as UNBOUNDED  # "as": exported from here too
from alignjax.models.config import TransformerConfig as TransformerConfig
from alignjax.models.decoder_modules import DecoderBlock, EmbeddingAndHead
from alignjax.models.functional import Functional, functional
from alignjax.models.kv_cache import SCANNED, UNROLLED, Layer, LayerCache, LayerLoop, StackedCache
from alignjax.models.layers import REMAT_POLICIES, causal_mask, last_token_state, segment_positions, window_mask
from alignjax.models.model import Model
from alignjax.models.rope import scale_frequencies
from alignjax.types import Array, Completion, Key, Params, Process, Prompt, Rules

_OUTER_PARAMS = ("embed", "norm", "positions", "head")  # the parameters of EmbeddingAndHead


class _Network(NamedTuple):
    """The static description of a decoder, which all of its functions take first."""

    config: TransformerConfig
    outer: Functional  # EmbeddingAndHead
    block: Functional  # DecoderBlock
    frequencies: np.ndarray  # [L, F] rotary frequencies, radians a token
    windows: np.ndarray  # [L] int32, tokens


def decoder(config: TransformerConfig) -> Model:
    """Returns the model of a configuration. Raises UserError when its sizes contradict each other."""
    _check_sizes(config)
    network = _Network(
        config,
        outer=functional(lambda rngs: EmbeddingAndHead(config, rngs=rngs)),
        block=functional(lambda rngs: DecoderBlock(config, rngs=rngs)),
        frequencies=_layer_frequencies(config),
        windows=np.asarray(config.windows or [UNBOUNDED] * config.layers, np.int32),
    )
    return Model(
        config,
        init=partial(_init, network),
        forward=partial(_forward, network),
        completion_states=partial(_completion_states, network),
        last_state=partial(_last_state, network),
        logits=partial(_logits, network),
        prefill=partial(_prefill, network),
        rules=_sharding_rules(config),
    )


class _Attention(NamedTuple):
    """Which keys the queries of one pass attend to, before a layer's window."""

    positions: Array  # [B, T] int32, of the queries
    key_positions: Array  # [B, S] int32
    mask: Array  # [B, T, S] bool


class _Carry(NamedTuple):
    """What decoding carries from token to token."""

    caches: Any  # as the LayerLoop keeps them
    valid: Array  # [B, S] bool, slots that hold a real token
    position: Array  # [B] int32, the next token's position
    slot: Array  # [] int32, the next token's cache slot


def _init(network: _Network, key: Key) -> Params:
    """key -> parameters: those of EmbeddingAndHead, and "blocks", stacked [L, ...]."""
    outer_key, blocks_key = jax.random.split(key)
    layer_keys = jax.random.split(blocks_key, network.config.layers)
    return {**network.outer.init(outer_key), "blocks": jax.vmap(network.block.init)(layer_keys)}


def _apply_outer(network: _Network, params: Params, *args: Array, method: Any) -> Array:
    """Calls a method of EmbeddingAndHead with its own part of the parameters."""
    own = {name: params[name] for name in _OUTER_PARAMS if name in params}
    return network.outer.apply(own, *args, method=method)


def _embed(network: _Network, params: Params, tokens: Array, positions: Array) -> Array:
    """tokens [B, T] at positions [B, T] -> x [B T, D], flat."""
    flat = tokens.reshape(-1), positions.reshape(-1)
    return constrain_rows(_apply_outer(network, params, *flat, method=EmbeddingAndHead.embed_tokens))


def _layers(network: _Network, params: Params) -> Layer:
    """All layers, stacked."""
    return Layer(params["blocks"], network.frequencies, network.windows)


def _apply_layer(
    network: _Network,
    attention: _Attention,
    layer: Layer,
    x: Array,
    cache: LayerCache | StackedCache | None = None,
    slot: Array | None = None,
) -> tuple[Array, Any]:
    """x [B T, D] -> (x [B T, D], the layer's cache; a LayerCache of T slots where ``cache`` is None)."""
    positions, key_positions, mask = attention
    if network.config.windows:
        mask = window_mask(mask, positions, key_positions, layer.window)
    return network.block.apply(layer.weights, x, positions, mask, layer.frequencies, cache, slot)


def _normalize(network: _Network, params: Params, x: Array) -> Array:
    """The last layer's output [..., D] -> states [..., D]."""
    return _apply_outer(network, params, x, method=EmbeddingAndHead.normalize)


def _logits(network: _Network, params: Params, states: Array) -> Array:
    """states [..., D] -> logits [..., V], float32."""
    return _apply_outer(network, params, states, method=EmbeddingAndHead.logits)


def _forward(network: _Network, params: Params, tokens: Array, segments: Array) -> Array:
    """tokens [B, T], segments [B, T] -> states [B, T, D]."""
    c = network.config
    _check_length(c, tokens.shape[1])
    positions = segment_positions(segments)
    attention = _Attention(positions, positions, causal_mask(segments))

    def body(x: Array, layer: Layer) -> tuple[Array, None]:
        x, _ = _apply_layer(network, attention, layer, x)
        return constrain_rows(x), None

    if c.remat != "none":
        body = jax.checkpoint(body, policy=REMAT_POLICIES[c.remat])
    x, _ = lax.scan(body, _embed(network, params, tokens, positions), _layers(network, params))
    return _normalize(network, params, x).reshape(*tokens.shape, -1)


def _completion_states(network: _Network, params: Params, prompt: Prompt, completion: Completion) -> Array:
    """prompt, completion [B, T] -> [B, T, D], the state that predicts each completion token."""
    tokens = jnp.concatenate([prompt.tokens, completion.tokens], axis=1)
    mask = jnp.concatenate([prompt.mask, completion.mask], axis=1)
    states = _forward(network, params, tokens, mask.astype(jnp.int32))
    length = prompt.tokens.shape[1]
    first = last_token_state(states[:, :length], prompt.mask)
    return jnp.concatenate([first[:, None], states[:, length:-1]], axis=1)


def _last_state(network: _Network, params: Params, prompt: Prompt) -> Array:
    """prompt [B, T] -> [B, D], the state after each row's last token."""
    states = _forward(network, params, prompt.tokens, prompt.mask.astype(jnp.int32))
    return last_token_state(states, prompt.mask)


def _layer_loop(c: TransformerConfig) -> LayerLoop:
    return SCANNED if c.decode == "scanned" else UNROLLED


def _prefill(network: _Network, params: Params, prompt: Prompt, max_new_tokens: int) -> Process:
    """Reads the prompt [B, T] into caches of T + max_new_tokens slots; returns the process that continues it."""
    length = prompt.tokens.shape[1]
    _check_length(network.config, length + max_new_tokens)
    segments = prompt.mask.astype(jnp.int32)
    positions = segment_positions(segments)
    attention = _Attention(positions, positions, causal_mask(segments))
    loop = _layer_loop(network.config)
    layers = loop.prepare(_layers(network, params))

    def prefill_layer(layer: Layer, x: Array) -> tuple[Array, LayerCache]:
        x, cache = _apply_layer(network, attention, layer, x)
        return constrain_rows(x), cache.extend(max_new_tokens)

    x, caches = loop.prefill(prefill_layer, layers, _embed(network, params, prompt.tokens, positions))
    valid = jnp.pad(prompt.mask, ((0, 0), (0, max_new_tokens)))
    carry = _Carry(caches, valid, position=segments.sum(1), slot=jnp.int32(length))
    last = _normalize(network, params, last_token_state(x.reshape(*prompt.tokens.shape, -1), prompt.mask))
    return Process(partial(_decode_step, network, params, layers), carry, _logits(network, params, last))


def _decode_step(network: _Network, params: Params, layers: Any, carry: _Carry, token: Array) -> tuple[_Carry, Array]:
    """Appends token [B] to every row: returns the new carry and the next logits [B, V].

    ``layers`` is the result of the LayerLoop's ``prepare``.
    """
    valid = lax.dynamic_update_slice_in_dim(carry.valid, jnp.ones_like(carry.valid[:, :1]), carry.slot, axis=1)
    attention = _Attention(carry.position[:, None], jnp.cumsum(valid, axis=1) - 1, valid[:, None])

    def decode_layer(layer: Layer, x: Array, cache: Any) -> tuple[Array, Any]:
        return _apply_layer(network, attention, layer, x, cache, carry.slot)

    loop = _layer_loop(network.config)
    x, caches = loop.decode(decode_layer, layers, _embed(network, params, token, carry.position), carry.caches)
    logits = _logits(network, params, _normalize(network, params, x))
    return _Carry(caches, valid, carry.position + 1, carry.slot + 1), logits


def _layer_frequencies(c: TransformerConfig) -> np.ndarray:
    """Returns the rotary frequencies of every layer, [L, rotated / 2] radians a token, float32."""
    half = c.rotated // 2
    exponent = -np.arange(half, dtype=np.float64) / max(half, 1)
    unbounded = scale_frequencies(c.rope_theta**exponent, c.rope_scaling)
    if c.windowed_theta is None:
        return np.tile(unbounded, (c.layers, 1)).astype(np.float32)
    windowed = c.windowed_theta**exponent
    return np.stack([windowed if w < UNBOUNDED else unbounded for w in c.windows]).astype(np.float32)


def _check_sizes(c: TransformerConfig) -> None:
    """Raises UserError when sizes contradict each other."""
    if c.heads % c.kv_heads:
        raise UserError(f"heads={c.heads} is not a multiple of kv_heads={c.kv_heads}; change one of them")
    if c.rotated % 2 or c.rotated > c.head_dim:
        raise UserError(f"rotary positions rotate {c.rotated} of head_dim={c.head_dim} dimensions; "
                        "choose an even rotary_dim of at most head_dim")  # fmt: skip
    if c.windows and len(c.windows) != c.layers:
        raise UserError(f"windows has {len(c.windows)} entries for {c.layers} layers; give one entry a layer")
    if c.windowed_theta is not None and not c.windows:
        raise UserError("windowed_theta is set and no layer has a window; set windows")


def _check_length(c: TransformerConfig, length: int) -> None:
    """Raises UserError when rows of ``length`` tokens need more positions than the model has."""
    if c.positions == "learned" and c.context < length:
        raise UserError(f"the model has {c.context} positions and a row has room for {length} tokens; "
                        "lower the buckets or max_new_tokens")  # fmt: skip


def _sharding_rules(c: TransformerConfig) -> Rules:
    """Heads and MLP units are split over ``tensor``, as in Megatron (1909.08053), the other axis over ``fsdp``."""
    splits = c.vocab_size % 8 == 0  # a vocabulary that does not divide stays whole, and the width is split instead
    column_biases, row_biases = sorted(set(c.biases) - {"o", "down"}), sorted(set(c.biases) & {"o", "down"})
    return (
        (r"embed/embedding$", P("tensor", "fsdp") if splits else P(None, ("fsdp", "tensor"))),
        (r"blocks/(q|k|v|gate|up)/kernel$", P(None, "fsdp", "tensor")),
        (r"blocks/(o|down)/kernel$", P(None, "tensor", "fsdp")),
        (r"norm/(scale|bias)$", P()),
        *([(rf"blocks/({'|'.join(column_biases)})/bias$", P(None, "tensor"))] if column_biases else []),
        *([(rf"blocks/({'|'.join(row_biases)})/bias$", P())] if row_biases else []),
        *([(r"positions/embedding$", P(None, "fsdp"))] if c.positions == "learned" else []),
        *(
            []
            if c.tied
            else [
                (
                    r"head/kernel$",
                    P("fsdp", "tensor") if splits else P(("fsdp", "tensor"), None),
                )
            ]
        ),
    )
