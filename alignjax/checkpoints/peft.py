"""Adapters <-> a folder as the PEFT library writes it: adapter_config.json and adapter_model.safetensors.

Adapters are low-rank updates of projections (LoRA, 2106.09685): W + scale A B with A [in, r] and B [r, out].
Where a checkpoint fuses projections that we keep apart (GPT-2, GPT-NeoX: q, k, v), their adapters of rank r become one
adapter of rank 3 r with A concatenated and B block-diagonal, which is the same function.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import safetensors.numpy

from alignjax.checkpoints.adapter_config import (
    CONFIG_FILE,
    WRITTEN_OPTIONS,
    is_target,
    module_rank,
    module_scale,
    read_adapter_config,
)
from alignjax.checkpoints.families import FAMILIES
from alignjax.checkpoints.folders import check_present, new_folder, open_tensors
from alignjax.checkpoints.layout import Entry, join_fused, split_fused
from alignjax.checkpoints.weights import FLOATS, abstract_params
from alignjax.distributed.sharding import path_name
from alignjax.errors import UserError
from alignjax.models.build import ModelConfig
from alignjax.models.functional import LORA
from alignjax.models.lora import Lora
from alignjax.models.t5 import T5Config
from alignjax.types import Params

TENSORS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."


# --- writing ---


def write_adapters(folder: Path, config: ModelConfig, adapters: Params, lora: Lora, base: str) -> None:
    """Writes a tree of adapters as a folder that PEFT opens; ``base`` names the checkpoint that they were trained over.

    Raises UserError when the folder exists or the tree holds anything else than adapters.
    """
    pairs, entries = _find_adapters(adapters), _projection_entries(config)
    modules: dict[str, list[str]] = {}  # PEFT's module, {} for the layer -> our paths
    for path in pairs:
        modules.setdefault(_module(entries[path]), []).append(path)
    tensors: dict[str, np.ndarray] = {}
    for module, paths in modules.items():
        for layer in range(len(pairs[paths[0]]["a"])):
            parts = {entries[p].part: {k: np.asarray(v[layer]) for k, v in pairs[p].items()} for p in paths}
            a, b = _join_adapters(parts, entries[paths[0]], config)
            tensors[f"{_PREFIX}{module.format(layer)}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{_PREFIX}{module.format(layer)}.lora_B.weight"] = np.ascontiguousarray(b.T)
    description = _adapter_config(config, modules, lora, base)
    with new_folder(folder) as partial:
        safetensors.numpy.save_file(tensors, partial / TENSORS_FILE, metadata={"format": "pt"})
        (partial / CONFIG_FILE).write_text(json.dumps(description, indent=2))


def _adapter_config(config: ModelConfig, modules: Mapping[str, list[str]], lora: Lora, base: str) -> dict[str, Any]:
    """Returns adapter_config.json. A fused module has its own rank, with the same scale alpha / r as the others."""
    names = _target_names(config)
    ranks = {names[module]: lora.rank * len(paths) for module, paths in modules.items() if len(paths) > 1}
    return {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if isinstance(config, T5Config) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(names[module] for module in modules),
        "rank_pattern": ranks,
        "alpha_pattern": {name: lora.scale * rank for name, rank in ranks.items()},
        "fan_in_fan_out": config.family == "gpt2",  # its kernels are stored [in, out]
        "lora_dropout": 0.0,
        "inference_mode": True,
        **WRITTEN_OPTIONS,
    }


def _join_adapters(
    parts: Mapping[int, Mapping[str, np.ndarray]], entry: Entry, config: ModelConfig
) -> tuple[np.ndarray, np.ndarray]:
    """Returns A [in, R] and B [R, parts * out] of a module, given {"a": [in, r], "b": [r, out]} of each adapted part.

    R is r times the number of adapted parts. B is block-diagonal, and zero for parts without an adapter.
    """
    a = np.concatenate([parts[i]["a"] for i in sorted(parts)], axis=1)
    if entry.parts == 1:
        return a, parts[0]["b"]
    width = next(iter(parts.values()))["b"].shape[1]
    order = {part: i for i, part in enumerate(sorted(parts))}
    blocks = []
    for part in range(entry.parts):
        block = np.zeros((a.shape[1], width), a.dtype)
        if part in parts:
            rank = len(parts[part]["b"])
            block[order[part] * rank : (order[part] + 1) * rank] = parts[part]["b"]
        blocks.append(block)
    return a, join_fused(blocks, entry, config.heads)


def _find_adapters(tree: Params, path: str = "") -> dict[str, dict[str, Any]]:
    """Returns {"blocks/q": {"a": ..., "b": ...}, ...}. Raises UserError when the tree holds anything else."""
    pairs: dict[str, dict[str, Any]] = {}
    for name, part in tree.items():
        if name == LORA:
            pairs[path] = part
        elif isinstance(part, dict):
            pairs |= _find_adapters(part, f"{path}/{name}" if path else name)
        else:
            raise UserError(f"{path}/{name} is no adapter; a PEFT folder has no place for it: export it merged")
    return pairs


# --- reading ---


class _AdapterFiles(NamedTuple):
    """A PEFT folder, read."""

    folder: Path
    description: dict[str, Any]  # adapter_config.json
    tensors: dict[str, np.ndarray]  # by name, without PEFT's prefix

    def rank(self) -> int:
        """Returns the largest rank of its modules; 1 when it has none."""
        return max((len(value) for name, value in self.tensors.items() if name.endswith(".lora_A.weight")), default=1)


class _Module(NamedTuple):
    """The adapter of one module of one layer."""

    names: tuple[str, str]  # of its tensors
    a: np.ndarray  # [in, r]
    b: np.ndarray  # [r, parts * out]
    scale: float


def check_files(folder: Path) -> None:
    """Raises UserError when a PEFT folder is damaged, misses a file, or does not hold plain LoRA; reads headers."""
    read_adapter_config(folder)
    _open_adapters(folder)


def read_adapters(folder: Path, config: ModelConfig) -> tuple[Lora, Params]:
    """Returns the description and the tree of a folder's adapters, for a model of ``config``.

    Adapters of different ranks are padded with zeros to the largest. All get the scale of the first one; the B of
    others is multiplied by the ratio of the scales. A projection that is adapted in any layer has adapters in all
    layers, zero where the folder has none.

    Raises UserError when a tensor is missing, misshapen, or belongs to no projection of the model.
    """
    files = _read_files(folder)
    rank = files.rank()
    shapes = {path_name(p): leaf.shape for p, leaf in jax.tree_util.tree_leaves_with_path(abstract_params(config))}
    used: set[str] = set()
    pairs: dict[str, Params] = {}
    targets: set[str] = set()
    scale: float | None = None  # of the first adapter
    for path, entry in _projection_entries(config).items():
        layers, inputs, outputs = shapes[f"{path}/kernel"]
        a, b = np.zeros((layers, inputs, rank), np.float32), np.zeros((layers, rank, outputs), np.float32)
        for layer in range(layers):
            module = _read_module(files, entry, layer, (inputs, outputs))
            if module is None:
                continue
            scale = module.scale if scale is None else scale
            module_rank = module.a.shape[1]
            a[layer, :, :module_rank] = module.a
            part = split_fused(module.b, entry, config.heads)[entry.part] if entry.parts > 1 else module.b
            b[layer, :module_rank] = part * np.float32(module.scale / scale)
            used.update(module.names)
            targets.add(_last_name(path))
        pairs[path] = {"a": a, "b": b}
    if unused := set(files.tensors) - used:
        raise UserError(
            f"{folder}: {min(unused)} has no place in a {config.family} of these sizes; is it this model's?"
        )
    adapters: Params = {}
    for path, pair in pairs.items():
        if _last_name(path) in targets:
            _set_at(adapters, path, {LORA: pair})
    return Lora(rank=rank, alpha=rank * (scale or 1.0), targets=tuple(sorted(targets))), adapters


def _read_files(folder: Path) -> _AdapterFiles:
    """Reads a PEFT folder. Raises UserError as ``check_files`` does. Warns of tensors that are not finite."""
    description, file = read_adapter_config(folder), _open_adapters(folder)
    tensors = {name.removeprefix(_PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, values in tensors.items():
        if not np.isfinite(values).all():
            warnings.warn(f"{folder}: tensor {name} holds NaN or infinity", stacklevel=2)
    return _AdapterFiles(folder, description, tensors)


def _open_adapters(folder: Path) -> Any:
    """Returns the open safetensors file. Raises UserError when it is missing, damaged, empty, or not of floats."""
    path = folder / TENSORS_FILE
    check_present(path)
    file = open_tensors(path)
    names = list(file.keys())
    if not names:
        raise UserError(f"{path} holds no tensors; fetch it again")
    for name in names:
        if (dtype := file.get_slice(name).get_dtype()) not in FLOATS:
            raise UserError(f"{path}: tensor {name} is of {dtype}, not of {', '.join(FLOATS)}; convert it to one")
    return file


def _read_module(files: _AdapterFiles, entry: Entry, layer: int, sizes: tuple[int, int]) -> _Module | None:
    """Returns the adapter of a projection (of all parts of a fused one) in one layer, or None where it has none.

    ``sizes`` are (in, out) of the projection. Raises UserError when one of the two tensors is missing or misshapen.
    """
    tensors, module = files.tensors, _module(entry).format(layer)
    name_a, name_b = (f"{module}.lora_{side}.weight" for side in "AB")
    if name_a not in tensors and name_b not in tensors:
        return None
    if name_a not in tensors or name_b not in tensors:
        missing = name_a if name_b in tensors else name_b
        raise UserError(f"{files.folder}: {missing} is missing; fetch the adapter again")
    a, b = tensors[name_a], tensors[name_b]
    rank, inputs, outputs = len(a), sizes[0], sizes[1] * entry.parts
    if a.shape != (rank, inputs) or b.shape != (outputs, rank):
        raise UserError(f"{files.folder}: {name_a} and its lora_B have shapes {a.shape}, {b.shape}; "
                        f"it needs ({rank}, {inputs}), ({outputs}, {rank})")  # fmt: skip
    if not is_target(files.description, module):
        raise UserError(f"{files.folder}: {CONFIG_FILE} leaves {module} out of target_modules or layers_to_transform, "
                        "and its tensors adapt it; give the two files of one adapter")  # fmt: skip
    if rank != (described := module_rank(files.description, module)):
        raise UserError(f"{files.folder}: {CONFIG_FILE} gives {module} the rank {described}, and its tensors have "
                        f"{rank}; give the two files of one adapter")  # fmt: skip
    scale = module_scale(files.description, module, rank)
    return _Module((name_a, name_b), a.T, np.asarray(b.T, np.float32), scale)


# --- names ---


def _projection_entries(config: ModelConfig) -> dict[str, Entry]:
    """Returns {"blocks/q": entry of its kernel, ...} for the projections that the model has in every layer."""
    paths = {path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(abstract_params(config))}
    return {
        entry.path.removesuffix("/kernel"): entry
        for entry in FAMILIES[config.family].entries(config)
        if entry.path in paths and entry.path.endswith("/kernel") and entry.is_stacked
    }


def _module(entry: Entry) -> str:
    """Returns PEFT's name of a projection's module, {} for the layer's number."""
    return entry.tensor.removesuffix(".weight")


def _target_names(config: ModelConfig) -> dict[str, str]:
    """Returns the name of each module in ``target_modules``: its last part, or the last two where one is ambiguous."""
    modules = {_module(entry) for entry in _projection_entries(config).values()}
    counts = Counter(module.rsplit(".", 1)[-1] for module in modules)
    return {
        module: ".".join(module.split(".")[-1 if counts[module.rsplit(".", 1)[-1]] == 1 else -2 :])
        for module in modules
    }


def _last_name(path: str) -> str:
    """Returns the last part of a path: "q" of "blocks/q"."""
    return path.rsplit("/", 1)[-1]


def _set_at(tree: Params, path: str, value: Params) -> None:
    """Puts ``value`` at a path of a nested dict, in place."""
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = value
