"""Saving and restoring trees of arrays. The only file that imports Orbax.

A save is written beside its final name and renamed when whole, so that a half-written one is never taken.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from alignjax.types import TrainState, UserError


def save_tree(path: Path, tree: Any) -> None:
    """Writes a nested dict of arrays as the folder ``path``, replacing an older one."""
    ocp.save(path.resolve(), tree, overwrite=True)


def restore_tree(path: Path, shapes: Any, shardings: Any) -> Any:
    """Reads a tree of the given shapes (and dtypes) onto the given shardings.

    Raises UserError when the folder is missing, damaged or holds another tree.
    """
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, shardings
    )
    try:
        return ocp.load(path.resolve(), abstract)
    except Exception as error:  # Orbax and tensorstore raise many kinds; the user hears which folder
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"{path} cannot be restored ({reason}); remove its stage folder to make it again") from error


class Checkpointer:
    """Saves of one stage in progress, the newest two kept."""

    def __init__(self, folder: Path):
        policy = ocp.training.preservation_policies.LatestN(2)
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.inner = ocp.training.Checkpointer(
            folder.resolve(), preservation_policy=policy, cleanup_tmp_directories=True
        )

    def save(self, state: TrainState, wait: bool = False) -> None:
        """Starts a save of the state after ``state.step`` updates; ``wait`` returns when it is whole."""
        tree = {**vars(state), "key": jax.random.key_data(state.key)}
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
            found = self.inner.load(self.inner.latest.step, abstract)
        except Exception as error:  # as above
            reason = " ".join(str(error).split())[:160]
            raise UserError(f"{self.folder} is damaged ({reason}); remove it to start the stage again") from error
        return TrainState(**{**found, "key": jax.random.wrap_key_data(found["key"])})

    def close(self, remove: bool = False) -> None:
        """Waits for a save under way; ``remove`` deletes the folder once the stage needs it no more."""
        self.inner.close()
        if remove:
            shutil.rmtree(self.folder, ignore_errors=True)


def as_numpy(tree: Any) -> Any:
    """Host copies of a tree of arrays."""
    return jax.tree.map(np.asarray, tree)
