"""Hugging Face folder <-> (config, params) and tokenizer. The only file that imports transformers."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is no news here

import jax
import numpy as np
import tokenizers
import transformers

from alignjax.config import one_line
from alignjax.models.build import ModelConfig
from alignjax.models.families import FAMILIES, entries
from alignjax.models.t5 import T5Config
from alignjax.models.tokenizer import Tokenizer
from alignjax.models.weights import read_object, tensor_files, their_tensors, write_tensors
from alignjax.runtime.sharding import path_name
from alignjax.types import Params, UserError

SHARD = 5 * 10**9  # bytes of a written file, about


def read_config(folder: Path) -> ModelConfig:
    """config.json -> configuration. UserError on a family or an option that is not supported, by name."""
    path = folder / "config.json"
    raw = read_object(path)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise UserError(f"{path}: model_type {raw.get('model_type')!r} is not supported; {', '.join(FAMILIES)} are")
    if "quantization_config" in raw:
        raise UserError(f"{path}: quantization_config is not supported; use a checkpoint without it")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what it warns of is settled here
            whole = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        fields = family.read(whole.to_dict())
        if family.config is T5Config:
            fields["tied"] = "lm_head.weight" not in tensor_files(folder)
        return family.config(family=raw["model_type"], **fields)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever the library says of a value that cannot be
        raise UserError(f"{path} holds what cannot be ({one_line(error)}); mend it") from None


def write_folder(folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer, shard: int = SHARD) -> None:
    """Writes a folder that transformers opens: config.json, generation_config.json, safetensors of at most ``shard``
    bytes each (with an index when there are several), the tokenizer. A "reward" head goes with it as the ``score`` of
    the family's sequence classification. UserError when the folder exists or the model is not one of its family."""
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder")
    family, backbone = FAMILIES[config.family], {k: v for k, v in params.items() if k != "reward"}
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(backbone)}
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    tensors = their_tensors(entries(family, config, leaves), leaves, config)
    architecture = family.architecture
    if "reward" in params:
        tensors = {name: make for name, make in tensors.items() if name.startswith(family.prefix)}
        tensors["score.weight"] = lambda: np.asarray(params["reward"]["kernel"])[None]
        architecture = re.sub("(LMHeadModel|ForCausalLM)$", "ForSequenceClassification", architecture)
    write_tensors(beside, tensors, shard)
    words = {"architectures": [architecture], "dtype": "float32", **tokenizer.specials}
    words |= {"num_labels": 1} if "reward" in params else {}
    made = transformers.AutoConfig.for_model(config.family, **FAMILIES[config.family].write(config), **words)
    made.save_pretrained(beside)
    if read_config(beside) != dataclasses.replace(config, compute_dtype="float32", remat="none"):
        raise UserError(f"this model is not quite a {config.family}: its config.json would not say what it is")
    transformers.GenerationConfig(**tokenizer.specials).save_pretrained(beside)
    tokenizer.save(beside)
    beside.rename(folder)


def read_tokenizer(folder: Path) -> Tokenizer:
    """A folder with tokenizer.json. UserError when it cannot be read."""
    try:
        fast = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the library raises, the user hears one line
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason}); tokenizer.json is needed") from None
    return wrap_tokenizer(fast)


def wrap_tokenizer(fast) -> Tokenizer:
    vocabulary = fast.get_vocab()
    return Tokenizer(
        encode=lambda text: fast(text)["input_ids"],
        encode_bare=lambda text: fast(text, add_special_tokens=False)["input_ids"],
        decode_all=lambda ids: fast.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        token_id=vocabulary.get,
        vocab_size=len(fast),
        save=fast.save_pretrained,
        specials={
            f"{kind}_token_id": i
            for kind in ("bos", "eos", "pad")
            if (i := getattr(fast, f"{kind}_token_id")) is not None
        },
    )


def train_tokenizer(texts: Sequence[str], vocab_size: int, markers: Sequence[str]) -> Tokenizer:
    """A byte-level BPE trained on the texts; ``markers`` are strings that are one token each.

    Specials: <pad> 0, <s> 1 (put before every text), </s> 2.
    """
    specials = ["<pad>", "<s>", "</s>"]
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.add_special_tokens(specials)
    bpe.add_tokens(list(markers))
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(markers),
        special_tokens=specials,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.add_tokens(list(markers))
    bpe.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return wrap_tokenizer(
        transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    )
