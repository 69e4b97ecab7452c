"""Hugging Face folder <-> (config, params) and tokenizer. The only module that imports transformers."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it would warn that PyTorch is absent
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read_config checks what it would warn of

import jax
import numpy as np
import tokenizers
import transformers

from alignjax.checkpoints.config_entries import legacy_rope, read_token
from alignjax.checkpoints.families import FAMILIES, Family, tensor_entries
from alignjax.checkpoints.folders import new_folder, read_json_object, tensor_files, write_tensors
from alignjax.checkpoints.weights import REWARD_TENSOR, checkpoint_tensors
from alignjax.distributed.sharding import path_name
from alignjax.errors import UserError, one_line, short_repr
from alignjax.models.build import ModelConfig, build
from alignjax.models.t5 import T5Config
from alignjax.models.tokenizer import Message, Tokenizer
from alignjax.types import Params

MAX_SHARD_BYTES = 5 * 10**9
_LAYERS, _MOST_LAYERS = {"num_hidden_layers", "n_layer", "num_layers", "num_decoder_layers"}, 10**6
"""transformers lists the kinds of all layers before anything compares their number with the tensors."""
_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")


def read_config(folder: Path) -> ModelConfig:
    """Returns the configuration of a folder's config.json. Never runs code that the folder brings.

    Raises UserError, which names the file, on a family or an option that is not supported, and on sizes that are
    missing or do not fit together.
    """
    path = folder / "config.json"
    raw = read_json_object(path)
    family = FAMILIES.get(str(raw.get("model_type")))
    if family is None:
        raise UserError(f"{path}: model_type {raw.get('model_type')!r} is not supported; {', '.join(FAMILIES)} are")
    if raw.get("quantization_config") is not None:
        raise UserError(f"{path}: quantization_config is not supported; use a checkpoint without it")
    for name in _LAYERS & raw.keys():
        if isinstance(raw[name], int) and raw[name] > _MOST_LAYERS:
            raise UserError(f"{path}: {name}={raw[name]} is beyond {_MOST_LAYERS}; correct it")
    completed = _transformers_config(folder)
    try:
        return _model_config(folder, raw, family, completed)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # a value of a wrong type can raise anything
        raise UserError(f"{path} has an invalid value ({one_line(error)}); correct it") from None


def _transformers_config(folder: Path) -> Any:
    """Returns config.json as transformers reads it. Raises UserError with its message when it refuses a value."""
    try:
        return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library raises many kinds
        reason = one_line(error)
        raise UserError(f"{folder / 'config.json'} has an invalid value ({reason}); correct it") from None


def _model_config(folder: Path, raw: dict[str, Any], family: Family, completed: Any) -> ModelConfig:
    """Returns our configuration. ``raw`` is the file as it is, ``completed`` with the defaults of transformers."""
    values = completed.to_dict()
    for size in _SIZES:
        key = completed.attribute_map.get(size, size)
        if key in values and not {size, key} & set(raw):  # the default would be the size of another model
            raise UserError(f"it lacks {key}; fetch it again")
    fields = family.read(values)
    if family.config is T5Config:
        fields["tied"] = "lm_head.weight" not in tensor_files(folder)
        _check_start(folder / "generation_config.json", fields["start_token"])
    config = family.config(family=raw["model_type"], **fields)
    build(config)  # raises UserError when sizes do not fit together
    return config


def _check_start(path: Path, start: int) -> None:
    """Raises UserError when generation_config.json starts an encoder-decoder's texts with another token."""
    found = read_json_object(path).get("decoder_start_token_id") if path.exists() else None
    if found not in (None, start):
        raise UserError(f"decoder_start_token_id is {start}, and {path} has {short_repr(found)}; correct one of them")


