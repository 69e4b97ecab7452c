"""Posts to summarise: the TL;DR task of 2009.01325 and of Nash learning's experiments (2312.00886 section 8).

Posts are JSON lines {"post" or "text": ..., "summary": a person's}, with "title" and "subreddit" where there are any,
or {"prompt", "completion"} whose prompt is a ``TLDR_QUERY``. Comparisons are in the published form
(``read_tldr_comparison``) or {"prompt", "first", "second", "p"} (``json_lines.read_comparison``). Published summaries
begin with a space: it is stripped, and ``Format.before`` puts one before every summary.

A query is a template over the fields of a post: {subreddit}, {title}, {post}, and {text}, which is the post below its
title where it has one. A query that is too long is asked with less of its post (``shorten_query``).

People compared the summaries: the task has no affixes, no oracle and no score.
"""

from __future__ import annotations

import bisect
import dataclasses
import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

from alignjax.errors import UserError, short_repr
from alignjax.tasks.json_lines import Comparison, Demonstration, Row, file_digest, read_rows, require_text
from alignjax.tasks.task import EOS, SPLITS, Fits, Format, Task, Template, shuffled

T5_QUERY = "summarize: {text}"
"""The prefix with which 1910.10683 trained T5 to summarise."""
TLDR_QUERY = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
"""The query of 2009.01325, which 2403.17031 and most of the field ask."""
PLAIN_QUERY = "{text}\n\nTL;DR:"
"""For a language model: many posts of its training data end so."""
CHAT_QUERY = "Write a short summary, one or two sentences, of this post.\n\n{text}"
"""For a chat model."""
HIGH_CONFIDENCE = (1, 2, 8, 9)
"""The confidences, from 1 to 9, that are called high in comparisons of 2009.01325 (2309.00267, footnote 4)."""
_FIELD = re.compile(r"\{(\w+)\}")
_LONGEST_TITLE = 300  # characters, of the site
_PARTS = {
    "subreddit": ".*?",
    "title": ".*?",
    "post": "(?P<post>.*)",
    "text": rf"(?:[^\n]{{1,{_LONGEST_TITLE}}}\n\n)?(?P<post>.*)",
}
"""Regular expressions of what stands in a query's fields. A first line before a blank one may be a title."""
_PUBLISHED = re.compile(r"SUBREDDIT: r/(.*?)\n\nTITLE: (.*?)\n\nPOST: (.*)\n\nTL;DR:", re.DOTALL)
RATER_QUESTION = Template(
    preamble="A rater of summaries reads a text and two summaries of it. The better one says what matters in the text, "
    "says it correctly, and is short. The rater answers with its number, 1 or 2.\n\nText: ",
    before="\n\nSummary 1:",
    between="\n\nSummary 2:",
    question="\n\nPreferred Summary:",
    answer=" 1",
    other=" 2",
)
"""How a language model is asked (the fields of 2312.00886 in their order, in our words).

For tokenizers with tokens for " 1" and " 2", as T5's and GPT-NeoX's. Where a space is a token of its own, as in Llama,
end ``question`` with it and answer "1" and "2".
"""


class Post(NamedTuple):
    """A post, stripped; "" where it has no such field."""

    subreddit: str
    title: str
    post: str

    @property
    def text(self) -> str:
        """The post below its title, where it has one."""
        return f"{self.title}\n\n{self.post}" if self.title else self.post


