"""Objectives that draw: the real collector and learner near the known ends, stages that resume, and what is refused."""

import dataclasses
import functools
import os
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import alignjax as aj
from alignjax import losses
from alignjax.distributed import sharding
from alignjax.errors import RunAgain, UserError
from alignjax.pipeline.experiment import Context
from alignjax.pipeline.run import run
from alignjax.preferences.preference_models import PreferenceModel
from alignjax.training.collect import Collector
from alignjax.training.learn import COLLECT, UpdateSchedule, init_state, make_learn, step_key
from alignjax.training.metrics import MetricsWriter, read_metrics
from alignjax.types import Process, Roles
from tests.conftest import ragged
from tests.enumerated import ACTIONS, as_policy, log_prob
from tests.test_fixed_points import (
    ALPHA,
    CYCLIC,
    TAU,
    direct,
    game_of,
    inpo,
    kl_to,
    nash_at,
    opponent,
    sppo,
    tilted_by_its_own_rewards,
    xpo_root,
)
from tests.test_wiring import Random, experiment, policy_stage

# --- sampled: a policy of one token, whose ends are known ---

REFERENCE = {"first": jnp.asarray([0.5, -0.3, 0.2, 0.0, -0.6])}
PROMPTS = ragged([[1]] * 512)
LOGITS = np.log(CYCLIC / (1 - CYCLIC))
PREFERENCE = PreferenceModel(dict, lambda p, x, y, z: jnp.asarray(LOGITS)[y.tokens[:, 0], z.tokens[:, 0]], None)


def prefill(params, prompt, max_new_tokens):
    """The process that writes one token by the table."""
    logits = jnp.broadcast_to(params["first"], (len(prompt.tokens), len(ACTIONS)))
    return Process(lambda carry, token: (carry, logits), jnp.zeros(len(prompt.tokens)), logits)


def policies(objective, samplers, steps, rate=0.1, **options):
    """log-probs of the policy before and after each step of the real collector and learner, [steps + 1, Y]."""
    scorer = as_policy(log_prob)
    collector = Collector(
        types.SimpleNamespace(prefill=prefill), samplers, 1, ((9,),), (), (), objective, scorer, PREFERENCE, False
    )
    optimizer = optax.sgd(rate)
    learn = make_learn(functools.partial(objective, policy=scorer), optimizer, **options)

    def step(state, _):
        roles = Roles(state.params, REFERENCE, {}, {})
        state, _ = learn(state, None, collector.collect(roles, PROMPTS, step_key(state, COLLECT)))
        return state, jax.nn.log_softmax(state.params["first"])

    start = init_state(REFERENCE, optimizer, jax.random.key(0), False, anchor=options.get("extragradient", False))
    _, passed = jax.jit(lambda state: jax.lax.scan(step, state, None, steps))(start)
    return np.concatenate([jax.nn.log_softmax(REFERENCE["first"])[None], passed])


def tail_mean(passed):
    """The mean of the last logits, over which the sampling noise averages out."""
    return jax.nn.log_softmax(jnp.mean(passed[-100:], 0))


FITTED = UpdateSchedule(epochs=5, minibatches=1)
SAMPLED = {
    "online DPO": (direct(losses.dpo, beta=0.5), (aj.policy,) * 2, {"rate": 4.0}, tilted_by_its_own_rewards),
    "XPO": (direct(losses.xpo, (1,), beta=0.5, alpha=ALPHA), (aj.policy, aj.reference), {"rate": 2.0}, xpo_root),
    "EGPO": (opponent(), (aj.policy,) * 3, {"rate": 0.05, "extragradient": True}, lambda _, mu: nash_at(TAU, mu)),
    "INPO": (inpo(4), (aj.policy,) * 4, {"rate": 0.3, "schedule": FITTED}, lambda _, mu: nash_at(TAU, mu)),
}


@pytest.mark.parametrize("name", SAMPLED)
def test_drawn_batches_lead_near_the_end_of_the_exact_ones(name):
    objective, samplers, options, referee = SAMPLED[name]
    logp = tail_mean(policies(objective, samplers, 300, **options))
    want = referee(logp, REFERENCE)
    assert kl_to(want, logp) < 2e-3 < 0.02 < kl_to(want, jax.nn.log_softmax(REFERENCE["first"]))


