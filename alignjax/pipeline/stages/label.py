"""prompts -> a dataset of preference pairs; and how any stage lets a model write."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from alignjax.distributed import sharding, storage
from alignjax.errors import POSITIVE, UserError, check_range
from alignjax.labeling import methods as labeling
from alignjax.models.log_probs import log_prob
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, encode_continuation, stop_sequences
from alignjax.pipeline import config
from alignjax.pipeline.experiment import PAIRS, POLICY, Context, Program, ids_of, shape
from alignjax.pipeline.networks import Network, gathering
from alignjax.sampling.generate import Generate, generator, scorer, writer
from alignjax.sampling.process import Sampling, Stop
from alignjax.tasks.task import EOS, Task
from alignjax.training import data, metrics

PAIR_DATA = "data"
CHUNKS = "chunks"  # a folder of the pairs of so many prompts each, in order


@dataclasses.dataclass(frozen=True)
class Writing:
    """How a stage lets a model write."""

    max_new_tokens: int
    buckets: tuple[int, ...]  # prompt lengths in tokens that are compiled for
    batch: int
    sampling: Sampling = Sampling()
    gather: bool = True  # the weights, over data and fsdp, before they write; False: where there is no room

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "max_new_tokens", "buckets", "batch")

    def check(self, context: Context, split: str, *sources: str) -> None:
        """Raises UserError when the batch does not divide over the mesh, the task has no such split, or one of the
        ``sources`` is known to have no tokens to stop at."""
        sharding.check_batch(f"{context.name}.writing.batch", self.batch, context.mesh)
        context.task.source.prompts(split, 1, context.seed)
        check_stop(context, *sources)

    def programs(self, context: Context, name: str, policy: Network, beside: Any = ()) -> Iterator[Program]:
        """What its generator compiles, a bucket each; ``beside`` are the arrays that live meanwhile."""
        sharding.check_batch(f"{context.name}.writing.batch", self.batch, context.mesh)
        stop = stop_tokens(context.task, policy.tokenizer)
        write = writer(
            self.model(policy), stop=stop, max_new_tokens=self.max_new_tokens, sampling=self.sampling, mesh=context.mesh
        )
        numbers = shape("int32", self.batch)
        for length in self.buckets:
            arguments = policy.params, ids_of(self.batch, length), numbers, jax.eval_shape(lambda: context.key)
            yield Program(f"{name} {length}", write, arguments, self.batch * (length + self.max_new_tokens), beside)

    def scoring(self, context: Context, name: str, reference: Network, beside: Any) -> Iterator[Program]:
        """And where replies are scored by a reference."""
        if self.sampling == Sampling():
            reply, logp = ids_of(self.batch, self.max_new_tokens), shape("float32", self.batch, self.max_new_tokens)
            score = scorer(log_prob(reference.model), context.mesh)
            for length in self.buckets:
                arguments = reference.params, ids_of(self.batch, length), reply, logp
                yield Program(f"{name} {length}", score, arguments, self.batch * (length + self.max_new_tokens), beside)

    def model(self, policy: Network) -> Model:
        return gathering(policy.model) if self.gather else policy.model

    def generator(self, context: Context, policy: Network, reference: Network | None = None) -> Generate:
        if reference and reference.fingerprint != policy.fingerprint:
            raise UserError(f"{context.name}: the policy and the reference have different tokenizers; use one start")
        return generator(
            self.model(policy),
            policy.params,
            policy.tokenizer,
            stop=stop_tokens(context.task, policy.tokenizer),
            end=context.task.format.end,
            max_new_tokens=self.max_new_tokens,
            buckets=tuple(sorted(self.buckets)),
            batch=self.batch,
            sampling=self.sampling,
            key=context.key,
            reference=(log_prob(reference.model), reference.params) if reference else None,
            mesh=context.mesh,
        )


def stop_tokens(task: Task, tokenizer: Tokenizer) -> Stop:
    """The token sequences that end a completion. UserError when there are none, or a piece has none."""
    found: list[tuple[int, ...]] = []
    for piece in task.format.stop:
        try:
            found += [(token,) for token in tokenizer.ends] if piece == EOS else stop_sequences(tokenizer, piece)
        except UserError as error:
            raise UserError(f"task.format.stop: {error}") from None
    if not found:
        raise UserError(f"task {task.name!r} stops at the tokenizer's end token, and it has none; name another stop")
    return tuple(dict.fromkeys(found))


def check_stop(context: Context, *sources: str) -> None:
    """Raises UserError when one of the ``sources`` is known to have no tokens that the task stops at."""
    for source in sources:
        if tokenizer := context.tokenizer(source):
            stop_tokens(context.task, tokenizer)


def unseen_stops(task: Task, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The single stop tokens that no reply of the task's format ends with."""
    end = encode_continuation(tokenizer, task.format.end)
    return tuple(stop[0] for stop in stop_tokens(task, tokenizer) if len(stop) == 1 and stop[0] not in end)


