"""Judges and tournaments: exact intervals, a matrix that is antisymmetric around 1/2, calibration by hand."""

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from alignjax.distributed import sharding
from alignjax.distributed.hosts import Hosts
from alignjax.errors import UserError
from alignjax.models.tokenizer import Tokenizer, encode_continuation
from alignjax.pipeline.experiment import Program, programs_of
from alignjax.pipeline.judges import ModelJudge, Oracle
from alignjax.pipeline.stages import Tournament, Writing
from alignjax.pipeline.stages.replies import read_replies, reply_measures
from alignjax.preferences import judges
from alignjax.preferences.statistics import mean_interval
from alignjax.preferences.tournament import clopper_pearson, regularized_preferences, win_rates
from alignjax.reporting import tables
from alignjax.sampling.process import Sampling
from alignjax.tasks.task import Format, oracle_from_score

WRITING = Writing(max_new_tokens=2, buckets=(8,), batch=2)
PROMPTS = [f"x{i}" for i in range(24)]


@pytest.fixture(scope="module")
def replies():
    """Three policies whose replies are numbers; ties are many."""
    rng = np.random.default_rng(0)
    return {name: [str(v) for v in rng.integers(0, 4, len(PROMPTS)) + i] for i, name in enumerate(("a", "b", "c"))}


def by_number(prompts, mine, theirs):
    """A soft judge: P = 1/2 + gap/100, so that only the sign may count."""
    return np.array([0.5 + (int(a) - int(b)) / 100 for a, b in zip(mine, theirs, strict=True)])


@pytest.mark.parametrize("n", [1, 7, 40])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_intervals_of_whole_wins_are_the_exact_binomial_ones(n, level):
    for wins in range(n + 1):
        want = stats.binomtest(wins, n).proportion_ci(level, method="exact")
        np.testing.assert_allclose(clopper_pearson(wins, n, level), want, rtol=1e-9, atol=1e-12)


def test_intervals_grow_with_half_wins_and_mirror_under_exchange():
    n = 15
    low, high = np.transpose([clopper_pearson(w / 2, n) for w in range(2 * n + 1)])
    rate = np.arange(2 * n + 1) / (2 * n)
    assert np.all(np.diff(low) > 0) and np.all(np.diff(high) > 0)
    assert np.all((low <= rate) & (rate <= high)) and (low[0], high[-1]) == (0, 1)
    np.testing.assert_allclose(low, 1 - high[::-1], atol=1e-12)


@pytest.mark.parametrize("n", [5, 20])
def test_an_interval_covers_the_truth_at_least_as_often_as_it_says(n):
    bounds = np.array([clopper_pearson(k, n) for k in range(n + 1)])
    for p in np.linspace(0.01, 0.99, 45):
        covered = (bounds[:, 0] <= p) & (p <= bounds[:, 1])
        assert stats.binom.pmf(np.arange(n + 1), n, p)[covered].sum() >= 0.95


def test_one_policy_at_a_time_lives_beside_the_reference(tmp_path, monkeypatch):
    """What it lies over may be loaded too. Otherwise the models of all rows would be in memory."""
    under = {"low": "base", "other": "full", "mine": "start"}
    seen = {}

    class Line:
        folder, name, hosts, loaded = tmp_path, "table", Hosts(), {}

        def fingerprint(self, name, source):
            return f"{source.name} of {source.policy}"

        def load(self, stage):
            self.loaded |= {stage: stage} | ({under[stage]: under[stage]} if stage in under else {})
            return stage

        def stop_if_preempted(self):
            pass

    def draw(self, context, programs, name, policy, reference, prompts):
        seen[name] = set(context.loaded)
        return iter([["text"], [1], [0.0], [-1.0]])

    monkeypatch.setattr(Tournament, "draw", draw)
    policies = {name: name for name in ("start", "low", "other", "full", "mine")}
    table = Tournament(policies=policies, reference="mine", judges={"o": Oracle("o")}, prompts=1, writing=WRITING)
    assert len(dict(table.write(Line(), (), ["x"]))) == 5
    mine = {"mine", "start"}
    assert seen == {
        "start": mine, "low": mine | {"low", "base"}, "other": mine | {"other", "full"}, "full": mine | {"full"},
        "mine": mine,
    }  # fmt: skip


