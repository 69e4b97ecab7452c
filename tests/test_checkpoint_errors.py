"""Checkpoints that are damaged, dangerous or not supported: one line says what is wrong and what to do, status 2, and
no result is written. Each is a copy of a good folder that is then damaged, and is read through the command line."""

import dataclasses
import json
import pickle
import re
import shutil
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import safetensors.numpy

from alignjax.checkpoints import huggingface, weights
from alignjax.cli import main
from alignjax.distributed import sharding
from alignjax.errors import UserError
from alignjax.models.decoder import decoder
from tests.conftest import TINY
from tests.test_huggingface import TEXTS, write_checkpoint
from tests.test_tokenizers import KINDS

CONFIG = dataclasses.replace(TINY, vocab_size=320)
INDEX, WEIGHTS = "model.safetensors.index.json", "model.safetensors"
NORM = "model.norm.weight"
PROGRESS = r"\w+: +\d+%\||\w+: [\d.]+ s;"
EXPERIMENT = """
from alignjax.pipeline.experiment import Experiment
from alignjax.pipeline.stages import LoadCheckpoint

def get_config(checkpoint: str):
    return Experiment(task=None, stages={"base": LoadCheckpoint(checkpoint)})
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Two good checkpoints of one model: in one file, and in shards with an index."""
    base, rng = tmp_path_factory.mktemp("whole"), np.random.default_rng(0)
    params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), weights.abstract_params(CONFIG))
    tokenizer = huggingface.train_tokenizer(TEXTS, CONFIG.vocab_size, ("Human:",))
    for name, shards in (("single", 1), ("shards", 2)):
        (base / name).mkdir()
        write_checkpoint(base / name, params, CONFIG, shards=shards)
        tokenizer.save(base / name)
    return base


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole / "single", tmp_path / "checkpoint"))


@pytest.fixture
def shards(whole, tmp_path):
    return Path(shutil.copytree(whole / "shards", tmp_path / "checkpoint"))


def run(folder):
    """Returns the exit status; the run's folder is beside the checkpoint."""
    experiment, workdir = folder.with_name("experiment.py"), folder.with_name("w")
    experiment.write_text(EXPERIMENT)
    return main(["run", str(experiment), "--workdir", str(workdir), "--set", f"checkpoint={folder}"])


def refused(capfd, folder):
    """Returns the one line of the error, which names the folder. Nothing is half-written."""
    assert run(folder) == 2
    lines = [line for line in re.split("[\r\n]", capfd.readouterr().err) if line and not re.match(PROGRESS, line)]
    assert len(lines) == 1 and lines[0].startswith("alignjax:") and str(folder) in lines[0], lines
    assert not (folder.with_name("w") / "base").exists()
    return lines[0]


