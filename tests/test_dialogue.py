"""Dialogues in the HH format: where a prompt ends, who is held out, contrast and filter, and malformed lines."""

import dataclasses
import gzip
import hashlib
import json
import os
import re
import types
from pathlib import Path

import pytest

from alignjax.distributed.sharding import Mesh, make_mesh
from alignjax.errors import UserError
from alignjax.labeling.judged import Judged
from alignjax.labeling.method import Labeler
from alignjax.labeling.rlcd import RLCD
from alignjax.pipeline.description import describe
from alignjax.pipeline.experiment import Context, Experiment
from alignjax.pipeline.judges import Oracle
from alignjax.pipeline.stages import Label, Tournament, Writing
from alignjax.pipeline.stages.replies import mean_scores
from alignjax.sampling.generate import Reply
from alignjax.tasks import dialogue
from alignjax.tasks.dialogue import Dialogues
from alignjax.tasks.json_lines import read_rows
from alignjax.tasks.task import SPLITS, rater_text, reply_text

DATA = Path(os.environ.get("ALIGNJAX_TEST_DATA", ""))
HH = DATA / "hh_harmless_base_test.jsonl.gz"
needs_data = pytest.mark.skipif("ALIGNJAX_TEST_DATA" not in os.environ, reason="ALIGNJAX_TEST_DATA names no folder")


def row(number, turn_count=1, chosen="Yes.", rejected="No."):
    """Returns a row whose prompt names the number."""
    talk = "".join(f"\n\nHuman: Question {number}.{turn}?\n\nAssistant: So.{turn}" for turn in range(turn_count - 1))
    talk += f"\n\nHuman: Question {number}?\n\nAssistant:"
    return {"chosen": f"{talk} {chosen}", "rejected": f"{talk} {rejected}"}


def write_rows(path, rows):
    """Writes JSON lines, compressed where the name ends in .gz; returns the path."""
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_a_prompt_ends_at_the_last_role_marker_of_the_chosen_dialogue(tmp_path, name):
    path = write_rows(
        tmp_path / name, [row(0), row(1, turn_count=3), row(2, chosen="Assistant: is a word.\u2028Here too.")]
    )
    plain, three_turns, with_marker = dialogue.read_dialogue_prompts(path)
    assert plain == "Human: Question 0?\n\nAssistant:" and with_marker == "Human: Question 2?\n\nAssistant:"
    assert three_turns.startswith("Human: Question 1.0?\n\nAssistant: So.0\n\nHuman:") and three_turns.endswith(
        "1?\n\nAssistant:"
    )
    assert three_turns.count("Assistant:") == 3


def test_the_first_thousand_of_the_test_file_are_validation_and_the_next_test(tmp_path):
    test = write_rows(tmp_path / "test.jsonl", [row(i) for i in range(2500)])
    train = write_rows(tmp_path / "train.jsonl", [row(i) for i in range(900, 3000)])
    source, asked = Dialogues(train, test), [f"Human: Question {i}?\n\nAssistant:" for i in range(3000)]
    assert sorted(source.prompts("validation", 9999, 0)) == sorted(asked[:1000])
    assert sorted(source.prompts("test", 9999, 0)) == sorted(asked[1000:2000])
    assert sorted(source.prompts("train", 9999, 0)) == sorted(asked[2000:])  # without those held out
    assert len(Dialogues(train).prompts("train", 9999, 0)) == 2100


def test_splits_are_distinct_and_shuffled_by_the_seed(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row(i % 7) for i in range(40)])
    source = Dialogues(path, path, held_out=3)
    prompts = [source.prompts(split, 99, 5) for split in SPLITS]
    assert [len(texts) for texts in prompts] == [1, 3, 3] and len({x for texts in prompts for x in texts}) == 7
    whole = Dialogues(path)
    assert whole.prompts("train", 4, 1) == whole.prompts("train", 99, 1)[:4] != whole.prompts("train", 4, 2)


