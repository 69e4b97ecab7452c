"""The game among policies: laws of the lottery, of copies, of Elo, of cycles and of intervals."""

import numpy as np
import pytest
from scipy import optimize, special, stats

from alignjax.games import zoo
from alignjax.games.nash_face import mass_ranges, maximal_lottery, maximum_entropy, nash_face
from alignjax.games.solve import regularised_nash
from alignjax.preferences.elo import ELO_POINTS, fit_bradley_terry
from alignjax.preferences.rating_intervals import bootstrap, exploitability_intervals, rate_fully, resampled_rates
from alignjax.preferences.ratings import clone_effects, cyclic_triples, make_pool, pool_of_votes, rate_pool

LETTERS = "abcdefghi"
LIMIT = [[0.5, 0.5, 0.2], [0.5, 0.5, 0.6], [0.8, 0.4, 0.5]]
"""c beats a and loses to b, which tie: a lottery of a and b may play a with 1/4 at most."""


def pool(rate, count=None):
    return make_pool(LETTERS[: len(rate)], rate, count)


def matrix(game):
    return np.asarray(game.p, np.float64)[0]


MARGINS = np.array([-0.3, 0.1, 0.05])


def limit_of_three():
    """Three policies tie, and beat a fourth by these margins."""
    rate = np.full((4, 4), 0.5)
    rate[:3, 3], rate[3, :3] = 0.5 + MARGINS, 0.5 - MARGINS
    return rate


def random_pools():
    """Pools of every family, those of ties among them, in which many lotteries are Nash."""
    for name, draw in zoo.RANDOM_PREFERENCES.items():
        for seed, size in enumerate((2, 3, 5, 8)):
            yield pytest.param(draw(seed, 1, size)[0], id=f"{name}-{size}")
    yield pytest.param(np.full((4, 4), 0.5), id="all tied")
    yield pytest.param(np.array(LIMIT), id="limit")
    yield pytest.param(limit_of_three(), id="limit of three")


POOLS = list(random_pools())


# The lottery


@pytest.mark.parametrize(
    ("game", "want"),
    [
        (zoo.rock_paper_scissors(), [1 / 3, 1 / 3, 1 / 3]),
        (zoo.cycle(), [4 / 11, 3 / 11, 4 / 11]),
        (zoo.dice(), [1 / 3, 1 / 3, 1 / 3]),
        (zoo.diversity(0.1), [1 / 3 + 0.05, 1 / 3 + 0.05, 1 / 3 - 0.1]),
    ],
)
def test_the_lotteries_of_known_games(game, want):
    lottery = rate_pool(pool(np.round(matrix(game), 6))).lottery  # the game's leaves are float32
    np.testing.assert_allclose(lottery.mass, want, atol=1e-5)
    assert lottery.is_unique and abs(lottery.gap) < 1e-14
    np.testing.assert_array_equal(lottery.low, lottery.high)


def test_a_cycle_is_solved_to_rounding():
    rate = [[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]]
    found = rate_pool(pool(rate))
    np.testing.assert_allclose(found.lottery.mass, np.array([4, 3, 4]) / 11, atol=1e-15)
    np.testing.assert_allclose(found.nash, 0, atol=1e-15)


def direct_range(a, j):
    """The least and the largest mass of j over all Nash policies, by linear programs on the definition."""
    size, ends = len(a), []
    for sign in (1, -1):
        found = optimize.linprog(sign * np.eye(size)[j], a, np.zeros(size), np.ones((1, size)), [1], method="highs")
        ends.append(sign * found.fun)
    return ends


@pytest.mark.parametrize("rate", POOLS)
def test_the_lottery_is_nash_and_its_ranges_are_those_of_the_definition(rate):
    found = rate_pool(pool(rate)).lottery
    a = (rate - rate.T) / 2
    assert np.all(a @ found.mass <= 1e-12) and abs(found.mass.sum() - 1) < 1e-12 and found.mass.min() >= 0
    assert abs(found.gap - 2 * (a @ found.mass).max()) < 1e-15
    want = np.array([direct_range(a, j) for j in range(len(a))])
    np.testing.assert_allclose(np.c_[found.low, found.high], want, atol=1e-6)
    assert np.all((found.low - 1e-9 <= found.mass) & (found.mass <= found.high + 1e-9))
    assert found.is_unique == np.allclose(want[:, 0], want[:, 1], atol=1e-6)


