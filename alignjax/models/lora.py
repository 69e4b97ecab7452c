"""Low-rank adapters (LoRA, 2106.09685): a second, small tree of parameters over a frozen base.

A model's functions take the base alone, or the base with adapters beside its kernels. ``overlay`` puts the adapters
there without a copy of the base, so that a policy, its reference and a preference model can share one base in memory.
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

ADAPTER_RULES: Rules = ((rf"{LORA}/(a|b)$", jax.sharding.PartitionSpec()),)
"""The sharding rules of adapters: they are small, so every device holds all of them."""


@dataclasses.dataclass(frozen=True)
class Lora:
    """An adapted projection computes y = x W + (alpha / rank) (x A) B, with A [in, rank] and B [rank, out].

    B starts at zero, so that new adapters change nothing.
    """

    rank: int
    alpha: float
    targets: tuple[str, ...] = ("q", "v")  # projections: q, k, v, o, gate, up, down; in a T5 decoder cross_q, ... too

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "rank")
        check_range(self, POSITIVE, math.inf, "alpha")
        if not isinstance(self.rank, int) or not self.targets:
            raise UserError(f"{self} adapts nothing; give an integer rank and at least one target")
        object.__setattr__(self, "targets", tuple(sorted(set(self.targets))))  # equal sets make equal adapters

    @property
    def scale(self) -> float:
        """alpha / rank."""
        return self.alpha / self.rank


def init_adapters(lora: Lora, base: Any, key: Key) -> Params:
    """Returns adapters {"a": A [L, in, rank], "b": B [L, rank, out]}, float32, for the base's kernels [L, in, out].

    A is uniform in +-1 / sqrt(in), B is zero. The base may be abstract. Raises UserError when the model has no
    projection of a target's name.
    """
    projections = _projections(base)
    if missing := set(lora.targets) - set(projections):
        raise UserError(f"Lora.targets names {min(missing)!r}, which this model does not have; choose from "
                        f"{', '.join(projections)}")  # fmt: skip
    return _init_subtree(lora, base, key, "")


def _init_subtree(lora: Lora, base: Any, key: Key, path: str) -> Params:
    """Returns the adapters of the part of the base that lies at ``path``; parts without a target are left out."""
    adapters: Params = {}
    for name, part in base.items():
        if not isinstance(part, dict):
            continue
        if name in lora.targets and _is_projection(part):
            adapters[name] = {LORA: _init_adapter(lora, part["kernel"].shape, key, f"{path}/{name}")}
        elif below := _init_subtree(lora, part, key, f"{path}/{name}"):
            adapters[name] = below
    return adapters


def _init_adapter(lora: Lora, shape: tuple[int, ...], key: Key, path: str) -> Params:
    """Returns the adapter of one stacked kernel. Its key depends on the path alone, not on the other targets."""
    layers, inputs, outputs = shape
    path_key = jax.random.fold_in(key, zlib.crc32(path.encode()))
    a = jax.random.uniform(path_key, (layers, inputs, lora.rank), minval=-1.0, maxval=1.0) * inputs**-0.5
    return {"a": a, "b": jnp.zeros((layers, lora.rank, outputs))}


def _projections(base: Any) -> list[str]:
    """Returns the names that can be targets, in alphabetical order."""
    stacks = [stack for stack in base.values() if isinstance(stack, dict)]
    return sorted({name for stack in stacks for name, part in stack.items() if _is_projection(part)})


def _is_projection(part: Any) -> bool:
    return isinstance(part, dict) and "kernel" in part and part["kernel"].ndim == 3


def overlay(base: Params, adapters: Params, scale: float) -> Params:
    """Returns a tree of the base's own arrays with the adapters beside them, B multiplied by ``scale``.

    Entries of ``adapters`` that the base does not have, such as heads, are added as they are. Abstract trees give an
    abstract tree.
    """
    combined = dict(base)
    for name, part in adapters.items():
        if name == LORA:
            b = part["b"]
            combined[name] = {"a": part["a"], "b": b if isinstance(b, jax.ShapeDtypeStruct) else scale * b}
        else:
            combined[name] = overlay(base[name], part, scale) if name in base else part
    return combined


def merge(params: Params) -> Params:
    """Returns the tree that ``overlay`` returned, without adapters: each adapted kernel becomes W + A B."""
    merged: Params = {}
    for name, part in params.items():
        if isinstance(part, dict) and LORA in part:
            product = jnp.einsum("lir,lro->lio", part[LORA]["a"], part[LORA]["b"])
            kernel = part["kernel"]
            rest = {key: value for key, value in part.items() if key != LORA}
            merged[name] = {**rest, "kernel": (kernel + product.astype(jnp.float32)).astype(kernel.dtype)}
        else:
            merged[name] = merge(part) if isinstance(part, dict) else part
    return merged