def test_without_files_there_is_a_task_and_the_prompts_alone_are_refused():
    task = dialogue.dialogue_task()
    assert describe(task)["source"]["digests"] == {"0": "", "1": ""}
    for split in SPLITS:
        with pytest.raises(UserError, match="no file of dialogues is named; give"):
            task.source.prompts(split, 1, 0)
    with pytest.raises(UserError, match=r"nowhere\.jsonl cannot be read .*; give a JSON-lines file of dialogues"):
        dialogue.dialogue_task("nowhere.jsonl").source.prompts("train", 1, 0)
    with pytest.raises(UserError, match="no split 'dev'; they have train, validation, test"):
        task.source.prompts("dev", 1, 0)
    assert task.corpus is None
    with pytest.raises(UserError, match="harmless, helpful"):
        dialogue.dialogue_task(attribute="brave")


def test_a_changed_file_is_another_experiment_and_is_read_again(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row(1)])
    first = dialogue.dialogue_task(path)
    assert describe(first) == describe(dialogue.dialogue_task(path))
    write_rows(tmp_path / "a.jsonl", [row(2)])
    edited = dialogue.dialogue_task(path)
    assert describe(first) != describe(edited) and "Question 2" in edited.source.prompts("train", 1, 0)[0]


@pytest.mark.parametrize(("line", "words"), [
    ("[]", "line 2 is no JSON object"),
    ("{", "line 2 is no JSON object"),
    ('{"rejected": "x"}', "line 2 has no 'chosen'"),
    ('{"chosen": 3}', "line 2 has 'chosen' without a text"),
    ('{"chosen": "  "}', "line 2 has 'chosen' without a text"),
    ('{"chosen": "Human: Hi?"}', "line 2 has 'chosen' without a turn 'Assistant:'"),
    ('{"chosen": "\\n\\nAssistant: Hi."}', "line 2 has 'chosen' without a turn 'Assistant:' after another"),
])  # fmt: skip
def test_a_line_of_another_form_is_named_by_its_number(tmp_path, line, words):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(row(0)) + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        dialogue.dialogue_task(str(path)).source.prompts("train", 1, 0)
    assert str(error.value).startswith(f"{path}, {words}") and str(error.value).endswith("; correct it")


@pytest.mark.parametrize("damage", [b"", b"\n \n"])
def test_an_empty_file_is_named(tmp_path, damage):
    path = tmp_path / "a.jsonl"
    path.write_bytes(damage)
    with pytest.raises(UserError, match=r"a\.jsonl holds no dialogues; give"):
        dialogue.dialogue_task(str(path)).source.prompts("train", 1, 0)


def test_a_damaged_gzip_is_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    for damage in (b"plain", gzip.compress(b"x" * 99)[:20], gzip.compress(b"\xff")):
        path.write_bytes(damage)
        with pytest.raises(UserError, match=r"a\.jsonl\.gz cannot be read"):
            dialogue.dialogue_task(str(path)).source.prompts("train", 1, 0)


def test_a_test_file_of_one_split_says_so(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row(i) for i in range(5)])
    with pytest.raises(UserError, match=r"a\.jsonl holds no prompt of the test split"):
        dialogue.dialogue_task(path, path).source.prompts("test", 1, 0)


def test_what_people_preferred_is_a_pair_where_the_dialogues_part_at_the_last_reply():
    prompt = "Human: Question 3?\n\nAssistant:"
    assert dialogue.read_hh_comparison(row(3)) == (prompt, "Yes.", "No.", 1.0)
    assert (
        dialogue.read_hh_comparison(row(3, rejected="")) is None
        and dialogue.read_hh_comparison(row(3, chosen=" ")) is None
    )
    assert dialogue.read_hh_comparison({**row(3), "rejected": row(4)["rejected"]}) is None


@pytest.mark.parametrize("attribute", ["harmless", "helpful"])
def test_affix_pairs_are_the_papers_in_number_and_form_and_distinct(attribute):
    pairs = dialogue.dialogue_task(attribute=attribute).affixes
    assert len(pairs) == {"harmless": 16, "helpful": 1}[attribute]
    sides = [side for pair in pairs for side in pair]
    assert len(set(sides)) == len(sides) and all(side.startswith("(") and side.endswith(")") for side in sides)
    if attribute == "harmless":
        assert all(a.startswith("(harmless") and b.startswith("(harmful") for a, b in pairs)
    assert all(":" not in side and "\n" not in side for side in sides)  # a role marker ends at its colon


