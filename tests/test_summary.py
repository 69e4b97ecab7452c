"""Posts and given comparisons: what is read, what is refused by its line, and the pairs that come of it."""

import dataclasses
import gzip
import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from alignjax.distributed.sharding import Mesh, make_mesh
from alignjax.errors import UserError
from alignjax.labeling.method import Labeler
from alignjax.labeling.rlcd import RLCD
from alignjax.pipeline.config import override
from alignjax.pipeline.description import describe
from alignjax.pipeline.experiment import Context, Experiment
from alignjax.pipeline.stages import LoadPairs
from alignjax.pipeline.stages.pair_batches import PairLimits, encode_pairs
from alignjax.pipeline.stages.writing import shorten_prompts
from alignjax.tasks import dialogue, summary
from alignjax.tasks.stories import append_affix
from alignjax.tasks.task import as_question, rater_text, reply_text
from alignjax.training import data
from tests.test_wiring import tokenizer

DATA = Path(os.environ.get("ALIGNJAX_TEST_DATA", ""))
needs_data = pytest.mark.skipif("ALIGNJAX_TEST_DATA" not in os.environ, reason="ALIGNJAX_TEST_DATA names no folder")
GOOD = {"prompt": "x", "first": "a", "second": "b", "p": 1}


def write_rows(path, rows):
    """Writes JSON lines, compressed where the name ends in .gz; returns the path."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


def given(tmp_path, **fields):
    stage = LoadPairs(**fields)
    return Context(Experiment(summary.summary_task(), {"pairs": stage}), tmp_path, "pairs", make_mesh(Mesh())), stage


def test_a_post_is_asked_for_its_summary_with_its_title(tmp_path):
    path = write_rows(tmp_path / "a.jsonl.gz", [
        {"post": "I ran.", "summary": "Ran."}, {"text": " I fell.\n", "title": "Help", "summary": "Fell."},
    ])  # fmt: skip
    prompts = summary.summary_task(path).source.prompts("train", 9, 0)
    assert sorted(prompts) == ["summarize: Help\n\nI fell.", "summarize: I ran."]
    assert sorted(summary.summary_task(path, query=summary.PLAIN_QUERY).source.prompts("train", 9, 0)) == [
        "Help\n\nI fell.\n\nTL;DR:", "I ran.\n\nTL;DR:",
    ]  # fmt: skip


@pytest.mark.parametrize(("query", "words"), [
    ("summarize", r"query='summarize' does not hold \{post\} or \{text\}, where the post goes, once; put one in"),
    ("{text} {post}", "does not hold .* once"), ("{post}{post}", "does not hold .* once"),
    ("{title}", "does not hold"), ("{body} {post}", r"holds \{body\}; a post has subreddit, title, post, text"),
])  # fmt: skip
def test_a_query_without_one_place_for_the_post_is_refused(query, words):
    with pytest.raises(UserError, match=words):
        summary.summary_task(query=query)


RELEASED = {"id": "t3_1", "subreddit": "running", "title": "Knees ", "post": "I ran.\nIt hurt.", "summary": " Ouch."}
ASKED = "SUBREDDIT: r/running\n\nTITLE: Knees\n\nPOST: I ran.\nIt hurt.\n\nTL;DR:"


def test_released_posts_and_trl_s_rows_are_one_query_and_one_summary(tmp_path):
    """The summary as it is read, behind the format's ``before``, is the released text again."""
    trl = {"prompt": ASKED, "completion": " Ouch."}
    for query in (summary.TLDR_QUERY, summary.T5_QUERY, summary.PLAIN_QUERY, summary.CHAT_QUERY):
        read = partial(summary.read_tldr_demonstration, query=query)
        assert read(RELEASED) == read(trl)
        for row in (RELEASED, trl):
            path = write_rows(tmp_path / "a.jsonl", [row])
            assert summary.summary_task(path, query=query).source.prompts("train", 9, 0) == [read(row).prompt]
    task = summary.summary_task(query=summary.TLDR_QUERY)
    found = summary.read_tldr_demonstration(RELEASED, summary.TLDR_QUERY)
    assert found.prompt == ASKED and found.reply == "Ouch." and reply_text(task.format, found.reply) == " Ouch."
    compared = {**PUBLISHED, "info": RELEASED}
    assert summary.read_tldr_comparison(compared, summary.TLDR_QUERY) == (ASKED, "a", "b", 0.0)


