"""Saving and restoring trees of arrays. The only file that imports Orbax.

A save is written beside its final name and renamed when whole, so that a half-written one is never taken.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1 as ocp

from alignjax.types import TrainState, UserError


def save_tree(path: Path, tree: Any) -> None:
    """Writes a nested dict of arrays as the folder ``path``, replacing an older one.

    Raises UserError when it cannot be written.
    """
    with written(path):
        ocp.save(path.resolve(), tree, overwrite=True)


def restore_tree(path: Path, shapes: Any, shardings: Any) -> Any:
    """Reads a tree of the given shapes (and dtypes) onto the given shardings.

    Raises UserError when the folder is missing, damaged or holds another tree.
    """
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )
    try:
        with uninterrupted():
            return ocp.load(path.resolve(), abstract)
    except Exception as error:  # Orbax and tensorstore raise many kinds; the user hears which folder
        raise UserError(
            f"{path} cannot be restored ({one_line(error)}); remove its stage folder to make it again"
        ) from error


class Checkpointer:
    """Saves of one stage in progress, the newest two kept."""

    def __init__(self, folder: Path):
        policy = ocp.training.preservation_policies.LatestN(2)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.inner = ocp.training.Checkpointer(
            folder.resolve(), preservation_policy=policy, cleanup_tmp_directories=True
        )

    def save(self, state: TrainState, wait: bool = True) -> None:
        """Saves the state after ``state.step`` updates; ``wait`` returns when it is whole, and must be used
        where the next update takes over the state's memory."""
        tree = {**vars(state), "key": jax.random.key_data(state.key)}
        with written(self.folder):
            self.inner.save_async(int(state.step), tree, overwrite=True)
            if wait:
                self.inner.wait()

    def restore(self, state: TrainState) -> TrainState:
        """The newest whole save, laid out as ``state`` is; ``state`` itself when there is none."""
        if self.inner.latest is None:
            return state
        tree = {**vars(state), "key": jax.random.key_data(state.key)}
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)
        try:
            with uninterrupted():
                found = self.inner.load(self.inner.latest.step, abstract)
        except Exception as error:  # as above
            raise UserError(
                f"{self.folder} is damaged ({one_line(error)}); remove it to start the stage again"
            ) from error
        return TrainState(**{**found, "key": jax.random.wrap_key_data(found["key"])})

    def close(self) -> None:
        """Waits for a save under way."""
        with uninterrupted():
            self.inner.close()


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
def written(path: Path) -> Iterator[None]:
    """Turns what a library raises when it cannot write into one line.

    Orbax logs the traceback of its own thread before it raises here, and once more when the process ends:
    after a failure its log stays off.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with uninterrupted():
            yield
    except Exception as error:  # Orbax and tensorstore raise many kinds
        raise UserError(f"{path} cannot be written ({one_line(error)}); is the disk full?") from error
    logger.setLevel(level)


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:160] or type(error).__name__
