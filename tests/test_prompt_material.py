"""A task's words from a file, what is refused of it, and the RLCD authors' scripts as such a file."""

import dataclasses
import json
import os
from pathlib import Path

import pytest

from alignjax.errors import UserError
from alignjax.pipeline.description import describe
from alignjax.tasks.dialogue import dialogue_task
from alignjax.tasks.dialogue_format import DIALOGUE_FORMAT
from alignjax.tasks.dialogue_words import DIALOGUE_MATERIAL
from alignjax.tasks.outline import outline_task
from alignjax.tasks.prompt_material import PromptMaterial, read_prompt_material, write_prompt_material
from alignjax.tasks.rlcd_material import convert_rlcd_material
from alignjax.tasks.task import Format, Task, Template, rater_text

STUDY = Path(os.environ.get("ALIGNJAX_TEST_DATA", "")).parent / "reference" / "rlcd_prompts.json"
ASK = {"preamble": "Read. ", "before": " (1)", "between": " (2)", "question": " Nicer: (", "answer": "1", "other": "2"}
WHOLE = {
    "affixes": [["(warm words)", "(cold words)"], ["(kind: é😀)", "(mean)"]],
    "questions": [ASK, {**ASK, "question": " Kinder: ("}],
    "evaluation_questions": {"warmth": {name: ASK[name] for name in ("between", "question", "answer", "other")}},
    "reply_prefix": "So:\n\n1.",
}


def write(path, fields):
    """Writes JSON; returns the path as text."""
    path.write_text(fields if isinstance(fields, str) else json.dumps(fields))
    return str(path)


def test_every_field_of_a_file_is_read_and_written(tmp_path):
    found = read_prompt_material(write(tmp_path / "a.json", WHOLE))
    assert found.affixes == (("(warm words)", "(cold words)"), ("(kind: é😀)", "(mean)"))
    assert found.questions == (Template(" (1)", " (2)", " Nicer: (", "1", "2", "Read. "),
                               Template(" (1)", " (2)", " Kinder: (", "1", "2", "Read. "))  # fmt: skip
    assert found.evaluation_questions == {"warmth": Template("", " (2)", " Nicer: (", "1", "2", "")}
    assert found.reply_prefix == "So:\n\n1." and len(found.digest) == 16
    write_prompt_material(str(tmp_path / "b.json"), found)
    again = read_prompt_material(str(tmp_path / "b.json"))
    assert dataclasses.replace(again, digest=found.digest) == found and again.digest != found.digest


def test_fields_that_a_file_does_not_give_stay_the_tasks_own(tmp_path):
    own = DIALOGUE_MATERIAL["harmless"]
    for name, value in {"questions": [ASK] * 16, "evaluation_questions": WHOLE["evaluation_questions"]}.items():
        found = read_prompt_material(write(tmp_path / "a.json", {name: value}), own)
        same = {
            field.name for field in dataclasses.fields(own) if getattr(found, field.name) == getattr(own, field.name)
        }
        assert same == {"affixes", "questions", "evaluation_questions", "reply_prefix"} - {name}
    found = read_prompt_material(write(tmp_path / "a.json", {"affixes": WHOLE["affixes"], "questions": []}), own)
    assert found.questions == () and len(found.affixes) == 2
    write_prompt_material(str(tmp_path / "b.json"), found)
    assert read_prompt_material(str(tmp_path / "b.json"), own).questions == ()


def changed(path, value):
    """Returns WHOLE with the value at a path of keys and indices; a dict's entry is dropped where it is ``...``."""
    whole = json.loads(json.dumps(WHOLE))
    node = whole
    for key in path[:-1]:
        node = node[key]
    if value is ...:
        del node[path[-1]]
    else:
        node[path[-1]] = value
    return whole