def test_what_looks_like_a_field_in_a_post_is_text():
    post = {**RELEASED, "title": "{post}", "post": "a {title} {subreddit} \\1"}
    found = summary.read_tldr_demonstration(post, summary.TLDR_QUERY).prompt
    assert found == "SUBREDDIT: r/running\n\nTITLE: {post}\n\nPOST: a {title} {subreddit} \\1\n\nTL;DR:"


def test_one_post_in_two_subreddits_is_in_one_split_alone(tmp_path):
    other = {**RELEASED, "subreddit": "health"}
    paths = [
        write_rows(tmp_path / f"{i}.jsonl", rows)
        for i, rows in enumerate(([other, {**other, "post": "x"}], [RELEASED]))
    ]
    source = summary.summary_task(paths[0], test=paths[1], query=summary.TLDR_QUERY).source
    (prompt,) = source.prompts("train", 9, 0)
    assert "POST: x\n" in prompt and source.prompts("test", 9, 0) == [ASKED]


@pytest.mark.parametrize(("row", "words"), [
    ({**RELEASED, "subreddit": None}, "has no 'subreddit', which the query shows"),
    ({"post": "x", "subreddit": "y"}, "has no 'title', which the query shows"),
    ({**RELEASED, "subreddit": ["a"]}, "has a 'subreddit' that is no text"),
    ({**RELEASED, "title": False}, "has a 'title' that is no text"),
    ({"prompt": "I ran.\n\nTL;DR:", "completion": " x"}, "has a 'prompt' in another form than SUBREDDIT: r/..."),
    ({"prompt": ASKED.replace("I ran.\nIt hurt.", " "), "completion": " x"}, "has a 'prompt' in another form"),
    ({"prompt": 3, "completion": " x"}, "has 'prompt' without a text"),
])  # fmt: skip
def test_a_post_that_lacks_what_the_query_shows_is_named_by_its_number(tmp_path, row, words):
    path = write_rows(tmp_path / "a.jsonl", [RELEASED, row])
    with pytest.raises(UserError) as error:
        summary.summary_task(path, query=summary.TLDR_QUERY).source.prompts("train", 1, 0)
    assert str(error.value).startswith(f"{path}, line 2 {words}") and str(error.value).endswith("; correct it")


QUERIES = (summary.TLDR_QUERY, summary.T5_QUERY, summary.PLAIN_QUERY, summary.CHAT_QUERY)
PIECES = ["red", "blue,", "七つの", "😀", "naïve", "e\u0301", "a" * 9]
GAPS = [" "] * 6 + ["\n", "\n\n", "\u3000", "  ", " \n\t "]


def random_post(rng):
    """A post of up to 14 pieces of several scripts, with spaces and newlines of several kinds between them."""
    count = rng.integers(1, 15)
    pieces = [str(rng.choice(PIECES)) + str(rng.choice(GAPS)) for _ in range(count)]
    return summary.Post("sub", "A title", "".join(pieces).strip())


def longest_prefix(post, fits):
    """The referee: tries every prefix that ends before a newline, then every one that ends before white space."""
    ends = [i for i in range(1, len(post)) if post[i].isspace() and not post[i - 1].isspace()]
    before_newline = [i for i in ends if "\n" in post[i : i + len(post[i:]) - len(post[i:].lstrip())]]
    for places in (before_newline, ends):
        if fitting := [post[:i] for i in places if fits(post[:i])]:
            return max(fitting, key=len)
    return None


