"""Saving and restoring trees of arrays. The only file that imports Orbax.

A save is written beside its final name and renamed when whole, or in a bucket marked as whole when it is, so that a
half-written one is never taken.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from alignjax.distributed import storage
from alignjax.errors import RunAgain, UserError
from alignjax.types import TrainState


def save_tree(path: Path, tree: Any) -> None:
    """Writes a nested dict of arrays as the folder ``path``, replacing an older one.

    Raises UserError when it cannot be written.
    """
    with told(path, "cannot be written", "mend that and run again"):
        ocp.save(storage.absolute(path), tree, overwrite=True)


def restore_tree(path: Path, shapes: Any, shardings: Any) -> Any:
    """Reads a tree of the given shapes (and dtypes) onto the given shardings.

    Raises UserError when the folder is missing, damaged or holds another tree.
    """
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )
    with told(path, "cannot be restored", "remove its stage folder to make it again"):
        return ocp.load(storage.absolute(path), abstract)


GONE = ("UNAVAILABLE", "coordination service", "Gloo", "Connection closed", "heartbeat")
"""In an error's text: it is another process that failed."""


class Checkpointer:
    """Saves of one stage in progress, the newest ``keep`` of them and, of those that were given a value, the one with
    the highest. Of several processes each writes its own shards, and a save counts when all have."""

    def __init__(self, folder: Path, keep: int = 2):
        policies = ocp.training.preservation_policies
        highest = policies.BestN(
            get_metric_fn=lambda metrics: metrics["value"], n=1, keep_checkpoints_without_metrics=False
        )
        policy = policies.AnyPreservationPolicy([policies.LatestN(keep), highest])
        self.level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(logging.CRITICAL + 1)  # its threads' tracebacks: ``told`` tells
        storage.make_folder(folder)
        self.folder = folder
        self.inner = ocp.training.Checkpointer(
            storage.absolute(folder), preservation_policy=policy, cleanup_tmp_directories=True
        )
        # It would ask JAX at which step a preempted run ends, in a numbering that is not ``Hosts.preempted``'s, and the
        # two together can lose the answer. There is no option against it.
        self.inner._manager.reached_preemption = lambda step: False

    def save(self, state: TrainState, value: float | None = None) -> None:
        """Begins to save the state after ``state.step`` updates, and returns when its memory may be taken over by the
        next; what a save before this one failed of is told now, the rest by ``close``. With a ``value`` it is one of
        those that ``best`` chooses from."""
        tree = {**vars(state), "key": jax.random.key_data(state.key)}
        with told(self.folder, "cannot be written", "mend that and run again"):
            self.inner.wait()
            metrics = None if value is None else {"value": value}
            self.inner.save_async(int(state.step), tree, overwrite=True, metrics=metrics)

    def latest(self) -> int | None:
        """The step of the newest whole save."""
        return None if self.inner.latest is None else int(self.inner.latest.step)

    def best(self) -> tuple[int, float] | None:
        """(step, value) of the whole save with the highest value, of equal ones the last, as Orbax keeps it."""
        with told(self.folder, "cannot be written", "mend that and run again"):
            self.inner.wait()
        found = [(save.step, save.metrics["value"]) for save in self.inner.checkpoints if save.metrics]
        return max(found, key=lambda one: (one[1], one[0]), default=None)

    def restore(self, state: TrainState, step: int | None) -> TrainState:
        """The save of that step, laid out as ``state`` is and in its memory, for there may be no room for both; without
        a step ``state`` itself."""
        if step is None:
            return state
        tree = {**vars(state), "key": jax.random.key_data(state.key)}
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        for leaf in jax.tree.leaves(vars(state)):
            leaf.delete()
        with told(self.folder, "is damaged", "remove it to start the stage again"):
            found = self.inner.load(step, abstract)
        return TrainState(**{**found, "key": jax.random.wrap_key_data(found["key"])})

    def close(self) -> None:
        """Waits for a save under way. Raises UserError when it failed."""
        with told(self.folder, "cannot be written", "mend that and run again"):
            self.inner.close()
        logging.getLogger("absl").setLevel(self.level)


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds an interrupt back until the block has ended: inside Orbax's event loop it would leave threads
    without their loop, or be lost."""
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread alone
        yield
        return
    held: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def told(path: Path, what: str, mend: str) -> Iterator[None]:
    """Turns what Orbax and tensorstore raise, of many kinds, into one line.

    Orbax logs the tracebacks of its threads and tasks before it raises here and once more when the process ends, and
    reads still under way complain of its closed event loop: after a failure these stay silent.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def silent(lost: sys.UnraisableHookArgs) -> None:
        if str(lost.exc_value) != "Event loop is closed":
            hook(lost)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = silent
    try:
        with uninterrupted():
            yield
    except Exception as error:  # of many kinds, from threads and tasks
        reason = " ".join(str(error).split()) or type(error).__name__
        if storage.is_bucket(path) and storage.out_of_reach(error):
            raise RunAgain(f"{path} {what} ({reason[:160]}); the same command goes on from the last save") from error
        if jax.process_count() > 1 and any(words in reason for words in GONE):
            raise RunAgain(f"{path} {what}: another process is gone ({reason[:160]}); start all again") from error
        full = any(words in reason for words in ("No space left", "File too large", "quota"))
        raise UserError(
            f"{path} {what} ({reason[:160]}); {'free some space and run again' if full else mend}"
        ) from error
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    sys.unraisablehook = hook
