"""``alignjax sample`` and ``alignjax compare`` show what the model draws."""

import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from alignjax.checkpoints import huggingface
from alignjax.cli import main
from alignjax.errors import UserError
from alignjax.models.tokenizer import decode_continuation, pad
from alignjax.pipeline import preview
from alignjax.pipeline.preview import PreviewOptions
from alignjax.sampling.process import Sampling, sample
from alignjax.tasks.json_lines import read_prompts
from tests.test_export import LLAMA, T5, TEXTS, build


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Returns a folder with checkpoints of two kinds and one tokenizer. Large weights make the distributions uneven."""
    tokenizer, base = huggingface.train_tokenizer(TEXTS, 320, ("Human:",)), tmp_path_factory.mktemp("folders")
    for name, config in (("llama", LLAMA), ("t5", T5)):
        params = jax.tree.map(lambda x: 2 * x, jax.jit(build(config).init)(jax.random.key(2)))
        huggingface.write_folder(base / name, config, params, tokenizer)
    return base


@pytest.mark.parametrize("name", ["t5"])
def test_the_streamed_text_is_what_the_sampler_draws(folders, name):
    """The stream is the text of the sampler's tokens at the same key."""
    network, out = preview.open_preview_network(folders / name, chat=False), io.StringIO()
    sampling = Sampling(temperature=0.8, top_p=0.9)
    preview.stream(network, "Human: may I", PreviewOptions(None, 12, sampling, 5), out)
    keys, prompt = jax.random.key(5)[None], pad([network.tokenizer.encode("Human: may I")], 32)
    stop = preview.preview_stops(network.tokenizer, None)

    @jax.jit
    def draw(params):
        return sample(network.model.prefill(params, prompt, 12), keys, 12, stop, sampling).completion

    drawn = draw(network.params)
    ids = np.asarray(drawn.tokens)[0][np.asarray(drawn.mask)[0]].tolist()
    kept = ids[:-1] if ids[-1] in network.tokenizer.end_tokens else ids
    expected, streamed = decode_continuation(network.tokenizer, kept), out.getvalue().removesuffix("\n")
    assert len(streamed) > 3 and expected.startswith(streamed)
    assert streamed == expected or expected[len(streamed) :].startswith("�")  # a half character is never written


def test_half_characters_are_not_written_nor_anything_after_an_end_token(folders):
    tokenizer = huggingface.read_tokenizer(folders / "llama")
    out = io.StringIO()
    write_token, ids = preview.token_writer(tokenizer, {2}, out), tokenizer.encode_bare(" n☃!")
    texts = []
    for token in [*ids, 2, *ids]:
        write_token(np.int32(token))
        texts.append(out.getvalue())
    assert texts[-1] == " n☃!" and "�" not in "".join(texts)
    assert len(set(texts[: len(ids)])) > 2  # the text grows with the tokens


def test_compare_shows_both_sides_of_every_prompt(folders, tmp_path, capfd):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Human: {word}"}) + "\n" for word in ("sing", "no", "my", "dear")))
    argv = ["compare", str(folders / "llama"), str(folders / "t5"), "--prompts", str(path), "--count", "3"]
    assert main([*argv, "--max-new-tokens", "4", "--temperature", "0"]) == 0
    output = capfd.readouterr().out
    assert [line for line in output.splitlines() if line.startswith("Human:")] == [
        "Human: sing",
        "Human: no",
        "Human: my",
    ]
    assert output.count(" | ") >= 3 and "over 3 prompts" in output


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("sample", "{nowhere}", "--prompt", "x"), "config.json"),
        (("sample", "{llama}", "--prompt", "x", "--top-p", "0"), "top_p"),
        (("sample", "{llama}", "--prompt", "x", "--max-new-tokens", "0"), "max-new-tokens"),
        (("sample", "{llama}", "--prompt", "x", "--chat"), "no chat template"),
        (("sample", "{llama}", "--prompt", "Human: " * 9000), "shorten it"),
        (("compare", "{llama}", "{t5}", "--prompts", "{nowhere}"), "cannot be read"),
        (("compare", "{llama}", "{t5}", "--prompts", "{empty}"), "holds no prompts"),
        (("compare", "{llama}", "{t5}", "--prompts", "{bad}"), "line 1"),
    ],
)
def test_wrong_input_is_refused(folders, tmp_path, capfd, argv, message):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bad.jsonl").write_text('{"text": 3}\n')
    paths = {Path(name).stem: str(tmp_path / name) for name in ("nowhere.txt", "empty.txt", "bad.jsonl")}
    paths |= {name: str(folders / name) for name in ("llama", "t5")}
    assert main([part.format(**paths) for part in argv]) == 2
    answer = capfd.readouterr().err
    assert answer.count("\n") == 1 and message in answer


def test_prompts_come_as_lines_or_as_json(tmp_path):
    (tmp_path / "plain.txt").write_text("one\n\ntwo\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert read_prompts(str(tmp_path / "plain.txt")) == read_prompts(str(tmp_path / "rows.jsonl")) == ["one", "two"]
    (tmp_path / "rows.jsonl").write_text('{"prompt": "one"}\n{"story": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        read_prompts(str(tmp_path / "rows.jsonl"))
