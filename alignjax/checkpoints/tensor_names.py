"""The name of the tensor that holds each of our parameters, for every family of checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from alignjax.checkpoints.layout import Entry

ATTENTION_PROJECTIONS, MLP_PROJECTIONS = ("q", "k", "v", "o"), ("gate", "up", "down")


def _llama_entries(norms: Mapping[str, str]) -> tuple[Entry, ...]:
    """Returns the entries of Llama and the families that name their tensors alike; ``norms``: ours -> theirs."""
    layer = "model.layers.{}."
    projections = {
        **{n: f"self_attn.{n}_proj" for n in ATTENTION_PROJECTIONS},
        **{n: f"mlp.{n}_proj" for n in MLP_PROJECTIONS},
    }
    return (
        Entry("embed/embedding", "model.embed_tokens.weight"),
        Entry("norm/scale", "model.norm.weight"),
        Entry("head/kernel", "lm_head.weight", transposed=True),
        *(Entry(f"blocks/{n}/kernel", f"{layer}{name}.weight", transposed=True) for n, name in projections.items()),
        *(Entry(f"blocks/{n}/bias", f"{layer}{name}.bias") for n, name in projections.items()),
        *(Entry(f"blocks/{n}/scale", f"{layer}{name}.weight") for n, name in norms.items()),
    )


_HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
LLAMA_ENTRIES = _llama_entries(
    {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", **_HEAD_NORMS}
)
GEMMA_ENTRIES = _llama_entries({
    "attention_norm": "input_layernorm", "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm", **_HEAD_NORMS,
})  # fmt: skip
GPT2_ENTRIES = (
    Entry("embed/embedding", "transformer.wte.weight"),
    Entry("positions/embedding", "transformer.wpe.weight"),
    Entry("norm/scale", "transformer.ln_f.weight"),
    Entry("norm/bias", "transformer.ln_f.bias"),
    Entry("head/kernel", "lm_head.weight", transposed=True),
    *(
        Entry(f"blocks/{ours}/{ours_leaf}", f"transformer.h.{{}}.{theirs}.{leaf}", False, part, parts)
        for ours, theirs, part, parts in (
            ("q", "attn.c_attn", 0, 3), ("k", "attn.c_attn", 1, 3), ("v", "attn.c_attn", 2, 3),
            ("o", "attn.c_proj", 0, 1), ("up", "mlp.c_fc", 0, 1), ("down", "mlp.c_proj", 0, 1),
        )
        for ours_leaf, leaf in (("kernel", "weight"), ("bias", "bias"))
    ),
    *(
        Entry(f"blocks/{ours}/{ours_leaf}", f"transformer.h.{{}}.{theirs}.{leaf}")
        for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2"))
        for ours_leaf, leaf in (("scale", "weight"), ("bias", "bias"))
    ),
)  # fmt: skip
_NEOX_LAYER = "gpt_neox.layers.{}."
NEOX_ENTRIES = (
    Entry("embed/embedding", "gpt_neox.embed_in.weight"),
    Entry("norm/scale", "gpt_neox.final_layer_norm.weight"),
    Entry("norm/bias", "gpt_neox.final_layer_norm.bias"),
    Entry("head/kernel", "embed_out.weight", transposed=True),
    *(
        Entry(f"blocks/{ours}/{ours_leaf}", f"{_NEOX_LAYER}{theirs}.{leaf}", leaf == "weight", part, parts, parts > 1)
        for ours, theirs, part, parts in (
            ("q", "attention.query_key_value", 0, 3), ("k", "attention.query_key_value", 1, 3),
            ("v", "attention.query_key_value", 2, 3), ("o", "attention.dense", 0, 1),
            ("up", "mlp.dense_h_to_4h", 0, 1), ("down", "mlp.dense_4h_to_h", 0, 1),
        )
        for ours_leaf, leaf in (("kernel", "weight"), ("bias", "bias"))
    ),
    *(
        Entry(f"blocks/{ours}/{ours_leaf}", f"{_NEOX_LAYER}{theirs}.{leaf}")
        for ours, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))
        for ours_leaf, leaf in (("scale", "weight"), ("bias", "bias"))
    ),
)  # fmt: skip


def t5_entries(gated: bool) -> tuple[Entry, ...]:
    """Returns the entries of T5 1.0 (one input projection in the MLP) or, ``gated``, of T5 v1.1 and mT5 (two)."""
    mlp = {**({"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}), "down": "wo"}
    entries = [Entry("embed/embedding", "shared.weight"), Entry("head/kernel", "lm_head.weight", transposed=True)]
    for side, mlp_index in (("encoder", 1), ("decoder", 2)):  # a decoder layer has cross-attention at index 1
        layer, first_attention = f"{side}.block.{{}}.layer.", f"{side}.block.0.layer.0.SelfAttention."
        cross = {f"cross_{n}": f"1.EncDecAttention.{n}" for n in ATTENTION_PROJECTIONS} if side == "decoder" else {}
        projections = {
            **{n: f"0.SelfAttention.{n}" for n in ATTENTION_PROJECTIONS},
            **cross,
            **{ours: f"{mlp_index}.DenseReluDense.{theirs}" for ours, theirs in mlp.items()},
        }
        norms = {"attention_norm": 0, **({"cross_norm": 1} if cross else {}), "mlp_norm": mlp_index}
        entries += [
            Entry(f"{side}_norm/scale", f"{side}.final_layer_norm.weight"),
            Entry(f"{side}_bias/embedding", f"{first_attention}relative_attention_bias.weight"),
            *(Entry(f"{side}/{n}/kernel", f"{layer}{name}.weight", transposed=True) for n, name in projections.items()),
            *(Entry(f"{side}/{n}/scale", f"{layer}{index}.layer_norm.weight") for n, index in norms.items()),
        ]
    return tuple(entries)
