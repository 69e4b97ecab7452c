"""What a task is: its words and its judges, as data and functions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from alignjax.errors import UserError


class Template(NamedTuple):
    """How two responses stand in one context: prompt, before, first, between, second, question.

    The pairwise score of (first, second) is the logit of the token ``answer`` after the question; as a choice, that
    minus the logit of ``other``, which says that the second is better.
    """

    before: str
    between: str
    question: str
    answer: str  # one token
    other: str = ""  # one token, where a choice is asked


class Format(NamedTuple):
    """How a reply stands in text."""

    before: str  # between the prompt and the reply
    end: str  # after it: the end marker
    stop: tuple[str, ...]  # what ends a completion: EOS, or pieces of text


EOS = "<eos>"
"""Among a format's ``stop``: the tokens that end a text by the tokenizer's own convention."""


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


def one_message(prompt: str) -> list[dict[str, str]]:
    """The prompt as a user's only message."""
    return [{"role": "user", "content": prompt}]


def dialogue_messages(prompt: str) -> list[dict[str, str]]:
    """A dialogue "Human: ... Assistant: ..." that ends in an open turn, as messages. An affix of the open turn's role
    marker, as RLCD writes it, stands behind the last question; those of earlier turns are left out. What is before the
    first turn is the system's message."""
    preamble, *turns = re.split(r"(?:^|\n\n)(Human|Assistant)([^:\n]*):", prompt)
    messages = [{"role": "system", "content": preamble.strip()}] if preamble.strip() else []
    messages += [
        {"role": "user" if role == "Human" else "assistant", "content": text.strip()}
        for role, text in zip(turns[0::3], turns[2::3], strict=True)
    ]
    if len(messages) < 2 or messages[-1]["content"] or messages[-1]["role"] != "assistant":
        raise UserError(f"the prompt {prompt[-40:]!r} is no dialogue that ends in 'Assistant:'; cut it there")
    affix = turns[-2].strip()
    messages = messages[:-1]
    if affix:
        messages[-1] = {**messages[-1], "content": f"{messages[-1]['content']} {affix}"}
    return messages


@dataclasses.dataclass(frozen=True)
class Task:
    """A task. ``oracles`` are independent of every model; the first one is the task's truth. Where nobody knows it,
    there are none and no score: labels are then not counted right or wrong, and held-out models alone judge."""

    name: str
    source: Source
    affixes: Affixes
    contrast: Contrast
    clean: Clean
    format: Format
    template: Template
    oracles: dict[str, Oracle]
    score: Score | None
    messages: Callable[[str], Sequence[dict[str, str]]] = one_message  # a prompt as a chat model is asked it

    def __post_init__(self) -> None:
        stop = self.format.stop
        if not stop or isinstance(stop, str) or not all(stop):
            raise UserError(f"task {self.name!r} has format.stop={stop!r}; give a tuple of what ends a reply")
        if self.template and not self.template.answer:
            raise UserError(f"task {self.name!r} has no template.answer; give a piece of text that is one token")


def oracle_from_score(score: Score) -> Oracle:
    """Prefers the higher score; equal scores tie."""

    def oracle(prompt: str, reply: str, other: str) -> float:
        return 0.5 + 0.5 * float(np.sign(score(prompt, reply) - score(prompt, other)))

    return oracle
