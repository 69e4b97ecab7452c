"""Posts to summarise: the TL;DR task of 2009.01325 and of Nash learning's experiments (2312.00886 section 8).

Posts are JSON lines {"post" or "text": ..., "summary": a person's}, with "title" where there is one. Comparisons are in
the published form (``read_tldr_comparison``) or {"prompt", "first", "second", "p"} (``json_lines.read_comparison``).
People compared the summaries: the task has no affixes, no oracle and no score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import lru_cache

from alignjax.errors import UserError
from alignjax.tasks.json_lines import Comparison, Demonstration, Row, file_digest, read_rows, require_text
from alignjax.tasks.task import EOS, SPLITS, Format, Task, Template, shuffled

_PLACEHOLDER = "{post}"
T5_INSTRUCTION = "summarize: {post}"
"""The prefix with which 1910.10683 trained T5 to summarise."""
TLDR_INSTRUCTION = "{post}\n\nTL;DR:"
"""For a language model: many posts of its training data end so."""
CHAT_INSTRUCTION = "Write a short summary, one or two sentences, of this post.\n\n{post}"
"""For a chat model."""


@dataclasses.dataclass(frozen=True)
class Posts:
    """A file of posts for each split, with digests of what was in them.

    The files are read when prompts are asked for. Raises UserError when the instruction has no place for the post.
    """

    train: str = ""
    validation: str = ""
    test: str = ""
    instruction: str = T5_INSTRUCTION  # the prompt; {post} stands for the post
    digests: tuple[str, ...] = dataclasses.field(init=False)  # of the three files

    def __post_init__(self) -> None:
        _fill_instruction(self.instruction, "")
        object.__setattr__(self, "digests", tuple(map(file_digest, self._files().values())))

    def _files(self) -> dict[str, str]:
        """Returns split -> path."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Returns up to ``count`` distinct prompts of a split, shuffled by the seed.

        A post that is in a file before it (test, validation, train) is left out. Raises UserError when there is no such
        split, when its file cannot be read, and when it holds no other post.
        """
        if split not in SPLITS:
            raise UserError(f"posts have no split {split!r}; they have {', '.join(SPLITS)}")
        earlier: set[str] = set()
        for name in ("test", "validation", "train"):
            if name == split:
                break
            earlier |= set(self._read(name)) if self._files()[name] else set()
        posts = [post for post in dict.fromkeys(self._read(split)) if post not in earlier]
        if not posts:
            raise UserError(f"{self._files()[split]} holds no post that is not held out; give another file")
        return [_fill_instruction(self.instruction, post) for post in shuffled(posts, count, seed)]

    def _read(self, split: str) -> list[str]:
        """Returns the posts of a split's file. Raises UserError as ``read_rows`` does."""
        return read_posts(self._files()[split], self.digests[list(self._files()).index(split)])


@lru_cache(maxsize=4)
def read_posts(path: str, digest: str = "") -> list[str]:
    """Returns the post of every line of a file. Raises UserError as ``read_rows`` does.

    Results are cached; another ``digest`` means that the file was edited and is read again.
    """
    return read_rows(path, "posts", _read_post)


def _read_post(row: Row) -> str:
    """Returns a post, with its title above it where there is one. Raises KeyError or ValueError without a text."""
    title = "" if row.get("title") is None else row["title"]
    if not isinstance(title, str):
        raise ValueError("has a 'title' that is no text")
    title = title.strip()
    post = require_text(row, "text" if "text" in row else "post").strip()
    return f"{title}\n\n{post}" if title else post


def _fill_instruction(instruction: str, post: str) -> str:
    """Returns the prompt that asks for the summary of a post. Raises UserError when it has no place for the post."""
    if _PLACEHOLDER not in instruction:
        raise UserError(f"instruction={instruction!r} does not hold {_PLACEHOLDER}, where the post goes; put it in")
    return instruction.replace(_PLACEHOLDER, post)


def read_tldr_comparison(row: Row, instruction: str = T5_INSTRUCTION) -> Comparison:
    """Returns the comparison of a row in the published form (2009.01325); ``instruction`` must be the task's.

    The form is {"info": post, "summaries": [{"text"}, {"text"}], "choice": 0 or 1, the index of the preferred one}.
    Raises KeyError and ValueError on another form (``json_lines.ReadComparison``).
    """
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise ValueError("has no 'info' of a post, or not two 'summaries'")
    if not all(isinstance(summary, dict) for summary in summaries) or type(choice) is bool or choice not in (0, 1):
        raise ValueError("has 'summaries' without a text, or a 'choice' that is neither 0 nor 1")
    first, second = (require_text(summary, "text").strip() for summary in summaries)
    return Comparison(_fill_instruction(instruction, _read_post(info)), first, second, float(1 - choice))


def read_tldr_demonstration(row: Row, instruction: str = T5_INSTRUCTION) -> Demonstration:
    """Returns a post as the prompt that ``Posts`` makes of it, and the summary that a person wrote.

    The row is one of a file of posts; ``instruction`` must be the task's. Raises KeyError and ValueError on another
    form (``json_lines.ReadDemonstration``).
    """
    return Demonstration(_fill_instruction(instruction, _read_post(row)), require_text(row, "summary").strip())


def summary_task(train: str = "", validation: str = "", test: str = "", instruction: str = T5_INSTRUCTION) -> Task:
    """Returns the task of summarising posts. Raises UserError when the instruction has no place for the post.

    A language model that compares two summaries sees both and answers 1 or 2 (2312.00886 section 8, in our words).
    """
    return Task(
        name="summary",
        source=Posts(train, validation, test, instruction),
        format=Format(before=" ", end="", stop=(EOS,)),
        template=Template(
            before="\n\nA careful reader says which of two summaries of this is better.\nSummary 1:",
            between="\nSummary 2:",
            question="\nThe better summary is number ",
            answer="1",
            other="2",
        ),
    )