def test_among_several_lotteries_the_ranges_stop_where_an_outsider_becomes_better():
    found = rate_pool(pool(LIMIT))
    np.testing.assert_allclose(found.lottery.low, [0, 0.75, 0], atol=1e-9)
    np.testing.assert_allclose(found.lottery.high, [0.25, 1, 0], atol=1e-9)
    np.testing.assert_allclose(found.lottery.mass, [0.25, 0.75, 0], atol=1e-6)  # of the largest entropy
    np.testing.assert_allclose(found.nash, 0, atol=1e-6)
    assert not found.lottery.is_unique


@pytest.mark.parametrize("rate", POOLS)
def test_the_largest_entropy_is_that_of_a_general_solver(rate):
    face = nash_face(rate)
    chosen, size = maximum_entropy(face), len(rate)
    a, played = (rate - rate.T) / 2, face.point > 0
    referee = optimize.minimize(
        lambda p: special.xlogy(p, p).sum(),
        face.point,
        jac=lambda p: np.where(played, np.log(np.maximum(p, 1e-300)) + 1, 0),
        bounds=[(0, 1 if on else 0) for on in played],
        constraints=[
            {"type": "eq", "fun": lambda p: p.sum() - 1, "jac": lambda p: np.ones(size)},
            {"type": "ineq", "fun": lambda p: -a @ p, "jac": lambda p: -a},
        ],
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    ).x
    assert special.entr(chosen).sum() >= special.entr(np.clip(referee, 0, 1)).sum() - 1e-7
    assert np.all(a @ chosen <= 1e-12)


def test_the_largest_entropy_at_a_limit_is_the_exponential_family_s():
    """p is proportional to exp(scale margin), with the scale at which the fourth policy is just not better."""
    scale = optimize.brentq(lambda s: MARGINS @ np.exp(s * MARGINS), 0, 100, xtol=1e-14)
    weights = np.exp(scale * MARGINS)
    found = maximum_entropy(nash_face(limit_of_three()))
    np.testing.assert_allclose(found, [*(weights / weights.sum()), 0], atol=1e-9)


def test_the_largest_entropy_is_the_limit_of_small_regularisation():
    rate = zoo.sparse(3, 1, 5, density=0.3)[0]
    assert not nash_face(rate).is_unique
    limit = regularised_nash(zoo.from_matrix(rate), 1e-4).policy[0]
    np.testing.assert_allclose(maximum_entropy(nash_face(rate)), limit, atol=2e-3)


@pytest.mark.parametrize("rate", POOLS)
def test_another_order_of_the_policies_changes_nothing(rate):
    order = np.random.default_rng(1).permutation(len(rate))
    old, new = rate_pool(pool(rate)), rate_pool(pool(rate[np.ix_(order, order)]))
    for name in ("mass", "low", "high"):
        np.testing.assert_allclose(getattr(new.lottery, name), getattr(old.lottery, name)[order], atol=1e-6)
    np.testing.assert_allclose(new.nash, old.nash[order], atol=1e-6)
    np.testing.assert_allclose(new.fit.reward, old.fit.reward[order], atol=1e-9)
    np.testing.assert_allclose(new.exploitability, old.exploitability[order])
    assert {frozenset(order[list(t.policies)]) for t in new.triples} == {frozenset(t.policies) for t in old.triples}
    assert (None if new.condorcet is None else order[new.condorcet]) == old.condorcet


# Copies


def with_copy(rate, i):
    members = [*range(len(rate)), i]
    return np.asarray(rate)[np.ix_(members, members)]


@pytest.mark.parametrize("rate", POOLS)
def test_a_copy_changes_nobody_under_nash(rate):
    old = rate_pool(pool(rate))
    for i in range(len(rate)):
        new = rate_pool(pool(with_copy(rate, i)))
        np.testing.assert_allclose(new.nash, [*old.nash, old.nash[i]], atol=1e-9)
    assert all(effect.nash < 1e-9 for effect in clone_effects(pool(rate), old))


