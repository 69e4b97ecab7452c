"""How one of our parameters is laid out in a checkpoint's tensors: names, transposition, fused projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np


class Entry(NamedTuple):
    """Where one of our parameters lies in a checkpoint."""

    path: str  # of our parameter: "blocks/q/kernel"
    tensor: str  # the tensor's name; {} stands for the layer's number
    transposed: bool = False  # the tensor is stored [out, in]
    part: int = 0  # which of the ``parts`` equal parts of the tensor's output axis is ours
    parts: int = 1  # how many projections the tensor fuses
    by_head: bool = False  # the parts alternate head by head, as in GPT-NeoX: q0 k0 v0 q1 k1 v1 ...

    @property
    def is_stacked(self) -> bool:
        """Whether the checkpoint holds one tensor a layer, which we stack along a leading axis."""
        return "{}" in self.tensor


def tensors_of(entry: Entry, shape: Sequence[int]) -> Iterator[str]:
    """Returns the names of the tensors that hold a parameter of ``shape``: one a layer, or one."""
    return map(entry.tensor.format, range(shape[0] if entry.is_stacked else 1))


def layer_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of one layer of a parameter of ``shape``: without the leading axis where it is stacked."""
    return shape[1:] if entry.is_stacked else shape


def stored_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of the checkpoint's tensor, given that of one layer of ours: [in, out] or [out]."""
    fused = (*shape[:-1], shape[-1] * entry.parts)
    return fused[::-1] if entry.transposed else fused


def read_block(view: Any, entry: Entry, shape: tuple[int, ...], block: tuple[slice, ...], heads: int) -> np.ndarray:
    """Returns the ``block`` of one layer of our parameter, whose shape is [in, out] or [out].

    ``view`` is a safetensors slice, which reads ranges. Of a fused tensor, only our part is read. Where the parts
    alternate head by head, all parts of the heads that the block touches are read.
    """
    low, high, size = block[-1].start, block[-1].stop, shape[-1]
    head_size = size // heads if entry.by_head else 1
    first, last = low // head_size, -(-high // head_size)
    if entry.by_head:
        outputs = slice(first * head_size * entry.parts, last * head_size * entry.parts)
    else:
        outputs = slice(entry.part * size + low, entry.part * size + high)
    index = (outputs, *block[-2::-1]) if entry.transposed else (*block[:-1], outputs)
    values = view[index if len(index) > 1 else index[0]]
    values = values.T if entry.transposed else values
    if not entry.by_head:
        return values
    return split_fused(values, entry, last - first)[entry.part][..., low - first * head_size : high - first * head_size]


def split_fused(fused: np.ndarray, entry: Entry, heads: int) -> list[np.ndarray]:
    """Splits the output axis of a fused projection, [..., parts * out], into its parts, each [..., out]."""
    if not entry.by_head:
        return np.split(fused, entry.parts, axis=-1)
    by_head = fused.reshape(*fused.shape[:-1], heads, entry.parts, -1)
    return [by_head[..., i, :].reshape(*fused.shape[:-1], -1) for i in range(entry.parts)]


def join_fused(parts: Sequence[np.ndarray], entry: Entry, heads: int) -> np.ndarray:
    """Joins projections [..., out] into one fused output axis [..., parts * out]: the inverse of ``split_fused``."""
    if not entry.by_head:
        return np.concatenate(parts, axis=-1)
    by_head = [part.reshape(*part.shape[:-1], heads, -1) for part in parts]
    return np.stack(by_head, axis=-2).reshape(*parts[0].shape[:-1], -1)


def stored_tensor(entries: Sequence[Entry], leaves: Mapping[str, Any], layer: int | None, heads: int) -> np.ndarray:
    """Returns one tensor of a checkpoint, made of the parameters that ``entries`` place in it.

    ``leaves`` are our parameters by path; ``layer`` selects a row of stacked ones, None the whole of others.
    """
    ordered = sorted(entries, key=lambda entry: entry.part)
    parts = [leaves[entry.path] if layer is None else leaves[entry.path][layer] for entry in ordered]
    arrays = [np.asarray(part) for part in parts]
    values = arrays[0] if len(arrays) == 1 else join_fused(arrays, entries[0], heads)
    return np.ascontiguousarray(values.T if entries[0].transposed else values)
