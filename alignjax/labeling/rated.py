"""A rater labels pairs by the task's questions: RLAIF, and RLCD's replies labelled again (2307.12950 section 4)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from alignjax.errors import UserError, check_range
from alignjax.labeling.method import LabeledPair, Labeler, Labels, RaterSpec, draw_replies
from alignjax.preferences.raters import Rater, in_both_orders, preference_probability
from alignjax.tasks.task import Task, Template


@dataclasses.dataclass(frozen=True)
class Rating:
    """How a rater's answers become a label; the defaults are those of 2307.12950."""

    both_orders: bool = False  # average the log-odds of both orders; one order alone has a bias to a position
    every_question: bool = False  # average over all of the task's questions; else one is asked
    hard: bool = False  # the likelier side has p = 1; else p is the rater's probability

    def probabilities(
        self, rater: Rater, task: Task, pairs: Sequence[tuple[str, str, str]], asked: Sequence[int]
    ) -> np.ndarray:
        """Returns P(first is better) of (prompt, first, second), [N]; ``asked`` are the numbers of the questions."""
        ask, (prompts, first, second) = in_both_orders(rater) if self.both_orders else rater, zip(*pairs, strict=True)
        rounds: list[list[Template]] = [[task.questions[number] for number in asked]]
        if self.every_question:
            rounds = [[question] * len(pairs) for question in dict.fromkeys(task.questions)]
        p = np.mean([preference_probability(ask(prompts, first, second, questions)) for questions in rounds], axis=0)
        return 0.5 + 0.5 * np.sign(p - 0.5) if self.hard else p


@dataclasses.dataclass(frozen=True)
class RLAIF:
    """Labels two replies to one prompt by a rater's answer to a question, drawn for each prompt; ties are left out.

    With ``positive`` both replies are written under the positive affix of the pair that the question belongs to.
    """

    judge: Any  # LanguageModelRater("base")
    rating: Rating = Rating()
    positive: bool = False
    attempts: int = 5

    def __post_init__(self) -> None:
        check_range(self, 1, 2**20, "attempts")

    def check(self, task: Task) -> None:
        """Raises UserError when the task has no questions, or the judge is no rater."""
        check_questions(task)
        check_rater(self.judge)

    def label(self, labeler: Labeler, prompts: Sequence[str], numbers: Sequence[int]) -> Labels:
        """Labels one pair a prompt."""
        task, rater, contrast = labeler.task, labeler.judge, labeler.task.contrast
        asked = [int(np.random.default_rng((labeler.seed, n)).integers(len(task.questions))) for n in numbers]
        read = list(prompts)
        if self.positive:
            assert contrast is not None  # a task with affixes has one
            read = [contrast(x, *task.affixes[i]) for x, i in zip(prompts, asked, strict=True)]
        (first, tries), (second, more_tries) = (
            draw_replies(labeler.generate, task.clean, read, numbers, side, self.attempts) for side in range(2)
        )
        rows = [
            (x, y, z, number)
            for x, y, z, number in zip(prompts, first, second, asked, strict=True)
            if y is not None and z is not None
        ]
        if not rows:
            return Labels([], tries + more_tries)
        assert rater is not None  # the stage opens the method's judge
        p = self.rating.probabilities(rater, task, [row[:3] for row in rows], [row[3] for row in rows])
        pairs = [LabeledPair(x, y, z, float(q), i) for (x, y, z, i), q in zip(rows, p, strict=True) if q != 0.5]
        return Labels(pairs, tries + more_tries)


def check_questions(task: Task) -> None:
    """Raises UserError when the task has no questions for a rater."""
    if not task.questions:
        raise UserError(f"task {task.name!r} has no questions to ask a rater; give it one for each affix pair")


def check_rater(judge: Any) -> None:
    """Raises UserError when a judge as data is no rater as data."""
    if not isinstance(judge, RaterSpec):
        raise UserError(f"{type(judge).__name__} is no rater, which answers the task's questions; "
                        "use LanguageModelRater, or label with Judged")  # fmt: skip
