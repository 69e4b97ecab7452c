"""A finished tournament's replies in the formats that public evaluators read: AlpacaEval, Arena-Hard, MT-bench.

A ``Tournament`` keeps in its folder, beside ``win_rates.json``:

- ``outputs.json``: a row a prompt, {"prompt", "messages", "replies": {policy: text}}. Replies are cleaned. Messages are
  the prompt as a chat, by the task's function; null where that refuses it.
- ``replies-<policy>.json``: raw texts and what was measured while they were written, as columns.
- ``judgments-<judge>.json``: {"policy", "other", "probability"} for every two policies, P(policy > other) a prompt.

Ids are digests of what they name, so the same tournament gives the same files.
"""

from __future__ import annotations

import collections
import hashlib
import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from alignjax.distributed import storage
from alignjax.errors import UserError

OUTPUTS, WIN_RATES = "outputs.json", "win_rates.json"
Files = dict[str, str]
"""Path in a folder -> text."""


def replies_file(policy: str) -> str:
    """Returns the name of the file of a policy's raw replies."""
    return f"replies-{policy}.json"


def judgments_file(judge: str) -> str:
    """Returns the name of the file of a judge's probabilities."""
    return f"judgments-{judge}.json"


class FinishedTournament(NamedTuple):
    """What a finished tournament keeps."""

    name: str
    rows: list[dict[str, Any]]  # of ``outputs.json``
    tokens: dict[str, list[int]]  # policy -> length of each reply in the policy's own tokens, the stop included
    baseline: str  # a policy
    judgments: dict[str, list[dict[str, Any]]]  # judge -> rows of its file

    def probability(self, judge: str, policy: str) -> list[float]:
        """Returns P(policy > baseline) of each prompt."""
        for row in self.judgments[judge]:
            if (row["policy"], row["other"]) == (policy, self.baseline):
                return row["probability"]
            if (row["policy"], row["other"]) == (self.baseline, policy):
                return [1 - p for p in row["probability"]]
        raise UserError(f"{judgments_file(judge)} does not compare {policy!r} with {self.baseline!r}; it is damaged")


def read_tournament(stage: Path) -> FinishedTournament:
    """Returns what ``stage`` = WORKDIR/NAME keeps.

    Raises UserError when it is no finished tournament, when an older version made it, and when a file is damaged.
    """
    if storage.read_text(stage / WIN_RATES) is None:
        raise UserError(f"{stage} holds no finished tournament; give the folder WORKDIR/NAME of one")
    if storage.read_text(stage / OUTPUTS) is None:
        raise UserError(f"{stage} was made by a version that kept no prompts; remove it and run the experiment again")
    tables, rows = storage.read_json(stage / WIN_RATES), storage.read_json(stage / OUTPUTS)
    try:
        policies, judges = tables[0]["policies"], [table["judge"] for table in tables]
        tokens = {policy: storage.read_json(stage / replies_file(policy))["length"] for policy in policies}
        judgments = {judge: storage.read_json(stage / judgments_file(judge)) for judge in judges}
        return FinishedTournament(stage.name, rows, tokens, tables[0]["baseline"], judgments)
    except (KeyError, IndexError, TypeError):
        raise UserError(f"{stage} is damaged; remove it and run the experiment again") from None


