"""Loop.best: which save becomes a stage's result, over a parameter that walks from 0 past 1 to 3."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from alignjax.distributed import sharding
from alignjax.distributed.hosts import Hosts
from alignjax.errors import RunAgain, UserError
from alignjax.training import data, loop
from alignjax.training.loop import Best, LearnerSpec, Loop, TrainingRun
from alignjax.training.metrics import MetricsWriter, read_metrics
from alignjax.training.optimizer import Adam
from alignjax.training.shared_tree import SharedTree

STEPS = 14


def loss(params, batch, key):
    w = params["w"].mean()
    return (w - 3) ** 2 + 0 * batch.sum(), {
        "closeness": -((w - 1) ** 2),
        "distance": (w - 1) ** 2,
        "undefined": w * jnp.nan,
    }


def train(folder, best, steps=STEPS, params=None, frozen=None):
    """(parameters, figures), at a constant rate: a step does not depend on how many follow."""
    mesh, params = sharding.make_mesh(sharding.Mesh()), params or {"w": jnp.zeros(3)}
    settings = Loop(steps=steps, batch=8, log_every=3, best=best)
    learning = LearnerSpec(settings, Adam(lr=0.2, warmup=0, schedule="constant"), loss, (("w$", PartitionSpec()),))
    plan = data.plan_batches([1] * 8, [1], 8, 0)
    make_batch = lambda chosen: np.ones(len(chosen.indices), np.float32)  # noqa: E731
    run = TrainingRun("walk", folder / "walk", mesh, Hosts(), jax.random.key(0))
    trained = loop.train(run, learning.compile(params, mesh), lambda: (params, frozen), plan, make_batch)
    return trained.params, trained.figures


def windows(folder, metric, every):
    """step of each save -> the metric's mean over the steps since the one before."""
    values = [row[metric] for row in read_metrics(folder / "walk" / "metrics.jsonl")]
    ends = [*range(every, STEPS, every), STEPS]
    return {end: np.mean(values[start:end]) for start, end in zip([0, *ends], ends, strict=False)}


@pytest.mark.parametrize(
    ("metric", "lowest", "every"), [("closeness", False, 4), ("distance", True, 4), ("closeness", False, 5)]
)
def test_the_result_is_the_save_with_the_best_mean_since_the_one_before(tmp_path, metric, lowest, every):
    params, figures = train(tmp_path / "best", Best(metric, every, lowest))
    means = windows(tmp_path / "best", metric, every)
    chosen = (min if lowest else max)(means, key=means.get)
    assert figures == {"best_step": chosen, f"best_{metric}": pytest.approx(means[chosen], rel=1e-6)}
    assert 0 < chosen < STEPS  # neither end of the walk
    shorter, no_figures = train(tmp_path / "shorter", None, steps=chosen)
    np.testing.assert_array_equal(params["w"], shorter["w"])
    assert no_figures == {}


def test_training_takes_over_the_first_parameters_unless_they_are_frozen_too(tmp_path):
    w, frozen_w = jnp.zeros(3), jnp.zeros(3)
    first, _ = train(tmp_path / "a", None, params={"w": w})
    second, _ = train(tmp_path / "b", None, params={"w": frozen_w}, frozen={"reference": {"w": frozen_w}})
    np.testing.assert_array_equal(first["w"], second["w"])
    assert w.is_deleted() and np.all(frozen_w == 0) and np.all(second["w"] != 0)


def test_the_last_step_makes_a_save_too(tmp_path):
    params, figures = train(tmp_path / "best", Best("distance", 4))
    assert figures["best_step"] == STEPS
    np.testing.assert_array_equal(params["w"], train(tmp_path / "last", None)[0]["w"])


@pytest.mark.parametrize("preempted_step", [5, 6, 10])
def test_preempted_between_two_saves_it_chooses_the_same(tmp_path, monkeypatch, preempted_step):
    """The steps before the interruption count as much as those after it."""
    undisturbed = train(tmp_path / "undisturbed", Best("closeness", 4))
    write = MetricsWriter.write

    def write_and_preempt(self, step, values):
        write(self, step, values)
        if step == preempted_step:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(RunAgain):
        patch.setattr(MetricsWriter, "write", write_and_preempt)
        train(tmp_path / "two", Best("closeness", 4))
    resumed = train(tmp_path / "two", Best("closeness", 4))
    assert resumed[1] == undisturbed[1]
    jax.tree.map(np.testing.assert_array_equal, resumed[0], undisturbed[0])