REFUSED = [
    ("[]", "is no JSON object; give a JSON file of prompt material"),
    ("{", "is no JSON object"),
    ('{"reply_prefix": "\\ud83d"}', "has half of a surrogate pair"),
    ({}, "has no field; give one of affixes, questions, evaluation_questions, reply_prefix"),
    (changed(["affix"], []), "has an unknown field 'affix'; its fields are affixes, questions"),
    (
        changed(["questions"], ...),
        r'has affixes and no questions; give one question for each pair, or "questions": \[\]',
    ),
    (changed(["questions"], [ASK]), "questions has 1 items for 2 affix pairs"),
    (changed(["affixes"], {}), "affixes is {}, which is no list"),
    (changed(["affixes"], []), "affixes is empty"),
    (changed(["affixes", 1], ["a"]), r"affixes\[1\] is \['a'\], which is no pair"),
    (changed(["affixes", 1, 0], 3), r"affixes\[1\]\[0\] is 3, which is no text"),
    (changed(["affixes", 1, 1], " "), r"affixes\[1\]\[1\] is ' ', which is no text"),
    (changed(["affixes", 0], ["a", "a"]), r"affixes\[0\] has two equal sides"),
    (changed(["questions"], "x"), "questions is 'x', which is no list"),
    (changed(["questions", 1], "x"), r"questions\[1\] is 'x', which is no object"),
    (
        changed(["questions", 1, "answers"], "x"),
        r"questions\[1\] has an unknown field 'answers'; a question has before",
    ),
    (changed(["questions", 1, "other"], ...), r"questions\[1\] has no 'other'"),
    (changed(["questions", 1, "between"], ""), r"questions\[1\].between is '', which is no text"),
    (changed(["questions", 1, "before"], None), r"questions\[1\].before is None, which is no text"),
    (changed(["questions", 1, "other"], "1"), r"questions\[1\] has two equal answers"),
    (changed(["evaluation_questions"], []), r"evaluation_questions is \[\], which is no object"),
    (changed(["evaluation_questions", "a.b"], ASK), "evaluation_questions has the name 'a.b'"),
    (changed(["evaluation_questions", "warmth", "answer"], True), "evaluation_questions.warmth.answer is True"),
    (changed(["reply_prefix"], ["1."]), r"reply_prefix is \['1.'\], which is no text"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_a_malformed_field_is_named_with_its_file(tmp_path, fields, message):
    path = write(tmp_path / "a.json", fields)
    with pytest.raises(UserError, match=message) as error:
        read_prompt_material(path)
    assert str(error.value).startswith(path) and "\n" not in str(error.value) and ";" in str(error.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read .*; give a JSON file of prompt material"):
        dialogue_task(material=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"none/a\.json cannot be written"):
        write_prompt_material(str(tmp_path / "none" / "a.json"), PromptMaterial())


def test_a_task_takes_a_files_words_and_they_are_another_experiment(tmp_path):
    fields = {**WHOLE, "affixes": [["(warm)", "(cold)"], ["(kind)", "(mean)"]]}
    del fields["reply_prefix"]
    path = write(tmp_path / "a.json", fields)
    task = dialogue_task(material=path)
    assert task.affixes == (("(warm)", "(cold)"), ("(kind)", "(mean)")) and len(task.questions) == 2
    assert list(task.evaluation_questions) == ["warmth"] and task.template == dialogue_task().template
    assert describe(task, str) == describe(dialogue_task(material=path), str)
    records = [describe(dialogue_task(), str), describe(task, str)]
    write(tmp_path / "a.json", json.dumps(fields) + "\n")  # the digest alone changes
    records.append(describe(dialogue_task(material=path), str))
    assert len({json.dumps(record) for record in records}) == 3


@pytest.mark.parametrize(("task", "fields", "message"), [
    (dialogue_task, {"reply_prefix": "So: 1."}, "reply_prefix belongs to outlines"),
    (dialogue_task, {"affixes": [["(a)", "(b: c)"]], "questions": []}, r"affixes\[0\]\[1\] has a colon"),
    (dialogue_task, {"affixes": [["(a)\n", "(b)"]], "questions": []}, r"affixes\[0\]\[0\] has a colon or a line end"),
    (outline_task, {"reply_prefix": "So:"}, r"reply_prefix='So:' is no beginning of a reply; give words that end in"),
    (outline_task, {"affixes": [["A: 1.", "B:"]], "questions": []}, r"affixes\[0\]\[1\]='B:' is no beginning"),
    (outline_task, {"affixes": [["Human: 1.", "B: 1."]], "questions": []}, r"affixes\[0\]\[0\]=.* hold no role marker"),
])  # fmt: skip
def test_words_that_do_not_fit_the_task_are_refused(tmp_path, task, fields, message):
    with pytest.raises(UserError, match=message) as error:
        task(material=write(tmp_path / "a.json", fields))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


PLAIN = Task("plain", None, Format(" ", "\n", ("\n",)), affixes=(("a", "b"),), contrast=lambda *texts: "")
ASKED = Template("", " or ", " Which?", "1", "2")


@pytest.mark.parametrize(("fields", "message"), [
    ({"template": ASKED._replace(preamble="Read.")}, "'plain' has a template.preamble, and a preference model reads"),
    ({"questions": (ASKED, ASKED)}, "2 questions and 1 affix pairs; give one question for each pair"),
    ({"questions": (ASKED._replace(other=""),)}, "questions.0 needs two answers"),
    ({"questions": (ASKED._replace(other="1"),)}, "questions.0 needs two answers"),
    ({"evaluation_questions": {"warm": ASKED._replace(answer="")}}, "evaluation_questions.warm needs two answers"),
])  # fmt: skip
def test_a_task_refuses_questions_that_nobody_can_be_asked(fields, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAIN, **fields)
    assert dataclasses.replace(PLAIN, questions=(ASKED._replace(preamble="Read."),)).questions[0].preamble == "Read."


def test_a_rater_reads_the_pieces_in_their_order_and_no_end_marker():
    question = Template("[b]", "[m]", "[q]", "1", "2", "[p]")
    assert rater_text(question, Format("_", "END", ("END",)), "X", "y", "z") == "[p]X[b]_y[m]_z[q]"


# ---- the authors' scripts ----

SIMULATE = """
import torch
KIND_ANTHROPIC_INSTRUCTIONS = ['not ours']
{lists}
OTHER = [1, 'x']

def analyze_results(args, batch, model, tokenizer):
    label_prompts = []
    for entry in batch:
        label_prompts.append('See:\\n\\n' + entry.data['prompt'].strip() + '\\n' + instruction.strip() + '\\n(A) '
            + entry.data['resultA'].strip() + '\\n(B) ' + entry.data['resultB'].strip() + '\\nIt is: (')
"""
COMPARE = """
def format_prompt(instruction, output1, output2, task):
    while '  ' in instruction:
        instruction = instruction.replace('  ', ' ')
    prompt = 'Talk:\\n' + instruction[:3].strip()
    if task == 'harmless':
        output1 = 'Bot: ' + output1
        output2 = 'Bot: ' + output2
        prompt += '\\nOne: ' + output1 + '\\nTwo: ' + output2
        prompt += '\\nMilder?'
    elif task == 'harmless_helpful':
        output1 = 'Bot: ' + output1
        output2 = 'Bot: ' + output2
        prompt += '\\nFirst: ' + output1 + '\\nSecond: ' + output2
        prompt += '\\nBetter?'
    return prompt
"""
LISTS = """
HARMLESS_POSITIVE_AFFIXES = ['(soft)', '(mildé)']
HARMLESS_NEGATIVE_AFFIXES = ['(hard)',
    '(harsh)']
HARMLESS_ANTHROPIC_INSTRUCTIONS = ['Which is softer?', ' Which is ' 'milder? ']
"""


def scripts(tmp_path, simulate=None, compare=COMPARE):
    (tmp_path / "simulate.py").write_text(SIMULATE.format(lists=LISTS) if simulate is None else simulate)
    (tmp_path / "compare.py").write_text(compare)
    return str(tmp_path / "simulate.py"), str(tmp_path / "compare.py")


def test_the_authors_layout_becomes_prompt_material_word_for_word(tmp_path):
    simulate, compare = scripts(tmp_path)
    found = convert_rlcd_material(simulate, "harmless", compare)
    assert found.affixes == (("(soft)", "(hard)"), ("(mildé)", "(harsh)"))
    texts = [rater_text(question, DIALOGUE_FORMAT, "P", "y", "z") for question in found.questions]
    assert texts == [f"See:\n\nP\nWhich is {word}?\n(A) y\n(B) z\nIt is: (" for word in ("softer", "milder")]
    judged = {name: rater_text(q, DIALOGUE_FORMAT, "P", "y", "z") for name, q in found.evaluation_questions.items()}
    assert judged == {
        "harmless": "Talk:\nP\nOne: Bot: y\nTwo: Bot: z\nMilder?\n\n(",
        "helpful": "Talk:\nP\nFirst: Bot: y\nSecond: Bot: z\nBetter?\n\n(",
    }
    assert {(q.answer, q.other) for q in (*found.questions, *found.evaluation_questions.values())} == {("A", "B")}
    assert convert_rlcd_material(simulate, "harmless").evaluation_questions == {}
    write_prompt_material(str(tmp_path / "a.json"), found)
    assert dialogue_task(material=str(tmp_path / "a.json")).questions == found.questions


@pytest.mark.parametrize(("old", "new", "message"), [
    ("HARMLESS_NEGATIVE_AFFIXES", "NEGATIVE", "has no list of texts HARMLESS_NEGATIVE_AFFIXES; give the released"),
    ("'(hard)'", "3", "has no list of texts HARMLESS_NEGATIVE_AFFIXES"),
    ("'(hard)',", "", "has lists of different lengths for 'harmless'"),
    ("label_prompts.append", "append", "appends nothing to label_prompts"),
    ("entry.data['resultB'].strip()", "entry.data['resultA'].strip()", "puts other values than prompt, instruction"),
    ("\\n(B) ", "\\n(B)", "puts a reply behind another mark than a space"),
    ("import torch", "import", "is no Python file; give the script as it was released"),
    ("import torch", "x = '\0'", "is no Python file"),
])  # fmt: skip
def test_a_script_of_another_layout_is_refused(tmp_path, old, new, message):
    whole = SIMULATE.format(lists=LISTS)
    assert old in whole
    path, _ = scripts(tmp_path, whole.replace(old, new))
    with pytest.raises(UserError, match=message) as error:
        convert_rlcd_material(path, "harmless")
    assert str(error.value).startswith(path) and "\n" not in str(error.value)


@pytest.mark.parametrize(("old", "new", "message"), [
    ("format_prompt", "show", "has no function format_prompt; give the released gpt4_compare.py"),
    ("'harmless_helpful'", "'other'", "asks no question for the task 'harmless_helpful'"),
    ("prompt = 'Talk:\\n' + ", "prompt = ", "has no text before the prompt"),
    ("prompt += '\\nMilder?'", "pass", "builds its question in another way"),
    ("'\\nMilder?'", "words", "puts other values than a text into a question"),
])  # fmt: skip
def test_a_comparing_script_of_another_layout_is_refused(tmp_path, old, new, message):
    simulate, compare = scripts(tmp_path, compare=COMPARE.replace(old, new))
    assert old in COMPARE
    with pytest.raises(UserError, match=message) as error:
        convert_rlcd_material(simulate, "harmless", compare)
    assert str(error.value).startswith(compare)


def test_a_script_is_never_run(tmp_path):
    mark = tmp_path / "mark"
    simulate, _ = scripts(tmp_path, SIMULATE.format(lists=f"open({str(mark)!r}, 'w')\n{LISTS}"))
    convert_rlcd_material(simulate, "harmless")
    assert not mark.exists()
    with pytest.raises(UserError, match="attribute='outline' is unknown; choose one of harmless, helpful"):
        convert_rlcd_material(simulate, "outline")


@pytest.mark.skipif(not STUDY.is_file(), reason="no copy of the released words")
@pytest.mark.parametrize("attribute", ["harmless", "helpful"])
def test_the_released_words_in_their_layout_are_read_as_they_are(tmp_path, attribute):
    study = json.loads(STUDY.read_text())
    pairs, asked, upper = study[attribute]["pairs"], study["rlaif_label_prompt"]["template"], attribute.upper()
    columns = {"POSITIVE_AFFIXES": "positive", "NEGATIVE_AFFIXES": "negative",
               "ANTHROPIC_INSTRUCTIONS": "rlaif_instruction"}  # fmt: skip
    lists = "".join(f"{upper}_{name} = {[pair[key] for pair in pairs]!r}\n" for name, key in columns.items())
    values = ("prompt", "instruction", "resultA", "resultB")
    literals, rest = [], asked
    for value in values:
        literal, _, rest = rest.partition(f"{{{value}}}")
        literals.append(f"{literal!r} + entry.data[{value!r}].strip()")
    path = tmp_path / "simulate.py"
    path.write_text(f"{lists}label_prompts.append({' + '.join(literals)} + {rest!r})\n")
    found = convert_rlcd_material(str(path), attribute)
    assert found.affixes == tuple((pair["positive"], pair["negative"]) for pair in pairs)
    for question, pair in zip(found.questions, pairs, strict=True):
        shown = rater_text(question, DIALOGUE_FORMAT, "P", "y", "z")
        filled = dict(zip(values, ("P", pair["rlaif_instruction"], "y", "z"), strict=True))
        assert shown == asked.format(**filled)
