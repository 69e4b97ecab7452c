"""Labels by a rater's answers: RLAIF, RLCD's replies labelled again, and pairs mixed."""

import dataclasses
import itertools
import zlib
from collections import Counter
from typing import Any, ClassVar

import numpy as np
import pytest
from scipy import special, stats

import alignjax as aj
from alignjax.distributed import storage
from alignjax.errors import RunAgain, UserError
from alignjax.fields import Kind
from alignjax.labeling.method import Labeler
from alignjax.labeling.rated import RLAIF, Rating
from alignjax.labeling.rlcd import RLCD
from alignjax.pipeline.experiment import Context, Exposure, order
from alignjax.pipeline.run import run
from alignjax.pipeline.stages import relabel
from alignjax.tasks.dialogue_format import contrast_dialogue
from alignjax.tasks.task import Template
from alignjax.training import data
from tests.test_labeling import ONE, PLAIN, TASK, THREE, Writer, chance, moody, polarity
from tests.test_raters import ASKED, by_hand
from tests.test_wiring import WORDS, WRITING, Random, mesh, task

QUESTIONS = tuple(Template("", " or", f" question {i}", " yes", " no") for i in range(4))
DIALOGUES = dataclasses.replace(TASK, questions=QUESTIONS)  # four affix pairs


class Rater:
    """A Rater whose log-odds are a pure function of what it is asked; it records that."""

    def __init__(self, log_odds):
        self.log_odds, self.calls = log_odds, []

    def __call__(self, prompts, replies, others, questions):
        self.calls.append(list(zip(prompts, replies, others, questions, strict=True)))
        return np.array([self.log_odds(*asked) for asked in self.calls[-1]])

    @property
    def asked(self):
        return [asked for call in self.calls for asked in call]


def plainly(prompt, number, attempt):
    """A reply that passes the filter and names what was asked."""
    return f" {zlib.crc32(prompt.encode())} {number} {attempt}\n\nHuman:"


def by_chance(prompt, first, second, question):
    return 6 * chance(first, second, question) - 3


def rlaif(writer, rater, prompts, numbers, seed=0, used=DIALOGUES, **options):
    """Returns the Labels of RLAIF."""
    return RLAIF(judge=None, **options).label(Labeler(writer, used, rater, seed), prompts, numbers)


def test_a_label_is_the_rater_s_probability_that_the_first_reply_is_better():
    """The first is the reply of side 0, attempts 0 to 4; both are written under the plain prompt."""
    writer, rater = Writer(plainly), Rater(by_chance)
    pairs, tries = rlaif(writer, rater, PLAIN, range(60))
    assert tries == 120 and len(rater.asked) == 60 and {prompt for prompt, *_ in writer.asked} == set(PLAIN)
    for number, (pair, asked) in enumerate(zip(pairs, rater.asked, strict=True)):
        assert pair.prompt == PLAIN[number] and pair.positive == -1
        assert pair.first.endswith(f"{number} 0") and pair.second.endswith(f"{number} 5")
        assert asked == (pair.prompt, pair.first, pair.second, QUESTIONS[pair.affix])
        assert pair.p == pytest.approx(special.expit(by_chance(*asked)))


def test_which_question_is_drawn_depends_on_seed_and_number_alone_and_is_stored():
    def affixes(numbers, seed=0, writer=plainly):
        return [pair.affix for pair in rlaif(Writer(writer), Rater(by_chance), [ONE] * len(numbers), numbers, seed)[0]]

    whole = affixes(range(2000))
    assert affixes([7, 3, 1999]) == [whole[i] for i in (7, 3, 1999)]
    assert affixes(range(50), writer=lambda prompt, n, attempt: f" other {n} {attempt}\n\nHuman:") == whole[:50]
    assert affixes(range(50), seed=1) != whole[:50]
    counts = Counter(whole)
    assert set(counts) == set(range(4)) and stats.chisquare(list(counts.values())).pvalue > 1e-4


