"""The study of NLHF in a small world: what each arm is made from, the ends of the family, the short form's tables."""

import dataclasses

import jax
import numpy as np
import pytest

import alignjax as aj
from alignjax.distributed import sharding, storage
from alignjax.errors import UserError
from alignjax.pipeline import config
from alignjax.pipeline.experiment import Context, ancestors, order
from alignjax.pipeline.run import run
from alignjax.tasks import post_world
from alignjax.tasks.post_grammar import read_post
from alignjax.training import data
from tests.conftest import ROOT
from tests.test_wiring import experiment, policy_stage

STUDIES = ROOT / "experiments" / "nlhf"
FOURTEEN, WHY = (STUDIES / f"{name}.py" for name in ("fourteen_policies", "why_nash"))
POLICIES = ["sft", "rlhf", "sp", "md1", "md2", "md3", "md4", "md5", "md6", "br", "ema1", "ema2"]
POLICIES += ["ema1_avg", "ema2_avg"]


@pytest.mark.parametrize("small", ["False", "True"])
@pytest.mark.parametrize("name", ["why_nash", "fourteen_policies", "objectives", "taus", "preference_models"])
def test_nothing_that_can_be_known_to_fail_is_in_the_studies(name, small, tmp_path):
    whole = config.load(STUDIES / f"{name}.py", {"small": small})
    mesh = sharding.make_mesh(aj.Mesh(data=1, fsdp=1, tensor=1), jax.devices()[:1])
    assert order(whole.stages) == list(whole.stages)
    for stage in whole.stages:
        whole.stages[stage].check(Context(whole, tmp_path, stage, mesh))


# --- the arms ---


def test_the_arms_differ_in_their_opponents_alone():
    stages = config.load(FOURTEEN, {}).stages
    assert list(stages["table"].policies) == POLICIES
    opponents = {"sp": aj.policy, "br": aj.reference, "ema1": aj.moving_average, "ema2": aj.moving_average}
    opponents |= {f"md{i}": aj.mixture(beta=i / 8) for i in range(1, 7)}
    for name, opponent in opponents.items():
        arm = stages[name]
        assert arm.data.samplers == (aj.policy, opponent)
        same = dataclasses.replace(arm, data=stages["md1"].data, average_decay=None, keep_at=stages["md1"].keep_at)
        assert same == stages["md1"]
    assert stages["rlhf"].data.preference == "reward" and stages["reward"].pairs == stages["preference"].pairs
    assert stages["ema1"].average_decay < stages["ema2"].average_decay
    assert stages["judge"].pairs == "judge_pairs" != stages["preference"].pairs


def test_averages_are_of_their_own_arms_and_the_curves_of_their_own_steps():
    stages = config.load(FOURTEEN, {}).stages
    for i in (1, 2):
        assert stages[f"ema{i}_avg"] == aj.KeptPolicy("average", policy=f"ema{i}")
    for arm in ("br", "md1"):
        for step in stages[arm].keep_at:
            assert stages[f"{arm}_{step}"] == aj.KeptPolicy(step, policy=arm)
            assert stages["hacking"].policies[f"{arm} {step}"] == f"{arm}_{step}"


def test_further_objectives_draw_from_their_own_samplers():
    stages, why = config.load(STUDIES / "objectives.py", {}).stages, config.load_module(WHY)
    mixed = aj.mixture(why.BETA)
    drawn = {
        "online_ipo": (aj.policy,) * 2, "ipo_md": (mixed,) * 2, "online_dpo": (aj.policy,) * 2,
        "xpo": (aj.policy, aj.reference), "inpo": (aj.policy,) * 4, "sppo": (aj.policy,) * 4, "egpo": (aj.policy,) * 3,
    }  # fmt: skip
    assert {name: stages[name].data.samplers for name in drawn} == drawn
    assert list(stages["table"].policies) == ["sft", "rlhf", "md1", *drawn]
    losses = {name: (stages[name].objective.loss.func, stages[name].objective.loss.keywords) for name in drawn}
    tau = why.TAU
    assert losses["online_ipo"] == losses["ipo_md"] == (aj.losses.online_ipo, {"tau": tau})
    assert losses["inpo"][0] is aj.losses.inpo and losses["inpo"][1]["tau"] == tau
    assert losses["egpo"] == (aj.losses.opponent_ipo, {"tau": tau}) and losses["sppo"][0] is aj.losses.sppo
    assert losses["online_dpo"][0] is aj.losses.dpo and losses["xpo"][0] is aj.losses.xpo
    assert [name for name in drawn if stages[name].extragradient] == ["egpo"]
    assert all(stages[name].start == stages[name].reference == "sft" for name in drawn)