def test_the_average_of_sppo_s_drawn_policies_is_hard_to_beat():
    objective = sppo(4, eta=0.5)
    passed = policies(objective, (aj.policy,) * 4, 300, rate=0.3, schedule=FITTED)
    game = game_of(REFERENCE)
    average, start = (float(aj.games.game.exploitability(game, jnp.log(jnp.mean(jnp.exp(x), 0))[None]))
                      for x in (passed, passed[:1]))  # fmt: skip
    assert average < 0.06 < 0.1 < start


# --- stages ---

GROUP = aj.OnlineData(samplers=(aj.policy,) * 3, prompts=10, preference="asked", unfinished_loses=False)
STEPS = aj.Loop(steps=4, batch=8, log_every=1, save_every=1)
STAGES = {
    "egpo": policy_stage(objective=opponent(), data=GROUP, loop=STEPS, extragradient=True),
    "inpo": policy_stage(objective=inpo(3), data=GROUP, loop=dataclasses.replace(STEPS, steps=2, epochs=2)),
}


def whole(**stages):
    found = experiment(asked=aj.ZeroShotPreference("base"), **stages)
    return dataclasses.replace(found, mesh=aj.Mesh(data=4, fsdp=2))


def context_of(found, folder, name):
    return Context(found, folder, name, sharding.make_mesh(found.mesh))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(experiment, folder) of a finished run."""
    folder, found = tmp_path_factory.mktemp("finished"), whole(**STAGES)
    run(found, folder)
    return found, folder


def test_an_iteration_is_fitted_over_its_epochs_and_the_next_one_is_written_by_what_was_fitted(finished):
    rows = read_metrics(finished[1] / "inpo" / "metrics.jsonl")
    assert abs(rows[0]["kl"]) < 1e-6 < abs(rows[1]["kl"])  # of the policy that wrote
    assert all(row["moved"] != 0 for row in rows)  # the last epoch, after the first has moved the policy
    assert rows[0].keys() == {"step", "gradient_norm", *STAGES["inpo"].objective.meanings}
    assert read_metrics(finished[1] / "egpo" / "metrics.jsonl")[0].keys() == {
        "step", "gradient_norm", *STAGES["egpo"].objective.meanings,
    }  # fmt: skip


def test_the_half_point_writes_the_second_batch_of_an_extragradient_step(finished):
    """The first is the reference's own, for the policy starts as it; so is the anchor of the second."""
    kls = [row["kl"] for row in read_metrics(finished[1] / "egpo" / "metrics.jsonl")]
    assert abs(kls[0]) < 1e-6 < min(abs(kl) for kl in kls[1:])


def test_a_stage_killed_at_a_half_point_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    found, write = finished[0], MetricsWriter.write
    alone = dataclasses.replace(found, stages={k: v for k, v in found.stages.items() if k != "inpo"})

    def write_and_preempt(self, step, values):
        write(self, step, values)
        if step == 0:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(RunAgain):
        patch.setattr(MetricsWriter, "write", write_and_preempt)
        run(alone, tmp_path)
    run(alone, tmp_path)
    ends = [context_of(*at, "egpo").load("egpo").params for at in ((alone, tmp_path), finished)]
    jax.tree.map(np.testing.assert_array_equal, *ends)
    assert not np.array_equal(*(jax.tree.leaves(tree)[0] for tree in (ends[0], Random(0).params())))


def test_the_anchor_lies_on_the_mesh_as_the_parameters_do(finished):
    context = context_of(*finished, "egpo")
    learner = STAGES["egpo"].setup(context)[1]
    places = [jax.tree.map(lambda x: x.sharding, tree) for tree in (learner.state.anchor, learner.state.params)]
    assert places[0] == places[1] and not all(place.is_fully_replicated for place in jax.tree.leaves(places[0]))
    assert [program.name for program in STAGES["egpo"].programs(context)] == ["collect 16", "learn 16"]
    assert STAGES["inpo"].setup(context)[1].state.anchor == {}


