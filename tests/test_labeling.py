"""Contrastive labelling: polarity, filter, retries and coins, each a law of the example's number alone."""

import dataclasses
import hashlib
import itertools
import zlib
from collections import Counter

import numpy as np
import pytest
from scipy import integrate, stats

from alignjax.errors import UserError
from alignjax.labeling.accuracy import rlaif_accuracy, rlcd_accuracy
from alignjax.labeling.judged import Judged
from alignjax.labeling.method import LabeledPair, Labeler
from alignjax.labeling.rlcd import RLCD
from alignjax.pipeline.judges import Oracle
from alignjax.pipeline.stages.label import oracle_agreement
from alignjax.preferences.judges import oracle_judge
from alignjax.sampling.generate import Reply
from alignjax.tasks import sandbox
from alignjax.tasks.dialogue_format import clean_reply, contrast_dialogue
from alignjax.tasks.task import oracle_from_score

TASK = sandbox.sandbox_task()
PLAIN = sandbox.World().prompts("train", 60, seed=0)
ONE = "Human: Hi?\n\nAssistant:"
TWO = f"{ONE} Well.\n\nHuman: And?\n\nAssistant:"
THREE = f"{TWO} Yes.\n\nHuman: So?\n\nAssistant:"


def rlcd(writer, task, prompts, numbers, seed, **options):
    """Returns (pairs, tries) of RLCD."""
    return RLCD(**options).label(Labeler(writer, task, None, seed), prompts, numbers)


def by_oracle(writer, task, prompts, numbers, seed, *, oracle="oracle", error=0.0):
    """Returns (pairs, tries) of Judged with one of the task's oracles."""
    labeler = Labeler(writer, task, oracle_judge(task.oracles[oracle]), seed)
    return Judged(Oracle(oracle), error).label(labeler, prompts, numbers)


class Writer:
    """A Generate whose text is a pure function of (prompt, number, attempt); it records what it was asked."""

    def __init__(self, text):
        self.text, self.calls = text, []

    def __call__(self, prompts, numbers, attempt):
        self.calls.append([(prompt, number, attempt) for prompt, number in zip(prompts, numbers, strict=True)])
        return [Reply(self.text(*asked), 1, 0.0) for asked in self.calls[-1]]

    @property
    def asked(self):
        return [asked for call in self.calls for asked in call]


def chance(*asked):
    """A uniform number in [0, 1) made of what was asked."""
    return int.from_bytes(hashlib.sha256(repr(asked).encode()).digest()[:6]) / 2**48


def echo(prompt, number, attempt):
    return f" {prompt[-40:]!r} {number} {attempt}\n\nHuman:"


def moody(prompt, number, attempt):
    """Refused four times in ten."""
    return echo(prompt, number, attempt) if chance(prompt, number, attempt) > 0.4 else " cut off"


def polarity(prompt):
    """(index of the affix pair, 0 for the positive side) of a prompt's last role marker."""
    ends = {f" {a}:": (i, side) for i, pair in enumerate(TASK.affixes) for side, a in enumerate(pair)}
    return next(found for end, found in ends.items() if prompt.endswith(end))


@pytest.mark.parametrize(("prompt", "turns"), [(ONE, 1), (TWO, 2), (THREE, 3)])
def test_the_last_turn_has_one_polarity_and_every_other_its_opposite(prompt, turns):
    made = contrast_dialogue(prompt, "(good)", "(bad)")
    assert made.endswith("\n\nAssistant (good):")
    assert (made.count("Assistant (good):"), made.count("Assistant (bad):")) == (1, turns - 1)
    assert made.replace(" (good)", "").replace(" (bad)", "") == prompt


def test_a_prompt_that_does_not_end_in_a_role_marker_is_refused():
    for wrong in (ONE + " ", ONE[:-1], "Assistant:", ""):
        with pytest.raises(UserError, match="does not end in 'Assistant:'"):
            contrast_dialogue(wrong, "a", "b")


