"""Saving and restoring trees of arrays. The only file that imports Orbax.

On a disk a save is written under a temporary name and renamed when it is whole. In a bucket a marker is written when it
is whole. So an incomplete save is never restored.
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
from alignjax.errors import RunAgain, UserError, one_line
from alignjax.types import TrainState

_SILENT = logging.CRITICAL + 1
_PEER_FAILURES = ("UNAVAILABLE", "coordination service", "Gloo", "Connection closed", "heartbeat")
"""Words of errors that say that another process has failed."""
_DISK_FULL = ("No space left", "File too large", "quota")
_NOT_WRITTEN = ("cannot be written", "fix that and run again")


def save_tree(path: Path, tree: Any) -> None:
    """Writes a nested dict of arrays as the folder ``path``, replacing an older one.

    Raises UserError when it cannot be written.
    """
    with _orbax_errors(path, *_NOT_WRITTEN):
        ocp.save(storage.absolute(path), tree, overwrite=True)


def restore_tree(path: Path, shapes: Any, shardings: Any) -> Any:
    """Returns the tree that ``save_tree`` wrote. ``shapes`` is a tree of the same structure whose leaves have the
    saved shapes and dtypes, ``shardings`` the shardings of the restored arrays.

    Raises UserError when the folder is missing, damaged or holds another tree.
    """
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, shardings
    )
    with _orbax_errors(path, "cannot be restored", "remove its stage folder to make it again"):
        return ocp.load(storage.absolute(path), abstract)


class Checkpointer:
    """The saves of a stage that is being trained: the newest ``keep``, and the one with the highest value among those
    that were given a value. Every process writes its own shards, and a save is whole when all have."""

    def __init__(self, folder: Path, keep: int = 2):
        """Makes the folder, and removes incomplete saves from it."""
        self._absl_level = logging.getLogger("absl").level
        logging.getLogger("absl").setLevel(_SILENT)  # it logs tracebacks of threads, which _orbax_errors reports
        storage.make_folder(folder)
        self._folder = folder
        self._orbax = ocp.training.Checkpointer(
            storage.absolute(folder), preservation_policy=_preservation_policy(keep), cleanup_tmp_directories=True
        )
        # Orbax would also ask JAX at which step a preempted run ends. It numbers the steps differently from
        # Hosts.preempted, and JAX's answer can get lost between the two. Orbax has no option that turns this off.
        self._orbax._manager.reached_preemption = lambda step: False

    def save(self, state: TrainState, value: float | None = None) -> None:
        """Starts to save the state of step ``state.step``, after waiting for the save before it. Returns when the
        caller may overwrite the state's memory. ``best`` chooses among the saves with a ``value``.

        Raises UserError when the save before it failed; ``close`` raises the errors of the last one.
        """
        with _orbax_errors(self._folder, *_NOT_WRITTEN):
            self._orbax.wait()
            metrics = None if value is None else {"value": value}
            self._orbax.save_async(int(state.step), _as_tree(state), overwrite=True, metrics=metrics)

    def latest(self) -> int | None:
        """Returns the step of the newest whole save, None when there is none."""
        return None if self._orbax.latest is None else int(self._orbax.latest.step)

    def best(self) -> tuple[int, float] | None:
        """Returns (step, value) of the save with the highest value, the latest among equal ones; None when no save has
        a value. Waits for a save in progress. Raises UserError when that failed."""
        with _orbax_errors(self._folder, *_NOT_WRITTEN):
            self._orbax.wait()
        saves = [(save.step, save.metrics["value"]) for save in self._orbax.checkpoints if save.metrics]
        return max(saves, key=lambda save: (save[1], save[0]), default=None)

    def restore(self, state: TrainState, step: int | None) -> TrainState:
        """Returns the save of that step with the shapes and shardings of ``state``; without a step, ``state`` itself.

        The arrays of ``state`` are deleted first: the device may not have room for both. Raises UserError when the
        save is damaged.
        """
        if step is None:
            return state
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _as_tree(state))
        for leaf in jax.tree.leaves(vars(state)):
            leaf.delete()
        with _orbax_errors(self._folder, "is damaged", "remove it to start the stage again"):
            saved = self._orbax.load(step, abstract)
        return TrainState(**{**saved, "key": jax.random.wrap_key_data(saved["key"])})

    def close(self) -> None:
        """Waits for a save in progress. Raises UserError when it failed."""
        with _orbax_errors(self._folder, *_NOT_WRITTEN):
            self._orbax.close()
        logging.getLogger("absl").setLevel(self._absl_level)


@contextlib.contextmanager
def opened_saves(folder: Path, keep: int, alone: bool) -> Iterator[Checkpointer]:
    """Yields a stage's saves, and closes them. After an error that all processes raise alike, a save under way is
    waited for only where this process is ``alone``: others may never come to it."""
    saver = Checkpointer(folder, keep)
    try:
        yield saver
    except UserError:
        if alone:
            with contextlib.suppress(UserError):
                saver.close()
        raise
    saver.close()


def _preservation_policy(keep: int) -> Any:
    """Returns Orbax's policy that keeps the newest ``keep`` saves and the one with the highest value."""
    policies = ocp.training.preservation_policies
    best = policies.BestN(get_metric_fn=lambda metrics: metrics["value"], n=1, keep_checkpoints_without_metrics=False)
    return policies.AnyPreservationPolicy([policies.LatestN(keep), best])


def _as_tree(state: TrainState) -> dict[str, Any]:
    """Returns the state as a dict of what Orbax can save: a typed key becomes its uint32 data. An anchor that is empty
    is left out, as in the saves of versions that had none."""
    tree = {**vars(state), "key": jax.random.key_data(state.key)}
    return tree if state.anchor else {name: part for name, part in tree.items() if name != "anchor"}


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Defers SIGINT until the end of the block. An interrupt inside Orbax's event loop would get lost, or stop the
    loop while its threads are at work."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread can handle signals
        yield
        return
    signals: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: signals.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if signals:
            signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def _orbax_errors(path: Path, problem: str, advice: str) -> Iterator[None]:
    """Turns the errors of Orbax and tensorstore, which are of many types, into "path problem (reason); advice".

    Orbax logs the tracebacks of its threads and tasks before it raises, and again when the process ends; reads that are
    still in progress then complain about its closed event loop. After an error these logs stay silent.
    """
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def ignore_closed_loop(unraisable: sys.UnraisableHookArgs) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    for logger in loggers:
        logger.setLevel(_SILENT)
    sys.unraisablehook = ignore_closed_loop
    try:
        with uninterrupted():
            yield
    except Exception as error:
        raise _explain(error, path, problem, advice) from error
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    sys.unraisablehook = hook


def _explain(error: Exception, path: Path, problem: str, advice: str) -> RunAgain | UserError:
    """Returns RunAgain when a bucket or another process has failed, else UserError, with one line that says why."""
    message = one_line(error)
    reason = message[:160]
    if storage.is_bucket(path) and storage.is_unavailable(error):
        return RunAgain(f"{path} {problem} ({reason}); the same command goes on from the last save")
    if jax.process_count() > 1 and any(words in message for words in _PEER_FAILURES):
        return RunAgain(f"{path} {problem}: another process is gone ({reason}); start all again")
    full = any(words in message for words in _DISK_FULL)
    return UserError(f"{path} {problem} ({reason}); {'free some space and run again' if full else advice}")
