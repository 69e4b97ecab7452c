"""Networks in their folders are saved, restored, shared, exported and merged."""

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
from alignjax.pipeline.experiment import Context, Experiment
from alignjax.pipeline.networks import Network, SharedBase
from alignjax.pipeline.trained_parts import split_trained
from alignjax.preferences import preference_models
from alignjax.training.collect import Frozen
from tests.conftest import TINY, ragged
from tests.test_huggingface import TEXTS
from tests.test_lora import randomized

TEMPLATE = preference_models.TemplateTokens((14,), (15,), (16,), 9)
CHOICE = TEMPLATE._replace(other=8)
CHAT = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}[assistant]"
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


def save(folder, config, tokenizer, **parts):
    """Writes a network as a stage does."""
    networks.save(folder, Network(folder.name, build(config), tokenizer, "", **{"base": {}, **parts}))


def random_base(config):
    return jax.jit(build(config).init)(jax.random.key(0))


@pytest.fixture(scope="module")
def workdir(tmp_path_factory, tokenizer):
    """Returns a work folder with the stages "llama", "gpt2" and "t5"; of each "_lora", adapters over it, "_reward" and
    "_asked", two preference models."""
    folder = tmp_path_factory.mktemp("run")
    for name, config in FAMILIES.items():
        base, spec = random_base(config), Lora(2, 8.0, ("q", "v", "o", "up"))
        adapters = randomized(lora.init_adapters(spec, base, jax.random.key(1)))
        head = {"kernel": np.linspace(-1, 1, config.width, dtype=np.float32)}
        save(folder / name, config, tokenizer, base=base)
        save(folder / f"{name}_lora", config, tokenizer, adapters=adapters, shared_base=SharedBase(name, spec))
        save(folder / f"{name}_reward", config, tokenizer, base=base, heads={"reward": head})
        save(folder / f"{name}_asked", config, tokenizer, shared_base=SharedBase(name, None))
        for kind, form in (("reward", "bradley_terry"), ("asked", "choice")):
            (folder / f"{name}_{kind}" / "preference.json").write_text(json.dumps({"form": form, "template": {}}))
    return folder


def load(workdir, *names):
    """Returns networks that one context loads, on one device."""
    mesh = sharding.make_mesh(sharding.Mesh(1, 1, 1), jax.devices()[:1])
    context = Context(Experiment(None, {}), workdir, names[0], mesh)
    return [context.load(name) for name in names]


def train_from(start, spec, heads=None):
    """Returns what is trained of a network."""
    return split_trained(start, spec, heads or {}, jax.random.key(3))


def equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_policy_is_exported_bit_for_bit(workdir, tmp_path, name, capfd):
    assert main(["export", str(workdir / name), str(tmp_path / "out")]) == 0 and "a policy" in capfd.readouterr().out
    config = huggingface.read_config(tmp_path / "out")
    assert config == FAMILIES[name] and huggingface.read_tokenizer(tmp_path / "out").vocab_size <= 320
    equal(weights.read_params(tmp_path / "out", config), load(workdir, name)[0].params)


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_are_exported_as_a_peft_folder(workdir, tmp_path, name):
    """Read back, they are the same function; where no projections are fused, the same bits."""
    assert main(["export", str(workdir / f"{name}_lora"), str(tmp_path / "out")]) == 0
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [peft.CONFIG_FILE, peft.TENSORS_FILE]
    network = load(workdir, f"{name}_lora")[0]
    spec, adapters = peft.read_adapters(tmp_path / "out", network.model.config)
    assert set(network.shared_base.lora.targets) <= set(spec.targets)
    expected, found = (
        lora.merge(lora.overlay(network.base, tree, scale))
        for tree, scale in ((network.adapters, network.shared_base.lora.scale), (adapters, spec.scale))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, expected)
    if name in ("llama", "t5"):
        assert dataclasses.replace(spec, targets=network.shared_base.lora.targets) == network.shared_base.lora
        equal(adapters, network.adapters)


@pytest.mark.parametrize("name", ["t5"])
def test_adapters_are_merged_on_request(workdir, tmp_path, name):
    assert main(["export", str(workdir / f"{name}_lora"), str(tmp_path / "out"), "--merge"]) == 0
    network = load(workdir, f"{name}_lora")[0]
    score, data = jax.jit(log_prob(network.model)), (ragged([[5, 6, 7]], 4), ragged([[4, 2, 9]]))
    merged = weights.read_params(tmp_path / "out", network.model.config)
    np.testing.assert_allclose(score(merged, *data), score(network.params, *data), atol=2e-5)
    assert np.abs(score(merged, *data) - score(network.base, *data)).max() > 1e-3