def write_folder(
    folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes a folder that transformers opens, or nothing.

    The folder holds config.json, generation_config.json, the tokenizer, and safetensors files of at most
    ``max_shard_bytes`` each, with an index when there are several. A "reward" head in ``params`` is written as the
    ``score`` of the family's sequence classification.

    Raises UserError when the folder exists, when its family's config.json cannot describe the model, and when
    transformers would read another tokenizer from it.
    """
    tensors, architecture = _exported_tensors(config, params)
    with new_folder(folder) as partial:
        write_tensors(partial, tensors, max_shard_bytes)
        options: dict[str, Any] = {"architectures": [architecture], "dtype": str(params["embed"]["embedding"].dtype)}
        options |= {"num_labels": 1} if "reward" in params else {}
        _write_config(partial, config, options | dict(tokenizer.specials))
        tokenizer.save(partial)
        _check_tokenizer(partial, config.family)
        generation = dict(tokenizer.specials) | (
            {"eos_token_id": list(tokenizer.end_tokens)} if tokenizer.end_tokens else {}
        )
        generation |= {"decoder_start_token_id": config.start_token} if isinstance(config, T5Config) else {}
        transformers.GenerationConfig(**generation).save_pretrained(partial)


def _write_config(folder: Path, config: ModelConfig, options: dict[str, Any]) -> None:
    """Writes config.json beside the tensors; ``options`` are the entries that do not describe the network.

    Raises UserError unless it reads back as ``config``, without the fields that are no part of a checkpoint.
    """
    fields = FAMILIES[config.family].write(config)
    described = transformers.AutoConfig.for_model(config.family, **options | fields)
    if isinstance(config, T5Config):
        # transformers sets this to True whatever it is given; older releases tell T5 1.0 from T5 v1.1 by it.
        described.tie_word_embeddings = config.scaled_output
    described.save_pretrained(folder)
    written = read_json_object(folder / "config.json") | legacy_rope(config.family, fields)
    (folder / "config.json").write_text(json.dumps(written, indent=2))
    if read_config(folder) != dataclasses.replace(config, compute_dtype="float32", remat="none"):
        raise UserError(
            f"this model cannot be exported as {config.family}: its config.json has no place for all of its options"
        )


def _check_tokenizer(folder: Path, family: str) -> None:
    """Raises UserError when transformers reads another tokenizer from the folder than was saved.

    For some families it takes the family's own rules of splitting texts, whatever the folder says.
    """
    path = folder / "tokenizer.json"
    if path.exists():
        reader = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        saved, read = read_json_object(path), json.loads(reader.backend_tokenizer.to_str())
        if any(saved.get(part) != read.get(part) for part in ("normalizer", "pre_tokenizer")):
            raise UserError(f"transformers reads the tokenizer of a {family} folder as {type(reader).__name__}, which "
                            "splits texts in another way; train the model with the family's own tokenizer")  # fmt: skip


def _exported_tensors(config: ModelConfig, params: Params) -> tuple[dict[str, Callable[[], np.ndarray]], str]:
    """Returns tensor name -> a function that makes the tensor, and the class with which transformers opens them.

    Raises UserError when the family has no tensor for a parameter, or no class with a reward head.
    """
    family, backbone = FAMILIES[config.family], {k: v for k, v in params.items() if k != "reward"}
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(backbone)}
    tensors = checkpoint_tensors(tensor_entries(family, config, leaves), leaves, config)
    if "reward" not in params:
        return tensors, family.architecture
    if not family.reward_architecture:
        raise UserError(f"{family.architecture} has no place for a reward head; export a decoder-only model")
    tensors = {name: make for name, make in tensors.items() if name.startswith(family.prefix)}
    tensors[REWARD_TENSOR] = lambda: np.asarray(params["reward"]["kernel"])[None]
    return tensors, family.reward_architecture


def read_tokenizer(folder: Path) -> Tokenizer:
    """Returns the tokenizer of a folder with tokenizer.json.

    Raises UserError when it cannot be read, and when it gives an id for which the model in the folder, if there is one,
    has no embedding.
    """
    ends = read_end_tokens(folder)
    try:
        fast = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = wrap_tokenizer(fast, ends or ((fast.eos_token_id,) if fast.eos_token_id is not None else ()))
        appended = _appended(fast)
    except Exception as error:  # the library raises many kinds
        if (folder / "config.json").exists():
            _transformers_config(folder)  # transformers looks there for the tokenizer's class: name that error first
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{folder}: the tokenizer cannot be read ({reason}); tokenizer.json is needed, and a "
                        "tokenizer_config.json that fits it") from None  # fmt: skip
    _check_embeddings(folder, tokenizer)
    _check_appended(folder, appended)
    return tokenizer


def _check_appended(folder: Path, tokens: list[int]) -> None:
    """Raises UserError when the tokenizer ends a text in other tokens than the folder's encoder-decoder.

    Our encoder appends the model's end token itself, and transformers leaves that to the tokenizer.
    """
    path = folder / "config.json"
    family = FAMILIES.get(str(read_json_object(path).get("model_type"))) if path.exists() else None
    if not tokens or family is None or family.config is not T5Config:
        return
    end = read_token(_transformers_config(folder).to_dict(), "eos_token_id")
    if tokens != [end]:
        raise UserError(f"{path}: eos_token_id is {end}, and the tokenizer ends every text in {tokens}; correct one")


def _check_embeddings(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises UserError when the largest id or an end token is beyond the embeddings of the folder's model."""
    path = folder / "config.json"
    count, largest = read_json_object(path).get("vocab_size") if path.exists() else None, tokenizer.vocab_size - 1
    if not isinstance(count, int):
        return
    if (end := max(tokenizer.end_tokens, default=0)) >= count:
        raise UserError(f"{folder}: the end token {end} is beyond the model's embeddings, for ids up to {count - 1}; "
                        "correct eos_token_id in generation_config.json or config.json")  # fmt: skip
    if count <= largest:
        piece = tokenizer.decode_all([largest])
        raise UserError(f"{folder}: the tokenizer gives {piece!r} the id {largest}, and the model has embeddings for "
                        f"ids up to {count - 1}; give the model's own tokenizer")  # fmt: skip


def read_end_tokens(folder: Path) -> tuple[int, ...]:
    """Returns the end tokens of generation_config.json (a chat model has several), else of config.json, else ().

    Raises UserError when they are not integers.
    """
    for path in (folder / "generation_config.json", folder / "config.json"):
        value = read_json_object(path).get("eos_token_id") if path.exists() else None
        tokens = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(token) is int and token >= 0 for token in tokens):
            raise UserError(f"{path} is damaged: eos_token_id={short_repr(value)} is no token; correct it")
        if tokens:
            return tuple(tokens)
    return ()


