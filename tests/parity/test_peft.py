"""Adapters against the PEFT library, both ways, over random models: we read what it saves, it opens what we write."""

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

from alignjax.checkpoints import peft
from alignjax.models import lora
from alignjax.models.build import build
from alignjax.models.lora import Lora
from alignjax.types import Tokens
from tests.parity import referee
from tests.parity.cases import ADAPTED
from tests.parity.conftest import NOTES
from tests.parity.test_live import EVERY, TOLERANCE, random_model
from tests.test_lora import randomized

FUSED = ("gpt2", "gpt_neox")
# PEFT uses a name of transformers that is deprecated.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning"),  # "base" is no folder here
]


def peft_logits(adapted, model):
    """Returns PEFT's logits [B, N, V], row by row without padding."""
    return referee.compute_logits(adapted, model.prompts, model.completion)


@functools.cache
def program(config):
    """Returns the compiled function (params, prompt, completion) -> logits [B, N, V]."""
    network = build(config)
    return jax.jit(lambda *arguments: network.logits(arguments[0], network.completion_states(*arguments)))


def our_logits(model, adapters, spec):
    """Returns our logits [B, N, V] of the whole batch, padded."""
    completion = Tokens(model.completion, np.ones(model.completion.shape, bool))
    params = lora.overlay(model.params, adapters, spec.scale)
    return np.asarray(program(model.config)(params, Tokens(model.tokens, model.mask), completion))


def assert_near(a, b, case):
    """Within the tolerance; notes the largest error of a logit."""
    error = np.abs(a - b).max()
    NOTES.append(f"{case.name}: adapters, largest error of a logit {error:.1e}")
    assert error < TOLERANCE


@EVERY
def test_what_peft_saves_is_read(tmp_path, case):
    """Random adapters, ranks and scales that differ between modules, and the square-root scale."""
    model = random_model(case)
    targets = ADAPTED.get(model.config.family, ["q_proj", "v_proj", "down_proj"])
    description = theirs.LoraConfig(
        r=3, lora_alpha=5, target_modules=targets, init_lora_weights=False, lora_dropout=0.0,
        rank_pattern={targets[0]: 2, rf".*\.0\..*{targets[-1]}": 4},
        alpha_pattern={rf".*\.1\..*{targets[-1]}": 7}, use_rslora=case.name in ("llama2", "t5"),
        fan_in_fan_out=model.config.family == "gpt2",
    )  # fmt: skip
    adapted = theirs.get_peft_model(copy.deepcopy(model.model), description)
    adapted.save_pretrained(tmp_path / "a")
    spec, adapters = peft.read_adapters(tmp_path / "a", model.config)
    assert_near(our_logits(model, adapters, spec), peft_logits(adapted, model), case)
    plain = our_logits(model, jax.tree.map(np.zeros_like, adapters), spec)
    assert np.abs(our_logits(model, adapters, spec) - plain).max() > 0.01


@EVERY
def test_what_we_write_peft_opens(tmp_path, case):
    model = random_model(case)
    names = ("q", "v", "down") if not case.encodes else ("q", "cross_v", "down")
    spec = Lora(rank=3, alpha=5.0, targets=names)
    adapters = randomized(lora.init_adapters(spec, model.params, jax.random.key(0)))
    peft.write_adapters(tmp_path / "a", model.config, adapters, spec, "base")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT only warns when it misses adapters
        adapted = theirs.PeftModel.from_pretrained(copy.deepcopy(model.model), tmp_path / "a").eval()
    assert_near(our_logits(model, adapters, spec), peft_logits(adapted, model), case)
    adapted.save_pretrained(tmp_path / "again")
    ours, again = (safetensors.numpy.load_file(tmp_path / name / peft.TENSORS_FILE) for name in ("a", "again"))
    assert ours.keys() == again.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], again[name])
    spec_again, adapters_again = peft.read_adapters(tmp_path / "again", model.config)
    if model.config.family not in FUSED:
        assert dataclasses.replace(spec_again, targets=names) == spec and set(spec_again.targets) == set(names)
        jax.tree.map(np.testing.assert_array_equal, adapters_again, adapters)
    assert_near(our_logits(model, adapters_again, spec_again), peft_logits(adapted, model), case)
