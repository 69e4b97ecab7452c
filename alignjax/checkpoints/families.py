"""The families of checkpoints: the classes that open one, how its config.json reads, where its tensors lie.

This module, ``configs``, ``layout`` and ``tensor_names`` are data and small functions over it. Files are read and
written in ``folders``, ``weights``, ``huggingface`` and ``peft``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from alignjax.checkpoints import configs
from alignjax.checkpoints.config_entries import ConfigJson
from alignjax.checkpoints.layout import Entry
from alignjax.checkpoints.tensor_names import GEMMA_ENTRIES, GPT2_ENTRIES, LLAMA_ENTRIES, NEOX_ENTRIES, t5_entries
from alignjax.errors import UserError
from alignjax.models.decoder import TransformerConfig
from alignjax.models.t5 import T5Config

_DECODER_BUFFERS = r"\.(attention|attn)\.(masked_)?bias$|rotary_emb\.inv_freq$"
_T5_UNUSED = r"EncDecAttention\.relative_attention_bias\.weight$"
_T5_COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")


class Family(NamedTuple):
    """A family of checkpoints."""

    config: type  # TransformerConfig or T5Config
    architecture: str  # the class that transformers opens it with
    reward_architecture: str  # the class with a reward head; "" when there is none
    prefix: str  # of the backbone's tensor names; checkpoints of the bare backbone lack it
    entries: Callable[[Any], tuple[Entry, ...]]  # our configuration -> where each parameter lies
    read: Callable[[ConfigJson], dict[str, Any]]  # config.json -> the fields of our configuration
    write: Callable[[Any], dict[str, Any]]  # our configuration -> config.json
    ignored: str  # regular expression: tensors that hold no parameter
    copies: tuple[str, ...] = ()  # tensors that repeat the embedding, whatever config.json says


def _decoder_family(architecture: str, prefix: str, entries: tuple[Entry, ...], read: Any, write: Any) -> Family:
    """Returns a decoder-only family; transformers derives its reward architecture's name from ``architecture``."""
    scorer = re.sub("(LMHeadModel|ForCausalLM)$", "ForSequenceClassification", architecture)
    return Family(
        TransformerConfig, architecture, scorer, prefix, lambda config: entries, read, write, _DECODER_BUFFERS
    )


def _t5_family(architecture: str) -> Family:
    """Returns an encoder-decoder family."""
    return Family(
        T5Config, architecture, "", "", lambda config: t5_entries(config.gated),
        configs.read_t5, configs.write_t5, _T5_UNUSED, _T5_COPIES,
    )  # fmt: skip


FAMILIES = {
    "llama": _decoder_family(
        "LlamaForCausalLM", "model.", LLAMA_ENTRIES, configs.read_llama, configs.write_llama),
    "mistral": _decoder_family(
        "MistralForCausalLM", "model.", LLAMA_ENTRIES, configs.read_mistral, configs.write_mistral),
    "qwen2": _decoder_family(
        "Qwen2ForCausalLM", "model.", LLAMA_ENTRIES, configs.read_qwen2, configs.write_qwen),
    "qwen3": _decoder_family(
        "Qwen3ForCausalLM", "model.", LLAMA_ENTRIES, configs.read_qwen3, configs.write_qwen),
    "gemma2": _decoder_family(
        "Gemma2ForCausalLM", "model.", GEMMA_ENTRIES, configs.read_gemma, configs.write_gemma),
    "gemma3_text": _decoder_family(
        "Gemma3ForCausalLM", "model.", GEMMA_ENTRIES, configs.read_gemma, configs.write_gemma
    )._replace(reward_architecture="Gemma3TextForSequenceClassification"),
    "gpt2": _decoder_family(
        "GPT2LMHeadModel", "transformer.", GPT2_ENTRIES, configs.read_gpt2, configs.write_gpt2),
    "gpt_neox": _decoder_family(
        "GPTNeoXForCausalLM", "gpt_neox.", NEOX_ENTRIES, configs.read_neox, configs.write_neox),
    "t5": _t5_family("T5ForConditionalGeneration"),
    "mt5": _t5_family("MT5ForConditionalGeneration"),
}  # fmt: skip
"""Families by config.json's ``model_type``."""


def tensor_entries(family: Family, config: Any, paths: Mapping[str, Any]) -> dict[str, Entry]:
    """Returns the family's entry of each of a model's parameter paths.

    Raises UserError when the family has no tensor for one of them.
    """
    entries = {entry.path: entry for entry in family.entries(config)}
    if missing := [path for path in paths if path not in entries]:
        raise UserError(f"{family.architecture} has no place for {missing[0]}; this model cannot be written as one")
    return {path: entries[path] for path in paths}


def is_ignored_tensor(family: Family, name: str) -> bool:
    """Whether a tensor of a checkpoint holds no parameter: a buffer, or a table that no layer reads."""
    return bool(re.search(family.ignored, name))


def embedding_copies(family: Family, config: Any) -> tuple[str, tuple[str, ...]]:
    """Returns the name of the embedding's tensor, and of the tensors that a checkpoint may repeat it as.

    Those are the family's own copies and, where the configuration ties it, the output projection.
    """
    names = {entry.path: entry.tensor for entry in family.entries(config)}
    return names["embed/embedding"], family.copies + ((names["head/kernel"],) if config.tied else ())
