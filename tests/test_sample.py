"""``alignjax sample`` and ``alignjax compare``: what they show is what the model draws."""

import io
import json

import jax
import numpy as np
import pytest

from alignjax.checkpoints import huggingface
from alignjax.cli import main
from alignjax.errors import UserError
from alignjax.models.tokenizer import decode_continuation, pad
from alignjax.pipeline import preview as looking
from alignjax.sampling.process import Process, Sampling, sample
from tests.test_export import LLAMA, T5, TEXTS, build


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints of two kinds with one tokenizer; large weights, so that replies are not flat noise."""
    tokenizer, base = huggingface.train_tokenizer(TEXTS, 320, ("Human:",)), tmp_path_factory.mktemp("folders")
    for name, config in (("llama", LLAMA), ("t5", T5)):
        params = jax.tree.map(lambda x: 2 * x, jax.jit(build(config).init)(jax.random.key(2)))
        huggingface.write_folder(base / name, config, params, tokenizer)
    return base


@pytest.mark.parametrize("name", ["t5"])
def test_what_is_streamed_is_what_is_drawn(folders, name):
    """Token by token, the same text as the sampler's own at the same key."""
    network, out = looking.opened(folders / name, chat=False), io.StringIO()
    how = Sampling(temperature=0.8, top_p=0.9)
    looking.stream(network, "Human: may I", None, 12, how, 5, out)
    keys, prompt = jax.random.key(5)[None], pad([network.tokenizer.encode("Human: may I")], 32)
    stop = looking.stops_of(network.tokenizer, None)

    @jax.jit
    def draw(params):
        return sample(Process(*network.model.start(params, prompt, 12)), keys, 12, stop, how).completion

    drawn = draw(network.params)
    ids = np.asarray(drawn.tokens)[0][np.asarray(drawn.mask)[0]].tolist()
    kept = ids[:-1] if ids[-1] in network.tokenizer.ends else ids
    want, told = decode_continuation(network.tokenizer, kept), out.getvalue().removesuffix("\n")
    assert len(told) > 3 and want.startswith(told)
    assert told == want or want[len(told) :].startswith("�")  # a character that was never finished waits for ever


def test_half_characters_wait_and_nothing_follows_an_end(folders):
    tokenizer = huggingface.read_tokenizer(folders / "llama")
    out = io.StringIO()
    speak, ids = looking.speaker(tokenizer, {2}, out), tokenizer.encode_bare(" n☃!")
    told = []
    for token in [*ids, 2, *ids]:
        speak(np.int32(token))
        told.append(out.getvalue())
    assert told[-1] == " n☃!" and "�" not in "".join(told)
    assert len(set(told[: len(ids)])) > 2  # as it comes, not all at the end


def test_compare_shows_both_sides_of_every_prompt(folders, tmp_path, capfd):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Human: {word}"}) + "\n" for word in ("sing", "no", "my", "dear")))
    argv = ["compare", str(folders / "llama"), str(folders / "t5"), "--prompts", str(path), "--count", "3"]
    assert main([*argv, "--max-new-tokens", "4", "--temperature", "0"]) == 0
    told = capfd.readouterr().out
    assert [line for line in told.splitlines() if line.startswith("Human:")] == [
        "Human: sing",
        "Human: no",
        "Human: my",
    ]
    assert told.count(" | ") >= 3 and "over 3 prompts" in told


@pytest.mark.parametrize(
    ("argv", "told"),
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
def test_what_cannot_be_shown_is_named(folders, tmp_path, capfd, argv, told):
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "bad").write_text('{"text": 3}\n')
    where = {name: str(tmp_path / name) for name in ("nowhere", "empty", "bad")}
    where |= {name: str(folders / name) for name in ("llama", "t5")}
    assert main([part.format(**where) for part in argv]) == 2
    answer = capfd.readouterr().err
    assert answer.count("\n") == 1 and told in answer


def test_prompts_come_as_lines_or_as_json(tmp_path):
    (tmp_path / "plain").write_text("one\n\ntwo\n")
    (tmp_path / "json").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert looking.read_prompts(tmp_path / "plain") == looking.read_prompts(tmp_path / "json") == ["one", "two"]
    (tmp_path / "json").write_text('{"prompt": "one"}\n{"story": 3}\n')
    with pytest.raises(UserError, match="line 2"):
        looking.read_prompts(tmp_path / "json")
