"""Outlines: premises of a grammar and of a file, prefixes that contrast, the filter, what is counted, the raters."""

import itertools
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest

from alignjax.errors import UserError
from alignjax.labeling.method import Labeler
from alignjax.labeling.rlcd import RLCD
from alignjax.pipeline.description import describe
from alignjax.sampling.generate import Reply
from alignjax.tasks import outline, premise_grammar
from alignjax.tasks.outline import PremiseFile, Premises, outline_task
from alignjax.tasks.task import SPLITS, is_in_split, rater_text, reply_text

DATA = Path(os.environ.get("ALIGNJAX_TEST_DATA", ""))
needs_data = pytest.mark.skipif("ALIGNJAX_TEST_DATA" not in os.environ, reason="ALIGNJAX_TEST_DATA names no folder")
PREFIX = outline.OUTLINE_PREFIX
PREMISE = "A shy baker finds a map of places that do not exist."
PROMPT = outline.outline_prompt(PREMISE, PREFIX)


def write_premises(path, premises):
    """Writes premises as the file's name says; returns the path as text."""
    lines = premises if path.suffix == ".txt" else [json.dumps({"premise": premise}) for premise in premises]
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_the_grammar_gives_thousands_of_distinct_premises_in_disjoint_splits():
    found = {split: Premises().premises(split, 2000, seed=3) for split in SPLITS}
    assert [len(set(premises)) for premises in found.values()] == [2000] * 3
    for a, b in itertools.combinations(SPLITS, 2):
        assert not {p.casefold() for p in found[a]} & {p.casefold() for p in found[b]}
        assert all(is_in_split(premise.casefold(), split) for split in (a, b) for premise in found[split])
    words = [len(premise.split()) for premises in found.values() for premise in premises]
    assert min(words) >= 10 and max(words) <= 40
    assert all(re.fullmatch(r"An? [^\n]+\.", premise) for premises in found.values() for premise in premises)


def test_no_premise_of_the_grammar_is_shorter_or_longer_than_said():
    parts = [premise_grammar.TRAITS, premise_grammar.ROLES, premise_grammar.PLACES, premise_grammar.EVENTS,
             premise_grammar.OBSTACLES, premise_grammar.ENDINGS]  # fmt: skip
    lengths = [[len(text.split()) for text in part] for part in parts]
    assert 2 + sum(map(min, lengths)) >= 10 and 2 + sum(map(max, lengths)) <= 40  # with the article and "but"
    assert all(len(set(part)) == len(part) for part in parts)
    assert np.prod([len(part) for part in parts]) == premise_grammar.PREMISE_COUNT > 10_000_000


def test_premises_are_drawn_by_the_seed_and_fewer_are_the_first_of_more():
    source = Premises()
    assert source.premises("train", 50, 1) == source.premises("train", 80, 1)[:50] != source.premises("train", 50, 2)
    assert source.prompts("test", 20, 1) == [outline.outline_prompt(p, PREFIX) for p in source.premises("test", 20, 1)]
    with pytest.raises(UserError, match="premises have no split 'dev'; they have train, validation, test"):
        source.prompts("dev", 1, 0)
    with pytest.raises(UserError, match="1000000 premises were asked for; the grammar gives up to 299520"):
        source.prompts("train", 1_000_000, 0)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_a_file_of_premises_falls_into_disjoint_splits_by_their_words(tmp_path, name):
    premises = [f"A clerk finds letter number {i}." for i in range(300)]
    path = write_premises(tmp_path / name, premises)
    found = {split: PremiseFile(path).premises(split, 999, 0) for split in SPLITS}
    assert sorted(itertools.chain(*found.values())) == sorted(premises)
    shares = [len(found[split]) / 300 for split in SPLITS]
    assert np.abs(np.subtract(shares, [0.8, 0.1, 0.1])).max() < 0.06
    assert all(is_in_split(premise.casefold(), split) for split in SPLITS for premise in found[split])
    again = write_premises(tmp_path / f"b{name[1:]}", reversed([p.upper().replace(" ", "  ") for p in premises]))
    for split in SPLITS:  # neither the case, nor white space, nor the rest of the file moves a premise
        assert {p.casefold() for p in PremiseFile(again).premises(split, 999, 0)} == {
            p.casefold() for p in found[split]
        }
    both = write_premises(tmp_path / f"c{name[1:]}", [*premises, *(f" {p.upper()}" for p in premises)])
    assert sorted(PremiseFile(both).premises("train", 999, 0)) == sorted(found["train"])
    assert PremiseFile(path).premises("train", 9, 4) == PremiseFile(path).premises("train", 99, 4)[:9]


