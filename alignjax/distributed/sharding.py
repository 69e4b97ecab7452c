"""Meshes and shardings as data: a mesh by its axis sizes, parameters by rules over their paths."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from alignjax.errors import UserError
from alignjax.types import Array, Params, Rules

AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Sizes of the mesh axes; one of them may be -1, "all the remaining devices"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(sizes: Mesh, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """The device mesh. Raises UserError when the sizes do not make up the devices."""
    devices = devices or jax.devices()
    shape = shape_of(sizes, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def shape_of(sizes: Mesh, devices: int) -> tuple[int, ...]:
    """The axes' sizes over so many devices. Raises UserError when they do not make them up."""
    shape = [getattr(sizes, axis) for axis in AXES]
    known = 1
    for size in shape:
        known *= size if size > 0 else 1
    if shape.count(-1) > 1 or min(shape) < -1 or 0 in shape:
        raise UserError(f"mesh {dataclasses.asdict(sizes)} needs positive sizes and at most one -1")
    if devices % known or (-1 not in shape and known != devices):
        raise UserError(
            f"mesh {dataclasses.asdict(sizes)} does not divide {devices} devices; "
            "choose sizes whose product is the device count, or set one to -1"
        )
    return tuple(devices // known if size == -1 else size for size in shape)


def path_name(path: tuple[Any, ...]) -> str:
    """A key path as text: ("blocks", "q", "kernel") -> "blocks/q/kernel"."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def shardings(tree: Any, rules: Rules, mesh: jax.sharding.Mesh, strict: bool = True) -> Any:
    """A NamedSharding for every leaf, by the first rule whose expression is found in its path.

    With ``strict`` every leaf must be claimed and every rule used. Without (optimiser states, whose paths
    end in parameters' paths) an unclaimed leaf is replicated. Raises UserError naming the leaf or rule,
    and when a dimension does not divide.
    """
    used: set[str] = set()

    def one(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        for pattern, spec in rules:
            if re.search(pattern, name) and len(spec) <= leaf.ndim:
                used.add(pattern)
                check_divisible(name, leaf.shape, spec, mesh)
                return NamedSharding(mesh, spec)
        if strict:
            raise UserError(f"no sharding rule claims {name}; add one to the model's rules")
        return NamedSharding(mesh, PartitionSpec())

    result = jax.tree_util.tree_map_with_path(one, tree)
    idle = [pattern for pattern, _ in rules if pattern not in used]
    if strict and idle:
        raise UserError(f"sharding rule {idle[0]!r} claims nothing; remove it from the model's rules")
    return result


def check_divisible(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: jax.sharding.Mesh) -> None:
    for size, axes in zip(shape, spec, strict=False):
        names = (axes,) if isinstance(axes, str) else axes or ()
        parts = 1
        for axis in names:
            parts *= mesh.shape[axis]
        if size % parts:
            raise UserError(
                f"{name}: dimension {size} does not divide over {'*'.join(names)}={parts}; "
                "choose a mesh that does, or pad the model"
            )


def live(rules: Rules, tree: Any) -> Rules:
    """The rules that claim something in the tree: a tied model has no head to shard."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return tuple(rule for rule in rules if any(re.search(rule[0], name) for name in names))


def rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """How batches lie: the leading axis over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(x: Array) -> Array:
    """Within a jitted function under ``jax.set_mesh``: x with its leading axis as batches lie. Activations have to be
    told: left alone, XLA may split them as the parameters are and send them instead of these. A leading axis that does
    not divide is left alone."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in AXES[:2] if mesh.shape.get(axis, 1) > 1)
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    free = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *free))


def gathered(params: Params, rules: Rules, dtype: str) -> Params:
    """Within a jitted function under ``jax.set_mesh``: the parameters with their split over data and fsdp taken back,
    that over tensor left, for a loop that would else gather them at every turn. What was split is cast first, as the
    model does at its use, for half of the traffic."""
    mesh = jax.sharding.get_abstract_mesh()
    if math.prod(mesh.shape.get(axis, 1) for axis in AXES[:2]) == 1:
        return params

    def one(path: tuple[Any, ...], leaf: Array) -> Array:
        name = path_name(path)
        spec = next((spec for pattern, spec in rules if re.search(pattern, name) and len(spec) <= leaf.ndim), ())
        if not any(set(part if isinstance(part, tuple) else (part,)) & set(AXES[:2]) for part in spec):
            return leaf
        kept = [AXES[2] if AXES[2] in (part if isinstance(part, tuple) else (part,)) else None for part in spec]
        narrow = leaf.astype(dtype) if np.dtype(dtype).itemsize < leaf.dtype.itemsize else leaf
        return jax.lax.with_sharding_constraint(narrow, PartitionSpec(*kept))

    return jax.tree_util.tree_map_with_path(one, params)


def own_rows(mesh: jax.sharding.Mesh, size: int) -> np.ndarray:
    """Which rows of a batch of that size lie on this process's devices, ascending."""
    held = rows(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in held if index is not None]))


def place(mesh: jax.sharding.Mesh, batch: Any, own: np.ndarray | None = None, size: int | None = None) -> Any:
    """A tree of host arrays as global arrays that lie by rows. Every process gives the whole batch; or, with ``own``,
    only those of its ``size`` rows."""

    def one(local: np.ndarray) -> jax.Array:
        local = np.asarray(local)
        shape = (size or len(local), *local.shape[1:])

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            first, last, _ = index[0].indices(shape[0]) if index else (0, shape[0], 1)
            at = first if own is None else int(np.searchsorted(own, first))
            return local[at : at + last - first]

        return jax.make_array_from_callback(shape, rows(mesh), shard)

    return jax.tree.map(one, batch)


def held_by(tree: Any) -> int:
    """Bytes of a tree of arrays, or shapes with their places, on one device. A leaf that stands in several places is
    one array."""

    def one(leaf: Any) -> int:
        where = getattr(leaf, "sharding", None)
        shape = where.shard_shape(leaf.shape) if where is not None else leaf.shape
        size = leaf.dtype.itemsize if hasattr(leaf.dtype, "itemsize") else 4
        return math.prod(shape) * size

    return sum(map(one, {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()))


def check_batch(name: str, size: int, mesh: jax.sharding.Mesh) -> None:
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % parts:
        raise UserError(f"{name}={size} does not divide over data*fsdp={parts}; choose a multiple of {parts}")
