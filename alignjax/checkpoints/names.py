"""Where each of our parameters lies in a family's checkpoints, name by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

ATTENTION, MLP = ("q", "k", "v", "o"), ("gate", "up", "down")


class Entry(NamedTuple):
    """Where one of our parameters lies in a checkpoint."""

    ours: str  # its path: "blocks/q/kernel"
    theirs: str  # the tensor's name, {} standing for the layer's number
    turned: bool = False  # stored [out, in]
    part: int = 0  # which of ``parts`` equal parts of the tensor's output axis
    parts: int = 1
    by_head: bool = False  # the parts alternate head by head


def llama_table(norms: Mapping[str, str]) -> tuple[Entry, ...]:
    layer = "model.layers.{}."
    projections = {**{n: f"self_attn.{n}_proj" for n in ATTENTION}, **{n: f"mlp.{n}_proj" for n in MLP}}
    return (
        Entry("embed/embedding", "model.embed_tokens.weight"),
        Entry("norm/scale", "model.norm.weight"),
        Entry("head/kernel", "lm_head.weight", turned=True),
        *(Entry(f"blocks/{n}/kernel", f"{layer}{name}.weight", turned=True) for n, name in projections.items()),
        *(Entry(f"blocks/{n}/bias", f"{layer}{name}.bias") for n, name in projections.items()),
        *(Entry(f"blocks/{n}/scale", f"{layer}{name}.weight") for n, name in norms.items()),
    )


HEAD_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
LLAMA = llama_table({"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm", **HEAD_NORMS})
GEMMA = llama_table({
    "attention_norm": "input_layernorm", "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm", "mlp_post_norm": "post_feedforward_layernorm", **HEAD_NORMS,
})  # fmt: skip
GPT2 = (
    Entry("embed/embedding", "transformer.wte.weight"),
    Entry("positions/embedding", "transformer.wpe.weight"),
    Entry("norm/scale", "transformer.ln_f.weight"),
    Entry("norm/bias", "transformer.ln_f.bias"),
    Entry("head/kernel", "lm_head.weight", turned=True),
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
NEOX_LAYER = "gpt_neox.layers.{}."
NEOX = (
    Entry("embed/embedding", "gpt_neox.embed_in.weight"),
    Entry("norm/scale", "gpt_neox.final_layer_norm.weight"),
    Entry("norm/bias", "gpt_neox.final_layer_norm.bias"),
    Entry("head/kernel", "embed_out.weight", turned=True),
    *(
        Entry(f"blocks/{ours}/{ours_leaf}", f"{NEOX_LAYER}{theirs}.{leaf}", leaf == "weight", part, parts, parts > 1)
        for ours, theirs, part, parts in (
            ("q", "attention.query_key_value", 0, 3), ("k", "attention.query_key_value", 1, 3),
            ("v", "attention.query_key_value", 2, 3), ("o", "attention.dense", 0, 1),
            ("up", "mlp.dense_h_to_4h", 0, 1), ("down", "mlp.dense_4h_to_h", 0, 1),
        )
        for ours_leaf, leaf in (("kernel", "weight"), ("bias", "bias"))
    ),
    *(
        Entry(f"blocks/{ours}/{ours_leaf}", f"{NEOX_LAYER}{theirs}.{leaf}")
        for ours, theirs in (("attention_norm", "input_layernorm"), ("mlp_norm", "post_attention_layernorm"))
        for ours_leaf, leaf in (("scale", "weight"), ("bias", "bias"))
    ),
)  # fmt: skip


def t5_table(gated: bool) -> tuple[Entry, ...]:
    feed = {**({"gate": "wi_0", "up": "wi_1"} if gated else {"up": "wi"}), "down": "wo"}
    entries = [Entry("embed/embedding", "shared.weight"), Entry("head/kernel", "lm_head.weight", turned=True)]
    for side, last in (("encoder", 1), ("decoder", 2)):
        layer, first = f"{side}.block.{{}}.layer.", f"{side}.block.0.layer.0.SelfAttention."
        cross = {f"cross_{n}": f"1.EncDecAttention.{n}" for n in ATTENTION} if last == 2 else {}
        projections = {
            **{n: f"0.SelfAttention.{n}" for n in ATTENTION},
            **cross,
            **{ours: f"{last}.DenseReluDense.{theirs}" for ours, theirs in feed.items()},
        }
        norms = {"attention_norm": 0, **({"cross_norm": 1} if cross else {}), "mlp_norm": last}
        entries += [
            Entry(f"{side}_norm/scale", f"{side}.final_layer_norm.weight"),
            Entry(f"{side}_bias/embedding", f"{first}relative_attention_bias.weight"),
            *(Entry(f"{side}/{n}/kernel", f"{layer}{name}.weight", turned=True) for n, name in projections.items()),
            *(Entry(f"{side}/{n}/scale", f"{layer}{index}.layer_norm.weight") for n, index in norms.items()),
        ]
    return tuple(entries)
