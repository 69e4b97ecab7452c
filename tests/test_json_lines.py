"""Files of a user's texts: marks, line ends, halves of characters, and the forms of a comparison."""

import gzip
import json

import pytest

from alignjax.errors import UserError
from alignjax.pipeline.stages import LoadPairs
from alignjax.tasks import dialogue, stories, summary
from alignjax.tasks.json_lines import (
    Comparison,
    read_comparison,
    read_demonstration,
    read_prompts,
    read_rows,
    read_text_file,
)
from alignjax.training import data
from tests.test_summary import given

PAIR = {"prompt": "A cat", "first": " sat.", "second": " flew.", "p": 1.0}
CHOSEN = {"prompt": "A cat", "chosen": " sat.", "rejected": " flew."}
COMPARED = Comparison("A cat", " sat.", " flew.", 1.0)
HALF = "She \ud83d ran"
OPENING = {"prompt": "One day", "story": 3}
TLDR = {"info": {"post": "I ran", "title": None}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 1}
HH = {"chosen": "\n\nHuman: A\n\nAssistant: b", "rejected": "\n\nHuman: A\n\nAssistant: c"}


def asked(text):
    return [{"role": "user", "content": text}]


def said(text):
    return [{"role": "assistant", "content": text}]


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def load_pairs(tmp_path, path, **fields):
    context, stage = given(tmp_path, path=str(path), **fields)
    stage.check(context)
    return stage.rows(context)


def texts_of(found):
    """Returns every text of a nest of lists, tuples and dicts."""
    if isinstance(found, str):
        return [found]
    parts = found.values() if isinstance(found, dict) else found if isinstance(found, list | tuple) else ()
    return [text for part in parts for text in texts_of(part)]


def read_tldr(path):
    return read_rows(path, "comparisons", summary.read_tldr_comparison)


READERS = {
    "pairs": (lambda path: read_rows(path, "comparisons", LoadPairs(path).read), PAIR, "second"),
    "hh": (lambda path: read_rows(path, "dialogues", dialogue.read_hh_comparison), HH, "chosen"),
    "openings": (stories.read_openings, OPENING, "prompt"),
    "posts": (summary.read_posts, {"post": "I ran"}, "post"),
    "replies": (
        lambda path: read_rows(path, "replies", read_demonstration),
        {"prompt": "A cat", "completion": "sat"}, "completion",
    ),
    "prompts": (read_prompts, {"prompt": "One day"}, "prompt"),
}  # fmt: skip
every_reader = pytest.mark.parametrize(("read", "row", "field"), READERS.values(), ids=READERS)


@every_reader
def test_half_a_character_is_refused_by_its_line(tmp_path, read, row, field):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(row, row, {**row, field: f"{row[field]}{HALF}"}))
    with pytest.raises(UserError) as error:
        read(str(path))
    assert str(error.value).startswith(f"{path}, line 3 has half of a surrogate pair") and "\n" not in str(error.value)
    path.write_text(lines(row, {**row, field: f"{row[field]} \ud83d\ude00"}))  # a whole pair is one character
    assert "😀" in str(read(str(path)))


def test_half_a_character_is_refused_before_anything_runs(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(*[PAIR] * 7, {**PAIR, "first": HALF}))
    with pytest.raises(UserError, match=r"pairs: .*a\.jsonl, line 8 has half of a surrogate pair"):
        load_pairs(tmp_path, path)


@every_reader
@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-32"])
def test_a_byte_order_mark_is_no_text(tmp_path, read, row, field, codec):
    (tmp_path / "plain.jsonl").write_text(lines(row))
    (tmp_path / "marked.jsonl").write_bytes(lines(row).encode(codec))
    (tmp_path / "marked.jsonl.gz").write_bytes(gzip.compress(lines(row).encode(codec)))
    plain = read(str(tmp_path / "plain.jsonl"))
    assert read(str(tmp_path / "marked.jsonl")) == read(str(tmp_path / "marked.jsonl.gz")) == plain
    assert "\ufeff" not in str(plain)


