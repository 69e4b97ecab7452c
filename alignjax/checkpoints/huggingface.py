"""Hugging Face folder <-> (config, params) and tokenizer. The only file that imports transformers."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is no news here
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # what it warns of in a config.json is settled here

import jax
import numpy as np
import tokenizers
import transformers

from alignjax.checkpoints.families import FAMILIES, entries
from alignjax.checkpoints.weights import read_object, tensor_files, their_tensors, write_tensors
from alignjax.distributed.sharding import path_name
from alignjax.errors import UserError, one_line
from alignjax.models.build import ModelConfig, build
from alignjax.models.t5 import T5Config
from alignjax.models.tokenizer import Message, Tokenizer
from alignjax.types import Params

SHARD = 5 * 10**9  # bytes of a written file, about


def read_config(folder: Path) -> ModelConfig:
    """config.json -> configuration. UserError on a family or an option that is not supported, by name, and on sizes
    that are missing or do not go together. Code that a folder brings is never run."""
    path = folder / "config.json"
    raw = read_object(path)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise UserError(f"{path}: model_type {raw.get('model_type')!r} is not supported; {', '.join(FAMILIES)} are")
    if raw.get("quantization_config") is not None:
        raise UserError(f"{path}: quantization_config is not supported; use a checkpoint without it")
    whole = their_config(folder)
    try:
        for size in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            theirs = whole.attribute_map.get(size, size)
            if hasattr(whole, theirs) and not {size, theirs} & set(raw):  # it would be filled in with another model's
                raise UserError(f"it lacks {theirs}; fetch it again")
        fields = family.read(whole.to_dict())
        if family.config is T5Config:
            fields["tied"] = "lm_head.weight" not in tensor_files(folder)
        config = family.config(family=raw["model_type"], **fields)
        build(config)  # refuses sizes that do not go together
        return config
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # whatever the library says of a value that cannot be
        raise UserError(f"{path} holds a value that cannot be ({one_line(error)}); mend it") from None


def their_config(folder: Path) -> Any:
    """config.json as transformers reads it. Raises UserError with what it says of a value that cannot be."""
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        told = one_line(error)
        raise UserError(f"{folder / 'config.json'} holds a value that cannot be ({told}); mend it") from None


def write_folder(folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer, shard: int = SHARD) -> None:
    """Writes a folder that transformers opens: config.json, generation_config.json, safetensors of at most ``shard``
    bytes each (with an index when there are several), the tokenizer. A "reward" head goes with it as the ``score`` of
    the family's sequence classification. UserError when the folder exists or the model is not one of its family."""
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder")
    tensors, architecture = named_tensors(config, params)
    beside = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        write_tensors(beside, tensors, shard)
        words = {"architectures": [architecture], "dtype": str(params["embed"]["embedding"].dtype)} | (
            {"num_labels": 1} if "reward" in params else {}
        )
        write_config(beside, config, words | dict(tokenizer.specials))
        tokenizer.save(beside)
        writing = dict(tokenizer.specials) | ({"eos_token_id": list(tokenizer.ends)} if tokenizer.ends else {})
        writing |= {"decoder_start_token_id": config.start_token} if isinstance(config, T5Config) else {}
        transformers.GenerationConfig(**writing).save_pretrained(beside)
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # there only when something failed


def write_config(folder: Path, config: ModelConfig, words: dict[str, Any]) -> None:
    """config.json beside the tensors, with ``words`` that do not describe the network. UserError unless it reads back
    as the configuration, but for what is no part of a checkpoint."""
    made = transformers.AutoConfig.for_model(config.family, **words | FAMILIES[config.family].write(config))
    if isinstance(config, T5Config):
        # It sets this to True whatever it is given; by it older releases tell T5 1.0 from its successors.
        made.tie_word_embeddings = config.scaled_output
    made.save_pretrained(folder)
    if read_config(folder) != dataclasses.replace(config, compute_dtype="float32", remat="none"):
        raise UserError(f"this model is not quite a {config.family}: its config.json would not say what it is")


def named_tensors(config: ModelConfig, params: Params) -> tuple[dict[str, Callable[[], np.ndarray]], str]:
    """Tensor name -> what makes it, and the class that transformers opens them with."""
    family, backbone = FAMILIES[config.family], {k: v for k, v in params.items() if k != "reward"}
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(backbone)}
    tensors = their_tensors(entries(family, config, leaves), leaves, config)
    if "reward" not in params:
        return tensors, family.architecture
    if not family.scorer:
        raise UserError(f"{family.architecture} has no place for a reward head; export a decoder-only model")
    tensors = {name: make for name, make in tensors.items() if name.startswith(family.prefix)}
    tensors["score.weight"] = lambda: np.asarray(params["reward"]["kernel"])[None]
    return tensors, family.scorer


def read_tokenizer(folder: Path) -> Tokenizer:
    """A folder with tokenizer.json. UserError when it cannot be read."""
    try:
        fast = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever the library raises, the user hears one line
        if (folder / "config.json").exists():
            their_config(folder)  # the tokenizer's kind is looked up there: what is wrong in it is told of it
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason}); tokenizer.json is needed") from None
    ends = generation_ends(folder)
    return wrap_tokenizer(fast, ends or ((fast.eos_token_id,) if fast.eos_token_id is not None else ()))


def generation_ends(folder: Path) -> tuple[int, ...]:
    """The end tokens that generation_config.json names (a chat model has several); empty without one."""
    path = folder / "generation_config.json"
    found = read_object(path).get("eos_token_id") if path.exists() else None
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(isinstance(i, int) for i in ids):
        raise UserError(f"{path} is damaged: eos_token_id={found!r} is no token; mend it")
    return tuple(ids)


def wrap_tokenizer(fast: Any, ends: tuple[int, ...]) -> Tokenizer:
    vocabulary = fast.get_vocab()
    bare, full = (fast("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    before = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    behind = len(full) - before - len(bare)

    def save(folder: Path) -> None:
        fast.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}))

    def render(messages: Sequence[Message]) -> str:
        return fast.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    return Tokenizer(
        encode=lambda text: (ids := fast(text)["input_ids"])[: len(ids) - behind],
        encode_bare=lambda text: fast(text, add_special_tokens=False)["input_ids"],
        decode_all=lambda ids: fast.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        token_id=vocabulary.get,
        vocab_size=len(fast),
        save=save,
        specials={
            f"{kind}_token_id": i
            for kind in ("bos", "eos", "pad")
            if (i := getattr(fast, f"{kind}_token_id")) is not None
        },
        ends=ends,
        render=render if fast.chat_template else None,
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
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
    return wrap_tokenizer(fast, (fast.eos_token_id,))
