"""Statistics of an evaluation: laws that determine them, and referees written another way."""

import itertools
import math

import numpy as np
import pytest
from scipy import optimize, stats

from alignjax.preferences.best_of import BestOf, best_of_accuracy, read_best_of, round_robin_best
from alignjax.preferences.judges import calibration
from alignjax.preferences.statistics import (
    LENGTH_RIDGE,
    clopper_pearson,
    distinct_n,
    human_agreement,
    length_controlled_rate,
    mean_interval,
    perplexity,
    word_count,
)
from alignjax.tasks.json_lines import read_rows
from tests.test_summary import write_rows


def data(seed, count=60, effect=1.2):
    """Probabilities of a judge that likes quality and length, and the two lengths."""
    rng = np.random.default_rng(seed)
    lengths, others = rng.integers(1, 400, (2, count))
    d = (lengths - others) / np.std(lengths - others, ddof=1)
    p = 1 / (1 + np.exp(-(rng.normal(0.7, 1.0, count) + effect * np.tanh(d))))
    return np.round(p * 1024) / 1024, lengths, others  # 1 - p has no rounding


def referee(p, lengths, others):
    """The logistic regression by a minimiser that knows nothing of its form."""
    d = np.asarray(lengths, float) - others
    x = np.tanh(d / d.std(ddof=1))

    def loss(parameters):
        q = 1 / (1 + np.exp(-(parameters[0] + parameters[1] * x)))
        return -np.sum(p * np.log(q) + (1 - p) * np.log1p(-q)) + LENGTH_RIDGE / 2 * parameters[1] ** 2

    found = optimize.minimize(loss, np.zeros(2), method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-13})
    return 1 / (1 + np.exp(-found.x[0]))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("votes", [False, True])
def test_a_length_controlled_rate_is_that_of_the_logistic_regression(seed, votes):
    p, lengths, others = data(seed)
    p = (p > 0.5) * 1.0 if votes else p
    found = length_controlled_rate(p, lengths, others)
    assert found == pytest.approx(referee(p, lengths, others), abs=1e-6)
    assert abs(found - p.mean()) > 1e-4


