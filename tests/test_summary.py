"""Posts and given comparisons: what is read, what is refused by its line, and the pairs that come of it."""

import dataclasses
import gzip
import json
import os
from functools import partial
from pathlib import Path

import pytest

from alignjax.distributed.sharding import Mesh, make_mesh
from alignjax.errors import UserError
from alignjax.labeling.method import Labeler
from alignjax.labeling.rlcd import RLCD
from alignjax.pipeline.config import override
from alignjax.pipeline.description import describe
from alignjax.pipeline.experiment import Context, Experiment
from alignjax.pipeline.stages import LoadPairs
from alignjax.tasks import dialogue, summary
from alignjax.tasks.stories import append_affix
from alignjax.training import data

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
    assert (
        summary.summary_task(path, instruction=summary.TLDR_INSTRUCTION)
        .source.prompts("train", 1, 0)[0]
        .endswith("\n\nTL;DR:")
    )
    with pytest.raises(UserError, match=r"instruction='summarize' does not hold \{post\}"):
        summary.summary_task(path, instruction="summarize")


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
    got = summary.read_tldr_comparison({**PUBLISHED, "choice": 0}, instruction=summary.TLDR_INSTRUCTION)
    assert got == ("T\n\nP\n\nTL;DR:", "a", "b", 1.0)


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
    read = partial(summary.read_tldr_comparison, instruction="a {post}")
    assert override({"p": LoadPairs("", read)}, {"p.read.instruction": "b {post}"})["p"].read.keywords == {
        "instruction": "b {post}"
    }


@needs_data
def test_the_real_human_comparisons_become_pairs(tmp_path):
    stage = LoadPairs(str(DATA / "hh_harmless_base_test.jsonl.gz"), dialogue.read_hh_comparison, held_out=0.1)
    context = Context(Experiment(dialogue.dialogue_task(), {"pairs": stage}), tmp_path, "pairs", make_mesh(Mesh()))
    figures = stage.run(context, ())
    assert (figures["pairs"], figures["skipped"]) == (2303, 9)
    assert 2000 < len(data.read_pairs(tmp_path / "pairs" / "data", "train")) < 2303
