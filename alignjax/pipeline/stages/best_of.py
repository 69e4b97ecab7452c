"""How often a preference model finds the best of several replies."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import numpy as np

from alignjax.errors import UserError
from alignjax.fields import Kind
from alignjax.pipeline.experiment import Context, Exposure, Program
from alignjax.pipeline.judges import JudgeSpec
from alignjax.pipeline.raters import JudgeSizes
from alignjax.preferences.best_of import BestOf, ReadBestOf, best_of_accuracy, read_best_of
from alignjax.tasks.json_lines import file_digest, read_rows


@dataclasses.dataclass(frozen=True)
class MeasureBestOf:
    """Measures a judge on a file of prompts with right and wrong replies, by a round robin (RewardBench 2).

    ``read`` says what a row is; the default reads RewardBench 2's. Where the judge knows the task's prompts in another
    form, as dialogues, give a ``read`` that puts them into it.
    """

    path: str  # JSON lines or parquet
    judge: JudgeSpec
    sizes: JudgeSizes
    read: ReadBestOf = read_best_of
    digest: str = dataclasses.field(init=False)  # of the file's content
    makes: ClassVar[Kind] = Kind.FINDINGS
    meanings: ClassVar[dict[str, str]] = {
        "prompts": "of the file; those of the subset Ties are not judged",
        "accuracy": "mean over the subsets",
    }

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", file_digest(self.path))

    def network(self, context: Context) -> None:
        """Returns None: findings are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns nothing: nothing is made from what is found."""
        return Exposure()

    def check(self, context: Context) -> None:
        """Raises UserError when the judge is not there, the file cannot be read, or a row is malformed."""
        self.judge.check(context)
        self.rows(context)

    def rows(self, context: Context) -> list[BestOf]:
        """Returns the rows of the file. Raises UserError on a malformed one, and where none can be judged."""
        try:
            rows = read_rows(self.path, "prompts with replies", self.read)
        except UserError as error:
            raise UserError(f"{context.name}: {error}") from None
        if not any(row.is_judged for row in rows):
            raise UserError(f"{context.name}: {self.path} holds the subset Ties alone, which is not judged")
        return rows

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the programs of the judge."""
        return self.judge.programs(context, "judge", self.sizes)

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Has the replies judged; returns the accuracy of each subset and their mean."""
        rows = self.rows(context)
        accuracy = best_of_accuracy(self.judge.open(context, programs, self.sizes), rows)
        return {"prompts": len(rows), "accuracy": float(np.mean(list(accuracy.values()))), "subset": accuracy}
