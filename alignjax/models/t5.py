"""An encoder-decoder: T5 1.0 (1910.10683), T5 v1.1, Flan-T5 and mT5, told apart by options.

Read ``t5`` first, which makes a Model of the functions below it: ``_encode``, ``_decoder_states``, ``_logits``,
``_prefill``, ``_decode_step``. The layers themselves are in ``t5_modules``.

The encoder reads the prompt and an end token once; the decoder writes after one start token. The parameters of all
layers of a side are stacked along a leading axis [L, ...]. Shape letters as in ``layers``; M: encoder positions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from alignjax.distributed.sharding import constrain_rows
from alignjax.models.config import T5Config as T5Config  # "as": exported from here too
from alignjax.models.functional import Functional, functional
from alignjax.models.kv_cache import LayerCache
from alignjax.models.layers import REMAT_POLICIES
from alignjax.models.model import Model
from alignjax.models.t5_modules import CrossMemory, T5Block, T5EmbeddingAndHead, position_bias, t5_norm
from alignjax.types import Array, Completion, Key, Params, Process, Prompt, Rules, Tokens

_OUTER_PARAMS = ("embed", "head")  # the parameters of T5EmbeddingAndHead
_RULES: Rules = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"(encoder|decoder)_bias/embedding$", P()),
    (r"(encoder|decoder)/(cross_)?(q|k|v|gate|up)/kernel$", P(None, "fsdp", "tensor")),
    (r"(encoder|decoder)/(cross_)?(o|down)/kernel$", P(None, "tensor", "fsdp")),
    (r"norm/scale$", P()),
)
_HEAD_RULE = (r"head/kernel$", P("fsdp", "tensor"))


class _Network(NamedTuple):
    """The static description of a T5, which all of its functions take first."""

    config: T5Config
    outer: Functional  # T5EmbeddingAndHead
    encoder: Functional  # T5Block
    decoder: Functional  # T5Block
    norm: Functional


def _network(c: T5Config) -> _Network:
    return _Network(
        c,
        outer=functional(lambda rngs: T5EmbeddingAndHead(c, rngs=rngs)),
        encoder=functional(lambda rngs: T5Block(c, False, rngs=rngs)),
        decoder=functional(lambda rngs: T5Block(c, True, rngs=rngs)),
        norm=functional(lambda rngs: t5_norm(c)),
    )


def t5(config: T5Config) -> Model:
    """Returns the model of a configuration."""
    network = _network(config)
    return Model(
        config,
        init=partial(_init, network),
        forward=None,
        completion_states=partial(_completion_states, network),
        last_state=partial(_last_state, network),
        logits=partial(_logits, network),
        prefill=partial(_prefill, network),
        rules=_RULES if config.tied else (*_RULES, _HEAD_RULE),
    )


def encoder(config: T5Config) -> Callable[[Params, Prompt], tuple[Array, Array]]:
    """Returns the encoder, (params, prompt [B, T]) -> (states [B, T + 1, D], mask [B, T + 1]).

    Each row's states are those of its real tokens, moved to the front, and of the end token after them.
    """
    return partial(_encode, _network(config))


class _Carry(NamedTuple):
    """What decoding carries from token to token; the encoder's keys and values are constant."""

    caches: tuple[LayerCache, ...]  # one a layer
    slot: Array  # [] int32, the next token's cache slot


def _init(network: _Network, key: Key) -> Params:
    """key -> parameters at T5's initial scales, layers stacked [L, ...]."""
    c = network.config
    outer_key, encoder_key, decoder_key, encoder_bias_key, decoder_bias_key = jax.random.split(key, 5)
    sides = {
        "encoder": (network.encoder, c.layers, encoder_key, encoder_bias_key),
        "decoder": (network.decoder, c.decoder_layers, decoder_key, decoder_bias_key),
    }
    params = network.outer.init(outer_key)
    for side, (block, layers, blocks_key, bias_key) in sides.items():
        table = c.width**-0.5 * jax.random.normal(bias_key, (c.buckets, c.heads))
        params |= {
            side: jax.vmap(block.init)(jax.random.split(blocks_key, layers)),
            f"{side}_norm": network.norm.init(key),  # a constant: the key is not used
            f"{side}_bias": {"embedding": table},
        }
    return params


def _apply_outer(network: _Network, params: Params, x: Array, method: Any) -> Array:
    """Calls a method of T5EmbeddingAndHead with its own part of the parameters."""
    own = {name: params[name] for name in _OUTER_PARAMS if name in params}
    return network.outer.apply(own, x, method=method)


def _embed(network: _Network, params: Params, tokens: Array) -> Array:
    """tokens [...] -> [..., D]."""
    return _apply_outer(network, params, tokens, T5EmbeddingAndHead.embed_tokens)


def _logits(network: _Network, params: Params, states: Array) -> Array:
    """states [..., D] -> logits [..., V], float32."""
    return _apply_outer(network, params, states, T5EmbeddingAndHead.logits)


def _scan_layers(c: T5Config, run: Callable[[Array, Params], Array], x: Array, stacked: Params) -> Array:
    """Runs ``run(x [B, T, D], one layer's weights) -> [B, T, D]`` through the stacked layers."""
    if c.remat != "none":
        run = jax.checkpoint(run, policy=REMAT_POLICIES[c.remat])
    return lax.scan(lambda x, weights: (constrain_rows(run(x, weights)), None), constrain_rows(x), stacked)[0]


