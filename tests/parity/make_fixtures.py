"""Writes tests/fixtures/: a small checkpoint of each family, as transformers saves it, and what torch computes from it.

Run from the repository's root, deterministic:

    .venv/bin/python -m tests.parity.make_fixtures

Some folders get what the published checkpoints of their family have: bfloat16 weights, shards, config.json in older
words, names without the prefix, tensors that hold no parameter.
"""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.parity import referee
from tests.parity.cases import CASES, Case

FIXTURES = Path(__file__).parents[1] / "fixtures"
SEED = 20
LENGTHS, COMPLETION = (13, 3, 8), 12  # tokens; the windows are 4 to 7
BFLOAT16 = ("llama3", "qwen3", "gemma2")
MARGIN = 1e-3  # by which every greedy token's logit leads: ten times what logits may differ by
SHARDED = ("llama2",)
MASK = torch.ones(1, 1, 4, 4).tril().bool()
Tensors = dict[str, torch.Tensor]


class UnsuitableDraw(Exception):
    """A random model that makes no good fixture; the next one is drawn."""


def older_llama(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json with rope_theta and rope_scaling on their own."""
    rope = raw.pop("rope_parameters")
    return raw | {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope, "torch_dtype": raw.pop("dtype")}


def older_gemma3(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json with a pattern for layer types and two thetas, without the key that ties the head."""
    rope, kinds = raw.pop("rope_parameters"), raw.pop("layer_types")
    if kinds != ["sliding_attention", "full_attention"]:
        raise UnsuitableDraw("no pattern")
    if raw["tie_word_embeddings"]:
        del raw["tie_word_embeddings"]
    full = rope["full_attention"]
    return raw | {
        "sliding_window_pattern": 2, "rope_theta": full.pop("rope_theta"), "rope_scaling": full,
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
    }  # fmt: skip


def older_neox(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json with the older names of the rotary options."""
    rope = raw.pop("rope_parameters")
    return raw | {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}


def older_t5_v11(raw: dict[str, Any]) -> dict[str, Any]:
    """Returns the config.json in which ``tie_word_embeddings`` alone says that states are not scaled."""
    del raw["scale_decoder_outputs"]
    return raw | {"tie_word_embeddings": False}


def bare_gpt2(tensors: Tensors) -> Tensors:
    """Returns the tensors of the bare backbone, with its buffers."""
    bare = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    return bare | {"h.0.attn.bias": MASK.float(), "h.0.attn.masked_bias": torch.tensor(-1e4)}


def neox_buffers(tensors: Tensors) -> Tensors:
    """Returns the tensors with the buffers that published checkpoints have."""
    at = "gpt_neox.layers.0.attention."
    return tensors | {
        f"{at}bias": MASK,
        f"{at}masked_bias": torch.tensor(-1e9),
        f"{at}rotary_emb.inv_freq": MASK[0, 0].float(),
    }


def t5_leftovers(tensors: Tensors) -> Tensors:
    """Returns the tensors with the copies and the unused bias that published checkpoints have."""
    unused = torch.ones_like(tensors["decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"])
    shared = {f"{side}.embed_tokens.weight": tensors["shared.weight"].clone() for side in ("encoder", "decoder")}
    return tensors | shared | {"decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": unused}


OLDER: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "llama3": older_llama, "gemma3": older_gemma3, "gpt_neox": older_neox, "t5_v11": older_t5_v11,
}  # fmt: skip
STORED: dict[str, Callable[[Tensors], Tensors]] = {"gpt2": bare_gpt2, "gpt_neox": neox_buffers, "t5": t5_leftovers}


def write_checkpoint(case: Case, folder: Path, rng: np.random.Generator) -> None:
    """Writes a random model. Raises UnsuitableDraw when it has more than two layers."""
    model = referee.draw_model(case, rng)
    if model.config.num_hidden_layers != 2:
        raise UnsuitableDraw("layers take time to compile")
    if case.name in BFLOAT16:
        model = model.bfloat16()
    model.save_pretrained(folder, max_shard_size="40KB" if case.name in SHARDED else "1GB")
    (folder / "generation_config.json").unlink()
    config, whole = folder / "config.json", folder / "model.safetensors"
    raw = json.loads(config.read_text())
    config.write_text(json.dumps(OLDER.get(case.name, dict)(raw), indent=1, sort_keys=True) + "\n")
    if case.name in STORED:
        save_file(STORED[case.name](load_file(whole)), whole, metadata={"format": "pt"})


def write_case(case: Case, folder: Path, rng: np.random.Generator) -> None:
    """Writes a checkpoint and what transformers computes from the folder. Raises UnsuitableDraw."""
    write_checkpoint(case, folder, rng)
    model, _ = referee.load_model(case.model, folder)
    vocabulary, length = model.config.vocab_size, max(LENGTHS)
    mask = np.arange(length) < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, rng.integers(2, vocabulary, mask.shape), 0).astype(np.int32)
    completions = rng.integers(2, vocabulary, (len(LENGTHS), COMPLETION)).astype(np.int32)
    prompts = [row[:n].tolist() for row, n in zip(tokens, LENGTHS, strict=True)]
    outputs = referee.compute(model, prompts, completions)
    if outputs.margins.min() < MARGIN or len(np.unique(outputs.greedy)) < 12:
        raise UnsuitableDraw("a greedy token hardly leads, or always the same ones do")
    expected = {"prompt": tokens, "mask": mask, "completion": completions, "logits": outputs.logits,
                "greedy": outputs.greedy}  # fmt: skip
    expected |= {"encoded": outputs.encoded} if outputs.encoded is not None else {}
    safetensors.numpy.save_file(expected, folder / "expected.safetensors")
    print(f"{case.name}: |logits| <= {np.abs(outputs.logits).max():.1f}, greedy margin {outputs.margins.min():.4f}, "
          f"{len(np.unique(outputs.greedy))} tokens")  # fmt: skip


README = f"""# Checkpoints, and what transformers says of them

Each folder is a tiny random model of one family, saved by transformers {transformers.__version__}, and
`expected.safetensors`: right-padded prompts, completions, and what torch {torch.__version__} computes from them in
float32 (the logits of each completion token, 64 greedy tokens, an encoder's states). `tests/test_families.py` reads
them without torch.

Written by `.venv/bin/python -m tests.parity.make_fixtures`, seed {SEED}.
"""


def main() -> None:
    """Writes all fixtures."""
    shutil.rmtree(FIXTURES, ignore_errors=True)
    FIXTURES.mkdir()
    (FIXTURES / "README.md").write_text(README)
    for i, case in enumerate(CASES):
        for attempt in itertools.count():
            try:
                write_case(case, FIXTURES / case.name, np.random.default_rng([SEED, i, attempt]))
                break
            except UnsuitableDraw:
                shutil.rmtree(FIXTURES / case.name, ignore_errors=True)


if __name__ == "__main__":
    main()
