"""The families of checkpoints that are compared with transformers on torch, each with a random configuration.

A configuration varies what checkpoints vary (sizes, head counts, scaling, biases, tying). It always keeps what defines
the family, at a size where it matters: windows and buckets shorter than the texts, caps as large as the scores. This
module needs no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

Generator = np.random.Generator
Draw = Callable[[Generator], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One family, or one variant of it."""

    name: str
    model: str  # transformers' class
    draw: Draw  # -> the keywords of its configuration
    untied: bool = False  # its checkpoints hold a head of their own, though a new model there shares the embedding
    encodes: bool = False  # an encoder-decoder


def pick(rng: Generator, *choices: Any) -> Any:
    """Returns one of the choices, uniformly."""
    return choices[rng.integers(len(choices))]


def common(rng: Generator) -> dict[str, Any]:
    """Returns sizes that are all different, so that no two axes can be confused."""
    kv_heads = pick(rng, 1, 2)
    return dict(
        vocab_size=pick(rng, 44, 47, 48), hidden_size=pick(rng, 24, 28), intermediate_size=pick(rng, 36, 40),
        num_hidden_layers=pick(rng, 2, 3), num_attention_heads=2 * kv_heads, num_key_value_heads=kv_heads,
        max_position_embeddings=96, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=pick(rng, True, False),
    )  # fmt: skip


def rms(rng: Generator) -> dict[str, Any]:
    """Returns norm and activation of Llama-like families, with an epsilon large enough to matter."""
    return dict(rms_norm_eps=pick(rng, 1e-2, 1e-3), hidden_act=pick(rng, "silu", "gelu", "gelu_pytorch_tanh"))


def plain_rope(rng: Generator, **more: Any) -> dict[str, Any]:
    """Returns rotary positions without scaling."""
    return dict(rope_type="default", rope_theta=pick(rng, 100.0, 10_000.0)) | more


def linear_rope(rng: Generator) -> dict[str, Any]:
    """Returns rotary positions that are stretched linearly."""
    return plain_rope(rng, rope_type="linear", factor=pick(rng, 2.0, 4.0))


def llama2(rng: Generator) -> dict[str, Any]:
    """Returns a Llama 2."""
    return common(rng) | rms(rng) | dict(
        head_dim=pick(rng, 6, 8), attention_bias=pick(rng, True, False), mlp_bias=pick(rng, True, False),
        rope_parameters=pick(rng, plain_rope, linear_rope)(rng),
    )  # fmt: skip


def llama3(rng: Generator) -> dict[str, Any]:
    """Returns a Llama 3 with wavelengths on both sides of the original context and between."""
    rope = dict(rope_type="llama3", rope_theta=500.0, factor=pick(rng, 4.0, 8.0), low_freq_factor=1.0,
                high_freq_factor=pick(rng, 3.0, 4.0), original_max_position_embeddings=32)  # fmt: skip
    return common(rng) | rms(rng) | dict(head_dim=pick(rng, 10, 12), rope_parameters=rope)


def mistral(rng: Generator) -> dict[str, Any]:
    """Returns a Mistral with a window in every layer."""
    return common(rng) | rms(rng) | dict(
        head_dim=8, num_attention_heads=4, num_key_value_heads=2, sliding_window=pick(rng, 4, 5, 7),
        rope_parameters=plain_rope(rng),
    )  # fmt: skip


def qwen2(rng: Generator) -> dict[str, Any]:
    """Returns a Qwen 2, whose head size is the width over the number of heads."""
    return common(rng) | rms(rng) | dict(
        num_attention_heads=4, num_key_value_heads=pick(rng, 1, 2), hidden_size=24, use_sliding_window=True,
        sliding_window=pick(rng, 4, 6), max_window_layers=1, rope_parameters=plain_rope(rng),
    )  # fmt: skip


def qwen3(rng: Generator) -> dict[str, Any]:
    """Returns a Qwen 3."""
    return common(rng) | rms(rng) | dict(
        head_dim=8, attention_bias=pick(rng, True, False), use_sliding_window=pick(rng, True, False),
        sliding_window=5, max_window_layers=1, rope_parameters=plain_rope(rng),
    )  # fmt: skip


def gemma(rng: Generator) -> dict[str, Any]:
    """Returns what Gemma 2 and 3 share."""
    sizes, kinds = common(rng), ["sliding_attention", "full_attention"]
    return sizes | dict(
        head_dim=8, sliding_window=pick(rng, 4, 5, 7), query_pre_attn_scalar=pick(rng, 6, 12),
        hidden_activation=pick(rng, "gelu_pytorch_tanh", "silu"), rms_norm_eps=pick(rng, 1e-2, 1e-3),
        layer_types=(pick(rng, kinds, kinds[::-1]) + kinds)[: sizes["num_hidden_layers"]],
        attention_bias=pick(rng, True, False),
    )  # fmt: skip