@pytest.mark.parametrize("query", QUERIES)
@pytest.mark.parametrize("size", [len, lambda text: len(tokenizer().encode(text))], ids=["characters", "tokens"])
def test_a_query_is_cut_at_the_last_newline_that_fits_or_else_between_words(query, size):
    rng = np.random.default_rng(0)
    task, outcomes = summary.summary_task(query=query), set()
    for _ in range(60):
        post = random_post(rng)
        whole = summary.fill_query(query, post)
        limit = int(rng.integers(size(summary.fill_query(query, post._replace(post=""))), size(whole) + 2))
        fits = lambda text, limit=limit: size(text) <= limit  # noqa: E731
        found = task.fit(whole, fits)
        kept = longest_prefix(
            post.post, lambda part, p=post, f=fits: f(summary.fill_query(query, p._replace(post=part)))
        )
        outcomes.add("whole" if fits(whole) else "none" if kept is None else "cut")
        if fits(whole) or kept is None:
            assert found == whole
            continue
        assert found == summary.fill_query(query, post._replace(post=kept)) and size(found) <= limit
        assert task.fit(found, fits) == found and found.endswith(query.rpartition("}")[2])
    assert outcomes == {"whole", "none", "cut"}


def test_a_title_is_kept_and_a_post_without_one_is_cut_anywhere():
    shorten = partial(summary.shorten_query, summary.T5_QUERY)
    titled = "summarize: A title\n\none two three"
    assert shorten(titled, lambda text: len(text) <= 30) == "summarize: A title\n\none two"
    assert shorten(titled, lambda text: len(text) <= 21) is None
    untitled = "summarize: one two three"
    assert shorten(untitled, lambda text: len(text) <= 20) == "summarize: one two"
    long = "summarize: " + "word " * 100 + "end\n\nrest"  # no title has 500 characters
    assert shorten(long, lambda text: len(text) <= 100) == "summarize: " + "word " * 17 + "word"
    assert shorten("another form", lambda text: False) is None


class Words:
    """A tokenizer of words."""

    encode = encode_bare = staticmethod(lambda text: text.split())


def test_every_stage_sees_the_same_shorter_text_and_no_summary_is_cut():
    task = summary.summary_task()
    prompts = ["summarize: " + words for words in ("one two", "one two three\nfour five six", "x")]
    assert shorten_prompts(task, Words, prompts, 5) == (
        [prompts[0], "summarize: one two three", prompts[2]], {"shortened": 1},
    )  # fmt: skip
    assert shorten_prompts(dataclasses.replace(task, shorten=None), Words, prompts, 5) == (prompts, {})
    rows = [{"prompt": prompts[i], "first": "a b", "second": "c " * n, "p": 1.0} for i, n in ((1, 2), (0, 9), (1, 9))]
    found = encode_pairs(rows, Words, task, PairLimits((3, 5), 4))
    assert found.rows == [{**rows[0], "prompt": "summarize: one two three"}]
    assert found.figures == {"too_long": 2, "shortened": 1 + 1}
    assert found.encoded[0][0] == ["summarize:", "one", "two", "three"]


def test_splits_share_no_post_and_are_shuffled_by_the_seed(tmp_path):
    paths = [
        write_rows(tmp_path / f"{name}.jsonl", [{"post": f"{i}"} for i in numbers])
        for name, numbers in {"train": range(60), "validation": range(40, 50), "test": range(45, 55)}.items()
    ]
    source = summary.summary_task(*paths).source
    sizes = {split: len(set(source.prompts(split, 99, 1))) for split in ("train", "validation", "test")}
    assert sizes == {"train": 45, "validation": 5, "test": 10}
    assert source.prompts("train", 5, 1) == source.prompts("train", 99, 1)[:5] != source.prompts("train", 5, 2)
    assert len(summary.summary_task(paths[0]).source.prompts("train", 99, 1)) == 60
    with pytest.raises(UserError, match="no post that is not held out"):
        summary.summary_task(paths[2], test=paths[2]).source.prompts("train", 1, 0)


