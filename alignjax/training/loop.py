"""The training loop: ``collect`` and ``learn`` again and again, with hooks for metrics, saves and preemption."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from alignjax.distributed import sharding
from alignjax.distributed.hosts import Hosts
from alignjax.errors import RunAgain, UserError, check_range
from alignjax.fields import no_effect
from alignjax.training import data, metrics
from alignjax.training.checkpointing import Checkpointer, opened_saves
from alignjax.training.learn import Assemble, UpdateSchedule, all_trained, init_state, make_learn
from alignjax.training.optimizer import Adam
from alignjax.training.shared_tree import SharedTree
from alignjax.types import Extras, Key, Loss, Metrics, Params, Rules, TrainState

_BAR_METRICS = ("nll", "loss", "accuracy", "preference", "reward", "kl", "length")  # shown beside the progress bar


@dataclasses.dataclass(frozen=True)
class Best:
    """Makes a stage's result the save with the best mean of a metric over the ``every`` steps before it.

    A step measures before it learns: on responses drawn for it, or, in the first epoch, on examples that are new to it.
    With several minibatches it measures each before that one is learned from.
    After the first epoch the metric rewards memorising.
    """

    metric: str  # one that the stage logs
    every: int  # steps between saves, instead of Loop.save_every; the last step saves too
    lowest: bool = False  # the lowest value is the best, as of a loss

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "every")

    def value(self, measured: Sequence[float]) -> float:
        """Returns what a save after these steps is worth, the higher the better; -inf where the mean is not finite."""
        mean = statistics.fmean(measured) * (-1 if self.lowest else 1)
        return mean if math.isfinite(mean) else -math.inf


@dataclasses.dataclass(frozen=True)
class Loop:
    """How long a stage trains, how it goes through each batch, and how often it logs and saves."""

    steps: int  # batches
    batch: int  # rows
    accumulate: int = 1  # parts that a gradient is computed in, for memory
    epochs: int = 1  # passes over each batch
    minibatches: int = 1  # optimiser steps a pass
    best: Best | None = None  # None: the last state is the result
    log_every: int = no_effect(10)
    save_every: int = no_effect(100)
    keep: int = no_effect(2)  # the newest saves that are kept while the stage trains

    def __post_init__(self) -> None:
        names = ("steps", "batch", "accumulate", "epochs", "minibatches", "log_every", "save_every", "keep")
        check_range(self, 1, math.inf, *names)

    @property
    def schedule(self) -> UpdateSchedule:
        """How ``learn`` goes through one batch."""
        return UpdateSchedule(self.epochs, self.minibatches, self.accumulate)

    def check(self, name: str, mesh: jax.sharding.Mesh, examples: int | None = None) -> None:
        """Raises UserError when the batch does not divide over the mesh or into its parts, or when fewer ``examples``
        than one batch exist. ``name`` is the stage's."""
        if examples is not None and examples < self.batch:
            raise UserError(f"{name}: {examples} examples do not fill one batch of {self.batch}; "
                            f"lower {name}.loop.batch or ask for more")  # fmt: skip
        sharding.check_batch(f"{name}.loop.batch", self.batch, mesh)
        if self.batch % self.minibatches:
            raise UserError(f"{name}: minibatches={self.minibatches} does not divide batch={self.batch}")
        if (self.batch // self.minibatches) % self.accumulate:
            raise UserError(f"{name}: accumulate={self.accumulate} does not divide batch={self.batch}")

    @property
    def save_interval(self) -> int:
        """Steps between saves."""
        return self.best.every if self.best else self.save_every


class TrainingRun(NamedTuple):
    """Where a stage trains."""

    name: str  # the stage's
    folder: Path
    mesh: jax.sharding.Mesh
    hosts: Hosts
    key: Key
    wandb: str | None = None  # a Weights & Biases project


class LearnerSpec(NamedTuple):
    """What a stage trains and how: everything that its compiled functions depend on, beside the arrays."""

    loop: Loop
    adam: Adam
    loss: Loss
    rules: Rules  # of the trained parameters
    assemble: Assemble = all_trained
    average_decay: float | None = None  # of the moving average of the parameters; None: none is kept
    extras: Extras = Extras()  # the objective's
    extragradient: bool = False  # two batches, which share a learning rate, make one step

    def compile(self, params: Params, mesh: jax.sharding.Mesh) -> Learner:
        """Returns the jitted functions for parameters of these shapes on the mesh."""
        schedule, extras = self.loop.schedule, self.extras
        batches = 2 if self.extragradient else 1  # of a learning rate
        optimizer = self.adam.build(self.loop.steps // batches, schedule.updates * batches)
        learn = make_learn(
            self.loss, optimizer, schedule, self.assemble, self.average_decay, extras, self.extragradient
        )

        def init(params: Params, key: Key) -> TrainState:
            average, controls = self.average_decay is not None, extras.controls()
            return init_state(params, optimizer, key, average, controls, self.extragradient)

        def update(state: TrainState, frozen: SharedTree, batch: Any) -> tuple[TrainState, Metrics]:
            return learn(state, frozen.tree(), batch)

        state = jax.eval_shape(init, params, jax.random.key(0))
        places = sharding.shardings(state, sharding.matching_rules(self.rules, state.params), mesh, strict=False)
        abstract = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), state, places)
        compiled = jax.jit(
            update,
            in_shardings=(places, None, sharding.row_sharding(mesh)),
            out_shardings=(places, sharding.replicated(mesh)),
            donate_argnums=0,
            keep_unused=True,  # an unused argument stays in memory all the same, and is planned for
        )
        return Learner(self.loop, self.adam, jax.jit(init, out_shardings=places, donate_argnums=0), compiled, abstract)