@pytest.mark.parametrize("attribute", ["harmless", "helpful"])
def test_each_affix_pair_has_a_question_that_names_its_quality(attribute):
    task = dialogue.dialogue_task(attribute=attribute)
    assert len(task.questions) == len(task.affixes)
    for (positive, _), question in zip(task.affixes, task.questions, strict=True):
        named = re.findall(r"\w[\w-]+", positive.replace("response", "").replace("from", ""))
        assert all(word in question.question for word in named), positive
    assert len({question.question for question in task.questions}) == len(task.questions)
    assert set(task.evaluation_questions) == {"harmless": {"harmless", "helpful"}, "helpful": {"helpful"}}[attribute]


@pytest.mark.parametrize("attribute", ["harmless", "helpful"])
def test_a_question_is_a_further_turn_of_the_dialogue(attribute):
    """The template, whose replies carry the end marker, and the questions, whose replies do not, show one text."""
    task, prompt = dialogue.dialogue_task(attribute=attribute), dialogue.read_hh_prompt(row(3, turn_count=2))
    one, two = (reply_text(task.format, reply) for reply in ("Yes.", "No."))
    template = task.template
    shown = [f"{prompt}{template.before}{one}{template.between}{two}{template.question}"]
    questions = (*task.questions, *task.evaluation_questions.values())
    shown += [rater_text(question, task.format, prompt, "Yes.", "No.") for question in questions]
    for text in shown:
        assert re.findall(r"(?:^|\n\n)(Human|Assistant):", text) == ["Human", "Assistant"] * 4
        turns = [re.sub(r"\s*(Human|Assistant):\s*", "", turn) for turn in re.split(r"\n\n(?=Human|Assistant)", text)]
        assert turns[3] == "Yes." and turns[5] == "No." and turns[7] == "The"
    assert len({re.sub(r"answers .*, the first", "", text) for text in shown}) == 1
    for question in (*questions, template):
        assert (question.answer, question.other) == (" first", " second")


def affixed(prompt, last, earlier):
    """The contrast prompt of 2307.12950 section 3, assembled from the text between the role markers."""
    *history, end = prompt.split("\n\nAssistant:")
    assert end == ""
    affixes = [earlier] * (len(history) - 1) + [last]
    return "".join(f"{text}\n\nAssistant {affix}:" for text, affix in zip(history, affixes, strict=True))


def test_the_contrast_of_three_turns_has_the_opposite_polarity_on_all_earlier_ones():
    prompt = "Human: A?\n\nAssistant: b.\n\nHuman: C?\n\nAssistant: d.\n\nHuman: E?\n\nAssistant:"
    contrast = dialogue.dialogue_task().contrast
    assert contrast(prompt, "(+)", "(-)") == (
        "Human: A?\n\nAssistant (-): b.\n\nHuman: C?\n\nAssistant (-): d.\n\nHuman: E?\n\nAssistant (+):"
    )
    assert contrast(prompt, "(-)", "(+)") == (
        "Human: A?\n\nAssistant (+): b.\n\nHuman: C?\n\nAssistant (+): d.\n\nHuman: E?\n\nAssistant (-):"
    )
    assert contrast("Human: A?\n\nAssistant:", "(+)", "(-)") == "Human: A?\n\nAssistant (+):"


def test_rlcd_writes_both_sides_under_one_pair_and_stores_the_plain_prompt():
    task, asked = dialogue.dialogue_task(), {}
    prompts = [dialogue.read_hh_prompt(row(i, turn_count=1 + i % 4)) for i in range(40)]

    def generate(texts, numbers, seed):
        for text, number in zip(texts, numbers, strict=True):
            asked.setdefault(number, []).append(text)
        return [Reply(f" {len(asked[number])}\n\nHuman:", 1, 0.0) for number in numbers]

    pairs, _ = RLCD().label(Labeler(generate, task, None, 0), prompts, range(40))
    for number, pair in enumerate(pairs):
        plus, minus = task.affixes[pair.affix]
        assert asked[number] == [affixed(prompts[number], plus, minus), affixed(prompts[number], minus, plus)]
        assert pair.prompt == prompts[number]
        assert (pair.first, pair.second, pair.p) in (("1", "2", 1.0), ("2", "1", 0.0))  # "1": under the positive affix
    assert len({pair.affix for pair in pairs}) > 8 and {pair.p for pair in pairs} == {0.0, 1.0}


