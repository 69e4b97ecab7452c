"""Each family's config.json as our configuration, and back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from alignjax.checkpoints.names import ATTENTION, MLP
from alignjax.errors import UserError
from alignjax.models.decoder import UNBOUNDED, TransformerConfig
from alignjax.models.rope import RopeScaling
from alignjax.models.t5 import T5Config

Raw = Mapping[str, Any]
"""A config.json as transformers completes it."""

ACTIVATIONS = {
    "relu": "relu",
    "silu": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}


def activation_json(c: TransformerConfig | T5Config, tanh: str = "gelu_pytorch_tanh") -> str:
    """The activation's name there; the approximate GELU has two."""
    return tanh if c.activation == "gelu_tanh" else c.activation


def named(raw: Raw, key: str, known: Mapping[str, Any]) -> Any:
    """What a value of config.json is here. Raises UserError on one that is not supported."""
    value = str(raw.get(key))
    if value not in known:
        raise UserError(f"{key} {value!r} is not supported; {', '.join(known)} are")
    return known[value]


def refuse(raw: Raw, **wanted: Any) -> None:
    """Raises UserError on an option that has another value than the supported one."""
    for key, value in wanted.items():
        if raw.get(key, value) != value:
            raise UserError(f"{key}={raw[key]!r} is not supported; use a checkpoint with {value!r}")


def scaling(rope: Raw) -> RopeScaling:
    kind = named(rope, "rope_type", {"default": "none", "linear": "linear", "llama3": "llama3"})
    if kind == "none":
        return RopeScaling()
    if kind == "linear":
        return RopeScaling("linear", float(rope["factor"]))
    return RopeScaling(
        "llama3", float(rope["factor"]), float(rope["low_freq_factor"]), float(rope["high_freq_factor"]),
        rope["original_max_position_embeddings"],
    )  # fmt: skip


def rope_json(theta: float, scaling: RopeScaling) -> dict[str, Any]:
    s = scaling
    more = {
        "none": {},
        "linear": {"factor": s.factor},
        "llama3": {
            "factor": s.factor, "low_freq_factor": s.low_frequency, "high_freq_factor": s.high_frequency,
            "original_max_position_embeddings": s.original,
        },
    }[s.kind]  # fmt: skip
    return {"rope_type": "default" if s.kind == "none" else s.kind, "rope_theta": theta, **more}


def windows(raw: Raw) -> tuple[int, ...]:
    """Tokens that each layer sees; empty when every layer sees all."""
    size, kinds = raw.get("sliding_window"), raw.get("layer_types")
    if kinds is None:
        return (size,) * raw["num_hidden_layers"] if size else ()
    known: dict[str, int] = {"sliding_attention": size or 0, "full_attention": UNBOUNDED}
    if unknown := set(kinds) - set(known):
        raise UserError(f"layer type {min(unknown)!r} is not supported; {' and '.join(known)} are")
    return tuple(known[kind] for kind in kinds) if size and "sliding_attention" in kinds else ()


def layer_types(c: TransformerConfig) -> dict[str, Any]:
    kinds = ["sliding_attention" if w < UNBOUNDED else "full_attention" for w in c.windows or [UNBOUNDED] * c.layers]
    return {"layer_types": kinds, "sliding_window": min(c.windows) if c.windows else None}


def common(raw: Raw) -> dict[str, Any]:
    """The fields that Llama and its kin name alike."""
    heads, width = raw["num_attention_heads"], raw["hidden_size"]
    return {
        "vocab_size": raw["vocab_size"],
        "width": width,
        "layers": raw["num_hidden_layers"],
        "heads": heads,
        "kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": raw.get("head_dim") or width // heads,
        "hidden": raw["intermediate_size"],
        "context": raw["max_position_embeddings"],
        "tied": raw["tie_word_embeddings"],
        "initializer_range": raw["initializer_range"],
    }


def common_json(c: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size, "hidden_size": c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
        "intermediate_size": c.hidden,
        "max_position_embeddings": c.context, "tie_word_embeddings": c.tied, "initializer_range": c.initializer_range,
    }  # fmt: skip


