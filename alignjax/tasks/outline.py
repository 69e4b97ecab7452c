"""Outlines of stories from their premises, the third task of 2307.12950.

A prompt asks for the outline and opens the reply with a fixed prefix that ends in "1."; the model continues with the
first point. A contrast prompt has another prefix, which names a quality: how interesting, how well-formed, how close to
the premise. Premises come from a grammar or from a user's file. The truth is not known: the task has no oracle, and its
score counts form alone.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from alignjax.errors import UserError, short_repr
from alignjax.tasks.dialogue import clean_hh_reply
from alignjax.tasks.dialogue_format import ASSISTANT, DIALOGUE_FORMAT, HUMAN
from alignjax.tasks.json_lines import file_digest, read_prompts
from alignjax.tasks.outline_words import OUTLINE_PREFIX, outline_material
from alignjax.tasks.premise_grammar import PREMISE_COUNT, sample_premise
from alignjax.tasks.prompt_material import PromptMaterial, read_prompt_material
from alignjax.tasks.task import SPLITS, Source, Task, Template, is_in_split, shuffled

_REQUEST = f"{HUMAN} Write the outline of a story with this premise: "
_FIRST_POINT = "1."  # what every prefix ends in


@dataclasses.dataclass(frozen=True)
class Premises:
    """Premises of a grammar, 10 to 40 words each. Raises UserError when the prefix does not end in "1."."""

    prefix: str = OUTLINE_PREFIX  # the first words of every reply, at the end of its prompt

    def __post_init__(self) -> None:
        _check_prefix("Premises.prefix", self.prefix)

    def premises(self, split: str, count: int, seed: int) -> list[str]:
        """Returns ``count`` distinct premises of a split, drawn by the seed.

        Raises UserError when there is no such split, and when ``count`` is over 1% of what the grammar can make.
        """
        _check_split(split)
        if count > PREMISE_COUNT // 100:
            raise UserError(f"{count} premises were asked for; the grammar gives up to {PREMISE_COUNT // 100} a split")
        rng, found = np.random.default_rng((seed, len(split))), dict[str, None]()
        while len(found) < count:
            premise = sample_premise(rng)
            if is_in_split(premise_key(premise), split):
                found.setdefault(premise)
        return list(found)

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Returns the prompts of ``premises``. Raises UserError as it does."""
        return [outline_prompt(premise, self.prefix) for premise in self.premises(split, count, seed)]


@dataclasses.dataclass(frozen=True)
class PremiseFile:
    """A file of premises, JSON lines {"premise": text} or .txt with one a line, with a digest of what was in it.

    A hash of the premise decides its split: 80% are in train, 10% in validation, 10% in test. Raises UserError when the
    prefix does not end in "1.". The file is read when prompts are asked for.
    """

    path: str
    prefix: str = OUTLINE_PREFIX  # the first words of every reply, at the end of its prompt
    digest: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        _check_prefix("PremiseFile.prefix", self.prefix)
        object.__setattr__(self, "digest", file_digest(self.path))

    def premises(self, split: str, count: int, seed: int) -> list[str]:
        """Returns up to ``count`` distinct premises of a split, each on one line, shuffled by the seed.

        Premises that differ in case or white space alone count as one. Raises UserError when there is no such split,
        when the file cannot be read, and when it holds no premise of the split.
        """
        _check_split(split)
        distinct: dict[str, str] = {}
        for premise in read_premises(self.path, self.digest):
            distinct.setdefault(premise_key(premise), premise)
        found = [premise for key, premise in distinct.items() if is_in_split(key, split)]
        if not found:
            raise UserError(f"{self.path} holds no premise of the {split} split; give a file with more premises")
        return shuffled(found, count, seed)

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Returns the prompts of ``premises``. Raises UserError as it does."""
        return [outline_prompt(premise, self.prefix) for premise in self.premises(split, count, seed)]


@lru_cache(maxsize=4)
def read_premises(path: str, digest: str = "") -> list[str]:
    """Returns the premises of a file, each on one line. Raises UserError as ``read_prompts`` does.

    Results are cached; another ``digest`` means that the file was edited and is read again.
    """
    return [" ".join(premise.split()) for premise in read_prompts(path, "premise")]


def premise_key(premise: str) -> str:
    """Returns what decides a premise's split: its words, whatever their case."""
    return " ".join(premise.casefold().split())


def outline_prompt(premise: str, prefix: str) -> str:
    """Returns the prompt that asks for the outline of a premise and opens the reply."""
    return f"{_REQUEST}{premise}{ASSISTANT}: {prefix}"


def premise_of(prompt: str) -> str:
    """Returns the premise of a prompt. Raises UserError when it is no prompt of this task."""
    return _split_prompt(prompt)[0]


def _split_prompt(prompt: str) -> tuple[str, str]:
    """Returns (premise, prefix) of a prompt. Raises UserError when it is no prompt of this task."""
    question, marker, prefix = prompt.rpartition(f"{ASSISTANT}: ")
    if not marker or not question.startswith(_REQUEST) or not prefix.endswith(_FIRST_POINT):
        raise UserError(f"the prompt {prompt[-40:]!r} asks for no outline; make it with ``outline_prompt``")
    return question.removeprefix(_REQUEST), prefix