@pytest.mark.parametrize("p", [[0.9, 0.7], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.5], [0.05]])
def test_without_an_effect_of_length_it_is_the_mean_probability(p):
    """Every difference of lengths meets every probability."""
    d, every = np.transpose(list(itertools.product([-30, -1, 0, 4, 90], p)))
    assert length_controlled_rate(every, 100 + d, np.full(len(d), 100)) == pytest.approx(np.mean(p), abs=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_exchange_of_the_policies_gives_the_rest_exactly(seed):
    p, lengths, others = data(seed)
    for values in (p, (p > 0.5) * 1.0):
        mine = length_controlled_rate(values, lengths, others)
        assert mine + length_controlled_rate(1 - values, others, lengths) == 1.0 and mine != 0.5


@pytest.mark.parametrize("strength", [0.5, 3.0])
def test_a_judge_of_length_alone_leaves_nothing(strength):
    """Its P is sigmoid(phi tanh d), whoever is longer: the raw rate is far from 1/2."""
    _, lengths, others = data(0, count=400)
    lengths = lengths + 150
    d = (lengths - others) / np.std(lengths - others, ddof=1)
    p = 1 / (1 + np.exp(-strength * np.tanh(d)))
    assert p.mean() > 0.55
    assert length_controlled_rate(p, lengths, others) == pytest.approx(0.5, abs=1e-3)


def test_hard_votes_for_the_longer_reply_leave_nothing_where_lengths_are_balanced():
    d = np.array([-200, -90, -15, -2, 2, 15, 90, 200])
    assert length_controlled_rate((d > 0) * 1.0, 300 + d, np.full(8, 300)) == pytest.approx(0.5, abs=1e-9)


@pytest.mark.parametrize("unit", [0.25, 4.7])
def test_the_unit_of_length_does_not_matter(unit):
    p, lengths, others = data(3)
    by_unit = length_controlled_rate(p, unit * lengths, unit * others)
    assert by_unit == pytest.approx(length_controlled_rate(p, lengths, others), abs=1e-12)


def test_more_length_moves_the_raw_rate_and_not_the_controlled_one():
    """Two judges that differ in their taste for length alone, over longer replies."""
    raw, controlled = [], []
    for effect in (0.0, 1.5):
        p, lengths, others = data(5, count=4000, effect=effect)
        longer = lengths > others - 100  # a policy that writes more
        raw.append(p[longer].mean())
        controlled.append(length_controlled_rate(p[longer], lengths[longer], others[longer]))
    assert raw[1] - raw[0] > 0.03 and abs(controlled[1] - controlled[0]) < 0.01


@pytest.mark.parametrize(("p", "lengths", "others", "rate"), [
    ([0.25], [9], [3], 0.25), ([0.75, 0.25, 1.0], [5, 6, 7], [1, 2, 3], 2 / 3), ([1.0, 1.0], [5, 9], [1, 30], 1.0),
    ([0.0, 0.0], [5, 9], [1, 30], 0.0),
])  # fmt: skip
def test_where_length_explains_nothing_it_is_the_mean_probability(p, lengths, others, rate):
    assert length_controlled_rate(np.array(p), np.array(lengths), np.array(others)) == pytest.approx(rate)


def test_a_fit_ends_where_length_tells_every_winner_and_where_nearly_all_win():
    d = np.arange(1.0, 41.0)
    assert 0.5 > length_controlled_rate((d > 20) * 1.0, d, np.zeros(40)) > 0  # at d = 0 the other wins
    almost = np.where(np.arange(40) == 7, 1 - 1e-12, 1.0)
    assert length_controlled_rate(almost, d, np.zeros(40)) > 1 - 1e-6


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_the_interval_of_a_mean_is_student_s(level):
    values = np.random.default_rng(0).beta(2, 3, 17)
    want = stats.t.interval(level, 16, values.mean(), stats.sem(values))
    np.testing.assert_allclose(mean_interval(values, (0, 1), level), want, rtol=1e-12)
    low, high = mean_interval(1 - values, (0, 1), level)
    np.testing.assert_allclose((1 - high, 1 - low), want, rtol=1e-12)


def test_the_interval_of_a_mean_stays_in_its_bounds_and_covers_the_truth():
    assert mean_interval(np.array([0.0, 1.0]), (0, 1)) == (0, 1) == mean_interval(np.array([0.3]), (0, 1))
    draws = np.random.default_rng(1).beta(2, 1, (2000, 30))
    covered = [low <= 2 / 3 <= high for low, high in (mean_interval(row, (0, 1)) for row in draws)]
    assert abs(np.mean(covered) - 0.95) < 0.02


def test_a_paired_interval_is_narrower_than_what_prompts_share():
    rng = np.random.default_rng(2)
    prompts, noise = rng.normal(0, 1, 50), rng.normal(0, 0.1, (2, 50))
    a, b = 1 / (1 + np.exp(-(prompts + noise)))
    paired, alone = mean_interval(a - b, (-1, 1)), mean_interval(a, (0, 1))
    assert np.ptp(paired) < np.ptp(alone) / 3 and paired[0] < np.mean(a - b) < paired[1]


def test_agreement_with_people_is_strict_and_its_interval_exact():
    found = human_agreement(np.array([0.9, 0.5, 0.51, 0.2]))
    assert (found.accuracy, found.n) == (0.5, 4) and found.mean_probability == pytest.approx(2.11 / 4)
    assert (found.low, found.high) == clopper_pearson(2, 4)
    ties = np.full(10, 0.5)
    assert human_agreement(ties).accuracy == 0.0 and calibration(ties, np.ones(10))["accuracy"] == 0.5


def grams_by_hand(texts, n):
    seen = []
    for text in texts:
        words = text.split()
        for start in range(len(words) - n + 1):
            seen.append(" ".join(words[start : start + n]))
    return len(set(seen)) / len(seen)


TEXTS = ["a b a b a", "b a c", "a b", "", "one"]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_distinct_n_is_the_share_of_different_n_grams(n):
    assert distinct_n(TEXTS, n, None, None) == pytest.approx(grams_by_hand(TEXTS, n))
    assert distinct_n(["a b c d"], n, None, None) == 1.0
    assert distinct_n(["a a a a"], n, None, None) == pytest.approx(1 / (5 - n))
    assert distinct_n(TEXTS * 7, n, None, None) == pytest.approx(grams_by_hand(TEXTS, n) / 7)
    assert distinct_n(["", "one"], 2, None, None) == 0.0


def test_distinct_n_cuts_each_text_and_the_sample():
    assert distinct_n(TEXTS, 1, 2, None) == grams_by_hand(["a b", "b a", "a b", "one"], 1)
    assert distinct_n(TEXTS, 2, 3, 5) == grams_by_hand(["a b a", "b a"], 2)
    assert distinct_n(TEXTS, 2, None, 6) == grams_by_hand(["a b a b a", "b"], 2)
    assert [word_count(TEXTS, words) for words in (None, 2)] == [11, 7]
    assert distinct_n(TEXTS, 1, 2, word_count(TEXTS, 2)) == distinct_n(TEXTS, 1, 2, None)


def test_perplexity_is_that_of_a_token():
    """A uniform model of V tokens has perplexity V, whatever the lengths; long replies count more."""
    tokens = np.array([1, 7, 20])
    assert perplexity(-np.log(512) * tokens, tokens) == pytest.approx(512)
    assert perplexity(np.log([0.5, 0.25**3]), np.array([1, 3])) == pytest.approx((2 * 64) ** 0.25)
    assert math.isnan(perplexity(np.array([np.nan, -1.0]), np.array([1, 1])))
    assert perplexity(np.array([-1e6]), np.array([1])) == math.inf


REWARD = {"good": 2.0, "fair": 1.0, "poor": 0.0, "same": 2.0}


def by_reward(prompts, replies, others):
    return np.array([1 / (1 + np.exp(REWARD[z] - REWARD[y])) for y, z in zip(replies, others, strict=True)])


@pytest.mark.parametrize("order", list(itertools.permutations(["good", "fair", "poor"])))
def test_the_best_of_a_round_robin_is_that_of_the_rewards_in_any_order(order):
    assert round_robin_best(by_reward, "x", order) == (order.index("good"),)


def test_the_best_of_a_round_robin_of_a_circle_is_all_and_of_one_itself():
    beats = {("rock", "scissors"), ("scissors", "paper"), ("paper", "rock")}

    def circle(prompts, replies, others):
        return np.array([float((y, z) in beats) for y, z in zip(replies, others, strict=True)])

    assert round_robin_best(circle, "x", ["rock", "paper", "scissors"]) == (0, 1, 2)
    assert round_robin_best(circle, "x", ["rock"]) == (0,)


def test_a_judge_plays_each_prompt_s_own_replies_once():
    games = []

    def judge(prompts, replies, others):
        games.extend((x, *sorted((y, z))) for x, y, z in zip(prompts, replies, others, strict=True))
        return by_reward(prompts, replies, others)

    rows = [BestOf("x", ("good",), ("poor", "fair"), "Math"), BestOf("y", ("poor",), ("fair",), "Focus")]
    assert best_of_accuracy(judge, rows) == {"Math": 1.0, "Focus": 0.0}
    assert sorted(games) == [("x", "fair", "good"), ("x", "fair", "poor"), ("x", "good", "poor"), ("y", "fair", "poor")]


def test_a_tie_for_the_best_counts_its_share_and_the_subset_of_ties_is_left_out():
    rows = [
        BestOf("x", ("good",), ("same", "poor"), "Math"),
        BestOf("x", ("fair",), ("poor",), "Math"),
        BestOf("x", ("poor",), ("good", "same"), "Math"),
        BestOf("x", ("good", "same"), ("fair",), "Ties"),
    ]
    assert best_of_accuracy(by_reward, rows) == {"Math": (1 / 2 + 1 + 0) / 3}
    assert best_of_accuracy(by_reward, rows[3:]) == {}


ROW = {
    "id": "7", "prompt": "x", "chosen": ["a"], "rejected": ["b", "c", "d"], "num_correct": 1, "total_completions": 4,
    "subset": "Math",
}  # fmt: skip


def test_a_row_of_rewardbench_2_is_read(tmp_path):
    rows = read_rows(write_rows(tmp_path / "a.jsonl", [ROW]), "prompts", read_best_of)
    assert rows == [BestOf("x", ("a",), ("b", "c", "d"), "Math")]


@pytest.mark.parametrize(("change", "message"), [
    ({"num_correct": 2}, "line 2 has 1 chosen of 4 replies, not 2 of 4"), ({"chosen": "a"}, "'chosen' that is no list"),
    ({"rejected": []}, "'rejected' that is no list of texts"), ({"subset": ""}, "'subset' without a text"),
])  # fmt: skip
def test_a_row_that_is_none_is_named(tmp_path, change, message):
    path = write_rows(tmp_path / "a.jsonl", [ROW, {**ROW, **change}])
    with pytest.raises(ValueError, match=message):
        read_rows(path, "prompts", read_best_of)
