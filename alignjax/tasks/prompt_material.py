"""The words of a task as data: affixes, questions for raters, the first words of a reply.

A JSON file can replace any of them, so that a study can run on somebody else's words. docs/prompt_material.md has the
format.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from alignjax.distributed import storage
from alignjax.errors import UserError, short_repr
from alignjax.tasks.json_lines import file_digest, parse_object, read_text_file
from alignjax.tasks.task import Affixes, Template

_REQUIRED = ("between", "question", "answer", "other")
"""Fields of a question; ``before`` and ``preamble`` may be left out."""


@dataclasses.dataclass(frozen=True)
class PromptMaterial:
    """What a task says, beside its prompts."""

    affixes: Affixes = ()  # what contrasts two prompts (2307.12950 section 3)
    questions: tuple[Template, ...] = ()  # how a rater is asked for the quality of each affix pair
    # quality -> how a rater judges policies
    evaluation_questions: dict[str, Template] = dataclasses.field(default_factory=dict)
    reply_prefix: str = ""  # with which every reply begins, where a task has one; the affixes replace it
    digest: str = ""  # of the file that replaced some of it


def read_prompt_material(path: str, own: PromptMaterial = PromptMaterial()) -> PromptMaterial:
    """Returns a task's ``own`` material with the fields of a JSON file in place of its fields.

    Affixes come with their questions: a file of affixes says ``"questions": []`` where it has none, because the task's
    questions belong to its own affixes. Raises UserError, which names the file and the field, when the file cannot be
    read, is no JSON object, or has an unknown or malformed field.
    """
    text = read_text_file(path, "a JSON file of prompt material")
    try:
        fields = parse_object(text)
    except ValueError as error:
        raise UserError(f"{path} {error}; give a JSON file of prompt material") from None
    if unknown := [name for name in fields if name not in _READ]:
        raise UserError(f"{path} has an unknown field {short_repr(unknown[0])}; its fields are {', '.join(_READ)}")
    if not fields:
        raise UserError(f"{path} has no field; give one of {', '.join(_READ)}")
    if "affixes" in fields and "questions" not in fields:
        raise UserError(f'{path} has affixes and no questions; give one question for each pair, or "questions": []')
    try:
        found = dataclasses.replace(own, **{name: _READ[name](value, name) for name, value in fields.items()})
    except ValueError as error:
        raise UserError(f"{path}: {error}; correct it") from None
    if found.questions and len(found.questions) != len(found.affixes):
        raise UserError(f"{path}: questions has {len(found.questions)} items for {len(found.affixes)} affix pairs; "
                        "give one for each pair, in their order, or none")  # fmt: skip
    return dataclasses.replace(found, digest=file_digest(path))


def write_prompt_material(path: str, material: PromptMaterial) -> None:
    """Writes a file that ``read_prompt_material`` reads. Fields that are empty are left out.

    Raises UserError when the file cannot be written.
    """
    fields: dict[str, Any] = {
        "affixes": material.affixes,
        "questions": [question._asdict() for question in material.questions],
        "evaluation_questions": {name: q._asdict() for name, q in material.evaluation_questions.items()},
        "reply_prefix": material.reply_prefix,
    }
    kept = {name: value for name, value in fields.items() if value or (name == "questions" and material.affixes)}
    try:
        storage.write_atomic(Path(path), json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({storage.short_reason(error)}); give another path") from None


def _read_text(value: Any, name: str) -> str:
    """Returns a text that is not blank. Raises ValueError, as the functions below do, with words for a message."""
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name} is {short_repr(value)}, which is no text")
    return value


def _read_affixes(value: Any, name: str) -> Affixes:
    """Returns the affix pairs of a list of lists of two different texts."""
    pairs = []
    for i, pair in enumerate(_read_list(value, name)):
        if not isinstance(pair, list) or len(pair) != 2:
            raise ValueError(f"{name}[{i}] is {short_repr(pair)}, which is no pair [positive, negative]")
        positive, negative = (_read_text(side, f"{name}[{i}][{j}]") for j, side in enumerate(pair))
        if positive == negative:
            raise ValueError(f"{name}[{i}] has two equal sides, which contrast nothing")
        pairs.append((positive, negative))
    if not pairs:
        raise ValueError(f"{name} is empty")
    return tuple(pairs)


def _read_questions(value: Any, name: str) -> tuple[Template, ...]:
    """Returns the questions of a list."""
    return tuple(_read_question(part, f"{name}[{i}]") for i, part in enumerate(_read_list(value, name)))


def _read_named_questions(value: Any, name: str) -> dict[str, Template]:
    """Returns the questions of an object, by quality."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {short_repr(value)}, which is no object of questions")
    if bad := [key for key in value if not key or "." in key]:
        raise ValueError(f"{name} has the name {short_repr(bad[0])}; a name is a text without a dot")
    return {key: _read_question(part, f"{name}.{key}") for key, part in value.items()}


def _read_question(value: Any, name: str) -> Template:
    """Returns the question of an object with the fields of a Template."""
    if not isinstance(value, dict):
        raise ValueError(f"{name} is {short_repr(value)}, which is no object")
    if unknown := [field for field in value if field not in Template._fields]:
        raise ValueError(f"{name} has an unknown field {short_repr(unknown[0])}; "
                         f"a question has {', '.join(Template._fields)}")  # fmt: skip
    if missing := [field for field in _REQUIRED if field not in value]:
        raise ValueError(f"{name} has no {missing[0]!r}")
    texts = {field: _read_text(value[field], f"{name}.{field}") for field in _REQUIRED}
    for field in ("before", "preamble"):
        if not isinstance(text := value.get(field, ""), str):
            raise ValueError(f"{name}.{field} is {short_repr(text)}, which is no text")
        texts[field] = text
    if texts["answer"] == texts["other"]:
        raise ValueError(f"{name} has two equal answers")
    return Template(**texts)


def _read_list(value: Any, name: str) -> list[Any]:
    """Returns a list."""
    if not isinstance(value, list):
        raise ValueError(f"{name} is {short_repr(value)}, which is no list")
    return value


_READ: dict[str, Any] = {
    "affixes": _read_affixes,
    "questions": _read_questions,
    "evaluation_questions": _read_named_questions,
    "reply_prefix": _read_text,
}
"""Field -> the function that reads its value."""
