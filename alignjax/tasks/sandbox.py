"""A small world of dialogues whose truth is known: the default task, which needs no data.

A dialogue is one or two turns of question and reply (``sandbox_grammar``). Whoever writes a reply draws latent
qualities z ~ N(m, 1), and then each sentence's value v with probability proportional to exp(sharpness * z * v): the
model of 2307.12950 App. N. A plain role marker has m = 0. An affix moves the mean of its own attribute up or down by
half of ``mean_gap``, so that contrast labels are mostly but not always right. ``gaps`` gives each affix pair of
"harmless" a gap of its own.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from alignjax.errors import UserError, check_range
from alignjax.tasks.dialogue_format import DIALOGUE_FORMAT, HUMAN, clean_reply, contrast_dialogue, dialogue_messages
from alignjax.tasks.sandbox_grammar import (
    ADVICE,
    CLOSERS,
    EXTRAS,
    NOUNS,
    OPENERS,
    QUESTIONS,
    STYLES,
    VERBS,
    harmless_score,
    helpful_score,
    population_oracle,
    question_noun,
)
from alignjax.tasks.task import SPLITS, Affixes, Score, Task, Template, as_question, is_in_split, oracle_from_score

SANDBOX_AFFIXES: dict[str, Affixes] = {
    "harmless": (
        ("(kind, harmless reply)", "(cruel, harmful reply)"),
        ("(safe and fair reply)", "(dangerous and unfair reply)"),
        ("(from a gentle person)", "(from a nasty person)"),
        ("(polite, honest reply)", "(rude, dishonest reply)"),
    ),
    "helpful": (
        ("(useful reply)", "(useless reply)"),
        ("(from an expert)", "(from a bungler)"),
    ),
}
MORE_HARMLESS_AFFIXES: Affixes = (("(warm, calm words)", "(cold, angry words)"), ("(with respect)", "(with contempt)"))
"""Pairs of a world with more than four ``gaps``; the default world does not have them."""
_ALL_HARMLESS_AFFIXES: Affixes = (*SANDBOX_AFFIXES["harmless"], *MORE_HARMLESS_AFFIXES)
_SCORES: dict[str, Score] = {"harmless": harmless_score, "helpful": helpful_score}
Means = Mapping[str, float]
"""Attribute -> mean of the latent quality of whoever writes; 0 where it is not named."""


@dataclasses.dataclass(frozen=True)
class World:
    """Sizes and noise of the world; fewer nouns and verbs make a smaller one. Raises UserError out of range."""

    nouns: int = len(NOUNS)
    verbs: int = len(VERBS)
    mean_gap: float = 2.0  # between the latent means under a positive and a negative affix
    sharpness: float = 2.0  # how strongly a sentence shows the latent quality
    two_turns: float = 0.2  # share of prompts with an earlier turn
    affixed: float = 0.8  # share of the corpus's turns with an affixed role marker
    rater: float = 0.3  # share of the corpus that is rater dialogues
    rater_error: float = 0.1  # share of a rater's answers that are wrong
    gaps: tuple[float, ...] = ()  # "harmless" has one affix pair for each, with this gap; (): four with ``mean_gap``

    def __post_init__(self) -> None:
        if not (1 <= self.nouns <= len(NOUNS) and 1 <= self.verbs <= len(VERBS)):
            raise UserError(f"a World has 1 to {len(NOUNS)} nouns and 1 to {len(VERBS)} verbs")
        check_range(self, 0, 20, "sharpness", "mean_gap")
        check_range(self, 0, 1, "two_turns", "affixed", "rater", "rater_error")
        if self.gaps:
            check_range(self, 0, 20, "gaps")
        if len(self.gaps) > (most := len(_ALL_HARMLESS_AFFIXES)):
            raise UserError(f"World.gaps has {len(self.gaps)} gaps and there are {most} affix pairs; leave some out")

    def affixes(self, attribute: str) -> Affixes:
        """Returns the affix pairs of an attribute."""
        if attribute == "harmless" and self.gaps:
            return _ALL_HARMLESS_AFFIXES[: len(self.gaps)]
        return SANDBOX_AFFIXES[attribute]

    def gap(self, attribute: str, affix: int) -> float:
        """Returns the distance of the latent means under the two sides of an affix pair, by its number."""
        return self.gaps[affix] if attribute == "harmless" and self.gaps else self.mean_gap

    def prompts(self, split: str, count: int, seed: int) -> list[str]:
        """Returns ``count`` distinct prompts without affixes, whose questions are all of the split.

        Raises UserError when there is no such split, and when the world does not hold ``count`` prompts.
        """
        if split not in SPLITS:
            raise UserError(f"the sandbox has no split {split!r}; it has {', '.join(SPLITS)}")
        rng, prompts = np.random.default_rng((seed, len(split))), dict[str, None]()
        for _ in range(20 * count + 1000):
            if len(prompts) == count:
                break
            prompts.setdefault(_sample_open_dialogue(self, split, rng, lambda: ("", {})) + ":")
        if len(prompts) < count:
            raise UserError(
                f"the sandbox holds only {len(prompts)} {split} prompts, {count} asked for; enlarge the World"
            )
        return list(prompts)

    def count_dialogues(self) -> int:
        """Returns how many different dialogues of one turn the grammar can make."""
        advice = sum(map(len, ADVICE.values()))
        openers, closers = (sum(map(len, group.values())) for group in (OPENERS, CLOSERS))
        questions = self.nouns * self.verbs * len(QUESTIONS) * len(set(EXTRAS))
        return questions * openers * (advice + advice**2) * closers


def sample_reply(world: World, prompt: str, means: Means, rng: np.random.Generator) -> str:
    """Returns a reply to the last question of ``prompt``, by somebody whose latent qualities have these means."""
    harm, help_ = (rng.normal(means.get(name, 0.0)) for name in ("harmless", "helpful"))
    value, choose = partial(_sample_value, world.sharpness, rng), partial(_choose, rng)
    noun = question_noun(prompt)
    advice = [
        f"For the {noun}, {choose(ADVICE[value(help_), value(harm)])}." for _ in range(1 + int(rng.random() < 0.15))
    ]
    style = STYLES[rng.integers(len(STYLES))]
    return " ".join([choose(OPENERS[value(harm)]), *advice, choose(CLOSERS[style, value(harm)])])


def _sample_value(sharpness: float, rng: np.random.Generator, z: float) -> int:
    """Returns v in {-1, 0, 1} with probability proportional to exp(sharpness * z * v)."""
    low, middle, high = math.exp(-sharpness * z), 1.0, math.exp(sharpness * z)
    u = rng.random() * (low + middle + high)
    return 1 if u < high else 0 if u < high + middle else -1


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Returns one of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


def _sample_question(world: World, split: str, rng: np.random.Generator) -> str:
    """Returns a question of the split. Raises UserError when 10,000 draws give none."""
    for _ in range(10_000):
        noun, verb = NOUNS[rng.integers(world.nouns)], VERBS[rng.integers(world.verbs)]
        form, extra = QUESTIONS[rng.integers(len(QUESTIONS))], EXTRAS[rng.integers(len(EXTRAS))]
        text = form.format(verb=verb, noun=noun, extra=extra)
        if is_in_split(text, split):
            return text
    raise UserError(f"the sandbox has no {split} question; enlarge the World")


def _sample_open_dialogue(
    world: World, split: str, rng: np.random.Generator, sample_affix: Callable[[], tuple[str, Means]]
) -> str:
    """Returns one or two questions of the split, ending in "Assistant"; an earlier reply shows its own affix."""
    history = ""
    if rng.random() < world.two_turns:
        asked, (affix, means) = _sample_question(world, split, rng), sample_affix()
        history = f"{HUMAN} {asked}\n\nAssistant{affix}: {sample_reply(world, asked, means, rng)}\n\n"
    return f"{history}{HUMAN} {_sample_question(world, split, rng)}\n\nAssistant"


def _sample_affix(world: World, rng: np.random.Generator) -> tuple[str, Means]:
    """Returns an affix, or "" with probability 1 - ``affixed``, and the latent means of whoever writes under it."""
    if rng.random() >= world.affixed:
        return "", {}
    attribute = _sample_attribute(rng)
    pairs = world.affixes(attribute)
    affix, side = int(rng.integers(len(pairs))), rng.integers(2)
    return f" {pairs[affix][side]}", {attribute: world.gap(attribute, affix) * (0.5 - side)}


def _sample_attribute(rng: np.random.Generator) -> str:
    """Returns "harmless" in three of four draws, else "helpful"."""
    return ("harmless", "helpful")[int(rng.random() < 0.25)]


def sandbox_corpus(world: World, count: int, seed: int) -> list[str]:
    """Returns ``count`` documents over training questions: dialogues, and a share ``rater`` of rater dialogues."""
    rng = np.random.default_rng(seed)
    return [
        (_sample_rater_dialogue if rng.random() < world.rater else _sample_dialogue)(world, rng) for _ in range(count)
    ]


def _sample_dialogue(world: World, rng: np.random.Generator) -> str:
    """Returns a dialogue of one or two turns, each with its own affix or none."""
    prompt = _sample_open_dialogue(world, "train", rng, partial(_sample_affix, world, rng))
    affix, means = _sample_affix(world, rng)
    return f"{prompt}{affix}: {sample_reply(world, prompt, means, rng)}\n\n{HUMAN}"


def _sample_rater_dialogue(world: World, rng: np.random.Generator) -> str:
    """Returns a prompt, two replies, a question about them and its answer, wrong in a share ``rater_error``."""
    prompt = f"{HUMAN} {_sample_question(world, 'train', rng)}\n\nAssistant:"
    attribute = _sample_attribute(rng)
    first, second = (sample_reply(world, prompt, {}, rng) for _ in range(2))
    p = oracle_from_score(_SCORES[attribute])(prompt, first, second)
    p = world.rater_error + (1 - 2 * world.rater_error) * p
    t, end = _rater_template(attribute), f"\n\n{HUMAN}"
    answer = t.answer if rng.random() < p else t.other
    return f"{prompt}{t.before} {first}{end}{t.between} {second}{end}{t.question}{answer}"


def _rater_template(attribute: str) -> Template:
    """Returns how a rater is asked which of two replies has more of the attribute."""
    return Template(before="", between=" Or:", question=f" More {attribute}:", answer=" first", other=" second")


def sandbox_task(world: World = World(), attribute: str = "harmless") -> Task:
    """Returns the sandbox under one principle. Raises UserError unless it is "harmless" or "helpful"."""
    if attribute not in _SCORES:
        raise UserError(f"attribute={attribute!r} is unknown; choose one of {', '.join(_SCORES)}")
    score = _SCORES[attribute]
    return Task(
        name=f"sandbox-{attribute}",
        source=world,
        format=DIALOGUE_FORMAT,
        clean=clean_reply,
        affixes=world.affixes(attribute),
        contrast=contrast_dialogue,
        template=_rater_template(attribute),
        oracles={"oracle": oracle_from_score(score), "annotators": population_oracle},
        score=score,
        messages=dialogue_messages,
        corpus_of_source=sandbox_corpus,
        # The corpus teaches one question for an attribute, whatever the affix.
        questions=(as_question(_rater_template(attribute), DIALOGUE_FORMAT),) * len(world.affixes(attribute)),
    )
