"""``alignjax sample`` and ``alignjax compare`` show what the model draws."""

import dataclasses
import io
import json
import shutil
import signal
import time
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
from tests.test_checkpoint_errors import edit
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


class Full(io.StringIO):
    """An output that has room for four writes."""

    writes = 0

    def write(self, text):
        self.writes += 1
        if self.writes > 4:
            raise OSError(28, "No space left on device")
        return super().write(text)


def test_the_model_stops_writing_where_nobody_reads(folders, capfd):
    """A million tokens would take minutes. What JAX logs of the failed callback is not shown."""
    network, out = preview.open_preview_network(folders / "llama", chat=False), Full()
    network = dataclasses.replace(network, tokenizer=network.tokenizer._replace(end_tokens=()))
    with pytest.raises(OSError, match="No space left"), pytest.warns(UserWarning, match="context|no end token"):
        preview.stream(network, "Human: may I", PreviewOptions(None, 10**6), out)
    assert out.writes == 5 and capfd.readouterr().err == ""


def test_a_signal_is_answered_while_jax_computes():
    count, answered = jax.jit(lambda n: jax.lax.fori_loop(0, n, lambda i, x: x * 0.5 + i, 1.0)), []
    count(1)
    before = signal.signal(signal.SIGALRM, lambda *_: answered.append(time.monotonic()))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        preview.interruptible(lambda: count(3 * 10**7))
        end = time.monotonic()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert end - answered[0] > 0.05  # not at the end of the computation


def test_both_commands_warn_of_a_context_that_is_too_short(folders, tmp_path, capfd):
    short = tmp_path / "short"
    shutil.copytree(folders / "llama", short)
    edit(short / "config.json", max_position_embeddings=16)
    (tmp_path / "prompts.txt").write_text("Human: sing\n")
    options, prompts = ["--max-new-tokens", "14"], str(tmp_path / "prompts.txt")
    for argv in (
        ["sample", str(short), "--prompt", "Human: sing"],
        ["compare", str(folders / "llama"), str(short), "--prompts", prompts],
    ):
        with pytest.warns(UserWarning, match="14 new ones exceed the 16 tokens of context that short was trained on"):
            assert main([*argv, *options]) == 0


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
        (("sample", "{llama}", "--prompt", "x", "--temperature", "1e-38"), "temperature=1e-38"),
        (("sample", "{llama}", "--prompt", "x", "--temperature", "1e30"), "temperature=1e+30"),
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