def test_rlcd_and_rlaif_of_one_seed_draw_the_same_affix_for_a_prompt():
    """Rescored and rated arms of one table differ in their replies and labels, not in what is asked."""
    contrasted = RLCD().label(Labeler(Writer(plainly), DIALOGUES, None, 5), PLAIN, range(60))
    rated = rlaif(Writer(plainly), Rater(by_chance), PLAIN, range(60), 5)
    assert [pair.affix for pair in contrasted.pairs] == [pair.affix for pair in rated.pairs]


def test_results_do_not_depend_on_how_prompts_are_dealt_to_chunks():
    whole, tries = rlaif(Writer(moody), Rater(by_chance), PLAIN, range(60), 5)
    assert 30 < len(whole) < 60 and tries > 120
    pieces = [range(a, b) for a, b in itertools.pairwise([0, 1, 20, 47, 60])]
    parts = [rlaif(Writer(moody), Rater(by_chance), [PLAIN[i] for i in piece], piece, 5) for piece in pieces]
    assert [pair for part in parts for pair in part.pairs] == whole and sum(part.tries for part in parts) == tries


@pytest.mark.parametrize("prompt", [ONE, THREE])
def test_positive_writes_both_replies_under_the_positive_affix_of_the_question(prompt):
    """Earlier turns have the opposite polarity. The rater and the dataset see the plain prompt."""
    writer, rater = Writer(plainly), Rater(by_chance)
    pairs, _ = rlaif(writer, rater, [prompt] * 40, range(40), positive=True)
    read = {n: {x for x, number, _ in writer.asked if number == n} for n in range(40)}
    for number, (pair, asked) in enumerate(zip(pairs, rater.asked, strict=True)):
        plus, minus = TASK.affixes[pair.affix]
        assert read[number] == {contrast_dialogue(prompt, plus, minus)}
        assert polarity(next(iter(read[number]))) == (pair.affix, 0)
        assert asked[0] == pair.prompt == prompt and asked[3] == QUESTIONS[pair.affix] and pair.positive == -1
    assert {pair.affix for pair in pairs} == set(range(4))
    attempts = {attempt for *_, attempt in writer.asked}
    assert attempts == {0, 5}  # two replies of their own randomness


def test_pairs_that_the_rater_calls_equal_are_left_out():
    ties = Rater(lambda prompt, first, second, question: 0.0 if chance(first) < 0.5 else 1.0)
    pairs, tries = rlaif(Writer(plainly), ties, PLAIN, range(60))
    assert 0 < len(pairs) < 60 and tries == 120 and all(pair.p == pytest.approx(special.expit(1.0)) for pair in pairs)


@pytest.mark.parametrize(("log_odds", "soft"), [(2.0, 0.8807970779778823), (-0.5, 0.3775406687981454), (np.inf, 1.0)])
def test_labels_are_soft_or_hard(log_odds, soft):
    rater = Rater(lambda *asked: log_odds)
    for hard, want in ((False, soft), (True, float(log_odds > 0))):
        pairs, _ = rlaif(Writer(plainly), rater, PLAIN[:8], range(8), rating=Rating(hard=hard))
        assert [pair.p for pair in pairs] == pytest.approx([want] * 8)


def test_both_orders_are_averaged_as_log_odds():
    rater = Rater(by_chance)
    pairs, _ = rlaif(Writer(plainly), rater, PLAIN[:20], range(20), rating=Rating(both_orders=True))
    for pair in pairs:
        x, y, z, question = pair.prompt, pair.first, pair.second, QUESTIONS[pair.affix]
        assert pair.p == pytest.approx(special.expit((by_chance(x, y, z, question) - by_chance(x, z, y, question)) / 2))


def test_every_question_is_the_mean_of_probabilities_and_asks_each_once():
    """Two of the four questions are one and the same, which counts once."""
    used = dataclasses.replace(DIALOGUES, questions=(*QUESTIONS[:3], QUESTIONS[0]))
    rater = Rater(lambda prompt, first, second, question: 4.0 * by_chance(prompt, first, second, question))
    pairs, _ = rlaif(Writer(plainly), rater, PLAIN[:20], range(20), used=used, rating=Rating(every_question=True))
    assert len(rater.asked) == 60 and {asked[3] for asked in rater.asked} == set(QUESTIONS[:3])
    for pair in pairs:
        odds = [4 * by_chance(pair.prompt, pair.first, pair.second, question) for question in QUESTIONS[:3]]
        assert pair.p == pytest.approx(np.mean(special.expit(odds)))
        assert abs(pair.p - special.expit(np.mean(odds))) > 1e-6  # another number


