"""The stories task, and the real checkpoint it runs on where its folder is at hand (ALIGNJAX_TEST_DATA)."""

import json
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from alignjax.checkpoints import huggingface, weights
from alignjax.errors import UserError
from alignjax.models.decoder import decoder
from alignjax.models.log_probs import log_prob
from alignjax.models.tokenizer import decode_continuation, encode_continuation, pad
from alignjax.sampling.process import Sampling, sample
from alignjax.tasks import stories
from alignjax.tasks.task import oracle_from_score
from tests.conftest import ragged

DATA = Path(os.environ.get("ALIGNJAX_TEST_DATA", ""))
needs_data = pytest.mark.skipif("ALIGNJAX_TEST_DATA" not in os.environ, reason="ALIGNJAX_TEST_DATA names no folder")


@pytest.fixture(scope="module")
def checkpoint():
    folder = DATA / "models" / "stories260K"
    config = huggingface.read_config(folder)
    golden = json.loads((folder / "golden.json").read_text())
    return decoder(config), weights.read_params(folder, config), huggingface.read_tokenizer(folder), golden


@needs_data
def test_greedy_decoding_equals_the_golden_file(checkpoint):
    model, params, tokenizer, golden = checkpoint
    count = len(golden["items"][0]["greedy_ids"])
    ids = [tokenizer.encode(item["prompt"]) for item in golden["items"]]
    assert ids == [item["prompt_ids"] for item in golden["items"]]
    longest = max(map(len, ids))

    @jax.jit
    def run(prompt):
        keys = jax.random.split(jax.random.key(0), len(ids))
        return sample(model.prefill(params, prompt, count), keys, count, (), Sampling(temperature=0.0))

    for side in ("left", "right"):
        greedy = run(pad(ids, longest, side))
        assert greedy.completion.tokens.tolist() == [item["greedy_ids"] for item in golden["items"]]
        sums = [item["greedy_sum_logprob"] for item in golden["items"]]
        np.testing.assert_allclose(greedy.logp.sum(-1), sums, atol=2e-2)


@needs_data
def test_logits_and_log_probs_equal_the_golden_file(checkpoint):
    model, params, tokenizer, golden = checkpoint
    prompt = ragged([tokenizer.encode("Once upon a time")])
    logits = model.logits(params, model.last_state(params, prompt))[0]
    assert np.argsort(logits)[-1] == np.argmax(golden["logits"]["values"])
    np.testing.assert_allclose(logits, golden["logits"]["values"], atol=1e-3)


@needs_data
def test_pieces_and_cases_of_the_real_tokenizer(checkpoint):
    tokenizer, golden = checkpoint[2:]
    for case in golden["tokenizer_cases"]:
        assert tokenizer.encode(case["text"]) == case["ids"]
    text = " Lily was happy.\nShe ran."
    ids = encode_continuation(tokenizer, text)
    assert tokenizer.encode("Once.") + ids == tokenizer.encode("Once." + text)
    assert decode_continuation(tokenizer, ids) == text


@needs_data
def test_real_openings_are_split_by_story():
    splits = stories.read_openings(str(DATA / "story_premises.jsonl"))
    rows = [json.loads(line) for line in (DATA / "story_premises.jsonl").read_text().splitlines()]
    story = {row["prompt"]: row["story"] for row in rows}
    homes = {split: {story[text] for text in texts} for split, texts in splits.items()}
    assert not homes["train"] & homes["test"] and not homes["train"] & homes["validation"]
    assert sum(map(len, splits.values())) == len(rows) and len(splits["test"]) > 500


@needs_data
def test_log_prob_of_a_text_equals_the_golden_one(checkpoint):
    model, params, _, golden = checkpoint
    token_log_probs = golden["token_logprobs"]
    ids, want = token_log_probs["ids"], token_log_probs["logprobs_of_ids_1_on"]
    got = log_prob(model)(params, ragged([ids[:1]]), ragged([ids[1:]]))[0]
    np.testing.assert_allclose(got, want, atol=1e-3)


def write_openings(tmp_path, rows):
    path = tmp_path / "openings.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_openings_are_distinct_shuffled_by_the_seed_and_never_shared_between_splits(tmp_path):
    path = write_openings(tmp_path, [{"prompt": f"Story {i // 2} {i}", "story": i // 2} for i in range(200)])
    task = stories.stories_task(path)
    train, test = task.source.prompts("train", 1000, 0), task.source.prompts("test", 1000, 0)
    assert not {t.split()[1] for t in train} & {t.split()[1] for t in test}
    assert len(set(train)) == len(train) == 140 and len(test) == 40
    assert task.source.prompts("train", 10, 0) == train[:10] != task.source.prompts("train", 10, 1)


def test_a_changed_file_is_another_experiment(tmp_path):
    from alignjax.pipeline.description import describe

    path = write_openings(tmp_path, [{"prompt": "One.", "story": 3}])
    first = describe(stories.stories_task(path))
    write_openings(tmp_path, [{"prompt": "Two.", "story": 3}])
    assert describe(stories.stories_task(path)) != first


def test_the_pronoun_oracle_counts_whole_words():
    assert stories.girl_score("", " She took her hat. The other boy hid his.") == 2 - 2
    assert stories.girl_score("", " Her girl, the sheriff's sheep, there.") == 2
    oracle = oracle_from_score(stories.girl_score)
    assert (oracle("", "she", "he"), oracle("", "he", "she"), oracle("", "he", "his")) == (1.0, 0.0, 0.5)


def test_the_sentiment_oracle_knows_happy_from_sad():
    assert (
        stories.happy_score("", " They were happy and loved the fun.")
        > 0
        > stories.happy_score("", " They cried, sad and hurt.")
    )


def test_stories_end_at_their_marker_and_affixes_stand_behind_the_opening():
    assert stories.clean_story(" He ran.<s>Once") == " He ran."
    assert stories.clean_story("<s>") is None and stories.clean_story("  ") is None
    assert stories.append_affix("A day.", " x", " y") == "A day. x"


def test_an_unknown_principle_is_named(tmp_path):
    with pytest.raises(UserError, match="girl, happy"):
        stories.stories_task(write_openings(tmp_path, [{"prompt": "One.", "story": 3}]), "brave")


@pytest.mark.parametrize(("row", "words"), [
    ({"prompt": "One."}, "has no 'story'"), ({"prompt": " ", "story": 3}, "has 'prompt' without a text"),
    ({"prompt": "One.", "story": "x"}, "has 'story' 'x', which is no whole number"),
    ({"prompt": "One.", "story": None}, "has 'story' None, which is no whole number"),
])  # fmt: skip
def test_a_line_that_is_no_opening_is_named_by_its_number(tmp_path, row, words):
    path = write_openings(tmp_path, [{"prompt": "One.\u2028Two.", "story": 3}, row])
    with pytest.raises(UserError) as error:
        stories.stories_task(path)
    assert str(error.value) == f"{path}, line 2 {words}; correct it"


def test_the_corpus_leaves_out_stories_that_begin_as_held_out_openings_do(tmp_path):
    path = write_openings(tmp_path, [{"prompt": "Red", "story": 0}, {"prompt": "Blue", "story": 3}])
    documents = tmp_path / "documents.txt"
    documents.write_text("Red ran.<|endoftext|>Blue ran.<|endoftext|>Green ran.<|endoftext|>cut o")
    task = stories.stories_task(path, documents=str(documents))
    assert sorted(task.corpus(9, 0)) == ["Blue ran.", "Green ran."]
    with pytest.raises(UserError, match="stories have no corpus"):
        stories.stories_task(path).corpus(1, 0)