def llama(raw: Raw) -> dict[str, Any]:
    """Llama 2 and 3, Mistral, Qwen 2 and 3."""
    rope = raw["rope_parameters"]
    return {
        **common(raw),
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": scaling(rope),
        "norm_eps": raw["rms_norm_eps"],
        "activation": named(raw, "hidden_act", ACTIVATIONS),
        "windows": windows(raw) if raw["model_type"] != "llama" else (),  # Llama has none, whatever the file says
        "biases": (ATTENTION if raw.get("attention_bias") else ()) + (MLP if raw.get("mlp_bias") else ()),
    }


def qwen2(raw: Raw) -> dict[str, Any]:
    return {**llama(raw), "biases": ("q", "k", "v")}


def qwen3(raw: Raw) -> dict[str, Any]:
    return {**llama(raw), "head_norms": True}


def llama_json(c: TransformerConfig) -> dict[str, Any]:
    return {
        **common_json(c),
        "rope_parameters": rope_json(c.rope_theta, c.rope_scaling),
        "rms_norm_eps": c.norm_eps,
        "hidden_act": activation_json(c),
        "attention_bias": "o" in c.biases,
        "mlp_bias": "up" in c.biases,
    }


def mistral_json(c: TransformerConfig) -> dict[str, Any]:
    return without(llama_json(c), "attention_bias", "mlp_bias") | {
        "sliding_window": min(c.windows) if c.windows else None
    }


def qwen_json(c: TransformerConfig) -> dict[str, Any]:
    windowed = {"use_sliding_window": bool(c.windows), **layer_types(c)}
    if c.windows:
        windowed["max_window_layers"] = next(i for i, w in enumerate(c.windows) if w < UNBOUNDED)
    return without(llama_json(c), "mlp_bias", *(() if c.head_norms else ("attention_bias", "head_dim"))) | windowed


def without(node: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in node.items() if name not in names}


def gemma(raw: Raw) -> dict[str, Any]:
    """Gemma 2; and Gemma 3, whose windowed layers have rotary frequencies of their own."""
    refuse(raw, use_bidirectional_attention=False if raw.get("use_bidirectional_attention") is False else None)
    third, rope = raw["model_type"] == "gemma3_text", raw["rope_parameters"]
    full = rope["full_attention"] if third else rope
    return {
        **common(raw),
        "rope_theta": float(full["rope_theta"]),
        "rope_scaling": scaling(full),
        "windowed_theta": float(rope["sliding_attention"]["rope_theta"]) if third and windows(raw) else None,
        "norm_eps": raw["rms_norm_eps"],
        "norm_offset": 1.0,
        "activation": named(raw, "hidden_activation", ACTIVATIONS),
        "windows": windows(raw),
        "biases": ATTENTION if raw.get("attention_bias") else (),
        "post_norms": True,
        "head_norms": third,
        "query_scale": raw["query_pre_attn_scalar"] ** -0.5,
        "attention_cap": raw["attn_logit_softcapping"],
        "logit_cap": raw["final_logit_softcapping"],
        "embed_scale": math.sqrt(raw["hidden_size"]),
    }


def gemma_json(c: TransformerConfig) -> dict[str, Any]:
    rope = rope_json(c.rope_theta, c.rope_scaling)
    near = rope_json(c.windowed_theta or 10_000.0, RopeScaling())
    both = {"full_attention": rope, "sliding_attention": near}
    return {
        **common_json(c),
        **layer_types(c),
        **({} if c.windows else {"sliding_window": 4096}),  # required, and without effect
        "rope_parameters": both if c.head_norms else rope,
        "rms_norm_eps": c.norm_eps,
        "hidden_activation": activation_json(c),
        "attention_bias": "o" in c.biases,
        "query_pre_attn_scalar": round(c.query_scale**-2) if c.query_scale else c.head_dim,  # an integer there
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logit_cap,
    }


