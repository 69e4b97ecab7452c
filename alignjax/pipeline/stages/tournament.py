"""Policies -> win-rate tables."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from alignjax.distributed import sharding, storage
from alignjax.errors import UserError, check_range
from alignjax.pipeline import config
from alignjax.pipeline.experiment import POLICY, PREFERENCE, TABLES, Context, Program, ancestors
from alignjax.pipeline.networks import Network
from alignjax.pipeline.stages.fit_preference import judging
from alignjax.pipeline.stages.label import Writing
from alignjax.pipeline.stages.train_policy import Optimise
from alignjax.preferences import judges, tournament
from alignjax.preferences.judges import Judge
from alignjax.tasks.task import Task
from alignjax.training import metrics

ORACLE = "oracle:"  # before the name of one of the task's oracles
COLUMNS = {"text": (str,), "length": (int,), "kl": (float, int)}  # of a file of replies, and what they hold


@dataclasses.dataclass(frozen=True)
class Tournament:
    """Policies against each other on held-out prompts, by oracles and held-out preference models."""

    makes: ClassVar = TABLES
    policies: dict[str, str]  # name in the table -> stage
    reference: str
    judges: dict[str, str]  # name in the table -> one of the task's oracles, or a FitPreference stage
    prompts: int
    writing: Writing
    split: str = "test"

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "prompts")
        for field in ("policies", "judges"):
            if not getattr(self, field):
                raise UserError(f"Tournament.{field} is empty; name one")
        for name in (*self.policies, *self.judges):
            if not re.fullmatch(r"[\w. +-]+", name):
                raise UserError(
                    f"{name!r} cannot name a policy or a judge, whose files it names; use letters and digits"
                )

    def inputs(self) -> tuple[str, ...]:
        return (*self.policies.values(), self.reference, *self.model_judges().values())

    def model_judges(self) -> dict[str, str]:
        return {name: source for name, source in self.judges.items() if not source.startswith(ORACLE)}

    def check(self, context: Context) -> None:
        for source in (*self.policies.values(), self.reference):
            context.expect(source, POLICY)
            context.expect_room(source, "writing", max(self.writing.buckets) + self.writing.max_new_tokens)
        oracles = context.task.oracles
        for source in self.judges.values():
            if not source.startswith(ORACLE):
                context.expect(source, PREFERENCE)
            elif source.removeprefix(ORACLE) not in oracles:
                raise UserError(
                    f"{context.name}: task {context.task.name!r} has no {source}; it has {', '.join(oracles) or 'none'}"
                )
        self.writing.check(context, self.split, *self.policies.values(), self.reference)
        self.check_held_out(context)

    def programs(self, context: Context) -> Iterator[Program]:
        """(A judge is asked in as many tokens as the policies', though its tokenizer may need others.)"""
        reference = context.policy(self.reference)
        policies = {name: context.policy(stage) for name, stage in self.policies.items()}
        for name, policy in policies.items():
            yield from self.writing.programs(context, f"{name} writes", policy, beside=reference.params)
        most = max(policies.values(), key=lambda policy: sharding.held_by((policy.params, reference.params)))
        yield from self.writing.scoring(context, "the reference scores", reference, beside=most.params)
        longest = max(self.writing.buckets), self.writing.max_new_tokens
        for name, source in self.model_judges().items():
            judge, built = context.preference(source)
            yield judging(f"{name} judges", context, built, judge.params, self.writing.batch, *longest)

    def run(self, context: Context) -> dict[str, Any]:
        task = context.task
        prompts, too_long = self.fitting(context, task.source.prompts(self.split, self.prompts, context.seed))
        written = dict(self.write(context, prompts))
        context.loaded.clear()
        replies = {name: [task.clean(text) or "" for text in rows["text"]] for name, rows in written.items()}
        tables = []
        for name, source in self.judges.items():
            rates = tournament.win_rates(self.judge(context, source), prompts, replies)
            context.loaded.clear()  # one judge at a time
            tables.append({
                "judge": name,
                "policies": list(self.policies),
                "n": len(prompts),
                "win_rate": rates.rate.tolist(),
                "low": rates.low.tolist(),
                "high": rates.high.tolist(),
                "mean_length": [float(np.mean(written[p]["length"])) for p in self.policies],
                "kl_to_reference": [finite_mean(written[p]["kl"]) for p in self.policies],
                "mean_score": [mean_score(task, prompts, replies[p]) for p in self.policies],
            })  # fmt: skip
        samples = [{"prompt": x, **{p: replies[p][i] for p in self.policies}} for i, x in enumerate(prompts[:8])]
        storage.write_json(context.folder / "samples.json", samples)
        storage.write_json(context.folder / "win_rates.json", tables)
        return {"prompts": len(prompts), "too_long": too_long}

    def fitting(self, context: Context, prompts: Sequence[str]) -> tuple[list[str], int]:
        """The prompts that a bucket holds, and how many are too long: nobody is asked those."""
        encode, longest = context.policy(self.reference).tokenizer.encode, max(self.writing.buckets)
        kept = [prompt for prompt in prompts if len(encode(prompt)) <= longest]
        if not kept:
            raise UserError(f"{context.name}: all {len(prompts)} prompts are longer than {longest} tokens; "
                            f"add a larger one to {context.name}.writing.buckets")  # fmt: skip
        return kept, len(prompts) - len(kept)

    def write(self, context: Context, prompts: Sequence[str]) -> Iterator[tuple[str, dict[str, list]]]:
        """Each policy's replies, kept in a file of its own, so that a resumed run does not write them again."""
        reference = context.policy(self.reference)
        kept = set(context.loaded)  # it, and what it lies over
        with metrics.progress(len(self.policies), 0, context.name, "policy") as bar:
            for name, stage in self.policies.items():
                path = context.folder / f"replies-{name}.json"
                if not context.hosts.first(path.exists):
                    drawn = self.replies(context, context.policy(stage), reference, name, prompts)
                    for other in context.loaded.keys() - kept:
                        del context.loaded[other]  # one policy at a time, beside the reference
                    storage.write_json(path, dict(zip(COLUMNS, map(list, drawn), strict=True)))
                bar.update()
                context.hosts.meet(f"the replies of {name}")
                context.stop_if_preempted()
                yield name, read_replies(path, len(prompts))

    def replies(
        self, context: Context, policy: Network, reference: Network, name: str, prompts: Sequence[str]
    ) -> Iterator[tuple]:
        """COLUMNS."""
        generate = self.writing.generator(context, policy, reference)
        drawn = generate(prompts, range(len(prompts)), zlib.crc32(name.encode()) % 2**31)
        return zip(*(reply for reply in drawn if reply), strict=True)

    def judge(self, context: Context, source: str) -> Judge:
        task = context.task
        if source.startswith(ORACLE):
            return judges.oracle_judge(task.oracles[source.removeprefix(ORACLE)])
        network, built = context.preference(source)
        return judges.model_judge(
            built.logit, network.params, network.tokenizer, task.format,
            batch=self.writing.batch, mesh=context.mesh,
        )  # fmt: skip

    def check_held_out(self, context: Context) -> None:
        """The judge of an evaluation is never a model that a policy was trained against, nor made from one,
        nor fitted to the same pairs."""
        stages = context.experiment.stages
        trained = {
            stages[name].preference
            for name in ancestors(stages, self.policies.values())
            if isinstance(stages[name], Optimise)
        }
        for name, source in self.model_judges().items():
            same_pairs = {
                t for t in trained if getattr(stages[t], "pairs", "") == getattr(stages[source], "pairs", None)
            }
            model = config.describe(context.origin(source))
            same_model = {
                t for t in trained
                if untrained(stages[t]) and untrained(stages[source]) and config.describe(context.origin(t)) == model
            }  # fmt: skip
            found = (ancestors(stages, [source]) & trained) | same_pairs | same_model
            if found:
                raise UserError(f"{context.name}: judge {name!r} is or shares {min(found)!r}, which a policy was "
                                "trained against; name a held-out one")  # fmt: skip


def untrained(stage: Any) -> bool:
    """Whether a preference model is what it was made from, as ``ZeroShot`` is: it has no pairs of its own."""
    return not hasattr(stage, "pairs")


def read_replies(path: Path, count: int) -> dict[str, list]:
    """The columns of a replies file. Raises UserError when it is damaged."""
    columns = storage.read_json(path)

    def whole(name: str) -> bool:
        column = columns.get(name)
        return isinstance(column, list) and len(column) == count and all(type(x) in COLUMNS[name] for x in column)

    if not isinstance(columns, dict) or not all(map(whole, COLUMNS)):
        raise UserError(f"{path} is damaged; remove it to have it written again")
    return columns


def mean_score(task: Task, prompts: Sequence[str], replies: Sequence[str]) -> float | None:
    """By the task's own score, or None where it has none."""
    return None if task.score is None else float(np.mean(list(map(task.score, prompts, replies))))


def finite_mean(values: Sequence[float]) -> float | None:
    """The mean, or None where it is not measured (NaN, which JSON does not know)."""
    mean = float(np.mean(values))
    return mean if np.isfinite(mean) else None
