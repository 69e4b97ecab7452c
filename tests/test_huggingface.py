"""Hugging Face folders: a checkpoint in their format is read back, in one file or in shards, in any dtype."""

import dataclasses
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from alignjax.checkpoints import huggingface, weights
from alignjax.errors import UserError
from alignjax.models.decoder import decoder
from alignjax.models.tokenizer import decode_continuation, encode_continuation, pad, single_token
from alignjax.pipeline.config import leaves
from alignjax.pipeline.description import describe
from alignjax.pipeline.stages import LoadCheckpoint
from tests.conftest import TINY

TEXTS = [
    "Human: may I sing?\n\nAssistant: Sing on, my dear.\n\nHuman: Thank you.",
    "Human: no\n\nAssistant: Well.",
] * 20


def write_checkpoint(folder, params, config, dtype=np.float32, shards=1):
    """Writes a Llama as Hugging Face names it, by hand from its documentation."""
    (folder / "config.json").write_text(json.dumps(llama_json(config)))
    tensors = llama_tensors(jax.tree.map(np.asarray, params), config)
    tensors = {name: np.ascontiguousarray(value).astype(dtype) for name, value in tensors.items()}
    if shards == 1:
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        return
    index = {}
    for shard in range(shards):
        part = {k: v for i, (k, v) in enumerate(sorted(tensors.items())) if i % shards == shard}
        safetensors.numpy.save_file(part, folder / f"model-{shard}.safetensors")
        index |= dict.fromkeys(part, f"model-{shard}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def llama_tensors(p, config):
    """Returns tensor name -> value; Hugging Face stores kernels as [out, in]."""
    tensors = {"model.embed_tokens.weight": p["embed"]["embedding"], "model.norm.weight": p["norm"]["scale"]}
    if not config.tied:
        tensors["lm_head.weight"] = p["head"]["kernel"].T
    for i in range(config.layers):
        block = jax.tree.map(lambda x, i=i: x[i], p["blocks"])
        prefix = f"model.layers.{i}"
        tensors[f"{prefix}.input_layernorm.weight"] = block["attention_norm"]["scale"]
        tensors[f"{prefix}.post_attention_layernorm.weight"] = block["mlp_norm"]["scale"]
        for name in "qkvo":
            tensors[f"{prefix}.self_attn.{name}_proj.weight"] = block[name]["kernel"].T
        for name in ("gate", "up", "down"):
            tensors[f"{prefix}.mlp.{name}_proj.weight"] = block[name]["kernel"].T
    return tensors


def llama_json(config):
    """Returns the fields of config.json."""
    return dict(
        model_type="llama", vocab_size=config.vocab_size, hidden_size=config.width, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, head_dim=config.head_dim, num_key_value_heads=config.kv_heads,
        intermediate_size=config.hidden, rms_norm_eps=config.norm_eps, rope_theta=config.rope_theta,
        tie_word_embeddings=config.tied, hidden_act="silu",
    )  # fmt: skip


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shards", [1, 3])
def test_a_folder_is_read_back_bit_for_bit(tmp_path, tied, shards):
    config = dataclasses.replace(TINY, tied=tied)
    params = decoder(config).init(jax.random.key(4))
    write_checkpoint(tmp_path, params, config, shards=shards)
    assert huggingface.read_config(tmp_path) == config
    jax.tree.map(np.testing.assert_array_equal, weights.read_params(tmp_path, config), params)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_widened_exactly(tmp_path, params, dtype):
    write_checkpoint(tmp_path, params, TINY, dtype)
    got = weights.read_params(tmp_path, TINY)
    want = jax.tree.map(lambda x: np.asarray(x).astype(dtype).astype(np.float32), params)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_rope_theta_is_read_in_its_old_and_new_place(tmp_path, params):
    write_checkpoint(tmp_path, params, TINY)
    path = tmp_path / "config.json"
    raw = json.loads(path.read_text())
    for change in ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}):
        path.write_text(json.dumps({**{k: v for k, v in raw.items() if k != "rope_theta"}, **change}))
        assert huggingface.read_config(tmp_path).rope_theta == 5e5


@pytest.fixture(scope="module")
def tokenizer():
    return huggingface.train_tokenizer(TEXTS, 320, ("Human:",))


def test_a_trained_tokenizer_round_trips_and_survives_its_folder(tokenizer, tmp_path):
    text = TEXTS[0] + " Ünïcode, 数!"
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and tokenizer.decode_all(ids[1:]) == text
    tokenizer.save(tmp_path)
    again = huggingface.read_tokenizer(tmp_path)
    assert again.encode(text) == ids and again.vocab_size == tokenizer.vocab_size <= 320


def test_pieces_encoded_apart_are_the_whole(tokenizer):
    prompt, reply = "Human: may I sing?\n\nAssistant:", " Sing on, my dear.\n\nHuman:"
    assert tokenizer.encode(prompt) + encode_continuation(tokenizer, reply) == tokenizer.encode(prompt + reply)
    assert decode_continuation(tokenizer, encode_continuation(tokenizer, reply)) == reply


def test_a_marker_is_one_token_and_others_are_refused(tokenizer):
    assert tokenizer.decode_all([single_token(tokenizer, "Human:")]) == "Human:"
    assert single_token(tokenizer, "</s>") == 2
    with pytest.raises(UserError, match="tokens"):
        single_token(tokenizer, "zebra crossing")


def test_padding_on_either_side_keeps_the_rows():
    for side in ("left", "right"):
        padded = pad([[1, 2, 3], [4]], 5, side)
        assert [row[m].tolist() for row, m in zip(padded.tokens, padded.mask, strict=True)] == [[1, 2, 3], [4]]
    with pytest.raises(UserError, match="does not fit"):
        pad([[1, 2, 3]], 2)


def test_a_folder_s_digest_changes_with_a_weight_and_is_no_setting(tmp_path):
    weights = tmp_path / "model.safetensors"
    values = np.zeros(3 * 2**18, np.float32)  # three mebibytes
    digests = []
    for position, name in ((0, "a"), (2**18, "a"), (2**18, "b")):
        values[position] = 1.0
        safetensors.numpy.save_file({name: values}, weights)
        digests += [
            describe(LoadCheckpoint(str(tmp_path)))["digest"],
            describe(LoadCheckpoint(str(tmp_path)))["digest"],
        ]
    assert digests[::2] == digests[1::2] and len(set(digests)) == 3
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    assert describe(LoadCheckpoint(str(tmp_path)))["digest"] not in digests
    assert "digest" not in dict(leaves(LoadCheckpoint(str(tmp_path))))
    assert LoadCheckpoint(str(tmp_path / "nowhere")).digest == ""
