"""Prompts -> a dataset of preference pairs."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from alignjax.errors import POSITIVE, UserError, check_range
from alignjax.fields import Kind, stage_input
from alignjax.labeling.method import LabeledPair, Labeler, LabelingMethod
from alignjax.pipeline.description import describe
from alignjax.pipeline.experiment import Context, Exposure, Program, function_of, programs_of
from alignjax.pipeline.raters import JudgeSizes
from alignjax.pipeline.stages.chunks import in_chunks
from alignjax.pipeline.stages.writing import SHORTENED, Writing, shorten_prompts
from alignjax.preferences import http_judge, judges
from alignjax.tasks.task import Task
from alignjax.training import data


@dataclasses.dataclass(frozen=True)
class Label:
    """Labels pairs with a method and writes them as a TFDS dataset. It resumes after its last complete chunk."""

    method: LabelingMethod
    split: str
    prompts: int
    writing: Writing
    generator: str = stage_input(Kind.POLICY)
    held_out: float = 0.0  # share of the pairs that goes to the split "held_out"
    seed: int = 0
    makes: ClassVar[Kind] = Kind.PAIRS

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "prompts")
        check_range(self, 0, 1 - POSITIVE, "held_out")

    def network(self, context: Context) -> None:
        """Returns None: pairs are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns the texts, whoever labels them, and what the generator and the method's judge depend on.

        Stages with one generator, split and seed draw alike, so their pairs count as the same.
        """
        writing = dataclasses.replace(self.writing, batch=1, buckets=(1,))
        same: dict[str, Any] = {"method": None, "prompts": 1, "held_out": 0.0, "writing": writing}
        drawn = dataclasses.replace(self, **same)
        judged = self.method.judge.exposure(context) if self.method.judge else Exposure()
        generator = context.exposure(self.generator)
        return Exposure(
            trained_against=generator.trained_against | judged.identity | judged.trained_against,
            fitted=generator.fitted | {context.fingerprint(context.name, drawn)},
            measured=generator.measured | judged.fitted | judged.measured,
        )

    def check(self, context: Context) -> None:
        """Raises UserError when the writing, the method or its judge is known to fail."""
        self.writing.check(context, self.split, self.generator)
        try:
            self.method.check(context.task)
        except UserError as error:
            raise UserError(f"{context.name}.method: {error}") from None
        if self.method.judge:
            self.method.judge.check(context)

    def sizes(self) -> JudgeSizes:
        """Returns what the method's judge is compiled for."""
        return JudgeSizes(self.writing.batch, max(self.writing.buckets), self.writing.max_new_tokens)

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the programs that write, then those of the method's judge."""
        network = context.abstract(self.generator)
        judge = self.method.judge.programs(context, "judge", self.sizes()) if self.method.judge else ()
        resident = [program.arguments[0] for program in judge]  # generator and judge live beside each other
        write = self.writing.programs(context, "write", network, resident)
        return (*write, *(program._replace(resident=network.params) for program in judge))

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Labels the prompts chunk by chunk; each chunk is kept in a file of its own."""
        drawn = context.task.source.prompts(self.split, self.prompts, context.seed(self.seed))
        network, judge = context.load(self.generator), None
        prompts, counts = shorten_prompts(context.task, network.tokenizer, drawn, max(self.writing.buckets))
        if self.method.judge:
            judge = self.method.judge.open(context, programs_of(programs, "judge"), self.sizes())
        generate = self.writing.generator(
            context, network, function_of(programs, "write", self.writing.buckets), context.key(self.seed)
        )
        labeler = Labeler(generate, context.task, judge, context.seed(self.seed))

        def label(numbers: range) -> dict[str, Any]:
            labels = self.method.label(labeler, [prompts[i] for i in numbers], numbers)
            counts = judges.take_counts(judge)
            return {"tries": labels.tries, "asked": len(numbers), "pairs": labels.pairs, "judge_counts": counts}

        size = 4 * self.writing.batch  # few retries a chunk, and they fill batches
        chunks = in_chunks(context, len(prompts), size, "prompt", label)
        figures = judges.judge_figures(judge, [chunk["judge_counts"] for chunk in chunks])
        return {**self.finish(context, chunks), **counts, **({"judge": figures} if figures else {})}

    def finish(self, context: Context, chunks: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Writes the dataset; returns what the task's first oracle says about its labels."""
        pairs = [LabeledPair(*pair) for chunk in chunks for pair in chunk["pairs"]]
        if not pairs:
            raise UserError(f"{context.name}: no pair passed the filter; look at the generator's replies, and "
                            f"whether the prompts fit {context.name}.writing.buckets")  # fmt: skip
        rows = [pair._asdict() for pair in pairs]
        cut = len(rows) - int(self.held_out * len(rows))
        splits = {"train": rows[:cut], **({"held_out": rows[cut:]} if cut < len(rows) else {})}
        asked = sum(chunk["asked"] for chunk in chunks)
        figures = {
            "pairs": len(pairs),
            "dropped": asked - len(pairs),
            "tries_per_prompt": sum(chunk["tries"] for chunk in chunks) / asked,
            **oracle_agreement(context.task, pairs),
        }
        source = {"method": describe(self.method), "generator": self.generator, "seed": context.seed(self.seed)}
        data.write_pairs(context.folder / data.PAIR_DATA, splits, {**source, "task": context.task.name, **figures})
        return figures

    meanings: ClassVar[dict[str, str]] = {
        "pairs": "kept",
        "dropped": "prompts without a pair: the filter refused every try, or the prompt was too long",
        "shortened": f"prompts {SHORTENED}",
        "tries_per_prompt": "replies drawn for a prompt, both sides together",
        "oracle_ties": "share of the pairs that the task's oracle calls equal",
        "label_accuracy": "share of the labels that the oracle agrees with, where it does not tie",
        **{f"judge.{name}": meaning for name, meaning in http_judge.FIGURES.items()},
    }


def oracle_agreement(task: Task, pairs: Sequence[LabeledPair]) -> dict[str, float | None]:
    """Returns how the task's first oracle compares the labels; nothing where the task has none."""
    if not task.oracles:
        return {}
    oracle = next(iter(task.oracles.values()))
    prompts, first, second = ([getattr(pair, name) for pair in pairs] for name in ("prompt", "first", "second"))
    truth = judges.exact_preferences(oracle, prompts, first, second)
    labels, decided = np.array([pair.p for pair in pairs]), truth != 0.5
    agrees = (labels > 0.5)[decided] == (truth > 0.5)[decided]
    return {
        "oracle_ties": float(np.mean(~decided)),
        "label_accuracy": float(np.mean(agrees)) if decided.any() else None,
    }
