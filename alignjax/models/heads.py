"""Scalar heads: linear maps from a state to one number. Reward, pairwise and value heads are all of this kind."""

from __future__ import annotations

import jax.numpy as jnp

from alignjax.types import Array, Params


def init_head(width: int) -> Params:
    """Returns the parameters of a scalar head at zero: {"kernel": [D]}, float32, with D = ``width``.

    A new head returns 0 for every state.
    """
    return {"kernel": jnp.zeros((width,), jnp.float32)}


def apply_head(head: Params, states: Array) -> Array:
    """Returns states · kernel in float32: states [..., D] -> [...]."""
    return states.astype(jnp.float32) @ head["kernel"]