def test_what_is_wrong_with_a_file_of_premises_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read .*; give a JSON-lines file of premises"):
        outline_task(str(tmp_path / "none.jsonl")).source.prompts("train", 1, 0)
    (tmp_path / "a.jsonl").write_text('{"premise": "A"}\n{"prompt": "A"}\n')
    with pytest.raises(UserError, match=r"a\.jsonl, line 2 has no 'premise'; correct it"):
        PremiseFile(str(tmp_path / "a.jsonl")).prompts("train", 1, 0)
    with pytest.raises(
        UserError, match=r'a\.csv: name it \.jsonl, with {"premise": text} on each line, or \.txt, with'
    ):
        PremiseFile(str(tmp_path / "a.csv")).prompts("train", 1, 0)
    one = write_premises(tmp_path / "one.txt", ["A clerk finds a letter."])
    empty = next(split for split in SPLITS if not is_in_split("a clerk finds a letter.", split))
    with pytest.raises(UserError, match=rf"one\.txt holds no premise of the {empty} split"):
        PremiseFile(one).prompts(empty, 1, 0)
    with pytest.raises(UserError, match="no split 'dev'"):
        PremiseFile(one).prompts("dev", 1, 0)
    for source in (Premises, lambda prefix: PremiseFile(one, prefix)):
        for prefix in ("So:", "1.\n\nAssistant: 1.", "Human: 1.", " 1."):
            with pytest.raises(UserError, match=r"is no beginning of a reply; give words that end in '1\.'"):
                source(prefix=prefix)


def test_a_changed_file_is_another_experiment_and_is_read_again(tmp_path):
    path = write_premises(tmp_path / "a.txt", [f"One {i}." for i in range(40)])
    first = outline_task(path)
    assert describe(first, str) == describe(outline_task(path), str)
    write_premises(tmp_path / "a.txt", [f"Two {i}." for i in range(40)])
    edited = outline_task(path)
    assert describe(first, str) != describe(edited, str) and "Two" in edited.source.prompts("train", 1, 0)[0]


def test_a_prompt_opens_the_reply_and_a_contrast_replaces_its_prefix_alone():
    task = outline_task()
    assert len(task.affixes) == 3 and len({side for pair in task.affixes for side in pair}) == 6
    for prefix in (PREFIX, *itertools.chain(*task.affixes)):
        assert prefix.endswith("\n\n1.")
    question = f"Human: Write the outline of a story with this premise: {PREMISE}\n\nAssistant: "
    assert question + PREFIX == PROMPT and outline.premise_of(PROMPT) == PREMISE
    for plus, minus in task.affixes:
        assert task.contrast(PROMPT, plus, minus) == question + plus
        assert task.contrast(PROMPT, minus, plus) == question + minus
    for other in ("Human: Hi?\n\nAssistant:", f"x{PROMPT}", PROMPT[:-1]):
        with pytest.raises(UserError, match="asks for no outline; make it with ``outline_prompt``"):
            task.contrast(other, *task.affixes[0])


def test_rlcd_contrasts_the_prefixes_and_stores_the_plain_prompt():
    task, asked = outline_task(), []
    prompts = task.source.prompts("train", 12, 0)

    def generate(texts, numbers, seed):
        asked.extend(texts)
        return [Reply(" One.\n2. Two.\n\nHuman:", 1, 0.0) for _ in texts]

    pairs, _ = RLCD().label(Labeler(generate, task, None, 0), prompts, range(12))
    for i, pair in enumerate(pairs):
        plus, minus = task.affixes[pair.affix]
        plain = prompts[i].removesuffix(PREFIX)
        assert (asked[i], asked[12 + i]) == (plain + plus, plain + minus) and pair.prompt == prompts[i]
    assert {pair.affix for pair in pairs} == {0, 1, 2} and {pair.first for pair in pairs} == {"One.\n2. Two."}


@pytest.mark.parametrize(("raw", "reply"), [
    (" One.\n2. Two.\n\nHuman:", "One.\n2. Two."),
    (" One.\n2. Two</s>Human:", "One.\n2. Two"),
    (" Here it is:\n\n1. One.\n2. Two.\n\nHuman:", "One.\n2. Two."),  # the prefix again
    (" 1. One.\n\nHuman:", "One."),
    (" One: a\n1. b\n\nHuman:", "One: a\n1. b"),  # no prefix: its line goes on
    (" One.\n2. Two.", None),  # no human turn follows
    ("\n\nHuman:", None),
    (" 1. \n\nHuman:", None),
])  # fmt: skip
def test_the_filter_keeps_an_outline_from_its_first_point(raw, reply):
    assert outline_task().clean(raw) == reply


