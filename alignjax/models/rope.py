"""Rotary positions (RoFormer, 2104.09864) and their scaling for contexts longer than those of the first training."""

from __future__ import annotations

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from alignjax.errors import POSITIVE, UserError, check_range
from alignjax.models.layers import check_choice
from alignjax.types import Array


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are lowered for long contexts.

    "linear" divides all frequencies by ``factor``. "llama3" (2407.21783) divides those whose wavelength exceeds
    original / low_frequency tokens, keeps those whose wavelength is below original / high_frequency tokens, and
    interpolates in between.
    """

    kind: str = "none"  # or "linear", "llama3"
    factor: float = 1.0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    original: int = 8192  # tokens of context in the model's first training

    def __post_init__(self) -> None:
        check_range(self, POSITIVE, math.inf, "factor", "low_frequency", "high_frequency", "original")
        check_choice(self, "kind", ("none", "linear", "llama3"))
        if self.kind == "llama3" and self.low_frequency >= self.high_frequency:
            raise UserError(f"RopeScaling.high_frequency={self.high_frequency} must be above "
                            f"low_frequency={self.low_frequency}")  # fmt: skip


def apply_rotary(x: Array, positions: Array, frequencies: Array) -> Array:
    """Returns x [B, T, N, head_dim] with its first 2F dimensions rotated; the others are unchanged.

    Dimensions i and i + F form a pair, which is rotated by positions [B, T] times frequencies [F] (radians a token).
    This is RoFormer (2104.09864) in the half-split layout of Hugging Face.
    """
    half = frequencies.shape[-1]
    angle = positions[..., None, None].astype(jnp.float32) * frequencies[None, None, None]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    a, b, rest = (x[..., i:j].astype(jnp.float32) for i, j in ((0, half), (half, 2 * half), (2 * half, None)))
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1).astype(x.dtype)


def scale_frequencies(frequencies: np.ndarray, scaling: RopeScaling) -> np.ndarray:
    """Returns the frequencies [F] (radians a token) as RopeScaling changes them."""
    s = scaling
    if s.kind != "llama3":
        return frequencies / (s.factor if s.kind == "linear" else 1.0)
    rotations = s.original * frequencies / (2 * np.pi)  # full turns within the original context
    keep = np.clip((rotations - s.low_frequency) / (s.high_frequency - s.low_frequency), 0, 1)
    return frequencies * (keep + (1 - keep) / s.factor)
