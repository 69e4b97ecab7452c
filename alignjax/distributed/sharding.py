"""Meshes and shardings as data: a mesh by the sizes of its axes, parameters by rules over their paths."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from alignjax.errors import UserError
from alignjax.types import Array, Params, Rules

AXES = ("data", "fsdp", "tensor")
_ROW_AXES = ("data", "fsdp")  # the rows of a batch are split over both


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The sizes of the mesh axes. One of them may be -1, which means "all the remaining devices"."""

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(sizes: Mesh, devices: list[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Returns the device mesh with axes ``AXES``, over all devices unless some are given.

    Raises UserError when the sizes do not multiply to the number of devices.
    """
    devices = devices or available_devices()
    shape = mesh_shape(sizes, len(devices))
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def available_devices() -> list[jax.Device]:
    """Returns JAX's devices. Raises UserError where those that JAX_PLATFORMS asks for are not here."""
    try:
        return jax.devices()
    except (RuntimeError, AssertionError):
        wanted = os.environ.get("JAX_PLATFORMS") or "JAX's choice"
        raise UserError(f"JAX finds no device for JAX_PLATFORMS={wanted}; set it to cpu, or install alignjax[tpu] or "
                        "alignjax[gpu] on a machine that has one") from None  # fmt: skip


def mesh_shape(sizes: Mesh, device_count: int) -> tuple[int, ...]:
    """Returns the sizes of ``AXES`` over ``device_count`` devices, with -1 replaced by the devices that remain.

    Raises UserError when the sizes do not multiply to ``device_count``.
    """
    shape = (sizes.data, sizes.fsdp, sizes.tensor)
    fixed = math.prod(size for size in shape if size > 0)
    if shape.count(-1) > 1 or min(shape) < -1 or 0 in shape:
        raise UserError(f"mesh {dataclasses.asdict(sizes)} needs positive sizes and at most one -1")
    if device_count % fixed or (-1 not in shape and fixed != device_count):
        raise UserError(
            f"mesh {dataclasses.asdict(sizes)} does not divide {device_count} devices; "
            "choose sizes whose product is the device count, or set one to -1"
        )
    return tuple(device_count // fixed if size == -1 else size for size in shape)


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a JAX key path as text: the path of ``tree["blocks"]["q"]["kernel"]`` is "blocks/q/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def shardings(tree: Any, rules: Rules, mesh: jax.sharding.Mesh, strict: bool = True) -> Any:
    """Returns a NamedSharding for every leaf: that of the first rule whose regular expression matches its path.

    A rule whose PartitionSpec is longer than the leaf has dimensions does not match. With ``strict`` every leaf needs
    a rule and every rule a leaf. Without it a leaf that no rule matches is replicated; that serves optimiser states,
    whose paths end in the paths of parameters.

    Raises UserError that names the leaf or the rule, also when a dimension does not divide over the mesh.
    """
    used: set[str] = set()

    def leaf_sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        name = path_name(path)
        rule = _first_match(rules, name, leaf.ndim)
        if rule is None and strict:
            raise UserError(f"no sharding rule claims {name}; add one to the model's rules")
        pattern, spec = rule or ("", PartitionSpec())
        used.add(pattern)
        _check_divisible(name, leaf.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    result = jax.tree_util.tree_map_with_path(leaf_sharding, tree)
    unused = [pattern for pattern, _ in rules if pattern not in used]
    if strict and unused:
        raise UserError(f"sharding rule {unused[0]!r} claims nothing; remove it from the model's rules")
    return result


def _first_match(rules: Rules, name: str, ndim: int) -> tuple[str, PartitionSpec] | None:
    """Returns the first rule for a leaf of that path and number of dimensions, None without one."""
    return next((rule for rule in rules if re.search(rule[0], name) and len(rule[1]) <= ndim), None)


def _check_divisible(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: jax.sharding.Mesh) -> None:
    for size, axes in zip(shape, spec, strict=False):
        names = _axis_names(axes)
        parts = math.prod(mesh.shape[axis] for axis in names)
        if size % parts:
            raise UserError(
                f"{name}: dimension {size} does not divide over {'*'.join(names)}={parts}; "
                "choose a mesh that does, or pad the model"
            )


def _axis_names(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Returns the mesh axes that one entry of a PartitionSpec names."""
    return (entry,) if isinstance(entry, str) else entry or ()


def matching_rules(rules: Rules, tree: Any) -> Rules:
    """Returns the rules that match at least one path of the tree. A model with tied embeddings has no head to shard."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    return tuple(rule for rule in rules if any(re.search(rule[0], name) for name in names))


def row_sharding(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of batches: the leading axis is split over ``data`` and ``fsdp``."""
    return NamedSharding(mesh, PartitionSpec(_ROW_AXES))


def replicated(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Returns the sharding of arrays that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def constrain_rows(x: Array) -> Array:
    """Returns x [B, ...] with its leading axis sharded as batches are. Call it in a jitted function under
    ``jax.set_mesh``.

    Without this constraint XLA may split activations as the parameters are split, and then sends activations between
    devices instead of parameters. A leading axis that does not divide over the mesh is left to XLA.
    """
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(axis for axis in _ROW_AXES if mesh.shape.get(axis, 1) > 1)
    if not axes or x.shape[0] % math.prod(mesh.shape[axis] for axis in axes):
        return x
    unconstrained = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes, *unconstrained))


def gather_params(params: Params, rules: Rules, dtype: str) -> Params:
    """Returns the parameters gathered over ``data`` and ``fsdp``; their split over ``tensor`` stays. Call it in a
    jitted function under ``jax.set_mesh``.

    A loop over gathered parameters does not gather them again in every iteration. Parameters that were split are cast
    to ``dtype`` first, where that is narrower: the model casts them anyway when it uses them, and less is sent.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if math.prod(mesh.shape.get(axis, 1) for axis in _ROW_AXES) == 1:
        return params

    def gather(path: tuple[Any, ...], leaf: Array) -> Array:
        _, spec = _first_match(rules, path_name(path), leaf.ndim) or ("", PartitionSpec())
        axes = [_axis_names(entry) for entry in spec]
        if not any(set(names) & set(_ROW_AXES) for names in axes):
            return leaf
        narrow = leaf.astype(dtype) if np.dtype(dtype).itemsize < leaf.dtype.itemsize else leaf
        kept = ["tensor" if "tensor" in names else None for names in axes]
        return jax.lax.with_sharding_constraint(narrow, PartitionSpec(*kept))

    return jax.tree_util.tree_map_with_path(gather, params)


def local_rows(mesh: jax.sharding.Mesh, size: int) -> np.ndarray:
    """Returns the indices, ascending, of the rows that this process's devices hold of a batch of ``size`` rows."""
    slices = row_sharding(mesh).addressable_devices_indices_map((size,)).values()
    return np.unique(np.concatenate([np.arange(size)[index] for index in slices if index is not None]))


def place_rows(mesh: jax.sharding.Mesh, batch: Any, local: np.ndarray | None = None, size: int | None = None) -> Any:
    """Returns a tree of host arrays [B, ...] as global arrays, sharded as ``row_sharding`` says.

    Without ``local`` every process passes the whole batch. With ``local``, which is ``local_rows(mesh, size)``, each
    process passes only those rows of a batch of ``size`` rows.
    """

    def place(array: np.ndarray) -> jax.Array:
        array = np.asarray(array)
        shape = (size or len(array), *array.shape[1:])

        def shard(index: tuple[slice, ...] | None) -> np.ndarray:
            first, last, _ = index[0].indices(shape[0]) if index else (0, shape[0], 1)
            offset = first if local is None else int(np.searchsorted(local, first))
            return array[offset : offset + last - first]

        return jax.make_array_from_callback(shape, row_sharding(mesh), shard)

    return jax.tree.map(place, batch)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes that one device holds of a tree of arrays or of ShapeDtypeStructs with shardings.

    An object that is several leaves of the tree counts once. A leaf without a sharding counts whole.
    """

    def shard_bytes(leaf: Any) -> int:
        sharding = leaf.sharding if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct) else None
        shape = sharding.shard_shape(leaf.shape) if sharding is not None else leaf.shape
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(shard_bytes, {id(leaf): leaf for leaf in jax.tree.leaves(tree)}.values()))


def check_batch(name: str, size: int, mesh: jax.sharding.Mesh) -> None:
    """Raises UserError when a batch of ``size`` rows, which the setting ``name`` gives, does not divide over the
    mesh."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % parts:
        raise UserError(f"{name}={size} does not divide over data*fsdp={parts}; choose a multiple of {parts}")


@functools.lru_cache(maxsize=4)
def _replicator(mesh: jax.sharding.Mesh) -> Any:
    """Returns the identity, jitted, with its result on every device."""
    return jax.jit(lambda tree: tree, out_shardings=replicated(mesh))


def gather_rows(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Returns a tree of arrays that lie by rows with every array on every device, so that every host can read it."""
    return _replicator(mesh)(tree)
