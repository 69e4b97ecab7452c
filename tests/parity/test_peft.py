"""Adapters against the PEFT library, both ways: what it trains we read, what we write it opens, over drawn models."""

from __future__ import annotations

import copy
import dataclasses
import functools
import warnings

import jax
import numpy as np
import peft as theirs
import pytest
import safetensors.numpy
import torch

from alignjax.checkpoints import peft
from alignjax.models import lora
from alignjax.models.build import build
from alignjax.models.lora import Lora
from alignjax.types import Tokens
from tests.parity import referee
from tests.parity.conftest import NOTES
from tests.parity.test_live import EVERY, TOLERANCE, drawn
from tests.test_lora import drawn as away_from_zero

FUSED = ("gpt2", "gpt_neox")
# PEFT asks transformers by a name that it is about to drop.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # "base" is no folder here
]
TARGETS = {
    "gpt2": ["c_attn", "mlp.c_proj"],
    "gpt_neox": ["query_key_value", "dense_4h_to_h"],
    "t5": ["SelfAttention.q", "EncDecAttention.v", "DenseReluDense.wo"],
    "mt5": ["SelfAttention.q", "EncDecAttention.v", "DenseReluDense.wi_1"],
}


@torch.no_grad()
def logits_there(model, found):
    """[B, N, V], row by row without padding."""
    one = referee.encoded_row if found.model.config.is_encoder_decoder else referee.decoder_row
    return np.stack([one(model, *row)[0] for row in zip(found.prompts, found.completion, strict=True)])


@functools.cache
def program(config):
    """(parameters, prompt, completion) -> logits, of the whole batch padded."""
    model = build(config)
    return jax.jit(lambda *arguments: model.unembed(arguments[0], model.predict(*arguments)))


def logits_here(found, small, spec):
    completion = Tokens(found.completion, np.ones(found.completion.shape, bool))
    params = lora.overlay(found.params, small, spec.scale)
    return np.asarray(program(found.config)(params, Tokens(found.tokens, found.mask), completion))


def near(a, b, case):
    error = np.abs(a - b).max()
    NOTES.append(f"{case.name}: adapters, largest error of a logit {error:.1e}")
    assert error < TOLERANCE


@EVERY
def test_what_peft_saves_is_read(tmp_path, case):
    """Random adapters, ranks and scales that differ between modules, and the square-root scale."""
    found = drawn(case)
    targets = TARGETS.get(found.config.family, ["q_proj", "v_proj", "down_proj"])
    said = theirs.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, lora_dropout=0.0,
        rank_pattern={targets[0]: 2, rf".*\.0\..*{targets[-1]}": 4},
        alpha_pattern={rf".*\.1\..*{targets[-1]}": 7}, use_rslora=case.name in ("llama2", "t5"),
        fan_in_fan_out=found.config.family == "gpt2",
    )  # fmt: skip
    adapted = theirs.get_peft_model(copy.deepcopy(found.model), said)
    adapted.save_pretrained(tmp_path / "a")
    spec, small = peft.read_adapters(tmp_path / "a", found.config)
    near(logits_here(found, small, spec), logits_there(adapted, found), case)
    plain = logits_here(found, jax.tree.map(np.zeros_like, small), spec)
    assert np.abs(logits_here(found, small, spec) - plain).max() > 0.01


@EVERY
def test_what_we_write_peft_opens(tmp_path, case):
    found = drawn(case)
    names = ("q", "v", "down") if not case.encodes else ("q", "cross_v", "down")
    spec = Lora(rank=3, alpha=5.0, targets=names)
    small = away_from_zero(lora.init_adapters(spec, found.params, jax.random.key(0)))
    peft.write_adapters(tmp_path / "a", found.config, small, spec, "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # it only warns of adapters that it misses
        adapted = theirs.PeftModel.from_pretrained(copy.deepcopy(found.model), tmp_path / "a").eval()
    near(logits_here(found, small, spec), logits_there(adapted, found), case)
    adapted.save_pretrained(tmp_path / "again")
    first, again = (safetensors.numpy.load_file(tmp_path / name / peft.TENSORS_FILE) for name in ("a", "again"))
    assert first.keys() == again.keys()
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    spec_again, small_again = peft.read_adapters(tmp_path / "again", found.config)
    if found.config.family not in FUSED:
        assert dataclasses.replace(spec_again, targets=names) == spec and set(spec_again.targets) == set(names)
        jax.tree.map(np.testing.assert_array_equal, small_again, small)
    near(logits_here(found, small_again, spec_again), logits_there(adapted, found), case)