@pytest.mark.parametrize(("raw", "reply"), [
    (" good\n\nHuman:", "good"),
    (" good\n\nHuman: next\n\nAssistant: more\n\nHuman:", "good"),
    (" one\n\ntwo\n\nHuman:", "one\n\ntwo"),
    (" one\ntwo Human:", "one"),  # the reply ends at the last newline
    (" no turn follows\n\n", None),
    (" no newline Human:", None),
    ("\n\nHuman:", None),
    (" \n \n\nHuman:", None),
    (" cut before it Human\n", None),
    ("Assistant: good\n\nHuman:", "good"),
    ("\n\nAssistant: good\n\nHuman:", "good"),
    (" stray Assistant: good\n\nHuman:", "good"),  # what follows the first marker is kept
    (" Assistant: \n\nHuman:", None),
    ("", None),
])  # fmt: skip
def test_the_filter_keeps_the_reply_before_the_next_human_turn(raw, reply):
    assert clean_reply(raw) == reply


def test_both_sides_have_one_affix_pair_and_opposite_polarity():
    writer = Writer(echo)
    pairs, _ = rlcd(writer, TASK, PLAIN, range(60), 0)
    assert [pair.prompt for pair in pairs] == PLAIN
    by_number = {n: [p for p, number, _ in writer.asked if number == n] for n in range(60)}
    for number, pair in enumerate(pairs):
        plus, minus = TASK.affixes[pair.affix]
        good, bad = (contrast_dialogue(pair.prompt, *sides) for sides in ((plus, minus), (minus, plus)))
        assert sorted(by_number[number]) == sorted([good, bad])


def test_the_label_follows_the_positive_affix_and_its_place_is_a_coin():
    writer = Writer(lambda prompt, number, attempt: f" {polarity(prompt)}\n\nHuman:")
    pairs, _ = rlcd(writer, TASK, [ONE] * 3000, range(3000), 7)
    for pair in pairs:
        winner, loser = (pair.first, pair.second) if pair.p == 1.0 else (pair.second, pair.first)
        assert pair.p in (0.0, 1.0)
        assert (winner, loser) == (str((pair.affix, 0)), str((pair.affix, 1)))
    assert abs(np.mean([pair.p for pair in pairs]) - 0.5) < 4 * 0.5 / np.sqrt(3000)
    counts = Counter(pair.affix for pair in pairs)
    assert set(counts) == set(range(len(TASK.affixes)))
    assert stats.chisquare(list(counts.values())).pvalue > 1e-4
    firsts = [[pair.p for pair in pairs if pair.affix == i] for i in counts]
    assert all(abs(np.mean(p) - 0.5) < 4 * 0.5 / np.sqrt(len(p)) for p in firsts)  # whatever the affix


@pytest.mark.parametrize("attempts", [1, 3, 5])
def test_only_failed_sides_are_sampled_again_and_at_most_so_often(attempts):
    failures = {(n, side): int(8 * chance(n, side) ** 2) for n in range(40) for side in range(2)}
    seen = Counter()

    def stubborn(prompt, number, attempt):
        side = polarity(prompt)[1]
        seen[number, side] += 1
        return " cut" if seen[number, side] <= failures[number, side] else f" {number} {side}\n\nHuman:"

    writer = Writer(stubborn)
    pairs, tries = rlcd(writer, TASK, PLAIN[:40], range(40), 0, attempts=attempts)
    assert seen == {key: min(failed + 1, attempts) for key, failed in failures.items()}
    assert tries == len(writer.asked) == sum(seen.values())
    assert all(call for call in writer.calls)
    kept = [n for n in range(40) if max(failures[n, 0], failures[n, 1]) < attempts]
    assert [pair.prompt for pair in pairs] == [PLAIN[n] for n in kept] and 0 < len(kept) < 40
    assert all({pair.first, pair.second} == {f"{n} 0", f"{n} 1"} for n, pair in zip(kept, pairs, strict=True))


def test_five_attempts_are_the_default():
    writer = Writer(lambda *asked: "never")
    assert rlcd(writer, TASK, [ONE], [0], 0) == ([], 10)
    assert by_oracle(writer, TASK, [ONE], [0], 0, oracle="oracle", error=0.0) == ([], 10)


@pytest.mark.parametrize("method", [
    rlcd,
    lambda *given: by_oracle(*given, oracle="oracle", error=0.3),
])  # fmt: skip
def test_every_try_has_an_attempt_number_of_its_own(method):
    writer = Writer(
        lambda prompt, number, attempt: f" {chance(attempt)}" + "\n\nHuman:" * (chance(number, attempt) > 0.6)
    )
    method(writer, TASK, PLAIN, range(60), 0)
    draws = [(number, attempt) for _, number, attempt in writer.asked]
    assert len(set(draws)) == len(draws) > 200