def test_without_files_there_is_a_task_and_the_posts_alone_are_refused():
    source = summary.summary_task().source
    with pytest.raises(UserError, match="no file of posts is named"):
        source.prompts("test", 1, 0)
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read"):
        summary.summary_task("nowhere.jsonl").source.prompts("train", 1, 0)
    with pytest.raises(UserError, match="no split 'dev'; they have train, validation, test"):
        source.prompts("dev", 1, 0)
    assert summary.summary_task().corpus is None


def test_a_task_without_affixes_refuses_contrast_before_it_runs():
    with pytest.raises(UserError, match="'summary' has no affixes to contrast"):
        RLCD().check(summary.summary_task())
    contrasted = dataclasses.replace(summary.summary_task(), affixes=((" Well:", " Badly:"),), contrast=append_affix)
    RLCD().check(contrasted)
    assert RLCD().label(Labeler(lambda *_: [], contrasted, None, 0), [], []) == ([], 0)
    with pytest.raises(UserError, match="'summary' has affixes and no contrast"):
        dataclasses.replace(summary.summary_task(), affixes=((" Well:", " Badly:"),))


@pytest.mark.parametrize(("row", "words"), [
    ({}, "has no 'post'"), ({"post": ""}, "has 'post' without a text"), ({"text": 3}, "has 'text' without a text"),
    ([1], "is no JSON object"),
])  # fmt: skip
def test_a_line_that_is_no_post_is_named_by_its_number(tmp_path, row, words):
    path = write_rows(tmp_path / "a.jsonl", [{"post": "x"}, row])
    with pytest.raises(UserError) as error:
        summary.summary_task(path).source.prompts("train", 1, 0)
    assert str(error.value) == f"{path}, line 2 {words}; correct it"


PUBLISHED = {"info": {"title": "T", "post": "P"}, "summaries": [{"text": " a"}, {"text": "b\n"}], "choice": 1}


def test_a_published_comparison_is_asked_as_the_task_asks():
    assert summary.read_tldr_comparison(PUBLISHED) == ("summarize: T\n\nP", "a", "b", 0.0)
    got = summary.read_tldr_comparison({**PUBLISHED, "choice": 0}, query=summary.PLAIN_QUERY)
    assert got == ("T\n\nP\n\nTL;DR:", "a", "b", 1.0)


ARTICLE = {**PUBLISHED, "info": {"id": "x", "site": "cnn", "title": "T", "article": "News.", "post": None}}


def judged(split="valid2", **extra):
    return {**PUBLISHED, "split": split, "extra": extra}


def test_comparisons_are_kept_by_confidence_and_split_and_the_others_are_counted(tmp_path):
    rows = [judged(confidence=i) for i in range(1, 10)] + [
        judged("valid1", confidence=9),
        judged("train"),
        judged(),
        ARTICLE,
    ]
    rows.append({**PUBLISHED, "split": "valid2", "extra": None})
    cases = [((), (), 13), ((8, 9), (), 3), (summary.HIGH_CONFIDENCE, ("valid2",), 4), ((), ("valid2",), 11),
             ((), ("valid1", "train"), 2), ((5,), ("valid1", "valid2"), 1)]  # fmt: skip
    for number, (confidence, splits, kept) in enumerate(cases):
        read = partial(summary.read_tldr_comparison, confidence=confidence, splits=splits)
        wanted = [{**row, "choice": i % 2} for i, row in enumerate(rows)]
        context, stage = given(tmp_path / str(number), path=write_rows(tmp_path / "a.jsonl", wanted), read=read)
        stage.check(context)
        assert stage.run(context, ()) == {"pairs": kept, "skipped": 14 - kept, "different_prompts": 1}
    read = partial(summary.read_tldr_comparison, confidence=(5,), splits=("valid1",))
    context, stage = given(tmp_path, path=write_rows(tmp_path / "a.jsonl", rows), read=read)
    with pytest.raises(UserError, match="compares two replies to one prompt, or all are left out by its read; give"):
        stage.check(context)


