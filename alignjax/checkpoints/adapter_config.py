"""adapter_config.json of the PEFT library: what it may say, and what it says of one module."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignjax.checkpoints.folders import read_json_object
from alignjax.errors import UserError, short_repr

CONFIG_FILE = "adapter_config.json"
WRITTEN_OPTIONS = {
    "use_dora": False, "bias": "none", "modules_to_save": None, "lora_bias": False, "layer_replication": None,
    "use_qalora": False, "alora_invocation_tokens": None,
}  # fmt: skip
"""Options of PEFT with the values that mean plain LoRA."""
_PLAIN = WRITTEN_OPTIONS | dict.fromkeys(
    ("layers_pattern", "target_parameters", "use_bdlora", "arrow_config", "kasa_config", "monteclora_config")
)
"""As ``WRITTEN_OPTIONS``, with those that older releases do not know. Other values are refused."""
_KEEPS_BASE = ("true", "false", "gaussian", "orthogonal", "eva")
"""Values of ``init_lora_weights`` that leave the base as it is."""


def read_adapter_config(folder: Path) -> dict[str, Any]:
    """Returns adapter_config.json.

    Raises UserError when it describes anything else than plain LoRA, and on a rank, an alpha, a pattern or names of
    modules that cannot be.
    """
    path = folder / CONFIG_FILE
    description = read_json_object(path)
    if description.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type {short_repr(description.get('peft_type'))} is not supported; LORA is")
    for name, plain in _PLAIN.items():
        if description.get(name, plain) not in (plain, None, []):
            value = short_repr(description[name])
            raise UserError(f"{path}: {name}={value} is not supported; merge it with PEFT first")
    if str(description.get("init_lora_weights", True)).lower() not in _KEEPS_BASE:
        value = short_repr(description["init_lora_weights"])
        raise UserError(f"{path}: init_lora_weights={value} changes the base too; merge it with PEFT first")
    _check_number(path, description, "r", int)
    _check_number(path, description, "lora_alpha", int | float)
    _check_patterns(path, description, "rank_pattern", int)
    _check_patterns(path, description, "alpha_pattern", int | float)
    _check_names(path, description)
    return description


def _check_number(path: Path, values: Mapping[str, Any], name: str, kind: Any) -> None:
    """Raises UserError unless the entry ``name`` is a positive number of the kind."""
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, kind) or not 0 < value < math.inf:
        what = f"{name}={short_repr(value)}" if name in values else f"it has no {name!r}, which"
        raise UserError(f"{path}: {what} must be a positive {'integer' if kind is int else 'number'}; correct it")


def _check_patterns(path: Path, description: Mapping[str, Any], name: str, kind: Any) -> None:
    """Raises UserError unless the entry ``name`` is a mapping of regular expressions to positive numbers."""
    patterns = description.get(name, {})
    if not isinstance(patterns, dict):
        raise UserError(f"{path}: {name}={short_repr(patterns)} is no mapping of names to numbers; correct it")
    for key in patterns:
        _check_expression(path, name, key)
        _check_number(path, patterns, key, kind)


def _check_expression(path: Path, name: str, text: str) -> None:
    """Raises UserError unless a text in the entry ``name`` is a regular expression."""
    try:
        re.compile(text)
    except re.error as error:
        raise UserError(f"{path}: {name} has {text!r}, which is no regular expression ({error}); correct it") from None


def _check_names(path: Path, description: Mapping[str, Any]) -> None:
    """Raises UserError unless the entries that say which modules are adapted are names, and numbers of layers."""
    for name in ("target_modules", "exclude_modules"):
        names: Any = description.get(name) or (None if name == "target_modules" else [])
        if isinstance(names, str):
            _check_expression(path, name, names)
        elif not isinstance(names, list) or not all(isinstance(part, str) for part in names):
            raise UserError(f"{path}: {name}={short_repr(description.get(name))} is no list of modules; correct it")
    layers = description.get("layers_to_transform")
    if layers is not None and not all(type(i) is int for i in (layers if isinstance(layers, list) else [layers])):
        raise UserError(f"{path}: layers_to_transform={short_repr(layers)} is no list of layers; correct it")


def is_target(description: Mapping[str, Any], module: str) -> bool:
    """Returns whether PEFT adapts a module of this full name, whatever tensors there are."""
    targets, layers = description["target_modules"], description.get("layers_to_transform")
    if _fits(description.get("exclude_modules") or [], module) or not _fits(targets, module):
        return False
    if layers in (None, []) or module in targets:
        return True
    number = re.search(r"\.(\d+)\.", module)
    return number is not None and int(number[1]) in (layers if isinstance(layers, list) else [layers])


def _fits(names: str | list[str], module: str) -> bool:
    """Returns whether names cover a module: an expression of the whole name, or a list of whole names or last parts."""
    if isinstance(names, str):
        return names == "all-linear" or re.fullmatch(names, module) is not None
    return any(f".{module}".endswith(f".{name}") for name in names)


def module_rank(description: Mapping[str, Any], module: str) -> int:
    """Returns the rank r of a module."""
    return _pattern_value(description, "rank_pattern", "r", module)


def module_scale(description: Mapping[str, Any], module: str, rank: int) -> float:
    """Returns alpha / r of a module of rank r, or alpha / sqrt(r) with ``use_rslora`` (2312.03732)."""
    alpha = float(_pattern_value(description, "alpha_pattern", "lora_alpha", module))
    return alpha / (rank**0.5 if description.get("use_rslora") else rank)


def _pattern_value(description: Mapping[str, Any], patterns: str, default: str, module: str) -> Any:
    """Returns a module's value: the first of ``patterns`` that fits its name, else that of ``default``.

    A key is a regular expression that matches the module's full name or its last parts, as in PEFT.
    """
    values = description.get(patterns, {}).items()
    return next((value for key, value in values if re.match(rf"(.*\.)?({key})$", module)), description[default])
