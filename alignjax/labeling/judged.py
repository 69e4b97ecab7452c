"""A judge labels two replies to one plain prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignjax.errors import UserError, check_range
from alignjax.labeling.method import LabeledPair, Labeler, Labels, RaterSpec, draw_replies
from alignjax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class Judged:
    """Labels two replies to the plain prompt with a judge's probability; ties are left out.

    With an Oracle and error 0 this is the truth that models are held to; with a language model it is RLAIF with both
    orders averaged (2307.12950 section 4).
    """

    judge: Any  # Oracle("oracle"), LanguageModelJudge("rater"), ...
    error: float = 0.0  # the probability that an annotator says the opposite
    attempts: int = 5

    def __post_init__(self) -> None:
        check_range(self, 0, 1, "error")
        check_range(self, 1, 2**20, "attempts")

    def check(self, task: Task) -> None:
        """Raises UserError when the judge is a rater. All else of it is checked by its stage."""
        if isinstance(self.judge, RaterSpec):
            raise UserError(f"{type(self.judge).__name__} is a rater, which answers the task's questions; "
                            "label with RLAIF, or use LanguageModelJudge")  # fmt: skip

    def label(self, labeler: Labeler, prompts: Sequence[str], numbers: Sequence[int]) -> Labels:
        """Labels one pair a prompt."""
        assert labeler.judge is not None  # the stage opens the method's judge
        (first, tries), (second, more_tries) = (
            draw_replies(labeler.generate, labeler.task.clean, prompts, numbers, side, self.attempts)
            for side in range(2)
        )
        rows = [
            (x, y, z, number)
            for x, y, z, number in zip(prompts, first, second, numbers, strict=True)
            if y is not None and z is not None
        ]
        if not rows:
            return Labels([], tries + more_tries)
        probabilities = labeler.judge([row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows])
        labeled = []
        for (x, y, z, number), p in zip(rows, map(float, probabilities), strict=True):
            if p != 0.5:
                wrong = np.random.default_rng((labeler.seed, number)).random() < self.error
                labeled.append(LabeledPair(x, y, z, 1 - p if wrong else p, -1))
        return Labels(labeled, tries + more_tries)