@pytest.mark.parametrize(("row", "words"), [
    ({**PUBLISHED, "extra": {"confidence": 9}}, "has no 'split'"),
    (judged(confidence="9"), "has 'confidence' '9', which"),
    (judged(confidence=True), "has 'confidence' True"), (judged(confidence=8.5), "has 'confidence' 8.5"),
    (judged(confidence=0), "has 'confidence' 0, which is no whole number from 1 to 9"),
    (judged(confidence=10), "has 'confidence' 10"), ({**judged(), "extra": 9.5}, "has 'confidence' 9.5"),
    ({**judged(confidence=3), "choice": 2}, "has 'summaries' without a text, or a 'choice'"),
    ({**judged(confidence=3), "info": {"title": "T"}}, "has no 'post'"),
])  # fmt: skip
def test_a_filter_hides_no_malformed_line(tmp_path, row, words):
    read = partial(summary.read_tldr_comparison, confidence=summary.HIGH_CONFIDENCE, splits=("valid2",))
    context, stage = given(tmp_path, path=write_rows(tmp_path / "a.jsonl", [judged(confidence=9), row]), read=read)
    with pytest.raises(UserError) as error:
        stage.check(context)
    assert f"a.jsonl, line 2 {words}" in str(error.value) and str(error.value).endswith("; correct it")


def test_filters_can_be_set_from_outside():
    read = partial(summary.read_tldr_comparison, confidence=summary.HIGH_CONFIDENCE, splits=("valid2",))
    for text, want in (("()", ()), ("(9,)", (9,))):
        found = override({"p": LoadPairs("", read)}, {"p.read.confidence": text})["p"].read
        assert found.keywords == {"confidence": want, "splits": ("valid2",)}


@pytest.mark.parametrize("question", [
    summary.RATER_QUESTION, as_question(summary.summary_task().template, summary.summary_task().format),
])  # fmt: skip
def test_a_rater_reads_text_summaries_and_question_in_the_paper_s_order(question):
    """The fields of 2312.00886: text, summary 1, summary 2, preferred summary, whose value is the next token."""
    text = rater_text(question, summary.summary_task().format, ASKED, "FIRST", "SECOND")
    order = [ASKED, "\nSummary 1: FIRST\n", "\nSummary 2: SECOND\n", "\nPreferred Summary:"]
    assert [text.count(part) for part in order] == [1] * 4
    places = [text.index(part) for part in order]
    assert places == sorted(places) and text.rstrip().endswith("\nPreferred Summary:")
    assert {question.answer.strip(), question.other.strip()} == {"1", "2"} and question.answer.strip() == "1"
    assert (text + question.answer).endswith("\nPreferred Summary: 1")
    assert question.preamble in ("", summary.RATER_QUESTION.preamble) and text.startswith(question.preamble)


@pytest.mark.parametrize("change", [
    {"choice": 2}, {"choice": None}, {"summaries": [{"text": "a"}]}, {"summaries": [{"text": "a"}, 3]}, {"info": "P"},
    {"summaries": [{"text": "a"}, {}]}, {"summaries": [{"text": "a"}, {"text": ""}]}, {"info": {"title": "T"}},
])  # fmt: skip
def test_a_comparison_of_another_form_is_named_by_its_number(tmp_path, change):
    path = write_rows(tmp_path / "a.jsonl", [PUBLISHED, {**PUBLISHED, **change}])
    context, stage = given(tmp_path, path=path, read=summary.read_tldr_comparison)
    with pytest.raises(UserError) as error:
        stage.check(context)
    assert str(error.value).startswith(f"pairs: {path}, line 2 has ") and str(error.value).endswith("; correct it")


