"""Premises of stories from a grammar: somebody somewhere meets with something, and something stands in the way."""

from __future__ import annotations

import numpy as np

TRAITS = (
    "retired", "shy", "stubborn", "young", "clumsy", "penniless", "famous", "forgetful", "cautious", "restless",
    "honest", "widowed", "ambitious", "lonely", "proud", "quiet", "overworked", "superstitious", "exiled", "cheerful",
)  # fmt: skip
ROLES = (
    "lighthouse keeper", "violin teacher", "night nurse", "map maker", "ferry pilot", "beekeeper", "court painter",
    "train conductor", "botanist", "locksmith", "translator", "baker", "detective", "clock mender", "shepherd",
    "astronomer", "puppeteer", "diver", "postman", "chess champion", "tailor", "radio announcer", "gravedigger",
    "school cook", "smuggler", "archivist", "glassblower", "falconer", "surgeon", "bell ringer",
)  # fmt: skip
PLACES = (
    "in a mountain village", "on a crowded island", "in a city under siege", "at the edge of the desert",
    "in a drowned harbour town", "on the last train of the year", "in a country without clocks",
    "on a quiet moon colony", "in a hotel about to close", "on the border of two kingdoms", "in an abandoned theatre",
    "at a school for diplomats", "in a valley of vineyards", "on a research ship",
    "in the oldest library of the coast",
    "in a town where nobody sleeps", "at a winter market", "in a floating city", "on a failing farm",
    "in the basement of a museum",
)  # fmt: skip
EVENTS = (
    "finds a letter that was written to somebody not yet born", "is asked to guard a box that must stay shut",
    "inherits a house with one locked room", "hears a dead relative on an old recording",
    "wins a race that was meant to be lost", "discovers that the local river runs backwards at night",
    "is mistaken for a missing heir", "agrees to teach a rival's only child", "wakes up able to read any language",
    "receives a map of places that do not exist", "finds a stranger asleep in the workshop",
    "is hired to forge a treaty of peace", "loses a bet against a travelling magician",
    "sees the same face in every old photograph", "digs up a machine that still works",
    "is chosen by lot to speak for the whole town", "takes in a child who never grows older",
    "learns that a lifelong friend is a spy", "buys a painting that changes a little every day",
    "is sent to find the author of an anonymous play", "gets a telephone call from the year before",
    "discovers a hidden garden behind the town hall", "must deliver a parcel without knowing the receiver",
    "is the only witness of a very polite robbery", "finds the diary of a previous owner of the same name",
    "invents a medicine that also brings back memories",
)  # fmt: skip
OBSTACLES = (
    "nobody else believes a word of it", "an old enemy already knows the secret", "the only ally cannot be trusted",
    "telling the truth would ruin the family", "the whole town has a reason to keep silent",
    "a storm has cut off every road", "the law forbids any further search", "time runs out with the next full moon",
    "a younger sister wants the opposite", "the price turns out to be a friendship",
    "every answer raises a more dangerous question", "somebody powerful is paying for silence",
    "the past refuses to stay buried", "the wrong person is about to be punished for it",
    "it would mean leaving home for ever", "the proof burns in a fire on the first night",
)  # fmt: skip
ENDINGS = (
    "", " and winter is near", " and there is no money left", " and the neighbours begin to talk",
    " and an old promise must be kept", " and only three days remain",
)  # fmt: skip
PREMISE_COUNT = len(TRAITS) * len(ROLES) * len(PLACES) * len(EVENTS) * len(OBSTACLES) * len(ENDINGS)
"""How many different premises there are."""


def sample_premise(rng: np.random.Generator) -> str:
    """Returns a premise of 10 to 40 words, one sentence, uniformly."""
    trait, role, place, event, obstacle, ending = (
        part[int(rng.integers(len(part)))] for part in (TRAITS, ROLES, PLACES, EVENTS, OBSTACLES, ENDINGS)
    )
    article = "An" if trait[0] in "aeiou" else "A"
    return f"{article} {trait} {role} {place} {event}, but {obstacle}{ending}."
