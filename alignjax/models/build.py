"""From a configuration of either kind to its model, and to JSON and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from alignjax.models.config import T5Config, TransformerConfig
from alignjax.models.decoder import decoder
from alignjax.models.model import Model
from alignjax.models.rope import RopeScaling
from alignjax.models.t5 import t5

ModelConfig = TransformerConfig | T5Config


def build(config: ModelConfig) -> Model:
    """Returns the model of a configuration. Raises UserError when sizes of the configuration contradict each other."""
    return t5(config) if isinstance(config, T5Config) else decoder(config)


def to_json(config: ModelConfig) -> dict[str, Any]:
    """Returns the configuration as a JSON object; its "kind" is the name of the configuration's class."""
    return {"kind": type(config).__name__, **dataclasses.asdict(config)}


def from_json(json: Mapping[str, Any]) -> ModelConfig:
    """Returns the configuration that ``to_json`` described. Raises TypeError or UserError on any other object."""
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in json.items()}
    if fields.pop("kind", None) == T5Config.__name__:
        return T5Config(**fields)
    return TransformerConfig(**{**fields, "rope_scaling": RopeScaling(**fields.get("rope_scaling", {}))})
