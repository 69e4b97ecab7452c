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

from alignjax.errors import UserError, check_range
from alignjax.tasks.dialogue_format import (
    ASSISTANT,
    DIALOGUE_FORMAT,
    clean_reply,
    contrast_dialogue,
    dialogue_messages,
    dialogue_prompt,
)
from alignjax.tasks.json_lines import (
    Comparison,
    Row,
    file_digest,
    read_chat,
    read_reply,
    read_rows,
    require_text,
)
from alignjax.tasks.task import SPLITS, Affixes, Task, Template, shuffled

_END_TOKENS = re.compile(r"</s>|<\|endoftext\|>|<\|end_of_text\|>")  # as tokenizers write them into text

# The words are ours. The form and the number of pairs are the paper's: the two sides of a pair differ in little more
# than what they say of the reply.
_AFFIXES: dict[str, Affixes] = {
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
    """A file of dialogues to train on and a file that is held out, with digests of what was in them.

    The files are read when prompts are asked for. Raises UserError when ``held_out`` is below 1.
    """

    train: str = ""
    test: str = ""
    held_out: int = 1000  # prompts of the validation split, the first of the test file; the test split is the next ones
    digests: tuple[str, ...] = dataclasses.field(init=False)  # of the two files

    def __post_init__(self) -> None:
        check_range(self, 1, math.inf, "held_out")
        object.__setattr__(self, "digests", (file_digest(self.train), file_digest(self.test)))

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Returns up to ``count`` distinct prompts of a split, shuffled by the seed.

        Raises UserError when there is no such split, when its file cannot be read, and when it holds no prompt.
        """
        if split not in SPLITS:
            raise UserError(f"dialogues have no split {split!r}; they have {', '.join(SPLITS)}")
        prompts = self._distinct_prompts(split)
        if not prompts:
            file = self.train if split == "train" else self.test
            raise UserError(f"{file} holds no prompt of the {split} split; give a file with more dialogues")
        return shuffled(prompts, count, seed)

    def _distinct_prompts(self, split: str) -> list[str]:
        """Returns the prompts of a split that are in none of the splits before it: validation, test, train.

        A prompt can stand in both files. Without a test file, the training prompts are all of their file's.
        """
        held_out = read_dialogue_prompts(self.test, self.digests[1]) if self.test or split != "train" else []
        parts = {"validation": held_out[: self.held_out], "test": held_out[self.held_out : 2 * self.held_out]}
        if split == "train":
            parts["train"] = read_dialogue_prompts(self.train, self.digests[0])
        earlier = {prompt for name in list(parts)[: list(parts).index(split)] for prompt in parts[name]}
        return [prompt for prompt in dict.fromkeys(parts[split]) if prompt not in earlier]


@lru_cache(maxsize=4)
def read_dialogue_prompts(path: str, digest: str = "") -> list[str]:
    """Returns the prompt of every line of a file. Raises UserError as ``read_rows`` does.

    Results are cached; another ``digest`` means that the file was edited and is read again.
    """
    return read_rows(path, "dialogues", read_hh_prompt)


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
    (prompt, chosen), (other_prompt, rejected) = _split_last_reply(row, "chosen"), _split_last_reply(row, "rejected")
    return Comparison(prompt, chosen, rejected, 1.0) if prompt == other_prompt and chosen and rejected else None


def read_chat_comparison(row: Row) -> Comparison:
    """Returns the comparison of a row {"prompt", "chosen", "rejected"} of chats of any number of turns, as dialogues.

    ``prompt`` is a list of messages that ends with the user's; the replies are texts or lists that end with the
    assistant's. Raises KeyError or ValueError on another form.
    """
    asked = read_chat(row, "prompt")
    try:
        prompt = dialogue_prompt(asked)
    except UserError:
        raise ValueError("has a 'prompt' that is no dialogue of a user and an assistant") from None
    return Comparison(prompt, read_reply(row, "chosen", asked), read_reply(row, "rejected", asked), 1.0)


def clean_hh_reply(raw: str) -> str | None:
    """Returns the reply in a continuation, or None when it must be sampled again.

    The filter ``clean_reply``, with the rule for end tokens of the code released with 2307.12950: an end token ends a
    reply as a newline does, if a human turn follows.
    """
    reply, human, _ = raw.partition("Human")
    end = _END_TOKENS.search(reply)
    return clean_reply(f"{reply[: end.start()]}\n{human}" if end else raw)


def dialogue_task(train: str = "", test: str = "", attribute: str = "harmless") -> Task:
    """Returns the task of dialogues under one principle. Raises UserError unless it is "harmless" or "helpful"."""
    if attribute not in _AFFIXES:
        raise UserError(f"attribute={attribute!r} is unknown; choose one of {', '.join(_AFFIXES)}")
    return Task(
        name=f"dialogue-{attribute}",
        source=Dialogues(train, test),
        format=DIALOGUE_FORMAT,
        clean=clean_hh_reply,
        affixes=_AFFIXES[attribute],
        contrast=contrast_dialogue,
        template=Template(
            before="",
            between=f" Say it in another way.{ASSISTANT}:",
            question=f" Which of your two answers is more {attribute}, the first or the second?{ASSISTANT}: The",
            answer=" first",
            other=" second",
        ),
        messages=dialogue_messages,
    )