class Learner(NamedTuple):
    """The compiled functions of a training stage. ``plan`` compiles the same ones for abstract arguments."""

    loop: Loop
    adam: Adam
    init: Any  # jitted: (params, key) -> TrainState; takes over the memory of params
    learn: Any  # jitted: (state, SharedTree of frozen trees, batch) -> (state, metrics); takes over the state's memory
    state: TrainState  # abstract, with the places of its arrays


Collect = Callable[[TrainState, SharedTree, Any], Any]
"""(state, frozen trees, raw batch) -> the batch that ``learn`` takes."""


def no_collect(state: TrainState, frozen: SharedTree, batch: Any) -> Any:
    """The Collect of data that is complete as it was read."""
    return batch


Keep = Callable[[int, Params], None]
"""(steps taken, the parameters after them): called after every step, before a save of it."""


def keep_nothing(steps: int, params: Params) -> None:
    """The Keep of a training whose result is all that it leaves."""


class Trained(NamedTuple):
    """What a training ends with."""

    params: Params
    average: Params  # the moving average at the step of ``params``; empty where none is kept
    frozen: Any
    figures: dict[str, Any]  # of the save that was chosen, where ``Loop.best`` chooses one


def train(
    run: TrainingRun,
    learner: Learner,
    load_parameters: Callable[[], tuple[Params, Any]],
    plan: Callable[[int], data.BatchPlan],
    make_batch: Callable[[data.BatchPlan], Any],
    collect: Collect = no_collect,
    keep: Keep = keep_nothing,
) -> Trained:
    """Trains for ``learner.loop.steps`` steps, or on from the newest save of an interrupted run.

    ``load_parameters`` returns (initial parameters, frozen trees), which nobody else may hold: training overwrites the
    initial ones. A resumed run calls ``keep`` again for the steps that it repeats, with the same bits.
    Raises UserError where a gradient is not finite, or the metric that ``Loop.best`` names is not logged; RunAgain
    after a save when the run is preempted.
    """
    initial, frozen = load_parameters()
    initial, frozen_arguments = _unaliased(initial, frozen), SharedTree(frozen)
    with opened_saves(run.folder / "checkpoints", learner.loop.keep, run.hosts.count == 1) as saver:
        state = learner.init(initial, run.key)
        del initial
        state = saver.restore(state, run.hosts.broadcast(saver.latest))  # one answer: hosts may list differently
        start = int(state.step)
        hooks = _Hooks(run, learner, saver, start, keep)
        batches = data.load_batches(plan, make_batch, run.mesh, start, learner.loop.steps)
        with hooks, run.hosts.preemption() as preempted:
            for step, raw in enumerate(batches, start + 1):
                batch = collect(state, frozen_arguments, raw)
                state, values = learner.learn(state, frozen_arguments, batch)
                hooks.after(step, state, values, preempted())
            jax.block_until_ready(state.params)
        state, figures = _result(run, learner.loop.best, saver, state)
    return Trained(state.params, state.average, frozen, figures)


