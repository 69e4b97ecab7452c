"""Whole folders to damage: the fixtures, each with a tokenizer of its ids, and what the package computes from one."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import tokenizers
import transformers

from alignjax.checkpoints import peft, weights
from alignjax.distributed.sharding import make_mesh
from alignjax.models.build import build
from alignjax.pipeline.experiment import Context, Experiment
from alignjax.pipeline.stages import LoadCheckpoint
from alignjax.tasks.task import EOS, Format, Task
from alignjax.types import Params, Tokens
from tests.test_families import ENCODERS, FIXTURES, NAMES, expected

for module in (weights, peft):  # most inputs leave the configuration as it is: its shapes are found once
    module.abstract_params = functools.lru_cache(maxsize=100)(weights.abstract_params)
CONFIG, TOKENIZER, GENERATION = "config.json", "tokenizer_config.json", "generation_config.json"
TEXTS = ("hello there, a cat. sat", "a", "", "  two  spaces", "user</s>x", "naïve ☃")
_CORPUS = ["the cat sat on a mat, there. hello user, wait: a dog jumps quickly over five lazy boxes"] * 4
_TASK = Task(name="none", source=None, format=Format(before=" ", end="", stop=(EOS,)))
_CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}a{% endif %}"
)


def make_folder(name: str, parent: Path) -> Path:
    """Returns a new copy of a fixture with a tokenizer and a generation_config.json."""
    folder = parent / name
    shutil.copytree(FIXTURES / name, folder, ignore=shutil.ignore_patterns("expected*"))
    make_tokenizer(name in ENCODERS).save_pretrained(folder)
    raw = json.loads((folder / CONFIG).read_text())
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    specials = {key: raw[key] for key in names if raw.get(key) is not None}
    sampling = {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "max_length": 64}
    (folder / GENERATION).write_text(json.dumps(specials | {"eos_token_id": [specials["eos_token_id"], 3]} | sampling))
    published = {"add_bos_token": True, "add_eos_token": False, "padding_side": "left", "split_special_tokens": False}
    fields = json.loads((folder / TOKENIZER).read_text()) | published
    (folder / TOKENIZER).write_text(json.dumps(fields))
    return folder


@functools.cache
def make_tokenizer(encodes: bool) -> Any:
    """Returns a tokenizer of 40 ids, fewer than any fixture's.

    That of an encoder-decoder puts its end token behind a text, the other <s> before it.
    """
    specials = ["<pad>", "</s>", "<unk>"] if encodes else ["<pad>", "<s>", "</s>", "<unk>"]
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>", fuse_unk=True))
    inner.pre_tokenizer, inner.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=40, special_tokens=specials, show_progress=False)
    inner.train_from_iterator(_CORPUS, trainer)
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>" if encodes else "<s> $A",
        special_tokens=[(name, inner.token_to_id(name)) for name in specials[1 : 2 if encodes else 3]],
    )
    roles = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | (
        {} if encodes else {"bos_token": "<s>"}
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **roles)


def documents(file: str, folders: Mapping[str, Path]) -> dict[str, Any]:
    """Returns the JSON object of a file in each of the folders."""
    return {name: json.loads((folder / file).read_text()) for name, folder in folders.items()}


def make_chat_folder(folder: Path) -> Path:
    """Returns a new folder whose tokenizer has a chat template."""
    make_folder("llama2", folder.parent / "chats").rename(folder)
    fields = json.loads((folder / TOKENIZER).read_text())
    (folder / TOKENIZER).write_text(json.dumps(fields | {"chat_template": _CHAT}))
    return folder


def make_folders(parent: Path) -> dict[str, Path]:
    """Returns a folder of each fixture by name."""
    return {name: make_folder(name, parent) for name in NAMES}


def checked(folder: Path, chat: bool = False) -> LoadCheckpoint:
    """Returns the stage that loads a folder, after its check. Raises UserError where that refuses."""
    stage = LoadCheckpoint(str(folder), chat=chat)
    experiment = Experiment(_TASK, {"base": stage})
    stage.check(Context(experiment, None, "base", make_mesh(experiment.mesh)))
    return stage


def prompts(name: str) -> list[list[int]]:
    """Returns the fixture's prompts without padding."""
    want = expected(name)
    return [row[mask].tolist() for row, mask in zip(want["prompt"], want["mask"], strict=True)]


@functools.cache
def compiled_logits(config: Any) -> Callable[..., Any]:
    """Returns the compiled function (params, prompt, completion) -> logits [B, N, V]."""
    network = build(config)
    return jax.jit(lambda *arguments: network.logits(arguments[0], network.completion_states(*arguments)))


def our_logits(name: str, config: Any, params: Params) -> np.ndarray:
    """Returns the logits of the fixture's completions, [B, N, V]."""
    want = expected(name)
    completion = Tokens(want["completion"], np.ones(want["completion"].shape, bool))
    return np.asarray(compiled_logits(config)(params, Tokens(want["prompt"], want["mask"]), completion))


@functools.lru_cache(maxsize=1000)
def checkpoint_logits(name: str, config: Any) -> np.ndarray:
    """Returns ``our_logits`` of the fixture's own tensors, once for each configuration.

    Without compilation: it would take most of the time, since most configurations are computed once.
    """
    params = weights.read_params(FIXTURES / name, config)
    with jax.disable_jit():
        return our_logits(name, config, params)
