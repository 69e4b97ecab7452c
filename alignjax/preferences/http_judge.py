"""A judge that asks a chat model over HTTP which of two replies is better, in both orders."""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from alignjax.errors import UserError
from alignjax.preferences.http_answers import Answer, Body, request_digest

Ask = Callable[[Sequence[Body]], list[Answer]]
"""Requests -> the answer to each."""
Parse = Callable[[str], float | None]
"""The text of an answer -> 1, 0 or 1/2: the reply shown first wins, loses or ties; None where it does not say."""

PLACES = ("prompt", "first", "second")
"""What a question's text has places for, as in ``{prompt}``."""
FIGURES = {
    "questions": "answers of the judge that were read; two a pair where both orders are asked",
    "unparsed": "answers that did not say which reply is better; each counts 1/2",
    "order_disagreement": "share of the pairs on which the answers in the two orders contradict each other",
    "first_shown": "mean probability of the reply shown first; 1/2 without position bias",
    "prompt_tokens": "tokens that the endpoint read, every distinct question counted once, also where it was kept",
    "completion_tokens": "tokens that the endpoint wrote, counted likewise",
    "cost": "of these tokens, in the unit of the prices",
    "requests": "requests that were sent when the answers were last read, retries among them",
    "retries": "requests that were sent again",
    "cache_hits": "distinct questions whose answers were found on disk",
}
"""The figures of such a judge, and what they mean."""


class Question(NamedTuple):
    """What the model is asked."""

    system: str  # the system message; none is sent where it is empty
    text: str  # the user's message, with the places {prompt}, {first} and {second}


class Prices(NamedTuple):
    """What a million tokens cost."""

    prompt: float
    completion: float


def choice_question(question: str) -> Question:
    """Returns a Question that shows a prompt and two replies, (A) and (B), puts ``question``, and asks for a letter."""
    system = "You compare two replies of an assistant and judge them by the question that is put about them."
    text = (
        "A text or conversation begins like this:\n\n{prompt}\n\nTwo replies could follow.\n\n"
        "Reply (A):\n{first}\n\nReply (B):\n{second}\n\n"
    )
    return Question(system, f"{text}{question} Write only (A) or (B).")


def check_question(question: Question) -> None:
    """Raises UserError when this is no Question, or its text lacks a place."""
    if not isinstance(question, Question):
        raise UserError(f"the question is a {type(question).__name__}; make it with choice_question(...)")
    if missing := [place for place in PLACES if f"{{{place}}}" not in question.text]:
        raise UserError(f"the question has no place {{{missing[0]}}}; put it where that text belongs")


def messages(question: Question, prompt: str, first: str, second: str) -> list[dict[str, str]]:
    """Returns the question about two replies as chat messages. Texts that hold a place themselves stay as they are."""
    texts = dict(zip(PLACES, (prompt, first, second), strict=True))
    content = re.sub(rf"\{{({'|'.join(PLACES)})\}}", lambda match: texts[match[1]], question.text)
    system = [{"role": "system", "content": question.system}] if question.system else []
    return [*system, {"role": "user", "content": content}]


_MARKS = r"[\"'*_`]*"  # quotes and Markdown around a letter
_NOUN = r"(?i:response|option|reply|answer|assistant)"
_VERDICT = r"(?i:answer|choice|verdict|preference|winner|prefer|choose)(?: is| would be| goes to)?:?"
_GOES_ON = r"(?:is|as|for|because|since)\b"  # behind a letter; behind the article "A" another word stands
_BETTER = r"(?:better|best|more|preferred|preferable|superior)"
_FORMS = (
    # "(A)", "[A]", "[[A]]"; "[[C]]" is a tie
    r"[(\[]{1,2}([AB])[)\]]{1,2}|\[\[(C)\]\]",
    # at the beginning: "A", "A.", "A: ...", "A - ...", "A is ..."
    rf"\A\s*{_MARKS}([AB])(?={_MARKS}[ \t]*(?:\Z|[\n.:,;)]|[-\u2013\u2014]+\s|{_GOES_ON}))",
    # at the beginning: "Tie", "It is a tie"
    r"\A\W*(?i:(?:it(?:'s| is) )?(?:a )?(tie)\b)",
    # "The answer is A", "Verdict: response B", "I prefer A because ..."
    rf"\b{_VERDICT}\s*{_MARKS}(?:{_NOUN} )?{_MARKS}([AB])(?!\w|\s+(?!{_GOES_ON})[a-z])",
    # "Response A is much better", "option B wins"
    rf"\b{_NOUN} ([AB]) (?:(?:is|was|seems) (?:\w+ )?{_BETTER}|wins)\b",
    # alone in the last line
    r"\n\W*([AB])\W*\Z",
)


def parse_choice(text: str) -> float | None:
    """Returns what an answer says: the first "(A)" or "(B)" counts, else a bare letter or a common form of words.

    What a reasoning model thinks aloud, up to ``</think>``, is left out.
    """
    text = re.sub(r"(?s)\A.*</think>", "", text)
    for form in _FORMS:
        if match := re.search(form, text):
            letter = next(group for group in match.groups() if group)
            return {"A": 1.0, "B": 0.0}.get(letter, 0.5)
    return None


def parse_however(text: str) -> float | None:
    """Returns what an answer says by the rule of the code released with 2307.12950, for models that weigh both sides.

    The answer begins with "(A)" or "Response (A)"; or, from its first "However" on, names one of (A) and (B), where
    "than (A)" and "than (B)" do not count.
    """
    for letter, value in (("(A)", 1.0), ("(B)", 0.0)):
        if text.startswith((letter, f"Response {letter}")):
            return value
    _, however, tail = text.partition("However")
    named = {match for match in re.findall(r"\([AB]\)", re.sub(r"than \([AB]\)", "", tail)) if however}
    return {"(A)": 1.0, "(B)": 0.0}[named.pop()] if len(named) == 1 else None