def test_given_pairs_are_the_dataset_that_a_labelling_stage_writes(tmp_path):
    rows = [{"prompt": f"x{i // 2}", "first": f"a{i}", "second": "b", "p": i / 10} for i in range(10)]
    context, stage = given(tmp_path, path=write_rows(tmp_path / "a.jsonl", rows), held_out=0.4)
    stage.check(context)
    assert stage.run(context, ()) == {"pairs": 10, "skipped": 0, "different_prompts": 5}
    train, held_out = (data.read_pairs(tmp_path / "pairs" / "data", split) for split in ("train", "held_out"))
    pairs = sorted([*train, *held_out], key=lambda row: row["first"])
    assert [{**row, "p": pytest.approx(row["p"]), "affix": -1, "positive": -1} for row in rows] == pairs
    assert {row["prompt"] for row in held_out} == {"x3", "x4"} and len(train) == 6  # no prompt on both sides


@pytest.mark.parametrize(("row", "words"), [
    ({"p": 1.5}, "has 'p' 1.5, which is no number from 0 to 1"), ({"p": -1}, "has 'p' -1"),
    ({"p": True}, "has 'p' True"), ({"p": "1"}, "has 'p' '1'"), ({"p": float("nan")}, "has 'p' nan"),
    ({"p": None}, "has 'p' None"), ({"first": ""}, "has 'first' without a text"),
    ({"prompt": 1}, "has 'prompt' without a text"),
])  # fmt: skip
def test_a_pair_of_another_form_is_named_by_its_number_before_anything_runs(tmp_path, row, words):
    path = write_rows(tmp_path / "a.jsonl", [GOOD, GOOD, {**GOOD, **row}])
    context, stage = given(tmp_path, path=path)
    with pytest.raises(UserError) as error:
        stage.check(context)
    assert f"pairs: {path}, line 3 {words}" in str(error.value)


def test_a_file_that_is_missing_empty_or_lacks_a_field_is_named(tmp_path):
    cases = {"": "no file of comparisons is named", "nowhere.jsonl": r"nowhere\.jsonl cannot be read"}
    cases[write_rows(tmp_path / "empty.jsonl", [])] = r"empty\.jsonl holds no comparisons; give"
    cases[write_rows(tmp_path / "less.jsonl", [{"prompt": "x"}])] = "line 1 has no 'p'"
    for path, words in cases.items():
        context, stage = given(tmp_path, path=path)
        with pytest.raises(UserError, match=words):
            stage.check(context)
    unrelated = write_rows(tmp_path / "apart.jsonl", [{"chosen": "H\n\nAssistant: a", "rejected": "J\n\nAssistant: b"}])
    context, stage = given(tmp_path, path=unrelated, read=dialogue.read_hh_comparison)
    with pytest.raises(UserError, match=r"no line of .*apart\.jsonl compares two replies"):
        stage.check(context)


def test_a_changed_file_is_another_stage_and_can_be_named_from_outside(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [GOOD])
    first = LoadPairs(path)
    write_rows(tmp_path / "a.jsonl", [{**GOOD, "p": 0}])
    assert describe(LoadPairs(path)) != describe(first) and LoadPairs("").digest == ""
    assert override({"pairs": LoadPairs("")}, {"pairs.path": path})["pairs"] == LoadPairs(path)
    read = partial(summary.read_tldr_comparison, query="a {post}")
    assert override({"p": LoadPairs("", read)}, {"p.read.query": "b {post}"})["p"].read.keywords == {
        "query": "b {post}"
    }


@needs_data
def test_the_real_human_comparisons_become_pairs(tmp_path):
    stage = LoadPairs(str(DATA / "hh_harmless_base_test.jsonl.gz"), dialogue.read_hh_comparison, held_out=0.1)
    context = Context(Experiment(dialogue.dialogue_task(), {"pairs": stage}), tmp_path, "pairs", make_mesh(Mesh()))
    figures = stage.run(context, ())
    assert (figures["pairs"], figures["skipped"]) == (2303, 9)
    assert 2000 < len(data.read_pairs(tmp_path / "pairs" / "data", "train")) < 2303
