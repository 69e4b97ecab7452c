"""Adapters <-> a folder as the PEFT library writes it: adapter_config.json and adapter_model.safetensors.

Where a checkpoint fuses projections that we keep apart (GPT-2, GPT-NeoX: q, k, v), their adapters of rank r become one
of rank 3 r, A stacked and B by blocks, which is the same function.
"""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from alignjax.checkpoints.families import FAMILIES
from alignjax.checkpoints.names import Entry
from alignjax.checkpoints.weights import fuse, open_tensors, parameter_shapes, read_object, split
from alignjax.distributed.sharding import path_name
from alignjax.errors import UserError
from alignjax.models.build import ModelConfig
from alignjax.models.functional import LORA
from alignjax.models.lora import Lora
from alignjax.models.t5 import T5Config
from alignjax.types import Params

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
REFUSED = {"use_dora": False, "bias": "none", "modules_to_save": None, "lora_bias": False, "layer_replication": None,
           "use_qalora": False, "alora_invocation_tokens": None}  # fmt: skip


def write_adapters(folder: Path, config: ModelConfig, small: Params, lora: Lora, base: str) -> None:
    """Writes the small tree; ``base`` is what the folder says it was trained over. UserError when the folder exists or
    the tree holds more than adapters."""
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder")
    found = adapters_in(small)
    modules = kernels(config)
    groups: dict[str, list[str]] = {}
    for path in found:
        groups.setdefault(modules[path].theirs.removesuffix(".weight"), []).append(path)
    tensors: dict[str, np.ndarray] = {}
    for module, paths in groups.items():
        for layer in range(len(found[paths[0]]["a"])):
            a, b = joined({modules[p].part: {k: np.asarray(v[layer]) for k, v in found[p].items()} for p in paths},
                          modules[paths[0]], config)  # fmt: skip
            tensors[f"{PREFIX}{module.format(layer)}.lora_A.weight"] = np.ascontiguousarray(a.T)
            tensors[f"{PREFIX}{module.format(layer)}.lora_B.weight"] = np.ascontiguousarray(b.T)
    names = suffixes(config)
    ranks = {names[module]: lora.rank * len(paths) for module, paths in groups.items() if len(paths) > 1}
    said = {
        "peft_type": "LORA",
        "task_type": "SEQ_2_SEQ_LM" if isinstance(config, T5Config) else "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": sorted(names[module] for module in groups),
        "rank_pattern": ranks,
        "alpha_pattern": {name: lora.scale * rank for name, rank in ranks.items()},
        "fan_in_fan_out": config.family == "gpt2",  # its kernels are stored [in, out]
        "lora_dropout": 0.0,
        "inference_mode": True,
        **REFUSED,
    }
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    safetensors.numpy.save_file(tensors, beside / TENSORS, metadata={"format": "pt"})
    (beside / CONFIG).write_text(json.dumps(said, indent=2))
    beside.rename(folder)


def joined(parts: Mapping[int, Mapping[str, np.ndarray]], entry: Entry, config: ModelConfig) -> tuple[Any, Any]:
    """The adapters of a module's parts as one: A [in, R], B [R, out of all parts]."""
    a = np.concatenate([parts[i]["a"] for i in sorted(parts)], axis=1)
    if entry.parts == 1:
        return a, parts[0]["b"]
    width = next(iter(parts.values()))["b"].shape[1]
    rows = {part: i for i, part in enumerate(sorted(parts))}
    blocks = []
    for part in range(entry.parts):
        block = np.zeros((a.shape[1], width), a.dtype)
        if part in parts:
            rank = len(parts[part]["b"])
            block[rows[part] * rank : (rows[part] + 1) * rank] = parts[part]["b"]
        blocks.append(block)
    return a, fuse(blocks, entry, config.heads)


