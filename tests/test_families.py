"""Ten families of checkpoints against what torch computes from them, and back to files.

``tests/parity`` wrote the fixtures. One compiled program for each checkpoint computes everything, over rows padded on
the right and on the left.
"""

import dataclasses
import functools
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import safetensors.numpy

from alignjax.checkpoints import huggingface, weights
from alignjax.checkpoints.families import FAMILIES
from alignjax.errors import UserError
from alignjax.models.build import build
from alignjax.models.decoder import UNBOUNDED
from alignjax.models.t5 import T5Config, encoder
from alignjax.models.tokenizer import Tokenizer
from alignjax.sampling.process import Sampling, sample
from alignjax.types import Tokens

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(path.name for path in FIXTURES.iterdir() if path.is_dir())
ENCODERS = [name for name in NAMES if "t5" in name]
TOLERANCE = 1e-4  # of logits and states
NEW_TOKENS = 64
TOKENIZER = Tokenizer(
    encode=None, encode_bare=None, decode_all=None, token_id=None, vocab_size=0, save=lambda folder: None,
    specials={"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}, end_tokens=(2, 3),
)  # fmt: skip


class Outputs(NamedTuple):
    """What our model computes, each [2 paddings, B, ...]: rows padded on the right, and the same on the left."""

    logits: np.ndarray
    greedy: np.ndarray
    encoded: np.ndarray | None


@functools.cache
def checkpoint(name):
    """Returns (config, params) of a fixture."""
    config = huggingface.read_config(FIXTURES / name)
    return config, weights.read_params(FIXTURES / name, config)


@functools.cache
def expected(name):
    return safetensors.numpy.load_file(FIXTURES / name / "expected.safetensors")


def pad_both_sides(tokens, mask):
    """Returns the right-padded rows, then the same rows left-padded with stray tokens in the padding."""
    order = np.argsort(mask, axis=1, kind="stable")
    left = [np.take_along_axis(x, order, axis=1) for x in (np.where(mask, tokens, 3), mask)]
    return Tokens(np.concatenate([tokens, left[0]]), np.concatenate([mask, left[1]]))


@functools.cache
def outputs(name):
    config, params = checkpoint(name)
    model, want = build(config), expected(name)

    @jax.jit
    def everything(params, prompt, completion):
        logits = model.logits(params, model.completion_states(params, prompt, completion))
        process = model.prefill(params, prompt, NEW_TOKENS)
        keys = jax.random.split(jax.random.key(0), len(prompt.tokens))
        written = sample(process, keys, NEW_TOKENS, (), Sampling(temperature=0.0)).completion.tokens
        return logits, written, encoder(config)(params, prompt)[0] if isinstance(config, T5Config) else None

    completion = np.concatenate([want["completion"]] * 2)
    arrays = everything(
        params, pad_both_sides(want["prompt"], want["mask"]), Tokens(completion, np.ones_like(completion, bool))
    )
    return Outputs(*jax.tree.map(lambda x: np.asarray(x).reshape(2, -1, *x.shape[1:]), arrays))


def test_every_family_has_a_fixture():
    assert {checkpoint(name)[0].family for name in NAMES} == set(FAMILIES)


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_the_reference_s_whatever_the_padding(name):
    for logits in outputs(name).logits:
        np.testing.assert_allclose(logits, expected(name)["logits"], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_cached_greedy_decoding_writes_the_reference_s_tokens(name):
    for greedy in outputs(name).greedy:
        np.testing.assert_array_equal(greedy, expected(name)["greedy"])


@pytest.mark.parametrize("name", ENCODERS)
def test_an_encoder_s_states_are_the_reference_s(name):
    want, real = expected(name)["encoded"], np.pad(expected(name)["mask"], ((0, 0), (1, 0)), constant_values=True)
    for encoded in outputs(name).encoded:
        np.testing.assert_allclose(encoded[real], want[real], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", NAMES)
def test_a_written_folder_is_read_back_bit_for_bit(tmp_path, name):
    """Whole and in shards, whatever names, dtype and dialect the checkpoint came in."""
    config, params = checkpoint(name)
    for shard, several in ((huggingface.MAX_SHARD_BYTES, False), (20_000, True)):
        folder = tmp_path / str(shard)
        huggingface.write_folder(folder, config, params, TOKENIZER, shard)
        assert huggingface.read_config(folder) == config
        assert huggingface.read_end_tokens(folder) == TOKENIZER.end_tokens
        jax.tree.map(np.testing.assert_array_equal, weights.read_params(folder, config), params)
        assert (folder / "model.safetensors.index.json").exists() == several


def test_some_fixture_is_in_bfloat16():
    """So that the tests above cover half precision too."""
    kinds = {json.loads((FIXTURES / name / "config.json").read_text()).get("dtype") for name in NAMES}
    assert kinds >= {"bfloat16", "float32"}


def test_precision_and_remat_are_no_part_of_a_written_folder(tmp_path):
    config, params = checkpoint("mt5")
    huggingface.write_folder(
        tmp_path / "a", dataclasses.replace(config, compute_dtype="bfloat16", remat="full"), params, TOKENIZER
    )
    assert huggingface.read_config(tmp_path / "a") == config


def test_a_model_that_its_family_cannot_describe_is_not_written(tmp_path):
    """A Mistral without its window in one layer, an encoder-decoder with a reward: refused, and nothing is written."""
    config, params = checkpoint("mistral")
    with pytest.raises(UserError, match="cannot be exported as mistral"):
        huggingface.write_folder(tmp_path / "a", dataclasses.replace(config, windows=(5, UNBOUNDED)), params, TOKENIZER)
    config, params = checkpoint("mt5")
    with pytest.raises(UserError, match="no place for a reward head"):
        huggingface.write_folder(tmp_path / "a", config, params | {"reward": {}}, TOKENIZER)
    assert not list(tmp_path.iterdir())
