"""Exports are opened by transformers 4.57 too, which older programs are built on: logits, tokenizers, end tokens.

4.57 lies in a folder of its own (``make parity``) and runs in one process for all exports.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import transformers

from alignjax.checkpoints import huggingface
from tests.conftest import ROOT
from tests.parity.conftest import NOTES, SEED
from tests.parity.test_live import CASES, DECODERS, EVERY, TOLERANCE, random_model
from tests.test_tokenizers import CHAT, KINDS, TEXTS

OLDER = Path(sys.prefix) / "older"
SPOKEN = [TEXTS[0], " Sing on", "naïve 数 ☃", "a  b\tc", "</s>", "Human: no"]
CLASSES = ("LlamaTokenizerFast", "T5TokenizerFast", "GemmaTokenizerFast", "GPT2TokenizerFast", "Qwen2TokenizerFast")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Every export, with what 4.57 makes of it beside it."""
    folder = tmp_path_factory.mktemp("older")
    tokenizer = huggingface.train_tokenizer(TEXTS, 400, ("Human:",))
    for case in CASES:
        d = random_model(case)
        write_inputs(folder, case.name, d)
        huggingface.write_folder(folder / case.name, d.config, d.params, tokenizer)
        if not case.encodes:
            write_inputs(folder, f"{case.name}-reward", d)
            head = {"reward": {"kernel": reward_kernel(d)}}
            huggingface.write_folder(folder / f"{case.name}-reward", d.config, d.params | head, tokenizer)
    for name, fast in fast_tokenizers().items():
        (folder / name).mkdir()
        reread(fast, folder / f"{name}-source").save(folder / name)
    (folder / "texts.json").write_text(json.dumps(SPOKEN))
    paths = os.pathsep.join(map(str, (OLDER, ROOT)))
    command = [sys.executable, "-m", "tests.parity.older", str(folder)]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    return folder


def write_inputs(folder, name, d):
    np.savez(folder / f"{name}-inputs.npz", tokens=d.tokens, mask=d.mask, completion=d.completion)


def reward_kernel(d):
    return np.random.default_rng(SEED).standard_normal(d.config.width).astype(np.float32)


def fast_tokenizers():
    """Returns a tokenizer of every kind, one with a chat template, and one that says each class of transformers."""
    made = {f"tokenizer-{kind}": make() for kind, make in KINDS.items()}
    made["tokenizer-chat"] = KINDS["llama"]()
    made["tokenizer-chat"].chat_template = CHAT
    return made


def reread(fast, folder):
    fast.save_pretrained(folder)
    return huggingface.read_tokenizer(folder)


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


@pytest.mark.parametrize("name", [*(case.name for case in CASES), *fast_tokenizers()])
def test_the_older_reader_s_tokenizer_says_the_same(folder, name):
    """Ids with and without special tokens, their text again, the special tokens, a chat."""
    said, ours = said_of(folder, name), huggingface.read_tokenizer(folder / name)
    newer = transformers.AutoTokenizer.from_pretrained(folder / name)
    assert said["bare"] == [ours.encode_bare(text) for text in SPOKEN]
    assert said["ids"] == [newer(text)["input_ids"] for text in SPOKEN]
    assert said["texts"] == [ours.decode_all(ids) for ids in said["bare"]]
    assert said["specials"] == [ours.specials.get(f"{kind}_token_id") for kind in ("bos", "eos", "pad")]
    chat = [{"role": "user", "content": SPOKEN[0]}]
    assert said["chat"] == (newer.apply_chat_template(chat, tokenize=False) if newer.chat_template else None)