def edit(path, **changes):
    """Changes a JSON file; None removes a name."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


def resave(folder, **changes):
    """Changes tensors by name; None removes one."""
    tensors = safetensors.numpy.load_file(folder / WEIGHTS) | changes
    safetensors.numpy.save_file({k: v for k, v in tensors.items() if v is not None}, folder / WEIGHTS)


def test_whole_ones_run_and_a_link_leads_where_its_owner_says(folder, capfd):
    elsewhere = folder.with_name("elsewhere.safetensors")
    (folder / WEIGHTS).rename(elsewhere)
    (folder / WEIGHTS).symlink_to(elsewhere)
    assert run(folder) == 0 and (folder.with_name("w") / "base" / "params").exists()


@pytest.mark.parametrize("left", [0, 4, 100, -40])
def test_a_truncated_file(folder, capfd, left):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:left])
    assert "model.safetensors is damaged" in refused(capfd, folder)


def test_a_file_of_another_format(folder, capfd):
    (folder / WEIGHTS).write_bytes(b"\xff" * 1000)
    assert "model.safetensors is damaged" in refused(capfd, folder)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("gone.safetensors", "gone.safetensors is damaged or missing"),
        ("../outside.safetensors", "'../outside.safetensors' points outside the folder"),
        ("/outside.safetensors", "'/outside.safetensors' points outside the folder"),
        ("below/model.safetensors", "points outside the folder"),
        ("..", "points outside the folder"),
        ("a\0.safetensors", "points outside the folder"),
        ("", "'' is no safetensors file"),
        ("pytorch_model.bin", "'pytorch_model.bin' is no safetensors file; convert it"),
        ("tokenizer.json", "is no safetensors file"),
        (3, "has no weight_map of names to files"),
    ],
)
def test_an_index_that_names_a_wrong_file(shards, capfd, file, message):
    """A good shard is where the paths outside lead, so that the name alone can be refused."""
    names = json.loads((shards / INDEX).read_text())["weight_map"]
    shutil.copy(shards / names[NORM], shards.with_name("outside.safetensors"))
    edit(shards / INDEX, weight_map=names | {NORM: file})
    assert message in refused(capfd, shards)


def test_an_index_that_names_another_shard_or_too_few(shards, capfd):
    names = json.loads((shards / INDEX).read_text())["weight_map"]
    other = next(file for file in names.values() if file != names[NORM])
    edit(shards / INDEX, weight_map=names | {NORM: other})
    assert f"{other} lacks tensor {NORM} that the index says it has" in refused(capfd, shards)
    edit(shards / INDEX, weight_map={name: file for name, file in names.items() if name != NORM})
    assert f"tensor {NORM} is missing" in refused(capfd, shards)


@pytest.mark.parametrize(
    ("text", "message"),
    [("{", "cannot be read"), ("[]", "holds no JSON object"), ("{}", "no weight_map"), ("[" * 200_000, "cannot")],
)
@pytest.mark.parametrize("file", [INDEX, "config.json"])
def test_a_file_that_is_no_json_object(shards, capfd, file, text, message):
    (shards / file).write_text(text)
    line = refused(capfd, shards)
    assert file in line and ("model_type" if (file, text) == ("config.json", "{}") else message) in line


def test_no_config_and_no_folder(folder, capfd):
    (folder / "config.json").unlink()
    assert "config.json cannot be read" in refused(capfd, folder)
    assert "give a Hugging Face folder" in refused(capfd, folder.with_name("nowhere"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, f"tensor {NORM} is missing"),
        (np.ones(5, np.float32), rf"tensor {NORM} has shape \(5,\), config.json says \(16,\)"),
        (np.ones((16, 1), np.float32), r"has shape \(16, 1\)"),
        (np.ones(16, np.int8), f"tensor {NORM} is of I8, not of F64, F32, F16, BF16; convert it"),
    ],
)
def test_a_tensor_that_does_not_fit(folder, capfd, value, message):
    resave(folder, **{NORM: value})
    assert re.search(message, refused(capfd, folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "tensor model.layers.1.input_layernorm.weight has no place in LlamaForCausalLM"),
        ({"num_hidden_layers": 3}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 10**6}, "tensor model.layers.2.input_layernorm.weight is missing"),
        ({"hidden_size": 20}, r"has shape \(16,\), config.json says \(20,\)"),
        ({"vocab_size": 10**12}, r"embed_tokens.weight has shape \(320, 16\)"),
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \(8, 16\)"),
        ({"attention_bias": True}, "k_proj.bias is missing"),
        ({"tie_word_embeddings": False}, "lm_head.weight is missing"),
    ],
)
def test_a_config_of_other_weights(folder, capfd, changes, message):
    edit(folder / "config.json", **changes)
    assert re.search(message, refused(capfd, folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mixtral"}, "model_type 'mixtral' is not supported; llama, mistral,"),
        ({"model_type": "phi"}, "model_type 'phi' is not supported"),
        ({"model_type": "qwen3_moe", "num_experts": 8}, "model_type 'qwen3_moe' is not supported"),
        ({"model_type": None}, "model_type None is not supported"),
        ({"quantization_config": {}}, "quantization_config is not supported; use a checkpoint without it"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn' is not supported; default, linear"),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_type 'dynamic' is not supported"),
        ({"rope_scaling": {"rope_type": "new"}}, "rope_type 'new' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "Missing required keys .*llama3"),
        ({"rope_scaling": 3}, "rope_parameters"),
        ({"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported; relu, silu,"),
    ],
)
def test_a_family_or_option_that_is_not_supported(folder, capfd, changes, message):
    edit(folder / "config.json", **changes)
    line = refused(capfd, folder)
    assert re.search(message, line) and "config.json" in line


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": None}, "it lacks hidden_size; fetch it again"),
        ({"intermediate_size": None}, "it lacks intermediate_size"),
        ({"num_hidden_layers": None}, "it lacks num_hidden_layers"),
        ({"num_hidden_layers": 0}, r"layers=0 must be in \[1"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers.* expected int, got str"),
        ({"num_hidden_layers": True}, "num_hidden_layers.* expected int, got bool"),
        ({"hidden_size": 16.0}, "hidden_size.* expected int, got float"),
        ({"num_attention_heads": 0}, "has an invalid value"),
        ({"num_attention_heads": 3}, r"hidden size \(16\) is not a multiple of the number of attention heads"),
        ({"num_key_value_heads": 3}, "heads=4 is not a multiple of kv_heads=3"),
        ({"head_dim": 5}, "even"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps.* expected float"),
        ({"rms_norm_eps": float("nan")}, "norm_eps=nan must be"),
        ({"rope_theta": 0.0}, "rope_theta=0.0 must be"),
    ],
)
def test_a_value_that_is_missing_or_cannot_be(folder, capfd, changes, message):
    edit(folder / "config.json", **changes)
    line = refused(capfd, folder)
    assert re.search(message, line) and "config.json" in line


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.ckpt"])
def test_a_pickle_is_never_opened(folder, capfd, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(pickle.dumps(TouchesFile(folder.with_name("opened"))))
    assert f"model.safetensors is missing; convert {name} to safetensors" in refused(capfd, folder)
    assert not folder.with_name("opened").exists()
    (folder / name).unlink()
    assert "give a folder that has it" in refused(capfd, folder)


class TouchesFile:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_code_that_a_folder_brings_is_never_run(folder, capfd):
    marker = folder.with_name("ran")
    (folder / "theirs.py").write_text(f"from pathlib import Path\nPath({str(marker)!r}).touch()\nclass It: pass\n")
    edit(folder / "config.json", auto_map={"AutoConfig": "theirs.It", "AutoModelForCausalLM": "theirs.It"})
    assert run(folder) == 0
    shutil.rmtree(folder.with_name("w"))
    capfd.readouterr()
    code = {"tokenizer_class": "It", "auto_map": {"AutoTokenizer": ["theirs.It", "theirs.It"]}}
    edit(folder / "tokenizer_config.json", **code)
    assert "the tokenizer cannot be read" in refused(capfd, folder)
    assert not marker.exists()


@pytest.mark.parametrize("text", [None, "", "{", "{}", "[]"])
def test_a_tokenizer_that_is_missing_or_damaged(folder, capfd, text):
    (folder / "tokenizer.json").write_text(text) if text is not None else (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is needed" in refused(capfd, folder)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("axes", [None, {"data": 8}, {"data": 2, "fsdp": 2, "tensor": 2}])
def test_a_tensor_that_is_not_finite_is_warned_of_once(folder, value, axes):
    """On any number of devices; a value too large for ``dtype`` is reported too."""
    name = "model.layers.1.mlp.up_proj.weight"
    kernel = np.array(safetensors.numpy.load_file(folder / WEIGHTS)[name])
    kernel[0, 0] = kernel[-1, -1] = value
    resave(folder, **{name: kernel, NORM: np.full(16, 1e6, np.float32)})
    shapes = weights.abstract_params(CONFIG)
    where = None
    if axes:
        rules = sharding.matching_rules(decoder(CONFIG).rules, shapes)
        where = sharding.shardings(shapes, rules, sharding.make_mesh(sharding.Mesh(**axes)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weights.read_params(folder, CONFIG, where)
        weights.read_params(folder, CONFIG, where, np.float16)
    expected = [f"{folder}: tensor {n} holds NaN or infinity as {d}"
                for d, names in (("float32", [name]), ("float16", [name, NORM])) for n in names]  # fmt: skip
    assert [str(warning.message) for warning in caught] == expected


def test_sizes_that_do_not_divide_show_in_the_tensors(tmp_path):
    """GPT-2's head_dim is its width over its heads; transformers does not mind a remainder."""
    folder = Path(shutil.copytree(Path(__file__).parent / "fixtures" / "gpt2", tmp_path / "gpt2"))
    edit(folder / "config.json", n_head=3)
    with pytest.raises(UserError, match=r"c_attn\.(weight|bias) has shape"):
        weights.read_params(folder, huggingface.read_config(folder))


