"""What is said of labelled pairs: figures by hand, and a stage whose judge reads the training pairs as they stand."""

import dataclasses

import numpy as np
import pytest

import alignjax as aj
from alignjax.distributed import storage
from alignjax.errors import UserError
from alignjax.labeling.statistics import (
    JudgedPairs,
    Share,
    agreement,
    label_accuracy,
    pair_statistics,
    positive_below,
    share,
)
from alignjax.pipeline.run import run
from alignjax.pipeline.stages.pair_study import label_card, share_text
from tests.test_rated import SIZES, Given, given
from tests.test_wiring import task


def pair(first, second, p, positive=-1, prompt="x"):
    return {"prompt": prompt, "first": first, "second": second, "p": p, "affix": 0, "positive": positive}


ROWS = [
    pair("aaa", "b", 1.0, 0),
    pair("a", "bbbb", 0.25, 1),
    pair("aa", "bb", 0.75, 0),
    pair("a", "b", 0.5, 1),  # the label decides nothing
    pair("a", "b", 0.0),  # by no affix
    pair("a", "b", 1.0, 1),
]
JUDGED = np.array([0.9, 0.4, 0.5, 0.8, 0.6, 0.7])
PAIRS = JudgedPairs(ROWS, JUDGED, dropped=3)


def test_accuracy_counts_pairs_that_neither_calls_equal():
    """Right: the first, the second and the last; wrong: the fifth. The judge ties the third, the label the fourth."""
    found = label_accuracy(PAIRS)
    assert (found.value, found.n) == (0.75, 4)


def test_the_reply_under_the_positive_affix_is_below_where_the_judge_says_so():
    """It stands first in two pairs, of which one ties and none is below; second in three, of which the judge prefers
    the first in two."""
    found = positive_below(PAIRS)
    assert (found.value, found.n) == (2 / 5, 5)
    exchanged = [{**row, "positive": 1 - row["positive"]} if row["positive"] >= 0 else row for row in ROWS]
    assert positive_below(PAIRS._replace(rows=exchanged)).value == 2 / 5  # the first above, the second in one
    swapped = [{**row, "first": row["second"], "second": row["first"], "positive": 1 - row["positive"]} for row in ROWS
               if row["positive"] >= 0]  # fmt: skip
    known = np.array([row["positive"] >= 0 for row in ROWS])
    assert positive_below(JudgedPairs(swapped, 1 - JUDGED[known])).value == 2 / 5  # whatever stands first


def test_the_other_figures_by_hand():
    found = pair_statistics(PAIRS)
    assert (found["pairs"], found["dropped"]) == (6, 3) and found["judge_ties"] == pytest.approx(1 / 6)
    assert found["first_preferred"] == pytest.approx(3.5 / 6)
    assert found["confidence"] == pytest.approx((1 + 0.5 + 0.5 + 0 + 1 + 1) / 6)
    assert found["preferred_characters"] == pytest.approx((3 + 4 + 2 + 1 + 1) / 5)
    assert found["other_characters"] == pytest.approx((1 + 1 + 2 + 1 + 1) / 5)
    assert found["accuracy"]["n"] == 4 and found["positive_below"]["value"] == 2 / 5
    tied = pair_statistics(JudgedPairs([pair("a", "b", 0.5)], np.array([0.5])))
    assert tied["preferred_characters"] is None and tied["accuracy"]["value"] is None and tied["dropped"] is None


def test_a_share_has_its_exact_interval_and_a_share_of_nothing_has_none():
    assert share(np.array([True, False, False])) == pytest.approx((1 / 3, 0.008403759, 0.905700642, 3), abs=1e-6)
    assert share(np.array([], bool)) == Share(None, 0.0, 1.0, 0)
    assert share_text(share(np.array([True, False, False]))) == "0.333 [0.008, 0.906]"
    assert share_text(Share(None, 0.0, 1.0, 0)) == "-"


def test_two_labels_agree_on_the_reply_in_whatever_order_it_stands():
    one = [pair("a", "b", 1.0), pair("c", "d", 0.0), pair("e", "f", 0.9), pair("g", "h", 0.5), pair("i", "j", 1.0)]
    other = [
        pair("b", "a", 0.2),  # "a" again
        pair("d", "c", 0.1),  # "c", not "d"
        pair("e", "f", 0.6),
        pair("g", "h", 1.0),  # a tie of the first
        pair("i", "j", 1.0, prompt="another"),
    ]
    assert (agreement(one, other).value, agreement(one, other).n) == (2 / 3, 3)
    assert agreement(one, other) == agreement(other, one) and agreement(one, one).value == 1.0


