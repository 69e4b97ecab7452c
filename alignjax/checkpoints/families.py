"""The families of checkpoints: what opens one, how its config.json reads, where its tensors lie.

Everything here and in ``configs`` and ``names`` is data and small functions over it; files are read and written in
``weights`` and ``huggingface``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignjax.checkpoints import configs
from alignjax.checkpoints.configs import Raw
from alignjax.checkpoints.names import GEMMA, GPT2, LLAMA, NEOX, Entry, t5_table
from alignjax.errors import UserError
from alignjax.models.decoder import TransformerConfig
from alignjax.models.t5 import T5Config

BUFFERS = r"\.(attention|attn)\.(masked_)?bias$|rotary_emb\.inv_freq$"


class Family(NamedTuple):
    """A family of checkpoints."""

    config: type  # TransformerConfig or T5Config
    architecture: str  # the class that transformers opens it with
    scorer: str  # and with a reward head; empty where there is no place for one
    prefix: str  # of the backbone's names; checkpoints of the bare backbone go without
    table: Callable[[Any], tuple[Entry, ...]]  # of a configuration
    read: Callable[[Raw], dict[str, Any]]  # config.json -> the configuration's fields
    write: Callable[[Any], dict[str, Any]]  # and back
    ignored: str  # tensors that hold no parameter


def decoder(architecture: str, prefix: str, table: tuple[Entry, ...], read: Any, write: Any) -> Family:
    scorer = re.sub("(LMHeadModel|ForCausalLM)$", "ForSequenceClassification", architecture)
    return Family(TransformerConfig, architecture, scorer, prefix, lambda config: table, read, write, BUFFERS)


def encoder_decoder(architecture: str) -> Family:
    ignored = r"(EncDecAttention\.relative_attention_bias|(encoder|decoder)\.embed_tokens)\.weight$"
    return Family(
        T5Config, architecture, "", "", lambda config: t5_table(config.gated), configs.t5, configs.t5_json, ignored
    )


FAMILIES = {  # by config.json's model_type
    "llama": decoder("LlamaForCausalLM", "model.", LLAMA, configs.llama, configs.llama_json),
    "mistral": decoder("MistralForCausalLM", "model.", LLAMA, configs.llama, configs.mistral_json),
    "qwen2": decoder("Qwen2ForCausalLM", "model.", LLAMA, configs.qwen2, configs.qwen_json),
    "qwen3": decoder("Qwen3ForCausalLM", "model.", LLAMA, configs.qwen3, configs.qwen_json),
    "gemma2": decoder("Gemma2ForCausalLM", "model.", GEMMA, configs.gemma, configs.gemma_json),
    "gemma3_text": decoder("Gemma3ForCausalLM", "model.", GEMMA, configs.gemma, configs.gemma_json)._replace(
        scorer="Gemma3TextForSequenceClassification"
    ),
    "gpt2": decoder("GPT2LMHeadModel", "transformer.", GPT2, configs.gpt2, configs.gpt2_json),
    "gpt_neox": decoder("GPTNeoXForCausalLM", "gpt_neox.", NEOX, configs.neox, configs.neox_json),
    "t5": encoder_decoder("T5ForConditionalGeneration"),
    "mt5": encoder_decoder("MT5ForConditionalGeneration"),
}


def entries(family: Family, config: Any, paths: Mapping[str, Any]) -> dict[str, Entry]:
    """The table's entry of every parameter path that a model has."""
    table = {entry.ours: entry for entry in family.table(config)}
    if missing := [path for path in paths if path not in table]:
        raise UserError(f"{family.architecture} has no place for {missing[0]}; this model cannot be written as one")
    return {path: table[path] for path in paths}


def is_ignored(family: Family, name: str) -> bool:
    return bool(re.search(family.ignored, name))
