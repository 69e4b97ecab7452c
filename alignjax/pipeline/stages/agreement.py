"""How preference models agree with labels that they were not fitted to: people's (2307.12950, Table 5)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import numpy as np

from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, stage_input
from alignjax.pipeline.experiment import Context, Exposure, Program, ancestors, programs_of
from alignjax.pipeline.judges import ModelJudge
from alignjax.pipeline.raters import JudgeSizes
from alignjax.pipeline.stages.load import LoadPairs
from alignjax.pipeline.stages.pair_batches import PairLimits, PairRow, encode_pairs, read_stage_pairs
from alignjax.pipeline.stages.study import Finding, write_finding
from alignjax.pipeline.stages.writing import SHORTENED
from alignjax.preferences.statistics import human_agreement, mean_interval
from alignjax.reporting.tables import markdown_table


@dataclasses.dataclass(frozen=True)
class MeasureAgreement:
    """Measures preference models on the labels of a stage of pairs, all of them on the same pairs.

    Accuracy is the share of the pairs with P(preferred > other) > 1/2, strictly; beside it stands the mean of that P.
    A pair that is too long for one of the models, or whose label is 1/2, is left out for all, and counted. So is a pair
    whose prompt is among the pairs that a model was fitted to, unless ``overlap`` is set.
    """

    sizes: JudgeSizes  # what the models are compiled for; a longer prompt or reply is too long
    models: dict[str, str] = stage_input(Kind.PREFERENCE)  # name in the table -> stage
    pairs: str = stage_input(Kind.PAIRS)
    split: str = "train"  # of the pairs, or "held_out"
    count: int | None = None  # the first pairs of a file, or of a dataset as it is shuffled; None: all
    overlap: bool = False  # measure also what a model was fitted to: its pairs, or pairs with their prompts
    makes: ClassVar[Kind] = Kind.FINDINGS
    meanings: ClassVar[dict[str, str]] = {
        "measured": "pairs",
        "too_long": "pairs that a model cannot hold, left out",
        "undecided": "pairs with the label 1/2, left out",
        "shortened": f"prompts {SHORTENED}",
        "known_prompts": "pairs with a prompt that a model was fitted to, left out unless overlap is set",
    }

    def __post_init__(self) -> None:
        if not self.models:
            raise UserError("MeasureAgreement.models is empty; name a preference model")
        if self.split not in ("train", "held_out"):
            raise UserError(f"MeasureAgreement.split={self.split!r} is unknown; choose train or held_out")
        if self.count is not None:
            check_range(self, 1, math.inf, "count")

    def network(self, context: Context) -> None:
        """Returns None: findings are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns nothing: nothing is made from findings."""
        return Exposure()

    def check(self, context: Context) -> None:
        """Raises UserError when there is no such split, and when a model was fitted to what is measured."""
        if self.split == "held_out" and not context.experiment.stages[self.pairs].held_out:
            raise UserError(f"{context.name}: {self.pairs!r} holds nothing out; set {self.pairs}.held_out, or split")
        for name, model in self.models.items():
            if not self.overlap and (seen := self.seen_through(context, model)):
                raise UserError(f"{context.name}: {name!r} was fitted to pairs of {seen[0]!r}, which are measured; "
                                "name other pairs, or their held-out split, or set overlap=True")  # fmt: skip

    def seen_through(self, context: Context, model: str) -> list[str]:
        """Returns the stages through which a model was fitted to the measured pairs.

        Whatever reads a stage of pairs to learn reads its split "train", so the held-out split is not seen through the
        stage itself, nor through what is made from it. What the measured pairs are made from is not they.
        """
        stages, measured = context.experiment.stages, context.exposure(self.pairs).fitted
        sources = ancestors(stages, [self.pairs]) - {self.pairs}
        meeting = [name for name in fitted_stages(context, model) if context.exposure(name).fitted & measured]
        unseen = {name for name in meeting if self.split == "held_out" and self.pairs in ancestors(stages, [name])}
        return [name for name in meeting if name not in sources | unseen]

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the programs of the preference models."""
        judges = {name: ModelJudge(stage) for name, stage in self.models.items()}
        return tuple(program for name, judge in judges.items() for program in judge.programs(context, name, self.sizes))

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Asks one model after another about the pairs, and writes what was found."""
        rows, figures = self.measured_pairs(context)
        ordered = [("first", "second") if row["p"] > 0.5 else ("second", "first") for row in rows]
        prompts = [row["prompt"] for row in rows]
        preferred, others = ([row[sides[i]] for row, sides in zip(rows, ordered, strict=True)] for i in range(2))
        found = {}
        for name, stage in self.models.items():
            judge = ModelJudge(stage).open(context, programs_of(programs, name), self.sizes)
            p = judge(prompts, preferred, others)
            low, high = mean_interval(p, (0, 1))
            found[name] = {**human_agreement(p)._asdict(), "probability_low": low, "probability_high": high}
            del judge
            context.release()  # one model at a time
        longer = [len(a) > len(b) for a, b in zip(preferred, others, strict=True)]
        numbers = {"pairs": self.pairs, **figures, "longer_preferred": float(np.mean(longer)), "models": found}
        write_finding(context, Finding(agreement_section(numbers), {}, numbers))
        return figures

    def measured_pairs(self, context: Context) -> tuple[list[PairRow], dict[str, int]]:
        """Returns the pairs that are measured, and how many there are and were left out.

        Raises UserError when none is left.
        """
        rows = self.read_pairs(context)[: self.count]
        decided = [row for row in rows if row["p"] != 0.5]
        known = known_prompts(context, self.models.values())
        new = [row for row in decided if row["prompt"] not in known]
        left_out = {"undecided": len(rows) - len(decided), "known_prompts": len(decided) - len(new)}
        asked = decided if self.overlap else new
        if not asked:
            raise UserError(f"{context.name}: of {len(rows)} pairs of {self.pairs!r}, {left_out['undecided']} are "
                            f"undecided and {left_out['known_prompts']} have prompts that a model was fitted to; "
                            "name other pairs")  # fmt: skip
        fitting, whole = self.fitting(context, asked), {row["prompt"] for row in asked}
        if context.task.shorten:
            left_out["shortened"] = sum(row["prompt"] not in whole for row in fitting)
        return fitting, {"measured": len(fitting), "too_long": len(asked) - len(fitting), **left_out}

    def read_pairs(self, context: Context) -> list[PairRow]:
        """Returns the pairs of the split, in the order of their file where they have one."""
        stage = context.experiment.stages[self.pairs]
        if isinstance(stage, LoadPairs):
            return stage.splits(context)[self.split]
        return read_stage_pairs(context, self.pairs, self.split)

    def fitting(self, context: Context, rows: list[PairRow]) -> list[PairRow]:
        """Returns the rows that every model can hold. Raises UserError when one can hold none."""
        limits = PairLimits((self.sizes.prompt,), self.sizes.reply)
        for stage in self.models.values():
            try:
                rows = encode_pairs(rows, context.abstract(stage).tokenizer, context.task, limits).rows
            except UserError:
                raise UserError(f"{context.name}: no pair fits prompts of {self.sizes.prompt} and replies of "
                                f"{self.sizes.reply} tokens; raise {context.name}.sizes") from None  # fmt: skip
        return rows


def fitted_stages(context: Context, model: str) -> list[str]:
    """Returns the stages of pairs that a model, or what it is made from, was fitted to."""
    stages, fitted = context.experiment.stages, context.exposure(model).fitted
    pairs = [name for name in sorted(ancestors(stages, [model])) if stages[name].makes is Kind.PAIRS]
    return [name for name in pairs if context.exposure(name).fitted <= fitted]


def known_prompts(context: Context, models: Iterable[str]) -> set[str]:
    """Returns the prompts of all pairs that one of the models was fitted to."""
    stages = {stage for model in models for stage in fitted_stages(context, model)}
    return {row["prompt"] for stage in stages for row in read_stage_pairs(context, stage, "train")}


def agreement_section(numbers: Mapping[str, Any]) -> str:
    """Returns what ``numbers.json`` holds, as Markdown, in the form of Table 5 of 2307.12950."""
    rows = []
    for name, m in numbers["models"].items():
        accuracy, low, high = (f"{100 * m[key]:.1f}" for key in ("accuracy", "low", "high"))
        mean = f"{m['mean_probability']:.3f} [{m['probability_low']:.3f}, {m['probability_high']:.3f}]"
        rows.append([name, f"{accuracy} [{low}, {high}]", mean])
    header = [f"preference model (n={numbers['measured']})", "accuracy, %", "mean probability"]
    note = (
        "Accuracy: the share of the pairs whose preferred reply has a probability above 1/2; in brackets the exact\n"
        "95% interval. Mean probability: of the preferred reply; in brackets Student's 95% interval over the pairs.\n"
        f"Left out: {numbers['too_long']} too long, {numbers['undecided']} undecided. Pairs with a prompt that a model "
        f"was fitted to: {numbers['known_prompts']}.\nThe preferred reply is the longer one, in characters, in "
        f"{100 * numbers['longer_preferred']:.1f}% of the pairs.\n"
    )
    return f"## Agreement with the labels of {numbers['pairs']}\n\n{markdown_table(header, rows)}\n{note}"