def parse_answer(parse: Parse, answer: Answer) -> float | None:
    """Returns what ``parse`` makes of the answer's text."""
    return parse(answer.text)


def choice_probability(answer: Answer) -> float | None:
    """Returns the softmax of the log-probs of A and B where the model wrote one of them first: P(A) / (P(A) + P(B)).

    Tokens count as the letter that they are without white space, brackets and quotes. A letter that is not among the
    likeliest tokens counts as impossible. Returns None when the model wrote neither, or there are no log-probs.
    """
    for token, pairs in answer.tokens:
        if _letter(token) in ("A", "B"):
            a, b = (np.logaddexp.reduce([-math.inf, *(p for t, p in pairs if _letter(t) == x)]) for x in "AB")
            return float(np.exp(-np.logaddexp(0.0, b - a))) if np.isfinite(max(a, b)) else None
    return None


def _letter(token: str) -> str:
    return token.strip(" \t\n()[]\"'*`.:")


@dataclasses.dataclass(frozen=True)
class Form:
    """How pairs become requests, and answers become probabilities."""

    question: Question
    settings: Mapping[str, Any]  # the request's entries beside the messages: model, temperature, ...
    read: Callable[[Answer], float | None]  # -> P(the reply shown first is better)
    both_orders: bool

    def body(self, prompt: str, first: str, second: str) -> Body:
        """Returns the request about two replies, shown in this order."""
        return {**self.settings, "messages": messages(self.question, prompt, first, second)}


@dataclasses.dataclass(frozen=True)
class QuestionJudge:
    """A Judge that asks a chat model, and counts.

    P(y > y') is the mean of what the model says of (y, y') and of one minus what it says of (y', y), so that
    P + P' = 1 exactly; without ``both_orders`` it is what the model says of (y, y'). An answer that cannot be read
    counts 1/2. Without being asked about, an empty reply, which stands for one that the task's filter refused, loses to
    any other, and equal replies tie.
    """

    ask: Ask
    form: Form
    prices: Prices | None
    counts: dict[str, float] = dataclasses.field(default_factory=dict)  # since they were taken
    counted: set[str] = dataclasses.field(default_factory=set)  # digests of requests whose tokens have been counted

    def __call__(self, prompts: Sequence[str], replies: Sequence[str], others: Sequence[str]) -> np.ndarray:
        """Returns P(reply > other), [N]."""
        first, second = (np.array([float(bool(text)) for text in side]) for side in (replies, others))
        result = 0.5 + 0.5 * (first - second)
        rows = [i for i, (y, z) in enumerate(zip(replies, others, strict=True)) if y and z and y != z]
        bodies = [self.form.body(prompts[i], replies[i], others[i]) for i in rows]
        if self.form.both_orders:
            bodies += [self.form.body(prompts[i], others[i], replies[i]) for i in rows]
        answers = self.ask(bodies) if bodies else []
        said = np.array([self.form.read(answer) for answer in answers], float)  # None becomes NaN
        self.count(bodies, answers, said)
        result[rows] = self.combine(said)
        return result

    def combine(self, said: np.ndarray) -> np.ndarray:
        """Returns P(y > y') from what is said of (y, y') and then, with both orders, of (y', y); NaN counts 1/2."""
        known = np.where(np.isnan(said), 0.5, said)
        if not self.form.both_orders:
            return known
        margin = np.subtract(*np.split(known, 2))
        larger = 0.5 + 0.5 * np.abs(margin)
        return np.where(margin >= 0, larger, 1 - larger)

    def count(self, bodies: Sequence[Body], answers: Sequence[Answer], said: np.ndarray) -> None:
        """Adds the answers to the counts."""
        parsed = said[~np.isnan(said)]
        self.add(questions=len(said), unparsed=len(said) - len(parsed), sum_first_shown=float(parsed.sum()))
        if self.form.both_orders:
            there, back = np.split(said - 0.5, 2)  # of one sign where the same place won in both orders
            self.add(compared=int(np.sum(~np.isnan(there * back))), disagreements=int(np.sum(there * back > 0)))
        for digest, answer in zip(map(request_digest, bodies), answers, strict=True):
            if digest not in self.counted:
                self.add(prompt_tokens=answer.prompt_tokens, completion_tokens=answer.completion_tokens)
                self.add(requests=answer.tries, retries=max(answer.tries - 1, 0), cache_hits=int(answer.tries == 0))
                self.counted.add(digest)

    def add(self, **more: float) -> None:
        """Adds to the counts."""
        for name, value in more.items():
            self.counts[name] = self.counts.get(name, 0) + value

    def take_counts(self) -> dict[str, float]:
        """Returns sums over the calls since they were taken last."""
        taken = dict(self.counts)
        self.counts.clear()
        return taken

    def figures(self, counts: Mapping[str, float]) -> dict[str, float | None]:
        """Returns the figures of ``FIGURES`` from counts; None where nothing was measured."""
        sums = collections.defaultdict(int, counts)
        parsed = sums["questions"] - sums["unparsed"]
        means = {
            "order_disagreement": sums["disagreements"] / sums["compared"] if sums["compared"] else None,
            "first_shown": sums["sum_first_shown"] / parsed if parsed else None,
            "cost": self.cost(sums["prompt_tokens"], sums["completion_tokens"]),
        }
        return {name: means[name] if name in means else sums[name] for name in FIGURES if name != "cost" or self.prices}

    def cost(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """Returns what the tokens cost; None without prices."""
        if self.prices is None:
            return None
        return (prompt_tokens * self.prices.prompt + completion_tokens * self.prices.completion) / 1e6
