"""Policies -> figures: each answers the same prompts, and a function says what it found in the replies."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax

from alignjax.distributed import storage
from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, stage_input
from alignjax.pipeline.experiment import Context, Exposure, Program, function_of
from alignjax.pipeline.stages.study import Finding, write_finding
from alignjax.pipeline.stages.writing import SHORTENED, Writing, fitting_prompts
from alignjax.training import metrics

Read = Callable[[Sequence[str], Mapping[str, Sequence[str]]], Finding]
"""(prompts, name -> one reply to each, empty where the task's filter refuses it) -> what is found."""


@dataclasses.dataclass(frozen=True)
class ReplyStudy:
    """Has policies answer the prompts of a split; ``function`` says what follows.

    Each policy draws with its own keys, as in a Tournament. The function sees texts that nobody was trained on, and
    nothing is chosen by it.
    """

    function: Read
    prompts: int
    writing: Writing
    policies: dict[str, str] = stage_input(Kind.POLICY)  # name in the figures -> stage
    split: str = "test"
    seed: int = 0
    makes: ClassVar[Kind] = Kind.FINDINGS
    meanings: ClassVar[dict[str, str]] = {
        "prompts": "answered by each policy",
        "too_long": "prompts longer than every bucket, left out",
        "shortened": f"prompts {SHORTENED}",
    }

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "prompts")
        if not self.policies:
            raise UserError("ReplyStudy.policies is empty; name one")
        for name in self.policies:
            if not re.fullmatch(r"[\w. +-]+", name):
                raise UserError(f"{name!r} cannot name a policy, because it names a file; use letters and digits")

    def network(self, context: Context) -> None:
        """Returns None: findings are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns nothing: nothing is made from findings."""
        return Exposure()

    def check(self, context: Context) -> None:
        """Raises UserError when writing is known to fail."""
        self.writing.check(context, self.split, *self.policies.values())

    def writers(self, context: Context) -> dict[str, str]:
        """Returns policy -> the first of the policies that are networks of its kind, whose program writes for all."""
        first: dict[Any, str] = {}
        for name, stage in self.policies.items():
            network = context.abstract(stage)
            shapes = jax.tree.map(lambda x: (x.shape, str(x.dtype)), network.params)
            kind = str((network.model.config, network.token_digest, network.temperature, shapes))
            first.setdefault(kind, name)
            first[name] = first[kind]
        return {name: first[name] for name in self.policies}

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the programs that write: one a bucket for each kind of network."""
        programs: tuple[Program, ...] = ()
        for name in dict.fromkeys(self.writers(context).values()):
            programs += self.writing.programs(context, f"write {name}", context.abstract(self.policies[name]))
        return programs

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Has the policies answer and writes what was found."""
        first = next(iter(self.policies.values()))
        every = context.task.source.prompts(self.split, self.prompts, context.seed(self.seed))
        prompts, counts = fitting_prompts(context, first, self.writing, every)
        replies, writers = {}, self.writers(context)
        with metrics.progress_bar(len(self.policies), 0, context.name, "policy") as bar:
            for name in self.policies:
                write = function_of(programs, f"write {writers[name]}", self.writing.buckets)
                replies[name] = self.replies(context, write, name, prompts)
                bar.update()
        write_finding(context, self.function(prompts, replies))
        return counts

    def replies(self, context: Context, write: Any, name: str, prompts: Sequence[str]) -> list[str]:
        """Returns a policy's replies. They are kept in a file, so that a resumed run does not write them again."""
        path = context.folder / f"replies-{name}.json"
        if not context.hosts.broadcast(path.exists):
            key = jax.random.fold_in(context.key(self.seed), zlib.crc32(name.encode()) % 2**31)
            network = context.load(self.policies[name])
            drawn = self.writing.generator(context, network, write, key)(prompts, range(len(prompts)), 0)
            storage.write_json(path, [context.task.clean(reply.text) or "" for reply in drawn if reply])
            context.release()  # one policy at a time
        context.hosts.barrier(f"the replies of {name}")
        context.stop_if_preempted()
        return list(storage.read_json(path))
