"""Text between a policy and a preference model of another tokenizer."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from alignjax.checkpoints import huggingface
from alignjax.distributed import sharding
from alignjax.models.tokenizer import encode_continuation, pad
from alignjax.pipeline.stages.policy_data import shares_tokens
from alignjax.pipeline.stages.writing import stop_tokens
from alignjax.tasks import sandbox
from alignjax.tasks.task import EOS
from alignjax.training.text_bridge import TextBridge
from alignjax.types import Sample
from tests.test_tokenizers import KINDS, MARKER, TEXTS, opened

PROMPTS = ["Human: may I sing?\n\nAssistant:", "Human: no\n\nAssistant:"]


@pytest.fixture(scope="module")
def readers(tmp_path_factory):
    """A policy's tokenizer and another's, of another kind."""
    own = huggingface.train_tokenizer(TEXTS, 320, ("Human:",))
    return own, opened(KINDS["llama"](), tmp_path_factory.mktemp("other"))


def samples_of(tokenizer, texts):
    """Responses as a policy draws them, each with its end."""
    ids = [encode_continuation(tokenizer, text) for text in texts]
    finished = np.array([MARKER in text for text in texts])
    return Sample(pad(ids, 16), np.zeros((len(ids), 16), np.float32), finished)


def test_the_preference_model_reads_the_responses_as_text_in_its_own_tokens(readers):
    own, other = readers
    task = sandbox.sandbox_task()
    texts = [[f" Sing on, my dear.{MARKER}", f" Well.{MARKER}"], [f"{MARKER}", " never ends"]]
    samples = [samples_of(own, side) for side in texts]
    prompt = pad([own.encode(text) for text in PROMPTS], 16)
    mesh = sharding.make_mesh(sharding.Mesh(1, 1, 1), jax.devices()[:1])
    prompts = {tuple(own.encode(text)): other.encode(text) for text in PROMPTS}
    bridge = TextBridge(task, own, other, stop_tokens(task, own), 12, prompts, mesh)
    view = bridge.view(prompt, samples)
    assert view.prompt.tokens.shape[1] % 32 == 0 and len(view.responses) == 2
    for i, text in enumerate(PROMPTS):
        assert view.prompt.tokens[i][view.prompt.mask[i]].tolist() == other.encode(text)
    for i, reply in enumerate(("Sing on, my dear.", "Well.")):
        ids = encode_continuation(other, f" {reply}{MARKER}")[:12]
        assert view.responses[0].tokens[i][view.responses[0].mask[i]].tolist() == ids
    assert [side.tolist() for side in view.accepted] == [[True, True], [False, False]]
    assert all(response.tokens.shape == (2, 12) for response in view.responses)
    short = dataclasses.replace(bridge, longest=3).view(prompt, samples)  # a longer response is cut
    np.testing.assert_array_equal(short.responses[0].tokens, view.responses[0].tokens[:, :3])
    assert np.all(short.responses[0].mask) and np.sum(view.responses[0].mask, 1).min() > 3


def test_tokens_are_shared_only_between_equal_tokenizers_and_end_markers():
    task = sandbox.sandbox_task()
    own, equal, other = (types.SimpleNamespace(token_digest=digest) for digest in ("a", "a", "b"))
    assert shares_tokens(task, own, equal) and not shares_tokens(task, own, other)
    chatty = dataclasses.replace(task, format=task.format._replace(stop=(EOS, MARKER)))
    assert not shares_tokens(chatty, own, equal)
    plain = dataclasses.replace(chatty, format=chatty.format._replace(end=""))
    assert shares_tokens(plain, own, equal)