@pytest.mark.parametrize("rate", POOLS)
def test_a_policy_shares_its_mass_with_its_copy_alone(rate):
    if len(np.unique(rate, axis=0)) < len(rate):
        return  # there are copies already
    old = rate_pool(pool(rate)).lottery
    for i in range(len(rate)):
        new = rate_pool(pool(with_copy(rate, i))).lottery
        np.testing.assert_allclose(new.mass[[i, -1]], old.mass[i] / 2, atol=1e-9)
        np.testing.assert_allclose(np.delete(new.mass, [i, len(rate)]), np.delete(old.mass, i), atol=1e-9)
        if old.mass[i] > 1e-9:  # either copy may have all of it
            assert not new.is_unique and new.low[i] < 1e-9
            assert new.high[i] == pytest.approx(old.high[i], abs=1e-6)


def test_the_largest_entropy_over_all_policies_would_favour_copies():
    """a and b tie; c loses to a with .9 and to b with .6. A second a would cost c a twentieth."""
    rate = np.array([[0.5, 0.5, 0.9], [0.5, 0.5, 0.6], [0.1, 0.4, 0.5]])
    assert rate_pool(pool(rate)).nash[2] == pytest.approx(-0.25)
    copied = with_copy(rate, 0)
    np.testing.assert_allclose(maximum_entropy(nash_face(copied)), [1 / 3, 1 / 3, 0, 1 / 3], atol=1e-9)
    assert (copied - 0.5)[2] @ maximum_entropy(nash_face(copied)) == pytest.approx(-0.3)
    assert rate_pool(pool(copied)).nash[2] == pytest.approx(-0.25)
    np.testing.assert_allclose(maximal_lottery(copied), [0.25, 0.5, 0, 0.25], atol=1e-9)


def test_a_copy_exchanges_the_order_by_elo():
    """2 loses to 3 alone, 3 to 1 alone: a second 1 gives 2 another easy win, and 3 another loss."""
    rate = [[0.5, 0.1, 0.8], [0.9, 0.5, 0.1], [0.2, 0.9, 0.5]]
    found = rate_pool(pool(rate))
    assert list(np.argsort(-found.fit.elo)) == [2, 1, 0]
    effect = clone_effects(pool(rate), found)[0]
    assert effect.exchanged == ((0, 2), (1, 2)) and effect.policy == 0 and effect.changed in (1, 2)
    copied = fit_bradley_terry(with_copy(rate, 0)).elo[:3]
    moved = copied - copied.mean() - found.fit.elo
    assert effect.elo == pytest.approx(np.abs(moved[1:]).max()) and effect.elo > 10 and effect.nash < 1e-15
    assert copied[1] > copied[2]


# Elo


def test_a_bradley_terry_pool_gives_its_rewards_back():
    reward = np.array([0.3, -1.2, 2.0, 0.0, 0.9])
    found = rate_pool(pool(special.expit(reward[:, None] - reward[None])))
    np.testing.assert_allclose(found.fit.reward, reward - reward.mean(), atol=1e-12)
    np.testing.assert_allclose(found.fit.residual, 0, atol=1e-13)
    assert found.fit.root_mean_square < 1e-13 and not found.fit.has_virtual_wins
    assert found.triples == () and found.decided_triples == 10 and found.condorcet == 2
    np.testing.assert_array_equal(found.lottery.mass, [0, 0, 1, 0, 0])
    assert found.exploiter == (2, 2, None, 2, 2)
    np.testing.assert_allclose(found.nash, special.expit(reward - 2.0) - 0.5, atol=1e-15)
    np.testing.assert_allclose(found.exploitability, -found.nash, atol=1e-15)


def test_four_hundred_points_are_odds_of_ten_to_one():
    fit = fit_bradley_terry(np.array([[0.5, 10 / 11], [1 / 11, 0.5]]))
    assert fit.elo[0] - fit.elo[1] == pytest.approx(400) and ELO_POINTS * np.log(10) == pytest.approx(400)


def general_fit(rate, count, virtual):
    """Rewards by a general solver on the likelihood."""
    wins = count * rate + virtual
    i, j = np.triu_indices(len(rate), 1)

    def loss(r):
        d = r[i] - r[j]
        return np.sum(wins[i, j] * np.logaddexp(0, -d) + wins[j, i] * np.logaddexp(0, d))

    r = optimize.minimize(loss, np.zeros(len(rate)), method="BFGS", options={"gtol": 1e-9}).x
    return r - r.mean()


