"""Real dialogues in the format of Anthropic's HH files (2204.05862), under the principles of RLCD (2307.12950).

A file holds JSON lines {"chosen": dialogue, "rejected": dialogue}: two dialogues that agree up to their last reply, of
which people preferred the chosen one. RLCD uses the prompts alone; ``read_hh_comparison`` reads the human label too,
for a held-out judge. The truth is not known: the task has no oracle and no score. The texts can be offensive.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from alignjax.errors import UserError, check_range
from alignjax.fields import no_effect
from alignjax.tasks.dialogue_format import (
    ASSISTANT,
    DIALOGUE_FORMAT,
    clean_reply,
    contrast_dialogue,
    dialogue_messages,
    dialogue_prompt,
)
from alignjax.tasks.dialogue_words import DIALOGUE_MATERIAL
from alignjax.tasks.json_lines import (
    Comparison,
    Demonstration,
    Row,
    check_sha256,
    file_sha256,
    read_chat,
    read_numbered_rows,
    read_reply,
    require_text,
)
from alignjax.tasks.prompt_material import PromptMaterial, read_prompt_material
from alignjax.tasks.task import SPLITS, Task, Template, shuffled

_END_TOKENS = re.compile(r"</s>|<\|endoftext\|>|<\|end_of_text\|>")  # as tokenizers write them into text


@dataclasses.dataclass(frozen=True)
class Dialogues:
    """A file of dialogues to train on and a file that is held out, with digests of what was in them.

    The files are read when prompts are asked for. Raises UserError when ``held_out`` is below 1, and when a file has
    another SHA-256 than the one given for it.
    """

    train: str = ""
    test: str = ""
    held_out: int = 1000  # prompts of the validation split, the first of the test file; the test split is the next ones
    skip_malformed: bool = False  # leave malformed lines out, with a warning; else the first one is an error
    sha256: tuple[str, str] = no_effect(("", ""))  # of the files as they were released, in hexadecimal; "" asks nothing
    digests: tuple[str, ...] = dataclasses.field(init=False)  # of the two files

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "held_out")
        if not isinstance(self.sha256, tuple) or len(self.sha256) != 2:
            raise UserError(
                f"Dialogues.sha256={self.sha256!r} must be two texts: of the training file, of the test file"
            )
        found = file_sha256(self.train), file_sha256(self.test)
        for path, sha256, expected in zip((self.train, self.test), found, self.sha256, strict=True):
            check_sha256(path, sha256, expected)
        object.__setattr__(self, "digests", tuple(sha256[:16] for sha256 in found))

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Returns up to ``count`` distinct prompts of a split, shuffled by the seed.

        Raises UserError when there is no such split, when its file cannot be read, and when it holds no prompt.
        """
        if split not in SPLITS:
            raise UserError(f"dialogues have no split {split!r}; they have {', '.join(SPLITS)}")
        prompts = list(dict.fromkeys(prompt for _, prompt in self._numbered_prompts(split)))
        if not prompts:
            file = self.train if split == "train" else self.test
            raise UserError(f"{file} holds no prompt of the {split} split; give a file with more dialogues")
        return shuffled(prompts, count, seed)

    def pairs(self, split: str) -> list[DialoguePair]:
        """Returns the pairs of dialogues whose prompts are of a split, in the order of their file.

        Raises UserError when a file cannot be read.
        """
        path, digest = (self.train, self.digests[0]) if split == "train" else (self.test, self.digests[1])
        lines = {line for line, _ in self._numbered_prompts(split)}
        return [pair for pair in read_dialogue_pairs(path, digest, self.skip_malformed) if pair.line in lines]

    def _numbered_prompts(self, split: str) -> list[tuple[int, str]]:
        """Returns (line, prompt) of a split without the prompts of the splits before it: validation, test, train.

        A prompt can stand in both files. Without a test file, the training prompts are all of their file's.
        """
        skip = self.skip_malformed
        held_out = read_numbered_prompts(self.test, self.digests[1], skip) if self.test or split != "train" else []
        parts = {"validation": held_out[: self.held_out], "test": held_out[self.held_out : 2 * self.held_out]}
        if split == "train":
            parts["train"] = read_numbered_prompts(self.train, self.digests[0], skip)
        earlier = {prompt for name in list(parts)[: list(parts).index(split)] for _, prompt in parts[name]}
        return [(line, prompt) for line, prompt in parts[split] if prompt not in earlier]


