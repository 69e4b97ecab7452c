"""What a task is: its prompts, its words and its judges, as data and functions."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from alignjax.errors import UserError

EOS = "<eos>"
"""In a format's ``stop``: the tokens that end a text by the tokenizer's own convention."""
SPLITS = ("train", "validation", "test")
"""The splits of a task's prompts."""
T = TypeVar("T")
Affixes = tuple[tuple[str, str], ...]
"""(positive, negative) pairs of texts that contrast two prompts (2307.12950)."""
Fits = Callable[[str], bool]
"""Whether a model has room for a prompt."""


class Template(NamedTuple):
    """How two responses stand in one context: preamble, prompt, before, first, between, second, question.

    The pairwise score of (first, second) is the logit of the token ``answer`` after the question. The choice score is
    that logit minus the logit of ``other``, which says that the second is better.
    """

    before: str
    between: str
    question: str
    answer: str  # one token
    other: str = ""  # one token; needed for the choice score alone
    preamble: str = ""  # what a rater reads before the prompt; a preference model reads the prompt first


class Format(NamedTuple):
    """How a reply stands in text."""

    before: str  # between the prompt and the reply
    end: str  # behind the reply
    stop: tuple[str, ...]  # what ends a completion: EOS, or pieces of text


class RatedExample(NamedTuple):
    """Two replies to one prompt, and which is better: what ``few_shot`` shows a rater."""

    prompt: str
    first: str
    second: str
    first_is_better: bool


class Contrast(Protocol):
    """Puts an affix into a prompt."""

    def __call__(self, prompt: str, last: str, earlier: str, /) -> str:
        """Returns the prompt to generate from: ``last`` is the affix of its last turn, ``earlier`` of turns before."""
        ...


class Clean(Protocol):
    """Cuts a reply out of what a model wrote."""

    def __call__(self, raw: str, /) -> str | None:
        """Returns the reply in a raw text with its end marker, or None when the reply must be sampled again."""
        ...


class Score(Protocol):
    """A quality of replies."""

    def __call__(self, prompt: str, reply: str, /) -> float:
        """Returns the quality of a reply; higher is better."""
        ...


class ExactPreference(Protocol):
    """An exact preference that depends on no model."""

    def __call__(self, prompt: str, reply: str, other: str, /) -> float:
        """Returns P(reply > other | prompt), a tie counting 1/2."""
        ...


class Source(Protocol):
    """Where a task's prompts come from: a frozen dataclass, so that an experiment's record describes it."""

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Returns up to ``count`` distinct prompts of one of ``SPLITS``, which are disjoint, shuffled by the seed."""
        ...


class Shorten(Protocol):
    """Makes a prompt that is too long shorter."""

    def __call__(self, source: Any, prompt: str, fits: Fits, /) -> str | None:
        """Returns the longest shorter form of a prompt of the source that fits; None where there is none."""
        ...


class RepliesOfSource(Protocol):
    """Replies by a task's own writers."""

    def __call__(self, source: Any, count: int, seed: int, /) -> Sequence[tuple[str, str]]:
        """Returns up to ``count`` training prompts of the source with a reply to each."""
        ...


class Messages(Protocol):
    """Turns a prompt into what a chat model is asked."""

    def __call__(self, prompt: str, /) -> Sequence[dict[str, str]]:
        """Returns messages {"role": ..., "content": ...}."""
        ...


def keep_reply(raw: str) -> str | None:
    """Returns the stripped text, or None when it is empty."""
    return raw.strip() or None


def one_message(prompt: str) -> list[dict[str, str]]:
    """Returns the prompt as a user's only message."""
    return [{"role": "user", "content": prompt}]


