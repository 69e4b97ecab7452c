"""Hugging Face folder <-> (config, params) and tokenizer. The only file that imports transformers."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that PyTorch is absent is no news here

import numpy as np
import safetensors
import tokenizers
import transformers

from alignjax.models.tokenizer import Tokenizer
from alignjax.models.transformer import TransformerConfig
from alignjax.types import Params, UserError

MEBIBYTE = 2**20
COUNTS = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size",
)  # fmt: skip
BLOCK_NAMES = {  # ours -> Hugging Face's, inside model.layers.N; True where the matrix is transposed
    ("attention_norm", "scale"): ("input_layernorm.weight", False),
    ("mlp_norm", "scale"): ("post_attention_layernorm.weight", False),
    ("q", "kernel"): ("self_attn.q_proj.weight", True),
    ("k", "kernel"): ("self_attn.k_proj.weight", True),
    ("v", "kernel"): ("self_attn.v_proj.weight", True),
    ("o", "kernel"): ("self_attn.o_proj.weight", True),
    ("gate", "kernel"): ("mlp.gate_proj.weight", True),
    ("up", "kernel"): ("mlp.up_proj.weight", True),
    ("down", "kernel"): ("mlp.down_proj.weight", True),
}


def read_config(folder: Path) -> TransformerConfig:
    """config.json -> TransformerConfig. UserError on a family or an option not built yet, by name."""
    raw = read_object(folder / "config.json")
    if raw.get("model_type") != "llama":
        raise UserError(f"{folder}: model_type {raw.get('model_type')!r} is not supported; Llama folders are")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise UserError(f"{folder}/config.json: rope_parameters={rope!r} is no JSON object; mend it")
    kind = rope.get("rope_type", rope.get("type", "default"))
    refused = {
        f"rope type {kind!r}": kind != "default",
        f"hidden_act {raw.get('hidden_act')!r}": raw.get("hidden_act", "silu") != "silu",
        "attention_bias": raw.get("attention_bias", False),
        "mlp_bias": raw.get("mlp_bias", False),
        "quantization_config": "quantization_config" in raw,
    }
    for option, present in refused.items():
        if present:
            raise UserError(f"{folder}: {option} is not supported; use a checkpoint without it")
    for name in COUNTS:
        if not isinstance(raw.get(name), int | None):
            raise UserError(f"{folder}/config.json: {name}={raw[name]!r} is no whole number; mend it")
    try:
        heads, width = raw["num_attention_heads"], raw["hidden_size"]
        return TransformerConfig(
            vocab_size=raw["vocab_size"],
            width=width,
            layers=raw["num_hidden_layers"],
            heads=heads,
            kv_heads=raw.get("num_key_value_heads") or heads,
            head_dim=raw.get("head_dim") or width // heads,
            hidden=raw["intermediate_size"],
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
            norm_eps=raw.get("rms_norm_eps", 1e-6),
            tied=raw.get("tie_word_embeddings", False),
        )
    except KeyError as error:
        raise UserError(f"{folder}/config.json lacks {error}; it is not a whole Llama configuration") from None
    except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
        raise UserError(f"{folder}/config.json holds a value that cannot be ({error}); mend it") from None


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object. Raises UserError when the file holds none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a Hugging Face folder") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; fetch it again")
    return found


def content(folder: Path) -> str:
    """A mark of what lies in a folder, empty when there is none: its files' names and sizes, and of each the first and
    the last mebibyte, which tell apart two checkpoints of one shape without reading them whole."""
    mark = hashlib.sha256()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and path.suffix in (".json", ".safetensors", ".model", ".txt"):
            size = path.stat().st_size
            mark.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                mark.update(file.read(MEBIBYTE))
                file.seek(max(size - MEBIBYTE, 0))
                mark.update(file.read(MEBIBYTE))
    return mark.hexdigest()[:16] if folder.is_dir() else ""


def tensor_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it (one file, or shards with an index)."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = read_object(index).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
            raise UserError(f"{index} is damaged: it has no weight_map of names to files; fetch it again")
        outside = [file for file in names.values() if Path(file).name != file]
        if outside:
            raise UserError(f"{index}: shard {outside[0]!r} points outside the folder; mend the index")
        return {name: folder / file for name, file in names.items()}
    single = folder / "model.safetensors"
    if not single.exists():
        mend = "convert it to safetensors" if list(folder.glob("*.bin")) else "give a folder that has it"
        raise UserError(f"{single} is missing; {mend}")
    with open_tensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def open_tensors(path: Path):
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged or missing ({error}); fetch it again") from None


def read_params(folder: Path, config: TransformerConfig) -> Params:
    """Safetensors -> params (float32 NumPy arrays, layers stacked). UserError names a tensor that is
    missing, left over or misshapen."""
    files, c = tensor_files(folder), config
    left = set(files) - {"lm_head.weight"} - {n for n in files if n.endswith("rotary_emb.inv_freq")}

    def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in files:
            raise UserError(f"{folder}: tensor {name} is missing; the checkpoint is not whole")
        left.discard(name)
        with open_tensors(files[name]) as file:
            value = file.get_tensor(name).astype(np.float32)
        if value.shape != shape:
            raise UserError(f"{folder}: tensor {name} has shape {value.shape}, config.json says {shape}")
        return value

    q, kv = c.heads * c.head_dim, c.kv_heads * c.head_dim
    shapes = {"q": (q, c.width), "k": (kv, c.width), "v": (kv, c.width), "o": (c.width, q)}
    shapes |= {"gate": (c.hidden, c.width), "up": (c.hidden, c.width), "down": (c.width, c.hidden)}
    blocks: Params = {}
    for (module, leaf), (name, transposed) in BLOCK_NAMES.items():
        rows = [tensor(f"model.layers.{i}.{name}", shapes.get(module, (c.width,))) for i in range(c.layers)]
        blocks.setdefault(module, {})[leaf] = np.stack([row.T if transposed else row for row in rows])
    params: Params = {
        "embed": {"embedding": tensor("model.embed_tokens.weight", (c.vocab_size, c.width))},
        "norm": {"scale": tensor("model.norm.weight", (c.width,))},
        "blocks": blocks,
    }
    if not c.tied:
        params["head"] = {"kernel": tensor("lm_head.weight", (c.vocab_size, c.width)).T}
    if left:
        raise UserError(f"{folder}: tensor {min(left)} has no place in a Llama; is config.json of this checkpoint?")
    return params


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