@pytest.mark.parametrize("family", ["unstructured", "cyclic"])
def test_the_fit_is_that_of_a_general_solver_and_weighs_cells_by_their_counts(family):
    rate = zoo.RANDOM_PREFERENCES[family](0, 1, 5)[0]
    upper = np.triu(np.random.default_rng(0).integers(5, 400, (5, 5)), 1)
    count = upper + upper.T + 7 * np.eye(5)
    found = fit_bradley_terry(rate, count)
    np.testing.assert_allclose(found.reward, general_fit(rate, count, 0), atol=1e-5)
    fitted = special.expit(found.reward[:, None] - found.reward[None])
    np.testing.assert_allclose(found.residual, rate - fitted, atol=1e-12)
    assert found.root_mean_square == pytest.approx(np.sqrt(np.mean((rate - fitted)[np.triu_indices(5, 1)] ** 2)))
    even = fit_bradley_terry(rate).reward
    assert np.max(np.abs(even - found.reward)) > 1e-2
    uniform = zoo.bradley_terry_rewards(zoo.from_matrix(rate), np.full((1, 5), -np.log(5)))[0]
    np.testing.assert_allclose(even, uniform, atol=1e-5)


def test_virtual_wins_are_added_where_the_likelihood_has_no_maximum_and_there_alone():
    never = np.array([[0.5, 0.7, 1.0], [0.3, 0.5, 1.0], [0, 0, 0.5]])  # c never wins
    found = fit_bradley_terry(never, np.full((3, 3), 40.0))
    assert found.has_virtual_wins and np.all(np.isfinite(found.reward))
    np.testing.assert_allclose(found.reward, general_fit(never, 40, 0.5), atol=1e-5)
    assert fit_bradley_terry(never, np.full((3, 3), 4000.0)).elo[2] < found.elo[2] - 300
    circle = np.array([[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]])  # zeros, but everybody loses to somebody
    assert not fit_bradley_terry(circle).has_virtual_wins
    np.testing.assert_allclose(fit_bradley_terry(circle).reward, 0, atol=1e-12)


def test_elo_puts_another_first_than_the_winner_of_every_comparison():
    """a beats everybody narrowly; b crushes c."""
    found = rate_pool(pool([[0.5, 0.51, 0.51], [0.49, 0.5, 0.99], [0.49, 0.01, 0.5]]))
    assert found.condorcet == 0 and list(found.lottery.mass) == [1, 0, 0] and found.lottery.is_unique
    assert np.argmax(found.fit.elo) == 1 and found.fit.root_mean_square > 0.05


def test_the_mean_elo_of_mixtures_misleads_as_in_appendix_a():
    """2312.00886, App. A: of policies with pi(1) = 2 pi(2), (2/3, 1/3, 0) has the largest mean Elo, and loses to
    (0, 0, 1) with 50/99."""
    r = np.array(zoo.ELO_REWARDS)
    actions = special.expit(r[:, None] - r[None])
    fit = fit_bradley_terry(actions)
    np.testing.assert_allclose(fit.reward, r - r.mean(), atol=1e-12)
    mixtures = np.array([[2 / 3, 1 / 3, 0], [0, 0, 1]])
    by_elo = mixtures @ fit.elo
    assert by_elo[0] > by_elo[1]
    found = rate_pool(make_pool(["most Elo", "preferred"], mixtures @ actions @ mixtures.T))
    assert found.condorcet == 1 and found.exploitability[0] == pytest.approx(50 / 99 - 0.5, abs=1e-12)


# Triples


def test_triples_are_named_from_the_strongest_and_those_with_a_tie_do_not_count():
    rate = np.full((5, 5), 0.5)
    for i, j, p in [(0, 1, 0.9), (1, 2, 0.8), (2, 0, 0.7), (3, 0, 0.6), (3, 1, 0.55), (2, 3, 0.95), (4, 0, 0.9)]:
        rate[i, j], rate[j, i] = p, 1 - p
    found, decided = cyclic_triples(rate)
    assert decided == 4  # of 0, 1, 2, 3: every triple with 4 has a tie
    assert [(t.policies, t.links, t.weakest) for t in found] == [
        ((0, 1, 2), (0.9, 0.8, 0.7), 0.7),
        ((1, 2, 3), (0.8, 0.95, 0.55), 0.55),
    ]
    assert rate[0, 3] < 0.5 and rate[2, 0] > 0.5  # 0, 2, 3: 2 beats both