def wrap_tokenizer(fast: Any, end_tokens: tuple[int, ...]) -> Tokenizer:
    """Returns our functions over a fast tokenizer of transformers.

    ``encode`` puts the special tokens before a text that the tokenizer would put there, and none behind it.
    """
    special_tokens = {"bos": fast.bos_token_id, "eos": fast.eos_token_id, "pad": fast.pad_token_id}
    appended, vocabulary = len(_appended(fast)), fast.get_vocab()

    def save(folder: Path) -> None:
        """Writes the tokenizer's files and its end tokens."""
        fast.save_pretrained(folder)
        path = folder / "tokenizer_config.json"
        fields = json.loads(path.read_text("utf-8"))
        path.write_text(json.dumps(_legacy_tokenizer(fields), indent=2, ensure_ascii=False), "utf-8")
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(end_tokens)}))

    def render(messages: Sequence[Message]) -> str:
        """Returns messages as text by the chat template, ending where the assistant's turn begins."""
        return fast.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)

    return Tokenizer(
        encode=lambda text: (ids := fast(text)["input_ids"])[: len(ids) - appended],
        encode_bare=lambda text: fast(text, add_special_tokens=False)["input_ids"],
        decode_all=lambda ids: fast.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False),
        token_id=vocabulary.get,
        vocab_size=max([*vocabulary.values(), *fast("")["input_ids"]]) + 1,  # ids may have gaps
        save=save,
        specials={f"{kind}_token_id": token for kind, token in special_tokens.items() if token is not None},
        end_tokens=end_tokens,
        render=render if fast.chat_template and isinstance(fast.chat_template, str | dict) else None,
    )


def _legacy_tokenizer(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tokenizer_config.json of transformers 5 in the words that transformers 4 knows too."""
    legacy = dict(fields)
    if legacy.get("tokenizer_class") == "TokenizersBackend":
        legacy["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(legacy.get("extra_special_tokens"), list):  # a mapping in transformers 4, which refuses a list
        legacy["additional_special_tokens"] = legacy.pop("extra_special_tokens")
    return legacy


def _appended(fast: Any) -> list[int]:
    """Returns the special tokens that the tokenizer appends to a text."""
    bare, full = (fast("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    prepended = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
    return full[prepended + len(bare) :]


def train_tokenizer(texts: Sequence[str], vocab_size: int, markers: Sequence[str]) -> Tokenizer:
    """Returns a byte-level BPE of at most ``vocab_size`` tokens trained on the texts.

    Each of ``markers`` is one token. Special tokens: <pad> 0, <s> 1 (put before every text), </s> 2.
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
