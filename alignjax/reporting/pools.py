"""Pools of policies from files: a finished tournament, its table alone, a JSON matrix, a CSV matrix."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from alignjax.distributed import storage
from alignjax.errors import UserError, one_line, short_repr
from alignjax.preferences.ratings import Pool, make_pool, pool_of_votes
from alignjax.reporting.exchange import WIN_RATES, judgments_file

_FORMS = 'a win_rates.json, {"policies": [...], "win_rate": [[...]], "n": optional}, or a CSV matrix with names'


def read_pools(path: Path, soft: bool) -> list[tuple[str, Pool]]:
    """Returns (title, pool) of every table that ``path`` holds.

    It is WORKDIR/NAME of a finished tournament, whose pools have the votes of each prompt; or a file: such a
    ``win_rates.json``, a JSON matrix, or a CSV matrix with names in its first row and column. With ``soft`` a rate is
    the mean of the judge's probabilities, and not of its votes. Raises UserError, which names the file and what is
    wrong, on anything else.
    """
    if path.is_dir():
        return tournament_pools(path, soft)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path} is no UTF-8 text; give {_FORMS}") from None
    if "\0" in text or not text.strip():
        raise UserError(f"{path} is {'no text' if text.strip() else 'empty'}; give {_FORMS}")
    try:
        if text.lstrip()[0] not in "[{":
            return [(path.name, _csv_pool(text, soft))]
        return _json_pools(_parsed(text), path.name, soft)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def tournament_pools(stage: Path, soft: bool) -> list[tuple[str, Pool]]:
    """Returns (judge, pool) of every judge of a finished tournament, with the votes of each prompt.

    Raises UserError when it is none, when it has fewer than two policies, and when a file is damaged.
    """
    if storage.read_text(stage / WIN_RATES) is None:
        raise UserError(
            f"{stage} holds no {WIN_RATES}; give the folder WORKDIR/NAME of a finished Tournament, or a file"
        )
    tables = storage.read_json(stage / WIN_RATES)
    try:
        if not isinstance(tables, list) or not tables:
            raise TypeError("no list of tables")
        judged = [
            (table["judge"], table, storage.read_json(stage / judgments_file(table["judge"]))) for table in tables
        ]
        votes = [
            (f"judge: {judge}", table["policies"], _checked_votes(table, rows, soft)) for judge, table, rows in judged
        ]
    except UserError:
        raise
    except (KeyError, TypeError, ValueError):
        raise UserError(
            f"the judgments in {stage} do not fit {WIN_RATES}; remove it and run the experiment again"
        ) from None
    try:
        return [(title, pool_of_votes(policies, values)) for title, policies, values in votes]
    except UserError as error:
        raise UserError(f"{stage}: {error}") from None


def _checked_votes(table: Mapping[str, Any], rows: Sequence[Any], soft: bool) -> np.ndarray:
    """Returns the votes of each prompt, or its probabilities, [P, P, n]. Raises ValueError where they do not fit the
    table."""
    probability = _probabilities(table["policies"], table["n"], rows)
    votes = 0.5 + 0.5 * np.sign(probability - 0.5)  # 1 for the likelier side, 1/2 on a tie
    if not np.allclose(votes.mean(-1), np.asarray(table["win_rate"], np.float64), rtol=0, atol=1e-6):
        raise ValueError("other votes than the table's")
    return probability if soft else votes


def _probabilities(policies: Sequence[str], n: int, rows: Sequence[Any]) -> np.ndarray:
    """Returns P(i > j) of each prompt, [P, P, n]. Raises KeyError, TypeError or ValueError where a pair is missing or
    a row has another form."""
    found = np.full((len(policies), len(policies), n), np.nan)
    for k in range(len(policies)):
        found[k, k] = 0.5
    for row in rows:
        i, j = policies.index(row["policy"]), policies.index(row["other"])
        values = np.asarray(row["probability"], np.float64)
        if values.shape != (n,):
            raise ValueError("another number of prompts")
        found[i, j], found[j, i] = values, 1 - values
    if not np.all((found >= 0) & (found <= 1)):
        raise ValueError("a pair is missing, or a value is no probability")
    return found


def _parsed(text: str) -> Any:
    """Returns the value of JSON text. Raises UserError on other text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise UserError(f"it is no JSON ({one_line(error)}); give {_FORMS}") from None