def write_outputs(stage: Path, folder: Path, form: str, time: float) -> str:
    """Writes the tournament ``stage`` = WORKDIR/NAME as a folder in one of ``FORMATS``; returns a line that says so.

    ``time`` is the time stamp of answers, in seconds since 1970. Raises UserError as ``read_tournament`` does, and when
    the folder exists or a prompt does not fit the format.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder")
    tournament = read_tournament(stage)
    files = FORMATS[form](tournament, time)
    partial = folder.with_name(f".{folder.name}.partial")  # so that the folder appears whole, or not at all
    shutil.rmtree(partial, ignore_errors=True)
    for name, text in files.items():
        (partial / name).parent.mkdir(parents=True, exist_ok=True)
        (partial / name).write_text(text, encoding="utf-8")
    partial.rename(folder)
    return f"{folder}: {len(tournament.rows)} prompts, {len(tournament.tokens)} policies, as {form} reads them"


def alpaca_eval_files(tournament: FinishedTournament, time: float) -> Files:
    """Returns AlpacaEval's files: each policy's outputs, and each judge's annotations of it against the baseline.

    ``model_outputs/<policy>.json`` is a list of {instruction, output, generator}. ``annotations-<judge>/<policy>.json``
    is a list of {instruction, generator_1, output_1, generator_2, output_2, annotator, preference}: the baseline is the
    first, and preference = 1 + P(policy > baseline) is in [1, 2], so the win rate is its mean minus 1.
    """
    baseline, files = tournament.baseline, {}
    for policy in tournament.tokens:
        outputs = [
            {"instruction": instruction(row), "output": row["replies"][policy], "generator": policy}
            for row in tournament.rows
        ]
        files[f"model_outputs/{policy}.json"] = _array(outputs)
        for judge in tournament.judgments if policy != baseline else ():
            annotations = [
                {
                    "instruction": instruction(row),
                    "generator_1": baseline,
                    "output_1": row["replies"][baseline],
                    "generator_2": policy,
                    "output_2": row["replies"][policy],
                    "annotator": judge,
                    "preference": 1 + p,
                }
                for row, p in zip(tournament.rows, tournament.probability(judge, policy), strict=True)
            ]
            files[f"annotations-{judge}/{policy}.json"] = _array(annotations)
    return files


def arena_hard_files(tournament: FinishedTournament, time: float) -> Files:
    """Returns Arena-Hard's files (version 2): the questions and each policy's answers.

    ``question.jsonl`` has {uid, category, prompt}, ``model_answer/<policy>.jsonl`` {uid, ans_id, model, messages,
    tstamp, metadata: {token_len, header_count, list_count, bold_count}}. ``token_len`` counts the policy's own tokens,
    not those of the tokenizer that Arena-Hard uses.
    """
    files = {
        "question.jsonl": _lines(
            {"uid": digest(row["prompt"]), "category": tournament.name, "prompt": instruction(row)}
            for row in tournament.rows
        )
    }
    for policy, lengths in tournament.tokens.items():
        files[f"model_answer/{policy}.jsonl"] = _lines(
            {
                "uid": digest(row["prompt"]),
                "ans_id": digest(policy, row["prompt"], row["replies"][policy]),
                "model": policy,
                "messages": [
                    {"role": "user", "content": instruction(row)},
                    {"role": "assistant", "content": {"answer": row["replies"][policy]}},
                ],
                "tstamp": time,
                "metadata": {"token_len": length, **markdown_counts(row["replies"][policy])},
            }
            for row, length in zip(tournament.rows, lengths, strict=True)
        )
    return files


def mt_bench_files(tournament: FinishedTournament, time: float) -> Files:
    """Returns MT-bench's files: the questions and each policy's answers, in turns.

    ``question.jsonl`` has {question_id, category, turns}, with the user's turns of the prompt.
    ``model_answer/<policy>.jsonl`` has {question_id, answer_id, model_id, choices: [{index, turns}], tstamp}, with the
    assistant's turns: the policy wrote the last, the others are the prompt's. Raises UserError as ``split_turns``.
    """
    turns = [split_turns(row, number) for number, row in enumerate(tournament.rows, 1)]
    files = {
        "question.jsonl": _lines(
            {"question_id": number, "category": tournament.name, "turns": asked}
            for number, (asked, _) in enumerate(turns, 1)
        )
    }
    for policy in tournament.tokens:
        files[f"model_answer/{policy}.jsonl"] = _lines(
            {
                "question_id": number,
                "answer_id": digest(policy, row["prompt"], row["replies"][policy]),
                "model_id": policy,
                "choices": [{"index": 0, "turns": [*answered, row["replies"][policy]]}],
                "tstamp": time,
            }
            for number, (row, (_, answered)) in enumerate(zip(tournament.rows, turns, strict=True), 1)
        )
    return files


FORMATS = {"alpaca_eval": alpaca_eval_files, "arena_hard": arena_hard_files, "mt_bench": mt_bench_files}
"""Each returns the files of a tournament, given the time of the answers in seconds since 1970."""


def instruction(row: Mapping[str, Any]) -> str:
    """Returns what the user asks, where the prompt is one message; else the whole prompt as text."""
    messages = row["messages"] or []
    return messages[0]["content"] if [m["role"] for m in messages] == ["user"] else row["prompt"]


def split_turns(row: Mapping[str, Any], number: int) -> tuple[list[str], list[str]]:
    """Returns (user's turns, assistant's turns) of prompt ``number``; the user has one more.

    A system message goes to the head of the first question. Raises UserError when the prompt is no chat of alternating
    turns that ends with the user's.
    """
    messages = [dict(message) for message in row["messages"] or []]
    if len(messages) > 1 and messages[0]["role"] == "system":
        system = messages.pop(0)
        messages[0]["content"] = f"{system['content']}\n\n{messages[0]['content']}"
    roles = [message["role"] for message in messages]
    if not roles or roles != ["user", "assistant"] * (len(roles) // 2) + ["user"]:
        raise UserError(f"prompt {number} of the tournament is no chat of alternating turns that ends with the "
                        "user's; choose another --format")  # fmt: skip
    contents = [message["content"] for message in messages]
    return contents[0::2], contents[1::2]


def markdown_counts(text: str) -> dict[str, dict[str, int]]:
    """Returns how many headers, list items and bold pieces a Markdown text has outside its fenced code.

    The form is Arena-Hard's: {header_count: {h1, ..., h6}, list_count: {ordered, unordered}, bold_count: {**, __}}.
    """
    text = re.sub(r"```[^`]*```", "", text)
    headers = collections.Counter(map(len, re.findall(r"^(#{1,6})\s", text, re.MULTILINE)))
    items = [bool(number) for number in re.findall(r"^\s*(?:(\d+)\.|[*+-])\s", text, re.MULTILINE)]
    return {
        "header_count": {f"h{level}": headers[level] for level in range(1, 7)},
        "list_count": {"ordered": sum(items), "unordered": len(items) - sum(items)},
        "bold_count": {
            mark: len(re.findall(rf"{re.escape(mark)}[^{mark[0]}\n]+{re.escape(mark)}", text)) for mark in ("**", "__")
        },
    }


def digest(*texts: str) -> str:
    """Returns 32 hexadecimal digits that name the texts."""
    return hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:32]


def _array(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as one JSON array."""
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns rows as JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