def test_the_taus_are_the_paper_s_and_stand_beside_their_names():
    stages = config.load(STUDIES / "taus.py", {}).stages
    taus = {name: stages[stage].objective.loss.keywords["tau"]
            for name, stage in stages["table"].policies.items() if name != "sft"}  # fmt: skip
    assert list(taus) == [f"rlhf {x}" for x in (0.01, 0.02, 0.05, 0.1, 0.2)] + [
        f"md1 {x}" for x in (0.005, 0.008, 0.01, 0.02)
    ]
    assert all(float(name.split()[1]) == tau for name, tau in taus.items())
    losses = {"rlhf": aj.losses.regularized_policy_gradient, "md1": aj.losses.nash_md}
    for name, stage in stages["table"].policies.items():
        if name != "sft":
            assert stages[stage].objective.loss.func is losses[name.split()[0]]


def test_a_trained_best_response_plays_against_the_policy_that_it_begins_as():
    stages = config.load(FOURTEEN, {}).stages
    for name in ("sft", "rlhf", "md1"):
        arm = stages[f"against_{name}"]
        assert arm.start == arm.reference == name and arm.data.samplers == (aj.policy, aj.reference)
        assert arm.objective.loss.keywords == {"tau": 0.0}


def test_an_exploiter_s_win_is_its_own_and_not_the_policy_s():
    fourteen, why, world = config.load_module(FOURTEEN), config.load_module(WHY), post_world.PostWorld()
    prompts = world.prompts("test", 5, 0)
    styled = {style: [post_world.styled_summary(read_post(x), style) for x in prompts] for style in post_world.STYLES}
    replies = {name: styled["terse"] for name in fourteen.EXPLOITED}
    replies |= {f"against {name}": styled["careful"] for name in fourteen.EXPLOITED}
    numbers = fourteen.exploitation(prompts, replies, post_world.MASSES, why.read_point).numbers
    assert {round(found["trained"]["mean_probability"], 6) for found in numbers.values()} == {0.66}
    assert {round(found["best_style"]["mean_probability"], 6) for found in numbers.values()} == {0.66}
    assert all(found["shares"] == {"bold": 0, "careful": 0, "terse": 1} for found in numbers.values())


def test_beta_0_is_self_play_and_beta_1_the_best_response_bit_for_bit(tmp_path):
    def arm(opponent):
        return policy_stage(data=dataclasses.replace(policy_stage().data, samplers=(aj.policy, opponent)))

    arms = {"zero": aj.mixture(0.0), "sp": aj.policy, "one": aj.mixture(1.0), "br": aj.reference}
    whole = experiment(asked=aj.ZeroShotPreference("base"), **{name: arm(opponent) for name, opponent in arms.items()})
    run(whole, tmp_path)

    def params(name):
        return jax.tree.leaves(Context(whole, tmp_path, name, sharding.make_mesh(whole.mesh)).load(name).params)

    for a, b in (("zero", "sp"), ("one", "br")):
        assert all(np.array_equal(x, y) for x, y in zip(params(a), params(b), strict=True))
    assert any(np.any(x != y) for x, y in zip(params("sp"), params("br"), strict=True))


# --- replies by the task's own writers ---


def test_replies_of_the_writers_are_what_a_policy_imitates(tmp_path):
    world = post_world.PostWorld()
    whole = aj.Experiment(post_world.post_task(world), {"summaries": aj.TaskReplies(30)})
    run(whole, tmp_path)
    rows = data.read_pairs(tmp_path / "summaries" / "data", "train")
    context = Context(whole, tmp_path, "summaries", sharding.make_mesh(whole.mesh))
    written = set(post_world.post_summaries(world, 30, context.seed()))
    assert {(row["prompt"], row["first"]) for row in rows} == written and len(written) == 30
    assert {(row["second"], row["p"]) for row in rows} == {("", 1.0)}
    assert whole.stages["summaries"].exposure(context) == aj.Exposure()


def test_a_task_without_writers_is_refused(tmp_path):
    with pytest.raises(UserError, match="has no writers of its own; give LoadReplies a file"):
        run(experiment(replies=aj.TaskReplies(30)), tmp_path, only=["replies"])


# --- why Nash ---


def test_the_annotators_who_label_are_those_of_the_study():
    whole = config.load(WHY, {"masses": "(0.5, 0.3, 0.2)"})
    assert whole.stages["course"].function.keywords["masses"] == (0.5, 0.3, 0.2)
    assert whole.task.oracles["annotators"].args == ((0.5, 0.3, 0.2),)


@pytest.fixture(scope="module")
def why():
    return config.load_module(WHY)


def point_of(why, style, prompts):
    """What is read of a policy that writes one style always."""
    replies = [post_world.styled_summary(read_post(x), style) for x in prompts]
    return why.read_point(post_world.MASSES, f"rlhf 2 {STEP}", prompts, replies)


STEP = 50


