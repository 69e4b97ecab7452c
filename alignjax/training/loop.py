"""The training loop of every stage that has one: optimiser, layout, saves, metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from alignjax.distributed import sharding
from alignjax.errors import POSITIVE, RunAgain, UserError, check_range
from alignjax.pipeline.experiment import Context, Program
from alignjax.training import data, metrics
from alignjax.training import learn as train
from alignjax.training.checkpointing import Checkpointer
from alignjax.types import Array, Batch, Key, Metrics, Params, Rules, TrainState

SHOWN = ("nll", "loss", "accuracy", "preference", "kl", "length")  # beside a progress bar
LARGEST_B1 = 0.95  # of moments in bfloat16


@dataclasses.dataclass(frozen=True)
class Adam:
    """AdamW after clipping by the global norm; a linear warm-up, then a cosine to zero or a constant.

    ``moments="bfloat16"`` keeps the gradient's mean in 2 bytes a parameter instead of 4. Each step rounds it by up to
    2^-8 of itself, and so it may lag by 2^-8 / (1 - b1), 4% at 0.9: b1 is at most 0.95. The squares' mean stays in
    float32: it falls by at most 1 - b2 of itself a step, which at b2 = 0.999 is always rounded away, and the updates
    would shrink for good.
    """

    lr: float
    warmup: int = 10
    schedule: str = "cosine"  # or "constant"
    clip: float = 1.0
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.0
    moments: str = "float32"  # or "bfloat16"

    def __post_init__(self) -> None:
        check_range(self, 0, math.inf, "lr", "warmup", "weight_decay")
        check_range(self, POSITIVE, math.inf, "clip", "eps")
        check_range(self, 0, 1 - POSITIVE, "b1", "b2")
        if self.schedule not in ("cosine", "constant"):
            raise UserError(f"Adam.schedule={self.schedule!r} is unknown; choose cosine or constant")
        if self.moments not in ("float32", "bfloat16"):
            raise UserError(f"Adam.moments={self.moments!r} is unknown; choose float32 or bfloat16")
        if self.moments == "bfloat16" and self.b1 > LARGEST_B1:
            raise UserError(f"Adam.b1={self.b1} is too close to 1 for moments in bfloat16; lower it to {LARGEST_B1}")

    def build(self, steps: int) -> optax.GradientTransformation:
        warm = min(self.warmup, max(steps - 1, 0))
        after = {
            "cosine": optax.cosine_decay_schedule(self.lr, max(steps - warm, 1)),
            "constant": optax.constant_schedule(self.lr),
        }[self.schedule]
        rate = optax.join_schedules([optax.linear_schedule(0.0, self.lr, max(warm, 1)), after], [warm])
        # A Python number would itself be rounded to bfloat16 (0.9 to 0.898), and the mean be short of the gradient.
        b1 = np.float32(self.b1) if self.moments == "bfloat16" else self.b1
        adam = optax.adamw(
            rate, b1=b1, b2=self.b2, eps=self.eps, weight_decay=self.weight_decay, mu_dtype=self.moments
        )  # fmt: skip
        return optax.chain(optax.clip_by_global_norm(self.clip), adam)


@dataclasses.dataclass(frozen=True)
class Best:
    """A stage's result is not its last state but the save with the best mean of a metric over the ``every`` steps
    before it. A step measures before it learns: on replies drawn for it, or, in the first epoch, on examples that are
    new to it. In later ones a metric chooses what knows them by heart."""

    metric: str  # one that the stage logs
    every: int  # steps from one save to the next, in place of Loop.save_every; the last step makes one too
    lowest: bool = False  # is the best, as of a loss

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "every")

    def value(self, measured: Sequence[float]) -> float:
        """What a save after these steps is worth: the higher, the better; nothing where the mean is no number."""
        mean = statistics.fmean(measured) * (-1 if self.lowest else 1)
        return mean if math.isfinite(mean) else -math.inf


@dataclasses.dataclass(frozen=True)
class Loop:
    """How long a training stage goes on and how often it looks up."""

    steps: int
    batch: int
    accumulate: int = 1
    log_every: int = 10
    save_every: int = 100
    keep: int = 2  # saves, the newest, while the stage goes on
    best: Best | None = None  # None: the last state is the result

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "steps", "batch", "accumulate", "log_every", "save_every", "keep")

    def check(self, context: Context, most: int | None = None) -> None:
        """Raises UserError when the batch does not divide over the mesh or into parts, when it is larger than the
        examples, of which there are at ``most`` so many, and when what is to be reported to is not there."""
        if most is not None and most < self.batch:
            raise UserError(f"{context.name}: {most} examples do not fill one batch of {self.batch}; "
                            f"lower {context.name}.loop.batch or ask for more")  # fmt: skip
        if context.experiment.wandb:
            metrics.import_wandb()
        sharding.check_batch(f"{context.name}.loop.batch", self.batch, context.mesh)
        if self.batch % self.accumulate:
            raise UserError(f"{context.name}: accumulate={self.accumulate} does not divide batch={self.batch}")


class Learning(NamedTuple):
    """What a stage trains and how: all that its compiled update depends on, beside the arrays."""

    loop: Loop
    adam: Adam
    rules: Rules
    objective: Callable[..., tuple[Array, Metrics]]
    collect: train.Collect = train.given
    whole: train.Whole = train.trained
    average_decay: float | None = None

    def compiled(self, params: Params, key: Key, mesh: jax.sharding.Mesh):
        """(params, key) -> the first TrainState; (state, frozen trees as train.Once, batch) -> (state, metrics); and
        where the state lies. Both are jitted and take over the memory of their first argument; ``params`` may be
        shapes."""
        optimizer = self.adam.build(self.loop.steps)

        def first(params: Params, key: Key) -> TrainState:
            return train.init(params, optimizer, key, self.average_decay is not None)

        shapes = jax.eval_shape(first, params, key)
        layout = sharding.shardings(shapes, sharding.live(self.rules, shapes.params), mesh, strict=False)
        step = train.make_update(
            self.objective, optimizer, self.collect, self.loop.accumulate, self.average_decay, self.whole
        )

        def update(state: TrainState, frozen: train.Once, batch: Batch) -> tuple[TrainState, Metrics]:
            return step(state, frozen.tree(), batch)

        compiled = jax.jit(
            update,
            in_shardings=(layout, None, sharding.rows(mesh)),
            out_shardings=(layout, sharding.replicated(mesh)),
            donate_argnums=0,
            keep_unused=True,  # it lives all the same, and is planned for
        )
        return jax.jit(first, out_shardings=layout, donate_argnums=0), compiled, layout

    def program(self, name: str, params: Params, frozen: Any, batch: Batch, context: Context, tokens: int) -> Program:
        """The update for arguments of these shapes. Raises UserError when the batch does not divide."""
        self.loop.check(context)
        first, update, layout = self.compiled(params, context.key, context.mesh)
        state = jax.tree.map(
            lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at),
            jax.eval_shape(first, params, context.key), layout,
        )  # fmt: skip
        return Program(name, update, (state, train.Once(frozen), batch), tokens)


def check_row(name: str, learning: Learning, step: int, row: Metrics) -> None:
    """Raises UserError where the gradient of a step is not finite, or the step lacks the metric that ``best`` names."""
    if not math.isfinite(norm := float(row["gradient_norm"])):
        raise UserError(
            f"{name}: the gradient of step {step} is {norm}; lower {name}.adam.lr (now {learning.adam.lr:g}), "
            "or mend the objective"
        )
    if (best := learning.loop.best) and best.metric not in row:
        raise UserError(
            f"{name}.loop.best.metric={best.metric!r} is not logged; choose one of {', '.join(sorted(row))}"
        )


def run_loop(
    context: Context,
    learning: Learning,
    params: Params,
    plan: Callable[[int], data.Plan],
    make_batch: Callable[[data.Plan], Batch],
    frozen: Any = None,
    before: Callable[[TrainState, Any, Batch], Batch] | None = None,
) -> tuple[Params, dict[str, Any]]:
    """Trains from ``params``, whose memory it takes over, or from the newest save of an interrupted run; returns the
    last parameters, or with ``loop.best`` the best, and figures that say of which step. What ``before`` makes of a
    batch, outside the compiled update, is what the update is given.

    Raises UserError at the first step, of those looked at since the last time, whose gradient is not finite, or where
    no such metric is logged as ``loop.best`` names, and RunAgain after a save when the run is preempted.
    """
    loop, mesh, hosts = learning.loop, context.mesh, context.hosts
    loop.check(context)
    first, compiled, _ = learning.compiled(params, context.key, mesh)
    once = train.Once(frozen)

    def update(state: TrainState, frozen: Any, batch: Batch) -> tuple[TrainState, Metrics]:
        return compiled(state, once, before(state, frozen, batch) if before else batch)

    kept = set(map(id, once.leaves))
    params = jax.tree.map(lambda x: jnp.array(x) if id(x) in kept else x, params)  # trained, and frozen too
    saver = Checkpointer(context.folder / "checkpoints", loop.keep)
    latest = hosts.first(saver.latest)  # one answer: a listing may be older on another host
    state = saver.restore(first(params, context.key), latest)
    done = int(state.step)
    writer = metrics.MetricsWriter(context.folder, resume_step=done, project=context.experiment.wandb)
    bar = metrics.progress(loop.steps, done, context.name, "step")
    waiting: list[tuple[int, Metrics]] = []
    best, save_every = loop.best, loop.best.every if loop.best else loop.save_every
    logged = metrics.read_metrics(context.folder / "metrics.jsonl") if best else []
    measured = [row for row in logged if done - done % save_every <= row["step"] < done]  # since the last due save

    def every(state: Any, step: int, values: Metrics) -> None:
        waiting.append((step - 1, values))
        preempted = asked()
        due = step % save_every == 0 or step == loop.steps
        saves = preempted or (due and (step < loop.steps or best is not None))
        if saves or step % loop.log_every == 0 or step in (loop.steps, 1):
            for index, row in waiting:
                check_row(context.name, learning, index, row)
                writer.write(index, row)
                measured.extend([row] if best else ())
            waiting.clear()
            bar.set_postfix({k: f"{float(values[k]):.3f}" for k in SHOWN if k in values}, refresh=False)
        bar.update()
        if saves:
            writer.keep()
            saver.save(state, best.value([float(row[best.metric]) for row in measured]) if best and due else None)
        if due:
            measured.clear()
        if preempted:
            saver.close()
            raise RunAgain(f"{context.name}: preempted; step {step} is saved, the same command goes on from there")

    steps = data.batches(plan, make_batch, mesh, done, loop.steps)
    try:
        with contextlib.closing(writer), bar, hosts.preemption() as asked:
            state = train.fit(state, done, frozen, steps, update, every)
            jax.block_until_ready(state.params)
    except UserError:
        if hosts.count == 1:  # a save under way is still made; of several processes the others may not come to it
            with contextlib.suppress(UserError):
                saver.close()
        raise
    figures: dict[str, Any] = {}
    if best:
        mine = saver.best()  # all wait for their part of the last save
        chosen, value = hosts.first(lambda: mine)
        state = saver.restore(state, chosen)
        figures = {"best_step": chosen, f"best_{best.metric}": -value if best.lowest else value}
    saver.close()
    return state.params, figures