@pytest.mark.parametrize(("reply", "points"), [
    ("One.\n2. Two.\n 3. Three:\nmore", [(1, "One."), (2, "Two."), (3, "Three:\nmore")]),
    ("In 1999. 2. No line.\n2.5 is no point", [(1, "In 1999. 2. No line.\n2.5 is no point")]),
    ("One.\n2.\n4. Four.", [(1, "One."), (2, ""), (4, "Four.")]),
])  # fmt: skip
def test_points_are_lines_that_begin_with_a_number(reply, points):
    assert outline.outline_points(reply) == points


@pytest.mark.parametrize(("reply", "well_formed"), [
    ("He finds it.\n2. He goes.", 1), ("He finds it.\n2. He goes.\n3. He stays.", 1),
    ("He finds it.", 0), ("He finds it.\n3. He goes.", 0), ("He finds it.\n2.", 0), ("He goes.\n2. he GOES!", 0),
    ("\n2. He goes.", 0), ("He finds it.\n2. He goes.\n2. He stays.", 0),
])  # fmt: skip
def test_an_outline_is_well_formed_or_not(reply, well_formed):
    assert outline_task().score(PROMPT, reply) == well_formed == outline.outline_metrics(PROMPT, reply)["well_formed"]


def test_what_is_counted_of_an_outline():
    found = outline.outline_metrics(PROMPT, "The Baker finds the map.\n2. The BAKER goes.")
    asked = {"baker", "finds", "places", "that", "exist"}  # the premise's words of four letters or more
    assert found == {"points": 2, "words": 8, "well_formed": 1.0, "premise_words": 2 / len(asked),
                     "distinct_words": 5 / 8}  # fmt: skip
    assert outline.outline_metrics(PROMPT, "") == {"points": 1, "words": 0, "well_formed": 0.0, "premise_words": 0.0,
                                                   "distinct_words": 0.0}  # fmt: skip


def test_raters_and_preference_models_read_two_outlines_that_begin_alike(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps({"reply_prefix": "The outline:\n\n1."}))
    for prefix, task in {PREFIX: outline_task(), "The outline:\n\n1.": outline_task("", f"{tmp_path}/a.json")}.items():
        prompt, shown = task.source.prompts("test", 1, 0)[0], []
        questions = (*task.questions, *task.evaluation_questions.values())
        shown += [rater_text(question, task.format, prompt, "One.", "Two.") for question in questions]
        one, two = (reply_text(task.format, reply) for reply in ("One.", "Two."))
        shown.append(f"{prompt}{task.template.before}{one}{task.template.between}{two}{task.template.question}")
        assert prompt.endswith(f"\n\nAssistant: {prefix}")
        for text in shown:
            assert re.findall(r"(?:^|\n\n)(Human|Assistant):", text) == ["Human", "Assistant"] * 3
            assert [text.count(f"Assistant: {prefix} {reply}\n\nHuman:") for reply in ("One.", "Two.")] == [1, 1]
        assert len(set(shown)) == 5 and len({re.sub("outlines .*, the first", "", text) for text in shown}) == 1
    qualities = ("interesting", "better formed", "closer to the premise")
    assert [[word in q.question for word in qualities] for q in outline_task().questions] == np.eye(
        3, dtype=bool
    ).tolist()
    assert list(outline_task().evaluation_questions) == ["quality"]


def test_a_chat_model_is_asked_for_the_prefix():
    task = outline_task()
    (message,) = task.messages(task.contrast(PROMPT, *task.affixes[1]))
    assert message["role"] == "user" and message["content"].startswith(
        "Write the outline of a story with this premise: A"
    )
    assert PREMISE in message["content"] and message["content"].endswith(task.affixes[1][0])
    assert "Human:" not in message["content"] and task.oracles == {} and task.corpus is None


@needs_data
def test_real_openings_as_premises(tmp_path):
    rows = (DATA / "story_premises.jsonl").read_text().splitlines()
    path = write_premises(tmp_path / "a.jsonl", [json.loads(row)["prompt"] for row in rows])
    task = outline_task(path)
    prompts = {split: task.source.prompts(split, 9999, 0) for split in SPLITS}
    assert sum(map(len, prompts.values())) == len({x for texts in prompts.values() for x in texts}) == 3000
    assert all(task.contrast(x, PREFIX, "") == x for texts in prompts.values() for x in texts)
