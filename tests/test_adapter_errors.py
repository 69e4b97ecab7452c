"""Folders of adapters that contradict themselves: one line before anything runs says what is wrong."""

import json

import numpy as np
import pytest
import safetensors.numpy

from alignjax.checkpoints import peft, weights
from alignjax.models import lora
from alignjax.models.lora import Lora
from alignjax.pipeline.stages import LoadAdapter, LoadCheckpoint
from tests.test_checkpoint_errors import edit
from tests.test_faults import ADAPTER, CONFIG, context_of, refusal, write_adapter, write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("good") / "base")


@pytest.fixture
def adapter(tmp_path):
    return write_adapter(tmp_path / "adapter")


def test_adapters_that_are_not_finite_are_warned_of(adapter):
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    tensors[name := min(tensors)][0, 0] = np.inf
    safetensors.numpy.save_file(tensors, file)
    with pytest.warns(UserWarning, match=rf"tensor {name.removeprefix('base_model.model.')} holds NaN or infinity"):
        peft.read_adapters(adapter, CONFIG)


@pytest.mark.parametrize(("changes", "message"), [
    ({"lora_alpha": None}, "it has no 'lora_alpha', which must be a positive number; correct it"),
    ({"lora_alpha": "null"}, "lora_alpha='null' must be a positive number"),
    ({"lora_alpha": 0}, "lora_alpha=0 must be a positive number"),
    ({"lora_alpha": -8}, "lora_alpha=-8 must be"),
    ({"lora_alpha": True}, "lora_alpha=True must be"),
    ({"lora_alpha": float("nan")}, "lora_alpha=nan must be"),
    ({"lora_alpha": 10**400}, "is beyond 64 bits"),
    ({"r": None}, "it has no 'r', which must be a positive integer"),
    ({"r": 4.0}, "r=4.0 must be a positive integer"),
    ({"alpha_pattern": {"q_proj(": 3}}, r"alpha_pattern has 'q_proj(', which is no regular expression"),
    ({"alpha_pattern": {"q_proj": 0}}, "q_proj=0 must be a positive number"),
    ({"alpha_pattern": ["q_proj"]}, r"alpha_pattern=['q_proj'] is no mapping of names to numbers"),
    ({"rank_pattern": {"[": 3}}, "rank_pattern has '[', which is no regular expression"),
    ({"r": 16}, "gives model.layers.0.self_attn.q_proj the rank 16, and its tensors have 4"),
    ({"alpha_pattern": []}, "alpha_pattern=[] is no mapping of names to numbers; correct it"),
    ({"target_modules": ["q_proj"]}, "leaves model.layers.0.self_attn.v_proj out of target_modules"),
    ({"target_modules": r".*\.q_proj"}, "leaves model.layers.0.self_attn.v_proj out of target_modules"),
    ({"target_modules": "("}, "target_modules has '(', which is no regular expression"),
    ({"target_modules": None}, "target_modules=None is no list of modules; correct it"),
    ({"exclude_modules": ["v_proj"]}, "leaves model.layers.0.self_attn.v_proj out of target_modules"),
    ({"layers_to_transform": [1]}, "leaves model.layers.0.self_attn.q_proj out of target_modules or layers_to_tr"),
    ({"layers_to_transform": False}, "layers_to_transform=False is no list of layers; correct it"),
    ({"layers_pattern": "layers"}, "layers_pattern='layers' is not supported; merge it with PEFT first"),
    ({"kasa_config": {"beta": 1e-4}}, "kasa_config={'beta': 0.0001} is not supported; merge it with PEFT first"),
    ({"rank_pattern": {"v_proj": 2}}, "gives model.layers.0.self_attn.v_proj the rank 2, and its tensors have 4"),
])  # fmt: skip
def test_an_adapter_config_that_cannot_be_is_one_line(base, adapter, changes, message):
    edit(adapter / "adapter_config.json", **changes)
    stages = {"base": LoadCheckpoint(str(base)), "adapted": LoadAdapter(str(adapter), "base")}
    line = refusal(stages, "adapted")
    assert message in line and str(adapter) in line


def test_null_is_no_alpha_and_a_pattern_of_the_right_rank_is_read(base, adapter):
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(ADAPTER | {"lora_alpha": None}))
    stages = {"base": LoadCheckpoint(str(base)), "adapted": LoadAdapter(str(adapter), "base")}
    assert "lora_alpha=None must be a positive number" in refusal(stages, "adapted")
    path.write_text(json.dumps(ADAPTER | {"r": 16, "rank_pattern": {"[qv]_proj": 4}}))
    assert peft.read_adapters(adapter, CONFIG)[0] == Lora(4, 8.0, ("q", "v"))


@pytest.mark.parametrize("changes", [
    {"target_modules": "all-linear"}, {"target_modules": r".*\.[qv]_proj"}, {"layers_to_transform": [0, 1]},
    {"target_modules": [f"model.layers.{i}.self_attn.{n}_proj" for i in range(2) for n in "qv"],
     "layers_to_transform": 9},
], ids=["all", "expression", "layers", "names"])  # fmt: skip
def test_modules_are_named_as_peft_names_them(adapter, changes):
    edit(adapter / "adapter_config.json", **changes)
    assert peft.read_adapters(adapter, CONFIG)[0] == Lora(4, 8.0, ("q", "v"))


def test_an_adapter_s_tensors_are_looked_at_before_anything_runs(base, adapter):
    stages = {"base": LoadCheckpoint(str(base)), "adapted": LoadAdapter(str(adapter), "base")}
    stages["adapted"].check(context_of(stages, "adapted"))
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({k: v.astype(np.int8) for k, v in tensors.items()}, file)
    assert "is of I8, not of F64, F32, F16, BF16; convert it to one" in refusal(stages, "adapted")
    file.unlink()
    assert f"{file} is missing; give a folder that has it" in refusal(stages, "adapted")
    (adapter / "adapter_model.bin").write_bytes(b"x")
    assert f"{file} is missing; convert adapter_model.bin to safetensors" in refusal(stages, "adapted")


def test_adapters_start_where_they_were(base, adapter):
    """The good adapter is read whole: the fixtures above fail for their damage alone."""
    spec, adapters = peft.read_adapters(adapter, CONFIG)
    base = weights.read_params(base, CONFIG)
    merged = lora.merge(lora.overlay(base, adapters, spec.scale))
    assert np.abs(merged["blocks"]["q"]["kernel"] - base["blocks"]["q"]["kernel"]).max() > 0.1
