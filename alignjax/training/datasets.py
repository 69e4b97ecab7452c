"""A task's data as TFDS datasets, for whoever reads them with TFDS: HH dialogues, and premises of outlines.

``tfds.data_source("hh_rlhf", split="train", data_dir=folder)`` reads what was written. Training here needs none of it:
tasks read their own files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from alignjax.errors import UserError
from alignjax.tasks.dialogue import Dialogues, dialogue_statistics
from alignjax.tasks.outline import PremiseFile, Premises, outline_prompt
from alignjax.tasks.task import SPLITS
from alignjax.training import data

HH_RLHF = data.DatasetForm(
    "hh_rlhf",
    "Anthropic's HH dialogues (2204.05862): a prompt, and its replies that people preferred and rejected. Where "
    "same_prompt is false, the rejected reply answers another prompt.",
    {"prompt": "text", "chosen": "text", "rejected": "text", "line": "int", "same_prompt": "bool"},
)
"""``line`` is the line number in the file of the split: of the training file for train, else of the test file."""
OUTLINE_PREMISES = data.DatasetForm(
    "outline_premises",
    "Premises of stories, and the prompts that ask for their outlines (2307.12950 section 4).",
    {"premise": "text", "prompt": "text", "number": "int"},
)
"""``number`` counts the premises of a split from 0."""


def write_dialogues(folder: Path, source: Dialogues) -> dict[str, dict[str, float]]:
    """Writes the dialogues of a source as ``hh_rlhf``; returns split -> ``dialogue_statistics``, also its metadata.

    The splits are those of the source's prompts: a prompt of validation or test is not in train. Splits whose file is
    not named are left out. Raises UserError when neither file is named, when a file cannot be read, when a line is
    malformed and the source does not skip it, and when a split is empty.
    """
    named = {"train": source.train, "validation": source.test, "test": source.test}
    splits = {split: source.pairs(split) for split in SPLITS if named[split]}
    if not splits:
        raise UserError("no file of dialogues is named; give Dialogues a ``train`` or a ``test``")
    if empty := [split for split, pairs in splits.items() if not pairs]:
        raise UserError(f"{named[empty[0]]} holds no dialogue of the {empty[0]} split; give a file with more dialogues")
    figures = {split: dialogue_statistics(pairs) for split, pairs in splits.items()}
    rows = {split: [pair._asdict() for pair in pairs] for split, pairs in splits.items()}
    files = {"train": source.train, "test": source.test, "digests": list(source.digests), "held_out": source.held_out}
    data.write_dataset(folder, HH_RLHF, rows, {"files": files, "figures": figures})
    return figures


def write_premises(
    folder: Path, source: Premises | PremiseFile, counts: Mapping[str, int], seed: int
) -> dict[str, dict[str, float]]:
    """Writes up to ``counts`` premises a split as ``outline_premises``; returns split -> figures, also its metadata.

    The figures are the number of premises and their shortest, mean and longest length in words. Raises UserError as
    ``source.premises`` does, and when ``counts`` names no split or a count below 1.
    """
    if not counts or min(counts.values()) < 1:
        raise UserError(f"counts={dict(counts)!r} asks for nothing; give numbers of premises from 1 by split")
    rows: dict[str, list[dict[str, Any]]] = {}
    for split, count in counts.items():
        premises = source.premises(split, count, seed)
        rows[split] = [
            {"premise": premise, "prompt": outline_prompt(premise, source.prefix), "number": number}
            for number, premise in enumerate(premises)
        ]
    figures = {split: _premise_statistics([row["premise"] for row in part]) for split, part in rows.items()}
    data.write_dataset(folder, OUTLINE_PREMISES, rows, {"seed": seed, "figures": figures})
    return figures


def _premise_statistics(premises: list[str]) -> dict[str, float]:
    """Returns the number of premises and their lengths in words."""
    words = [len(premise.split()) for premise in premises]
    return {
        "premises": len(words),
        "shortest": min(words),
        "mean_words": sum(words) / len(words),
        "longest": max(words),
    }