ONE_FOR_ALL = functools.partial(losses.inpo, tau=0.1, eta=0.2)


def drawn_by(*samplers):
    return dataclasses.replace(GROUP, samplers=samplers)


@pytest.mark.parametrize(("changes", "words"), [
    ({"objective": inpo(3), "data": drawn_by(*[aj.policy] * 2)}, "writes 2 responses and the objective reads 3"),
    ({"objective": inpo(3), "data": drawn_by(*[aj.policy] * 4)}, "writes 4 responses .* name fewer samplers"),
    ({"objective": sppo(3), "data": drawn_by(*[aj.policy] * 4)}, "writes 4 responses .* name fewer samplers"),
    ({"objective": inpo(2), "data": drawn_by(aj.policy, aj.mixture(0.5))}, r"samplers\[1\] is not the policy"),
    ({"objective": inpo(2), "data": aj.OfflineData("labels")}, "responses that the policy has just written"),
    ({"objective": inpo(3, eta=0.1)}, r"wrong\.objective: tau=0\.3 must be in \[0, eta=0\.1\]"),
    ({"objective": sppo(3, eta=0.0)}, r"eta=0\.0 must be finite and positive"),
    ({"objective": direct(losses.xpo, (1,), beta=0.1, alpha=0.1), "data": drawn_by(aj.policy, aj.policy)},
     r"samplers\[1\] is not the reference, .* put aj\.reference there"),
    ({"objective": direct(losses.xpo, (1,), beta=0.1, alpha=0.1), "data": drawn_by(aj.reference, aj.reference)},
     r"samplers\[0\] is not the policy"),
    ({"objective": direct(losses.xpo, (1,), beta=0.1, alpha=-1.0), "data": drawn_by(aj.policy, aj.reference)},
     r"alpha=-1\.0 must be finite and not negative"),
    ({"objective": opponent(), "data": drawn_by(aj.policy, aj.policy)}, "writes 2 responses"),
    ({"objective": opponent(), "data": drawn_by(aj.policy, aj.policy, aj.reference)}, r"samplers\[2\] is not the pol"),
    ({"extragradient": True, "loop": aj.Loop(steps=3, batch=8)}, r"wrong\.loop\.steps=3 ends at a half point"),
    ({"extragradient": True, "loop": aj.Loop(steps=4, batch=8, best=aj.Best("loss", 3))}, r"loop\.best\.every=3 ends"),
    ({"extragradient": True, "average_decay": 0.9}, r"average_decay=0\.9 would average half points"),
    ({"extragradient": True, "objective": inpo(3)}, r"wrong\.extragradient learns, at another point"),
    ({"extragradient": True, "objective": direct(losses.dpo, beta=0.1), "data": aj.OfflineData("labels")},
     r"wrong\.extragradient learns, at another point"),
])  # fmt: skip
def test_what_cannot_work_is_refused_before_anything_runs(tmp_path, changes, words):
    stage = dataclasses.replace(STAGES["egpo"], **{"extragradient": False, **changes})
    with pytest.raises(UserError, match=words) as error:
        context = context_of(whole(wrong=stage), tmp_path, "wrong")
        stage.check(context)
    assert "\n" not in str(error.value)


def test_a_group_and_its_loss_must_fit_each_other():
    for count in (1, 0, 2.0):
        with pytest.raises(UserError, match=rf"IterativeAlignment\.responses={count} must be a whole number from 2 on"):
            aj.IterativeAlignment(count, ONE_FOR_ALL, regularized=True)
    with pytest.raises(UserError, match=r"regularized=False do not fit .*'log_ratio'"):
        aj.IterativeAlignment(2, ONE_FOR_ALL, regularized=False)
    with pytest.raises(UserError, match="regularized=True do not fit"):
        aj.IterativeAlignment(2, functools.partial(losses.sppo, eta=1.0), regularized=True)
    for wrong in ((2,), (0,), (1, 0)):
        with pytest.raises(UserError, match=r"DirectAlignment\.of_reference=.* must be \(1,\)"):
            direct(losses.xpo, wrong, beta=0.1, alpha=0.1)
