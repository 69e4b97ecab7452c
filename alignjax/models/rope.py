"""Rotary positions (RoFormer, 2104.09864) and how checkpoints stretch them."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from alignjax.errors import POSITIVE, check_range
from alignjax.models.layers import one_of
from alignjax.types import Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    "linear" divides all by ``factor``. "llama3" divides those whose wavelength exceeds original / low_frequency
    tokens, keeps those below original / high_frequency, and interpolates between (2407.21783).
    """

    kind: str = "none"  # or "linear", "llama3"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original: int = 8192  # tokens of context the model was first trained on

    def __post_init__(self) -> None:
        check_range(self, POSITIVE, math.inf, "factor", "low_frequency", "high_frequency", "original")
        one_of(self, "kind", ("none", "linear", "llama3"))


def rotary(x: Array, positions: Array, frequency: Array) -> Array:
    """Rotates the first 2F dimensions of x [B, T, N, head_dim] by positions [B, T] times frequency [F] (radians a
    token), pairs being (i, i + F).

    RoFormer (2104.09864), in the half-split layout of Hugging Face.
    """
    half = frequency.shape[-1]
    angle = positions[..., None, None].astype(jnp.float32) * frequency[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b, rest = (x[..., i:j].astype(jnp.float32) for i, j in ((0, half), (half, 2 * half), (2 * half, None)))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def stretched(frequency: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """RopeScaling's frequencies."""
    s = scaling
    if s.kind != "llama3":
        return frequency / (s.factor if s.kind == "linear" else 1.0)
    turns = s.original * frequency / (2 * np.pi)  # in the original context
    keep = np.clip((turns - s.low_frequency) / (s.high_frequency - s.low_frequency), 0, 1)
    return frequency * (keep + (1 - keep) / s.factor)
