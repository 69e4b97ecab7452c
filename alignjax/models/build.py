"""A configuration, of either kind, to its model; and to JSON and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from alignjax.models.decoder import TransformerConfig, transformer
from alignjax.models.model import Model
from alignjax.models.rope import RopeScaling
from alignjax.models.t5 import T5Config, t5

ModelConfig = TransformerConfig | T5Config


def build(config: ModelConfig) -> Model:
    """Raises UserError on sizes that cannot be."""
    return t5(config) if isinstance(config, T5Config) else transformer(config)


def to_json(config: ModelConfig) -> dict[str, Any]:
    return {"kind": type(config).__name__, **dataclasses.asdict(config)}


def from_json(found: Mapping[str, Any]) -> ModelConfig:
    """What ``to_json`` wrote. Raises TypeError or UserError on anything else."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in found.items()}
    if fields.pop("kind", None) == T5Config.__name__:
        return T5Config(**fields)
    return TransformerConfig(**{**fields, "rope_scaling": RopeScaling(**fields.get("rope_scaling", {}))})