@dataclasses.dataclass(frozen=True)
class Label:
    """prompts -> a TFDS dataset of pairs, by a labelling method. Resumes after its last whole chunk."""

    makes: ClassVar = PAIRS
    generator: str
    method: Callable[..., tuple[list[labeling.Labeled], int]]  # a labeling.Method
    split: str
    prompts: int
    writing: Writing
    held_out: float = 0.0  # share of the pairs that goes to the split "held_out"

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "prompts")
        check_range(self, 0, 1 - POSITIVE, "held_out")

    def inputs(self) -> tuple[str, ...]:
        return (self.generator,)

    def check(self, context: Context) -> None:
        context.expect(self.generator, POLICY)
        self.writing.check(context, self.split, self.generator)
        context.rehearse("method", lambda: self.method(lambda *nothing: [], context.task, [], [], context.seed))
        context.expect_room(self.generator, "writing", max(self.writing.buckets) + self.writing.max_new_tokens)

    def programs(self, context: Context) -> Iterator[Program]:
        return self.writing.programs(context, "write", context.policy(self.generator))

    def run(self, context: Context) -> dict[str, Any]:
        task, policy = context.task, context.policy(self.generator)
        prompts = task.source.prompts(self.split, self.prompts, context.seed)
        generate = self.writing.generator(context, policy)
        folder = context.folder / CHUNKS
        storage.make_folder(folder)
        whole = context.hosts.first(lambda: sum(path.suffix == ".json" for path in storage.contents(folder)))
        done = [storage.read_json(chunk_file(folder, i)) for i in range(whole)]
        size = 4 * self.writing.batch  # prompts a chunk: retries are few, and fill their batches
        with metrics.progress(len(prompts), whole * size, context.name, "prompt") as bar:
            for at in range(whole * size, len(prompts), size):
                numbers = range(at, min(at + size, len(prompts)))
                pairs, tries = self.method(generate, task, [prompts[i] for i in numbers], numbers, context.seed)
                storage.write_json(
                    chunk_file(folder, len(done)), row := {"tries": tries, "asked": len(numbers), "pairs": pairs}
                )
                done.append(row)
                bar.update(len(numbers))
                context.stop_if_preempted()
        return self.finish(context, done)

    def finish(self, context: Context, chunks: list[dict[str, Any]]) -> dict[str, Any]:
        """Writes the dataset and counts what the oracle makes of its labels."""
        task = context.task
        pairs = [labeling.Labeled(*pair) for chunk in chunks for pair in chunk["pairs"]]
        if not pairs:
            raise UserError(f"{context.name}: no pair came through the filter; look at the generator's replies, and "
                            f"whether the prompts fit {context.name}.writing.buckets")  # fmt: skip
        rows = [pair._asdict() for pair in pairs]
        cut = len(rows) - int(self.held_out * len(rows))
        splits = {"train": rows[:cut], **({"held_out": rows[cut:]} if cut < len(rows) else {})}
        asked = sum(chunk["asked"] for chunk in chunks)
        figures = {
            "pairs": len(pairs),
            "dropped": asked - len(pairs),
            "tries_per_prompt": sum(chunk["tries"] for chunk in chunks) / asked,
            **agreement(task, pairs),
        }
        source = {"method": config.describe(self.method), "generator": self.generator, "seed": context.seed}
        data.write_pairs(context.folder / PAIR_DATA, splits, {**source, "task": task.name, **figures})
        return figures


def chunk_file(folder: Path, index: int) -> Path:
    """{"tries", "asked", "pairs"} of the index-th so many prompts."""
    return folder / f"{index:06d}.json"


def agreement(task: Task, pairs: Sequence[labeling.Labeled]) -> dict[str, float | None]:
    """What the task's first oracle makes of the labels; nothing where the task has none."""
    if not task.oracles:
        return {}
    oracle = next(iter(task.oracles.values()))
    truth = np.array([oracle(pair.prompt, pair.first, pair.second) for pair in pairs])
    labels, told = np.array([pair.p for pair in pairs]), truth != 0.5
    right = (labels > 0.5)[told] == (truth > 0.5)[told]
    return {"oracle_ties": float(np.mean(~told)), "label_accuracy": float(np.mean(right)) if told.any() else None}