def test_win_rates_count_votes_and_half_of_ties(replies):
    rates = win_rates(by_number, PROMPTS, replies)
    for (i, a), (j, b) in itertools.permutations(enumerate(replies), 2):
        gaps = np.array([int(x) - int(y) for x, y in zip(replies[a], replies[b], strict=True)])
        wins = np.sum(gaps > 0) + 0.5 * np.sum(gaps == 0)
        assert np.sum(gaps == 0) > 0
        assert rates.rate[i, j] == pytest.approx(wins / len(PROMPTS), abs=1e-12)
        got = (rates.low[i, j], rates.high[i, j])
        np.testing.assert_allclose(got, clopper_pearson(wins, len(PROMPTS)), atol=1e-12)


def test_the_matrix_is_antisymmetric_around_a_half_and_inside_its_intervals(replies):
    rate, low, high, *_ = win_rates(by_number, PROMPTS, replies)
    np.testing.assert_array_equal(rate + rate.T, np.ones((3, 3)))
    np.testing.assert_allclose(low + high.T, np.ones((3, 3)), atol=1e-15)
    assert np.all((low <= rate) & (rate <= high)) and np.all((low >= 0) & (high <= 1))
    off = ~np.eye(3, dtype=bool)
    assert np.all(low[off] < rate[off]) and np.all(rate[off] < high[off])


def test_a_policy_ties_with_itself_and_with_its_copy(replies):
    rate, low, high, *_ = win_rates(by_number, PROMPTS, {"a": replies["a"], "copy": replies["a"]})
    np.testing.assert_array_equal(rate, np.full((2, 2), 0.5))
    assert low[0, 0] == high[0, 0] == 0.5 and low[0, 1] < 0.5 < high[0, 1]


def test_rates_do_not_depend_on_the_order_of_policies(replies):
    names = list(replies)
    base = win_rates(by_number, PROMPTS, replies)
    for order in itertools.permutations(range(3)):
        other = win_rates(by_number, PROMPTS, {names[i]: replies[names[i]] for i in order})
        for a, b in zip(base, other, strict=True):
            np.testing.assert_allclose(a[np.ix_(order, order)], b, atol=1e-12)


def test_every_vote_is_of_replies_to_the_same_prompt():
    seen = []

    def judge(prompts, mine, theirs):
        seen.extend(zip(prompts, mine, theirs, strict=True))
        return np.ones(len(prompts))

    said = {name: [f"{name}{x}" for x in PROMPTS] for name in ("u", "v")}
    rate = win_rates(judge, PROMPTS, said).rate
    assert {(x, y[1:], z[1:]) for x, y, z in seen} == {(x, x, x) for x in PROMPTS}
    assert {rate[0, 1], rate[1, 0]} == {0.0, 1.0}
    winner = seen[0][1][0]
    assert rate[list(said).index(winner)].max() == 1.0


def test_the_oracle_judges_each_prompt_by_its_own_replies():
    judge = judges.oracle_judge(oracle_from_score(lambda prompt, text: text.count(prompt)))
    p = judge(["a", "b", "a"], ["aa", "a", "b"], ["a", "bb", "b"])
    np.testing.assert_array_equal(p, [1.0, 0.0, 0.5])
    np.testing.assert_array_equal(p, 1 - judge(["a", "b", "a"], ["a", "bb", "b"], ["aa", "a", "b"]))


@pytest.mark.parametrize(("p", "label", "accuracy", "error"), [
    ([0.9, 0.8, 0.3, 0.5], [1, 0, 0, 1], 0.625, (0.1 + 0.8 + 0.3 + 0.5) / 4),
    ([0.62, 0.68], [1, 0], 0.5, 0.15),  # one bin: |.65 - .5|
    ([0.62, 0.58], [1, 0], 0.5, (0.38 + 0.58) / 2),  # two bins
    ([0.75] * 4, [1, 1, 1, 0], 0.75, 0.0),
    ([0.7, 0.7, 0.2], [0.7, 0.7, 0.2], 1.0, 0.0),  # soft labels
    ([0.5, 0.5], [1, 0], 0.5, 0.0),
    ([1.0, 0.0], [1, 0], 1.0, 0.0),
])  # fmt: skip
def test_calibration_by_hand(p, label, accuracy, error):
    p, label = np.array(p), np.array(label, float)
    found = judges.calibration(p, label)
    assert found["accuracy"] == pytest.approx(accuracy)
    assert found["calibration_error"] == pytest.approx(error, abs=1e-12)
    inside = np.clip(p, 1e-7, 1 - 1e-7)
    entropy = -np.mean([y * np.log(q) + (1 - y) * np.log(1 - q) for q, y in zip(inside, label, strict=True)])
    assert found["cross_entropy"] == pytest.approx(entropy) and found["n"] == len(p)


