"""Several policies -> the one that its own preference model prefers on validation prompts."""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from alignjax.distributed import storage
from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, stage_input
from alignjax.pipeline import networks
from alignjax.pipeline.experiment import Context, Exposure, NetworkSpec, Program, function_of, programs_of
from alignjax.pipeline.judges import ModelJudge
from alignjax.pipeline.raters import JudgeSizes
from alignjax.pipeline.stages.writing import Writing
from alignjax.training import metrics


@dataclasses.dataclass(frozen=True)
class ChoosePolicy:
    """Makes the best of several policies its result: a point of a grid, or of a course of training.

    Each answers the prompts of a split; the judge, by default the very model that they were trained against, compares
    their replies with the reference's. The highest mean of P(policy > reference) wins; of equal ones the first
    (2307.12950 section 4 chooses so, by the mean reward). A judge of a table that judged here is not held out.
    """

    writing: Writing
    prompts: int
    judge: ModelJudge
    policies: dict[str, str] = stage_input(Kind.POLICY)  # name in the figures -> stage
    reference: str = stage_input(Kind.POLICY)
    split: str = "validation"
    seed: int = 0
    makes: ClassVar[Kind] = Kind.POLICY
    meanings: ClassVar[dict[str, str]] = {
        "chosen": "the policy that was chosen",
        "prompts": "compared on",
        "preference": "mean of P(policy > reference) by the judge",
    }

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "prompts")
        if not self.policies:
            raise UserError("ChoosePolicy.policies is empty; name one")

    def network(self, context: Context) -> NetworkSpec | None:
        """Returns the network of the first policy, without heads: the policies must be alike."""
        first = context.spec(next(iter(self.policies.values())))
        return first and first._replace(record=dataclasses.replace(first.record, heads={}))

    def exposure(self, context: Context) -> Exposure:
        """Returns what all the policies depend on, and the judge as what they are chosen by."""
        judged = self.judge.exposure(context)
        against = Exposure(
            trained_against=judged.identity | judged.trained_against, fitted=judged.fitted, measured=judged.measured
        )
        return context.derived_exposure(*self.policies.values(), self.reference) | against

    def check(self, context: Context) -> None:
        """Raises UserError when writing is known to fail, or the policies are networks of different kinds."""
        self.writing.check(context, self.split, *self.policies.values(), self.reference)
        self.judge.check(context)
        specs = {name: context.spec(stage) for name, stage in self.policies.items()}
        records = [dataclasses.replace(spec.record, heads={}) for spec in specs.values() if spec]
        if len(records) != len(specs) or any(record != records[0] for record in records):
            raise UserError(f"{context.name}.policies are networks of different kinds; choose among policies that one "
                            "start made, all with adapters or all without")  # fmt: skip

    def sizes(self) -> JudgeSizes:
        """Returns what the judge is compiled for."""
        return JudgeSizes(self.writing.batch, max(self.writing.buckets), self.writing.max_new_tokens)

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the programs that write, one policy's for all because they are alike, and those of the judge."""
        first = context.abstract(next(iter(self.policies.values())))
        reference = context.abstract(self.reference)
        write = self.writing.programs(context, "write", first)
        write += self.writing.programs(context, "write reference", reference)
        return (*write, *self.judge.programs(context, "judge", self.sizes()))

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Has every policy answer, compares them, and writes the network of the best."""
        prompts = list(context.task.source.prompts(self.split, self.prompts, context.seed(self.seed)))
        stages = {"write reference": self.reference, **{f"write {name}": s for name, s in self.policies.items()}}
        replies = {}
        with metrics.progress_bar(len(stages), 0, context.name, "policy") as bar:
            for name, stage in stages.items():
                own = programs_of(
                    programs, "write reference" if stage == self.reference else "write", self.writing.buckets
                )
                replies[name] = self.replies(context, own, name, stage, prompts)
                bar.update()
                context.stop_if_preempted()
        judge = self.judge.open(context, programs_of(programs, "judge"), self.sizes())
        base, means = replies.pop("write reference"), {}
        for name, texts in replies.items():
            means[name.removeprefix("write ")] = float(np.mean(judge(prompts, texts, base)))
        context.release()
        chosen = max(means, key=lambda name: means[name])
        network = dataclasses.replace(context.load(self.policies[chosen]), heads={})
        networks.save(context.folder, network)
        return {"chosen": chosen, "prompts": len(prompts), "preference": means}

    def replies(
        self, context: Context, programs: tuple[Program, ...], name: str, stage: str, prompts: Sequence[str]
    ) -> list[str]:
        """Returns a policy's replies, empty where the task's filter refuses one. Each policy's are kept in a file."""
        path = context.folder / f"{name.replace(' ', '-')}.json"
        if not context.hosts.broadcast(path.exists):
            key = jax.random.fold_in(context.key(self.seed), zlib.crc32(name.encode()) % 2**31)
            write = function_of(programs, programs[0].name.rsplit(" ", 1)[0], self.writing.buckets)
            generate = self.writing.generator(context, context.load(stage), write, key)
            drawn = generate(prompts, range(len(prompts)), 0)
            storage.write_json(path, [context.task.clean(reply.text) or "" if reply else "" for reply in drawn])
            context.release()  # one policy at a time
        context.hosts.barrier(f"the replies of {name}")
        return list(storage.read_json(path))
