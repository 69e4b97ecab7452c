"""Replies by a task's own writers, for a policy to imitate."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

from alignjax.errors import UserError, check_range
from alignjax.fields import Kind
from alignjax.pipeline.experiment import Context, Exposure, Program
from alignjax.training import data


@dataclasses.dataclass(frozen=True)
class TaskReplies:
    """Writes ``replies`` training prompts with replies by the task's own writers: what ``FineTune`` imitates.

    ``LoadReplies`` reads such replies from a file.
    """

    replies: int
    seed: int = 0
    makes: ClassVar[Kind] = Kind.REPLIES
    meanings: ClassVar[dict[str, str]] = {"replies": "written", "different_prompts": "among the replies"}

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "replies")

    def network(self, context: Context) -> None:
        """Returns None: replies are no network."""

    def exposure(self, context: Context) -> Exposure:
        """Returns nothing: like a corpus, these replies compare nothing."""
        return Exposure()

    def check(self, context: Context) -> None:
        """Raises UserError when the task has no writers."""
        self.written(context, 1)

    def written(self, context: Context, count: int) -> Sequence[tuple[str, str]]:
        """Returns (prompt, reply) rows of the task. Raises UserError when it has no writers."""
        if context.task.written_replies is None:
            raise UserError(f"{context.name}: task {context.task.name!r} has no writers of its own; "
                            "give LoadReplies a file")  # fmt: skip
        return context.task.written_replies(count, context.seed(self.seed))

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns nothing: nothing is compiled."""
        return ()

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Writes the dataset: pairs whose second reply is empty, with p = 1; returns its figures."""
        rows = [{"prompt": x, "first": y, "second": "", "p": 1.0} for x, y in self.written(context, self.replies)]
        figures = {"replies": len(rows), "different_prompts": len({row["prompt"] for row in rows})}
        source = {"seed": context.seed(self.seed), "task": context.task.name}
        data.write_pairs(context.folder / data.PAIR_DATA, {"train": rows}, {**source, **figures})
        return figures
