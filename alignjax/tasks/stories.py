"""Stories continued from their openings, under two principles whose oracles depend on no model.

``girl``: a story about a girl. The affixes are sentences that name a girl or a boy; the oracle counts pronouns.
``happy``: a happy story. The affixes are open-ended happy or sad sentences; the oracle is the VADER lexicon (the extra
dependency ``stories``). Affixes are appended to the opening for generation alone: the policy is trained on the plain
opening.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from collections.abc import Sequence
from functools import lru_cache

from alignjax.errors import UserError, short_repr
from alignjax.tasks.json_lines import Row, file_digest, read_rows, read_text_file, require_text
from alignjax.tasks.task import EOS, SPLITS, Affixes, Format, Score, Task, Template, oracle_from_score, shuffled

_AFFIXES: dict[str, Affixes] = {
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
_TEMPLATES = {
    "girl": Template(before="", between="\nOr:", question="\nMore about a girl:", answer=" a"),
    "happy": Template(before="", between="\nOr:", question="\nThe happy one:", answer=" a"),
}
_QUESTIONS = {
    "girl": Template("", "\nOr b:", "\nThe one that is more about a girl, a or b:", answer=" a", other=" b"),
    "happy": Template("", "\nOr b:", "\nThe happy one, a or b:", answer=" a", other=" b"),
}


@dataclasses.dataclass(frozen=True)
class Openings:
    """A file of openings, and one of stories to pretrain on, with digests so that a changed file is noticed."""

    path: str  # JSON lines {"prompt": opening, "story": the story's number}
    documents: str = ""  # a text file, plain or gzip, of stories with <|endoftext|> behind each
    digest: str = dataclasses.field(init=False)
    documents_digest: str = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digest", file_digest(self.path))
        object.__setattr__(self, "documents_digest", file_digest(self.documents))

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Returns up to ``count`` distinct openings of a split, shuffled by the seed.

        Raises UserError when there is no such split, when the file cannot be read, and when it holds no such opening.
        """
        splits = read_openings(self.path, self.digest)
        if split not in splits:
            raise UserError(f"stories have no split {split!r}; they have {', '.join(splits)}")
        openings = list(dict.fromkeys(splits[split]))
        if not openings:
            raise UserError(f"{self.path} holds no opening of the {split} split; give a file with more stories")
        return shuffled(openings, count, seed)


def stories_corpus(source: Openings, count: int, seed: int) -> Sequence[str]:
    """Returns up to ``count`` stories of ``source.documents``, shuffled by the seed.

    Stories that begin as a held-out opening does are left out. Raises UserError when no documents are named or they
    cannot be read.
    """
    if not source.documents:
        raise UserError(
            "stories have no corpus to pretrain on; give documents=PATH, or start from a LoadCheckpoint stage"
        )
    splits = read_openings(source.path, source.digest)
    held_out = tuple({*splits["validation"], *splits["test"]})
    stories = read_stories(source.documents, source.documents_digest)
    return shuffled([story for story in stories if not story.startswith(held_out)], count, seed)


@lru_cache(maxsize=4)
def read_openings(path: str, digest: str = "") -> dict[str, list[str]]:
    """Returns split -> openings of a file of rows {"prompt": opening, "story": number}.

    Openings of one story share a prefix, so all are in one split. Results are cached; another ``digest`` means that the
    file was edited and is read again. Raises UserError when the file cannot be read or holds no opening to train on,
    and on the first line of another form.
    """
    splits: dict[str, list[str]] = {split: [] for split in SPLITS}
    for split, opening in read_rows(path, "openings", _read_opening):
        splits[split].append(opening)
    if not splits["train"]:
        raise UserError(f"{path} holds no openings to train on; give a JSON-lines file with more stories")
    return splits


def _read_opening(row: Row) -> tuple[str, str]:
    """Returns (split, opening) of a row. Raises KeyError or ValueError on another form."""
    opening, number = require_text(row, "prompt"), row["story"]
    try:
        story = int(number)
    except (TypeError, ValueError, OverflowError):
        story = None
    if story is None or isinstance(number, bool) or (isinstance(number, float) and number != story):
        raise ValueError(f"has 'story' {short_repr(number)}, which is no whole number")
    return {0: "test", 1: "test", 2: "validation"}.get(story % 10, "train"), opening


@lru_cache(maxsize=2)
def read_stories(path: str, digest: str = "") -> list[str]:
    """Returns the stories of a text file in which <|endoftext|> follows each.

    Results are cached; another ``digest`` means that the file was edited and is read again. Raises UserError when the
    file cannot be read or holds no whole story.
    """
    text = read_text_file(path, "a text file of stories")
    stories = [story.strip() for story in text.split("<|endoftext|>")[:-1] if story.strip()]
    if not stories:
        raise UserError(f"{path} holds no whole story; put <|endoftext|> behind each")
    return stories


def append_affix(prompt: str, last: str, earlier: str) -> str:
    """Returns the prompt with the affix ``last`` behind it; a prompt of one turn has no place for ``earlier``."""
    return prompt + last


def clean_story(raw: str) -> str | None:
    """Returns the story up to its end marker, or None when nothing is left."""
    text = re.split(r"</?s>", raw)[0].rstrip()
    return text if text.strip() else None


def girl_score(prompt: str, text: str) -> float:
    """Returns count(she, her, girl) - count(he, his, him, boy) of the words of the continuation."""
    words = re.findall(r"[a-z]+", text.lower())
    return float(sum(w in ("she", "her", "girl") for w in words) - sum(w in ("he", "his", "him", "boy") for w in words))


@lru_cache(maxsize=1)
def _sentiment_analyzer():
    """Returns VADER's analyzer. Raises UserError when the package is not installed."""
    try:
        module = importlib.import_module("vaderSentiment.vaderSentiment")
    except ImportError:
        raise UserError("the happy principle needs vaderSentiment; pip install 'alignjax[stories]'") from None
    return module.SentimentIntensityAnalyzer()


def happy_score(prompt: str, text: str) -> float:
    """Returns VADER's compound sentiment of the continuation, in [-1, 1] (Hutto and Gilbert 2014)."""
    return float(_sentiment_analyzer().polarity_scores(text)["compound"])


_SCORES: dict[str, Score] = {"girl": girl_score, "happy": happy_score}


def stories_task(openings: str, principle: str = "girl", documents: str = "") -> Task:
    """Returns the task of continuing the openings of a file; ``documents`` are stories to pretrain on.

    Raises UserError when the principle is not "girl" or "happy", and when a file cannot be read or has another form.
    """
    if principle not in _SCORES:
        raise UserError(f"principle={principle!r} is unknown; choose one of {', '.join(_SCORES)}")
    if principle == "happy":
        _sentiment_analyzer()  # a missing package is reported before the run, not after an hour of it
    source = Openings(openings, documents)
    read_openings(openings, source.digest)
    if documents:
        read_stories(documents, source.documents_digest)
    score = _SCORES[principle]
    return Task(
        name=f"stories-{principle}",
        source=source,
        format=Format(before="", end="", stop=(EOS, "<s>")),
        clean=clean_story,
        affixes=_AFFIXES[principle],
        contrast=append_affix,
        template=_TEMPLATES[principle],
        oracles={"oracle": oracle_from_score(score)},
        score=score,
        corpus_of_source=stories_corpus,
        questions=(_QUESTIONS[principle],) * len(_AFFIXES[principle]),
    )
