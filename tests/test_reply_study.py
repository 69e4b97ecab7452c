"""Policies answer the same prompts, and a function reads the replies: whose replies it is given, and to what."""

import dataclasses

import pytest

import alignjax as aj
from alignjax.distributed import sharding, storage
from alignjax.errors import UserError
from alignjax.pipeline.experiment import Context
from alignjax.pipeline.run import run
from tests.test_wiring import WRITING, Random, Sentences, experiment

SEEN = []


def note(prompts, replies):
    SEEN.append((list(prompts), {name: list(texts) for name, texts in replies.items()}))
    return aj.Finding("## Seen\n", {}, {name: len(texts) for name, texts in replies.items()})


def study(**policies):
    return aj.ReplyStudy(policies=policies, function=note, prompts=10, writing=WRITING)


@pytest.fixture(scope="module")
def line(tmp_path_factory):
    folder = tmp_path_factory.mktemp("replies")
    whole = experiment(
        third=Random(2),
        first=study(a="base", b="other"),
        exchanged=study(a="other", b="base"),
        more=study(c="third", b="other", d="other"),
    )
    SEEN.clear()
    run(whole, folder, only=["base", "other", "third", "first", "exchanged", "more"])
    return whole, folder, list(SEEN)


def test_each_policy_answers_in_its_own_words_whoever_stands_beside_it(line):
    _, _, (first, exchanged, more) = line
    assert first[0] == exchanged[0] == more[0] and len(first[0]) == 10
    assert more[1]["b"] == first[1]["b"]  # its name and its network alone decide
    assert first[1]["a"] != exchanged[1]["a"] and first[1]["b"] != exchanged[1]["b"]
    assert more[1]["b"] != more[1]["d"]  # one network draws with a key for each name
    assert list(first[1]) == ["a", "b"] and list(more[1]) == ["c", "b", "d"]


def test_the_prompts_are_of_the_split_and_the_finding_is_written(line):
    whole, folder, _ = line
    Sentences.asked.clear()
    run(whole, folder, only=["first"], redo=True)
    assert set(Sentences.asked) <= {"test"}
    assert storage.read_json(folder / "first" / "numbers.json") == {"a": 10, "b": 10}
    assert "## Seen" in (folder / "first" / "section.md").read_text()


def test_a_resumed_study_reads_what_was_written(line, tmp_path):
    whole, folder, seen = line
    fresh = tmp_path / "again"
    fresh.mkdir()
    for name in ("base", "other"):
        (fresh / name).symlink_to(folder / name)
    context = Context(whole, fresh, "first", sharding.make_mesh(whole.mesh))
    context.folder.mkdir()
    storage.write_json(context.folder / "replies-a.json", ["kept"] * 10)
    stage = whole.stages["first"]
    SEEN.clear()
    stage.run(context, stage.programs(context))
    assert SEEN[0][1] == {"a": ["kept"] * 10, "b": seen[0][1]["b"]}


def test_networks_of_one_kind_share_a_program(line):
    whole, folder, _ = line
    context = Context(whole, folder, "more", sharding.make_mesh(whole.mesh))
    assert [program.name for program in whole.stages["more"].programs(context)] == ["write c 16"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"policies": {}}, "name one"),
        ({"policies": {"a/b": "base"}}, "'a/b' cannot name a policy"),
        ({"prompts": 0}, "prompts"),
    ],
)
def test_a_study_that_cannot_be_is_refused(change, words):
    with pytest.raises(UserError, match=words):
        dataclasses.replace(study(a="base"), **change)
