"""Policies -> win-rate tables."""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np

from alignjax.distributed import sharding, storage
from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, stage_input
from alignjax.pipeline.experiment import Context, Exposure, Program, function_of, programs_of
from alignjax.pipeline.judges import JudgeSpec, check_held_out
from alignjax.pipeline.networks import Network
from alignjax.pipeline.raters import JudgeSizes
from alignjax.pipeline.stages.writing import SHORTENED, Writing, fitting_prompts
from alignjax.preferences import judges, tournament
from alignjax.preferences.statistics import (
    PAPER_SAMPLE,
    PAPER_WORDS,
    distinct_n,
    mean_interval,
    perplexity,
    word_count,
)
from alignjax.reporting.exchange import OUTPUTS, WIN_RATES, judgments_file, replies_file
from alignjax.sampling.process import Sampling
from alignjax.tasks.task import Task
from alignjax.training import metrics

_NUMBER = (float, int)
_COLUMNS = {"text": (str,), "length": (int,), "kl": _NUMBER, "reference_logp": _NUMBER}  # of a file of replies
_SAMPLES = 8  # prompts whose replies the report shows


@dataclasses.dataclass(frozen=True)
class Tournament:
    """Compares policies with each other on held-out prompts, by oracles and held-out preference models.

    Each policy draws with its own keys: P(pi > pi') is an expectation over independent y and y', which shared keys
    would change where two policies are alike. The prompts are the same for all. What its folder keeps of every prompt
    is described in ``alignjax.reporting.exchange``.
    """

    judges: dict[str, JudgeSpec]  # name in the table -> Oracle("oracle"), ModelJudge("judge"), ...
    prompts: int
    writing: Writing
    policies: dict[str, str] = stage_input(Kind.POLICY)  # name in the table -> stage
    reference: str = stage_input(Kind.POLICY)  # mu of the KL column
    split: str = "test"
    seed: int = 0
    makes: ClassVar[Kind] = Kind.TABLES
    meanings: ClassVar[dict[str, str]] = {
        "prompts": "compared on",
        "too_long": "prompts longer than every bucket, left out",
        "shortened": f"prompts {SHORTENED}",
    }

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "prompts")
        for field, entries in (("policies", self.policies), ("judges", self.judges)):
            if not entries:
                raise UserError(f"Tournament.{field} is empty; name one")
        for name in (*self.policies, *self.judges):
            if not re.fullmatch(r"[\w. +-]+", name):
                raise UserError(
                    f"{name!r} cannot name a policy or a judge, because it names files; use letters and digits"
                )

    def network(self, context: Context) -> None:
        """Returns None: tables are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns nothing: nothing is made from a table."""
        return Exposure()

    def check(self, context: Context) -> None:
        """Raises UserError when writing would fail, a judge is not there, or a judge is not held out."""
        self.writing.check(context, self.split, *self.policies.values(), self.reference)
        for name, judge in self.judges.items():
            judge.check(context)
            check_held_out(context, name, judge, self.policies.values())

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
        measures, tables = self.measures(task, prompts, written, replies), []
        for name, spec in self.judges.items():
            own = programs_of(programs, f"judge {name}")
            judge = spec.open(context, own, self.sizes())
            rates = tournament.win_rates(judge, prompts, replies)
            figures = {"judge_figures": judges.judge_figures(judge, [judges.take_counts(judge)])}
            del judge
            context.release()  # one judge at a time
            storage.write_json(context.folder / judgments_file(name), self.judgments(rates))
            tables.append({**self.table(name, spec, rates), **measures, **figures})
        samples = [{"prompt": x, **{p: replies[p][i] for p in replies}} for i, x in enumerate(prompts[:_SAMPLES])]
        storage.write_json(context.folder / "samples.json", samples)
        storage.write_json(context.folder / WIN_RATES, tables)
        return counts

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

    def judgments(self, rates: tournament.WinRates) -> list[dict[str, Any]]:
        """Returns P(y > other | x) of every prompt and every two policies, as JSON; the other order is 1 minus it."""
        names = list(self.policies)
        return [
            {"policy": name, "other": other, "probability": rates.probability[i, j].tolist()}
            for i, name in enumerate(names)
            for j, other in enumerate(names[:i])
        ]

    def measures(
        self, task: Task, prompts: Sequence[str], written: Mapping[str, Any], replies: Mapping[str, Sequence[str]]
    ) -> dict[str, list[float | None]]:
        """Returns what can be said of each policy's replies without a judge; None: not measured.

        distinct-n is that of 2307.12950, on as many words of each policy as the one with the fewest has; None
        for a policy that writes no words.
        """
        columns = [written[p] for p in self.policies]
        words = {p: word_count(replies[p], PAPER_WORDS) for p in self.policies}
        sample = min([PAPER_SAMPLE, *filter(None, words.values())])
        return {
            "mean_length": [float(np.mean(column["length"])) for column in columns],
            "kl_to_reference": [finite(float(np.mean(column["kl"]))) for column in columns],
            "mean_score": self.scores(task, prompts, replies),
            "mean_characters": [float(np.mean(list(map(len, replies[p])))) for p in self.policies],
            **{
                f"distinct_{n}": [
                    distinct_n(replies[p], n, PAPER_WORDS, sample) if words[p] else None for p in self.policies
                ]
                for n in (1, 2, 3)
            },
            "perplexity": [
                finite(perplexity(np.array(column["reference_logp"]), np.array(column["length"]))) for column in columns
            ],
        }

    def scores(self, task: Task, prompts: Sequence[str], replies: Mapping[str, Sequence[str]]) -> list[float | None]:
        """Returns every policy's mean by the task's own score; None where it has none."""
        if task.score is None:
            return [None] * len(self.policies)
        return [float(np.mean(list(map(task.score, prompts, replies[p])))) for p in self.policies]

    def write(
        self, context: Context, programs: tuple[Program, ...], prompts: Sequence[str]
    ) -> Iterator[tuple[str, dict[str, list]]]:
        """Yields each policy's replies. Each is kept in a file, so that a resumed run does not write it again."""
        reference = context.load(self.reference)
        kept = set(context.loaded)  # the reference, and what it lies over
        with metrics.progress_bar(len(self.policies), 0, context.name, "policy") as bar:
            for name, stage in self.policies.items():
                path = context.folder / replies_file(name)
                if not context.hosts.broadcast(path.exists):
                    drawn = self.draw(context, programs, name, context.load(stage), reference, prompts)
                    for other in context.loaded.keys() - kept:
                        del context.loaded[other]  # one policy at a time, beside the reference
                    storage.write_json(path, dict(zip(_COLUMNS, map(list, drawn), strict=True)))
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


def read_replies(path: Path, count: int) -> dict[str, list]:
    """Returns the columns of a replies file. Raises UserError when it is damaged."""
    columns = storage.read_json(path)

    def is_complete(name: str) -> bool:
        column = columns.get(name)
        return isinstance(column, list) and len(column) == count and all(type(x) in _COLUMNS[name] for x in column)

    if not isinstance(columns, dict) or not all(map(is_complete, _COLUMNS)):
        raise UserError(f"{path} is damaged; remove it to have it written again")
    return columns


def messages_of(task: Task, prompt: str) -> list[dict[str, str]] | None:
    """Returns the prompt as chat messages; None where the task's function refuses it."""
    try:
        return list(task.messages(prompt))
    except UserError:
        return None


def finite(value: float) -> float | None:
    """Returns the value; None where it is not finite, which JSON does not know."""
    return value if math.isfinite(value) else None
