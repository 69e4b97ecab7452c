"""Safetensors <-> params, tensor by tensor: a checkpoint never lies on the host whole."""

from __future__ import annotations

import functools
import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from alignjax.checkpoints.families import FAMILIES, Family, entries, is_ignored
from alignjax.checkpoints.names import Entry
from alignjax.distributed.sharding import path_name
from alignjax.errors import UserError, one_line
from alignjax.models.build import ModelConfig, build
from alignjax.types import Params

MEBIBYTE = 2**20
SCORE = "score.weight"  # a sequence classification's head
FLOATS = ("F64", "F32", "F16", "BF16")  # as safetensors names them


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); give a Hugging Face folder") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; fetch it again")
    return found


def content(folder: Path) -> str:
    """A mark of what lies in a folder, empty when there is none: its files' names and sizes, the whole of those below
    64 MiB, and of larger ones a thousand pieces of 4 KiB from end to end, which no retraining leaves as they were."""
    if folder == Path():  # an empty path is no folder, and not the current one
        return ""
    mark = hashlib.sha256()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and path.suffix in (".json", ".jinja", ".safetensors", ".model", ".txt"):
            size = path.stat().st_size
            mark.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                if size <= 64 * MEBIBYTE:
                    mark.update(file.read())
                    continue
                for piece in range(1001):
                    file.seek(piece * (size - 4096) // 1000)
                    mark.update(file.read(4096))
    return mark.hexdigest()[:16] if folder.is_dir() else ""


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it (one file, or shards with an index)."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise UserError(f"{index} is damaged: it has no weight_map of names to files; fetch it again")
        for file in names.values():
            if Path(file).name != file or file == ".." or "\0" in file:
                raise UserError(f"{index}: shard {file!r} points outside the folder; mend the index")
            if not file.endswith(".safetensors"):
                raise UserError(f"{index}: shard {file!r} is no safetensors file; convert it to one")
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if not single.exists():
        pickles = [path.name for path in sorted(folder.glob("*")) if path.suffix in (".bin", ".pt", ".pth", ".ckpt")]
        mend = f"convert {pickles[0]} to safetensors" if pickles else "give a folder that has it"
        raise UserError(f"{single} is missing; {mend}")
    with open_tensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def open_tensors(path: Path):
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged or missing ({one_line(error)}); fetch it again") from None


def read_params(folder: Path, config: ModelConfig, shardings: Any = None, dtype: Any = np.float32) -> Params:
    """Safetensors -> params of ``dtype``, layers stacked: NumPy arrays, or with ``shardings`` (a tree) arrays on the
    devices. Each distinct shard is read by its own byte ranges, once, and let go when the devices have it: the host
    holds one shard at a time, and of one tensor the part that goes into it.

    UserError names a tensor that is missing, left over, misshapen or no float, before any is read; one that holds NaN
    or infinity in ``dtype`` is warned of.
    """
    shapes, (table, views) = parameter_shapes(config), check_tensors(folder, config)
    warned: set[str] = set()

    def leaf(path: Any, spec: jax.ShapeDtypeStruct, where: Any) -> Any:
        entry = table[path_name(path)]
        names = list(tensor_names(entry, spec.shape))
        stacked = "{}" in entry.theirs
        shape = spec.shape[1:] if stacked else spec.shape

        def piece(index: tuple[slice, ...]) -> np.ndarray:
            out = np.empty([part.stop - part.start for part in index], dtype)
            for row, name in zip(out if stacked else [out], names[index[0]] if stacked else names, strict=True):
                with np.errstate(over="ignore"):  # warned of below
                    row[:] = read_piece(views[name], entry, shape, index[1:] if stacked else index, config.heads)
                if name not in warned and not is_finite(row):
                    warned.add(name)
                    warnings.warn(f"{folder}: tensor {name} holds NaN or infinity as {row.dtype}", stacklevel=2)
            return out

        return piece(tuple(slice(0, n) for n in spec.shape)) if where is None else placed(spec.shape, where, piece)

    places = shardings if shardings is not None else jax.tree.map(lambda _: None, shapes)
    return jax.tree_util.tree_map_with_path(leaf, shapes, places, is_leaf=lambda x: x is None)


def read_reward(folder: Path, width: int) -> Params:
    """{"reward": {"kernel": [width]}} of a sequence classification's folder, or nothing. UserError when it tells more
    than one label."""
    if SCORE not in (files := tensor_files(folder)):
        return {}
    found = open_tensors(files[SCORE]).get_tensor(SCORE)
    if found.shape != (1, width):
        raise UserError(
            f"{folder}: {SCORE} has shape {found.shape}, a reward's is (1, {width}); give a model of one label"
        )
    return {"reward": {"kernel": found[0].astype(np.float32)}}


def placed(
    shape: tuple[int, ...], where: jax.sharding.Sharding, piece: Callable[[tuple[slice, ...]], np.ndarray]
) -> jax.Array:
    """The array of that sharding whose shards ``piece`` makes, one at a time, and once however many devices hold it
    (``make_array_from_callback`` makes one for every device, and all before the first is moved)."""
    holders: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in where.addressable_devices_indices_map(shape).items():
        ends = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape, strict=True))
        holders.setdefault(ends, []).append(device)
    shards = []
    for ends, devices in holders.items():
        shard = piece(tuple(slice(*pair) for pair in ends))
        shards += jax.block_until_ready(jax.device_put([shard] * len(devices), devices))
    return jax.make_array_from_single_device_arrays(shape, where, shards)


