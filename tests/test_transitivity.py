"""Cycles, position bias and agreement: by hand, by brute force over known games, and laws."""

import itertools

import numpy as np
import pytest
from scipy import optimize, special, stats

from alignjax.games import zoo
from alignjax.preferences import comparison, transitivity
from alignjax.preferences.judges import LARGEST_ENTROPY, cross_entropies
from alignjax.preferences.statistics import mean_interval, prompt_mean

GAMES = {
    "dice": (zoo.dice, 5 / 9), "voters": (zoo.voters, 2 / 3), "cycle": (zoo.cycle, 0.8),
    "rock paper scissors": (zoo.rock_paper_scissors, 1.0), "diversity": (lambda: zoo.diversity(0.1), 2 / 3 - 0.05),
}  # fmt: skip


def matrix(game):
    return np.asarray(game.p, np.float64)


def brute_force(p, threshold):
    """How many triples of a matrix [K, K] are cycles: each is met in three of the orders of its replies."""
    beats = p > 0.5 + threshold
    circles = [
        (a, b, c) for a, b, c in itertools.permutations(range(len(p)), 3) if beats[a, b] & beats[b, c] & beats[c, a]
    ]
    return len(circles) // 3


@pytest.mark.parametrize("name", GAMES)
def test_the_known_games_have_one_cycle_and_its_weakest_link(name):
    game, weakest = GAMES[name]
    p = matrix(game())
    assert abs(transitivity.cycles(p, 0.01)).tolist() == [[1]]
    np.testing.assert_allclose(transitivity.weakest_links(p), [[weakest]], atol=1e-6)
    found = comparison.cyclicity(p, 0.01)
    assert found["cyclic"].value == 1 and found["weakest_link"].value == pytest.approx(weakest, abs=1e-6)
    assert comparison.cyclicity(p, weakest - 0.5 + 1e-6)["cyclic"].value == 0  # beyond the weakest link


def test_a_cycle_has_a_direction():
    """Die 1 beats 2, 2 beats 3 and 3 beats 1; rock, paper and scissors each beat the one before."""
    assert transitivity.cycles(matrix(zoo.dice()), 0.0).item() == 1
    assert transitivity.cycles(matrix(zoo.rock_paper_scissors()), 0.0).item() == -1
    np.testing.assert_array_equal(transitivity.triple_links(matrix(zoo.rock_paper_scissors())), np.zeros((1, 1, 3)))


@pytest.mark.parametrize("family", zoo.RANDOM_PREFERENCES)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.3])
def test_cycles_are_those_of_a_count_over_all_orders(family, threshold):
    p = zoo.RANDOM_PREFERENCES[family](seed=3, contexts=6, actions=7)
    want = [brute_force(own, threshold) for own in p]
    assert np.sum(transitivity.cycles(p, threshold) != 0, 1).tolist() == want
    if family in ("cyclic", "near_deterministic") or (family, threshold) == ("unstructured", 0.0):
        assert sum(want) > 0
    found = comparison.cyclicity(p, threshold)
    assert found["cyclic"].value == pytest.approx(np.mean(want) / 35) and found["cyclic"].n == 6 * 35


def test_without_ties_cycles_are_what_the_scores_leave():
    """Kendall and Babington Smith 1940: K choose 3 minus the pairs that each reply beats."""
    p = zoo.unstructured(seed=5, contexts=20, actions=8)
    wins = np.sum(p > 0.5, -1)
    want = special.comb(8, 3) - np.sum(special.comb(wins, 2), -1)
    np.testing.assert_array_equal(np.sum(transitivity.cycles(p, 0.0) != 0, 1), want)


def test_rewards_have_no_cycle_at_any_threshold():
    for seed in range(50):
        p = zoo.transitive(seed, contexts=4, actions=8)
        rewards = np.random.default_rng(seed).integers(0, 3, (4, 8)).astype(float)  # many ties
        for own in (p, special.expit(rewards[:, :, None] - rewards[:, None])):
            assert not np.any(transitivity.cycles(own, 0.0)) and not np.any(transitivity.cycles(own, 0.01))


def test_another_order_of_the_replies_leaves_every_count():
    p = zoo.unstructured(seed=1, contexts=5, actions=6)
    order = np.random.default_rng(0).permutation(6)
    mixed = p[:, order][:, :, order]
    for threshold in (0.0, 0.15):
        a, b = (comparison.model_figures(own, own, threshold) for own in (p, mixed))
        assert a["cyclic"].value == b["cyclic"].value
        for name in ("weakest_link", "cross_entropy"):
            assert a[name].value == pytest.approx(b[name].value)