@pytest.mark.parametrize(("raw", "reply"), [
    (" good\n\nHuman:", "good"),
    (" good</s>\n\nHuman:", "good"),
    (" good</s>Human:", "good"),  # an end token does for the newline
    (" one\n\ntwo</s> junk\n\nHuman:", "one\n\ntwo"),
    (" good<|end_of_text|>\nHuman:", "good"),
    (" stray Assistant: good</s>Human:", "good"),
    (" good</s>", None),  # no human turn follows
    ("</s>\n\nHuman:", None),
    (" no newline Human:", None),
])  # fmt: skip
def test_an_end_token_ends_a_reply(raw, reply):
    assert dialogue.clean_hh_reply(raw) == reply


def context(task, stages, folder, name):
    return Context(Experiment(task, stages), folder, name, make_mesh(Mesh()))


def test_labels_are_made_where_nobody_knows_the_truth_and_not_counted_right(tmp_path):
    task, writing = dialogue.dialogue_task(), Writing(8, (8,), 8)
    stage = Label(RLCD(), "train", 4, writing, "base", held_out=0.25)
    prompts = [dialogue.read_hh_prompt(row(i, turn_count=2)) for i in range(4)]
    asked = []

    def generate(texts, numbers, seed):
        asked.extend(texts)
        return [Reply(f" {text[-9:-1]}\n\nHuman:", 1, 0.0) for text in texts]

    pairs, tries = RLCD().label(Labeler(generate, task, None, 0), prompts, range(4))
    for text in asked:  # opposite polarity on the earlier turn
        assert ("Assistant (harmless" in text) and ("Assistant (harmful" in text)
    chunks = [{"tries": tries, "asked": 4, "pairs": pairs}]
    figures = stage.finish(context(task, {"pairs": stage}, tmp_path, "pairs"), chunks)
    assert figures == {"pairs": 4, "dropped": 0, "tries_per_prompt": 2.0}


def test_without_an_oracle_a_table_has_no_score_and_an_oracle_by_name_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row(i) for i in range(20)])
    source, writing = Dialogues(path, path, held_out=5), Writing(8, (8,), 8)
    task = dataclasses.replace(dialogue.dialogue_task(), source=source)
    table = Tournament({"truth": Oracle("oracle")}, 8, writing, policies={"base": "base"}, reference="base")
    labels = Label(Judged(Oracle("oracle")), "train", 4, writing, generator="base")
    stages = {"base": types.SimpleNamespace(network=lambda context: None), "table": table, "labels": labels}
    for name in ("table", "labels"):
        with pytest.raises(UserError, match=f"{name}: task 'dialogue-harmless' has no oracle 'oracle'; it has none"):
            stages[name].check(context(task, stages, tmp_path, name))
    assert mean_scores(task, ["x"], {"base": ["y"]}) == [None]


BAD = ["{", '{"rejected": "x"}', '{"chosen": "Human: Hi?", "rejected": "x"}']


def test_malformed_lines_are_skipped_where_that_is_asked_and_counted(tmp_path):
    path, rows = tmp_path / "a.jsonl", [json.dumps(row(i)) for i in range(8)]
    path.write_text("\n".join([*rows[:3], *BAD, "", *rows[3:]]) + "\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 4 is no JSON object; correct it"):
        Dialogues(test=str(path), held_out=4).prompts("validation", 9, 0)
    source = Dialogues(test=str(path), held_out=4, skip_malformed=True)
    words = r"a\.jsonl: 3 of 11 lines are malformed and were left out; line 4 is no JSON object"
    with pytest.warns(UserWarning, match=words):
        assert sorted(source.prompts("validation", 9, 0)) == [f"Human: Question {i}?\n\nAssistant:" for i in range(4)]
    with pytest.warns(UserWarning, match=words):
        assert [pair.line for pair in source.pairs("test")] == [9, 10, 11, 12]
    path.write_text("\n".join(BAD))
    with pytest.raises(UserError, match=r"a\.jsonl, line 1 is no JSON object"):
        Dialogues(test=str(path), skip_malformed=True).prompts("test", 9, 0)


