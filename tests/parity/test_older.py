"""Exports are opened by transformers 4.57 too, which older programs are built on: logits, tokenizers, end tokens.

4.57 lies in a folder of its own (``make parity``) and runs in one process for all exports.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import tokenizers
import transformers

from alignjax.checkpoints import huggingface
from tests.conftest import ROOT
from tests.parity.conftest import NOTES, SEED
from tests.parity.test_live import CASES, DECODERS, EVERY, TOLERANCE, random_model
from tests.test_checkpoint_errors import edit
from tests.test_tokenizers import CHAT, KINDS, TEXTS

OLDER = Path(sys.prefix) / "older"
SPOKEN = [TEXTS[0], " Sing on", "naïve 数 ☃", "a  b\tc", "</s>", "Human: no"]
CLASSES = {
    "LlamaTokenizer": "llama", "GemmaTokenizer": "llama", "T5Tokenizer": "unigram", "GPT2Tokenizer": "bytes",
    "Qwen2Tokenizer": "bytes", "GPTNeoXTokenizer": "bytes",
}  # fmt: skip
"""What tokenizer_config.json may name, and the kind of tokenizer that it belongs to."""
TOKENIZERS = [f"tokenizer-{name}" for name in (*KINDS, "chat", *CLASSES)]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Every export, with what 4.57 makes of it beside it."""
    folder = tmp_path_factory.mktemp("older")
    for case in CASES:
        d = random_model(case)
        export(folder / case.name, d, {})
        if not case.encodes:
            export(folder / f"{case.name}-reward", d, {"reward": {"kernel": reward_kernel(d)}})
    for name in TOKENIZERS:
        (folder / name).mkdir()
        opened(name, folder / "sources" / name).save(folder / name)
    (folder / "texts.json").write_text(json.dumps(SPOKEN))
    paths = os.pathsep.join(map(str, (OLDER, ROOT)))
    command = [sys.executable, "-m", "tests.parity.older", str(folder)]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


@functools.cache
def byte_tokenizer():
    return huggingface.train_tokenizer(TEXTS, 400, ("Human:",))


@functools.cache
def tokenizer_of(family):
    """Returns what is exported with a model. Transformers reads any tokenizer of a Qwen 2 as Qwen's."""
    with tempfile.TemporaryDirectory() as folder:
        return opened("Qwen2Tokenizer", Path(folder) / "a") if family == "qwen2" else byte_tokenizer()


def unigram():
    """Returns a tokenizer of T5's kind."""
    inner = tokenizers.Tokenizer(tokenizers.models.Unigram())
    inner.pre_tokenizer, inner.decoder = tokenizers.pre_tokenizers.Metaspace(), tokenizers.decoders.Metaspace()
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=100, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    inner.train_from_iterator(TEXTS, trainer)
    specials = dict(eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **specials)


def opened(name, folder):
    """Returns a tokenizer as we read it from a folder of its kind, which says the class where ``name`` has one."""
    name = name.removeprefix("tokenizer-")
    kind = "llama" if name == "chat" else CLASSES.get(name, name)
    if kind == "bytes":
        folder.mkdir(parents=True)
        byte_tokenizer().save(folder)
    else:
        fast = unigram() if kind == "unigram" else KINDS[kind]()
        fast.chat_template = CHAT if name == "chat" else None
        fast.save_pretrained(folder)
    if name in CLASSES:
        edit(folder / "tokenizer_config.json", tokenizer_class=name)
    return huggingface.read_tokenizer(folder)


def export(folder, d, head):
    """Writes a model's folder, and what 4.57 is to compute from it."""
    np.savez(f"{folder}-inputs.npz", tokens=d.tokens, mask=d.mask, completion=d.completion)
    huggingface.write_folder(folder, d.config, d.params | head, tokenizer_of(d.config.family))


def reward_kernel(d):
    return np.random.default_rng(SEED).standard_normal(d.config.width).astype(np.float32)


def assert_close(folder, name, ours):
    theirs = np.load(folder / f"{name}.npz")["logits"]
    NOTES.append(f"{name} in transformers 4.57: within {np.abs(ours - theirs).max():.1e}")
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE)


def said_of(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@EVERY
def test_the_older_reader_computes_the_same_logits(folder, case):
    assert_close(folder, case.name, random_model(case).ours.logits[0])
    said = said_of(folder, case.name)
    assert not said["mismatches"] and said["end_tokens"] == [2]


@DECODERS
def test_the_older_reader_scores_the_same(folder, case):
    d, name = random_model(case), f"{case.name}-reward"
    assert_close(folder, name, (d.ours.last_state[0] @ reward_kernel(d))[:, None])
    assert not said_of(folder, name)["mismatches"]


@pytest.mark.parametrize("name", [*(case.name for case in CASES), *TOKENIZERS])
def test_the_older_reader_s_tokenizer_says_the_same(folder, name):
    """Ids with and without special tokens, their text again, the special tokens, a chat."""
    said, newer = said_of(folder, name), transformers.AutoTokenizer.from_pretrained(folder / name)
    ours = huggingface.read_tokenizer(folder / name) if name in TOKENIZERS else tokenizer_of(name)
    assert said["bare"] == [ours.encode_bare(text) for text in SPOKEN]
    assert said["ids"] == [newer(text)["input_ids"] for text in SPOKEN]
    assert said["texts"] == [ours.decode_all(ids) for ids in said["bare"]]
    assert said["specials"] == [ours.specials.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")]
    chat = [{"role": "user", "content": SPOKEN[0]}]
    assert said["chat"] == (newer.apply_chat_template(chat, tokenize=False) if name == "tokenizer-chat" else None)