def test_without_a_pair_nobody_is_asked():
    rater = Rater(by_chance)
    assert rlaif(Writer(lambda *asked: "cut"), rater, PLAIN, range(60), attempts=2) == ([], 240) and not rater.calls


def test_a_task_without_questions_is_refused():
    with pytest.raises(UserError, match=r"^task 'sandbox-harmless' has no questions to ask a rater; give it one for"):
        RLAIF(None).check(dataclasses.replace(TASK, questions=()))
    RLAIF(RATER).check(DIALOGUES)
    with pytest.raises(UserError, match=r"RLAIF\.attempts=0 must be in"):
        RLAIF(None, attempts=0)


def test_rlcd_says_which_reply_was_written_under_the_positive_affix():
    writer = Writer(lambda prompt, number, attempt: f" {polarity(prompt)[1]}\n\nHuman:")
    pairs, _ = RLCD().label(Labeler(writer, TASK, None, 0), [ONE] * 200, range(200))
    for pair in pairs:
        replies = pair.first, pair.second
        assert (replies[pair.positive], replies[1 - pair.positive]) == ("0", "1") and pair.p == 1.0 - pair.positive
    assert {pair.positive for pair in pairs} == {0, 1}


# the stages


def contrast(prompt, last, earlier):
    return f"{prompt}{last}"


def asked_task(**changes):
    return task(affixes=((" red", " blue"), (" one", " two"), (" yes", " no")), contrast=contrast, questions=ASKED,
                **changes)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Given:
    """A stage whose pairs are given, with others held out that nobody may read."""

    rows: tuple[tuple[Any, ...], ...]  # prompt, first, second, p, affix, positive
    makes: ClassVar[Kind] = Kind.PAIRS
    meanings: ClassVar[dict] = {}
    held_out: ClassVar[float] = 0.5

    def network(self, context):
        return None

    def exposure(self, context):
        return Exposure(
            trained_against=frozenset({"writer"}), fitted=frozenset({f"given {zlib.crc32(str(self.rows).encode())}"})
        )

    def check(self, context):
        pass

    def programs(self, context):
        return ()

    def run(self, context, programs):
        rows = [dict(zip(data.PAIR_FEATURES, row, strict=True)) for row in self.rows]
        hidden = [{**rows[0], "prompt": "hidden"}] * 3
        data.write_pairs(context.folder / data.PAIR_DATA, {"train": rows, "held_out": hidden}, {})
        return {"dropped": 2}


def given(count, salt="", **columns):
    """Returns a stage of pairs of random words; every third has p = 0 and every fifth is soft."""
    rng = np.random.default_rng(zlib.crc32(salt.encode()))
    texts = [[" ".join(rng.choice(WORDS, rng.integers(1, 5))) for _ in range(3)] for _ in range(count)]
    labels = [0.75 if i % 5 == 4 else float(i % 3 > 0) for i in range(count)]
    rows = [(f"{x}{salt} {i}", y, z, labels[i], i % 3, i % 2) for i, (x, y, z) in enumerate(texts)]
    names = list(data.PAIR_FEATURES)
    return Given(tuple(tuple(columns.get(name, value) for name, value in zip(names, row, strict=True)) for row in rows))


def pairs_of(folder, stage, split="train"):
    return sorted(data.read_pairs(folder / stage / "data", split), key=lambda row: row["prompt"])


def experiment(**stages):
    return aj.Experiment(asked_task(), {"base": Random(0), "other": Random(1), **stages}, mesh=aj.Mesh(data=-1))


RATER, SIZES = aj.LanguageModelRater("other"), aj.JudgeSizes(batch=8, prompt=8, reply=8)