@every_reader
@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c"])
def test_a_line_ends_at_its_end_alone(tmp_path, read, row, field, separator):
    path = tmp_path / "a.jsonl"
    text = json.dumps({**row, field: f"{row[field]} x{separator}y"}, ensure_ascii=False)
    path.write_text(text + "\r\n" + json.dumps(row) + "\n", encoding="utf-8", newline="")
    found = read(str(path))
    assert f"x{separator}y" in "".join(texts_of(found))


@every_reader
@pytest.mark.parametrize(("codec", "bad"), [("utf-8", b"\xff"), ("utf-8", b"\xe2\x98"), ("utf-16", b"\x00\xdc")])
def test_a_byte_that_is_no_text_is_named_by_its_line(tmp_path, read, row, field, codec, bad):
    data = lines(row, row).encode(codec) + bad + lines(row).encode(codec)
    (tmp_path / "a.jsonl").write_bytes(data)
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    for name in ("a.jsonl", "a.jsonl.gz"):
        with pytest.raises(UserError, match=rf"{name} cannot be read \(line 3 is not in {codec}"):
            read(str(tmp_path / name))


@pytest.mark.parametrize(("reader", "change"), [
    ("pairs", {"p": "long " * 10_000}), ("pairs", {"p": json.loads("[" * 500 + "]" * 500)}),
    ("openings", {"story": "long " * 10_000}), ("openings", {"story": [1] * 10_000}),
])  # fmt: skip
def test_a_long_value_makes_no_long_message(tmp_path, reader, change):
    read, row, _ = READERS[reader]
    (tmp_path / "a.jsonl").write_text(lines(row, row | change))
    with pytest.raises(UserError, match="line 2 has") as error:
        read(str(tmp_path / "a.jsonl"))
    assert len(str(error.value)) < len(str(tmp_path)) + 200


@pytest.mark.parametrize(("read", "row", "change", "message"), [
    (stories.read_openings, OPENING, {"story": True}, "'story' True, which is no whole number"),
    (stories.read_openings, OPENING, {"story": 6.5}, "'story' 6.5, which is no whole number"),
    (summary.read_posts, {"post": "I ran"}, {"title": {"a": 1}}, "'title' that is no text"),
    (summary.read_posts, {"post": "I ran"}, {"title": 0}, "'title' that is no text"),
    (read_tldr, TLDR, {"choice": True}, "a 'choice' that is neither 0 nor 1"),
    (read_tldr, TLDR, {"info": {"post": "I ran", "title": ["a"]}}, "'title' that is no text"),
])  # fmt: skip
def test_a_value_of_another_type_is_not_taken_for_one(tmp_path, read, row, change, message):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(row, row | change))
    with pytest.raises(UserError, match=f"line 2 has .*{message}; correct it"):
        read(str(path))


