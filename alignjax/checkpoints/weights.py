"""Safetensors <-> params, tensor by tensor: the host never holds a whole checkpoint."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors

from alignjax.checkpoints.families import FAMILIES, Family, embedding_copies, is_ignored_tensor, tensor_entries
from alignjax.checkpoints.folders import MEBIBYTE, open_tensors, tensor_files
from alignjax.checkpoints.layout import Entry, layer_shape, read_block, stored_shape, stored_tensor, tensors_of
from alignjax.distributed.sharding import path_name
from alignjax.errors import UserError
from alignjax.models.build import ModelConfig, build
from alignjax.types import Params

REWARD_TENSOR = "score.weight"
"""The head of a sequence classification: a reward model's, where it has one label."""
FLOATS = ("F64", "F32", "F16", "BF16")
"""The dtypes that a parameter can have, as safetensors names them."""


def read_params(folder: Path, config: ModelConfig, shardings: Any = None, dtype: Any = np.float32) -> Params:
    """Returns the params of a checkpoint in ``dtype``, layers stacked along a leading axis.

    Without ``shardings``, leaves are NumPy arrays. With ``shardings``, a tree of the params' structure, they are arrays
    on the devices: each distinct shard is read once, by its own byte ranges, and freed when the devices have it. The
    host then holds one shard at a time, and of one tensor the part that goes into the shard.

    Raises UserError as ``check_tensors`` does. Warns of each tensor that holds NaN or infinity in ``dtype``.
    """
    shapes, (entries, views) = abstract_params(config), check_tensors(folder, config)
    warned: set[str] = set()

    def read_leaf(path: Any, abstract: jax.ShapeDtypeStruct, sharding: Any) -> Any:
        """Returns one leaf: a NumPy array, or with a sharding an array on the devices."""
        parameter = _Stored(entries[path_name(path)], abstract.shape, views, config.heads, folder)
        read_shard = functools.partial(parameter.read, dtype=dtype, warned=warned)
        if sharding is None:
            return read_shard(tuple(slice(0, size) for size in abstract.shape))
        return _place_shards(abstract.shape, sharding, read_shard)

    places = shardings if shardings is not None else jax.tree.map(lambda _: None, shapes)
    return jax.tree_util.tree_map_with_path(read_leaf, shapes, places, is_leaf=lambda x: x is None)


class _Stored(NamedTuple):
    """One of our parameters, as a checkpoint stores it."""

    entry: Entry
    shape: tuple[int, ...]  # of our parameter
    views: Mapping[str, Any]  # tensor name -> safetensors slice
    heads: int
    folder: Path  # for the warning

    def read(self, index: tuple[slice, ...], dtype: Any, warned: set[str]) -> np.ndarray:
        """Returns the shard ``index`` of the parameter. Warns of a tensor that is not finite, once each."""
        entry, names = self.entry, list(tensors_of(self.entry, self.shape))
        stacked = entry.is_stacked
        shard = np.empty([part.stop - part.start for part in index], dtype)
        rows, names = (shard, names[index[0]]) if stacked else ([shard], names)
        block, shape = index[1:] if stacked else index, layer_shape(entry, self.shape)
        for row, name in zip(rows, names, strict=True):
            with np.errstate(over="ignore"):  # the warning below covers it
                row[:] = read_block(self.views[name], entry, shape, block, self.heads)
            if name not in warned and not _is_finite(row):
                warned.add(name)
                warnings.warn(f"{self.folder}: tensor {name} holds NaN or infinity as {row.dtype}", stacklevel=2)
        return shard