def network_of(stage):
    """The network of a Random stage, as the referee of raters takes it."""
    from alignjax.models.build import build
    from tests.test_wiring import MODEL

    return build(MODEL), stage.params(), None


@pytest.fixture(scope="module")
def relabeled(tmp_path_factory):
    """RLCD's pairs, one of them of empty replies, labelled again by the network of ``other``."""
    folder = tmp_path_factory.mktemp("rated")
    pairs = given(20)
    pairs = Given((*pairs.rows, ("empty", "", "", 1.0, 0, 1)))
    label = aj.Label(generator="base", method=aj.RLAIF(RATER), split="train", prompts=10, writing=WRITING)
    whole = experiment(pairs=pairs, again=aj.Relabel(judge=RATER, sizes=SIZES, pairs="pairs"), rlaif=label)
    run(whole, folder)
    return whole, folder


def test_relabelled_pairs_have_the_answer_to_the_question_of_their_own_affix(relabeled):
    """Affix, which reply was positive, and the order of the replies stay; the labels are new."""
    network, before = network_of(Random(1)), pairs_of(relabeled[1], "pairs")
    after = pairs_of(relabeled[1], "again")
    assert len(after) == 20 and [row["prompt"] for row in after] == [x["prompt"] for x in before if x["first"]]
    for old, new in zip([row for row in before if row["first"]], after, strict=True):
        assert {**old, "p": 0} == {**new, "p": 0}
        odds = by_hand(network, new["prompt"], new["first"], new["second"], ASKED[new["affix"]])
        assert new["p"] == pytest.approx(special.expit(odds), abs=2e-4)
    assert {row["affix"] for row in after} == {0, 1, 2} and {row["positive"] for row in after} == {0, 1}


def test_pairs_of_equal_replies_are_dropped_and_counted(relabeled):
    figures = storage.read_json(relabeled[1] / "again" / "stage.json")["figures"]
    assert (figures["pairs"], figures["dropped"]) == (20, 1) and set(figures) == set(aj.Relabel.meanings)


def test_rlaif_asks_the_stage_that_it_names_and_not_the_generator(relabeled):
    rows = pairs_of(relabeled[1], "rlaif")
    assert len(rows) > 5
    for row in rows:
        odds = by_hand(network_of(Random(1)), row["prompt"], row["first"], row["second"], ASKED[row["affix"]])
        assert row["p"] == pytest.approx(special.expit(odds), abs=2e-4) and row["positive"] == -1
    other = by_hand(network_of(Random(0)), rows[0]["prompt"], rows[0]["first"], rows[0]["second"], ASKED[0])
    assert abs(special.expit(other) - rows[0]["p"]) > 1e-3


def test_pairs_that_do_not_name_their_affix_are_refused_in_one_line(tmp_path):
    for affix in (-1, 3):
        whole = experiment(pairs=given(3, affix=affix), again=aj.Relabel(judge=RATER, sizes=SIZES, pairs="pairs"))
        with pytest.raises(UserError) as error:
            run(whole, tmp_path / f"w{affix}")
        assert str(error.value) == (
            "again: the pairs of 'pairs' do not say which affix made them; name a Label stage by RLCD or RLAIF"
        )
        assert not (tmp_path / f"w{affix}" / "again").exists()


def test_a_relabelling_goes_on_after_its_last_complete_chunk(relabeled, tmp_path, monkeypatch):
    """Ended in its second chunk of 8 pairs, it asks the rest alone and writes the same pairs."""
    whole = experiment(pairs=relabeled[0].stages["pairs"], again=relabeled[0].stages["again"])
    monkeypatch.setattr(relabel, "in_chunks", lambda context, n, size, *rest: in_chunks(context, n, 8, *rest))
    from alignjax.pipeline.stages.chunks import in_chunks

    sizes, probabilities = [], Rating.probabilities

    def ended(rating, rater, used, pairs, asked):
        sizes.append(len(pairs))
        if len(sizes) == 2:
            raise RunAgain("ended")
        return probabilities(rating, rater, used, pairs, asked)

    monkeypatch.setattr(Rating, "probabilities", ended)
    with pytest.raises(RunAgain):
        run(whole, tmp_path)
    run(whole, tmp_path)
    assert sizes == [8, 8, 8, 5]
    assert pairs_of(tmp_path, "again") == pairs_of(relabeled[1], "again")