@pytest.mark.parametrize("method", [
    rlcd,
    lambda *given: by_oracle(*given, oracle="length", error=0.3),
])  # fmt: skip
def test_results_do_not_depend_on_how_prompts_are_dealt_to_chunks(method):
    task = dataclasses.replace(TASK, oracles={"length": oracle_from_score(lambda x, y: zlib.crc32(y.encode()))})
    whole, tries = method(Writer(moody), task, PLAIN, range(60), 5)
    assert 30 < len(whole) < 60 and tries > 120
    for cuts in ([1] * 60, [7, 13, 40], [59, 1]):
        starts = [0, *itertools.accumulate(cuts)]
        pieces = [range(a, b) for a, b in itertools.pairwise(starts)]
        parts = [method(Writer(moody), task, [PLAIN[i] for i in piece], piece, 5) for piece in pieces]
        assert [pair for pairs, _ in parts for pair in pairs] == whole
        assert sum(count for _, count in parts) == tries
    backwards, _ = method(Writer(moody), task, PLAIN[::-1], range(59, -1, -1), 5)
    assert backwards[::-1] == whole
    assert method(Writer(moody), task, PLAIN, range(60), 6)[0] != whole


def honest(prompt, number, attempt):
    """A well-formed reply, its qualities by chance."""
    rng = np.random.default_rng((zlib.crc32(prompt.encode()), number, attempt))
    return f" {sandbox.sample_reply(sandbox.World(), prompt, {}, rng)}\n\nHuman:"


@pytest.mark.parametrize("name", ["oracle", "annotators"])
def test_without_error_the_labels_are_the_oracle_and_ties_are_left_out(name):
    writer, oracle = Writer(honest), TASK.oracles[name]
    pairs, tries = by_oracle(writer, TASK, PLAIN, range(60), 0, oracle=name, error=0.0)
    drawn = {n: [clean_reply(honest(*a)) for a in writer.asked if a[1] == n] for n in range(60)}
    truth = {n: oracle(PLAIN[n], *drawn[n]) for n in drawn}
    want = [LabeledPair(PLAIN[n], *drawn[n], p, -1) for n, p in truth.items() if p != 0.5]
    assert pairs == want and tries == 120 and 30 < len(want) < 60
    assert {prompt for prompt, _, _ in writer.asked} == set(PLAIN)  # plain prompts, no affix


@pytest.mark.parametrize("error", [0.1, 0.5])
def test_an_erring_annotator_turns_labels_over_at_the_error_rate(error):
    prompts, numbers = PLAIN[:50] * 40, range(2000)
    truth, _ = by_oracle(Writer(honest), TASK, prompts, numbers, 3, oracle="annotators", error=0.0)
    erring, _ = by_oracle(Writer(honest), TASK, prompts, numbers, 3, oracle="annotators", error=error)
    assert [pair._replace(p=0) for pair in erring] == [pair._replace(p=0) for pair in truth]
    turned = [a.p != b.p for a, b in zip(truth, erring, strict=True)]
    assert abs(np.mean(turned) - error) < 4 * np.sqrt(error * (1 - error) / len(turned))
    assert all(b.p == 1 - a.p for a, b, wrong in zip(truth, erring, turned, strict=True) if wrong)


def accuracy(right, mean, hard=np.inf):
    """E[right(d)] over d = A_1 - A_2 ~ N(mean, 2), counting the sign of d, given |d| <= hard."""
    bound = min(hard, 15.0)
    density = stats.norm(mean, np.sqrt(2)).pdf
    top = integrate.quad(lambda d: density(d) * right(d), -bound, bound, points=[0])[0]
    return top / integrate.quad(density, -bound, bound)[0]