def test_a_metric_that_is_not_there_or_no_number(tmp_path):
    with pytest.raises(
        UserError, match=r"walk.loop.best.metric='reward' is not logged; choose one of closeness, distance, gradient"
    ):
        train(tmp_path / "unknown", Best("reward", 4))
    assert train(tmp_path / "nan", Best("undefined", 4))[1]["best_step"] == STEPS
    with pytest.raises(UserError, match=r"Best\.every=0"):
        Best("closeness", 0)


def test_the_learning_rate_s_schedule_counts_batches_and_not_updates(tmp_path):
    """Under a constant gradient Adam moves by the learning rate, a line to zero over 3 batches of 2 x 2 updates."""
    mesh, params = sharding.make_mesh(sharding.Mesh()), {"w": jnp.zeros(())}
    settings, adam = Loop(steps=3, batch=8, epochs=2, minibatches=2), Adam(lr=0.1, warmup=0, schedule="linear")
    constant = lambda params, batch, key: (params["w"] + 0 * batch.sum(), {})  # noqa: E731
    learner = LearnerSpec(settings, adam, constant, (("w$", PartitionSpec()),)).compile(params, mesh)
    run = TrainingRun("walk", tmp_path / "walk", mesh, Hosts(), jax.random.key(0))
    make_batch = lambda chosen: np.ones(len(chosen.indices), np.float32)  # noqa: E731
    trained = loop.train(run, learner, lambda: (params, None), data.plan_batches([1] * 8, [1], 8, 0), make_batch)
    np.testing.assert_allclose(trained.params["w"], -0.1 * sum(4 * (1 - k / 3) for k in range(3)), rtol=1e-4)


def test_the_two_batches_of_an_extragradient_step_have_one_learning_rate(tmp_path):
    """Under a constant gradient: a line to zero over 3 pairs of batches, whose half points are left again."""
    mesh, params = sharding.make_mesh(sharding.Mesh()), {"w": jnp.zeros(())}
    adam = Adam(lr=0.1, warmup=0, schedule="linear")
    constant = lambda params, batch, key: (params["w"] + 0 * batch.sum(), {"w": params["w"]})  # noqa: E731
    spec = LearnerSpec(Loop(steps=6, batch=8), adam, constant, (("w$", PartitionSpec()),), extragradient=True)
    learner = spec.compile(params, mesh)
    state, passed = learner.init(params, jax.random.key(0)), []
    for _ in range(6):
        state, _ = learner.learn(state, SharedTree(None), np.ones(8, np.float32))
        passed.append(float(state.params["w"]))
    rates = [0.1 * (1 - k / 3) for k in range(3)]
    whole = -np.cumsum(rates)
    np.testing.assert_allclose(passed, np.repeat(whole, 2), rtol=1e-4)


def test_collect_makes_the_batch_that_is_learned_from_out_of_the_state_and_the_frozen_trees(tmp_path):
    mesh, params = sharding.make_mesh(sharding.Mesh()), {"w": jnp.ones(())}
    to_batch = lambda params, batch, key: (batch.mean() * params["w"], {"batch": batch.mean()})  # noqa: E731
    adam = Adam(lr=1.0, warmup=0, schedule="constant")
    learner = LearnerSpec(Loop(steps=2, batch=8), adam, to_batch, (("w$", PartitionSpec()),)).compile(params, mesh)
    run = TrainingRun("walk", tmp_path / "walk", mesh, Hosts(), jax.random.key(0))

    def collect(state, frozen, raw):
        return raw + 10 * state.step + 100 * state.params["w"] + frozen.tree()["offset"]

    loop.train(
        run,
        learner,
        lambda: (params, {"offset": jnp.float32(1000)}),
        data.plan_batches([1] * 8, [1], 8, 0),
        lambda chosen: np.ones(len(chosen.indices), np.float32),
        collect,
    )
    values = [row["batch"] for row in read_metrics(tmp_path / "walk" / "metrics.jsonl")]
    assert values == pytest.approx([1 + 0 + 100 + 1000, 1 + 10 + 0 + 1000], rel=1e-4)
