"""The optimiser as data."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignjax.errors import POSITIVE, UserError, check_range

_LARGEST_B1 = 0.95  # with moments in bfloat16


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW after clipping by the global norm; a linear warm-up, then a cosine to zero, a line to zero or a constant.

    ``moments="bfloat16"`` keeps the gradient's mean in 2 bytes a parameter instead of 4. Each step rounds it by up to
    2^-8 of itself, so it may lag by 2^-8 / (1 - b1), which is 4% at 0.9: b1 is at most 0.95. The squares' mean stays in
    float32: it falls by at most 1 - b2 of itself a step, which rounding to bfloat16 would always undo at b2 = 0.999,
    and the updates would shrink for good.
    """

    lr: float
    warmup: int = 10  # batches
    schedule: str = "cosine"  # or "linear" or "constant"
    clip: float = 1.0  # the largest global norm of the gradient
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    corrected: bool = True  # False: eps is added to the root of squares whose bias is not corrected, as in TensorFlow
    weight_decay: float = 0.0
    moments: str = "float32"  # or "bfloat16"

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "lr", "warmup", "weight_decay")
        check_range(self, POSITIVE, math.inf, "clip", "eps")
        check_range(self, 0, 1 - POSITIVE, "b1", "b2")
        if self.schedule not in ("cosine", "linear", "constant"):
            raise UserError(f"Adam.schedule={self.schedule!r} is unknown; choose cosine, linear or constant")
        if self.moments not in ("float32", "bfloat16"):
            raise UserError(f"Adam.moments={self.moments!r} is unknown; choose float32 or bfloat16")
        if self.moments == "bfloat16" and self.b1 > _LARGEST_B1:
            raise UserError(f"Adam.b1={self.b1} is too close to 1 for moments in bfloat16; lower it to {_LARGEST_B1}")

    def build(self, steps: int, updates: int = 1) -> optax.GradientTransformation:
        """Returns the optimiser for a training of ``steps`` batches, with ``updates`` optimiser steps on each.

        The learning rate is constant within a batch.
        """
        rate = self.learning_rate(steps)

        def schedule(count: Any) -> Any:
            return rate(count // updates)

        # A Python number would itself be rounded to bfloat16 (0.9 to 0.898), and the mean would be biased.
        b1 = np.float32(self.b1) if self.moments == "bfloat16" else self.b1
        options = {"b1": b1, "b2": self.b2, "eps": self.eps, "mu_dtype": self.moments}
        adam = optax.adamw(schedule, weight_decay=self.weight_decay, **options)
        if not self.corrected:
            adam = optax.chain(
                _uncorrected(optax.scale_by_adam(**options), b1, self.b2, self.eps),
                optax.add_decayed_weights(self.weight_decay),
                optax.scale_by_learning_rate(schedule),
            )
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)

    def learning_rate(self, steps: int) -> optax.Schedule:
        """Returns batch -> learning rate."""
        warmup = min(self.warmup, max(steps - 1, 0))
        decay_steps = max(steps - warmup, 1)
        decay = {
            "cosine": optax.cosine_decay_schedule(self.lr, decay_steps),
            "linear": optax.linear_schedule(self.lr, 0.0, decay_steps),
            "constant": optax.constant_schedule(self.lr),
        }[self.schedule]
        return optax.join_schedules([optax.linear_schedule(0.0, self.lr, max(warmup, 1)), decay], [warmup])


def _uncorrected(scale: optax.GradientTransformation, b1: Any, b2: float, eps: float) -> optax.GradientTransformation:
    """Returns ``scale``, Adam's, with m^ / (sqrt(v^) + eps / sqrt(1 - b2^t)) in place of m^ / (sqrt(v^) + eps)."""

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        _, state = scale.update(grads, state, params)
        first, second = 1 - b1**state.count, 1 - b2**state.count

        def step(mean: Any, square: Any) -> Any:
            return mean / first / (jnp.sqrt(square / second) + eps / jnp.sqrt(second))

        return jax.tree.map(step, state.mu, state.nu), state

    return optax.GradientTransformation(scale.init, update)
