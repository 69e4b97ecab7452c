"""Policies -> win-rate tables."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from alignjax.distributed import sharding, storage
from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, no_effect, stage_input
from alignjax.pipeline.experiment import Context, Exposure, Program, function_of, programs_of
from alignjax.pipeline.judges import JudgeSpec
from alignjax.pipeline.networks import Network
from alignjax.pipeline.raters import JudgeSizes
from alignjax.pipeline.stages.replies import (
    ReplySource,
    finite,
    has_replies,
    messages_of,
    read_replies,
    reply_measures,
    write_replies,
)
from alignjax.pipeline.stages.writing import SHORTENED, Writing, fitting_prompts
from alignjax.pipeline.training_judge import check_judge, judge_label
from alignjax.preferences import judges, tournament
from alignjax.preferences.statistics import mean_interval
from alignjax.reporting.exchange import OUTPUTS, WIN_RATES, judgments_file, replies_file
from alignjax.sampling.process import Sampling
from alignjax.training import metrics

_SAMPLES = 8  # prompts whose replies the report shows


@dataclasses.dataclass(frozen=True)
class Tournament:
    """Compares policies with each other on held-out prompts, by oracles and held-out preference models.

    n policies write n replies to a prompt, and a judge compares n (n - 1) / 2 pairs of them. Each policy draws with its
    own keys: P(pi > pi') is an expectation over independent y and y', which shared keys would change where two policies
    are alike. The prompts are the same for all. What its folder keeps of every prompt is described in
    ``alignjax.reporting.exchange``.

    With ``gather`` it compares those policies that are finished, at least two. When more are, it is made again, and the
    replies of a policy that has not changed are kept.
    """

    judges: dict[str, JudgeSpec]  # name in the table -> Oracle("oracle"), ModelJudge("judge"), ...
    prompts: int
    writing: Writing
    policies: dict[str, str] = stage_input(Kind.POLICY)  # name in the table -> stage
    reference: str = stage_input(Kind.POLICY)  # mu of the KL column
    split: str = "test"
    seed: int = 0
    tau: float | None = None  # of P_tau, ``preferences.tournament.regularized_preferences``; None: no such table
    gather: bool = no_effect(False)  # do with those of the policies that are finished
    makes: ClassVar[Kind] = Kind.TABLES
    meanings: ClassVar[dict[str, str]] = {
        "prompts": "compared on",
        "replies": "written or kept, one a policy and prompt",
        "too_long": "prompts longer than every bucket, left out",
        "shortened": f"prompts {SHORTENED}",
    }

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "prompts")
        if self.tau is not None:
            check_range(self, 0, math.inf, "tau")
            if self.writing.sampling != Sampling():
                raise UserError("Tournament.tau needs the KL, which filtered or tempered samples do not estimate; "
                                "leave it out, or set writing.sampling=Sampling()")  # fmt: skip
        for field, entries in (("policies", self.policies), ("judges", self.judges)):
            if not entries:
                raise UserError(f"Tournament.{field} is empty; name one")
        for name in (*self.policies, *self.judges):
            if not re.fullmatch(r"[\w. +-]+", name):
                raise UserError(
                    f"{name!r} cannot name a policy or a judge, because it names files; use letters and digits"
                )

    def among(self, stages: Collection[str]) -> Tournament:
        """Returns the tournament among the policies of these stages.

        Raises UserError when policies are left out and fewer than two stay.
        """
        policies = {name: stage for name, stage in self.policies.items() if stage in stages}
        if policies == self.policies:
            return self
        if len(policies) < 2:
            waiting = [stage for stage in self.policies.values() if stage not in stages]
            raise UserError(f"fewer than two of its policies are finished ({', '.join(policies) or 'none'}); "
                            f"run {' or '.join(dict.fromkeys(waiting))} first")  # fmt: skip
        return dataclasses.replace(self, policies=policies)

    def network(self, context: Context) -> None:
        """Returns None: tables are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns nothing: nothing is made from a table."""
        return Exposure()

    def check(self, context: Context) -> None:
        """Raises UserError when writing would fail, or a judge is not there or is not held out without saying so."""
        self.writing.check(context, self.split, *self.policies.values(), self.reference)
        for name, judge in self.judges.items():
            check_judge(context, name, judge, self.policies.values())

    def sizes(self) -> JudgeSizes:
        """Returns what judges are compiled for. (A judge's tokenizer may need other lengths than the policies'.)"""
        return JudgeSizes(self.writing.batch, max(self.writing.buckets), self.writing.max_new_tokens)

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the programs that write, score and judge."""
        reference = context.abstract(self.reference)
        policies = {name: context.abstract(stage) for name, stage in self.policies.items()}
        programs: list[Program] = []
        for name, policy in policies.items():
            programs += self.writing.programs(context, f"write {name}", policy, resident=reference.params)
        largest = max(policies.values(), key=lambda p: sharding.bytes_per_device((p.params, reference.params)))
        programs += self.writing.scoring_programs(context, "score", reference, resident=largest.params)
        for name, judge in self.judges.items():
            programs += judge.programs(context, f"judge {name}", self.sizes())
        return tuple(programs)

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Writes replies, has them judged, and writes the tables and a few samples."""
        task = context.task
        all_prompts = task.source.prompts(self.split, self.prompts, context.seed(self.seed))
        prompts, counts = fitting_prompts(context, self.reference, self.writing, all_prompts)
        written = dict(self.write(context, programs, prompts))
        context.release()
        replies = {name: [task.clean(text) or "" for text in rows["text"]] for name, rows in written.items()}
        rows = [
            {"prompt": prompt, "messages": messages_of(task, prompt), "replies": {p: replies[p][i] for p in replies}}
            for i, prompt in enumerate(prompts)
        ]
        storage.write_json(context.folder / OUTPUTS, rows)
        measures, tables = reply_measures(task, prompts, written, replies), []
        kl = np.array([columns["kl"] for columns in written.values()])
        for name, spec in self.judges.items():
            own = programs_of(programs, f"judge {name}")
            judge = spec.open(context, own, self.sizes())
            rates = tournament.win_rates(judge, prompts, replies)
            figures = {"judge_figures": judges.judge_figures(judge, [judges.take_counts(judge)])}
            del judge
            context.release()  # one judge at a time
            label = judge_label(name, spec)
            storage.write_json(context.folder / judgments_file(label), self.judgments(rates))
            tables.append({**self.table(label, spec, rates), **measures, **figures, **self.regularized(rates, kl)})
        samples = [{"prompt": x, **{p: replies[p][i] for p in replies}} for i, x in enumerate(prompts[:_SAMPLES])]
        storage.write_json(context.folder / "samples.json", samples)
        storage.write_json(context.folder / WIN_RATES, tables)
        return {**counts, "replies": len(prompts) * len(written)}

    @property
    def baseline(self) -> str:
        """The policy that the others are compared with one by one: the reference's, or else the first."""
        return next(
            (name for name, stage in self.policies.items() if stage == self.reference), next(iter(self.policies))
        )

    def table(self, name: str, judge: JudgeSpec, rates: tournament.WinRates) -> dict[str, Any]:
        """Returns what one judge says, as JSON."""
        baseline = list(self.policies).index(self.baseline)
        return {
            "judge": name,
            "judge_description": judge.describe(),
            "reference": self.reference,
            "policies": list(self.policies),
            "n": rates.probability.shape[-1],
            "win_rate": rates.rate.tolist(),
            "low": rates.low.tolist(),
            "high": rates.high.tolist(),
            "baseline": self.baseline,
            "mean_probability": rates.mean_probability.tolist(),
            "probability_interval": [mean_interval(row[baseline], (0, 1)) for row in rates.probability],
            "length_controlled": rates.length_controlled.tolist(),
        }

    def regularized(self, rates: tournament.WinRates, kl: np.ndarray) -> dict[str, Any]:
        """Returns P_tau with its intervals, as JSON, from log-ratios [P, N] of the replies; nothing without ``tau``."""
        if self.tau is None:
            return {}
        found = tournament.regularized_preferences(rates.probability, kl, self.tau)
        columns = {
            name: [list(map(finite, row)) for row in matrix.tolist()] for name, matrix in found._asdict().items()
        }
        return {"regularized": {"tau": self.tau, **columns}}

    def judgments(self, rates: tournament.WinRates) -> list[dict[str, Any]]:
        """Returns P(y > other | x) of every prompt and every two policies, as JSON; the other order is 1 minus it."""
        names = list(self.policies)
        return [
            {"policy": name, "other": other, "probability": rates.probability[i, j].tolist()}
            for i, name in enumerate(names)
            for j, other in enumerate(names[:i])
        ]

    def write(
        self, context: Context, programs: tuple[Program, ...], prompts: Sequence[str]
    ) -> Iterator[tuple[str, dict[str, list]]]:
        """Yields each policy's replies. Each is kept in a file, so that a resumed run does not write it again.

        A file is another's where the policy, or what else its replies depend on, has changed: it is written anew.
        """
        reference = context.load(self.reference)
        kept = set(context.loaded)  # the reference, and what it lies over
        with metrics.progress_bar(len(self.policies), 0, context.name, "policy") as bar:
            for name, stage in self.policies.items():
                path = context.folder / replies_file(name)
                source = ReplySource(
                    name, self.writing, self.prompts, self.split, self.seed, policy=stage, reference=self.reference
                )
                digest = context.fingerprint(context.name, source)
                if not context.hosts.broadcast(functools.partial(has_replies, path, digest)):
                    drawn = self.draw(context, programs, name, context.load(stage), reference, prompts)
                    for other in context.loaded.keys() - kept:
                        del context.loaded[other]  # one policy at a time, beside the reference
                    write_replies(path, digest, tuple(drawn))
                bar.update()
                context.hosts.barrier(f"the replies of {name}")
                context.stop_if_preempted()
                yield name, read_replies(path, len(prompts))

    def draw(
        self,
        context: Context,
        programs: tuple[Program, ...],
        name: str,
        policy: Network,
        reference: Network,
        prompts: Sequence[str],
    ) -> Iterator[tuple]:
        """Returns the columns of a policy's replies. Samples that are not plain estimate no KL: it is NaN."""
        if reference.token_digest != policy.token_digest:
            raise UserError(f"{context.name}: {name!r} and the reference have different tokenizers; use one start")
        write = function_of(programs, f"write {name}", self.writing.buckets)
        key = jax.random.fold_in(context.key(self.seed), zlib.crc32(name.encode()) % 2**31)
        score = function_of(programs, "score", self.writing.buckets)
        generator = self.writing.generator(context, policy, write, key)
        generate = dataclasses.replace(generator, score=(score, reference.params))
        replies = [reply for reply in generate(prompts, range(len(prompts)), 0) if reply]
        if self.writing.sampling != Sampling():  # filtered or tempered
            replies = [reply._replace(kl=math.nan) for reply in replies]
        return zip(*replies, strict=True)