def is_finite(values: np.ndarray) -> bool:
    """Block by block, so that the mask is never as large as the values."""
    flat = values.reshape(-1)
    return all(np.isfinite(flat[i : i + MEBIBYTE]).all() for i in range(0, len(flat), MEBIBYTE))


def check_tensors(folder: Path, config: ModelConfig) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Our parameters' entries and the tensors' views, by name; headers alone are read. UserError unless they fit."""
    family = FAMILIES[config.family]
    leaves = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes(config))}
    table, views = entries(family, config, leaves), tensor_views(folder, family, config)
    used = set()
    for path, entry in table.items():
        shape = leaves[path].shape
        wanted = their_shape(entry, shape[1:] if "{}" in entry.theirs else shape)
        for name in tensor_names(entry, shape):
            if name not in views:
                raise UserError(f"{folder}: tensor {name} is missing; the checkpoint is not whole, or config.json is "
                                "of another")  # fmt: skip
            found, kind = tuple(views[name].get_shape()), views[name].get_dtype()
            if found != wanted:
                raise UserError(f"{folder}: tensor {name} has shape {found}, config.json says {wanted}; is it of this "
                                "checkpoint?")  # fmt: skip
            if kind not in FLOATS:
                raise UserError(f"{folder}: tensor {name} is of {kind}, not of {', '.join(FLOATS)}; convert it to one")
            used.add(name)
    if left := set(views) - used:
        raise UserError(f"{folder}: tensor {min(left)} has no place in {family.architecture}; is config.json of this "
                        "checkpoint?")  # fmt: skip
    return table, views


def parameter_shapes(config: ModelConfig) -> Any:
    return jax.eval_shape(build(config).init, jax.random.key(0))


def tensor_views(folder: Path, family: Family, config: ModelConfig) -> dict[str, Any]:
    """Tensor name -> a view that reads ranges. A bare backbone's names get the family's prefix; what holds no
    parameter, and the head of a tied model, are left out."""
    opened = functools.cache(open_tensors)
    heads = {entry.theirs for entry in family.table(config) if entry.ours == "head/kernel"}
    found = {}
    for name, file in tensor_files(folder).items():
        if is_ignored(family, name) or (config.tied and name in heads) or name == SCORE:
            continue
        full = name if name.startswith(family.prefix) or name in heads else family.prefix + name
        try:
            found[full] = opened(file).get_slice(name)
        except safetensors.SafetensorError:
            raise UserError(f"{folder}: {file.name} lacks tensor {name} that the index says it has") from None
    return found


def tensor_names(entry: Entry, shape: Sequence[int]) -> Iterator[str]:
    """The tensors that one of our parameters of that shape lies in: one a layer, or one."""
    return map(entry.theirs.format, range(shape[0] if "{}" in entry.theirs else 1))


def their_shape(entry: Entry, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The tensor's shape, from that of ours."""
    fused = (*shape[:-1], shape[-1] * entry.parts)
    return fused[::-1] if entry.turned else fused


