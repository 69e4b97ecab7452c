"""What a dataclass says about its own fields: which name other stages, and which cannot change a result."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator, Mapping
from typing import Any

_KINDS, _NO_EFFECT = "alignjax.kinds", "alignjax.no_effect"
NO_EFFECT = {_NO_EFFECT: True}
"""The metadata of a field that cannot change a result, for ``dataclasses.field`` of one without a default."""


class Kind(enum.Enum):
    """What a stage makes."""

    POLICY = "a policy"
    PREFERENCE = "a preference model"
    REWARD = "a reward model"  # a checkpoint with a scalar head; it writes nothing
    PAIRS = "pairs"
    REPLIES = "replies"  # to imitate; each stands alone
    TABLES = "tables"
    FINDINGS = "findings"


def stage_input(*kinds: Kind, default: Any = dataclasses.MISSING) -> Any:
    """Declares a field that holds the name of a stage (or a dict of names) which makes one of ``kinds``."""
    return dataclasses.field(default=default, metadata={_KINDS: kinds})


def no_effect(default: Any) -> Any:
    """Declares a field that cannot change a result: it is left out of fingerprints."""
    return dataclasses.field(default=default, metadata=NO_EFFECT)


def has_no_effect(field: dataclasses.Field) -> bool:
    """Returns whether the field was declared with ``no_effect``."""
    return bool(field.metadata.get(_NO_EFFECT, False))


def is_stage_input(field: dataclasses.Field) -> bool:
    """Returns whether the field was declared with ``stage_input``."""
    return _KINDS in field.metadata


def stage_inputs(node: Any, path: str = "") -> Iterator[tuple[str, str, tuple[Kind, ...]]]:
    """Yields (field path, stage name, accepted kinds) of every stage that the node and its parts name."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        for field in dataclasses.fields(node):
            value, here = getattr(node, field.name), f"{path}.{field.name}".lstrip(".")
            if _KINDS not in field.metadata:
                yield from stage_inputs(value, here)
            elif value is not None:
                names = value.items() if isinstance(value, Mapping) else [("", value)]
                yield from ((f"{here}.{key}".rstrip("."), name, field.metadata[_KINDS]) for key, name in names)
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from stage_inputs(value, f"{path}.{key}")
    elif isinstance(node, tuple):
        for index, value in enumerate(node):
            yield from stage_inputs(value, f"{path}.{index}")


def no_effect_paths(node: Any, path: str = "") -> Iterator[str]:
    """Yields the dotted path of every field, of the node and its parts, that was declared with ``no_effect``."""
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        for field in dataclasses.fields(node):
            here = f"{path}.{field.name}".lstrip(".")
            if has_no_effect(field):
                yield here
            else:
                yield from no_effect_paths(getattr(node, field.name), here)
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from no_effect_paths(value, f"{path}.{key}")
    elif isinstance(node, tuple):
        for index, value in enumerate(node):
            yield from no_effect_paths(value, f"{path}.{index}")
