"""Damaged lines of every data format: a seeded sample of ``make fuzz``, and the laws of the fuzz itself."""

import json
import random

import pytest

from alignjax.errors import UserError
from tests.fuzz import lines, outcomes
from tests.fuzz.json_mutations import WHOLE, entries, mutations
from tests.fuzz.outcomes import AGREED, REFUSED, Disagreement, Input, outcome

SAMPLE, SEED = 1000, 0


def test_a_damaged_line_is_read_as_meant_or_refused_in_one_line(tmp_path):
    found = {
        damaged.name: outcome(damaged)
        for damaged in random.Random(SEED).sample(list(lines.inputs(tmp_path, SEED)), SAMPLE)
    }
    assert {name: result for name, result in found.items() if result not in (AGREED, REFUSED)} == {}
    assert all(list(found.values()).count(result) > SAMPLE / 10 for result in (AGREED, REFUSED))


def test_every_entry_is_changed():
    document = {"a": [1, {"b": "x"}], "c": None}
    assert [path for path, _ in entries(document)] == [("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",)]
    changed = dict(mutations(document, {("a", 1, "b"): ["y"]}))
    assert json.loads(changed["a.0=removed"]) == {"a": [{"b": "x"}], "c": None}
    assert json.loads(changed["a.1.b=y"]) == {"a": [1, {"b": "y"}], "c": None}
    assert "1e400" in changed["c=1e400"] and json.loads(changed["c=1e400"])["c"] == float("inf")
    assert [name for name, text in changed.items() if text == json.dumps(document)] == [WHOLE]


def raising(error):
    def attempt():
        raise error

    return attempt


@pytest.mark.parametrize(("attempt", "result"), [
    (lambda: None, AGREED),
    (raising(UserError("/a, line 2 is wrong; correct it")), REFUSED),
    (raising(UserError("/b, line 2 is wrong; correct it")), "REFUSES with a line that does not name '/a'"),
    (raising(UserError("/a, line 2 is wrong")), "REFUSES with a line that is no short line"),
    (raising(UserError("/a, line 2\nis wrong; correct it")), "REFUSES with a line that is no short line"),
    (raising(KeyError("x")), "RAISES KeyError at test_fuzz.py"),
    (raising(Disagreement("2 is read")), "DISAGREES: 2 is read"),
    (lambda: bytearray(2**40), "RAISES MemoryError"),
], ids=range(8))  # fmt: skip
def test_all_else_is_told(attempt, result):
    assert outcome(Input("", ("/a", "line 2"), attempt)).startswith(result)


def test_what_is_whole_must_not_be_refused():
    refused = Input("", (), raising(UserError("it is wrong; correct it")))
    assert outcome(refused) == REFUSED and outcome(refused._replace(whole=True)).startswith("REFUSES what is whole")


def test_time_is_bounded(monkeypatch):
    monkeypatch.setattr(outcomes, "SECONDS", 1)

    def attempt():
        while True:
            pass

    assert outcome(Input("", (), attempt)) == "TAKES more than 1 s"
