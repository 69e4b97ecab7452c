"""What a task is: its words and its judges, as data and functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np


class Template(NamedTuple):
    """How two responses stand in one context: prompt, before, first, between, second, question.

    The pairwise score of (first, second) is the logit of the token ``answer`` after the question.
    """

    before: str
    between: str
    question: str
    answer: str  # one token


class Format(NamedTuple):
    """How a reply stands in text."""

    before: str  # between the prompt and the reply
    end: str  # after it: the end marker
    stop: tuple[str, ...]  # tokens that end a completion (each must be one token)


Affixes = tuple[tuple[str, str], ...]
"""(positive, negative) pairs."""
Contrast = Callable[[str, str, str], str]
"""(prompt, affix of the last turn, affix of earlier turns) -> the prompt to generate from."""
Clean = Callable[[str], str | None]
"""Raw text with its end marker -> the reply, or None when it must be sampled again."""
Score = Callable[[str, str], float]
"""(prompt, reply) -> quality; higher is better."""
Oracle = Callable[[str, str, str], float]
"""(prompt, reply, other) -> P(reply > other), exactly; ties are 1/2."""


class Source(Protocol):
    """Where a task's texts come from: a frozen dataclass, so that an experiment's record says which."""

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Distinct prompts; the splits "train", "validation" and "test" are disjoint."""
        ...

    def corpus(self, count: int, seed: int) -> Sequence[str]:
        """Documents to pretrain on. Raises UserError where the task brings none."""
        ...


@dataclasses.dataclass(frozen=True)
class Task:
    """A task. ``oracles`` are independent of every model; the first one is the task's truth."""

    name: str
    source: Source
    affixes: Affixes
    contrast: Contrast
    clean: Clean
    format: Format
    template: Template
    oracles: dict[str, Oracle]
    score: Score


def oracle_from_score(score: Score) -> Oracle:
    """Prefers the higher score; equal scores tie."""

    def oracle(prompt: str, reply: str, other: str) -> float:
        return 0.5 + 0.5 * float(np.sign(score(prompt, reply) - score(prompt, other)))

    return oracle