def _unaliased(params: Params, frozen: Any) -> Params:
    """Returns the parameters with copies of those arrays that are frozen too: training overwrites its own."""
    shared = set(map(id, jax.tree.leaves(frozen)))
    return jax.tree.map(lambda x: jnp.array(x) if id(x) in shared else x, params)


def _result(
    run: TrainingRun, best: Best | None, saver: Checkpointer, state: TrainState
) -> tuple[TrainState, dict[str, Any]]:
    """Returns the last state or, with ``best``, the best save, and figures that name its step."""
    if best is None:
        return state, {}
    local = saver.best()  # every process waits for its part of the last save
    step, value = run.hosts.broadcast(lambda: local)
    figures = {"best_step": step, f"best_{best.metric}": -value if best.lowest else value}
    return saver.restore(state, step), figures


class _Hooks:
    """What happens after each step: metrics are logged and checked, states are saved, a preempted run ends.

    Metrics wait on the device until a step that logs, so that the loop does not wait for the device at every step.
    """

    def __init__(self, run: TrainingRun, learner: Learner, saver: Checkpointer, start: int, keep: Keep):
        self.run, self.loop, self.adam, self.saver, self.keep = run, learner.loop, learner.adam, saver, keep
        self.writer = metrics.MetricsWriter(run.folder, resume_step=start, project=run.wandb)
        self.bar = metrics.progress_bar(self.loop.steps, start, run.name, "step")
        self.waiting: list[tuple[int, Metrics]] = []
        self.since_save: list[Any] = []  # rows of the steps since the last due save, for ``Loop.best``
        if self.loop.best:
            rows = metrics.read_metrics(run.folder / "metrics.jsonl")
            self.since_save = [row for row in rows if start - start % self.loop.save_interval <= row["step"] < start]

    def __enter__(self) -> _Hooks:
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()
        self.writer.close()

    def after(self, step: int, state: TrainState, values: Metrics, preempted: bool) -> None:
        """Runs the hooks after ``step`` steps. Raises RunAgain when the run is preempted."""
        self.waiting.append((step - 1, values))
        due = step % self.loop.save_interval == 0 or step == self.loop.steps
        saves = preempted or (due and (step < self.loop.steps or self.loop.best is not None))
        if saves or step % self.loop.log_every == 0 or step in (self.loop.steps, 1):
            self.log(values)
        self.bar.update()
        self.keep(step, state.params)  # before the save: a run that resumes from it does not come here again
        if saves:
            self.save(state, due)
        if due:
            self.since_save.clear()
        if preempted:
            self.saver.close()
            raise RunAgain(f"{self.run.name}: preempted; step {step} is saved, the same command continues from there")

    def log(self, values: Metrics) -> None:
        """Checks and writes the metrics of all steps since the last call; shows those of this step."""
        for step, row in self.waiting:
            check_metrics(self.run.name, self.loop, self.adam, step, row)
            self.writer.write(step, row)
            self.since_save.extend([row] if self.loop.best else ())
        self.waiting.clear()
        shown = {name: f"{float(values[name]):.3f}" for name in _BAR_METRICS if name in values}
        self.bar.set_postfix(shown, refresh=False)

    def save(self, state: TrainState, due: bool) -> None:
        """Saves the state; a due save has a value that ``Loop.best`` compares."""
        self.writer.flush()
        best = self.loop.best
        value = best.value([float(row[best.metric]) for row in self.since_save]) if best and due else None
        self.saver.save(state, value)


def check_metrics(name: str, loop: Loop, adam: Adam, step: int, row: Metrics) -> None:
    """Raises UserError where the gradient of a step is not finite, or the step lacks the metric that ``best`` names."""
    if not math.isfinite(norm := float(row["gradient_norm"])):
        raise UserError(
            f"{name}: the gradient of step {step} is {norm}; lower {name}.adam.lr (now {adam.lr:g}), "
            "or check the objective"
        )
    if loop.best and loop.best.metric not in row:
        raise UserError(
            f"{name}.loop.best.metric={loop.best.metric!r} is not logged; choose one of {', '.join(sorted(row))}"
        )
