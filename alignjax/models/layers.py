"""What the transformers here are built of: projections, norms, attention, masks.

Shape letters: B rows, T tokens, S cache slots, D width, H query heads, K key/value heads, V vocabulary.
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


def one_of(node: Any, name: str, choices: tuple[str, ...]) -> None:
    if getattr(node, name) not in choices:
        raise UserError(f"{name}={getattr(node, name)!r} is unknown; choose one of {', '.join(choices)}")


class Linear(nnx.Module):
    """x W + b; and + (x A) B where ``functional`` attached an adapter (A [in, r], B [r, out])."""

    adapter = None

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
        self.dtype = jnp.dtype(dtype)
        self.kernel = nnx.Param(init(rngs.params(), (inputs, outputs), jnp.float32))
        if bias:
            self.bias = nnx.Param(jnp.zeros((outputs,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        x = x.astype(self.dtype)
        y = x @ self.kernel[...].astype(self.dtype)
        if hasattr(self, "bias"):
            y = y + self.bias[...].astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))
        if self.adapter is not None:
            a, b = (part.astype(self.dtype) for part in self.adapter)
            y = y + (x @ a) @ b
        return y


class Norm(nnx.Module):
    """x / rms(x) * (scale + offset), or, ``centred``, with the mean taken out and a bias added; in float32."""

    def __init__(self, width: int, *, eps: float, dtype: str, offset: float = 0.0, centred: bool = False):
        self.eps, self.dtype, self.offset, self.centred = eps, jnp.dtype(dtype), offset, centred
        self.scale = nnx.Param(jnp.full((width,), 1.0 - offset, jnp.float32))
        if centred:
            self.bias = nnx.Param(jnp.zeros((width,), jnp.float32))

    def __call__(self, x: Array) -> Array:
        y = x.astype(jnp.float32)
        if self.centred:
            y = y - jnp.mean(y, -1, keepdims=True)
        wide = (1,) * (y.ndim - 1)
        scale = (self.scale[...].astype(jnp.float32) + self.offset).reshape(*wide, -1)
        y = y * (lax.rsqrt(jnp.mean(lax.square(y), -1, keepdims=True) + self.eps) * scale)
        if self.centred:
            y = y + self.bias[...].astype(jnp.float32).reshape(*wide, -1)
        return y.astype(self.dtype)


def capped(x: Array, cap: float | None) -> Array:
    """cap * tanh(x / cap): bounded, and the identity near zero (Gemma 2, 2408.00118)."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def attend(
    q: Array, k: Array, v: Array, mask: Array, scale: float, cap: float | None = None, bias: Array | None = None
) -> Array:
    """Softmax attention: q [B, T, H, h], k and v [B, K, S, h], mask [B, T, S] -> [B, T, H, h].

    H is a multiple of K: consecutive query heads share a key/value head (2305.13245). Scores are
    capped(scale * q k) and, with ``bias`` [H, T, S], + bias.
    """
    batch, length, heads, dim = q.shape
    kv_heads = k.shape[1]
    # Heads of a group side by side with the queries: plain products over two batch axes, which is
    # several times faster on CPU than a five-axis einsum and the same to an accelerator.
    grouped = q.reshape(batch, length, kv_heads, -1, dim).transpose(0, 2, 3, 1, 4).reshape(batch, kv_heads, -1, dim)
    scores = capped(jnp.einsum("bkqd,bksd->bkqs", grouped, k, preferred_element_type=jnp.float32) * scale, cap)
    if bias is not None:
        scores = scores + bias.astype(jnp.float32).reshape(1, kv_heads, -1, bias.shape[-1])
    mask = jnp.tile(mask, (1, heads // kv_heads, 1))[:, None]
    weights = jax.nn.softmax(jnp.where(mask, scores, -1e30), axis=-1).astype(v.dtype)
    mixed = jnp.einsum("bkqs,bksd->bkqd", weights, v).reshape(batch, kv_heads, -1, length, dim)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(q.shape)


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


def near(mask: Array, queries: Array, keys: Array, window: Array) -> Array:
    """The mask [B, T, S] without keys ``window`` positions or more behind their query; positions [B, T], [B, S]."""
    return mask & (queries[:, :, None] - keys[:, None, :] < window)


def take_last(states: Array, mask: Array) -> Array:
    """[B, T, D] -> [B, D]: the state of each row's last real token, wherever the padding lies."""
    last = jnp.max(jnp.where(mask, jnp.arange(mask.shape[1]), 0), axis=1)
    return jnp.take_along_axis(states, last[:, None, None], axis=1)[:, 0]
