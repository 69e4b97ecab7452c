"""Inputs that look whole and are not: each is refused in one line, or read as what it is, wherever it enters."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from alignjax.checkpoints import huggingface, weights
from alignjax.checkpoints.families import FAMILIES, embedding_copies
from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.labeling.judged import Judged
from alignjax.models.build import build
from alignjax.models.t5 import T5Config
from alignjax.models.tokenizer import Tokenizer, encode_prompt, with_chat_template
from alignjax.pipeline.experiment import Context, Experiment
from alignjax.pipeline.judges import LanguageModelJudge, Oracle
from alignjax.pipeline.run import run
from alignjax.pipeline.stages import Label, LoadAdapter, LoadCheckpoint, Tournament, Writing
from alignjax.pipeline.stages.writing import stop_tokens
from alignjax.sampling.process import Sampling, sample
from alignjax.tasks.task import EOS, Format, Task, Template, one_message
from alignjax.types import Tokens
from tests.conftest import TINY
from tests.test_checkpoint_errors import edit, resave
from tests.test_families import FIXTURES, NAMES, TOKENIZER, checkpoint
from tests.test_huggingface import TEXTS, write_checkpoint

CONFIG = dataclasses.replace(TINY, vocab_size=320)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WRITING = Writing(max_new_tokens=4, buckets=(16,), batch=8)
DATA = Path(os.environ.get("ALIGNJAX_TEST_DATA", ""))
needs_data = pytest.mark.skipif("ALIGNJAX_TEST_DATA" not in os.environ, reason="ALIGNJAX_TEST_DATA names no folder")
ADAPTER = {
    "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Songs:
    """Eight prompts."""

    def prompts(self, split, count, seed):
        return [f"Human: may I sing {i}?" for i in range(8)][:count]


def prefer_longer(prompt, reply, other):
    return float(len(reply) > len(other))


TASK = Task(
    name="songs", source=Songs(), format=Format(before=" ", end="", stop=(EOS,)), clean=str,
    template=Template(before=" ", between=" or ", question=" ?", answer="a", other="b"),
    oracles={"longer": prefer_longer},
)  # fmt: skip


def write_base(folder):
    """Writes a whole checkpoint, its output projection tied; returns its folder."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: 0.1 * rng.standard_normal(x.shape, np.float32), weights.abstract_params(CONFIG))
    write_checkpoint(folder, params, CONFIG)
    huggingface.train_tokenizer(TEXTS, CONFIG.vocab_size, ("Human:",)).save(folder)
    return folder


def write_adapter(folder):
    """Writes adapters over that checkpoint; returns their folder."""
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text(json.dumps(ADAPTER))
    rng, tensors = np.random.default_rng(1), {}
    for layer in range(CONFIG.layers):
        for name, width in (("q_proj", 16), ("v_proj", 8)):
            module = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((4, CONFIG.width), np.float32)
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((width, 4), np.float32)
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("good") / "base")


@pytest.fixture
def folder(base, tmp_path):
    return Path(shutil.copytree(base, tmp_path / "base"))


def context_of(stages, name, task=TASK):
    experiment = Experiment(task, stages)
    return Context(experiment, None, name, sharding.make_mesh(experiment.mesh))


def refusal(stages, name, task=TASK):
    """Returns the one line with which a stage is refused before anything runs."""
    with pytest.raises(UserError) as error:
        stages[name].check(context_of(stages, name, task))
    assert "\n" not in str(error.value)
    return str(error.value)


# --- parameters that are not finite ---


def table(**fields):
    fields = {"policies": {"good": "good"}, "reference": "good", "judges": {"longer": Oracle("longer")}} | fields
    return Tournament(prompts=8, writing=WRITING, **fields)


LABEL = Label(generator="bad", method=Judged(Oracle("longer")), split="train", prompts=8, writing=WRITING)
RATER = LanguageModelJudge("bad")
GREEDY = dataclasses.replace(WRITING, sampling=Sampling(temperature=0.0))