def test_a_reward_model_is_a_sequence_classification_where_the_form_allows(workdir, tmp_path, capfd):
    for name in ("llama", "t5"):
        assert main(["export", str(workdir / f"{name}_reward"), str(tmp_path / name)]) == 0
    head = load(workdir, "llama_reward")[0].heads["reward"]["kernel"]
    tensors = safetensors.numpy.load_file(tmp_path / "llama" / "model.safetensors")
    np.testing.assert_array_equal(tensors["score.weight"], head[None])
    assert json.loads((tmp_path / "llama" / "config.json").read_text())["architectures"] == [
        "LlamaForSequenceClassification"
    ]
    np.testing.assert_array_equal(weights.read_reward_head(tmp_path / "llama", LLAMA.width)["reward"]["kernel"], head)
    equal(weights.read_params(tmp_path / "llama", LLAMA), load(workdir, "llama")[0].params)
    with pytest.raises(UserError, match="one label"):
        weights.read_reward_head(tmp_path / "llama", LLAMA.width + 1)
    description = json.loads((tmp_path / "t5" / "preference.json").read_text())
    tensors = safetensors.numpy.load_file(tmp_path / "t5" / "alignjax_head.safetensors")
    assert description["form"] == "bradley_terry" and list(tensors) == ["reward/kernel"]
    equal(weights.read_params(tmp_path / "t5", T5), load(workdir, "t5")[0].params)


def test_a_preference_model_without_a_head_describes_how_it_is_asked(workdir, tmp_path):
    assert main(["export", str(workdir / "gpt2_asked"), str(tmp_path / "out")]) == 0
    description = json.loads((tmp_path / "out" / "preference.json").read_text())
    assert description["form"] == "choice" and "minus that of `other`" in description["read"]
    assert not (tmp_path / "out" / "alignjax_head.safetensors").exists()


def test_networks_over_one_base_share_its_arrays(workdir):
    """A policy with adapters, its reference and a zero-shot preference model have one base in memory."""
    base, policy, asked = load(workdir, "llama", "llama_lora", "llama_asked")
    leaf = base.params["blocks"]["q"]["kernel"]
    for network in (policy, asked):
        assert network.params["blocks"]["q"]["kernel"] is leaf
        assert network.params["embed"]["embedding"] is base.params["embed"]["embedding"]
    assert "lora" in policy.params["blocks"]["q"] and "lora" not in base.params["blocks"]["q"]


def test_training_continues_adapters_or_starts_from_the_merged_parameters(workdir):
    (start,) = load(workdir, "llama_lora")
    spec = start.shared_base.lora
    adapted = train_from(start, spec)
    equal(adapted.params, start.adapters)
    assert (adapted.shared_base.stage, adapted.shared_base.lora) == ("llama", spec) and adapted.base[
        "embed"
    ] is start.base["embed"]
    equal(adapted.assemble(adapted.params, Frozen(base=adapted.base)), start.params)
    full = train_from(start, None)
    equal(full.params, lora.merge(start.params))
    assert full.shared_base is None and full.base is None
    with pytest.raises(UserError, match=r"llama_lora.*has adapters"):
        train_from(start, Lora(4, 8.0))


def test_a_network_whose_base_is_trained_is_trained_in_float32(tmp_path, tokenizer):
    """In bfloat16 most steps of Adam would round to nothing."""
    base = jax.tree.map(lambda x: x.astype("bfloat16"), random_base(LLAMA))
    save(tmp_path / "half", LLAMA, tokenizer, base=base)
    (half,) = load(tmp_path, "half")
    equal(half.params, base)
    assert {x.dtype for x in jax.tree.leaves(half.params)} == {np.dtype("bfloat16")}
    full = train_from(half, None)
    assert {x.dtype for x in jax.tree.leaves(full.params)} == {np.dtype("float32")}
    adapted = train_from(half, Lora(2, 4.0))
    assert adapted.base["embed"]["embedding"].dtype == np.dtype("bfloat16")
    assert {x.dtype for x in jax.tree.leaves(adapted.params)} == {np.dtype("float32")}


def test_adapters_over_another_base_than_theirs_are_refused(workdir, tmp_path, tokenizer):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "stage.json").write_text('{"fingerprint": "a"}')
    base = random_base(LLAMA)
    save(tmp_path / "base", LLAMA, tokenizer, base=base)
    spec = Lora(2, 4.0)
    adapters = lora.init_adapters(spec, base, jax.random.key(0))
    save(tmp_path / "policy", LLAMA, tokenizer, adapters=adapters, shared_base=SharedBase("base", spec))
    load(tmp_path, "policy")
    (tmp_path / "base" / "stage.json").write_text('{"fingerprint": "b"}')
    with pytest.raises(UserError, match="another 'base'"):
        load(tmp_path, "policy")