def read_piece(view: Any, entry: Entry, shape: tuple[int, ...], index: tuple[slice, ...], heads: int) -> np.ndarray:
    """What ``index`` cuts out of one of our matrices or vectors of that shape. Of a tensor that holds several, our
    part alone is read, or where they alternate, the heads that the cut touches."""
    start, stop, size = index[-1].start, index[-1].stop, shape[-1]
    head = size // heads if entry.by_head else 1
    first, last = start // head, -(-stop // head)
    cut = slice(first * head * entry.parts, last * head * entry.parts)
    if not entry.by_head:
        cut = slice(entry.part * size + start, entry.part * size + stop)
    theirs = (cut, *index[-2::-1]) if entry.turned else (*index[:-1], cut)
    value = view[theirs if len(theirs) > 1 else theirs[0]]
    value = value.T if entry.turned else value
    if not entry.by_head:
        return value
    return split(value, entry, last - first)[entry.part][..., start - first * head : stop - first * head]


def split(fused: np.ndarray, entry: Entry, heads: int) -> list[np.ndarray]:
    """The parts of a fused output axis."""
    if not entry.by_head:
        return np.split(fused, entry.parts, axis=-1)
    by_head = fused.reshape(*fused.shape[:-1], heads, entry.parts, -1)
    return [by_head[..., i, :].reshape(*fused.shape[:-1], -1) for i in range(entry.parts)]


def fuse(parts: Sequence[np.ndarray], entry: Entry, heads: int) -> np.ndarray:
    """What ``split`` takes apart."""
    if not entry.by_head:
        return np.concatenate(parts, axis=-1)
    by_head = [part.reshape(*part.shape[:-1], heads, -1) for part in parts]
    return np.stack(by_head, axis=-2).reshape(*parts[0].shape[:-1], -1)


def their_tensors(
    table: Mapping[str, Entry], leaves: Mapping[str, Any], config: ModelConfig
) -> dict[str, Callable[[], np.ndarray]]:
    """Tensor name -> what makes it, so that one at a time is on the host."""
    groups: dict[str, list[Entry]] = {}
    for entry in table.values():
        groups.setdefault(entry.theirs, []).append(entry)

    def make(group: list[Entry], layer: int | None) -> np.ndarray:
        parts = [
            leaves[e.ours] if layer is None else leaves[e.ours][layer] for e in sorted(group, key=lambda e: e.part)
        ]
        arrays = [np.asarray(part) for part in parts]
        value = arrays[0] if len(arrays) == 1 else fuse(arrays, group[0], config.heads)
        return np.ascontiguousarray(value.T if group[0].turned else value)

    tensors: dict[str, Callable[[], np.ndarray]] = {}
    for name, group in groups.items():
        for layer in range(len(leaves[group[0].ours])) if "{}" in name else [None]:
            tensors[name.format(layer)] = functools.partial(make, group, layer)
    return tensors


def write_tensors(folder: Path, tensors: Mapping[str, Callable[[], np.ndarray]], shard: int) -> None:
    """Safetensors of at most ``shard`` bytes (or one tensor), and their index when there are several."""
    files: list[list[str]] = []
    held: dict[str, np.ndarray] = {}

    def flush() -> None:
        safetensors.numpy.save_file(held, folder / f"{len(files)}.part", metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    total = 0
    for name, make in tensors.items():
        value = make()
        total += value.nbytes
        if held and sum(v.nbytes for v in held.values()) + value.nbytes > shard:
            flush()
        held[name] = value
    flush()
    single = len(files) == 1
    named = [
        "model.safetensors" if single else f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))
    ]
    for i, name in enumerate(named):
        (folder / f"{i}.part").rename(folder / name)
    if not single:
        where = {tensor: file for file, names in zip(named, files, strict=True) for tensor in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