def gemma2(rng: Generator) -> dict[str, Any]:
    """Returns a Gemma 2, with caps of scores and logits."""
    return gemma(rng) | dict(
        attn_logit_softcapping=pick(rng, 1.5, 2.5), final_logit_softcapping=pick(rng, 3.0, 6.0),
        rope_parameters=plain_rope(rng),
    )  # fmt: skip


def gemma3(rng: Generator) -> dict[str, Any]:
    """Returns a Gemma 3, whose windowed layers have rotary frequencies of their own."""
    windowed = dict(rope_type="default", rope_theta=pick(rng, 20.0, 50.0))
    return gemma(rng) | dict(rope_parameters=dict(full_attention=linear_rope(rng), sliding_attention=windowed))


def gpt2(rng: Generator) -> dict[str, Any]:
    """Returns a GPT-2."""
    return dict(
        vocab_size=47, n_embd=pick(rng, 24, 32), n_layer=pick(rng, 2, 3), n_head=pick(rng, 2, 4),
        n_inner=pick(rng, None, 40),
        n_positions=96, activation_function=pick(rng, "gelu_new", "gelu", "relu"), layer_norm_epsilon=1e-3,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=pick(rng, True, False),
    )  # fmt: skip


def neox(parallel: bool) -> Draw:
    """Returns the draw of a GPT-NeoX with parallel or serial residuals."""

    def draw(rng: Generator) -> dict[str, Any]:
        sizes, heads = common(rng), pick(rng, 2, 3)
        del sizes["num_key_value_heads"]
        return sizes | dict(
            hidden_size=16 * heads, num_attention_heads=heads, use_parallel_residual=parallel,
            hidden_act=pick(rng, "gelu", "gelu_new"), layer_norm_eps=1e-3, attention_bias=pick(rng, True, False),
            rope_parameters=plain_rope(rng, partial_rotary_factor=pick(rng, 0.25, 0.5)),
        )  # fmt: skip

    return draw


def t5(*kinds: str) -> Draw:
    """Returns the draw of a T5 with one of these MLPs."""

    def draw(rng: Generator) -> dict[str, Any]:
        return dict(
            vocab_size=pick(rng, 44, 47), d_model=pick(rng, 20, 24), d_kv=pick(rng, 6, 8), d_ff=pick(rng, 36, 40),
            num_layers=pick(rng, 1, 2, 3), num_decoder_layers=pick(rng, 1, 2), num_heads=pick(rng, 2, 4),
            relative_attention_num_buckets=pick(rng, 8, 12), relative_attention_max_distance=pick(rng, 16, 24),
            layer_norm_epsilon=pick(rng, 1e-2, 1e-3), feed_forward_proj=pick(rng, *kinds),
            decoder_start_token_id=pick(rng, 0, 5),
        )  # fmt: skip

    return draw


def t5_v11(rng: Generator) -> dict[str, Any]:
    """Returns a T5 v1.1: its config.json says that the head is not tied, so transformers does not scale states."""
    return t5("gated-gelu", "gated-silu")(rng) | dict(tie_word_embeddings=False)


CASES = (
    Case("llama2", "LlamaForCausalLM", llama2),
    Case("llama3", "LlamaForCausalLM", llama3),
    Case("mistral", "MistralForCausalLM", mistral),
    Case("qwen2", "Qwen2ForCausalLM", qwen2),
    Case("qwen3", "Qwen3ForCausalLM", qwen3),
    Case("gemma2", "Gemma2ForCausalLM", gemma2),
    Case("gemma3", "Gemma3ForCausalLM", gemma3),
    Case("gpt2", "GPT2LMHeadModel", gpt2),
    Case("gpt_neox", "GPTNeoXForCausalLM", neox(True)),
    Case("gpt_neox_serial", "GPTNeoXForCausalLM", neox(False)),
    Case("t5", "T5ForConditionalGeneration", t5("relu"), encodes=True),
    Case("t5_v11", "T5ForConditionalGeneration", t5_v11, untied=True, encodes=True),
    Case("mt5", "MT5ForConditionalGeneration", t5("gated-gelu"), untied=True, encodes=True),
)
ADAPTED = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "t5": ["SelfAttention.q", "EncDecAttention.v", "DenseReluDense.wo"],
    "mt5": ["SelfAttention.q", "EncDecAttention.v", "DenseReluDense.wi_1"],
}
"""Modules that the tests adapt, by family; in others q_proj, v_proj and down_proj."""
