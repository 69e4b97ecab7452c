"""Loop.best: which save becomes a stage's result, over a parameter that walks from 0 past 1 to 3."""

import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from alignjax.distributed import sharding
from alignjax.errors import RunAgain, UserError
from alignjax.pipeline import stages
from alignjax.pipeline.stages import Adam, Best, Loop
from alignjax.training import data
from alignjax.training.loop import Learning, run_loop
from alignjax.training.metrics import MetricsWriter, read_metrics

STEPS = 14


def objective(params, batch, key):
    w = params["w"].mean()
    return (w - 3) ** 2 + 0 * batch.sum(), {"near": -((w - 1) ** 2), "far": (w - 1) ** 2, "nothing": w * jnp.nan}


def train(folder, best, steps=STEPS, params=None, frozen=None):
    """(parameters, figures), at a constant rate: a step does not depend on how many follow."""
    experiment = stages.Experiment(task=None, stages={"walk": None})
    context = stages.Context(experiment, folder, "walk", sharding.make_mesh(sharding.Mesh()))
    loop = Loop(steps=steps, batch=8, log_every=3, best=best)
    learning = Learning(loop, Adam(lr=0.2, warmup=0, schedule="constant"), (("w$", PartitionSpec()),), objective)
    plan = data.planned([1] * 8, [1], 8, 0)
    make_batch = lambda chosen: np.ones(len(chosen.indices), np.float32)  # noqa: E731
    return run_loop(context, learning, params or {"w": jnp.zeros(3)}, plan, make_batch, frozen)


def windows(folder, metric, every):
    """step of each save -> the metric's mean over the steps since the one before."""
    values = [row[metric] for row in read_metrics(folder / "walk" / "metrics.jsonl")]
    ends = [*range(every, STEPS, every), STEPS]
    return {end: np.mean(values[start:end]) for start, end in zip([0, *ends], ends, strict=False)}


@pytest.mark.parametrize(("metric", "lowest", "every"), [("near", False, 4), ("far", True, 4), ("near", False, 5)])
def test_the_result_is_the_save_with_the_best_mean_since_the_one_before(tmp_path, metric, lowest, every):
    params, figures = train(tmp_path / "best", Best(metric, every, lowest))
    means = windows(tmp_path / "best", metric, every)
    chosen = (min if lowest else max)(means, key=means.get)
    assert figures == {"best_step": chosen, f"best_{metric}": pytest.approx(means[chosen], rel=1e-6)}
    assert 0 < chosen < STEPS  # neither end of the walk
    shorter, nothing = train(tmp_path / "shorter", None, steps=chosen)
    np.testing.assert_array_equal(params["w"], shorter["w"])
    assert nothing == {}


def test_what_is_trained_is_taken_over_unless_it_is_frozen_too(tmp_path):
    w, kept = jnp.zeros(3), jnp.zeros(3)
    ended, _ = train(tmp_path / "a", None, params={"w": w})
    also, _ = train(tmp_path / "b", None, params={"w": kept}, frozen={"reference": {"w": kept}})
    np.testing.assert_array_equal(ended["w"], also["w"])
    assert w.is_deleted() and np.all(kept == 0) and np.all(also["w"] != 0)


def test_the_last_step_makes_a_save_too(tmp_path):
    params, figures = train(tmp_path / "best", Best("far", 4))
    assert figures["best_step"] == STEPS
    np.testing.assert_array_equal(params["w"], train(tmp_path / "last", None)[0]["w"])


@pytest.mark.parametrize("when", [5, 6, 10])
def test_preempted_between_two_saves_it_chooses_the_same(tmp_path, monkeypatch, when):
    """The steps before the interruption count as much as those after it."""
    whole = train(tmp_path / "whole", Best("near", 4))
    write = MetricsWriter.write

    def told(self, step, values):
        write(self, step, values)
        if step == when:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(RunAgain):
        patch.setattr(MetricsWriter, "write", told)
        train(tmp_path / "two", Best("near", 4))
    again = train(tmp_path / "two", Best("near", 4))
    assert again[1] == whole[1]
    jax.tree.map(np.testing.assert_array_equal, again[0], whole[0])


def test_a_metric_that_is_not_there_or_no_number(tmp_path):
    with pytest.raises(UserError, match=r"walk.loop.best.metric='reward' is not logged; choose one of far, gradient"):
        train(tmp_path / "unknown", Best("reward", 4))
    assert train(tmp_path / "nan", Best("nothing", 4))[1]["best_step"] == STEPS
    with pytest.raises(UserError, match=r"Best\.every=0"):
        Best("near", 0)