def test_a_zero_shot_preference_model_of_an_adapted_policy_keeps_its_adapters(workdir, tokenizer):
    save(workdir / "asked_lora", LLAMA, tokenizer, shared_base=SharedBase("llama_lora", None))
    policy, asked = load(workdir, "llama_lora", "asked_lora")
    equal(asked.params, policy.params)
    form = preference_models.choice(asked.model, CHOICE)
    adapted = train_from(asked, policy.shared_base.lora, form.init_heads())
    equal(adapted.params, policy.adapters)
    assert adapted.shared_base.stage == "llama"


def test_a_chat_template_is_part_of_the_token_digest(tmp_path, tokenizer):
    base, digests = random_base(LLAMA), []
    for name, template in (("a", CHAT), ("b", CHAT.replace("}}]", "}}>")), ("c", CHAT)):
        tokenizer.save(tmp_path / f"tokenizer-{name}")
        (tmp_path / f"tokenizer-{name}" / "chat_template.jinja").write_text(template)
        with_template = huggingface.read_tokenizer(tmp_path / f"tokenizer-{name}")
        save(tmp_path / name, LLAMA, with_template, base=base, chat=True)
        digests.append(load(tmp_path, name)[0].token_digest)
    assert digests[0] == digests[2] != digests[1]


def test_a_head_is_trained_beside_adapters_and_continues_the_starts_own(workdir):
    (start,) = load(workdir, "llama_reward")
    form = preference_models.bradley_terry(start.model, TEMPLATE)
    parts = split_trained(start, Lora(2, 4.0), form.init_heads(), jax.random.key(0))
    np.testing.assert_array_equal(parts.params["reward"]["kernel"], start.heads["reward"]["kernel"])
    assert set(parts.params) == {"blocks", "reward"} and "reward" not in parts.base
    specs = sharding.shardings(
        parts.params, sharding.matching_rules(parts.rules, parts.params), sharding.make_mesh(sharding.Mesh())
    )
    assert jax.tree.structure(specs) == jax.tree.structure(parts.params)
    network = parts.network(start, parts.params)
    assert set(network.heads) == {"reward"} and set(network.adapters) == {"blocks"} and network.base == {}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("nowhere", "out"), "holds no model"),
        (("llama", "llama"), "exists"),
        (("llama_both", "out"), "add --merge"),
    ],
)
def test_a_stage_that_cannot_be_exported_is_refused(workdir, tmp_path, tokenizer, capfd, argv, message):
    if argv[0] == "llama_both" and not (workdir / "llama_both").exists():
        (start,) = load(workdir, "llama")
        adapters = lora.init_adapters(Lora(2, 4.0), start.params, jax.random.key(0))
        heads = {"reward": {"kernel": np.zeros(16, np.float32)}}
        shared = SharedBase("llama", Lora(2, 4.0))
        save(workdir / "llama_both", LLAMA, tokenizer, adapters=adapters, heads=heads, shared_base=shared)
    target = workdir / argv[1] if argv[1] == "llama" else tmp_path / argv[1]
    assert main(["export", str(workdir / argv[0]), str(target)]) == 2
    answer = capfd.readouterr().err
    assert answer.count("\n") == 1 and message in answer
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
    ],
)
def test_adapters_that_are_not_plain_are_refused(workdir, tmp_path, change, message):
    network = load(workdir, "llama_lora")[0]
    peft.write_adapters(tmp_path / "a", LLAMA, network.adapters, network.shared_base.lora, "base")
    path = tmp_path / "a" / peft.CONFIG_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        peft.read_adapters(tmp_path / "a", LLAMA)


def test_adapters_of_another_model_are_refused(workdir, tmp_path):
    network = load(workdir, "llama_lora")[0]
    peft.write_adapters(tmp_path / "a", LLAMA, network.adapters, network.shared_base.lora, "base")
    with pytest.raises(UserError, match="shapes"):
        peft.read_adapters(tmp_path / "a", dataclasses.replace(LLAMA, hidden=32))
    with pytest.raises(UserError, match="no place"):
        peft.read_adapters(tmp_path / "a", GPT2)
    with pytest.raises(UserError, match="no place"):
        peft.read_adapters(tmp_path / "a", dataclasses.replace(LLAMA, layers=1))