def test_a_policy_of_one_style_is_exploited_by_the_style_that_beats_it(why):
    complete, brief, faithful = post_world.MASSES
    prompts = post_world.PostWorld(facts=2).prompts("test", 20, 0)
    for style, beaten_by in (("bold", brief + faithful), ("careful", complete + brief), ("terse", complete + faithful)):
        point = point_of(why, style, prompts)
        assert (point.arm, point.seed, point.step) == ("rlhf", 2, STEP)
        assert point.shares == [float(style == other) for other in post_world.STYLES]
        assert point.exploitability == pytest.approx(beaten_by - 0.5)


def test_the_exact_game_is_that_of_the_three_styles(why):
    world = post_world.PostWorld(facts=2)
    mu = np.array([0.5, 0.3, 0.2])
    exact = why.solve_game(post_world.MASSES, world.prompts("test", 1, 0)[0], 0.9 * mu)
    np.testing.assert_allclose(exact.nash, np.array([0.16, 0.12, 0.22]) / 0.5, atol=1e-5)
    links = np.array([[0.5, 0.72, 0.38], [0.28, 0.5, 0.66], [0.62, 0.34, 0.5]])  # of bold, careful, terse
    ends = mu * np.exp(links @ exact.mixture / (why.TAU / (1 - why.BETA)))  # where Nash-MD-PG's mixture is stationary
    np.testing.assert_allclose(exact.mixture, ends / ends.sum(), atol=1e-5)
    mixed = exact.policy ** (1 - why.BETA) * mu**why.BETA
    np.testing.assert_allclose(mixed / mixed.sum(), exact.mixture, atol=1e-6)
    assert why.total_variation([0.32, 0.24, 0.44], exact.nash) < 1e-5
    assert why.total_variation([0.0, 0.0, 0.0], exact.nash) == pytest.approx(1)


def test_the_course_follows_both_arms_over_training_beside_the_exact_game(why):
    """The careful sft; rlhf turns bold with both seeds, nash_md stays careful; terse beats bold, bold beats careful."""
    prompts = post_world.PostWorld(facts=2).prompts("test", 6, 0)
    styled = {style: [post_world.styled_summary(read_post(x), style) for x in prompts] for style in post_world.STYLES}
    replies = {"sft 0 0": styled["careful"]}
    for seed in range(2):
        replies |= {f"rlhf {seed} 25": styled["careful"], f"rlhf {seed} 50": styled["bold"]}
        replies |= {f"nash_md {seed} 25": styled["careful"], f"nash_md {seed} 50": styled["careful"]}
    found = why.course(prompts, replies, masses=post_world.MASSES)
    assert "Mean exploitability: rlhf 0.120, nash_md 0.220, 0.5 times as much." in found.text
    assert found.text.count("| rlhf ") == found.text.count("| nash_md ") == 2  # the ends alone
    bold, *_, exploitability = found.pictures["styles"].axes
    rlhf, nash_md, *others = (line.get_xydata().tolist() for line in bold.lines)
    assert rlhf == others[0] == [[0, 0], [25, 0], [50, 1]] and nash_md == others[1] == [[0, 0], [25, 0], [50, 0]]
    np.testing.assert_allclose(exploitability.lines[0].get_ydata(), [0.22, 0.22, 0.12], atol=1e-9)
    assert bold.lines[-1].get_ydata()[0] == pytest.approx(0.32, abs=1e-5)  # the exact Nash policy


# --- the fourteen, in short ---


def test_the_short_form_has_one_matrix_from_one_generation_a_policy_and_its_game(tmp_path):
    whole, shown = config.load(FOURTEEN, {"small": "True"}), ("sft", "rlhf", "ema1", "ema1_avg")
    stages = {**whole.stages, "table": dataclasses.replace(whole.stages["table"], policies={n: n for n in shown})}
    wanted = ancestors(stages, ["game"])
    run(dataclasses.replace(whole, stages={n: stage for n, stage in stages.items() if n in wanted}), tmp_path)
    figures = storage.read_json(tmp_path / "table" / "stage.json")["figures"]
    assert figures["replies"] == len(shown) * figures["prompts"]
    annotators, held_out = storage.read_json(tmp_path / "table" / "win_rates.json")
    assert annotators["policies"] == held_out["policies"] == list(shown)
    rate, kl = np.array(annotators["mean_probability"]), np.array(annotators["kl_to_reference"])
    regularized = annotators["regularized"]
    expected = rate - regularized["tau"] * (kl[:, None] - kl[None, :])
    np.testing.assert_allclose(np.array(regularized["preference"])[~np.eye(4, dtype=bool)],
                               expected[~np.eye(4, dtype=bool)], atol=1e-6)  # fmt: skip
    assert (tmp_path / "game" / "section.md").read_text().count("Ratings of the pool") == 2
    report = (tmp_path / "report.md").read_text()
    assert "held_out" in report and "![row beats column](table-annotators.png)" in report
