"""Each family's config.json as the fields of our configuration (``read_...``), and back (``write_...``)."""

from __future__ import annotations

import math
from typing import Any

from alignjax.checkpoints.config_entries import (
    ACTIVATIONS,
    ConfigJson,
    activation_name,
    read_rope_scaling,
    read_token,
    read_windows,
    require_values,
    translate,
    write_rope,
    write_windows,
)
from alignjax.checkpoints.tensor_names import ATTENTION_PROJECTIONS, MLP_PROJECTIONS
from alignjax.models.decoder import UNBOUNDED, TransformerConfig
from alignjax.models.rope import RopeScaling
from alignjax.models.t5 import T5Config


def _read_common(raw: ConfigJson) -> dict[str, Any]:
    """Returns the fields that Llama, Mistral, Qwen, Gemma and GPT-NeoX call by the same names."""
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


def _write_common(c: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json that ``_read_common`` reads."""
    return {
        "vocab_size": c.vocab_size, "hidden_size": c.width, "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim,
        "intermediate_size": c.hidden,
        "max_position_embeddings": c.context, "tie_word_embeddings": c.tied, "initializer_range": c.initializer_range,
    }  # fmt: skip


def read_llama(raw: ConfigJson) -> dict[str, Any]:
    """Returns the fields of Llama 2 and 3. Raises UserError on an option that is not supported.

    A family reads no option that its class in transformers does not have, whatever the file says.
    """
    rope = raw["rope_parameters"]
    return {
        **_read_common(raw),
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": read_rope_scaling(rope),
        "norm_eps": raw["rms_norm_eps"],
        "activation": translate(raw, "hidden_act", ACTIVATIONS),
        "biases": (ATTENTION_PROJECTIONS if raw.get("attention_bias") else ())
        + (MLP_PROJECTIONS if raw.get("mlp_bias") else ()),
    }


def read_mistral(raw: ConfigJson) -> dict[str, Any]:
    """Returns the fields of Mistral: Llama without biases, all layers with one window or none."""
    size = raw["sliding_window"]
    return {**read_llama(raw), "biases": (), "windows": () if size is None else (size,) * raw["num_hidden_layers"]}


def read_qwen2(raw: ConfigJson) -> dict[str, Any]:
    """Returns the fields of Qwen 2 and 2.5: Llama with biases and windows. Raises UserError as ``read_llama`` does."""
    return {**read_llama(raw), "biases": ("q", "k", "v"), "windows": read_windows(raw)}


def read_qwen3(raw: ConfigJson) -> dict[str, Any]:
    """Returns the fields of Qwen 3: Llama with norms of queries and keys, and windows. Raises UserError likewise."""
    return {**read_llama({**raw, "mlp_bias": False}), "head_norms": True, "windows": read_windows(raw)}


def write_llama(c: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a Llama."""
    return {
        **_write_common(c),
        "rope_parameters": write_rope(c.rope_theta, c.rope_scaling),
        "rms_norm_eps": c.norm_eps,
        "hidden_act": activation_name(c),
        "attention_bias": "o" in c.biases,
        "mlp_bias": "up" in c.biases,
    }


def write_mistral(c: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a Mistral, whose layers all have one window."""
    llama = _omit(write_llama(c), "attention_bias", "mlp_bias")
    return llama | {"sliding_window": min(c.windows) if c.windows else None}


def write_qwen(c: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a Qwen 2 or, with norms of queries and keys, of a Qwen 3."""
    windowed = {"use_sliding_window": bool(c.windows), **write_windows(c)}
    if c.windows:
        windowed["max_window_layers"] = next(i for i, w in enumerate(c.windows) if w < UNBOUNDED)
    return _omit(write_llama(c), "mlp_bias", *(() if c.head_norms else ("attention_bias", "head_dim"))) | windowed


def _omit(fields: dict[str, Any], *names: str) -> dict[str, Any]:
    """Returns the fields without those of these names."""
    return {name: value for name, value in fields.items() if name not in names}


def read_gemma(raw: ConfigJson) -> dict[str, Any]:
    """Returns the fields of Gemma 2, and of Gemma 3, whose windowed layers have rotary frequencies of their own.

    Raises UserError on an option that is not supported.
    """
    require_values(raw, use_bidirectional_attention=False if raw.get("use_bidirectional_attention") is False else None)
    is_gemma3, rope = raw["model_type"] == "gemma3_text", raw["rope_parameters"]
    if is_gemma3:
        require_values(raw, attn_logit_softcapping=None)  # transformers has the option, and does not compute it
    full = rope["full_attention"] if is_gemma3 else rope
    return {
        **_read_common(raw),
        "rope_theta": float(full["rope_theta"]),
        "rope_scaling": read_rope_scaling(full),
        "windowed_theta": float(rope["sliding_attention"]["rope_theta"]) if is_gemma3 and read_windows(raw) else None,
        "norm_eps": raw["rms_norm_eps"],
        "norm_offset": 1.0,
        "activation": translate(raw, "hidden_activation", ACTIVATIONS),
        "windows": read_windows(raw),
        "biases": ATTENTION_PROJECTIONS if raw.get("attention_bias") else (),
        "post_norms": True,
        "head_norms": is_gemma3,
        "query_scale": raw["query_pre_attn_scalar"] ** -0.5,
        "attention_cap": raw["attn_logit_softcapping"],
        "logit_cap": raw["final_logit_softcapping"],
        "embed_scale": math.sqrt(raw["hidden_size"]),
    }


def write_gemma(c: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a Gemma 2 or, with norms of queries and keys, of a Gemma 3."""
    rope = write_rope(c.rope_theta, c.rope_scaling)
    windowed_rope = write_rope(c.windowed_theta or 10_000.0, RopeScaling())
    gemma3_rope = {"full_attention": rope, "sliding_attention": windowed_rope}
    return {
        **_write_common(c),
        **write_windows(c),
        **({} if c.windows else {"sliding_window": 4096}),  # the key is required; without windows it has no effect
        "rope_parameters": gemma3_rope if c.head_norms else rope,
        "rms_norm_eps": c.norm_eps,
        "hidden_activation": activation_name(c),
        "attention_bias": "o" in c.biases,
        "query_pre_attn_scalar": round(c.query_scale**-2)
        if c.query_scale
        else c.head_dim,  # config.json wants an integer
        "attn_logit_softcapping": c.attention_cap,
        "final_logit_softcapping": c.logit_cap,
    }


def read_gpt2(raw: ConfigJson) -> dict[str, Any]:
    """Returns the fields of GPT-2. Raises UserError on an option that is not supported."""
    require_values(
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
        "biases": (*ATTENTION_PROJECTIONS, "up", "down"),
        "activation": translate(raw, "activation_function", ACTIVATIONS),
        "gated": False,
    }


def write_gpt2(c: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a GPT-2."""
    return {
        "vocab_size": c.vocab_size, "n_embd": c.width, "n_layer": c.layers, "n_head": c.heads, "n_inner": c.hidden,
        "n_positions": c.context, "tie_word_embeddings": c.tied, "initializer_range": c.initializer_range,
        "layer_norm_epsilon": c.norm_eps,
        "activation_function": activation_name(c, "gelu_new"),
    }  # fmt: skip


def read_neox(raw: ConfigJson) -> dict[str, Any]:
    """Returns the fields of GPT-NeoX and Pythia. Raises UserError on an option that is not supported."""
    rope, fields = raw["rope_parameters"], _read_common(raw)
    return {
        **fields,
        "rope_theta": float(rope["rope_theta"]),
        "rope_scaling": read_rope_scaling(rope),
        "rotary_dim": int(fields["head_dim"] * rope.get("partial_rotary_factor", 1.0)),
        "norm": "layer",
        "norm_eps": raw["layer_norm_eps"],
        "biases": (ATTENTION_PROJECTIONS if raw["attention_bias"] else ()) + ("up", "down"),
        "activation": translate(raw, "hidden_act", ACTIVATIONS),
        "gated": False,
        "parallel": raw["use_parallel_residual"],
    }


def write_neox(c: TransformerConfig) -> dict[str, Any]:
    """Returns the config.json of a GPT-NeoX."""
    rotary_share = (c.rotary_dim or c.head_dim) / c.head_dim
    return _omit(_write_common(c), "num_key_value_heads", "head_dim") | {
        "rope_parameters": {**write_rope(c.rope_theta, c.rope_scaling), "partial_rotary_factor": rotary_share},
        "layer_norm_eps": c.norm_eps,
        "attention_bias": "q" in c.biases,
        "hidden_act": activation_name(c, "gelu_new"),
        "use_parallel_residual": c.parallel,
    }


def read_t5(raw: ConfigJson) -> dict[str, Any]:
    """Returns the fields of T5 1.0, T5 v1.1, Flan-T5 and mT5, without ``tied``.

    The file does not say whether there is an output head; its tensors do. Raises UserError on an option that is not
    supported, and where the decoder's first token or the end token is missing.
    """
    require_values(raw, is_encoder_decoder=True)
    return {
        "vocab_size": raw["vocab_size"],
        "width": raw["d_model"],
        "layers": raw["num_layers"],
        "decoder_layers": raw["num_decoder_layers"],
        "heads": raw["num_heads"],
        "head_dim": raw["d_kv"],
        "hidden": raw["d_ff"],
        "norm_eps": raw["layer_norm_epsilon"],
        "activation": translate(raw, "dense_act_fn", ACTIVATIONS),  # of feed_forward_proj, where the file has none
        "gated": bool(raw["is_gated_act"]),
        "scaled_output": raw["model_type"] == "t5" and bool(raw["scale_decoder_outputs"]),
        "buckets": raw["relative_attention_num_buckets"],
        "distance": raw["relative_attention_max_distance"],
        "start_token": read_token(raw, "decoder_start_token_id"),
        "end_token": read_token(raw, "eos_token_id"),
    }


def write_t5(c: T5Config) -> dict[str, Any]:
    """Returns the config.json of a T5."""
    name = "gelu" if c.gated and c.activation == "gelu_tanh" else activation_name(c, "gelu_new")
    return {
        "vocab_size": c.vocab_size, "d_model": c.width, "num_layers": c.layers, "num_decoder_layers": c.decoder_layers,
        "num_heads": c.heads, "d_kv": c.head_dim, "d_ff": c.hidden, "layer_norm_epsilon": c.norm_eps,
        "feed_forward_proj": f"gated-{name}" if c.gated else name, "tie_word_embeddings": c.scaled_output,
        "relative_attention_num_buckets": c.buckets, "relative_attention_max_distance": c.distance,
        "decoder_start_token_id": c.start_token, "eos_token_id": c.end_token,
    }  # fmt: skip
