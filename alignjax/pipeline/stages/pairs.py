"""Comparisons that people or another program made, as pairs."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from alignjax.errors import POSITIVE, UserError, check_range
from alignjax.pipeline import config
from alignjax.pipeline.experiment import PAIRS, Context
from alignjax.pipeline.stages.label import PAIR_DATA
from alignjax.tasks import json_lines as files
from alignjax.training import data


@dataclasses.dataclass(frozen=True)
class GivenPairs:
    """A JSON-lines file of comparisons -> the TFDS dataset of pairs that a Label stage writes. The whole file is read
    before anything runs. ``read`` says what a line is: {"prompt", "first", "second", "p"}, or another form's."""

    makes: ClassVar = PAIRS
    path: str
    read: files.Compare = files.compared
    held_out: float = 0.0  # share of the prompts whose pairs go to the split "held_out", the last ones of the file
    content: str = dataclasses.field(init=False)  # a mark of the file, so that another one is noticed

    def __post_init__(self) -> None:
        check_range(self, 0, 1 - POSITIVE, "held_out")
        object.__setattr__(self, "content", files.content(self.path))

    def inputs(self) -> tuple[str, ...]:
        return ()

    def check(self, context: Context) -> None:
        self.rows(context)

    def rows(self, context: Context) -> list[files.Compared | None]:
        """A comparison a line. Raises UserError on one of another form, and where there is none."""
        try:
            found = files.read_rows(self.path, "comparisons", self.read)
        except UserError as error:
            raise UserError(f"{context.name}: {error}") from None
        if not any(found):
            raise UserError(f"{context.name}: no line of {self.path} compares two replies to one prompt; give another")
        return found

    def run(self, context: Context) -> dict[str, Any]:
        found = self.rows(context)
        rows = [dict(zip(data.PAIR_FEATURES, pair, strict=True)) for pair in found if pair]
        prompts = list(dict.fromkeys(row["prompt"] for row in rows))
        last = set(prompts[len(prompts) - int(self.held_out * len(prompts)) :])  # a prompt stands on one side alone
        splits = {"train": [row for row in rows if row["prompt"] not in last]}
        if last:
            splits["held_out"] = [row for row in rows if row["prompt"] in last]
        figures = {"pairs": len(rows), "skipped": len(found) - len(rows), "different_prompts": len(prompts)}
        source = {"file": self.path, "content": self.content, "read": config.describe(self.read)}
        data.write_pairs(context.folder / PAIR_DATA, splits, {**source, "task": context.task.name, **figures})
        return figures
