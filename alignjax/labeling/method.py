"""What a labelling method is: prompts -> preference pairs as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from alignjax.sampling.generate import Generate
from alignjax.tasks.task import Clean, Task


class LabeledPair(NamedTuple):
    """A pair as text, and what made it."""

    prompt: str  # the plain prompt, without affixes
    first: str
    second: str
    p: float  # P(first is preferred)
    affix: int  # number of the affix pair and of its question; -1 without one
    positive: int = -1  # which reply was written under the positive affix, the other under the negative one: 0 or 1


class Labels(NamedTuple):
    """What a method returns; prompts without a pair are left out."""

    pairs: list[LabeledPair]
    tries: int  # replies that were drawn


class Labeler(NamedTuple):
    """What a method works with."""

    generate: Generate
    task: Task
    judge: Any  # the method's own, opened: a Judge or a Rater; None where it has none
    seed: int


@runtime_checkable
class RaterSpec(Protocol):
    """A rater as data, which a stage opens: it answers the task's questions, and a judge as data asks none."""

    is_rater: bool  # true


class LabelingMethod(Protocol):
    """A frozen dataclass."""

    judge: Any  # a judge as data (``alignjax.pipeline.judges``), or None: the method needs none

    def check(self, task: Task) -> None:
        """Raises UserError when the task does not have what the method needs."""
        ...

    def label(self, labeler: Labeler, prompts: Sequence[str], numbers: Sequence[int]) -> Labels:
        """Labels pairs of replies to the prompts; ``numbers`` are their example numbers."""
        ...


def draw_replies(
    generate: Generate, clean: Clean, prompts: Sequence[str], numbers: Sequence[int], side: int, attempts: int
) -> tuple[list[str | None], int]:
    """Returns a clean reply to each prompt and how many were drawn.

    A reply that the filter refuses is drawn again, at most ``attempts`` times in all; then it is None. A
    prompt that is too long gets None too. ``side`` (0 or 1) separates the randomness of the two replies to one prompt.
    """
    replies: list[str | None] = [None] * len(prompts)
    waiting, tries = list(range(len(prompts))), 0
    for attempt in range(attempts):
        drawn = generate([prompts[i] for i in waiting], [numbers[i] for i in waiting], side * attempts + attempt)
        answered = [(i, reply) for i, reply in zip(waiting, drawn, strict=True) if reply]
        tries += len(answered)
        for i, reply in answered:
            replies[i] = clean(reply.text)
        waiting = [i for i, _ in answered if replies[i] is None]
        if not waiting:
            break
    return replies, tries