def test_calibration_is_unmoved_by_exchange_of_the_sides():
    rng = np.random.default_rng(1)
    p, label = rng.uniform(size=400), rng.integers(0, 2, 400).astype(float)
    mine, mirrored = judges.calibration(p, label), judges.calibration(1 - p, 1 - label)
    assert mine == pytest.approx(mirrored)


def test_a_calibrated_forecaster_has_a_small_error_and_an_overconfident_one_its_excess():
    rng = np.random.default_rng(2)
    truth = rng.uniform(size=20000)
    label = (rng.uniform(size=20000) < truth).astype(float)
    assert judges.calibration(truth, label)["calibration_error"] < 0.02
    always = judges.calibration(np.full(20000, 0.999), label)
    assert always["calibration_error"] == pytest.approx(0.999 - label.mean(), abs=1e-9)


def letters():
    """A tokenizer of letters, with a BOS."""

    def bare(text):
        return [ord(c) for c in text]

    return Tokenizer(lambda text: [1, *bare(text)], bare, str, lambda piece: None, 256, print)


@pytest.mark.parametrize(("batch", "count"), [(8, 3), (8, 8), (8, 19), (16, 19)])
def test_a_model_judge_scores_each_row_alone_whatever_the_batch(batch, count):
    tokenizer, form = letters(), Format(" ", "\n\nHuman:", ("Human:",))

    def value(weights, prompt, side):
        position = np.arange(1, side.tokens.shape[1] + 1, dtype=np.float32)[None]
        text = (side.tokens * side.mask * position).sum(-1) % 97
        return weights * text * ((prompt.tokens * prompt.mask).sum(-1) % 7 - 3)

    def logit(weights, prompt, first, second):
        return value(weights, prompt, first) - value(weights, prompt, second)

    mesh = sharding.make_mesh(sharding.Mesh())
    ask = judges.preference_asker(logit, mesh)
    judge = judges.model_judge(ask, np.float32(0.01), tokenizer, form, batch=batch, mesh=mesh, owner="test")
    rng = np.random.default_rng(count)
    texts = [["".join(rng.choice(list("abc "), rng.integers(1, 50))) for _ in range(count)] for _ in range(3)]

    def by_hand(prompt, text):
        ids = encode_continuation(tokenizer, f" {text}\n\nHuman:")
        return 0.01 * (np.arange(1, len(ids) + 1) @ ids % 97) * (sum(tokenizer.encode(prompt)) % 7 - 3)

    want = [1 / (1 + np.exp(by_hand(x, z) - by_hand(x, y))) for x, y, z in zip(*texts, strict=True)]
    p = judge(*texts)
    np.testing.assert_allclose(p, want, atol=1e-5)
    np.testing.assert_allclose(p + judge(texts[0], texts[2], texts[1]), np.ones(count), atol=1e-6)
    assert np.ptp(p) > 0.2
    some = [text or "x" for text in texts[1]]
    nothing = [""] * count
    np.testing.assert_array_equal(judge(texts[0], nothing, some), np.zeros(count))
    np.testing.assert_array_equal(judge(texts[0], some, nothing), np.ones(count))
    np.testing.assert_array_equal(judge(texts[0], nothing, nothing), np.full(count, 0.5))