@pytest.mark.filterwarnings("ignore:.*holds NaN or infinity")
@pytest.mark.parametrize(("stage", "message"), [
    (LABEL, "the network of 'bad' gives log-probs"),
    (dataclasses.replace(LABEL, writing=GREEDY), "the network of 'bad' gives log-probs"),
    (table(policies={"good": "good", "b": "bad"}), "the network of 'bad' gives log-probs"),
    (table(reference="bad"), "the network of 'good' is scored by a reference whose log-probs"),
    (table(policies={"a": "good", "b": "good"}, judges={"j": RATER}), "the rater 'bad' gives logits"),
], ids=["label", "greedy", "policy", "reference", "judge"])  # fmt: skip
@pytest.mark.parametrize("damaged", ["weight", "adapter"])
def test_a_network_that_is_not_finite_neither_writes_nor_judges(folder, tmp_path, base, stage, message, damaged):
    """A NaN in a checkpoint or in adapters is named at the first text, and nothing is written of it."""
    adapter, name = write_adapter(tmp_path / "adapter"), "model.layers.0.mlp.up_proj.weight"
    resave(folder, **{name: np.full((CONFIG.hidden, CONFIG.width), np.nan, np.float32)})
    file = adapter / "adapter_model.safetensors"
    tensors = safetensors.numpy.load_file(file)
    safetensors.numpy.save_file({k: np.full_like(v, np.nan) for k, v in tensors.items()}, file)
    bad = LoadCheckpoint(str(folder)) if damaged == "weight" else LoadAdapter(str(adapter), "good")
    stages = {"good": LoadCheckpoint(str(base)), "bad": bad, "work": stage}
    with pytest.raises(UserError) as error:
        run(Experiment(TASK, stages), tmp_path / "w")
    assert str(error.value).startswith(f"work: {message}") and " not finite" in str(error.value)
    assert "\n" not in str(error.value)
    for result in ("data", "chunks/000000.json", "win_rates.json"):
        assert not (tmp_path / "w" / "work" / result).exists()


# --- ids, ends, templates ---