# Intervals


def votes_of(seed, policies, prompts):
    """Antisymmetric votes of prompts, ties among them, in which policies 0 and 1 are alike."""
    strength = np.random.default_rng(seed).integers(0, 3, (policies, prompts))
    strength[1] = strength[0]
    return 0.5 + 0.5 * np.sign(strength[:, None] - strength[None])


def three_cycle(rate):
    """The lottery of three policies without a tie in closed form: the winner, or each margin to the opposite policy."""
    a = rate - 0.5
    if (winner := np.all(a + np.eye(3) > 0, axis=1)).any():
        return winner.astype(float)
    opposite = np.abs([a[1, 2], a[2, 0], a[0, 1]])
    return opposite / opposite.sum()


def test_the_paired_bootstrap_is_an_independent_one_over_the_same_prompts():
    rng = np.random.default_rng(5)
    upper = rng.integers(0, 2, (3, 41)).astype(float)  # an odd number without ties: no two policies tie
    votes = np.full((3, 3, 41), 0.5)
    for row, (i, j) in zip(upper, [(0, 1), (1, 2), (2, 0)], strict=True):
        votes[i, j], votes[j, i] = row, 1 - row
    measured = pool_of_votes("abc", votes)
    found = bootstrap(measured, rate_pool(measured), 60, seed=9)
    draws, rows = np.random.default_rng(9), []
    for _ in range(60):
        chosen = draws.integers(41, size=41)
        rate = votes[:, :, chosen].mean(-1)
        mass = three_cycle(rate)
        fit = general_fit(rate, 41.0, 0.0) * 400 / np.log(10)
        rows.append((rate, mass, fit))
    masses = np.array([mass for _, mass, _ in rows])
    nash = np.array([(rate - 0.5) @ mass for rate, mass, _ in rows])
    for name, values, atol in (
        ("mass", masses, 1e-9),
        ("nash", nash, 1e-9),
        ("elo", [fit for *_, fit in rows], 1e-2),
    ):
        np.testing.assert_allclose(getattr(found, name).T, np.percentile(values, [2.5, 97.5], axis=0), atol=atol)
    np.testing.assert_allclose(found.condorcet, np.mean(masses == 1, axis=0))
    assert found.is_paired and found.replicates == 60 and found.seed == 9


def test_exploitability_is_bounded_by_exact_intervals_of_all_cells_at_once():
    """The ends are those of SciPy's binomial test at 1 - 0.05 / 2, of three policies that each meet two others."""
    rate, n = np.array([[0.5, 0.7, 0.4], [0.3, 0.5, 0.75], [0.6, 0.25, 0.5]]), 40
    found = exploitability_intervals(pool(rate, n))
    for i in range(3):
        ends = [stats.binomtest(round(rate[j, i] * n), n).proportion_ci(0.975, "exact") for j in range(3) if j != i]
        np.testing.assert_allclose(found[i], [max(0.5, *(x.low for x in ends)) - 0.5, max(x.high for x in ends) - 0.5])
    assert found[0, 0] == 0  # nobody surely beats it
    soft = np.full((2, 2, 30), 0.5)
    soft[0, 1] = np.linspace(0.2, 0.9, 30)
    soft[1, 0] = 1 - soft[0, 1]
    of_probabilities = exploitability_intervals(pool_of_votes("ab", soft))
    t = stats.ttest_1samp(soft[0, 1], 0).confidence_interval(0.95)
    np.testing.assert_allclose(of_probabilities[1], [max(t.low - 0.5, 0), t.high - 0.5], atol=1e-12)


def test_the_exploitability_of_equal_policies_is_covered_although_the_largest_cell_is_not_zero():
    """Eight policies draw a quality for each prompt; the better reply wins. All are equal, so the truth is 0."""
    rng, missed, above = np.random.default_rng(0), 0, 0.0
    for _ in range(200):
        quality = rng.standard_normal((8, 100))
        votes = 0.5 + 0.5 * np.sign(quality[:, None] - quality[None, :])
        measured = pool_of_votes("abcdefgh", votes)
        found = exploitability_intervals(measured)
        missed += np.sum(found[:, 0] > 0)
        above += np.mean(rate_pool(measured).exploitability > 0.02)
    assert missed / 1600 <= 0.05 and above / 200 > 0.8