def test_the_card_has_a_row_for_every_way_to_label_and_what_they_agree_on():
    arms = {"RLCD": PAIRS, "Rescore": JudgedPairs(ROWS[:2], JUDGED[:2])}
    card = label_card(arms, "the task's exact oracle 'o'")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in card.text.splitlines() if line[:1] == "|"]
    assert rows[0] == [
        "labels", "pairs", "dropped", "accuracy", "ties", "positive below", "P(first)", "confidence", "preferred",
        "other",
    ]  # fmt: skip
    assert rows[2] == [
        "RLCD", "6", "3", "0.750 [0.194, 0.994]", "0.17", "0.400 [0.053, 0.853]", "0.58", "0.67", "2.20", "1.20",
    ]  # fmt: skip
    assert rows[3][:4] == ["Rescore", "2", "-", "1.000 [0.158, 1.000]"]
    assert rows[4][:3] == ["agreement", "RLCD", "Rescore"] and rows[6] == ["RLCD", "-", "1.000 [0.158, 1.000]"]
    assert "The judge is the task's exact oracle 'o'." in card.text and card.text.startswith("## The labels\n")
    assert card.numbers["arms"]["RLCD"]["accuracy"]["value"] == 0.75 and not card.pictures
    assert card.numbers["agreement"]["RLCD"]["Rescore"]["n"] == 2
    apart = label_card({"a": PAIRS, "b": JudgedPairs([pair("y", "z", 1.0)], np.array([1.0]))}, "j")
    assert "agreement" not in apart.text  # no pair is in both


@dataclasses.dataclass(frozen=True)
class Noted:
    """A judge that notes what it is asked, and says that the first reply is the better one in every second pair."""

    asked: tuple = ()

    def check(self, context):
        pass

    def programs(self, context, name, sizes):
        return ()

    def open(self, context, programs, sizes):
        return lambda prompts, first, second: np.array(
            [1.0 if x < y else 0.0 for x, y in zip(first, second, strict=True)]
        )

    def describe(self):
        return "the alphabet"


def found_pairs(arms, judge):
    """A function of one's own: it keeps what it gets."""
    rows = {name: [dict(row) for row in pairs.rows] for name, pairs in arms.items()}
    judged = {name: pairs.judged.tolist() for name, pairs in arms.items()}
    dropped = {name: pairs.dropped for name, pairs in arms.items()}
    return aj.Finding(f"{judge}\n", {}, {"rows": rows, "judged": judged, "dropped": dropped})


def study(**stages):
    return aj.Experiment(task(), stages, mesh=aj.Mesh(data=-1))


def test_the_judge_reads_the_training_pairs_in_their_order(tmp_path):
    whole = study(
        a=given(9), b=given(4, salt=" b"),
        labels=aj.PairStudy(judge=Noted(), sizes=SIZES, pairs={"A": "a", "B": "b"}, function=found_pairs),
        card=aj.PairStudy(judge=aj.Oracle("longer"), sizes=SIZES, pairs={"A": "a"}),
    )  # fmt: skip
    run(whole, tmp_path)
    numbers = storage.read_json(tmp_path / "labels" / "numbers.json")
    for name, stage in {"A": "a", "B": "b"}.items():
        rows = numbers["rows"][name]
        assert sorted(row["prompt"] for row in rows) == sorted(row[0] for row in whole.stages[stage].rows)
        assert numbers["judged"][name] == [1.0 if row["first"] < row["second"] else 0.0 for row in rows]
    assert numbers["dropped"] == {"A": 2, "B": 2}  # of the stages' own figures
    card = storage.read_json(tmp_path / "card" / "numbers.json")["arms"]["A"]
    rows = [row for row in numbers["rows"]["A"] if len(row["first"]) != len(row["second"])]
    right = [(len(row["first"]) > len(row["second"])) == (row["p"] > 0.5) for row in rows]
    assert (card["accuracy"]["value"], card["accuracy"]["n"]) == (pytest.approx(np.mean(right)), len(right))
    assert 0 < np.mean(right) < 1
    report = (tmp_path / "report.md").read_text()
    assert "## The labels" in report and "the task's exact oracle 'longer'" in report and "the alphabet" in report


def test_a_study_of_nothing_or_by_nobody_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"PairStudy\.pairs is empty; name a stage of pairs"):
        aj.PairStudy(judge=aj.Oracle("longer"), sizes=SIZES, pairs={})
    wrong = aj.PairStudy(judge=aj.Oracle("nobody"), sizes=SIZES, pairs={"A": "a"})
    with pytest.raises(UserError, match="labels: task 'words' has no oracle 'nobody'; it has longer"):
        run(study(a=Given(()), labels=wrong), tmp_path / "w")
    assert not (tmp_path / "w").exists()