@pytest.mark.parametrize("place", ["added", "vocabulary"])
def test_the_largest_id_must_have_an_embedding(folder, place):
    """Also where the tokenizer has fewer tokens than the model: ids may have gaps."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    fewer = {piece: i for piece, i in tokenizer["model"]["vocab"].items() if i < 280}
    tokenizer["model"] |= {"vocab": fewer, "merges": []}
    if place == "vocabulary":
        fewer["[PAD]"] = 320
    else:
        fewer["[PAD]"], extra = 320, {"id": 320, "content": "[PAD]", "special": True, "normalized": False}
        tokenizer["added_tokens"].append(extra | dict.fromkeys(("single_word", "lstrip", "rstrip"), False))
    path.write_text(json.dumps(tokenizer))
    message = "the tokenizer gives '[PAD]' the id 320, and the model has embeddings for ids up to 319"
    assert message in refusal({"base": LoadCheckpoint(str(folder))}, "base")
    with pytest.raises(UserError, match="up to 319"):
        huggingface.read_tokenizer(folder)
    edit(folder / "config.json", vocab_size=321)
    assert huggingface.read_tokenizer(folder).vocab_size == 321


@pytest.mark.parametrize(("generation", "config", "expected"), [
    ({"eos_token_id": [5, 6]}, 7, (5, 6)),
    ({}, [1, 2], (1, 2)),
    (None, [1, 2], (1, 2)),
    (None, 1, (1,)),
    (None, None, (2,)),  # the tokenizer's own
])  # fmt: skip
def test_end_tokens_come_from_the_first_file_that_names_them(folder, tmp_path, generation, config, expected):
    (folder / "generation_config.json").unlink()
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    edit(folder / "config.json", eos_token_id=config)
    tokenizer = huggingface.read_tokenizer(folder)
    assert tokenizer.end_tokens == expected
    (tmp_path / "stage").mkdir()
    tokenizer.save(tmp_path / "stage")
    assert huggingface.read_tokenizer(tmp_path / "stage").end_tokens == expected


def test_no_end_token_at_all_is_said_where_a_task_stops_at_it(folder):
    (folder / "generation_config.json").unlink()
    edit(folder / "tokenizer_config.json", eos_token=None)
    stages = {"base": LoadCheckpoint(str(folder)), "work": dataclasses.replace(LABEL, generator="base")}
    assert huggingface.read_tokenizer(folder).end_tokens == ()
    assert "stops at the tokenizer's end token, and it has none; name another stop" in refusal(stages, "work")


PARTS = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize("template", [PARTS, "{{ bos_token }}", " "])
def test_a_template_that_leaves_out_the_message_is_refused_before_anything_runs(folder, template):
    (folder / "chat_template.jinja").write_text(template)
    line = refusal({"base": LoadCheckpoint(str(folder), chat=True)}, "base")
    assert "the chat template leaves out a message whose content is a text" in line
    LoadCheckpoint(str(folder)).check(context_of({"base": LoadCheckpoint(str(folder))}, "base"))


@pytest.mark.parametrize(("fields", "message"), [
    ({"model_max_length": "long"}, "; tokenizer.json is needed, and a tokenizer_config.json that fits it"),
    ({"model_max_length": [1]}, "the tokenizer cannot be read ("),
    ({"chat_template": "{% if %}"}, "the chat template is damaged (Expected an expression, got 'end of sta"),
    ({"chat_template": 1}, "the tokenizer has no chat template; use a chat model, or chat=False"),
    ({"chat_template": "hello"}, "the chat template leaves out a message whose content is a text"),
], ids=["length", "lengths", "syntax", "number", "constant"])  # fmt: skip
def test_a_tokenizer_config_that_cannot_be_is_named_with_its_folder(folder, fields, message):
    edit(folder / "tokenizer_config.json", **fields)
    line = refusal({"base": LoadCheckpoint(str(folder), chat=True)}, "base")
    assert line.startswith(f"{folder}: ") and message in line


@pytest.mark.parametrize(("token", "message"), [
    (-1, "eos_token_id=[2, -1] is no token; correct it"),
    (1000, "the end token 1000 is beyond the model's embeddings, for ids up to 319; correct eos_token_id"),
])  # fmt: skip
@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_token_that_the_model_cannot_write_is_refused(folder, file, token, message):
    (folder / "generation_config.json").write_text("{}")
    edit(folder / file, eos_token_id=[2, token])
    with pytest.raises(UserError) as error:
        huggingface.read_tokenizer(folder)
    assert message in str(error.value) and str(folder) in str(error.value)


def test_an_encoder_decoder_starts_with_one_token(tmp_path):
    """transformers writes after generation_config.json's token, and trains after config.json's."""
    folder = Path(shutil.copytree(FIXTURES / "t5", tmp_path / "t5"))
    for start, refused in ((None, False), (5, False), (3, True)):
        (folder / "generation_config.json").write_text(json.dumps({"decoder_start_token_id": start}))
        if not refused:
            assert huggingface.read_config(folder).start_token == 5
            continue
        with pytest.raises(UserError, match=r"generation_config\.json has 3; correct one of them"):
            huggingface.read_config(folder)


def test_a_template_that_leaves_out_some_messages_is_refused_at_the_first():
    def render(messages):
        return "".join(m["content"] for m in messages if m["content"] != "sing")

    def encode(text):
        return [len(text)] if text else []

    plain = Tokenizer(encode, encode, str, lambda piece: None, 9, lambda folder: None, render=render)
    chat = with_chat_template(plain, one_message)
    assert chat.encode("dance") == [5]
    with pytest.raises(UserError, match="leaves out the message 'sing' of the role 'user'"):
        chat.encode("sing")
    for tokenizer in (plain, chat):
        with pytest.raises(UserError, match="the prompt '' is no token"):
            encode_prompt(tokenizer, "")


def test_a_template_that_needs_other_messages_is_asked_with_the_tasks():
    def render(messages):
        if messages[0]["role"] != "system":
            raise ValueError("no system message")
        return messages[1]["content"]

    plain = Tokenizer(len, len, str, lambda piece: None, 9, lambda folder: None, render=render)
    system = {"role": "system", "content": "be kind"}
    assert with_chat_template(plain, lambda text: [system, *one_message(text)]).encode("four") == 4


@needs_data
def test_the_real_model_stops_where_transformers_does(tmp_path):
    """Its config.json alone names the end tokens; transformers 5 and 4 stop after 176 tokens."""
    folder = Path(shutil.copytree(DATA / "models" / "stories260K", tmp_path / "model"))
    (folder / "generation_config.json").unlink()
    edit(folder / "config.json", eos_token_id=[1, 2])
    config, tokenizer = huggingface.read_config(folder), huggingface.read_tokenizer(folder)
    assert stop_tokens(TASK, tokenizer) == ((1,), (2,))
    ids = np.array([tokenizer.encode("They all lived happily ever after.")], np.int32)

    def write(params):
        process = build(config).prefill(params, Tokens(ids, np.ones_like(ids, bool)), 400)
        return sample(process, jax.random.key(0)[None], 400, stop_tokens(TASK, tokenizer), Sampling(temperature=0.0))

    written = jax.jit(write)(weights.read_params(folder, config))
    assert int(written.completion.mask.sum()) == 176


# --- tensors ---


def tied(name):
    """Returns (config, params) of a fixture, its output projection tied to its embedding."""
    config, params = checkpoint(name)
    return dataclasses.replace(config, tied=True), {k: v for k, v in params.items() if k != "head"}


@pytest.mark.parametrize("name", NAMES)
def test_a_copy_of_the_embedding_is_compared_and_never_dropped(tmp_path, name):
    """For every pair of every family: equal copies are read, another one is refused by its name."""
    config, params = tied(name)
    huggingface.write_folder(tmp_path / "a", config, params, TOKENIZER)
    path = tmp_path / "a" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    embedding, copies = embedding_copies(FAMILIES[config.family], config)
    assert copies and embedding in tensors
    for copy in copies:
        if isinstance(config, T5Config) and copy == HEAD:
            continue  # it is a projection of its own, below
        safetensors.numpy.save_file(tensors | {copy: tensors[embedding]}, path)
        read = weights.read_params(tmp_path / "a", config)
        jax.tree.map(np.testing.assert_array_equal, read, params)
        other = np.array(tensors[embedding])
        other[-1, -1] += 1
        safetensors.numpy.save_file(tensors | {copy: other}, path)
        with pytest.raises(UserError, match=f"tensor {copy} differs from {embedding}, and the model uses one for both"):
            weights.check_tensors(tmp_path / "a", config)


def test_an_output_projection_that_is_not_tied_is_used(tmp_path, folder):
    """Of a Llama, when config.json unties it; of a T5 whenever it is there."""
    head = np.array(safetensors.numpy.load_file(folder / "model.safetensors")[EMBEDDING][::-1])
    resave(folder, **{HEAD: head})
    line = refusal({"base": LoadCheckpoint(str(folder))}, "base")
    assert f"{folder}: tensor {HEAD} differs from {EMBEDDING}" in line and "tie_word_embeddings" in line
    edit(folder / "config.json", tie_word_embeddings=False)
    config = huggingface.read_config(folder)
    np.testing.assert_array_equal(weights.read_params(folder, config)["head"]["kernel"], head.T)

    huggingface.write_folder(tmp_path / "t5", *tied("t5"), TOKENIZER)
    table = safetensors.numpy.load_file(tmp_path / "t5" / "model.safetensors")["shared.weight"]
    resave(tmp_path / "t5", **{HEAD: np.array(table[::-1])})
    config = huggingface.read_config(tmp_path / "t5")
    np.testing.assert_array_equal(weights.read_params(tmp_path / "t5", config)["head"]["kernel"], table[::-1].T)


def test_one_file_is_read_before_an_index_that_was_left_beside_it(folder):
    names = safetensors.numpy.load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(names, "model-00001-of-00002.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    LoadCheckpoint(str(folder)).check(context_of({"base": LoadCheckpoint(str(folder))}, "base"))
    read = weights.read_params(folder, CONFIG)
    np.testing.assert_array_equal(read["embed"]["embedding"], names[EMBEDDING])


def test_a_stage_that_writes_past_the_model_s_context_is_warned_of(folder):
    edit(folder / "config.json", max_position_embeddings=16)
    short, label = LoadCheckpoint(str(folder)), dataclasses.replace(LABEL, generator="base")
    message = r"work\.writing needs room for 20 tokens and the model of 'base' was trained on contexts of 16"
    with pytest.warns(UserWarning, match=message):
        label.check(context_of({"base": short, "work": label}, "work"))
    label = dataclasses.replace(label, writing=dataclasses.replace(WRITING, buckets=(12,)))
    label.check(context_of({"base": short, "work": label}, "work"))
