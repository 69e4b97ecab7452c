"""A finished stage's preference pairs as a file that other libraries read: JSON lines or parquet."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.distributed import storage
from alignjax.errors import UserError
from alignjax.pipeline.description import describe
from alignjax.pipeline.store import read_record
from alignjax.tasks import parquet
from alignjax.tasks.dialogue_format import dialogue_messages
from alignjax.tasks.json_lines import Comparison
from alignjax.tasks.task import Messages, one_message
from alignjax.training import data

_MESSAGES: tuple[Messages, ...] = (one_message, dialogue_messages)  # the package's own; a record names a task's


class PairForm(NamedTuple):
    """How a pair stands in a row."""

    labels: bool  # {prompt, first, second, p}, p = P(first is preferred); else {prompt, chosen, rejected}
    messages: bool  # prompt, chosen and rejected are lists of {role, content}, not texts


def has_pairs(stage: Path) -> bool:
    """Returns whether the folder is of a stage that makes pairs."""
    return any(True for _ in storage.list_files(stage / data.PAIR_DATA))


def export_pairs(stage: Path, file: Path, split: str, form: PairForm) -> str:
    """Writes a split of the pairs of ``stage`` = WORKDIR/NAME as FILE.jsonl or FILE.parquet; returns a line on it.

    Rows stand as the dataset has them, shuffled. {prompt, first, second, p} keeps every pair as it is, so ``LoadPairs``
    reads back the same pairs. {prompt, chosen, rejected} keeps which reply won and not which stood first: read back,
    the winner is the first.

    Raises UserError when the stage is not finished or has no such split, when the file exists or has another name, when
    a label is soft where none can stand, and when it is not known how the task's prompts become messages.
    """
    if file.suffix not in (".jsonl", parquet.SUFFIX):
        raise UserError(f"{stage} holds pairs; name a file that ends in .jsonl or {parquet.SUFFIX}, not {file}")
    if file.exists():
        raise UserError(f"{file} exists; choose another file")
    rows = pair_rows(stage, split, form)
    if file.suffix == parquet.SUFFIX:
        parquet.write_parquet(file, rows)
    else:
        file.parent.mkdir(parents=True, exist_ok=True)
        storage.write_atomic(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return f"{file}: {len(rows)} pairs of the split {split}, as {{{', '.join(rows[0])}}}"


def pair_rows(stage: Path, split: str, form: PairForm) -> list[dict[str, Any]]:
    """Returns the rows of a split. Raises UserError as ``export_pairs`` does."""
    record = read_record(stage)
    if not record.get("finished"):
        raise UserError(f"{stage} is not finished; run it first")
    if record["config"]["kind"] == "LoadReplies":
        raise UserError(f"{stage} holds replies that stand alone, as its file does; name a stage of pairs")
    pairs = data.read_pairs(stage / data.PAIR_DATA, split)
    if form.labels:
        return [{name: pair[name] for name in Comparison._fields} for pair in pairs]
    rows = _preferred_rows(pairs, stage)
    if form.messages:
        messages = task_messages(record, stage)
        rows = [chat_row(row, messages) for row in rows]
    return rows


def _preferred_rows(pairs: list[dict[str, Any]], stage: Path) -> list[dict[str, Any]]:
    """Returns rows {prompt, chosen, rejected}. Raises UserError when a label is soft."""
    if soft := sum(0 < pair["p"] < 1 for pair in pairs):
        raise UserError(f"{soft} of the {len(pairs)} labels of {stage} are soft, for which chosen and rejected have no "
                        "place; add --labels")  # fmt: skip
    sides = [("first", "second") if pair["p"] else ("second", "first") for pair in pairs]
    return [
        {"prompt": pair["prompt"], "chosen": pair[chosen], "rejected": pair[rejected]}
        for pair, (chosen, rejected) in zip(pairs, sides, strict=True)
    ]


def chat_row(row: Mapping[str, str], messages: Messages) -> dict[str, Any]:
    """Returns a row {prompt, chosen, rejected} of texts as one of chats. Raises UserError as ``messages`` does."""
    replies = {name: [{"role": "assistant", "content": row[name]}] for name in ("chosen", "rejected")}
    return {"prompt": list(messages(row["prompt"])), **replies}


def task_messages(record: Mapping[str, Any], stage: Path) -> Messages:
    """Returns how the task of a stage's record turns prompts into messages.

    Raises UserError where that is a function outside this package: a work folder holds its name and not its code.
    """
    name = (record.get("task") or {}).get("messages")
    for function in _MESSAGES:
        if describe(function) == name:
            return function
    raise UserError(f"{stage} was made with a task whose messages={name} is not this package's; leave out --messages")
