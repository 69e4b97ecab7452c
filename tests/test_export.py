"""Networks in their folders: saved and restored, shared, exported, merged."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from alignjax.checkpoints import huggingface, peft, weights
from alignjax.cli import main
from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.models import lora
from alignjax.models.build import build
from alignjax.models.log_probs import log_prob
from alignjax.models.lora import Lora
from alignjax.models.t5 import T5Config
from alignjax.pipeline import networks
from alignjax.pipeline.networks import Adapter
from alignjax.preferences import models as preference
from tests.conftest import TINY, ragged
from tests.test_huggingface import TEXTS
from tests.test_lora import drawn
from tests.test_translation import CHAT, metaspace, opened

TEMPLATE = preference.TemplateTokens((14,), (15,), (16,), 9)
ASKED = TEMPLATE._replace(other=8)
LLAMA = dataclasses.replace(TINY, vocab_size=320)
GPT2 = dataclasses.replace(
    LLAMA, family="gpt2", positions="learned", context=64, norm="layer", kv_heads=4, gated=False,
    biases=("q", "k", "v", "o", "up", "down"), activation="gelu_tanh",
)  # fmt: skip
T5 = T5Config(vocab_size=320, width=16, layers=2, decoder_layers=2, heads=4, head_dim=4, hidden=24)
FAMILIES = {"llama": LLAMA, "gpt2": GPT2, "t5": T5}


@pytest.fixture(scope="module")
def tokenizer():
    return huggingface.train_tokenizer(TEXTS, 320, ("Human:",))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tokenizer):
    """Stages "llama", "gpt2", ... as they lie after a run, adapters "llama_lora", ... over them, and two preference
    models of each."""
    folder = tmp_path_factory.mktemp("run")
    for name, config in FAMILIES.items():
        model = build(config)
        base = jax.jit(model.init)(jax.random.key(0))
        spec = Lora(2, 8.0, ("q", "v", "o", "up"))
        small = drawn(lora.init_adapters(spec, base, jax.random.key(1)))
        head = {"kernel": np.linspace(-1, 1, config.width, dtype=np.float32)}
        networks.save(folder / name, config, base, tokenizer, False, None)
        networks.save(folder / f"{name}_lora", config, small, tokenizer, False, Adapter(name, spec))
        networks.save(folder / f"{name}_reward", config, {**base, "reward": head}, tokenizer, False, None)
        networks.save(folder / f"{name}_asked", config, {}, tokenizer, False, Adapter(name, None))
        for kind, form in (("reward", "bradley_terry"), ("asked", "choice")):
            (folder / f"{name}_{kind}" / "preference.json").write_text(json.dumps({"form": form, "template": {}}))
    return folder


def loaded(workdir, *names):
    """Networks of one stage's reading, on one device."""
    mesh, found = sharding.make_mesh(sharding.Mesh(1, 1, 1), jax.devices()[:1]), {}
    return [networks.load(workdir, name, mesh, found, None) for name in names]


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_policy_is_exported_bit_for_bit(workdir, tmp_path, name, capfd):
    assert main(["export", str(workdir / name), str(tmp_path / "out")]) == 0 and "a policy" in capfd.readouterr().out
    config = huggingface.read_config(tmp_path / "out")
    assert config == FAMILIES[name] and huggingface.read_tokenizer(tmp_path / "out").vocab_size <= 320
    equal(weights.read_params(tmp_path / "out", config), loaded(workdir, name)[0].params)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_travel_as_a_peft_folder(workdir, tmp_path, name):
    """Read back they are the same function; where nothing is fused, the same bits."""
    assert main(["export", str(workdir / f"{name}_lora"), str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [peft.CONFIG, peft.TENSORS]
    network = loaded(workdir, f"{name}_lora")[0]
    spec, small = peft.read_adapters(tmp_path / "out", network.model.config)
    assert set(network.adapter.lora.targets) <= set(spec.targets)
    want, got = (
        lora.merge(lora.overlay(network.base, tree, scale))
        for tree, scale in ((network.small, network.adapter.lora.scale), (small, spec.scale))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
    if name in ("llama", "t5"):
        assert dataclasses.replace(spec, targets=network.adapter.lora.targets) == network.adapter.lora
        equal(small, network.small)


@pytest.mark.parametrize("name", ["t5"])
def test_adapters_are_merged_where_that_is_asked(workdir, tmp_path, name):
    assert main(["export", str(workdir / f"{name}_lora"), str(tmp_path / "out"), "--merge"]) == 0
    network = loaded(workdir, f"{name}_lora")[0]
    score, data = jax.jit(log_prob(network.model)), (ragged([[5, 6, 7]], 4), ragged([[4, 2, 9]]))
    merged = weights.read_params(tmp_path / "out", network.model.config)
    np.testing.assert_allclose(score(merged, *data), score(network.params, *data), atol=2e-5)
    assert np.abs(score(merged, *data) - score(network.base, *data)).max() > 1e-3


def test_a_reward_model_is_a_sequence_classification_where_the_form_allows(workdir, tmp_path, capfd):
    for name in ("llama", "t5"):
        assert main(["export", str(workdir / f"{name}_reward"), str(tmp_path / name)]) == 0
    head = loaded(workdir, "llama_reward")[0].heads["reward"]["kernel"]
    tensors = safetensors.numpy.load_file(tmp_path / "llama" / "model.safetensors")
    np.testing.assert_array_equal(tensors["score.weight"], head[None])
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    np.testing.assert_array_equal(weights.read_reward(tmp_path / "llama", LLAMA.width)["reward"]["kernel"], head)
    equal(weights.read_params(tmp_path / "llama", LLAMA), loaded(workdir, "llama")[0].params)
    with pytest.raises(UserError, match="one label"):
        weights.read_reward(tmp_path / "llama", LLAMA.width + 1)
    said = json.loads((tmp_path / "t5" / "preference.json").read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "t5" / "alignjax_head.safetensors")
    assert said["form"] == "bradley_terry" and list(tensors) == ["reward/kernel"]
    equal(weights.read_params(tmp_path / "t5", T5), loaded(workdir, "t5")[0].params)


def test_a_preference_model_without_a_head_says_how_it_is_asked(workdir, tmp_path):
    assert main(["export", str(workdir / "gpt2_asked"), str(tmp_path / "out")]) == 0
    said = json.loads((tmp_path / "out" / "preference.json").read_text())
    assert said["form"] == "choice" and "minus that of `other`" in said["read"]
    assert not (tmp_path / "out" / "alignjax_head.safetensors").exists()


def test_networks_over_one_base_share_its_arrays(workdir):
    """A policy with adapters, its reference and a preference model as it is: one base in memory."""
    base, policy, asked = loaded(workdir, "llama", "llama_lora", "llama_asked")
    leaf = base.params["blocks"]["q"]["kernel"]
    for network in (policy, asked):
        assert network.params["blocks"]["q"]["kernel"] is leaf
        assert network.params["embed"]["embedding"] is base.params["embed"]["embedding"]
    assert "lora" in policy.params["blocks"]["q"] and "lora" not in base.params["blocks"]["q"]


def test_training_goes_on_from_adapters_and_from_what_they_are_merged_into(workdir):
    (start,) = loaded(workdir, "llama_lora")
    key, spec = jax.random.key(3), start.adapter.lora
    on = networks.trainable(start, spec, key)
    equal(on.params, start.small)
    assert on.adapter == Adapter("llama", spec) and on.frozen["base"]["embed"] is start.base["embed"]
    equal(on.whole(on.params, on.frozen), start.params)
    full = networks.trainable(start, None, key)
    equal(full.params, lora.merge(start.params))
    assert full.adapter is None and full.frozen == {}
    with pytest.raises(UserError, match=r"llama_lora.*has adapters"):
        networks.trainable(start, Lora(4, 8.0), key)


def test_what_is_trained_whole_is_trained_in_float32(tmp_path, tokenizer):
    """In bfloat16 a step of Adam rounds to nothing."""
    base = jax.tree.map(lambda x: x.astype("bfloat16"), jax.jit(build(LLAMA).init)(jax.random.key(0)))
    networks.save(tmp_path / "half", LLAMA, base, tokenizer, False, None)
    (half,) = loaded(tmp_path, "half")
    equal(half.params, base)
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {np.dtype("bfloat16")}
    whole = networks.trainable(half, None, jax.random.key(0))
    assert {x.dtype for x in jax.tree.leaves(whole.params)} == {np.dtype("float32")}
    over = networks.trainable(half, Lora(2, 4.0), jax.random.key(0))  # the frozen base stays as it is
    assert over.frozen["base"]["embed"]["embedding"].dtype == np.dtype("bfloat16")
    assert {x.dtype for x in jax.tree.leaves(over.params)} == {np.dtype("float32")}


def test_adapters_over_another_base_than_theirs_are_refused(workdir, tmp_path, tokenizer):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "stage.json").write_text('{"fingerprint": "a"}')
    base = jax.jit(build(LLAMA).init)(jax.random.key(0))
    networks.save(tmp_path / "base", LLAMA, base, tokenizer, False, None)
    spec = Lora(2, 4.0)
    small = lora.init_adapters(spec, base, jax.random.key(0))
    networks.save(tmp_path / "policy", LLAMA, small, tokenizer, False, Adapter("base", spec))
    loaded(tmp_path, "policy")
    (tmp_path / "base" / "stage.json").write_text('{"fingerprint": "b"}')
    with pytest.raises(UserError, match="another 'base'"):
        loaded(tmp_path, "policy")


def test_asking_an_adapted_policy_keeps_its_adapters(workdir, tokenizer):
    networks.save(workdir / "asked_lora", LLAMA, {}, tokenizer, False, Adapter("llama_lora", None))
    policy, asked = loaded(workdir, "llama_lora", "asked_lora")
    equal(asked.params, policy.params)
    on = networks.trainable(asked, policy.adapter.lora, jax.random.key(0), preference.choice(asked.model, ASKED))
    equal(on.params, policy.small)
    assert on.adapter.base == "llama"


def test_chat_templates_are_part_of_a_tokenizer_s_mark(tmp_path):
    fast, marks = metaspace("<s> $A", bos_token="<s>", eos_token="</s>"), []
    base = jax.jit(build(dataclasses.replace(LLAMA, vocab_size=424)).init)(jax.random.key(0))
    for name, template in (("a", CHAT), ("b", CHAT.replace("}}]", "}}>")), ("c", CHAT)):
        fast.chat_template = template
        config = dataclasses.replace(LLAMA, vocab_size=424)
        networks.save(tmp_path / name, config, base, opened(fast, tmp_path / f"t{name}"), True, None)
        marks.append(loaded(tmp_path, name)[0].fingerprint)
    assert marks[0] == marks[2] != marks[1]


def test_a_head_is_trained_beside_adapters_and_starts_from_the_backbone(workdir):
    (start,) = loaded(workdir, "llama_reward")
    form = preference.bradley_terry(start.model, TEMPLATE)
    found = networks.trainable(start, Lora(2, 4.0), jax.random.key(0), form)
    np.testing.assert_array_equal(found.params["reward"]["kernel"], start.heads["reward"]["kernel"])  # it goes on
    assert set(found.params) == {"blocks", "reward"} and "reward" not in found.frozen["base"]
    specs = sharding.shardings(
        found.params, sharding.matching_rules(found.rules, found.params), sharding.make_mesh(sharding.Mesh())
    )
    assert jax.tree.structure(specs) == jax.tree.structure(found.params)


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (("nowhere", "out"), "holds no model"),
        (("llama", "llama"), "exists"),
        (("llama_both", "out"), "add --merge"),
    ],
)
def test_what_cannot_be_exported_is_named(workdir, tmp_path, tokenizer, capfd, argv, told):
    if argv[0] == "llama_both" and not (workdir / "llama_both").exists():
        (start,) = loaded(workdir, "llama")
        small = {
            **lora.init_adapters(Lora(2, 4.0), start.params, jax.random.key(0)),
            "reward": {"kernel": np.zeros(16, np.float32)},
        }
        networks.save(workdir / "llama_both", LLAMA, small, tokenizer, False, Adapter("llama", Lora(2, 4.0)))
    target = workdir / argv[1] if argv[1] == "llama" else tmp_path / argv[1]
    assert main(["export", str(workdir / argv[0]), str(target)]) == 2
    answer = capfd.readouterr().err
    assert answer.count("\n") == 1 and told in answer
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_adapters_that_are_not_plain_are_refused(workdir, tmp_path, change, told):
    network = loaded(workdir, "llama_lora")[0]
    peft.write_adapters(tmp_path / "a", LLAMA, network.small, network.adapter.lora, "base")
    path = tmp_path / "a" / peft.CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=told):
        peft.read_adapters(tmp_path / "a", LLAMA)


def test_adapters_of_another_model_are_refused(workdir, tmp_path):
    network = loaded(workdir, "llama_lora")[0]
    peft.write_adapters(tmp_path / "a", LLAMA, network.small, network.adapter.lora, "base")
    with pytest.raises(UserError, match="shapes"):
        peft.read_adapters(tmp_path / "a", dataclasses.replace(LLAMA, hidden=32))
    with pytest.raises(UserError, match="no place"):
        peft.read_adapters(tmp_path / "a", GPT2)
    with pytest.raises(UserError, match="no place"):
        peft.read_adapters(tmp_path / "a", dataclasses.replace(LLAMA, layers=1))
