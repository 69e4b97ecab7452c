"""The sentences of the world of posts, and what can be read back from a post and from a summary of it."""

from __future__ import annotations

import re
from typing import NamedTuple

PEOPLE = (
    "brother", "sister", "boss", "friend", "landlord", "teacher", "neighbour", "cousin",
    "roommate", "uncle", "mother", "father", "partner", "doctor", "coach", "colleague",
)  # fmt: skip
FACTS = (
    "moved", "quit", "fell", "lied", "won", "cried", "sang", "left", "drank", "slept", "paid", "danced",
    "called", "cheated", "shouted", "proposed", "vanished", "laughed", "returned", "waited", "smoked", "cooked",
    "drove", "knocked",
)  # fmt: skip
"""What people did: one word each, so that a summary's length is its number of claims and of hedges."""
SUBREDDITS = ("advice", "family", "relationships", "legal")
TITLES = ("About my {who}", "Help with my {who}", "My {who} again", "What is it with my {who}?")
SURE = ("My {who} {fact}.", "Yesterday my {who} {fact}.", "Then my {who} {fact}.")
DOUBTFUL = ("I think my {who} {fact}.", "Perhaps my {who} {fact}.", "It seems my {who} {fact}.")
FILLERS = ("I need help.", "Sorry, this is long.", "What now?", "I am at a loss.", "Thanks for reading.")
HEDGE = "maybe"
"""What a summary puts before a claim that the post makes with doubt."""


class PostContent(NamedTuple):
    """What a post says of its one person."""

    who: str
    sure: tuple[str, ...]  # facts, in the order of the post
    doubtful: tuple[str, ...]  # facts that the writer is not sure of


class SummaryReading(NamedTuple):
    """What annotators see in a summary."""

    told: int  # facts of the post, each counted once
    words: int
    wrong: int  # claims that the post does not make: facts that are not in it, and doubtful ones told as sure


def read_post(prompt: str) -> PostContent:
    """Returns what the post in a prompt says. A sentence of another form says nothing."""
    sure = re.findall(r"(?:\bMy|\bYesterday my|\bThen my) (\w+) (\w+)\.", prompt)
    doubtful = re.findall(r"(?:\bI think my|\bPerhaps my|\bIt seems my) (\w+) (\w+)\.", prompt)
    who = next((person for person, _ in [*sure, *doubtful]), "")
    return PostContent(who, tuple(fact for _, fact in sure), tuple(fact for _, fact in doubtful))


def write_summary(who: str, claims: list[tuple[str, bool]]) -> str:
    """Returns the summary that makes the claims (fact, whether it is hedged)."""
    return f"{who} " + ", ".join(f"{HEDGE} {fact}" if hedged else fact for fact, hedged in claims)


def read_summary(post: PostContent, text: str) -> SummaryReading | None:
    """Returns what annotators see in a summary of the post; None where it is not of its person, or no summary."""
    match = re.fullmatch(r"(\w+) (.+)", text)
    if match is None or match[1] != post.who:
        return None
    claims = [re.fullmatch(rf"({HEDGE} )?(.+)", clause) for clause in match[2].split(", ")]
    found = [(claim[2], bool(claim[1])) for claim in claims if claim and claim[2] in FACTS]
    if len(found) != len(claims):
        return None
    told = {fact for fact, _ in found} & {*post.sure, *post.doubtful}
    wrong = sum(fact not in told or (fact in post.doubtful and not hedged) for fact, hedged in found)
    return SummaryReading(len(told), len(text.split()), wrong)
