"""Stories continued from their openings, under two principles whose judges know no model.

``girl``: a story about a girl. Affix sentences name a girl or a boy; the oracle counts pronouns.
``happy``: a happy story. Open-ended happy or sad affixes; the oracle is the VADER lexicon (an extra
dependency, ``stories``). Affixes are appended to the opening for generation alone: the policy is trained on
the plain opening.
"""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib
import json
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from alignjax.errors import UserError
from alignjax.tasks.task import EOS, Affixes, Format, Score, Task, Template, oracle_from_score

AFFIXES: dict[str, Affixes] = {
    "girl": (
        (" Her name was Lily. She was a girl.", " His name was Tim. He was a boy."),
        (" There was a girl called Mia. She was little.", " There was a boy called Ben. He was little."),
    ),
    "happy": (
        (
            " He had fun and smiled. He got a big hug. He felt happy and",
            " He fell down and got hurt. He was lost and scared. He felt sad and",
        ),
        (" It was so much fun. He smiled and felt happy and", " It was so scary. He cried and felt sad and"),
    ),
}
TEMPLATES = {
    "girl": Template(before="", between="\nOr:", question="\nMore about a girl:", answer=" a"),
    "happy": Template(before="", between="\nOr:", question="\nThe happy one:", answer=" a"),
}


@dataclasses.dataclass(frozen=True)
class Openings:
    """A file and what was in it when the experiment was made, so that a changed file is noticed."""

    path: str
    sha256: str
    documents: str = ""  # a text file, plain or gzip, of stories with <|endoftext|> behind each
    documents_sha256: str = ""

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Openings of the split, shuffled by the seed; all of them when there are fewer than ``count``."""
        splits = read_openings(self.path, self.sha256)
        if split not in splits:
            raise UserError(f"stories have no split {split!r}; they have {', '.join(splits)}")
        found = list(dict.fromkeys(splits[split]))
        if not found:
            raise UserError(f"{self.path} holds no opening of the {split} split; give a file with more stories")
        return [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:count]]

    def corpus(self, count: int, seed: int) -> Sequence[str]:
        """The stories of ``documents``, shuffled by the seed, but for those that begin as a held-out opening does."""
        if not self.documents:
            raise UserError("stories bring no corpus to pretrain on; give one, or start from a Pretrained stage")
        splits = read_openings(self.path, self.sha256)
        held_out = tuple({*splits["validation"], *splits["test"]})
        found = [
            story for story in read_stories(self.documents, self.documents_sha256) if not story.startswith(held_out)
        ]
        return [found[i] for i in np.random.default_rng(seed).permutation(len(found))[:count]]


@lru_cache(maxsize=4)
def read_openings(path: str, mark: str = "") -> dict[str, list[str]]:
    """Rows {"prompt", "story"} -> split -> openings. A story's rows share a split: they share a prefix.

    Raises UserError when the file is missing, empty or malformed, with the line.
    """
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a JSON-lines file of openings") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            text, story = row["prompt"], int(row["story"])
            if not isinstance(text, str) or not text.strip():
                raise ValueError
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}, line {number} is not {{"prompt": text, "story": number}}; mend it') from None
        splits[{0: "test", 1: "test", 2: "validation"}.get(story % 10, "train")].append(text)
    if not splits["train"]:
        raise UserError(f"{path} holds no openings; give a JSON-lines file of them")
    return splits


@lru_cache(maxsize=2)
def read_stories(path: str, mark: str = "") -> list[str]:
    """Raises UserError when the file is missing or holds none. ``mark`` tells an edited file from one read before."""
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if path.endswith(".gz") else raw).decode("utf-8")
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); give a text file of stories") from None
    found = [story.strip() for story in text.split("<|endoftext|>")[:-1] if story.strip()]
    if not found:
        raise UserError(f"{path} holds no whole story; put <|endoftext|> behind each")
    return found


def append_affix(prompt: str, last: str, earlier: str) -> str:
    """An opening has one turn: the affix of the last one is put behind it."""
    return prompt + last


def clean_story(raw: str) -> str | None:
    """The story up to its end marker; nothing left is a failure."""
    text = re.split(r"</?s>", raw)[0].rstrip()
    return text if text.strip() else None


def girl(prompt: str, text: str) -> float:
    """Pronouns: count(she, her, girl) - count(he, his, him, boy) in the continuation."""
    words = re.findall(r"[a-z]+", text.lower())
    return float(sum(w in ("she", "her", "girl") for w in words) - sum(w in ("he", "his", "him", "boy") for w in words))


@lru_cache(maxsize=1)
def sentiment():
    try:
        module = importlib.import_module("vaderSentiment.vaderSentiment")
    except ImportError:
        raise UserError("the happy principle needs vaderSentiment; pip install 'alignjax[stories]'") from None
    return module.SentimentIntensityAnalyzer()


def happy(prompt: str, text: str) -> float:
    """VADER's compound sentiment of the continuation, in [-1, 1] (Hutto and Gilbert 2014)."""
    return float(sentiment().polarity_scores(text)["compound"])


SCORES: dict[str, Score] = {"girl": girl, "happy": happy}


def task(openings: str, principle: str = "girl", documents: str = "") -> Task:
    """Raises UserError on an unknown principle or a bad file. ``documents``: stories to pretrain on."""
    if principle not in SCORES:
        raise UserError(f"principle={principle!r} is unknown; choose one of {', '.join(SCORES)}")
    if principle == "happy":
        sentiment()  # a missing dependency is told before an hour of work
    score = SCORES[principle]
    read_openings(openings)
    if documents:
        read_stories(documents)
    marks = [hashlib.sha256(Path(p).read_bytes()).hexdigest()[:16] if p else "" for p in (openings, documents)]
    return Task(
        name=f"stories-{principle}",
        source=Openings(openings, marks[0], documents, marks[1]),
        affixes=AFFIXES[principle],
        contrast=append_affix,
        clean=clean_story,
        format=Format(before="", end="", stop=(EOS, "<s>")),
        template=TEMPLATES[principle],
        oracles={"oracle": oracle_from_score(score)},
        score=score,
    )
