"""Posts to summarise: the TL;DR task of 2009.01325 and of Nash learning's experiments (2312.00886 section 8).

Posts are JSON lines {"post" or "text": ..., "summary": a person's}, with "title" where there is one; comparisons are
those of ``comparison``, the published form, or {"prompt", "first", "second", "p"} (``stages.GivenPairs``). There is no
contrast, no oracle and no score: people compared the summaries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from alignjax.errors import UserError
from alignjax.tasks.json_lines import Compared, Row, content, read_rows, text_of
from alignjax.tasks.task import EOS, Format, Task, Template

PLACE = "{post}"
ENCODER_DECODER = f"summarize: {PLACE}"
"""How a T5 is asked: by the prefix that 1910.10683 trained it with."""
DECODER = f"{PLACE}\n\nTL;DR:"
"""How a language model is asked, which has read many posts that end so."""
CHAT = f"Write a short summary, one or two sentences, of this post.\n\n{PLACE}"


@dataclasses.dataclass(frozen=True)
class Posts:
    """A file a split, and what was in them when the experiment was made. They are read when prompts are asked for."""

    train: str = ""
    validation: str = ""
    test: str = ""
    ask: str = ENCODER_DECODER  # the prompt, {post} for the post
    content: tuple[str, ...] = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        asked(self.ask, "")
        object.__setattr__(self, "content", tuple(map(content, self.files().values())))

    def files(self) -> dict[str, str]:
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Prompts of the split, shuffled by the seed; all of them when there are fewer than ``count``. One that an
        earlier of test, validation and train has is left out, where those files are named."""
        if split not in self.files():
            raise UserError(f"posts have no split {split!r}; they have {', '.join(self.files())}")
        earlier: set[str] = set()
        for name in ("test", "validation", "train"):
            if name == split:
                break
            earlier |= set(self.read(name)) if self.files()[name] else set()
        found = [post for post in dict.fromkeys(self.read(split)) if post not in earlier]
        if not found:
            raise UserError(f"{self.files()[split]} holds no post that is not held out; give another file")
        return [asked(self.ask, found[i]) for i in np.random.default_rng(seed).permutation(len(found))[:count]]

    def read(self, split: str) -> list[str]:
        return read_posts(self.files()[split], self.content[list(self.files()).index(split)])

    def corpus(self, count: int, seed: int) -> Sequence[str]:
        raise UserError("posts bring no corpus to pretrain on; start from a Pretrained stage")


@lru_cache(maxsize=4)
def read_posts(path: str, mark: str = "") -> list[str]:
    """The post of every line. ``mark`` tells an edited file from one read before. Raises UserError."""
    return read_rows(path, "posts", post_of)


def post_of(row: Row) -> str:
    """A post with its title above it, where it has one."""
    title, post = str(row.get("title") or "").strip(), text_of(row, "text" if "text" in row else "post").strip()
    return f"{title}\n\n{post}" if title else post


def asked(ask: str, post: str) -> str:
    """The prompt that asks for the summary of a post. Raises UserError when it does not say where that stands."""
    if PLACE not in ask:
        raise UserError(f"ask={ask!r} does not hold {PLACE}, where the post goes; put it in")
    return ask.replace(PLACE, post)


def comparison(row: Row, ask: str = ENCODER_DECODER) -> Compared:
    """A row of the published comparisons (2009.01325): {"info": post, "summaries": [{"text"}, {"text"}], "choice": 0 or
    1, the one that people preferred}. ``ask`` is the task's."""
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise ValueError("has no 'info' of a post, or not two 'summaries'")
    if not all(isinstance(summary, dict) for summary in summaries) or choice not in (0, 1):
        raise ValueError("has 'summaries' without a text, or a 'choice' that is neither 0 nor 1")
    first, second = (text_of(summary, "text").strip() for summary in summaries)
    return asked(ask, post_of(info)), first, second, float(1 - choice)


def clean(raw: str) -> str | None:
    """The summary; nothing is a failure."""
    return raw.strip() or None


def task(train: str = "", validation: str = "", test: str = "", ask: str = ENCODER_DECODER) -> Task:
    """Summaries of posts; a rater is shown both and says 1 or 2 (2312.00886 section 8, in our words)."""
    return Task(
        name="summary",
        source=Posts(train, validation, test, ask),
        affixes=(),
        contrast=with_affix,
        clean=clean,
        format=Format(before=" ", end="", stop=(EOS,)),
        template=Template(
            before="\n\nA careful reader says which of two summaries of this is better.\nSummary 1:",
            between="\nSummary 2:",
            question="\nThe better summary is number ",
            answer="1",
            other="2",
        ),
        oracles={},
        score=None,
    )


def with_affix(prompt: str, last: str, earlier: str) -> str:
    """How a task made of this one by giving it affixes would contrast."""
    return prompt + last