def test_a_report_shows_every_figure_and_dashes_what_was_not_measured(tmp_path):
    table = {
        "judge": "oracle", "policies": ["a", "b"], "n": 40, "win_rate": [[0.5, 0.7], [0.3, 0.5]],
        "low": [[0.5, 0.54], [0.17, 0.5]], "high": [[0.5, 0.83], [0.46, 0.5]],
        "mean_length": [3.0, 4.5], "kl_to_reference": [-0.0004, None], "mean_score": [0.25, -1.0],
        "judge_description": Oracle("exact").describe(), "reference": "mu",
    }  # fmt: skip
    text = tables.win_rate_table(table)
    assert "the task's exact oracle" in text and "log-ratio to mu," in text
    assert "the preference model of stage judge" in tables.win_rate_table(
        {**table, "judge_description": ModelJudge("judge").describe()}
    )
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert cells[0] == ["oracle (n=40)", "a", "b", "tokens", "KL, nats", "score"]
    assert cells[2] == ["a", "-", "0.700 [0.540, 0.830]", "3.00", "0.00", "0.25"]
    assert cells[3] == ["b", "0.300 [0.170, 0.460]", "-", "4.50", "-", "-1.00"]
    assert len({len(row) for row in rows}) == 1


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"text": ["a"], "length": [1]}',
        '{"text": [], "length": [], "kl": [], "reference_logp": []}',
        '{"text": 1, "length": [1], "kl": [0], "reference_logp": [-1]}',
        '{"text": "a", "length": [1], "kl": [0], "reference_logp": [-1]}',
        '{"text": [null], "length": [1], "kl": [0], "reference_logp": [-1]}',
        '{"text": ["a"], "length": ["1"], "kl": [0], "reference_logp": [-1]}',
        '{"text": ["a"], "length": [true], "kl": [0], "reference_logp": [-1]}',
        '{"text": ["a"], "length": [1], "kl": [null], "reference_logp": [-1]}',
        '{"text": {"a": 1}, "length": [1], "kl": [0], "reference_logp": [-1]}',
        '{"text": ["a"], "length": [1], "kl": [0]}',
        '{"text": ["a"], "length": [1], "kl": [0], "reference_logp": ["-1"]}',
    ],
)
def test_damaged_replies_are_named(tmp_path, text):
    path = tmp_path / "replies-base.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"replies-base\.json is (missing or )?damaged; remove"):
        read_replies(path, 1)
    path.write_text('{"text": ["a"], "length": [1], "kl": [NaN], "reference_logp": [NaN]}')
    assert read_replies(path, 1)["text"] == ["a"]


def table_task(score):
    return SimpleNamespace(score=score)


def test_the_entropy_is_the_mean_of_minus_log_pi_and_the_kl_its_log_ratio():
    """pi(y) = 1/2, 1/4 and mu(y) = 1/8, 1/16, by hand."""
    logs = np.log([0.5, 0.25]), np.log([0.125, 0.0625])
    rows = {"length": [1, 1], "kl": list(logs[0] - logs[1]), "reference_logp": list(logs[1])}
    filtered = {**rows, "kl": [np.nan, np.nan]}
    texts = {"a": ["x", "y"], "b": ["x", "y"]}
    found = reply_measures(table_task(None), ["p", "q"], {"a": rows, "b": filtered}, texts)
    assert found["entropy"] == [pytest.approx(1.5 * np.log(2)), None]
    assert found["kl_to_reference"] == [pytest.approx(2 * np.log(2)), None]
    assert found["perplexity"] == [pytest.approx(2**3.5)] * 2 and found["mean_score"] == [None, None]


@pytest.fixture(scope="module")
def regularized():
    """P [3, 3, N], antisymmetric, and log-ratios [3, N] that prompts share a part of."""
    rng, n = np.random.default_rng(4), 50
    upper = rng.uniform(size=(3, 3, n))
    p = np.where(np.arange(3)[:, None, None] < np.arange(3)[None, :, None], upper, 1 - upper.swapaxes(0, 1))
    p[np.arange(3), np.arange(3)] = 0.5
    return p, rng.normal([[1.0], [4.0], [0.0]], 1.0, (3, n)) + rng.normal(size=n)


def test_p_tau_pays_each_side_its_own_kl(regularized):
    p, ratio = regularized
    tau = 0.05
    found = regularized_preferences(p, ratio, tau)
    for i, j in itertools.permutations(range(3), 2):
        kl = ratio.mean(-1)
        assert found.preference[i, j] == pytest.approx(p[i, j].mean() - tau * kl[i] + tau * kl[j])
        want = stats.ttest_1samp(p[i, j] - tau * ratio[i] + tau * ratio[j], 0).confidence_interval(0.95)
        np.testing.assert_allclose((found.low[i, j], found.high[i, j]), want, rtol=1e-9)
    assert found.preference[1, 2] < p[1, 2].mean()  # 1 is far from mu, and pays for it
    np.testing.assert_allclose(found.preference + found.preference.T, 1)
    np.testing.assert_allclose(found.low + found.high.T, 1)
    np.testing.assert_array_equal(np.diag(found.preference), 0.5)


