"""Random checkpoints of every family against torch, both ways: we read what it saves, and it opens what we write.

Run by ``make parity``. ``ALIGNJAX_PARITY_SEED`` repeats the draws of a run, whose summary has its seed.
"""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch

from alignjax.checkpoints import huggingface, weights
from alignjax.models.build import build
from alignjax.models.t5 import T5Config, encoder
from alignjax.sampling.process import Sampling, sample
from alignjax.types import Tokens
from tests.parity import referee
from tests.parity.cases import CASES, Case
from tests.parity.conftest import NOTES, SEED
from tests.test_families import TOKENIZER, TOLERANCE, pad_both_sides

LENGTHS, COMPLETION = (11, 2, 7), 10  # tokens; the windows are 4 to 7
EVERY = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
DECODERS = pytest.mark.parametrize("case", [c for c in CASES if not c.encodes], ids=lambda case: case.name)


class Outputs(NamedTuple):
    """What our model computes, each [2 paddings, B, ...]."""

    logits: np.ndarray
    states: np.ndarray
    last_state: np.ndarray
    greedy: np.ndarray
    encoded: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class RandomModel:
    """A random model of transformers, and what both implementations compute from it."""

    model: Any
    prompts: list[list[int]]
    reference: referee.Outputs
    config: Any
    params: Any
    ours: Outputs
    tokens: np.ndarray
    mask: np.ndarray
    completion: np.ndarray


@functools.cache
def random_model(case: Case) -> RandomModel:
    rng = np.random.default_rng([SEED, CASES.index(case)])
    model = referee.draw_model(case, rng)
    vocabulary, length = model.config.vocab_size, max(LENGTHS)
    mask = np.arange(length) < np.array(LENGTHS)[:, None]
    tokens = np.where(mask, rng.integers(2, vocabulary, mask.shape), 0).astype(np.int32)
    completion = rng.integers(2, vocabulary, (len(LENGTHS), COMPLETION)).astype(np.int32)
    prompts = [row[:n].tolist() for row, n in zip(tokens, LENGTHS, strict=True)]
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        config = huggingface.read_config(Path(name))
        params = weights.read_params(Path(name), config)
    ours = compute(config, params, pad_both_sides(tokens, mask), np.concatenate([completion] * 2))
    reference = referee.compute(model, prompts, completion)
    NOTES.append(f"{case.name}: logits within {np.abs(ours.logits - reference.logits).max():.1e}, "
                 f"greedy margins from {reference.margins.min():.1e}")  # fmt: skip
    return RandomModel(model, prompts, reference, config, params, ours, tokens, mask, completion)


def compute(config: Any, params: Any, prompt: Tokens, completion: np.ndarray) -> Outputs:
    """Returns all outputs of one compiled program: compilation takes most of the time."""
    model = build(config)

    @jax.jit
    def everything(params, prompt, completion):
        states = model.completion_states(params, prompt, completion)
        process = model.prefill(params, prompt, referee.NEW_TOKENS)
        keys = jax.random.split(jax.random.key(0), len(prompt.tokens))
        written = sample(process, keys, referee.NEW_TOKENS, (), Sampling(temperature=0.0)).completion.tokens
        encoded = encoder(config)(params, prompt)[0] if isinstance(config, T5Config) else None
        return model.logits(params, states), states, model.last_state(params, prompt), written, encoded

    arrays = everything(params, prompt, Tokens(completion, np.ones_like(completion, bool)))
    return Outputs(*jax.tree.map(lambda x: np.asarray(x).reshape(2, -1, *x.shape[1:]), arrays))


def assert_close(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Within the tolerance, for both paddings of ours."""
    np.testing.assert_allclose(ours, np.broadcast_to(theirs, ours.shape), rtol=0, atol=TOLERANCE)


@EVERY
def test_logits_and_hidden_states(case):
    """Over right- and left-padded rows that are longer than any window."""
    d = random_model(case)
    assert_close(d.ours.logits, d.reference.logits)
    assert_close(d.ours.states, d.reference.states)
    if case.encodes:
        real = np.pad(d.mask, ((0, 0), (1, 0)), constant_values=True)
        assert_close(d.ours.encoded[:, real], d.reference.encoded[real])


@EVERY
def test_greedy_tokens(case):
    """All 64 are equal, or at the first that differs the two best logits are within the tolerance; that is noted."""
    d = random_model(case)
    for ours in d.ours.greedy:
        for row in np.flatnonzero((ours != d.reference.greedy).any(axis=1)):
            first = int(np.argmax(ours[row] != d.reference.greedy[row]))
            margin = d.reference.margins[row, first]
            assert margin < 2 * TOLERANCE, f"row {row}: token {first} differs, though it leads by {margin}"
            NOTES.append(f"{case.name}: row {row} ties at token {first}, margin {margin:.1e}")


@EVERY
@pytest.mark.parametrize("shard", [huggingface.MAX_SHARD_BYTES, 20_000], ids=["whole", "shards"])
def test_an_exported_folder_opens_in_both(tmp_path, case, shard):
    d, folder = random_model(case), tmp_path / "model"
    huggingface.write_folder(folder, d.config, d.params, TOKENIZER, shard)
    opened, mismatches = referee.load_model("AutoModelForSeq2SeqLM" if case.encodes else "AutoModelForCausalLM", folder)
    assert not mismatches and type(opened).__name__ == case.model
    theirs = d.model.state_dict()
    assert theirs.keys() == opened.state_dict().keys()
    assert all(torch.equal(value, theirs[name]) for name, value in opened.state_dict().items())
    assert huggingface.read_config(folder) == d.config
    jax.tree.map(np.testing.assert_array_equal, weights.read_params(folder, d.config), d.params)
    if shard == huggingface.MAX_SHARD_BYTES:
        reference = referee.compute(opened, d.prompts, d.completion)
        assert_close(d.ours.logits, reference.logits)
        np.testing.assert_array_equal(reference.greedy, d.reference.greedy)
        assert opened.generation_config.eos_token_id == list(TOKENIZER.end_tokens)


@DECODERS
def test_a_reward_head_scores_the_same_in_both(tmp_path, case):
    """On a padded batch, as sequence classification with one label."""
    d, folder = random_model(case), tmp_path / "model"
    kernel = np.random.default_rng(SEED).standard_normal(d.config.width).astype(np.float32)
    huggingface.write_folder(folder, d.config, d.params | {"reward": {"kernel": kernel}}, TOKENIZER, 20_000)
    opened, mismatches = referee.load_model("AutoModelForSequenceClassification", folder)
    assert not mismatches and opened.config.architectures == [type(opened).__name__]
    with torch.no_grad():
        scores = opened(input_ids=torch.tensor(d.tokens), attention_mask=torch.tensor(d.mask).long()).logits
    assert_close(d.ours.last_state @ kernel, scores[:, 0].numpy())
    opened.save_pretrained(tmp_path / "again")
    again = tmp_path / "again"
    config = dataclasses.replace(huggingface.read_config(again), tied=True)
    np.testing.assert_array_equal(weights.read_reward_head(again, config.width)["reward"]["kernel"], kernel)
    back = weights.read_params(again, config)
    jax.tree.map(np.testing.assert_array_equal, back, {n: part for n, part in d.params.items() if n != "head"})