def read_lora(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises UserError on what is not plain LoRA, by name."""
    said = read_object(folder / CONFIG)
    if said.get("peft_type") != "LORA":
        raise UserError(f"{folder / CONFIG}: peft_type {said.get('peft_type')!r} is not supported; LORA is")
    for name, plain in REFUSED.items():
        if said.get(name, plain) not in (plain, None, []):
            raise UserError(f"{folder / CONFIG}: {name}={said[name]!r} is not supported; merge it with PEFT first")
    if str(said.get("init_lora_weights", True)).lower() not in ("true", "false", "gaussian", "orthogonal", "eva"):
        raise UserError(f"{folder / CONFIG}: init_lora_weights={said['init_lora_weights']!r} changes the base too; "
                        "merge it with PEFT first")  # fmt: skip
    return said


def read_adapters(folder: Path, config: ModelConfig) -> tuple[Lora, Params]:
    """Adapters of a folder for a model of ``config``: what they are, and the small tree.

    Modules of different ranks are filled up to the largest with zeros; of different scales, B takes up the difference.
    UserError names a tensor that is missing, misshapen or belongs to no projection of the model.
    """
    said = read_lora(folder)
    with open_tensors(folder / TENSORS) as file:
        tensors = {name.removeprefix(PREFIX): file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    shapes = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes(config))}
    modules = kernels(config)
    if not tensors:
        raise UserError(f"{folder / TENSORS} holds no tensors; fetch it again")
    ranks = {name: len(value) for name, value in tensors.items() if name.endswith(".lora_A.weight")}
    rank = max(ranks.values(), default=1)
    used: set[str] = set()
    small: Params = {}
    found: dict[str, Params] = {}
    targets: set[str] = set()
    first: float | None = None
    for path, entry in modules.items():
        layers, inputs, outputs = shapes[f"{path}/kernel"].shape
        a, b = np.zeros((layers, inputs, rank), np.float32), np.zeros((layers, rank, outputs), np.float32)
        module, here = entry.theirs.removesuffix(".weight"), 0
        for layer in range(layers):
            one, other = (f"{module.format(layer)}.lora_{side}.weight" for side in "AB")
            if one not in tensors and other not in tensors:
                continue
            if one not in tensors or other not in tensors:
                raise UserError(f"{folder}: {one if other in tensors else other} is missing; fetch the adapter again")
            r, whole = ranks[one], (outputs * entry.parts)
            if tensors[one].shape != (r, inputs) or tensors[other].shape != (whole, r):
                raise UserError(f"{folder}: {one} and its lora_B have shapes {tensors[one].shape}, "
                                f"{tensors[other].shape}; it needs ({r}, {inputs}), ({whole}, {r})")  # fmt: skip
            scale = scale_of(said, module.format(layer), r)
            first = scale if first is None else first
            a[layer, :, :r] = tensors[one].T
            wide = np.asarray(tensors[other].T, np.float32)
            wide = split(wide, entry, config.heads)[entry.part] if entry.parts > 1 else wide
            b[layer, :r] = wide * np.float32(scale / first)
            used |= {one, other}
            here += 1
        found[path] = {"a": a, "b": b}
        if here:
            targets.add(path.rsplit("/", 1)[-1])
    for path, adapter in found.items():  # a projection that is adapted anywhere has its place everywhere, zero or not
        if path.rsplit("/", 1)[-1] in targets:
            put(small, path, {LORA: adapter})
    if left := set(tensors) - used:
        raise UserError(f"{folder}: {min(left)} has no place in a {config.family} of these sizes; is it this model's?")
    return Lora(rank=rank, alpha=rank * (first or 1.0), targets=tuple(sorted(targets))), small


def scale_of(said: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / r of a module of that rank, or alpha / sqrt(r) where the folder says so. A pattern's key is a regular
    expression over the module's full name or its last parts, as PEFT matches them."""
    patterns = (said.get("alpha_pattern") or {}).items()
    found = [alpha for key, alpha in patterns if re.match(rf"(.*\.)?({key})$", module)]
    return float(found[0] if found else said["lora_alpha"]) / (rank**0.5 if said.get("use_rslora") else rank)


def adapters_in(small: Params, path: str = "") -> dict[str, dict[str, Any]]:
    """ "blocks/q" -> {"a", "b"}. UserError on what is no adapter."""
    found: dict[str, dict[str, Any]] = {}
    for name, part in small.items():
        if name == LORA:
            found[path] = part
        elif isinstance(part, dict):
            found |= adapters_in(part, f"{path}/{name}" if path else name)
        else:
            raise UserError(f"{path}/{name} is no adapter; a PEFT folder has no place for it: export it merged")
    return found


def put(tree: Params, path: str, value: Params) -> None:
    *above, name = path.split("/")
    for part in above:
        tree = tree.setdefault(part, {})
    tree[name] = value


def kernels(config: ModelConfig) -> dict[str, Entry]:
    """ "blocks/q" -> where its kernel lies, for the projections of every layer that the model has."""
    shapes = {path_name(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(parameter_shapes(config))}
    return {
        entry.ours.removesuffix("/kernel"): entry
        for entry in FAMILIES[config.family].table(config)
        if entry.ours in shapes and entry.ours.endswith("/kernel") and "{}" in entry.theirs
    }


def suffixes(config: ModelConfig) -> dict[str, str]:
    """Module -> how target_modules names it: by its last part, or its last two where that names another as well."""
    modules = {entry.theirs.removesuffix(".weight") for entry in kernels(config).values()}
    last = Counter(module.rsplit(".", 1)[-1] for module in modules)
    return {
        module: ".".join(module.split(".")[-1 if last[module.rsplit(".", 1)[-1]] == 1 else -2 :]) for module in modules
    }