def test_p_tau_at_0_is_the_mean_probability_and_may_leave_the_unit_interval(regularized):
    p, ratio = regularized
    found = regularized_preferences(p, ratio, 0.0)
    np.testing.assert_allclose(found.preference, p.mean(-1))
    low, high = mean_interval(p[0, 1], (-np.inf, np.inf))
    assert (found.low[0, 1], found.high[0, 1]) == (low, high)
    far = regularized_preferences(p, ratio, 1.0)
    assert far.preference[2, 1] > 1 and far.low[1, 2] < far.high[1, 2] < 0  # no bounds cut it
    one = regularized_preferences(p[..., :1], ratio[:, :1], 0.1)
    assert np.all(np.isinf(one.low)) and np.all(np.isfinite(one.preference))


def test_a_tournament_writes_p_tau_of_its_replies_and_needs_plain_samples():
    table = Tournament(policies={"a": "a", "b": "b"}, reference="a", judges={"o": Oracle("o")}, prompts=2,
                       writing=WRITING, tau=0.25)  # fmt: skip
    replies = {"a": ["xx", "x"], "b": ["x", "xxx"]}
    rates = win_rates(lambda x, y, z: np.array([0.75, 0.5]), ["p", "q"], replies)  # b against a
    found = table.regularized(rates, np.array([[0.0, 0.0], [1.0, 3.0]]))["regularized"]
    assert found["tau"] == 0.25 and found["preference"][1][0] == pytest.approx(0.625 - 0.25 * 2.0)
    assert found["preference"][0][1] == pytest.approx(0.375 + 0.25 * 2.0)
    assert Tournament(**{**vars(table), "tau": None}).regularized(rates, np.zeros((2, 2))) == {}
    one = table.regularized(rates._replace(probability=rates.probability[..., :1]), np.zeros((2, 1)))["regularized"]
    assert one["low"] == [[None] * 2] * 2
    shown = {"policies": ["a", "b"], "judge": "o", "n": 2, "reference": "mu", "regularized": found}
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in tables.regularized_table(shown).split("\n")
    ]
    low, high = found["low"][1][0], found["high"][1][0]
    assert ["b", f"{found['preference'][1][0]:.3f} [{low:.3f}, {high:.3f}]", "-"] in rows
    assert "[-]" in tables.regularized_table({**shown, "regularized": {"tau": 0.25, **one}})
    with pytest.raises(UserError, match=r"Tournament\.tau needs the KL"):
        Tournament(**{**vars(table), "writing": replace(WRITING, sampling=Sampling(top_p=0.9))})
    with pytest.raises(UserError, match=r"Tournament\.tau=-1 must be"):
        Tournament(**{**vars(table), "tau": -1})


@pytest.mark.parametrize("empty", ["policies", "judges"])
def test_a_tournament_without_policies_or_judges_is_refused(empty):
    words = {"policies": {"a": "a"}, "judges": {"oracle": Oracle("exact")}, empty: {}}
    with pytest.raises(UserError, match=rf"Tournament\.{empty} is empty; name one"):
        Tournament(**words, reference="a", prompts=1, writing=Writing(1, (8,), 8))


def test_a_judge_without_finite_logits_is_refused_by_its_owner():
    mesh = sharding.make_mesh(sharding.Mesh())
    ask = judges.preference_asker(lambda params, prompt, first, second: first.tokens[:, 0] * np.nan, mesh)
    form = Format("", "", ("x",))
    judge = judges.model_judge(ask, {}, letters(), form, batch=8, mesh=mesh, owner="table: the judge 'j'")
    with pytest.raises(UserError, match="table: the judge 'j' gives logits that are not finite"):
        judge(["a"], ["b"], ["c"])


def test_programs_are_found_by_their_whole_name():
    """A policy or judge whose name begins or continues another's has programs of its own."""
    names = ("write md 24 24", "write md 24 80", "write md 24", "write md 80", "judge rater 2", "judge rater")
    programs = [Program(name, name, (), 0) for name in names]
    assert [p.name for p in programs_of(programs, "write md 24", (24, 80))] == ["write md 24 24", "write md 24 80"]
    assert [p.name for p in programs_of(programs, "write md", (24, 80))] == ["write md 24", "write md 80"]
    assert [p.name for p in programs_of(programs, "judge rater")] == ["judge rater"]
    assert [p.name for p in programs_of(programs, "judge rater 2")] == ["judge rater 2"]
