"""RLCD: the prompt labels the pair (2307.12950)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import numpy as np

from alignjax.errors import UserError, check_range
from alignjax.labeling.method import LabeledPair, Labeler, Labels, draw_replies
from alignjax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class RLCD:
    """Labels the reply under the positive affix as preferred (2307.12950 section 3).

    One affix pair a prompt is drawn uniformly; earlier turns carry the opposite polarity. A side that the filter
    refuses is drawn again, at most ``attempts`` times in all; then the example is dropped. A coin decides which side
    is stored first.
    """

    attempts: int = 5
    judge: ClassVar[None] = None

    def __post_init__(self) -> None:
        check_range(self, 1, 2**20, "attempts")

    def check(self, task: Task) -> None:
        """Raises UserError when the task has no affixes to contrast."""
        if not task.affixes or task.contrast is None:
            raise UserError(f"task {task.name!r} has no affixes to contrast; give it affixes and ``contrast``, "
                            "or use another labelling method")  # fmt: skip

    def label(self, labeler: Labeler, prompts: Sequence[str], numbers: Sequence[int]) -> Labels:
        """Labels one pair a prompt."""
        task, contrast = labeler.task, labeler.task.contrast
        assert contrast is not None  # ``check`` has asked
        generators = [np.random.default_rng((labeler.seed, number)) for number in numbers]
        affixes = [int(rng.integers(len(task.affixes))) for rng in generators]
        pairs = [task.affixes[i] for i in affixes]
        positive = [contrast(x, plus, minus) for x, (plus, minus) in zip(prompts, pairs, strict=True)]
        negative = [contrast(x, minus, plus) for x, (plus, minus) in zip(prompts, pairs, strict=True)]
        (better, tries), (worse, more_tries) = (
            draw_replies(labeler.generate, task.clean, side, numbers, i, self.attempts)
            for i, side in enumerate((positive, negative))
        )
        labeled = []
        for x, y, z, affix, rng in zip(prompts, better, worse, affixes, generators, strict=True):
            if y is not None and z is not None:
                swapped = bool(rng.random() < 0.5)
                first, second = (z, y) if swapped else (y, z)
                labeled.append(LabeledPair(x, first, second, float(not swapped), affix, int(swapped)))
        return Labels(labeled, tries + more_tries)