class DialoguePair(NamedTuple):
    """A line of a file: two dialogues, of which people preferred the chosen one."""

    line: int  # from 1
    prompt: str  # the chosen dialogue up to its last "Assistant:"
    chosen: str  # its last reply
    rejected: str  # the last reply of the other dialogue
    same_prompt: bool  # whether the other dialogue has the same prompt


def read_dialogue_prompts(path: str, digest: str = "", skip_malformed: bool = False) -> list[str]:
    """Returns the prompt of every line of a file. Raises UserError as ``read_rows`` does.

    Another ``digest`` means that the file was edited and is read again.
    """
    return [prompt for _, prompt in read_numbered_prompts(path, digest, skip_malformed)]


@lru_cache(maxsize=4)
def read_numbered_prompts(path: str, digest: str = "", skip_malformed: bool = False) -> list[tuple[int, str]]:
    """Returns the line number and the prompt of every line of a file, as ``read_dialogue_prompts`` does."""
    return read_numbered_rows(path, "dialogues", read_hh_prompt, skip_malformed).rows


@lru_cache(maxsize=4)
def read_dialogue_pairs(path: str, digest: str = "", skip_malformed: bool = False) -> list[DialoguePair]:
    """Returns the pair of every line of a file. Raises UserError as ``read_rows`` does; ``digest`` as above."""
    rows = read_numbered_rows(path, "dialogues", _read_both, skip_malformed).rows
    return [
        DialoguePair(line, prompt, chosen, rejected, prompt == other)
        for line, (prompt, chosen, other, rejected) in rows
    ]


def _read_both(row: Row) -> tuple[str, str, str, str]:
    """Returns prompt and last reply of the chosen dialogue, then of the rejected one."""
    return (*_split_last_reply(row, "chosen"), *_split_last_reply(row, "rejected"))


def dialogue_statistics(pairs: Sequence[DialoguePair]) -> dict[str, float]:
    """Returns how many pairs there are and of what kind, and their mean lengths in characters.

    ``comparisons`` are the pairs with one prompt and two replies, which ``read_hh_comparison`` keeps. Raises UserError
    when there are none.
    """
    if not pairs:
        raise UserError("there are no dialogues to count; give a file that holds some")
    return {
        "pairs": len(pairs),
        "multi_turn": sum(pair.prompt.count(f"{ASSISTANT}:") > 1 for pair in pairs),
        "other_prompt": sum(not pair.same_prompt for pair in pairs),
        "empty_reply": sum(not (pair.chosen and pair.rejected) for pair in pairs),
        "comparisons": sum(bool(pair.same_prompt and pair.chosen and pair.rejected) for pair in pairs),
        "repeated_prompts": len(pairs) - len({pair.prompt for pair in pairs}),
        "prompt_characters": sum(len(pair.prompt) for pair in pairs) / len(pairs),
        "chosen_characters": sum(len(pair.chosen) for pair in pairs) / len(pairs),
        "rejected_characters": sum(len(pair.rejected) for pair in pairs) / len(pairs),
    }


def read_hh_prompt(row: Row) -> str:
    """Returns the chosen dialogue up to its last "Assistant:". Raises KeyError or ValueError when there is none."""
    return _split_last_reply(row, "chosen")[0]


def _split_last_reply(row: Row, name: str) -> tuple[str, str]:
    """Returns (prompt, last reply) of a dialogue. Raises ValueError when no turn precedes a turn of the assistant."""
    prompt, marker, reply = require_text(row, name).rpartition(f"{ASSISTANT}:")
    if not marker or not prompt.strip():
        raise ValueError(f"has {name!r} without a turn 'Assistant:' after another")
    return f"{prompt}{marker}".strip(), reply.strip()