def _json_pools(value: Any, name: str, soft: bool) -> list[tuple[str, Pool]]:
    """Returns the pools of a ``win_rates.json`` (a list of tables) or of one table."""
    tables = value if isinstance(value, list) else [value]
    if not tables:
        raise UserError(f"it holds no table; give {_FORMS}")
    return [(_title(table, name, number, len(tables)), _table_pool(table, soft)) for number, table in enumerate(tables)]


def _title(table: Any, name: str, number: int, count: int) -> str:
    """Returns whose table it is: the judge's, or that of the file."""
    if isinstance(table, dict) and isinstance(table.get("judge"), str):
        return f"judge: {table['judge']}"
    return name if count == 1 else f"{name}, table {number + 1}"


def _table_pool(table: Any, soft: bool) -> Pool:
    """Returns the pool of {"policies": [...], "win_rate": [[...]], "n": optional}."""
    key = "mean_probability" if soft else "win_rate"
    if not isinstance(table, dict) or "policies" not in table:
        raise UserError(f'it has no "policies"; give {_FORMS}')
    if key not in table:
        mend = "leave --probabilities out" if soft else f"give {_FORMS}"
        raise UserError(f'it has no "{key}"; {mend}')
    policies = table["policies"]
    if not isinstance(policies, list):
        raise UserError(f'"policies" is {short_repr(policies)}; give a list of names')
    n = table.get("n")
    return make_pool(policies, _numbers(table[key], key), None if n is None else _numbers(n, "n"))


def _numbers(value: Any, name: str) -> np.ndarray:
    """Returns a number, or lists of numbers of equal lengths, as an array. Raises UserError on anything else."""
    rows = value if isinstance(value, list) else [value]
    cells = [cell for row in rows for cell in (row if isinstance(row, list) else [row])]
    for cell in cells:
        if isinstance(cell, bool) or not isinstance(cell, int | float):
            raise UserError(f'"{name}" holds {short_repr(cell)}, which is no number; write numbers')
    try:
        return np.asarray(value, np.float64)
    except (ValueError, OverflowError):
        raise UserError(f'"{name}" has rows of different lengths, or too large a number; correct it') from None


def _csv_pool(text: str, soft: bool) -> Pool:
    """Returns the pool of a CSV matrix; a cell of the diagonal may be empty or "-"."""
    if soft:
        raise UserError("a CSV matrix says not whether its rates are of votes; leave --probabilities out")
    try:
        reader = csv.reader(io.StringIO(text))
        rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(map(str.strip, row))]
    except csv.Error as error:
        raise UserError(f"it is no CSV ({one_line(error)}); give {_FORMS}") from None
    if not rows:
        raise UserError(f"its cells are all empty; give {_FORMS}")
    (_, header), *numbered = rows
    names, body = header[1:], [row for _, row in numbered]
    if not names:
        found = next((mark for mark in (";", "\t", "|") if mark in header[0]), None)
        mend = f"separate its cells with commas, not {found!r}" if found else f"give {_FORMS}"
        raise UserError(f"its first row names no policy; {mend}")
    for number, row in numbered:
        if len(row) != len(header):
            raise UserError(f"line {number} has {len(row)} cells and the first has {len(header)}; make it square")
    if [row[0] for row in body] != names:
        raise UserError(f"the first column names {_short(row[0] for row in body)} and the first row {_short(names)}; "
                        "name the same policies in the same order")  # fmt: skip
    matrix = [[_cell(cell, i == j, names[i], names[j]) for j, cell in enumerate(row[1:])] for i, row in enumerate(body)]
    return make_pool(names, matrix)


def _cell(text: str, is_diagonal: bool, name: str, other: str) -> float:
    """Returns the number of a cell. Raises UserError, which names the cell, when it is none."""
    if is_diagonal and text in ("", "-"):
        return 0.5
    try:
        return float(text)
    except ValueError:
        raise UserError(f"P({name} > {other}) is {text[:40]!r}, which is no number; write a rate in [0, 1]") from None


def _short(names: Any) -> str:
    """Returns names as text for an error's message, the first few where there are many."""
    return short_repr(list(names))
