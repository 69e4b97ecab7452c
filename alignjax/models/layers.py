"""The parts that both transformers are built of: projections, norms, attention and masks.

Shape letters: B rows, T tokens, S cache slots (keys), D width, H query heads, K key/value heads, h head_dim,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from alignjax.errors import UserError
from alignjax.types import Array

COMPUTE_DTYPES = ("float32", "bfloat16", "float16")
REMAT_POLICIES: dict[str, Callable[..., bool] | None] = {
    "none": None,  # keep every activation
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,  # keep matrix products
    "full": jax.checkpoint_policies.nothing_saveable,  # recompute the whole layer
}
ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
}


def check_choice(node: Any, name: str, choices: tuple[str, ...]) -> None:
    """Raises UserError when the field ``name`` of the dataclass ``node`` is not one of the choices."""
    value = getattr(node, name)
    if value not in choices:
        raise UserError(f"{type(node).__name__}.{name}={value!r} is unknown; choose one of {', '.join(choices)}")


class Linear(nnx.Module):
    """x W + b; with an adapter, x W + b + (x A) B, where A is [in, r] and B is [r, out]."""

    adapter: tuple[Array, Array] | None = None  # (A, B); ``functional`` sets it

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        dtype: str,
        rngs: nnx.Rngs,
        init: Callable[..., Array] = nnx.initializers.lecun_normal(),
    ):
        self.dtype, self.has_bias = jnp.dtype(dtype), bias
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        """x [..., in] -> [..., out], in ``dtype``."""
        x = x.astype(self.dtype)
        y = x @ self.kernel[...].astype(self.dtype)
        if self.has_bias:
            y = y + self.bias[...].astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.adapter is not None:
            a, b = (part.astype(self.dtype) for part in self.adapter)
            y = y + (x @ a) @ b
        return y


class Norm(nnx.Module):
    """RMS norm, x / rms(x) * (scale + offset); ``centred`` makes it a layer norm with a bias. Computed in float32."""

    def __init__(self, width: int, *, eps: float, dtype: str, offset: float = 0.0, centred: bool = False):
        self.eps, self.dtype, self.offset, self.centred = eps, jnp.dtype(dtype), offset, centred
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, jnp.float32))
        if centred:
            self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., D], in ``dtype``."""
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - jnp.mean(y, -1, keepdims=True)
        leading = (1,) * (y.ndim - 1)
        scale = (self.scale[...].astype(jnp.float32) + self.offset).reshape(*leading, -1)
        y = y * (lax.rsqrt(jnp.mean(lax.square(y), -1, keepdims=True) + self.eps) * scale)
        if self.centred:
            y = y + self.bias[...].astype(jnp.float32).reshape(*leading, -1)
        return y.astype(self.dtype)


def soft_cap(x: Array, cap: float | None) -> Array:
    """Returns cap * tanh(x / cap), which is bounded by ``cap`` and near x around 0 (Gemma 2, 2408.00118).

    None: returns x.
    """
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: Array, k: Array, v: Array, mask: Array, scale: float, cap: float | None = None, bias: Array | None = None
) -> Array:
    """Returns softmax(scores) v: q [B, T, H, h], k and v [B, K, S, h], mask [B, T, S] -> [B, T, H, h].

    Scores are soft_cap(scale * q k) and, with ``bias`` [H, T, S], + bias. H is a multiple of K: consecutive query
    heads share a key/value head (grouped queries, 2305.13245).
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[1]
    # The heads of a group lie beside the queries, so that both products are plain matrix products over two batch axes.
    # On CPU this is several times faster than an einsum over five axes; on an accelerator it is as fast.
    grouped = q.reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    scores = soft_cap(jnp.einsum("bkqd,bksd->bkqs", grouped, k, preferred_element_type=jnp.float32) * scale, cap)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32).reshape(1, kv_heads, -1, bias.shape[-1])
    mask = jnp.tile(mask, (1, heads // kv_heads, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(v.dtype)
    attended = jnp.einsum("bkqs,bksd->bkqd", weights, v).reshape(batch, kv_heads, -1, length, dim)
    return attended.transpose(0, 3, 1, 2, 4).reshape(q.shape)


def causal_mask(segments: Array) -> Array:
    """Returns the mask [B, T, T] of segments [B, T]: query t attends to key s <= t of its own segment, 0 excepted.

    Nothing attends to padding, which is segment 0. Padding attends to all real tokens before it: what is computed there
    does not depend on how much padding there is.
    """
    length = segments.shape[1]
    query, key = segments[:, :, None], segments[:, None, :]
    same = ((query == key) | (query == 0)) & (key > 0)
    return same & jnp.tril(jnp.ones((1, length, length), bool))


def window_mask(mask: Array, query_positions: Array, key_positions: Array, window: Array) -> Array:
    """Returns the mask [B, T, S] without keys that lie ``window`` tokens or more before their query.

    Query positions are [B, T], key positions [B, S], ``window`` [] int32.
    """
    return mask & (query_positions[:, :, None] - key_positions[:, None, :] < window)


def segment_positions(segments: Array) -> Array:
    """Returns the index of each real token within its segment, [B, T] int32. Padding (segment 0) does not count."""
    real = segments > 0
    count = jnp.cumsum(real, axis=1)
    first = real & (segments != jnp.pad(lax.cummax(jnp.asarray(segments), axis=1), ((0, 0), (1, 0)))[:, :-1])
    return count - lax.cummax(jnp.where(first, count, 0), axis=1)


def last_token_state(states: Array, mask: Array) -> Array:
    """Returns the state of each row's last real token, [B, T, D] -> [B, D], wherever the padding lies."""
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