@pytest.mark.parametrize(("share", "wanted"), [(0.3, 15), (0.2, 9)])
def test_a_mixture_keeps_the_first_and_draws_its_share_of_the_second_once(tmp_path, share, wanted):
    """35 pairs are mixed: 15 more are 30% exactly, and 9 of 44 are the nearest to 20%."""
    stages = {"a": given(35), "b": given(40, salt=" b"), "mixed": aj.MixPairs(first="a", second="b", share=share)}
    run(experiment(**stages), tmp_path)
    first, second, mixed = (pairs_of(tmp_path, name) for name in ("a", "b", "mixed"))
    drawn = [row for row in mixed if row in second]
    assert [row for row in mixed if row in first] == first and len(mixed) == 35 + wanted
    assert len({row["prompt"] for row in drawn}) == len(drawn) == wanted
    figures = storage.read_json(tmp_path / "mixed" / "stage.json")["figures"]
    assert (figures["pairs"], figures["dropped"]) == (35 + wanted, 40 - wanted)


def test_a_mixture_depends_on_its_seed_and_is_refused_where_pairs_are_too_few(tmp_path):
    mixed = aj.MixPairs(first="a", second="b", share=0.5)
    stages = {"a": given(8), "b": given(40, salt=" b"), "one": mixed, "two": dataclasses.replace(mixed, seed=1)}
    run(experiment(**stages), tmp_path / "w")
    assert pairs_of(tmp_path / "w", "one") != pairs_of(tmp_path / "w", "two")
    stages = {"a": given(8), "b": given(7, salt=" b"), "one": mixed}
    with pytest.raises(UserError, match=r"^one: share=0\.5 needs 8 pairs of 'b', which has 7; lower the share$"):
        run(experiment(**stages), tmp_path / "v")
    for share in (1.0, -0.1):
        with pytest.raises(UserError, match=r"MixPairs\.share"):
            aj.MixPairs(first="a", second="b", share=share)


def test_a_judge_is_no_rater_and_a_rater_no_judge():
    label = aj.Label(generator="base", method=aj.RLAIF(aj.Oracle("longer")), split="train", prompts=8, writing=WRITING)
    judged = dataclasses.replace(label, method=aj.Judged(RATER))
    again = aj.Relabel(judge=aj.LanguageModelJudge("other"), sizes=SIZES, pairs="a")
    whole = experiment(rlaif=label, judged=judged, again=again, a=given(3))
    for name, words in {
        "rlaif": r"^rlaif\.method: Oracle is no rater, which answers the task's questions; use LanguageModelRater, or",
        "judged": r"^judged\.method: LanguageModelRater is a rater, which .* label with RLAIF, or use LanguageModelJ",
        "again": r"^again\.judge: LanguageModelJudge is no rater, which",
    }.items():
        with pytest.raises(UserError, match=words):
            whole.stages[name].check(Context(whole, None, name, mesh()))


def exposures(**stages):
    whole = experiment(**stages)
    order(whole.stages)
    return Context(whole, None, "base", mesh()).exposure


def test_made_pairs_depend_on_what_they_are_made_of_and_on_the_rater():
    base = aj.LoadCheckpoint("nowhere", model=Random(1).network(None).record.config)
    stages = {"a": given(3), "b": given(3, salt=" b"), "checkpoint": base}
    stages |= {"again": aj.Relabel(judge=aj.LanguageModelRater("checkpoint"), sizes=SIZES, pairs="a")}
    stages |= {"mixed": aj.MixPairs(first="again", second="b")}
    exposure = exposures(**stages)
    asked = Context(experiment(**stages), None, "base", mesh()).asked_exposure("checkpoint").identity
    assert len(asked) == 1
    assert exposure("again").trained_against == asked | {"writer"} and exposure("again").fitted == exposure("a").fitted
    assert exposure("mixed").fitted == exposure("a").fitted | exposure("b").fitted
    assert exposure("mixed").trained_against >= asked