def test_a_rejected_dialogue_that_is_malformed_moves_no_prompt_to_another_split(tmp_path):
    rows = [row(i) for i in range(6)]
    del rows[1]["rejected"]
    path = write_rows(tmp_path / "a.jsonl", rows)
    source = Dialogues(test=path, held_out=3, skip_malformed=True)
    with pytest.warns(UserWarning, match="line 2 has no 'rejected'"):
        lines = {split: [pair.line for pair in source.pairs(split)] for split in ("validation", "test")}
    assert lines == {"validation": [1, 3], "test": [4, 5, 6]} and len(source.prompts("validation", 9, 0)) == 3


def test_a_file_with_another_sha256_than_the_given_one_is_refused(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [row(i) for i in range(6)])
    right = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    plain, checked = Dialogues(test=path), Dialogues(test=path, sha256=("", right.upper()))
    assert describe(plain, str) == describe(checked, str)  # what is checked changes no result
    assert Dialogues(sha256=(right, right)).digests == ("", "")
    for sha256, words in {
        ("", "0" * 64): rf"{path} has the SHA-256 {right}, not 0+; fetch it again, or give its own",
        ("", right[:16]): "is no SHA-256; give its 64 hexadecimal digits",
        (right,): "must be two texts",
        right: "must be two texts",
    }.items():
        with pytest.raises(UserError, match=words):
            Dialogues(test=path, sha256=sha256)


def test_statistics_count_each_kind_of_pair_once():
    pairs = [
        dialogue.DialoguePair(1, "Human: A\n\nAssistant:", "yes", "no", True),
        dialogue.DialoguePair(2, "Human: A\n\nAssistant:", "yes", "", True),
        dialogue.DialoguePair(3, "Human: A\n\nAssistant: b\n\nHuman: C\n\nAssistant:", "y", "no", False),
    ]
    assert dialogue.dialogue_statistics(pairs) == {
        "pairs": 3, "multi_turn": 1, "other_prompt": 1, "empty_reply": 1, "comparisons": 1, "repeated_prompts": 1,
        "prompt_characters": (20 + 20 + 44) / 3, "chosen_characters": 7 / 3, "rejected_characters": 4 / 3,
    }  # fmt: skip
    with pytest.raises(UserError, match="no dialogues to count"):
        dialogue.dialogue_statistics([])


@needs_data
def test_the_real_files_figures():
    found = dialogue.dialogue_statistics(dialogue.read_dialogue_pairs(str(HH)))
    counted = {name: found[name] for name in ("pairs", "multi_turn", "other_prompt", "comparisons")}
    assert counted == {"pairs": 2312, "multi_turn": 1650, "other_prompt": 5, "comparisons": 2303}
    source = Dialogues(test=str(HH))
    assert source.digests[1] == "ebfaaed21162a4de"  # of the file as it was released
    for split, expected in {"validation": range(1, 1001), "test": range(1001, 2001)}.items():
        lines = [pair.line for pair in source.pairs(split)]
        assert set(lines) <= set(expected) and len(lines) > 980, split


@needs_data
def test_the_real_file_is_read_whole():
    source = Dialogues(test=str(HH))
    prompts = dialogue.read_dialogue_prompts(str(HH), source.digests[1])
    assert len(prompts) == 2312 and sum(text.count("\n\nAssistant:") > 1 for text in prompts) == 1650
    assert sum(text.startswith("Human:") and text.endswith("\n\nAssistant:") for text in prompts) == 2312
    validation, test = (set(source.prompts(split, 9999, 0)) for split in ("validation", "test"))
    assert len(validation ^ set(prompts[:1000])) == len(test ^ (set(prompts[1000:2000]) - validation)) == 0
    comparisons = [pair for pair in read_rows(str(HH), "dialogues", dialogue.read_hh_comparison) if pair]
    assert len(comparisons) == 2303  # of 2307 that share the prompt, four have an empty reply


@needs_data
def test_every_real_prompt_takes_an_affix_and_is_a_chat():
    task, whole = dialogue.dialogue_task(test=str(HH)), []
    plus, minus = task.affixes[0]
    for text in dialogue.read_dialogue_prompts(str(HH)):
        contrast, earlier = task.contrast(text, plus, minus), text.count("\n\nAssistant:") - 1
        whole.append(
            contrast.endswith(f" {plus}:")
            and contrast.count(f" {minus}:") == earlier
            and contrast == affixed(text, plus, minus)
            and len(task.messages(text)) > 0
        )
    assert sum(whole) == 2312  # a number, so that a failure shows none of the texts
