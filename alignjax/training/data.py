"""Datasets and batches. The only file that imports tensorflow_datasets and Grain; nothing imports TensorFlow.

A batch is a pure function of (seed, step). So a resumed run reads the same batches as a run that was never stopped.
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

PAIR_DATA = "data"
"""The folder of a stage's pairs, in the stage's own."""
PAIR_FEATURES = {
    "prompt": "text",
    "first": "text",
    "second": "text",
    "p": "float",
    "affix": "int",
    "positive": "int",
}
"""The columns of a dataset of pairs: p is the probability that ``first`` is preferred to ``second``. Of pairs by RLCD,
``affix`` is the number of the affix pair and ``positive`` which reply (0 or 1) was written under the positive affix;
of other pairs they are -1."""


class DatasetForm(NamedTuple):
    """What a TFDS dataset is called, and what its rows hold."""

    name: str
    description: str
    features: Mapping[str, str]  # column -> "text", "float", "int" or "bool"


PAIRS = DatasetForm("pairs", "Preference pairs; p = P(first is preferred to second | prompt).", PAIR_FEATURES)


class BatchPlan(NamedTuple):
    """Which examples make a batch."""

    indices: np.ndarray  # [B] int, of the examples
    length: int  # the bucket: tokens to which the examples are padded
    step: int = 0


def plan_batches(lengths: Sequence[int], buckets: Sequence[int], batch: int, seed: int) -> Callable[[int], BatchPlan]:
    """Returns the function step -> BatchPlan, which puts shuffled examples into batches of one bucket each.

    ``lengths`` are the examples' lengths in tokens; an example belongs to the smallest of ``buckets`` that holds it.
    Each epoch is a new shuffle and leaves out fewer than ``batch`` examples. Examples that do not fill a batch of their
    bucket move to the next larger bucket.

    Raises UserError when an example fits no bucket, or when there are fewer than ``batch`` examples.
    """
    ordered = sorted(buckets)
    bucket_indices = np.searchsorted(ordered, lengths)  # len(ordered) where an example fits no bucket
    if len(lengths) < batch:
        raise UserError(f"{len(lengths)} examples do not fill one batch of {batch}; make more or a smaller batch")
    if np.any(bucket_indices == len(ordered)):
        raise UserError(f"an example of {max(lengths)} tokens fits no bucket of {ordered}; add one")

    @lru_cache(maxsize=2)
    def epoch(number: int) -> list[BatchPlan]:
        return _plan_epoch(bucket_indices, ordered, batch, np.random.default_rng((seed, number)))

    size = len(epoch(0))
    return lambda step: epoch(step // size)[step % size]._replace(step=step)


def _plan_epoch(
    bucket_indices: np.ndarray, buckets: Sequence[int], batch: int, rng: np.random.Generator
) -> list[BatchPlan]:
    """Returns the shuffled batches of one epoch. ``bucket_indices`` [examples] index the ascending ``buckets``."""
    plans: list[BatchPlan] = []
    leftover = np.zeros(0, int)
    shuffled = rng.permutation(len(bucket_indices))[: len(bucket_indices) // batch * batch]
    for index, length in enumerate(buckets):
        candidates = np.concatenate([leftover, shuffled[bucket_indices[shuffled] == index]])
        full = len(candidates) // batch * batch
        plans += [BatchPlan(row, length) for row in candidates[:full].reshape(-1, batch)]
        leftover = candidates[full:]
    return [plans[i] for i in rng.permutation(len(plans))]


def load_batches(
    plan: Callable[[int], BatchPlan],
    make: Callable[[BatchPlan], Any],
    mesh: jax.sharding.Mesh,
    start: int,
    stop: int,
) -> Iterator[Any]:
    """Returns an iterator over the batches of steps start <= step < stop, as global arrays sharded by rows.

    A thread of Grain's makes the batches ahead of their use. ``make`` returns host arrays [B', ...] for the B' examples
    of its plan. Each process calls it for its own rows alone, so a row may depend on its example and the step only.
    """

    def load(step: int) -> Any:
        whole = plan(step)
        size = len(whole.indices)
        local = sharding.local_rows(mesh, size)
        return sharding.place_rows(mesh, make(whole._replace(indices=whole.indices[local])), local, size)

    dataset = grain.MapDataset.range(start, stop).map(load)
    return iter(dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=4)))


def write_pairs(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]], metadata: Mapping[str, Any]) -> None:
    """Writes rows with the columns of ``PAIR_FEATURES`` by split as the dataset ``pairs`` (``write_dataset``).

    ``affix`` and ``positive`` may be left out.
    """
    unknown = {"affix": -1, "positive": -1}
    write_dataset(
        folder, PAIRS, {name: [{**unknown, **row} for row in rows] for name, rows in splits.items()}, metadata
    )


def write_dataset(
    folder: Path,
    form: DatasetForm,
    splits: Mapping[str, Sequence[Mapping[str, Any]]],
    metadata: Mapping[str, Any],
) -> None:
    """Writes rows by split as a TFDS dataset in the array_record format. TFDS shuffles them by their index.

    Replaces an older dataset of this name in the folder. ``tfds.data_source(form.name, split=..., data_dir=folder)``
    reads it, and its info holds the metadata. Only process 0 writes.
    """
    if jax.process_index():
        return
    import tensorflow_datasets as tfds  # imported here, as below: it takes half a second, and few stages need it

    tfds.disable_progress_bar()
    with storage.write_through(folder) as local, contextlib.redirect_stdout(io.StringIO()):  # TFDS prints a notice
        storage.remove_tree(local / form.name)  # TFDS would keep an older dataset
        builder = _dataset_builder(form, splits, metadata)(data_dir=str(local), file_format="array_record")
        builder.download_and_prepare()


def _dataset_builder(
    form: DatasetForm, splits: Mapping[str, Sequence[Mapping[str, Any]]], metadata: Mapping[str, Any]
) -> Any:
    """Returns the TFDS builder class of a dataset."""
    import tensorflow_datasets as tfds

    types = {
        "text": tfds.features.Text(),
        "float": tfds.features.Scalar(np.float32),
        "int": tfds.features.Scalar(np.int64),
        "bool": tfds.features.Scalar(np.bool_),
    }

    with tfds.core.registered.skip_registration():  # a process may write several such datasets

        class Builder(tfds.core.GeneratorBasedBuilder):
            name = form.name
            VERSION = tfds.core.Version("1.0.0")

            def _info(self) -> tfds.core.DatasetInfo:
                return tfds.core.DatasetInfo(
                    builder=self,
                    description=form.description,
                    features=tfds.features.FeaturesDict({n: types[k] for n, k in form.features.items()}),
                    metadata=tfds.core.MetadataDict(metadata),
                )

            def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
                return {name: self._generate_examples(rows) for name, rows in splits.items()}

            def _generate_examples(self, rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
                for index, row in enumerate(rows):
                    yield index, {name: row[name] for name in form.features}

    return Builder


def read_pairs(folder: Path, split: str) -> list[dict[str, Any]]:
    """Returns the rows of a split, with the columns of ``PAIR_FEATURES``.

    Raises UserError when the dataset or the split is missing or damaged.
    """
    import tensorflow_datasets as tfds

    with storage.local_copy(folder) as local:
        if not local.is_dir():
            raise UserError(f"{folder} is missing; remove {folder.parent} to label again")
        try:
            source = tfds.data_source("pairs", split=split, data_dir=str(local))
            rows = [source[i] for i in range(len(source))]
            read: dict[str, Callable[[Any], Any]] = {"text": bytes.decode, "float": float, "int": int}
            return [{name: read[kind](row[name]) for name, kind in PAIR_FEATURES.items()} for row in rows]
        except Exception as error:  # TFDS and array_record raise many types
            raise UserError(
                f"{folder} holds no readable split {split!r} of pairs ({storage.short_reason(error)}); label again"
            ) from error
