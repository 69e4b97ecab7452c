"""Real dialogues in the format of Anthropic's HH files, under the principles of RLCD (2307.12950).

A file holds JSON lines {"chosen": dialogue, "rejected": dialogue}, two dialogues that share all but their last reply,
of which people preferred the chosen one. RLCD takes the prompts alone; ``comparison`` takes the human label too, for a
held-out judge. Nobody knows the truth here: the task has no oracle and no score. The texts can be offensive.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from alignjax.errors import UserError, check_range
from alignjax.tasks.json_lines import Compared, Row, content, read_rows, text_of
from alignjax.tasks.task import Affixes, Format, Task, Template, dialogue_messages
from alignjax.tasks.turns import ROLE, clean_reply, contrast_dialogue

MARKER = "Human:"
SPLITS = ("train", "validation", "test")
ENDS = re.compile(r"</s>|<\|endoftext\|>|<\|end_of_text\|>")  # as tokenizers write their end token out

# The words are ours; the form and the number of pairs are the paper's: the two sides of a pair differ in as little as
# they can beyond what they say of the reply.
AFFIXES: dict[str, Affixes] = {
    "harmless": (
        ("(harmless, considerate response)", "(harmful, inconsiderate response)"),
        ("(harmless, fair response)", "(harmful, unfair response)"),
        ("(harmless, responsible response)", "(harmful, irresponsible response)"),
        ("(harmless, respectful response)", "(harmful, disrespectful response)"),
        ("(harmless, decent response)", "(harmful, indecent response)"),
        ("(harmless, lawful response)", "(harmful, unlawful response)"),
        ("(harmless, truthful response)", "(harmful, untruthful response)"),
        ("(harmless, sensitive response)", "(harmful, insensitive response)"),
        ("(harmless, peaceful response)", "(harmful, violent response)"),
        ("(harmless, caring response)", "(harmful, uncaring response)"),
        ("(harmless, tolerant response)", "(harmful, intolerant response)"),
        ("(harmless, cautious response)", "(harmful, reckless response)"),
        ("(harmless, polite response)", "(harmful, impolite response)"),
        ("(harmless, friendly response)", "(harmful, unfriendly response)"),
        ("(harmless, well-meaning response)", "(harmful, ill-meaning response)"),
        ("(harmless response from a person of good character)", "(harmful response from a person of bad character)"),
    ),
    "helpful": (("(useful, informative response)", "(useless, uninformative response)"),),
}


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """A file to train on and one to be held out, and what was in them when the experiment was made. They are read when
    prompts are asked for."""

    train: str = ""
    test: str = ""
    held_out: int = 1000  # the first so many of the test file are the validation split, the next so many the test split
    content: tuple[str, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "held_out")
        object.__setattr__(self, "content", (content(self.train), content(self.test)))

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Prompts of the split, shuffled by the seed; all of them when there are fewer than ``count``."""
        if split not in SPLITS:
            raise UserError(f"dialogues have no split {split!r}; they have {', '.join(SPLITS)}")
        found = self.split(split)
        if not found:
            file = self.train if split == "train" else self.test
            raise UserError(f"{file} holds no prompt of the {split} split; give a file with more dialogues")
        return [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:count]]

    def split(self, split: str) -> list[str]:
        """Distinct prompts that no earlier of validation, test and train has (ours: a prompt can stand in both files).
        Without a test file nothing is taken out of the training ones."""
        held_out = read_prompts(self.test, self.content[1]) if self.test or split != "train" else []
        parts = {"validation": held_out[: self.held_out], "test": held_out[self.held_out : 2 * self.held_out]}
        if split == "train":
            parts["train"] = read_prompts(self.train, self.content[0])
        earlier = {prompt for name in list(parts)[: list(parts).index(split)] for prompt in parts[name]}
        return [prompt for prompt in dict.fromkeys(parts[split]) if prompt not in earlier]

    def corpus(self, count: int, seed: int) -> Sequence[str]:
        raise UserError("dialogues bring no corpus to pretrain on; start from a Pretrained stage")


@lru_cache(maxsize=4)
def read_prompts(path: str, mark: str = "") -> list[str]:
    """The prompt of every line. ``mark`` tells an edited file from one read before. Raises UserError."""
    return read_rows(path, "dialogues", prompt_of)


def prompt_of(row: Row) -> str:
    """The chosen dialogue up to and including its last role marker of the assistant, stripped."""
    return halves(row, "chosen")[0]


def halves(row: Row, name: str) -> tuple[str, str]:
    """A dialogue's prompt and its last reply. Raises ValueError where there is no assistant in it."""
    before, marker, reply = text_of(row, name).rpartition(f"{ROLE}:")
    if not marker or not before.strip():
        raise ValueError(f"has {name!r} without a turn 'Assistant:' after another")
    return f"{before}{marker}".strip(), reply.strip()


def comparison(row: Row) -> Compared | None:
    """What people preferred, as a pair of replies to one prompt; None for the few rows whose dialogues differ before
    the last reply, or where one is empty. (The preferred one always comes first: preference models are antisymmetric.)
    """
    (prompt, chosen), (other, rejected) = halves(row, "chosen"), halves(row, "rejected")
    return (prompt, chosen, rejected, 1.0) if prompt == other and chosen and rejected else None


def clean(raw: str) -> str | None:
    """The released filter (2307.12950; ``labeling.clean_reply``) with its rule for an end token: that ends a reply as a
    line's end does, if a human turn follows."""
    reply, human, _ = raw.partition("Human")
    ended = ENDS.search(reply)
    return clean_reply(f"{reply[: ended.start()]}\n{human}" if ended else raw)


def task(train: str = "", test: str = "", attribute: str = "harmless") -> Task:
    """Dialogues under one principle, "harmless" or "helpful". Raises UserError on another."""
    if attribute not in AFFIXES:
        raise UserError(f"attribute={attribute!r} is unknown; choose one of {', '.join(AFFIXES)}")
    return Task(
        name=f"dialogue-{attribute}",
        source=Dialogues(train, test),
        affixes=AFFIXES[attribute],
        contrast=contrast_dialogue,
        clean=clean,
        format=Format(before=" ", end=f"\n\n{MARKER}", stop=(MARKER,)),
        template=Template(
            before="",
            between=f" Say it in another way.{ROLE}:",
            question=f" Which of your two answers is more {attribute}, the first or the second?{ROLE}: The",
            answer=" first",
            other=" second",
        ),
        oracles={},
        score=None,
        messages=dialogue_messages,
    )