def contrast_outline(prompt: str, last: str, earlier: str) -> str:
    """Returns the prompt with ``last`` in place of its prefix; a prompt of one turn has no place for ``earlier``.

    2307.12950 section 4. Raises UserError when the prompt is no prompt of this task.
    """
    return outline_prompt(premise_of(prompt), last)


def outline_messages(prompt: str) -> list[dict[str, str]]:
    """Returns a prompt as a user's message, which asks for the prefix. Raises UserError when it is none."""
    premise, prefix = _split_prompt(prompt)
    request = f"{_REQUEST.removeprefix(HUMAN).strip()} {premise}"
    return [{"role": "user", "content": f"{request}\n\nBegin with these words, and number the points: {prefix}"}]


def clean_outline(raw: str) -> str | None:
    """Returns the outline from its first point on, or None when it must be sampled again.

    The filter of dialogues, as in 2307.12950. Where the reply repeats a prefix up to "1.", that is cut off. The form is
    not asked for: a filter for it would hide what the contrast of form is about.
    """
    reply = clean_hh_reply(raw)
    return None if reply is None else re.sub(r"\A(?:[^\n]*:\s*)?1\.(?:\s+|\Z)", "", reply) or None


def outline_points(reply: str) -> list[tuple[int, str]]:
    """Returns (number, text) of the points of a reply, whose first point has its number in the prompt."""
    pieces = re.split(r"^[ \t]*(\d{1,4})\.(?=\s|$)", f"{_FIRST_POINT} {reply}", flags=re.MULTILINE)
    return [(int(number), text.strip()) for number, text in zip(pieces[1::2], pieces[2::2], strict=True)]


def outline_metrics(prompt: str, reply: str) -> dict[str, float]:
    """Returns what can be counted of an outline.

    ``points`` and ``words`` are numbers. ``well_formed`` is 1 when there are two points or more, numbered without a
    gap, none empty and none said twice. ``premise_words`` is the share of the premise's words of four letters or more
    that the outline uses. ``distinct_words`` is the share of different words among its words.
    """
    points, words = outline_points(reply), _words(reply)
    texts = [" ".join(_words(text)) for _, text in points]
    numbered = [number for number, _ in points] == list(range(1, len(points) + 1))
    asked = {word for word in _words(premise_of(prompt)) if len(word) >= 4}
    return {
        "points": len(points),
        "words": len(words),
        "well_formed": float(len(points) > 1 and numbered and all(texts) and len(set(texts)) == len(texts)),
        "premise_words": len(asked & set(words)) / max(len(asked), 1),
        "distinct_words": len(set(words)) / max(len(words), 1),
    }


def well_formed_score(prompt: str, reply: str) -> float:
    """Returns 1 when an outline is well-formed, as ``outline_metrics`` says, else 0."""
    return outline_metrics(prompt, reply)["well_formed"]


def _words(text: str) -> list[str]:
    """Returns the words of a text in lower case."""
    return re.findall(r"[^\W\d_]+", text.casefold())


def _check_split(split: str) -> None:
    """Raises UserError when there is no such split."""
    if split not in SPLITS:
        raise UserError(f"premises have no split {split!r}; they have {', '.join(SPLITS)}")


def _check_prefix(name: str, prefix: str) -> None:
    """Raises UserError when a reply cannot begin so: it must end in "1.", and hold no role marker."""
    if not prefix.endswith(_FIRST_POINT) or f"{ASSISTANT}:" in prefix or HUMAN in prefix or prefix != prefix.strip():
        raise UserError(f"{name}={short_repr(prefix)} is no beginning of a reply; give words that end in "
                        f"{_FIRST_POINT!r} and hold no role marker")  # fmt: skip


def outline_task(premises: str = "", material: str = "") -> Task:
    """Returns the task of outlines; ``premises`` is the path of a file, and without one the grammar makes them.

    ``material`` is the path of a JSON file of other words (``prompt_material``), whose affixes are prefixes. Raises
    UserError when it is malformed, and when a prefix does not end in "1.".
    """
    words = _read_words(material) if material else outline_material(OUTLINE_PREFIX)
    source: Source = PremiseFile(premises, words.reply_prefix) if premises else Premises(words.reply_prefix)
    return Task(
        name="outline",
        source=source,
        format=DIALOGUE_FORMAT,
        clean=clean_outline,
        affixes=words.affixes,
        contrast=contrast_outline,
        template=Template(
            before="",
            between=f" Write another outline of it.{ASSISTANT}: {words.reply_prefix}",
            question=f" Which of your two outlines is better, the first or the second?{ASSISTANT}: The",
            answer=" first",
            other=" second",
        ),
        score=well_formed_score,
        messages=outline_messages,
        questions=words.questions,
        evaluation_questions=words.evaluation_questions,
        material_digest=words.digest,
    )


def _read_words(path: str) -> PromptMaterial:
    """Returns the words of a file; the task's own questions, where they stay, show the file's prefix."""
    prefix = read_prompt_material(path, outline_material(OUTLINE_PREFIX)).reply_prefix
    words = read_prompt_material(path, outline_material(prefix))
    _check_prefix(f"{path}: reply_prefix", words.reply_prefix)
    for i, pair in enumerate(words.affixes):
        for j, side in enumerate(pair):
            _check_prefix(f"{path}: affixes[{i}][{j}]", side)
    return words