def gpt2(raw: Raw) -> dict[str, Any]:
    refuse(
        raw, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
        reorder_and_upcast_attn=False,
    )  # fmt: skip
    heads, width = raw["n_head"], raw["n_embd"]
    return {
        "vocab_size": raw["vocab_size"],
        "width": width,
        "layers": raw["n_layer"],
        "heads": heads,
        "kv_heads": heads,
        "head_dim": width // heads,
        "hidden": raw.get("n_inner") or 4 * width,
        "context": raw["n_positions"],
        "tied": raw["tie_word_embeddings"],
        "initializer_range": raw["initializer_range"],
        "positions": "learned",
        "norm": "layer",
        "norm_eps": raw["layer_norm_epsilon"],
        "biases": (*ATTENTION, "up", "down"),
        "activation": named(raw, "activation_function", ACTIVATIONS),
        "gated": False,
    }


def gpt2_json(c: TransformerConfig) -> dict[str, Any]:
    return {
        "vocab_size": c.vocab_size, "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads, "n_inner": c.hidden,
        "n_positions": c.context, "tie_word_embeddings": c.tied, "initializer_range": c.initializer_range,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": activation_json(c, "gelu_new"),
    }  # fmt: skip


def neox(raw: Raw) -> dict[str, Any]:
    rope, fields = raw["rope_parameters"], common(raw)
    return {
        **fields,
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": scaling(rope),
        "rotary_dim": int(fields["head_dim"] * rope.get("partial_rotary_factor", 1.0)),
        "norm": "layer",
        "norm_eps": raw["layer_norm_eps"],
        "biases": (ATTENTION if raw["attention_bias"] else ()) + ("up", "down"),
        "activation": named(raw, "hidden_act", ACTIVATIONS),
        "gated": False,
        "parallel": raw["use_parallel_residual"],
    }


def neox_json(c: TransformerConfig) -> dict[str, Any]:
    share = (c.rotary_dim or c.head_dim) / c.head_dim
    return without(common_json(c), "num_key_value_heads", "head_dim") | {
        "rope_parameters": {**rope_json(c.rope_theta, c.rope_scaling), "partial_rotary_factor": share},
        "layer_norm_eps": c.norm_eps,
        "attention_bias": "q" in c.biases,
        "hidden_act": activation_json(c, "gelu_new"),
        "use_parallel_residual": c.parallel,
    }


def t5(raw: Raw) -> dict[str, Any]:
    """T5 1.0, T5 v1.1, Flan-T5 and mT5, but for ``tied``: config.json does not say whether there is a head."""
    gate, _, activation = raw["feed_forward_proj"].rpartition("-")
    return {
        "vocab_size": raw["vocab_size"],
        "width": raw["d_model"],
        "layers": raw["num_layers"],
        "decoder_layers": raw["num_decoder_layers"] or raw["num_layers"],
        "heads": raw["num_heads"],
        "head_dim": raw["d_kv"],
        "hidden": raw["d_ff"],
        "norm_eps": raw["layer_norm_epsilon"],
        # The one that "gated-gelu" means is the approximate one.
        "activation": "gelu_tanh" if gate and activation == "gelu" else named({"act": activation}, "act", ACTIVATIONS),
        "gated": bool(gate),
        "scaled_output": raw["model_type"] == "t5" and raw.get("scale_decoder_outputs", True),
        "buckets": raw["relative_attention_num_buckets"],
        "distance": raw["relative_attention_max_distance"],
        "start_token": raw.get("decoder_start_token_id") or 0,
        "end_token": raw["eos_token_id"] if isinstance(raw["eos_token_id"], int) else raw["eos_token_id"][0],
    }


def t5_json(c: T5Config) -> dict[str, Any]:
    plain = "gelu" if c.gated and c.activation == "gelu_tanh" else activation_json(c, "gelu_new")
    return {
        "vocab_size": c.vocab_size, "d_model": c.width, "num_layers": c.layers, "num_decoder_layers": c.decoder_layers,
        "num_heads": c.heads, "d_kv": c.head_dim, "d_ff": c.hidden, "layer_norm_epsilon": c.norm_eps,
        "feed_forward_proj": f"gated-{plain}" if c.gated else plain, "tie_word_embeddings": c.scaled_output,
        "relative_attention_num_buckets": c.buckets, "relative_attention_max_distance": c.distance,
        "decoder_start_token_id": c.start_token, "eos_token_id": c.end_token,
    }  # fmt: skip