def read_hh_comparison(row: Row) -> Comparison | None:
    """Returns the last replies of the two dialogues, the preferred one first: P(first is preferred) = 1.

    Returns None for the few rows whose dialogues differ before the last reply, or where a reply is empty. (The order
    tells a preference model nothing, because preference models are antisymmetric.)
    """
    prompt, chosen, other_prompt, rejected = _read_both(row)
    return Comparison(prompt, chosen, rejected, 1.0) if prompt == other_prompt and chosen and rejected else None


def read_chat_comparison(row: Row) -> Comparison:
    """Returns the comparison of a row {"prompt", "chosen", "rejected"} of chats of any number of turns, as dialogues.

    ``prompt`` is a list of messages that ends with the user's; the replies are texts or lists that end with the
    assistant's. Raises KeyError or ValueError on another form.
    """
    prompt, asked = _read_chat_prompt(row)
    return Comparison(prompt, read_reply(row, "chosen", asked), read_reply(row, "rejected", asked), 1.0)


def read_chat_demonstration(row: Row) -> Demonstration:
    """Returns the demonstration of a row {"prompt", "completion"} of chats of any number of turns, as a dialogue.

    Its messages are those of ``read_chat_comparison``. Raises KeyError or ValueError on another form.
    """
    prompt, asked = _read_chat_prompt(row)
    return Demonstration(prompt, read_reply(row, "completion", asked))


def _read_chat_prompt(row: Row) -> tuple[str, list[tuple[str, str]]]:
    """Returns the messages of a prompt as a dialogue, and as (role, content). Raises ValueError when they are none."""
    asked = read_chat(row, "prompt")
    try:
        return dialogue_prompt(asked), asked
    except UserError:
        raise ValueError("has a 'prompt' that is no dialogue of a user and an assistant") from None


def clean_hh_reply(raw: str) -> str | None:
    """Returns the reply in a continuation, or None when it must be sampled again.

    The filter ``clean_reply``, with the rule for end tokens of the code released with 2307.12950: an end token ends a
    reply as a newline does, if a human turn follows.
    """
    reply, human, _ = raw.partition("Human")
    end = _END_TOKENS.search(reply)
    return clean_reply(f"{reply[: end.start()]}\n{human}" if end else raw)


def dialogue_task(train: str = "", test: str = "", attribute: str = "harmless", material: str = "") -> Task:
    """Returns the task of dialogues under one principle.

    ``material`` is the path of a JSON file of other words (``prompt_material``). Raises UserError unless the principle
    is "harmless" or "helpful", and when the file is malformed or its affixes do not fit into a role marker.
    """
    if attribute not in DIALOGUE_MATERIAL:
        raise UserError(f"attribute={attribute!r} is unknown; choose one of {', '.join(DIALOGUE_MATERIAL)}")
    words = _read_words(material, DIALOGUE_MATERIAL[attribute]) if material else DIALOGUE_MATERIAL[attribute]
    return Task(
        name=f"dialogue-{attribute}",
        source=Dialogues(train, test),
        format=DIALOGUE_FORMAT,
        clean=clean_hh_reply,
        affixes=words.affixes,
        contrast=contrast_dialogue,
        template=Template(
            before="",
            between=f" Say it in another way.{ASSISTANT}:",
            question=f" Which of your two answers is more {attribute}, the first or the second?{ASSISTANT}: The",
            answer=" first",
            other=" second",
        ),
        messages=dialogue_messages,
        questions=words.questions,
        evaluation_questions=words.evaluation_questions,
        material_digest=words.digest,
    )


def _read_words(path: str, own: PromptMaterial) -> PromptMaterial:
    """Returns the words of a file. Raises UserError also where they do not fit dialogues."""
    words = read_prompt_material(path, own)
    if words.reply_prefix:
        raise UserError(f"{path}: reply_prefix belongs to outlines, and replies of dialogues have none; leave it out")
    for i, pair in enumerate(words.affixes):
        for j, side in enumerate(pair):
            if ":" in side or "\n" in side:
                raise UserError(f"{path}: affixes[{i}][{j}] has a colon or a line end, which would end the role "
                                "marker that it stands in; correct it")  # fmt: skip
    return words
