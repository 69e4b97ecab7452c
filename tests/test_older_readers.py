"""Exported folders say the same to a reader one major version older: transformers 4, and programs built on it."""

import json

import pytest

from alignjax.checkpoints import huggingface
from alignjax.errors import UserError
from tests.test_checkpoint_errors import edit
from tests.test_families import NAMES, TOKENIZER, checkpoint
from tests.test_faults import write_base
from tests.test_huggingface import TEXTS


@pytest.mark.parametrize("name", NAMES)
def test_an_export_says_the_same_to_a_reader_of_the_older_fields(tmp_path, name):
    """transformers 4 does not know rope_parameters; transformers 5 reads the older fields where these are missing."""
    config, params = checkpoint(name)
    huggingface.write_folder(tmp_path / "a", config, params, TOKENIZER)
    path = tmp_path / "a" / "config.json"
    has_rope = "rope_parameters" in json.loads(path.read_text())
    assert has_rope == (getattr(config, "positions", "learned") == "rotary")
    edit(path, rope_parameters=None)
    assert huggingface.read_config(tmp_path / "a") == config


def test_a_llama_s_scaling_is_exported_in_the_older_fields_too(tmp_path):
    config, params = checkpoint("llama3")
    huggingface.write_folder(tmp_path / "a", config, params, TOKENIZER)
    written = json.loads((tmp_path / "a" / "config.json").read_text())
    s = config.rope_scaling
    assert written["rope_theta"] == config.rope_theta == written["rope_parameters"]["rope_theta"]
    assert written["rope_scaling"] == {
        "rope_type": "llama3", "factor": s.factor, "low_freq_factor": s.low_frequency,
        "high_freq_factor": s.high_frequency, "original_max_position_embeddings": s.original,
    }  # fmt: skip


def test_a_tokenizer_is_saved_in_words_that_both_versions_know(tmp_path):
    folder = write_base(tmp_path / "base")
    edit(folder / "tokenizer_config.json", additional_special_tokens=["Human:"])
    (tmp_path / "out").mkdir()
    tokenizer = huggingface.read_tokenizer(folder)
    tokenizer.save(tmp_path / "out")
    written = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert written["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert written["additional_special_tokens"] == ["Human:"] and "extra_special_tokens" not in written
    assert huggingface.read_tokenizer(tmp_path / "out").encode(TEXTS[0]) == tokenizer.encode(TEXTS[0])


def test_a_tokenizer_that_would_be_read_as_another_is_not_exported(tmp_path):
    """transformers 5 splits the texts of a Qwen 2 by Qwen's rules, whatever its folder says."""
    config, params = checkpoint("qwen2")
    tokenizer = huggingface.read_tokenizer(write_base(tmp_path / "base"))
    with pytest.raises(UserError, match="reads the tokenizer of a qwen2 folder as Qwen2Tokenizer, which splits texts"):
        huggingface.write_folder(tmp_path / "a", config, params, tokenizer)
    assert not (tmp_path / "a").exists()
    config, params = checkpoint("llama2")
    huggingface.write_folder(tmp_path / "a", config, params, tokenizer)