@dataclasses.dataclass(frozen=True)
class Posts:
    """A file of posts for each split, with digests of what was in them.

    The files are read when prompts are asked for. Raises UserError when the query is none (``fill_query``).
    """

    train: str = ""
    validation: str = ""
    test: str = ""
    query: str = T5_QUERY  # the prompt: a template over the fields of a post
    digests: tuple[str, ...] = dataclasses.field(init=False)  # of the three files

    def __post_init__(self) -> None:
        fill_query(self.query, Post("", "", ""))
        object.__setattr__(self, "digests", tuple(map(file_digest, self._files().values())))

    def _files(self) -> dict[str, str]:
        """Returns split -> path."""
        return {"train": self.train, "validation": self.validation, "test": self.test}

    def prompts(self, split: str, count: int, seed: int) -> Sequence[str]:
        """Returns up to ``count`` distinct prompts of a split, shuffled by the seed.

        A post that is in a file before it (test, validation, train) is left out, whatever its subreddit. Raises
        UserError when there is no such split, when its file cannot be read, and when it holds no other post.
        """
        if split not in SPLITS:
            raise UserError(f"posts have no split {split!r}; they have {', '.join(SPLITS)}")
        earlier: set[str] = set()
        for name in ("test", "validation", "train"):
            if name == split:
                break
            earlier |= {post.text for post in self._read(name)} if self._files()[name] else set()
        posts: dict[str, Post] = {}
        for post in self._read(split):
            posts.setdefault(post.text, post)
        found = [post for text, post in posts.items() if text not in earlier]
        if not found:
            raise UserError(f"{self._files()[split]} holds no post that is not held out; give another file")
        return [fill_query(self.query, post) for post in shuffled(found, count, seed)]

    def shorten(self, prompt: str, fits: Fits) -> str | None:
        """Returns the prompt with less of its post (``shorten_query``)."""
        return shorten_query(self.query, prompt, fits)

    def _read(self, split: str) -> list[Post]:
        """Returns the posts of a split's file. Raises UserError as ``read_rows`` does."""
        return read_posts(self._files()[split], self.digests[list(self._files()).index(split)], self.query)


@lru_cache(maxsize=4)
def read_posts(path: str, digest: str = "", query: str = T5_QUERY) -> list[Post]:
    """Returns the post of every line of a file. Raises UserError as ``read_rows`` does.

    A post that lacks a field of the query is malformed. Results are cached; another ``digest`` means that the file was
    edited and is read again.
    """
    return read_rows(path, "posts", lambda row: _read_post(row, query))


def _read_post(row: Row, query: str) -> Post:
    """Returns a post with the fields of the query. Raises KeyError or ValueError without a text or a field."""
    if "prompt" in row and not {"post", "text"} & row.keys():
        found = _PUBLISHED.fullmatch(require_text(row, "prompt").strip())
        if found is None or not found[3].strip():
            raise ValueError("has a 'prompt' in another form than SUBREDDIT: r/..., TITLE: ..., POST: ..., TL;DR:")
        post = Post(*(part.strip() for part in found.groups()))
    else:
        text = require_text(row, "text" if "text" in row else "post").strip()
        post = Post(_optional_text(row, "subreddit"), _optional_text(row, "title"), text)
    missing = [name for name in _FIELD.findall(query) if not getattr(post, name)]
    if missing:
        raise ValueError(f"has no {missing[0]!r}, which the query shows")
    return post


def _optional_text(row: Row, name: str) -> str:
    """Returns a field, stripped; "" where it is missing or null. Raises ValueError when it is no text."""
    value = "" if row.get(name) is None else row[name]
    if not isinstance(value, str):
        raise ValueError(f"has a {name!r} that is no text")
    return value.strip()


def fill_query(query: str, post: Post) -> str:
    """Returns the prompt that asks for the summary of a post.

    Raises UserError when the query has no place for the post, or more than one, and when it names an unknown field.
    """
    names = _FIELD.findall(query)
    if unknown := set(names) - _PARTS.keys():
        raise UserError(f"query={query!r} holds {{{min(unknown)}}}; a post has {', '.join(_PARTS)}")
    if names.count("post") + names.count("text") != 1:
        raise UserError(f"query={query!r} does not hold {{post}} or {{text}}, where the post goes, once; put one in")
    return _FIELD.sub(lambda field: getattr(post, field[1]), query)


@lru_cache(maxsize=8)
def _query_pattern(query: str) -> re.Pattern[str]:
    """Returns the regular expression of the prompts that a query makes; the group "post" is what may be cut."""
    pieces = _FIELD.split(query)  # text, name, text, name, ..., text
    return re.compile("".join(_PARTS[s] if i % 2 else re.escape(s) for i, s in enumerate(pieces)), re.DOTALL)