@dataclasses.dataclass(frozen=True)
class Task:
    """A task: a name, where prompts come from, how a reply stands in text; all else is what the task happens to have.

    ``oracles`` depend on no model; the first one is the task's truth. Without oracles, labels are not counted right or
    wrong and held-out models alone judge. Without ``score``, tables have no score.

    ``template`` is how a preference model reads two replies, each with the format's end marker. ``questions`` and
    ``evaluation_questions`` are how a rater is asked (``rater_text``), who reads no end marker. Question i belongs to
    affix pair i: RLCD-Rescore asks the question of the pair that made the replies (2307.12950).

    Raises UserError when ``format.stop`` is empty, when ``template.answer`` is empty, when the template has a preamble,
    when a question lacks an answer, when there are questions but not one for each affix pair, and when there are
    affixes but no function to apply them.
    """

    name: str
    source: Source
    format: Format
    clean: Clean = keep_reply
    affixes: Affixes = ()
    contrast: Contrast | None = None  # applies an affix
    template: Template | None = None  # how a language model is asked which of two replies is better
    oracles: dict[str, ExactPreference] = dataclasses.field(default_factory=dict)
    score: Score | None = None
    messages: Messages = one_message
    corpus_of_source: Callable[[Any, int, int], Sequence[str]] | None = None  # (source, count, seed) -> documents
    replies_of_source: RepliesOfSource | None = None  # the task's own writers, to imitate
    questions: tuple[Template, ...] = ()  # how a rater is asked for the quality of each affix pair
    evaluation_questions: dict[str, Template] = dataclasses.field(default_factory=dict)  # quality -> how a rater judges
    shorten: Shorten | None = None  # what is asked where a prompt is too long; None: such a prompt is left out
    material_digest: str = ""  # of the file that words above were read from; "" where all are the task's own

    def __post_init__(self) -> None:
        stop = self.format.stop
        if not stop or isinstance(stop, str) or not all(stop):
            raise UserError(f"task {self.name!r} has format.stop={stop!r}; give a tuple of what ends a reply")
        if self.template and not self.template.answer:
            raise UserError(f"task {self.name!r} has no template.answer; give a piece of text that is one token")
        if self.template and self.template.preamble:
            raise UserError(f"task {self.name!r} has a template.preamble, and a preference model reads the prompt "
                            "first; leave it out, or put the template into ``questions``")  # fmt: skip
        if self.affixes and self.contrast is None:
            raise UserError(f"task {self.name!r} has affixes and no contrast; give the function that applies an affix")
        self._check_questions()

    def fit(self, prompt: str, fits: Fits) -> str:
        """Returns a prompt that fits, or the task's shorter form of one that does not; itself where there is none."""
        if self.shorten is None or fits(prompt):
            return prompt
        return self.shorten(self.source, prompt, fits) or prompt

    def _check_questions(self) -> None:
        """Raises UserError when there is not one question for each affix pair, or a question lacks an answer."""
        if self.questions and len(self.questions) != len(self.affixes):
            raise UserError(f"task {self.name!r} has {len(self.questions)} questions and {len(self.affixes)} affix "
                            "pairs; give one question for each pair, in their order, or none")  # fmt: skip
        named = {f"questions.{i}": question for i, question in enumerate(self.questions)}
        named |= {f"evaluation_questions.{name}": question for name, question in self.evaluation_questions.items()}
        for name, question in named.items():
            if not question.answer or not question.other or question.answer == question.other:
                raise UserError(f"task {self.name!r}: {name} needs two answers; give ``answer`` and another ``other``")

    @property
    def corpus(self) -> Callable[[int, int], Sequence[str]] | None:
        """(count, seed) -> up to ``count`` documents to pretrain on; None when the task has no corpus.

        It follows ``source``: a task whose source was replaced has the corpus of the new one.
        """
        return None if self.corpus_of_source is None else functools.partial(self.corpus_of_source, self.source)

    @property
    def written_replies(self) -> Callable[[int, int], Sequence[tuple[str, str]]] | None:
        """(count, seed) -> up to ``count`` (prompt, reply) by the task's own writers, to imitate; None without writers.

        Like ``corpus`` it follows ``source``.
        """
        return None if self.replies_of_source is None else functools.partial(self.replies_of_source, self.source)


def oracle_from_score(score: Score) -> ExactPreference:
    """Returns the oracle that prefers the reply with the higher score; equal scores are a tie."""

    def oracle(prompt: str, reply: str, other: str) -> float:
        """Returns 1, 1/2 or 0 by the sign of the difference of scores."""
        return 0.5 + 0.5 * float(np.sign(score(prompt, reply) - score(prompt, other)))

    return oracle


def shuffled(texts: Sequence[T], count: int, seed: int) -> list[T]:
    """Returns ``count`` of the texts, or all when there are fewer, in an order drawn by the seed."""
    return [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))[:count]]


def is_in_split(text: str, split: str) -> bool:
    """Whether a text belongs to a split: by its hash, 80% are in train, 10% in validation, 10% in test."""
    tenth = int(hashlib.sha256(text.encode()).hexdigest(), 16) % 10
    return split == {0: "test", 1: "validation"}.get(tenth, "train")


def reply_text(reply_format: Format, reply: str) -> str:
    """Returns a reply as it stands after its prompt, its end marker included."""
    return f"{reply_format.before}{reply}{reply_format.end}"


def rater_text(question: Template, reply_format: Format, prompt: str, first: str, second: str) -> str:
    """Returns what a rater reads of two replies; its next token is ``question.answer`` or ``question.other``.

    That is preamble, prompt, before, first, between, second, question. Before each reply stands ``format.before``. The
    end marker is left out: it is for the model that writes, and raters of 2307.12950 see none.
    """
    first, second = (f"{reply_format.before}{reply}" for reply in (first, second))
    return "".join((question.preamble, prompt, question.before, first, question.between, second, question.question))


def few_shot(question: Template, reply_format: Format, examples: Sequence[RatedExample]) -> Template:
    """Returns the question behind answered examples of it: a preamble that a base model continues.

    Each example stands as its ``rater_text``, the right answer and a blank line; the question's own preamble begins
    each and the question itself. Raises UserError when there is no example, and when both answers are the same.
    """
    if not examples or question.answer == question.other:
        raise UserError("few_shot needs an example and a question with two answers; give both")
    shown = (
        rater_text(question, reply_format, prompt, first, second) + (question.answer if is_first else question.other)
        for prompt, first, second, is_first in examples
    )
    return question._replace(preamble="".join(f"{text}\n\n" for text in shown) + question.preamble)


def as_question(template: Template, reply_format: Format) -> Template:
    """Returns the question whose ``rater_text`` is what a preference model reads: with the end markers in it."""
    end = reply_format.end
    return template._replace(between=f"{end}{template.between}", question=f"{end}{template.question}")