@pytest.fixture
def family(tmp_path):
    """Returns (name, changes) -> a copy of a family's fixture with a changed config.json."""

    def make(name, **changes):
        folder = Path(shutil.copytree(Path(__file__).parent / "fixtures" / name, tmp_path / name))
        edit(folder / "config.json", **changes)
        return folder

    return make


CROSSED = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 0.5,
           "original_max_position_embeddings": 32}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "message"), [
    ("gemma2", {"sliding_window": 0}, "layer_types names sliding_attention, and sliding_window=0 is no size; give it"),
    ("qwen2", {"use_sliding_window": False}, "names sliding_attention, and sliding_window=None is no size"),
    ("mistral", {"sliding_window": 0}, r"windows=(0, 0) must be in [1"),
    ("gemma3", {"attn_logit_softcapping": 0.5}, "attn_logit_softcapping=0.5 is not supported; use a checkpoint with"),
    ("llama3", {"rope_scaling": CROSSED}, "high_frequency=0.5 must be above low_frequency=1.0"),
    ("t5", {"is_encoder_decoder": False}, "is_encoder_decoder=False is not supported; use a checkpoint with True"),
    ("t5", {"decoder_start_token_id": None}, "decoder_start_token_id=None is no token; correct it"),
    ("t5", {"decoder_start_token_id": 0.5}, "decoder_start_token_id=0.5 is no token; correct it"),
    ("t5", {"eos_token_id": []}, "eos_token_id=[] is no token; correct it"),
    ("gemma3", {"num_hidden_layers": 2**40}, "num_hidden_layers=1099511627776 is beyond 1000000; correct it"),
    ("llama2", {"rope_theta": 2**70}, "the integer 1180591620717411303424 is beyond 64 bits"),
])  # fmt: skip
def test_a_value_that_torch_does_not_compute_with_is_refused(family, name, changes, message):
    folder = family(name, **changes)
    with pytest.raises(UserError) as error:
        huggingface.read_config(folder)
    assert str(error.value).startswith(str(folder / "config.json")) and message in str(error.value)


