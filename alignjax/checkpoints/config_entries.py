"""The entries that the config.json of several families share: activations, rotary positions, windows, tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from alignjax.errors import UserError, short_repr
from alignjax.models.decoder import UNBOUNDED, TransformerConfig
from alignjax.models.rope import RopeScaling
from alignjax.models.t5 import T5Config

ConfigJson = Mapping[str, Any]
"""A config.json with the defaults that transformers fills in."""

ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""transformers' names of activations -> ours."""


def activation_name(c: TransformerConfig | T5Config, tanh: str = "gelu_pytorch_tanh") -> str:
    """Returns transformers' name of the activation. The approximate GELU has two names; ``tanh`` is the family's."""
    return tanh if c.activation == "gelu_tanh" else c.activation


def translate(raw: ConfigJson, key: str, table: Mapping[str, Any]) -> Any:
    """Returns what the table has for the value of ``key``. Raises UserError when the value is not supported."""
    value = str(raw.get(key))
    if value not in table:
        raise UserError(f"{key} {short_repr(value)} is not supported; {', '.join(table)} are")
    return table[value]


def require_values(raw: ConfigJson, **supported: Any) -> None:
    """Raises UserError when an option has another value than the supported one."""
    for key, value in supported.items():
        if raw.get(key, value) != value:
            raise UserError(f"{key}={short_repr(raw[key])} is not supported; use a checkpoint with {value!r}")


def read_rope_scaling(rope: ConfigJson) -> RopeScaling:
    """Returns how the rotary positions are stretched. Raises UserError on a kind that is not supported."""
    kind = translate(rope, "rope_type", {"default": "none", "linear": "linear", "llama3": "llama3"})
    if kind == "none":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    return RopeScaling(
        "llama3", float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
        rope["original_max_position_embeddings"],
    )  # fmt: skip


def write_rope(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    """Returns ``rope_parameters`` of a config.json."""
    s = scaling
    options = {
        "none": {},
        "linear": {"factor": s.factor},
        "llama3": {
            "factor": s.factor, "low_freq_factor": s.low_frequency, "high_freq_factor": s.high_frequency,
            "original_max_position_embeddings": s.original,
        },
    }[s.kind]  # fmt: skip
    return {"rope_type": "default" if s.kind == "none" else s.kind, "rope_theta": theta, **options}


def legacy_rope(family: str, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the entries that transformers 4 reads in the place of ``rope_parameters``; ``fields``: a config.json.

    Without them it takes the default theta and no scaling, and says nothing.
    """
    rope = fields.get("rope_parameters")
    if rope is None:
        return {}
    full = rope.get("full_attention", rope)
    options = {k: v for k, v in full.items() if k not in ("rope_theta", "partial_rotary_factor")}
    entries = {"rope_theta": full["rope_theta"], "rope_scaling": None if len(options) == 1 else options}
    if family == "gpt_neox":
        entries |= {"rotary_emb_base": full["rope_theta"], "rotary_pct": full["partial_rotary_factor"]}
    if family == "gemma3_text":
        entries["rope_local_base_freq"] = rope["sliding_attention"]["rope_theta"]
    return entries


def read_windows(raw: ConfigJson) -> tuple[int, ...]:
    """Returns the attention window of each layer in tokens; () when every layer attends to all."""
    size, kinds = raw["sliding_window"], raw["layer_types"]
    sizes = {"sliding_attention": size, "full_attention": UNBOUNDED}
    if unsupported := set(kinds) - set(sizes):
        raise UserError(f"layer type {min(unsupported)!r} is not supported; {' and '.join(sizes)} are")
    if "sliding_attention" not in kinds:
        return ()
    if not size:
        raise UserError(f"layer_types names sliding_attention, and sliding_window={size!r} is no size; give it")
    return tuple(sizes[kind] for kind in kinds)


def write_windows(c: TransformerConfig) -> dict[str, Any]:
    """Returns ``layer_types`` and ``sliding_window`` of a config.json."""
    kinds = ["sliding_attention" if w < UNBOUNDED else "full_attention" for w in c.windows or [UNBOUNDED] * c.layers]
    return {"layer_types": kinds, "sliding_window": min(c.windows) if c.windows else None}


def read_token(raw: ConfigJson, name: str) -> int:
    """Returns an entry that is a token, or the first of a list of tokens. Raises UserError when it is neither."""
    value = raw.get(name)
    token = value[0] if isinstance(value, list) and value else value
    if type(token) is not int:
        raise UserError(f"{name}={short_repr(value)} is no token; correct it")
    return token