def _place_shards(
    shape: tuple[int, ...], sharding: jax.sharding.Sharding, read_shard: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """Returns the array of a sharding, reading one distinct shard at a time, once for all devices that hold it.

    (``jax.make_array_from_callback`` would read it once a device, and all of them before the first is moved.)
    """
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in holders.items():
        shard = read_shard(tuple(slice(*pair) for pair in bounds))
        shards += jax.block_until_ready(jax.device_put([shard] * len(devices), devices))
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _is_finite(values: np.ndarray) -> bool:
    """Whether all values are finite; tested block by block, so that the mask never needs the memory of the values."""
    flat = values.reshape(-1)
    return all(np.isfinite(flat[i : i + MEBIBYTE]).all() for i in range(0, len(flat), MEBIBYTE))


def has_reward_head(folder: Path) -> bool:
    """Whether a folder is a sequence classification. Raises UserError when it has no safetensors file."""
    return REWARD_TENSOR in tensor_files(folder)


def read_reward_head(folder: Path, width: int) -> Params:
    """Returns {"reward": {"kernel": [width] float32}} of a sequence classification, or {} of another folder.

    Raises UserError when the head scores more than one label.
    """
    if REWARD_TENSOR not in (files := tensor_files(folder)):
        return {}
    head = open_tensors(files[REWARD_TENSOR]).get_tensor(REWARD_TENSOR)
    if head.shape != (1, width):
        raise UserError(f"{folder}: {REWARD_TENSOR} has shape {head.shape}, a reward's is (1, {width}); "
                        "give a model of one label")  # fmt: skip
    return {"reward": {"kernel": head[0].astype(np.float32)}}


def check_tensors(folder: Path, config: ModelConfig) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Returns the entry of each of our parameters by path, and a view of each tensor by name.

    Reads headers, and the values of tensors that repeat the embedding. Raises UserError when a tensor is missing, left
    over, misshapen or not of floats, and when one that repeats the embedding differs from it.
    """
    family = FAMILIES[config.family]
    leaves = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))}
    entries, views = tensor_entries(family, config, leaves), _tensor_views(folder, family, config)
    embedding, names = embedding_copies(family, config)
    copies = {name: views.pop(name) for name in names if name in views}
    used = set()
    for path, entry in entries.items():
        shape = leaves[path].shape
        expected = stored_shape(entry, layer_shape(entry, shape))
        for name in tensors_of(entry, shape):  # ends at the first that is missing, however many layers are claimed
            if name not in views:
                raise UserError(f"{folder}: tensor {name} is missing; the checkpoint is not whole, or config.json is "
                                "of another")  # fmt: skip
            _check_tensor(folder, name, views[name], expected)
            used.add(name)
    if unused := set(views) - used:
        raise UserError(f"{folder}: tensor {min(unused)} has no place in {family.architecture}; is config.json of this "
                        "checkpoint?")  # fmt: skip
    if REWARD_TENSOR not in tensor_files(folder):  # a sequence classification has no output projection
        for name, view in copies.items():
            _check_tensor(folder, name, view, tuple(views[embedding].get_shape()))
            _check_copy(folder, name, view, embedding, views[embedding])
    return entries, views


def _check_copy(folder: Path, name: str, view: Any, embedding: str, embedding_view: Any) -> None:
    """Raises UserError when a tensor that the model shares with the embedding has other values; reads row blocks."""
    rows, width = view.get_shape()
    block = max(MEBIBYTE // width, 1)
    for start in range(0, rows, block):
        stop = min(start + block, rows)
        if not np.array_equal(view[start:stop], embedding_view[start:stop], equal_nan=True):
            raise UserError(f"{folder}: tensor {name} differs from {embedding}, and the model uses one for both; "
                            "remove the wrong one, or if both are meant, set tie_word_embeddings of config.json to "
                            "false")  # fmt: skip


def _check_tensor(folder: Path, name: str, view: Any, expected: tuple[int, ...]) -> None:
    """Raises UserError when a tensor has another shape than expected, or is not of floats."""
    shape, dtype = tuple(view.get_shape()), view.get_dtype()
    if shape != expected:
        raise UserError(f"{folder}: tensor {name} has shape {shape}, config.json says {expected}; is it of this "
                        "checkpoint?")  # fmt: skip
    if dtype not in FLOATS:
        raise UserError(f"{folder}: tensor {name} is of {dtype}, not of {', '.join(FLOATS)}; convert it to one")


def abstract_params(config: ModelConfig) -> Any:
    """Returns the params' tree of ShapeDtypeStructs."""
    return jax.eval_shape(build(config).init, jax.random.key(0))


def _tensor_views(folder: Path, family: Family, config: ModelConfig) -> dict[str, Any]:
    """Returns tensor name -> a safetensors slice. Names of a bare backbone get the family's prefix.

    Leaves out tensors that hold no parameter, and a reward head.
    """
    opened = functools.cache(open_tensors)
    heads = {entry.tensor for entry in family.entries(config) if entry.path == "head/kernel"}
    views = {}
    for name, file in tensor_files(folder).items():
        if is_ignored_tensor(family, name) or name == REWARD_TENSOR:
            continue
        full_name = name if name.startswith(family.prefix) or name in heads else family.prefix + name
        try:
            views[full_name] = opened(file).get_slice(name)
        except safetensors.SafetensorError:
            raise UserError(f"{folder}: {file.name} lacks tensor {name} that the index says it has") from None
    return views


def checkpoint_tensors(
    entries: Mapping[str, Entry], leaves: Mapping[str, Any], config: ModelConfig
) -> dict[str, Callable[[], np.ndarray]]:
    """Returns tensor name -> a function that makes the tensor, so that the host holds one at a time.

    ``entries`` and ``leaves`` are the entries and the values of our parameters, by path.
    """
    groups: dict[str, list[Entry]] = {}
    for entry in entries.values():
        groups.setdefault(entry.tensor, []).append(entry)
    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for name, group in groups.items():
        for layer in range(len(leaves[group[0].path])) if group[0].is_stacked else [None]:
            tensors[name.format(layer)] = functools.partial(stored_tensor, group, leaves, layer, config.heads)
    return tensors