def shorten_query(query: str, prompt: str, fits: Fits) -> str | None:
    """Returns the prompt with its post cut at the last newline with which it fits, or else at the last white space.

    What stands before and after the post is kept, and white space before the cut is dropped. None where not even the
    first word fits, and for a prompt of another form than the query's. (The rule is that of 2009.01325, which cuts
    between any two characters where we cut between words.)
    """
    found = _query_pattern(query).fullmatch(prompt)
    if found is None:
        return None
    head, post, tail = prompt[: found.start("post")], found["post"], prompt[found.end("post") :]
    gaps = [gap for gap in re.finditer(r"\s+", post) if gap.start()]
    for places in ([gap.start() for gap in gaps if "\n" in gap[0]], [gap.start() for gap in gaps]):
        # The number of places whose text fits; bisection tries the last of them.
        count = bisect.bisect_left(places, True, key=lambda place: not fits(f"{head}{post[:place]}{tail}"))
        if count:
            return f"{head}{post[: places[count - 1]]}{tail}"
    return None


def read_tldr_comparison(
    row: Row, query: str = T5_QUERY, confidence: Collection[int] = (), splits: Collection[str] = ()
) -> Comparison | None:
    """Returns the comparison of a row in the published form (2009.01325); ``query`` must be the task's.

    The form is {"info": post, "summaries": [{"text"}, {"text"}], "choice": 0 or 1, the index of the preferred one,
    "split": "train", "valid1" or "valid2", "extra": {"confidence": 1 to 9}}; the last two are read where they are asked
    for. Returns None, which a stage counts, for a row whose confidence or split is not among those that are given, and
    for one of a news article. Raises KeyError and ValueError on another form (``json_lines.ReadComparison``).
    """
    info, summaries, choice = row["info"], row["summaries"], row["choice"]
    if not isinstance(info, dict) or not isinstance(summaries, list) or len(summaries) != 2:
        raise ValueError("has no 'info' of a post, or not two 'summaries'")
    if not all(isinstance(summary, dict) for summary in summaries) or type(choice) is bool or choice not in (0, 1):
        raise ValueError("has 'summaries' without a text, or a 'choice' that is neither 0 nor 1")
    first, second = (require_text(summary, "text").strip() for summary in summaries)
    if info.get("article") and not info.get("post"):
        return None
    prompt = fill_query(query, _read_post(info, query))
    is_kept = (not splits or row["split"] in splits) and (not confidence or _read_confidence(row) in confidence)
    return Comparison(prompt, first, second, float(1 - choice)) if is_kept else None


def _read_confidence(row: Row) -> int | None:
    """Returns how sure the rater was, from 1 to 9; None where this was not asked. Raises ValueError on another form."""
    extra = row.get("extra") or {}
    value = extra.get("confidence") if isinstance(extra, dict) else extra
    if value is not None and (type(value) is not int or not 1 <= value <= 9):
        raise ValueError(f"has 'confidence' {short_repr(value)}, which is no whole number from 1 to 9")
    return value


def read_tldr_demonstration(row: Row, query: str = T5_QUERY) -> Demonstration:
    """Returns a post as the prompt that ``Posts`` makes of it, and the summary that a person wrote.

    The row is one of a file of posts; ``query`` must be the task's. Raises KeyError and ValueError on another form
    (``json_lines.ReadDemonstration``).
    """
    name = "completion" if "completion" in row and "summary" not in row else "summary"
    return Demonstration(fill_query(query, _read_post(row, query)), require_text(row, name).strip())


def summary_task(train: str = "", validation: str = "", test: str = "", query: str = T5_QUERY) -> Task:
    """Returns the task of summarising posts. Raises UserError when the query is none (``fill_query``).

    A preference model reads the text, both summaries and the question, and answers 1 or 2 (2312.00886 section 8, in our
    words).
    """
    return Task(
        name="summary",
        source=Posts(train, validation, test, query),
        format=Format(before=" ", end="", stop=(EOS,)),
        template=Template(
            before="\n\nA careful reader says which of two summaries of this is better.\nSummary 1:",
            between="\nSummary 2:",
            question="\nPreferred Summary: ",
            answer="1",
            other="2",
        ),
        shorten=Posts.shorten,
    )
