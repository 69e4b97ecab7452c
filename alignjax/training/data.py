"""Datasets in, batches out. The only file that imports tensorflow_datasets and Grain (never TensorFlow).

The position in the data is the step: a batch is a pure function of (seed, step), so that a resumed run
sees what the killed one would have.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np

from alignjax.distributed import sharding, storage
from alignjax.errors import UserError
from alignjax.types import Batch

PAIR_FEATURES = {"prompt": "text", "first": "text", "second": "text", "p": "float"}


class Plan(NamedTuple):
    """Which examples make which batch."""

    indices: np.ndarray  # [batch] example indices
    length: int  # the bucket they are padded to
    step: int = 0


def bucket_of(lengths: Sequence[int], buckets: Sequence[int]) -> np.ndarray:
    """Index of the smallest bucket that holds each length; len(buckets) where none does."""
    return np.searchsorted(np.sort(buckets), lengths)


def planned(lengths: Sequence[int], buckets: Sequence[int], batch: int, seed: int) -> Callable[[int], Plan]:
    """step -> Plan: epoch after epoch, every example shuffled into a batch of its own bucket.

    What does not fill a batch moves up a bucket; in the last one it waits for another epoch, whose shuffle
    is another. Raises UserError when an example fits no bucket or there is not one whole batch.
    """
    ordered, where = sorted(buckets), bucket_of(lengths, buckets)
    if len(lengths) < batch:
        raise UserError(f"{len(lengths)} examples do not fill one batch of {batch}; make more or a smaller batch")
    if np.any(where == len(ordered)):
        raise UserError(f"an example of {max(lengths)} tokens fits no bucket of {ordered}; add one")

    @lru_cache(maxsize=2)
    def epoch(number: int) -> list[Plan]:
        rng, plans, waiting = np.random.default_rng((seed, number)), [], np.zeros(0, int)
        shuffled = rng.permutation(len(where))[: len(where) // batch * batch]
        for index, length in enumerate(ordered):
            mine = np.concatenate([waiting, shuffled[where[shuffled] == index]])
            whole = len(mine) // batch * batch
            plans += [Plan(row, length) for row in mine[:whole].reshape(-1, batch)]
            waiting = mine[whole:]
        return [plans[i] for i in rng.permutation(len(plans))]

    size = len(epoch(0))
    return lambda step: epoch(step // size)[step % size]._replace(step=step)


def batches(
    plan: Callable[[int], Plan], make: Callable[[Plan], Batch], mesh: jax.sharding.Mesh, start: int, stop: int
) -> Iterator[Batch]:
    """The batches of steps start <= step < stop as global arrays, prepared ahead by Grain's threads. Each process makes
    its own rows alone: a row is a function of its example and the step, whoever makes it."""

    def placed(step: int) -> Batch:
        whole = plan(step)
        own = sharding.own_rows(mesh, len(whole.indices))
        return sharding.place(mesh, make(whole._replace(indices=whole.indices[own])), own, len(whole.indices))

    dataset = grain.MapDataset.range(start, stop).map(placed)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def write_pairs(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]], metadata: Mapping[str, Any]) -> None:
    """Writes rows {prompt, first, second, p} as the TFDS dataset ``pairs`` in array_record.

    Read it with ``tfds.data_source("pairs", split=..., data_dir=folder)``; the metadata is in its info. Of several
    processes the first alone writes.
    """
    if jax.process_index():
        return
    import tensorflow_datasets as tfds  # here, as below: half a second that few stages need

    with tfds.core.registered.skip_registration():  # one process may write several

        class Pairs(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> tfds.core.DatasetInfo:
                kinds = {"text": tfds.features.Text(), "float": tfds.features.Scalar(np.float32)}
                return tfds.core.DatasetInfo(
                    builder=self,
                    description="Preference pairs; p = P(first is preferred to second | prompt).",
                    features=tfds.features.FeaturesDict({n: kinds[k] for n, k in PAIR_FEATURES.items()}),
                    metadata=tfds.core.MetadataDict(metadata),
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {name: self._generate_examples(rows) for name, rows in splits.items()}

            def _generate_examples(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
                for index, row in enumerate(rows):
                    yield index, {name: row[name] for name in PAIR_FEATURES}

    tfds.disable_progress_bar()
    with storage.delivered(folder) as here, contextlib.redirect_stdout(io.StringIO()):  # it announces a download
        storage.remove_tree(here / "pairs")  # it would keep what is there
        Pairs(data_dir=str(here), file_format="array_record").download_and_prepare()


def read_pairs(folder: Path, split: str) -> list[dict[str, Any]]:
    """Rows of a split as text and floats. Raises UserError when the dataset is missing or damaged."""
    import tensorflow_datasets as tfds

    with storage.fetched(folder) as here:
        if not here.is_dir():
            raise UserError(f"{folder} is missing; remove {folder.parent} to label again")
        try:
            source = tfds.data_source("pairs", split=split, data_dir=str(here))
            rows = [source[i] for i in range(len(source))]
            return [{n: (v.decode() if isinstance(v, bytes) else float(v)) for n, v in row.items()} for row in rows]
        except Exception as error:  # TFDS and array_record raise many kinds; the user hears which folder
            raise UserError(
                f"{folder} holds no readable split {split!r} of pairs ({storage.reason(error)}); label again"
            ) from error
