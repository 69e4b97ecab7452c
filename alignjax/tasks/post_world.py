"""A small world of posts whose truth is known, where summaries trade coverage, brevity and faithfulness.

A post (``post_grammar``) tells facts of one person, some with doubt. A summary tells any of them. A doubtful fact can
be told as sure, which is short and wrong; hedged, which is long and right; or not at all. Three types of annotators
rank summaries, each by all three criteria in an order of its own:

    complete:  most facts told, then fewest words, then fewest wrong claims
    brief:     fewest words, then fewest wrong claims, then most facts told
    faithful:  fewest wrong claims, then most facts told, then fewest words

Each type is transitive, and their majority is a cycle: the bold summary (doubtful facts told as sure) beats the careful
one (hedged), that beats the terse one (without them), and that beats the bold one (2312.00886, section 3.2, App. C.2).
So no summary is best, and no reward explains the preferences.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np

from alignjax.errors import UserError, check_range
from alignjax.tasks.post_grammar import (
    DOUBTFUL,
    FACTS,
    FILLERS,
    PEOPLE,
    SUBREDDITS,
    SURE,
    TITLES,
    PostContent,
    SummaryReading,
    read_post,
    read_summary,
    write_summary,
)
from alignjax.tasks.summary import TLDR_QUERY, Post, fill_query
from alignjax.tasks.task import EOS, SPLITS, Format, Task, Template, is_in_split

STYLES = ("bold", "careful", "terse")
"""What a summary may do with doubtful facts, beside telling every sure one: tell them, hedge them, leave them out."""
MASSES = (0.38, 0.34, 0.28)
"""Of the complete, brief and faithful annotators."""
INVALID, OTHER = "invalid", "other"
"""Styles of what is no summary of the post, and of every other summary."""
_RANKS: tuple[Callable[[SummaryReading], tuple[int, int, int]], ...] = (
    lambda r: (r.told, -r.words, -r.wrong),
    lambda r: (-r.words, -r.wrong, r.told),
    lambda r: (-r.wrong, r.told, -r.words),
)
"""How the complete, the brief and the faithful annotator rank summaries; the larger the better."""


@dataclasses.dataclass(frozen=True)
class PostWorld:
    """Sizes of the world and who writes. Raises UserError out of range.

    The last ``doubtful`` of a post's ``facts`` are doubtful. A writer of the corpus has one of ``STYLES``, each equally
    likely, and with probability ``sloppy`` tells one of the facts twice, which no annotator likes. The ``query`` is one
    of a ``summary.Post``.
    """

    people: int = len(PEOPLE)
    known: int = len(FACTS)  # how many different facts there are
    facts: int = 3  # of a post
    doubtful: int = 1
    sloppy: float = 0.2
    query: str = TLDR_QUERY  # how a post stands in a prompt

    def __post_init__(self) -> None:
        if not 1 <= self.people <= len(PEOPLE):
            raise UserError(f"PostWorld.people={self.people} must be in 1 .. {len(PEOPLE)}")
        if not 2 <= self.facts < self.known <= len(FACTS):
            raise UserError(f"PostWorld.facts={self.facts} must be at least 2 and less than known={self.known}, and "
                            f"known at most {len(FACTS)}")  # fmt: skip
        if not 1 <= self.doubtful < self.facts:
            raise UserError(f"PostWorld.doubtful={self.doubtful} must be in 1 .. facts - 1 = {self.facts - 1}")
        fill_query(self.query, Post("", "", ""))
        check_range(self, 0, 1, "sloppy")

    def prompts(self, split: str, count: int, seed: int) -> list[str]:
        """Returns ``count`` distinct prompts, all of the split.

        Raises UserError when there is no such split, and when the world does not hold ``count`` prompts.
        """
        if split not in SPLITS:
            raise UserError(f"the world of posts has no split {split!r}; it has {', '.join(SPLITS)}")
        rng, prompts = np.random.default_rng((seed, len(split))), dict[str, None]()
        for _ in range(20 * count + 1000):
            if len(prompts) == count:
                return list(prompts)
            prompt = sample_prompt(self, rng)
            if is_in_split(prompt, split):
                prompts.setdefault(prompt)
        raise UserError(f"the world holds only {len(prompts)} {split} posts, {count} asked for; enlarge the PostWorld")


def sample_prompt(world: PostWorld, rng: np.random.Generator) -> str:
    """Returns a post of the world as a prompt: its sentences in a random order, with a filler."""
    who = PEOPLE[rng.integers(world.people)]
    facts = [FACTS[i] for i in rng.permutation(world.known)[: world.facts]]
    forms = [SURE] * (world.facts - world.doubtful) + [DOUBTFUL] * world.doubtful
    sentences = [_choose(rng, form).format(who=who, fact=fact) for form, fact in zip(forms, facts, strict=True)]
    sentences.append(_choose(rng, FILLERS))
    post = " ".join(sentences[i] for i in rng.permutation(len(sentences)))
    return fill_query(world.query, Post(_choose(rng, SUBREDDITS), _choose(rng, TITLES).format(who=who), post))


def styled_claims(post: PostContent, style: str) -> list[tuple[str, bool]]:
    """Returns what a summary of one of ``STYLES`` tells, (fact, whether hedged): sure facts first, as in the post."""
    doubtful = () if style == "terse" else post.doubtful
    return [*((fact, False) for fact in post.sure), *((fact, style == "careful") for fact in doubtful)]


def styled_summary(post: PostContent, style: str) -> str:
    """Returns the summary of one of ``STYLES``."""
    return write_summary(post.who, styled_claims(post, style))


def style_of(prompt: str, summary: str) -> str:
    """Returns the style that annotators see in a summary: one of ``STYLES``, or ``OTHER`` or ``INVALID``."""
    post = read_post(prompt)
    reading = read_summary(post, summary)
    if reading is None:
        return INVALID
    return next((s for s in STYLES if read_summary(post, styled_summary(post, s)) == reading), OTHER)


def annotators_prefer(masses: Sequence[float], prompt: str, reply: str, other: str) -> float:
    """Returns the share of annotators who prefer the reply; a type that sees no difference counts half.

    A summary of the post beats what is none.
    """
    post = read_post(prompt)
    first, second = read_summary(post, reply), read_summary(post, other)
    if first is None or second is None:
        return 0.5 + 0.5 * ((first is not None) - (second is not None))
    return _preferred_share(tuple(masses), first, second)


@lru_cache(maxsize=4096)
def _preferred_share(masses: tuple[float, ...], first: SummaryReading, second: SummaryReading) -> float:
    """Returns the share of annotators who prefer the first of two readings, ties counting half."""
    signs = [(rank(first) > rank(second)) - (rank(first) < rank(second)) for rank in _RANKS]
    return 0.5 + 0.5 * sum(mass * sign for mass, sign in zip(masses, signs, strict=True))


def write_as(world: PostWorld, prompt: str, rng: np.random.Generator) -> str:
    """Returns a summary by a writer of the corpus."""
    post = read_post(prompt)
    is_sloppy = rng.random() < world.sloppy
    claims = styled_claims(post, _choose(rng, STYLES))
    if is_sloppy:
        claims.append(claims[rng.integers(len(claims))])
    return write_summary(post.who, claims)


def post_summaries(world: PostWorld, count: int, seed: int) -> list[tuple[str, str]]:
    """Returns ``count`` training posts with summaries by the writers of the corpus."""
    rng = np.random.default_rng(seed)
    prompts = (sample_prompt(world, rng) for _ in range(10 * count + 1000))
    kept = [prompt for prompt in prompts if is_in_split(prompt, "train")][:count]
    return [(prompt, write_as(world, prompt, rng)) for prompt in kept]


def post_corpus(world: PostWorld, count: int, seed: int) -> list[str]:
    """Returns ``count`` documents to pretrain on: posts with summaries behind them."""
    return [f"{prompt} {summary}" for prompt, summary in post_summaries(world, count, seed)]


def _choose(rng: np.random.Generator, options: Sequence[str]) -> str:
    """Returns one of the options, uniformly."""
    return options[int(rng.integers(len(options)))]


def post_task(world: PostWorld = PostWorld(), masses: Sequence[float] = MASSES) -> Task:
    """Returns the task of summarising the posts of the world; ``annotators``, of three masses, is its truth.

    Raises UserError on masses that are negative or do not sum to 1.
    """
    if len(masses) != len(_RANKS) or min(masses) < 0 or not math.isclose(sum(masses), 1, abs_tol=1e-6):
        raise UserError(f"masses={masses} must be three that are not negative and sum to 1")
    return Task(
        name="posts",
        source=world,
        format=Format(before=" ", end="", stop=(EOS,)),
        template=Template(before="", between=" Or:", question=" Better: ", answer="1", other="2"),
        oracles={"annotators": partial(annotators_prefer, tuple(masses))},
        corpus_of_source=post_corpus,
        replies_of_source=post_summaries,
    )