def test_label_noise_of_rlaif_and_rlcd_in_closed_form():
    """2307.12950 App. N: the paper's three figures, and others against the integral over the difference."""
    assert rlaif_accuracy() == pytest.approx(0.75, abs=1e-12)
    assert rlaif_accuracy(hard=0.2) == pytest.approx(0.52812, abs=5e-6)
    assert rlcd_accuracy(3, hard=0.2) == pytest.approx(0.57432, abs=5e-6)
    for noise, hard in ((1.0, 0.2), (0.5, 1.0), (3.0, np.inf)):
        want = accuracy(lambda d, n=noise: stats.norm.cdf(abs(d) / (np.sqrt(2) * n)), 0, hard)
        assert rlaif_accuracy(noise=noise, hard=hard) == pytest.approx(want, abs=1e-7)
    for gap, hard in ((0.0, 0.5), (1.0, 2.0), (3.0, np.inf)):
        want = accuracy(lambda d: float(d > 0), gap, hard)
        assert rlcd_accuracy(gap, hard=hard) == pytest.approx(want, abs=1e-7)
    assert rlcd_accuracy(2.0, quality=2.0, hard=0.6) == rlcd_accuracy(1.0, hard=0.3)


@pytest.mark.parametrize("gap", [0.0, 1.0, 3.0])
def test_rlcd_labels_are_as_right_as_the_closed_form_says(gap):
    def quality(prompt, number, attempt):
        noise = stats.norm.ppf(chance(number, attempt))
        return f" {noise + gap * (0.5 - polarity(prompt)[1])}\n\nHuman:"

    pairs, _ = rlcd(Writer(quality), TASK, [ONE] * 3000, range(3000), 0)
    right = np.mean([(float(pair.first) > float(pair.second)) == (pair.p > 0.5) for pair in pairs])
    want = rlcd_accuracy(gap)
    assert abs(right - want) < 4 * np.sqrt(want * (1 - want) / 3000)


def test_a_prompt_too_long_to_answer_is_left_out_and_not_asked_again():
    long = PLAIN[3]

    class Short(Writer):
        def __call__(self, prompts, numbers, attempt):
            replies = super().__call__(prompts, numbers, attempt)
            return [None if number == 3 else reply for number, reply in zip(numbers, replies, strict=True)]

    writer = Short(honest)
    pairs, tries = rlcd(writer, TASK, PLAIN[:8], range(8), 0)
    assert len(pairs) == 7 and long not in {pair.prompt for pair in pairs}
    assert len([asked for asked in writer.asked if asked[1] == 3]) == 2 and tries == len(writer.asked) - 2


@pytest.mark.parametrize(
    ("oracle", "words"),
    [
        (lambda *_: 1.5, "said 1.5 of 'b' and 'a'; let it return"),
        (lambda *_: float("nan"), "said nan of"),
        (lambda *_: "0.9", "said '0.9' of"),
        (lambda *_: None, "said None of"),
        (lambda *_: True, "said True of"),
        (lambda x, y, z: 0.9 if y > z else None, "said None of 'a' and 'b'"),
        (
            lambda x, y, z: 0.9 if y > z else 0.3,
            "said 0.9 of 'b' and 'a', and 0.3 of them exchanged; let both sum to 1",
        ),
    ],
)
def test_an_oracle_that_is_no_preference_is_refused_by_name(oracle, words):
    with pytest.raises(UserError, match=r"^the oracle <lambda> said") as error:
        oracle_judge(oracle)(["x", "x"], ["b", "c"], ["a", "a"])
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_oracle_agrees_with_labels_of_the_first_reply_over_the_second():
    longer = oracle_from_score(lambda prompt, text: len(text))
    task = dataclasses.replace(sandbox.sandbox_task(), oracles={"longer": longer})
    pairs = [LabeledPair("x", "aaa", "a", 0.9, -1), LabeledPair("x", "a", "aaa", 0.2, -1)]
    pairs += [LabeledPair("x", "aaa", "a", 0.1, -1), LabeledPair("x", "aa", "bb", 0.7, -1)]
    assert oracle_agreement(task, pairs) == {"oracle_ties": 0.25, "label_accuracy": pytest.approx(2 / 3)}


def test_an_oracle_judges_each_pair_of_its_prompt():
    judge = oracle_judge(lambda x, y, z: 0.5 + 0.5 * (np.sign(y.count(x) - z.count(x))))
    assert judge(["a", "b", "a"], ["aa", "a", "b"], ["a", "b", "b"]).tolist() == [1.0, 0.0, 0.5]
    assert judge([], [], []).shape == (0,)
