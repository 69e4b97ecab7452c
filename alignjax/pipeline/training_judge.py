"""A judge that a policy was trained against, in a table that says so: how far the policy has hacked it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from alignjax.errors import UserError
from alignjax.pipeline.experiment import Context, Exposure, Program
from alignjax.pipeline.judges import JudgeSpec, check_held_out
from alignjax.pipeline.raters import JudgeSizes
from alignjax.types import Judge

_MARK = "-NOT-held-out"  # ends the judge's name wherever it is written


@dataclasses.dataclass(frozen=True)
class TrainingJudge:
    """A judge that is not held out, such as ``TrainingJudge(ModelJudge("preference"))``.

    Its win rate beside a held-out judge's shows how much of what a policy gained in training is real. Its name and its
    description say that it is not held out in every table and file. It is refused where it is held out after all.
    """

    judge: JudgeSpec

    def __post_init__(self) -> None:
        if isinstance(self.judge, TrainingJudge):
            raise UserError("TrainingJudge holds a TrainingJudge; give it the judge itself")

    def check(self, context: Context) -> None:
        """Raises UserError where the judge would."""
        self.judge.check(context)

    def exposure(self, context: Context) -> Exposure:
        """Returns the judge's exposure."""
        return self.judge.exposure(context)

    def programs(self, context: Context, name: str, sizes: JudgeSizes) -> tuple[Program, ...]:
        """Returns the judge's programs."""
        return self.judge.programs(context, name, sizes)

    def open(self, context: Context, programs: tuple[Program, ...], sizes: JudgeSizes) -> Judge:
        """Returns the judge, over those programs."""
        return self.judge.open(context, programs, sizes)

    def describe(self) -> str:
        """Returns who judges, and that it is not held out."""
        return f"NOT held out: a policy of this table was trained against {self.judge.describe()} or depends on it"


def check_judge(context: Context, name: str, judge: JudgeSpec, policies: Iterable[str]) -> None:
    """Raises UserError when the judge is not held out and does not say so, or says so and is held out."""
    judge.check(context)
    if not isinstance(judge, TrainingJudge):
        check_held_out(context, name, judge, policies)
        return
    for policy in policies:
        try:
            check_held_out(context, name, judge, [policy])
        except UserError:
            return
    raise UserError(f"{context.name}: judge {name!r} is a TrainingJudge, and no policy depends on it; "
                    "name it without TrainingJudge")  # fmt: skip


def judge_label(name: str, judge: Any) -> str:
    """Returns the judge's name in tables and files; it says when the judge is not held out."""
    return f"{name}{_MARK}" if isinstance(judge, TrainingJudge) else name