def _append_end_token(prompt: Prompt, end_token: int) -> Tokens:
    """Returns the prompt [B, T] with real tokens moved to the front and the end token after them, [B, T + 1]."""
    order = jnp.argsort(~jnp.asarray(prompt.mask), axis=1, stable=True)
    tokens = jnp.pad(jnp.take_along_axis(prompt.tokens, order, axis=1), ((0, 0), (0, 1)))
    length, slots = jnp.sum(prompt.mask, axis=1, keepdims=True), jnp.arange(tokens.shape[1])[None]
    return Tokens(jnp.where(slots == length, end_token, tokens), slots <= length)


def _encode(network: _Network, params: Params, prompt: Prompt) -> tuple[Array, Array]:
    """prompt [B, T] -> (states [B, M, D], mask [B, M]) with M = T + 1."""
    source = _append_end_token(prompt, network.config.end_token)
    length = source.tokens.shape[1]
    mask = jnp.broadcast_to(source.mask[:, None], (len(source.tokens), length, length))
    bias = position_bias(params["encoder_bias"], jnp.arange(length), length, network.config, bidirectional=True)

    def encode_layer(x: Array, weights: Params) -> Array:
        return network.encoder.apply(weights, x, mask, bias)[0]

    x = _scan_layers(network.config, encode_layer, _embed(network, params, source.tokens), params["encoder"])
    return network.norm.apply(params["encoder_norm"], x), source.mask


def _decoder_states(network: _Network, params: Params, prompt: Prompt, completion: Array) -> Array:
    """prompt, completion tokens [B, N] -> [B, 1 + N, D], the states after the start token and each of the N tokens."""
    c = network.config
    states, states_mask = _encode(network, params, prompt)
    tokens = jnp.pad(completion, ((0, 0), (1, 0)), constant_values=c.start_token)
    length = tokens.shape[1]
    mask = jnp.broadcast_to(np.tril(np.ones((length, length), bool))[None], (len(tokens), length, length))
    bias = position_bias(params["decoder_bias"], jnp.arange(length), length, c, bidirectional=False)

    def decode_layer(x: Array, weights: Params) -> Array:
        memory = CrossMemory(network.decoder.apply(weights, states, method=T5Block.cross_cache), states_mask)
        return network.decoder.apply(weights, x, mask, bias, memory)[0]

    x = _scan_layers(c, decode_layer, _embed(network, params, tokens), params["decoder"])
    return network.norm.apply(params["decoder_norm"], x)


def _completion_states(network: _Network, params: Params, prompt: Prompt, completion: Completion) -> Array:
    """prompt, completion [B, T] -> [B, T, D], the state that predicts each completion token."""
    return _decoder_states(network, params, prompt, completion.tokens[:, :-1])


def _last_state(network: _Network, params: Params, prompt: Prompt) -> Array:
    """prompt [B, T] -> [B, D], the decoder's state after the start token."""
    return _decoder_states(network, params, prompt, jnp.zeros((len(prompt.tokens), 0), jnp.int32))[:, 0]


_DecoderLayer = tuple[Params, CrossMemory]
"""One layer's weights and the encoder's states as it reads them."""


def _prefill(network: _Network, params: Params, prompt: Prompt, max_new_tokens: int) -> Process:
    """Encodes the prompt [B, T] and decodes the start token; returns the process that writes the completion."""
    c, rows = network.config, len(prompt.tokens)
    states, states_mask = _encode(network, params, prompt)
    weights = [jax.tree.map(lambda w, i=i: w[i], params["decoder"]) for i in range(c.decoder_layers)]
    layers = tuple(
        (w, CrossMemory(network.decoder.apply(w, states, method=T5Block.cross_cache), states_mask)) for w in weights
    )
    empty = jnp.zeros((rows, c.heads, max_new_tokens + 1, c.head_dim), c.compute_dtype)
    carry = _Carry(tuple(LayerCache(empty, empty) for _ in layers), jnp.int32(0))
    step = partial(_decode_step, network, params, layers)
    return Process(step, *step(carry, jnp.full((rows,), c.start_token, jnp.int32)))


def _decode_step(
    network: _Network, params: Params, layers: tuple[_DecoderLayer, ...], carry: _Carry, token: Array
) -> tuple[_Carry, Array]:
    """Appends token [B] to every row: returns the new carry and the next logits [B, V]."""
    slots = carry.caches[0].keys.shape[2]
    mask = jnp.broadcast_to((jnp.arange(slots) <= carry.slot)[None, None], (len(token), 1, slots))
    bias = position_bias(params["decoder_bias"], carry.slot[None], slots, network.config, bidirectional=False)
    x, caches = _embed(network, params, token)[:, None], []
    for (weights, memory), cache in zip(layers, carry.caches, strict=True):
        x, cache = network.decoder.apply(weights, x, mask, bias, memory, cache, carry.slot)
        caches.append(cache)
    states = network.norm.apply(params["decoder_norm"], x)[:, 0]
    return _Carry(tuple(caches), carry.slot + 1), _logits(network, params, states)
