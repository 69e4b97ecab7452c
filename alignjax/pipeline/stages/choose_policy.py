"""Several policies -> the one that its own preference model prefers on validation prompts."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
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
from alignjax.pipeline.stages.writing import SHORTENED, Writing, fitting_prompts
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
        "too_long": "prompts longer than every bucket, left out",
        "shortened": f"prompts {SHORTENED}",
        "preference": "mean of P(policy > reference) by the judge",
    }

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "prompts")
        if not self.policies:
            raise UserError("ChoosePolicy.policies is empty; name one")
        if self.split == "test":
            raise UserError("ChoosePolicy.split='test' would choose by what is measured later; name validation")
        for name in self.policies:
            if not re.fullmatch(r"[\w. +-]+", name):
                raise UserError(f"{name!r} cannot name a policy, because it names a file; use letters and digits")

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
        every = context.task.source.prompts(self.split, self.prompts, context.seed(self.seed))
        prompts, counts = fitting_prompts(context, self.reference, self.writing, every)
        write = function_of(programs, "write", self.writing.buckets)
        with metrics.progress_bar(1 + len(self.policies), 0, context.name, "policy") as bar:
            reference = function_of(programs, "write reference", self.writing.buckets)
            base, replies = self.replies(context, reference, "reference", self.reference, prompts), {}
            for name, stage in self.policies.items():
                bar.update()
                replies[name] = self.replies(context, write, f"policy {name}", stage, prompts)
            bar.update()
        judge = self.judge.open(context, programs_of(programs, "judge"), self.sizes())
        means = {name: float(np.mean(judge(prompts, texts, base))) for name, texts in replies.items()}
        context.release()
        chosen = max(means, key=lambda name: means[name])
        network = dataclasses.replace(context.load(self.policies[chosen]), heads={})
        networks.save(context.folder, network)
        return {"chosen": chosen, **counts, "preference": means}

    def replies(self, context: Context, write: Any, name: str, stage: str, prompts: list[str]) -> list[str]:
        """Returns a policy's replies, empty where the task's filter refuses one. Each policy's are kept in a file."""
        path = context.folder / f"replies-{name}.json"
        if not context.hosts.broadcast(path.exists):
            key = jax.random.fold_in(context.key(self.seed), zlib.crc32(name.encode()) % 2**31)
            drawn = self.writing.generator(context, context.load(stage), write, key)(prompts, range(len(prompts)), 0)
            storage.write_json(path, [context.task.clean(reply.text) or "" for reply in drawn if reply])
            context.release()  # one policy at a time
        context.hosts.barrier(f"the replies of {name}")
        context.stop_if_preempted()
        return list(storage.read_json(path))