def test_a_family_reads_no_option_that_its_class_does_not_have(family):
    """A Mistral has no biases, and one window for all layers, whatever its config.json says."""
    folder = family("llama2", model_type="mistral", sliding_window=5, layer_types=["full_attention"] * 2)
    config = huggingface.read_config(folder)
    assert config.windows == (5, 5)
    with pytest.raises(UserError, match=r"self_attn\.k_proj\.bias has no place in MistralForCausalLM"):
        weights.read_params(folder, config)


def test_t5_computes_the_activation_that_is_named_last(family):
    """transformers derives dense_act_fn from feed_forward_proj, and the file's own dense_act_fn replaces it."""
    assert huggingface.read_config(family("t5", dense_act_fn="gelu_new")).activation == "gelu_tanh"
    assert not huggingface.read_config(family("mt5", is_gated_act=False, scale_decoder_outputs=[])).gated


def test_an_encoder_s_end_token_is_its_tokenizer_s(family):
    folder = family("t5", eos_token_id=2)
    KINDS["t5"]().save_pretrained(folder)
    edit(folder / "config.json", vocab_size=1000)
    with pytest.raises(UserError, match=r"config\.json: eos_token_id is 2, and the tokenizer ends every text in \[1\]"):
        huggingface.read_tokenizer(folder)