def test_a_link_at_the_threshold_closes_no_cycle():
    p = np.array([[[0.5, 0.75, 0.0], [0.25, 0.5, 1.0], [1.0, 0.0, 0.5]]])
    assert transitivity.cycles(p, 0.25).item() == 0 and transitivity.cycles(p, 0.2499).item() == 1
    tied = np.array([[[0.5, 0.5, 0.0], [0.5, 0.5, 1.0], [1.0, 0.0, 0.5]]])
    assert transitivity.cycles(tied, 0.0).item() == 0


def test_a_cycle_is_reproduced_in_its_own_direction_alone():
    dice, other = matrix(zoo.dice()), matrix(zoo.dice()).swapaxes(1, 2)
    assert comparison.reproduced_cycles(dice, dice, 0.0).value == 1
    assert comparison.reproduced_cycles(other, dice, 0.0).value == 0
    flat = zoo.transitive(0, 1, 3)
    assert comparison.reproduced_cycles(flat, dice, 0.0).value == 0
    assert comparison.reproduced_cycles(dice, flat, 0.0).value is None  # the truth has none
    both = np.concatenate([dice, dice, flat]), np.concatenate([dice, other, dice])
    assert comparison.reproduced_cycles(*both, 0.0)[::3] == (1 / 3, 3)


def test_position_bias_by_hand():
    """The first of a pair is favoured by .2, .4 and -.1; in the second pair it wins in both orders."""
    p = np.array([[[0.5, 0.9, 0.8], [0.3, 0.5, 0.5], [0.6, 0.4, 0.5]]])
    found = comparison.order_bias(p)
    assert found["position_bias"].value == pytest.approx((0.2 + 0.4 - 0.1) / 3)
    assert found["changed"].value == 2 / 3  # the third pair ties in one order alone
    both = comparison.order_bias(np.concatenate([p, p.swapaxes(1, 2)]))
    assert both["position_bias"].value == pytest.approx(0.5 / 3)  # whatever stands first


def test_an_odd_logit_has_no_position_bias_to_the_bit():
    p = zoo.unstructured(2, 9, 5)
    p = np.where(np.triu(np.ones((5, 5), bool), 1), p, 1 - p.swapaxes(1, 2))  # P + P' = 1 in floating point
    found = comparison.order_bias(p)
    assert found["position_bias"] == (0, 0, 0, 90) and found["changed"] == (0, 0, 0, 90)


def test_agreement_by_hand():
    """Of six pairs the truth ties one and the model one; it is right about three of the other four."""
    truth = np.array(
        [[[0.5, 0.9, 0.5], [0.1, 0.5, 0.2], [0.5, 0.8, 0.5]], [[0.5, 1, 0.7], [0, 0.5, 0.4], [0.3, 0.6, 0.5]]]
    )
    p = np.array([[[0.5, 0.6, 0.9], [0.0, 0.5, 0.3], [0.0, 0.0, 0.5]], [[0.5, 0.5, 0.2], [0, 0.5, 0.4], [0, 0, 0.5]]])
    found = comparison.agreement_with(p, truth)
    assert found["accuracy"].value == (1 + 1 + 0.5 + 0 + 1) / 5 and found["accuracy"].n == 5
    pairs = [(0.6, 0.9), (0.9, 0.5), (0.3, 0.2), (0.5, 1.0), (0.2, 0.7), (0.4, 0.4)]
    want = [-(t * np.log(q) + (1 - t) * np.log(1 - q)) for q, t in pairs]
    assert found["cross_entropy"].value == pytest.approx(np.mean(want)) and found["cross_entropy"].n == 6
    assert found["calibration_error"] == pytest.approx(sum(abs(q - t) for q, t in pairs) / 6)  # each in its own bin


def test_the_truth_agrees_with_itself_and_its_opposite_never_does():
    truth = zoo.cyclic(0, 30, 5)
    found = comparison.model_figures(truth, truth, 0.0)
    assert found["accuracy"].value == 1 and found["calibration_error"] == 0 and found["reproduced"].value == 1
    i, j = np.triu_indices(5, 1)
    entropy = stats.bernoulli(truth[:, i, j]).entropy().mean()
    assert found["cross_entropy"].value == pytest.approx(entropy)
    opposite = comparison.model_figures(truth.swapaxes(1, 2), truth, 0.0)
    assert opposite["accuracy"].value == 0 and opposite["reproduced"].value == 0
    assert opposite["cyclic"] == found["cyclic"]
    assert cross_entropies(np.array([0.0]), np.array([1.0])) == pytest.approx(LARGEST_ENTROPY)


