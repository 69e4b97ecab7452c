"""Low-rank adapters (LoRA, 2106.09685): a second, small tree of parameters over a frozen base.

A model's functions take the base alone or the base with adapters beside its kernels; ``overlay`` puts them there
without copying the base, so that a policy, its reference and a preference model can share one base in memory.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

from alignjax.errors import POSITIVE, UserError, check_range
from alignjax.models.functional import LORA
from alignjax.types import Key, Params, Rules


@dataclasses.dataclass(frozen=True)
class Lora:
    """What is adapted: y = x W + (alpha / rank) (x A) B, A [in, rank], B [rank, out] at zero first."""

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q", "v")  # projections: q, k, v, o, gate, up, down; in a T5 decoder cross_q, ... too

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "rank")
        check_range(self, POSITIVE, math.inf, "alpha")
        if not isinstance(self.rank, int) or not self.targets:
            raise UserError(f"{self} adapts nothing; give a whole rank and at least one target")
        object.__setattr__(self, "targets", tuple(sorted(set(self.targets))))  # their order says nothing

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


def init(lora: Lora, base: Any, key: Key) -> Params:
    """Adapters for the base's stacked kernels [L, in, out] (arrays or shapes): A uniform in +-1 / sqrt(in), B zero,
    in float32. Raises UserError when a target is nowhere."""
    found: set[str] = set()

    def walk(tree: Any, path: str) -> Params:
        small: Params = {}
        for name, part in tree.items():
            if not isinstance(part, dict):
                continue
            kernel = part.get("kernel")
            if name in lora.targets and kernel is not None and kernel.ndim == 3:
                found.add(name)
                layers, inputs, outputs = kernel.shape
                draw = jax.random.fold_in(key, zlib.crc32(f"{path}/{name}".encode()))
                a = jax.random.uniform(draw, (layers, inputs, lora.rank), minval=-1.0, maxval=1.0) * inputs**-0.5
                small[name] = {LORA: {"a": a, "b": jnp.zeros((layers, lora.rank, outputs))}}
            elif below := walk(part, f"{path}/{name}"):
                small[name] = below
        return small

    small = walk(base, "")
    if missing := set(lora.targets) - found:
        raise UserError(f"Lora.targets names {min(missing)!r}, which this model has not; choose from "
                        f"{', '.join(projections(base))}")  # fmt: skip
    return small


def projections(base: Any) -> list[str]:
    """The names that can be targets."""
    names = {
        name for stack in base.values() if isinstance(stack, dict) for name, part in stack.items()
        if isinstance(part, dict) and getattr(part.get("kernel"), "ndim", 0) == 3
    }  # fmt: skip
    return sorted(names)


def overlay(base: Params, small: Params, scale: float) -> Params:
    """The base's own arrays, with the small tree's adapters (B times ``scale``) and heads beside them; of shapes, the
    shapes."""
    whole = dict(base)
    for name, part in small.items():
        if name == LORA:
            b = part["b"]
            whole[name] = {"a": part["a"], "b": b if isinstance(b, jax.ShapeDtypeStruct) else scale * b}
        else:
            whole[name] = overlay(base[name], part, scale) if name in base else part
    return whole


def merge(whole: Params) -> Params:
    """What ``overlay`` made, as a tree without adapters: W + A B."""
    merged: Params = {}
    for name, part in whole.items():
        if isinstance(part, dict) and LORA in part:
            low = jnp.einsum("lir,lro->lio", part[LORA]["a"], part[LORA]["b"])
            kernel = part["kernel"]
            rest = {k: v for k, v in part.items() if k != LORA}
            merged[name] = {**rest, "kernel": (kernel + low.astype(jnp.float32)).astype(kernel.dtype)}
        else:
            merged[name] = merge(part) if isinstance(part, dict) else part
    return merged


RULES: Rules = ((rf"{LORA}/(a|b)$", jax.sharding.PartitionSpec()),)
"""Adapters are small: every device holds them whole."""
