"""The words of outlines: prefixes that contrast prompts, and questions for raters. The words are ours."""

from __future__ import annotations

from alignjax.tasks.dialogue_format import ASSISTANT, HUMAN
from alignjax.tasks.prompt_material import PromptMaterial
from alignjax.tasks.task import Template

OUTLINE_PREFIX = "This is an outline of the story:\n\n1."
"""The first words of every reply."""
_ROWS = (  # positive prefix, negative prefix, what the better outline does
    (
        "This is an outline of the story, full of surprise:\n\n1.",
        "This is an outline of the story, empty of surprise:\n\n1.",
        "is more interesting",
    ),
    (
        "This is an outline of the story, complete and well ordered:\n\n1.",
        "This is an outline of the story, incomplete and badly ordered:\n\n1.",
        "is better formed, with complete points in a good order",
    ),
    (
        "This is an outline of the story, true to its premise:\n\n1.",
        "This is an outline of the story, far from its premise:\n\n1.",
        "keeps closer to the premise",
    ),
)


def outline_material(prefix: str) -> PromptMaterial:
    """Returns the task's own words, whose questions show outlines that begin with the prefix."""
    return PromptMaterial(
        affixes=tuple((positive, negative) for positive, negative, _ in _ROWS),
        questions=tuple(_question(better, prefix) for _, _, better in _ROWS),
        evaluation_questions={
            "quality": _question("is better: more interesting, better formed and closer to the premise", prefix)
        },
        reply_prefix=prefix,
    )


def _question(better: str, prefix: str) -> Template:
    """Returns the question which of two outlines ``better`` is true of, asked as a further turn of the dialogue."""
    return Template(
        before="",
        between=f"\n\n{HUMAN} Write another outline of it.{ASSISTANT}: {prefix}",
        question=f"\n\n{HUMAN} Which of your two outlines {better}, the first or the second?{ASSISTANT}: The",
        answer=" first",
        other=" second",
    )