def test_prompts_of_a_text_file_are_its_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\ufeffOne day\u2028a cat\r\n\n{A dog ran\n", encoding="utf-8", newline="")
    assert read_prompts(str(path)) == ["One day\u2028a cat", "{A dog ran"]
    path.write_text(" \n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(str(path))
    assert read_text_file(str(path), "text") == " \n"


@pytest.mark.parametrize("name", ["array.json", "a.csv", "prompts"])
def test_a_name_says_what_a_file_of_prompts_is(tmp_path, name):
    (tmp_path / name).write_text('[{"prompt": "A cat"}]\n')
    with pytest.raises(UserError, match=r'name it \.jsonl, with {"prompt": text} on each line, or \.txt'):
        read_prompts(str(tmp_path / name))


@every_reader
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_is_refused_by_its_form(tmp_path, read, row, field, indent):
    path = tmp_path / "array.jsonl"
    path.write_text(json.dumps([row, row], indent=indent))
    with pytest.raises(UserError, match=r"array\.jsonl is a JSON array; give a JSON-lines file of \w+: one object a"):
        read(str(path))


@pytest.mark.parametrize("row", [
    PAIR, CHOSEN,
    {**CHOSEN, "chosen": said(" sat."), "rejected": said(" flew.")},
    {**CHOSEN, "chosen": asked("A cat") + said(" sat."), "rejected": asked("A cat") + said(" flew.")},
    {"prompt": asked("A cat"), "chosen": said(" sat."), "rejected": said(" flew.")},
    {"prompt": asked("A cat"), "chosen": asked("A cat") + said(" sat."), "rejected": " flew."},
    {**CHOSEN, "score_chosen": 8.0, "prompt_id": "3"},
])  # fmt: skip
def test_a_comparison_is_read_in_either_form(tmp_path, row):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(PAIR, row))
    context, stage = given(tmp_path, path=str(path))
    stage.check(context)
    assert stage.run(context, ()) == {"pairs": 2, "skipped": 0, "different_prompts": 1}
    assert data.read_pairs(tmp_path / "pairs" / "data", "train") == [{**PAIR, "affix": -1, "positive": -1}] * 2
    assert read_comparison(row) == COMPARED


FORMS = r"a comparison is \{prompt, first, second, p\} or \{prompt, chosen, rejected\}"


@pytest.mark.parametrize(("row", "message"), [
    ({"prompt": "x"}, f"line 2 has no 'p'; {FORMS}; correct it"),
    ({**PAIR, "first": None, "chosen": "x"}, "line 2 has 'first' without a text"),
    (HH, f"line 2 has no 'prompt'; {FORMS}"),
    ({"prompt": "x", "chosen": "y"}, f"line 2 has no 'rejected'; {FORMS}"),
    ({**CHOSEN, "chosen": ""}, "line 2 has 'chosen' without a text"),
    ({**CHOSEN, "chosen": []}, "line 2 has 'chosen' that is no list of messages"),
    ({**CHOSEN, "chosen": ["sat"]}, "line 2 has 'chosen' that is no list of messages"),
    ({**CHOSEN, "chosen": said("")}, "line 2 has 'chosen' with a message without a text"),
    ({**CHOSEN, "chosen": [{"role": "assistant"}]}, "line 2 has 'chosen' with a message without a text"),
    ({**CHOSEN, "chosen": asked("A cat")}, "line 2 has 'chosen' that is no message of the assistant"),
    ({**CHOSEN, "rejected": asked("A dog") + said("ran")}, "line 2 has 'rejected' that is no message of the assistant"),
    ({**CHOSEN, "prompt": asked("A cat") + said("b") + asked("c")}, "line 2 has a 'prompt' of other messages than one"),
    ({**CHOSEN, "prompt": said("A cat")}, "line 2 has a 'prompt' of other messages than one of the user"),
    ({**CHOSEN, "prompt": ""}, "line 2 has 'prompt' without a text"),
])  # fmt: skip
def test_a_comparison_of_neither_form_is_named_with_the_forms(tmp_path, row, message):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(CHOSEN, row))
    with pytest.raises(UserError, match=message):
        load_pairs(tmp_path, path)


def test_malformed_comparisons_are_counted_where_that_is_asked(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(lines(PAIR, {"prompt": "x"}, CHOSEN) + "{\n")
    with pytest.raises(UserError, match=r"pairs: .*a\.jsonl, line 2 has no 'p'"):
        load_pairs(tmp_path, path)
    context, stage = given(tmp_path, path=str(path), skip_malformed=True)
    with pytest.warns(UserWarning, match=r"a\.jsonl: 2 of 4 lines are malformed and were left out; line 2 has no 'p'"):
        figures = stage.run(context, ())
    assert figures == {"pairs": 2, "skipped": 0, "different_prompts": 1, "malformed": 2}
    assert set(figures) == set(stage.meanings)