def test_one_comparison_a_cell_has_no_intervals():
    votes = np.full((2, 2, 1), 0.5)
    votes[0, 1], votes[1, 0] = 1, 0
    assert rate_fully("x", pool_of_votes("ab", votes), 20, 0).intervals is None


def test_pairing_keeps_what_two_policies_share():
    """Policies 0 and 1 reply alike: one resampling of the prompts cannot tell them apart, one a cell does."""
    votes = votes_of(0, 4, 80)
    paired = pool_of_votes("abcd", votes)
    for rate in resampled_rates(paired, 20, seed=0):
        np.testing.assert_array_equal(rate[0], rate[1])
        np.testing.assert_allclose(rate + rate.T, 1, atol=1e-15)
    unpaired = make_pool("abcd", paired.rate, 80)
    assert any(np.any(rate[0, 2:] != rate[1, 2:]) for rate in resampled_rates(unpaired, 5, seed=0))
    found = rate_fully("x", paired, 30, seed=3).intervals
    for values in (found.elo, found.nash, found.mass):
        np.testing.assert_allclose(values[0], values[1], atol=1e-9)


def test_binomial_resamples_are_binomial_and_cover_the_truth():
    n, p, inside = 40, 0.7, 0
    draws = np.array([rate[0, 1] for rate in resampled_rates(pool([[0.5, p], [1 - p, 0.5]], n), 4000, seed=0)])
    expected = stats.binom.pmf(np.arange(n + 1), n, p)
    frequency = np.bincount(np.round(draws * n).astype(int), minlength=n + 1) / 4000
    assert np.all(np.abs(frequency - expected) <= 4.5 * np.sqrt(expected / 4000) + 1 / 4000)
    rng = np.random.default_rng(1)
    for seed in range(200):
        seen = np.clip(rng.binomial(n, p), 1, n - 1) / n
        rates = [rate[0, 1] for rate in resampled_rates(pool([[0.5, seen], [1 - seen, 0.5]], n), 150, seed)]
        low, high = np.percentile(rates, [2.5, 97.5])
        inside += low <= p <= high
    assert 0.88 <= inside / 200 <= 0.99


def test_intervals_of_elo_weigh_each_cell_by_its_count():
    count = np.array([[1.0, 400, 10], [400, 1, 90], [10, 90, 1]])
    measured = pool([[0.5, 0.6, 0.3], [0.4, 0.5, 0.7], [0.7, 0.3, 0.5]], count)
    found = bootstrap(measured, rate_pool(measured), 12, seed=2)
    rates = list(resampled_rates(measured, 12, seed=2))
    elo = np.array([general_fit(rate, count, 0.0) for rate in rates]) * ELO_POINTS
    np.testing.assert_allclose(found.elo.T, np.percentile(elo, [2.5, 97.5], axis=0), atol=0.05)


def test_intervals_follow_the_seed_and_shrink_with_the_comparisons():
    rate = [[0.5, 0.6, 0.4], [0.4, 0.5, 0.7], [0.6, 0.3, 0.5]]
    few, again, other, many = (
        rate_fully("x", pool(rate, n), 60, seed).intervals for n, seed in ((50, 0), (50, 0), (50, 1), (5000, 0))
    )
    np.testing.assert_array_equal(few.elo, again.elo)
    assert np.any(few.elo != other.elo)
    widths = [np.ptp(found.elo, axis=1).mean() for found in (few, many)]
    assert 7 < widths[0] / widths[1] < 14  # as the root of n
    assert many.triples == pytest.approx([1.0]) and 0.3 < few.triples[0] < 1 and not few.is_paired
    assert few.condorcet.sum() <= 1 and many.condorcet.sum() == 0
    assert (
        rate_fully("x", pool(rate), 60, 0).intervals is None and rate_fully("x", pool(rate, 50), 0, 0).intervals is None
    )


def test_ranges_of_a_face_are_over_all_its_points():
    low, high = mass_ranges(nash_face(np.full((3, 3), 0.5)))
    np.testing.assert_allclose([low, high], [[0, 0, 0], [1, 1, 1]], atol=1e-9)