def test_the_best_reward_is_the_truth_where_that_is_one_and_a_tie_where_it_is_a_symmetric_cycle():
    flat = zoo.transitive(4, 3, 5)
    np.testing.assert_allclose(comparison.best_reward_model(flat), flat, atol=1e-5)
    np.testing.assert_allclose(comparison.best_reward_model(matrix(zoo.voters())), 0.5, atol=1e-5)
    sure = comparison.best_reward_model(np.array([[[0.5, 1, 1], [0, 0.5, 1], [0, 0, 0.5]]]))  # rewards without end
    assert np.all(sure[0][np.triu_indices(3, 1)] > 0.999)


def test_no_reward_has_a_lower_cross_entropy_than_the_best():
    truth = zoo.cyclic(1, 1, 4)
    best = comparison.agreement_with(comparison.best_reward_model(truth), truth)["cross_entropy"].value

    def entropy(r):
        return comparison.agreement_with(special.expit(r[None, :, None] - r[None, None]), truth)["cross_entropy"].value

    assert optimize.minimize(entropy, np.ones(4), method="Nelder-Mead", tol=1e-10).fun == pytest.approx(best, abs=1e-6)
    assert comparison.agreement_with(truth, truth)["cross_entropy"].value < best - 0.05


def test_the_mean_over_prompts_is_students_where_each_has_as_many():
    values = np.random.default_rng(0).random((12, 5))
    found = prompt_mean(values.sum(1), np.full(12, 5), (0, 1))
    means = values.mean(1)
    want = stats.t.interval(0.95, 11, means.mean(), stats.sem(means))
    assert found.value == pytest.approx(values.mean()) and found.n == 60
    assert (found.low, found.high) == pytest.approx(want)
    assert (found.low, found.high) == pytest.approx(mean_interval(means, (0, 1)))


def test_the_mean_over_unequal_prompts_has_the_interval_of_a_jackknife():
    rng = np.random.default_rng(1)
    counts = rng.integers(0, 9, 400)
    totals = rng.binomial(counts, rng.beta(2, 2, 400))  # what one prompt has is alike
    found = prompt_mean(totals, counts, (0, 1))
    assert found.value == totals.sum() / counts.sum() and found.n == counts.sum()
    left = np.flatnonzero(counts)
    without = np.array([(totals.sum() - totals[i]) / (counts.sum() - counts[i]) for i in left])
    error = np.sqrt((len(left) - 1) * np.var(without))
    assert (found.high - found.low) / 2 == pytest.approx(1.966 * error, rel=0.01)
    independent = np.sqrt(found.value * (1 - found.value) / found.n)
    assert error > 1.2 * independent  # an interval over the pairs would be too narrow


def test_nothing_and_one_prompt_have_no_interval():
    assert prompt_mean(np.zeros(3), np.zeros(3, int), (0, 1)) == (None, 0, 1, 0)
    assert prompt_mean(np.array([0.0, 3.0]), np.array([0, 4]), (-1, 1)) == (0.75, -1, 1, 4)


class Asked:
    """A judge that prefers by a table of both orders, and keeps what it was asked."""

    def __init__(self):
        self.rows = []

    def __call__(self, prompts, replies, others):
        self.rows = list(zip(prompts, replies, others, strict=True))
        return np.array([self.says(*row) for row in self.rows])

    @staticmethod
    def says(prompt, reply, other):
        return (len(prompt) + 3 * ord(reply) + 7 * ord(other)) % 11 / 11


def test_every_pair_is_asked_in_both_orders_and_stands_at_its_place():
    judge, prompts, replies = Asked(), ["x", "xx"], [["a", "b", "c"], ["d", "e", "f"]]
    p = comparison.every_pair(judge, prompts, replies, both_orders=True, batch=4)
    for n, own in enumerate(replies):
        for i, j in itertools.product(range(3), repeat=2):
            assert p[n, i, j] == (0.5 if i == j else Asked.says(prompts[n], own[i], own[j]))
    assert len(judge.rows) == 16  # six pairs in two batches, twice
    for (x, y, z), exchanged in zip(judge.rows[:8], judge.rows[8:], strict=True):
        assert exchanged == (x, z, y)
    once = comparison.every_pair(judge, prompts, replies, both_orders=False, batch=4)
    assert len(judge.rows) == 6
    np.testing.assert_array_equal(np.triu(once), np.triu(p))
    np.testing.assert_array_equal(once + once.swapaxes(1, 2), np.ones((2, 3, 3)))
