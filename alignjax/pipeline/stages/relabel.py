"""Pairs made of other pairs: labelled again by a rater, or mixed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from alignjax.errors import UserError, check_range
from alignjax.fields import Kind, stage_input
from alignjax.labeling.method import LabeledPair
from alignjax.labeling.rated import Rating, check_rater
from alignjax.pipeline.experiment import Context, Exposure, Program
from alignjax.pipeline.raters import JudgeSizes, LanguageModelRater
from alignjax.pipeline.stages.chunks import in_chunks
from alignjax.pipeline.stages.label import oracle_agreement
from alignjax.pipeline.stages.pair_batches import PairRow, read_stage_pairs
from alignjax.training import data


@dataclasses.dataclass(frozen=True)
class Relabel:
    """Labels the replies of a Label stage again, by a rater's answer to the question of each pair's own affix.

    With RLCD's pairs it is RLCD-Rescore (2307.12950 section 4). A pair that the rater calls equal is left out. It
    resumes after its last complete chunk.
    """

    judge: LanguageModelRater
    sizes: JudgeSizes  # what the rater is compiled for
    pairs: str = stage_input(Kind.PAIRS)
    rating: Rating = Rating()
    makes: ClassVar[Kind] = Kind.PAIRS
    meanings: ClassVar[dict[str, str]] = {
        "pairs": "kept",
        "dropped": "pairs that the rater calls equal",
        "oracle_ties": "share of the pairs that the task's oracle calls equal",
        "label_accuracy": "share of the labels that the oracle agrees with, where it does not tie",
    }

    @property
    def held_out(self) -> float:
        """The share of the pairs that is held out: each pair stays in its split."""
        return 0.0

    def network(self, context: Context) -> None:
        """Returns None: pairs are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns the texts, and what the pairs and the rater depend on."""
        pairs, judged = context.exposure(self.pairs), self.judge.exposure(context)
        return Exposure(
            trained_against=pairs.trained_against | judged.identity | judged.trained_against,
            fitted=pairs.fitted,
            measured=pairs.measured | judged.fitted | judged.measured,
        )

    def check(self, context: Context) -> None:
        """Raises UserError when the judge is no rater, or is known to fail."""
        try:
            check_rater(self.judge)
        except UserError as error:
            raise UserError(f"{context.name}.judge: {error}") from None
        self.judge.check(context)

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the program of the rater."""
        return self.judge.programs(context, "judge", self.sizes)

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Labels the training pairs again, chunk by chunk, and writes the dataset."""
        rows, task = read_stage_pairs(context, self.pairs, "train"), context.task
        if not all(0 <= row["affix"] < len(task.questions) for row in rows):
            raise UserError(f"{context.name}: the pairs of {self.pairs!r} do not say which affix made them; "
                            "name a Label stage by RLCD or RLAIF")  # fmt: skip
        rater = self.judge.open(context, programs, self.sizes)

        def rate(numbers: range) -> dict[str, Any]:
            chunk = [rows[i] for i in numbers]
            texts = [(row["prompt"], row["first"], row["second"]) for row in chunk]
            return {"p": self.rating.probabilities(rater, task, texts, [row["affix"] for row in chunk]).tolist()}

        chunks = in_chunks(context, len(rows), 8 * self.sizes.batch, "pair", rate)
        labels = [p for chunk in chunks for p in chunk["p"]]
        kept = [{**row, "p": p} for row, p in zip(rows, labels, strict=True) if p != 0.5]
        return write_made_pairs(context, kept, len(rows) - len(kept))


@dataclasses.dataclass(frozen=True)
class MixPairs:
    """Puts pairs of two stages together, so that a share of them comes from the second: people's, for example.

    All pairs of the first are kept; those of the second are drawn without repetition (2307.12950, appendix).
    """

    first: str = stage_input(Kind.PAIRS)
    second: str = stage_input(Kind.PAIRS)
    share: float = 0.2  # of the result that comes from the second
    seed: int = 0
    makes: ClassVar[Kind] = Kind.PAIRS
    meanings: ClassVar[dict[str, str]] = {
        "pairs": "in all",
        "dropped": "pairs of the second that were not drawn",
        "oracle_ties": Relabel.meanings["oracle_ties"],
        "label_accuracy": Relabel.meanings["label_accuracy"],
    }

    def __post_init__(self) -> None:
        check_range(self, 0, 1 - 1e-6, "share")

    @property
    def held_out(self) -> float:
        """The share of the pairs that is held out: none."""
        return 0.0

    def network(self, context: Context) -> None:
        """Returns None: pairs are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns what both stages depend on."""
        return context.exposure(self.first, self.second)

    def check(self, context: Context) -> None:
        """Does nothing: how many pairs there are is not known before the stages run."""

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns nothing: nothing is computed."""
        return ()

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Writes the dataset. Raises UserError when the second stage has too few pairs."""
        first, second = (read_stage_pairs(context, stage, "train") for stage in (self.first, self.second))
        wanted = round(self.share / (1 - self.share) * len(first))
        if wanted > len(second):
            raise UserError(f"{context.name}: share={self.share:g} needs {wanted} pairs of {self.second!r}, which has "
                            f"{len(second)}; lower the share")  # fmt: skip
        chosen = np.sort(np.random.default_rng(context.seed(self.seed)).permutation(len(second))[:wanted])
        return write_made_pairs(context, [*first, *(second[i] for i in chosen)], len(second) - wanted)


def write_made_pairs(context: Context, rows: Sequence[PairRow], dropped: int) -> dict[str, Any]:
    """Writes the pairs as the stage's dataset; returns its figures. Raises UserError when there is none."""
    if not rows:
        raise UserError(f"{context.name}: no pair is left; look at the stages that it is made from")
    pairs = [LabeledPair(**row) for row in rows]
    figures = {"pairs": len(rows), "dropped": dropped, **oracle_agreement(context.task, pairs)}
    data.write_pairs(context.folder / data.PAIR_DATA, {"train": rows}, {"task": context.task.name, **figures})
    return figures
