"""Parquet files as rows. The only file that imports pyarrow, and only when such a file is read or written."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.errors import UserError, one_line

SUFFIX = ".parquet"
"""What the name of such a file ends in."""


def read_parquet(path: str, kind: str) -> list[dict[str, Any]]:
    """Returns the rows of a file as they would stand in JSON lines; a column without a value is left out of its row.

    ``kind`` is the plural of what the rows are: "comparisons". Raises UserError when the file cannot be read, and when
    pyarrow is not installed.
    """
    pyarrow, parquet = _import_pyarrow(path)
    try:
        with parquet.ParquetFile(path) as file:
            rows = [row for batch in file.iter_batches() for row in batch.to_pylist()]
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)[:160]}); give a parquet file of {kind}") from None
    return [{name: value for name, value in row.items() if value is not None} for row in rows]


def write_parquet(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Writes rows of equal fields; the file appears whole, or not at all. Raises UserError without pyarrow."""
    pyarrow, parquet = _import_pyarrow(str(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
    os.replace(temporary, path)


def _import_pyarrow(path: str) -> tuple[Any, Any]:
    """Returns pyarrow and its module of parquet files."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path} needs pyarrow; pip install 'alignjax[parquet]'") from None
    return pyarrow, pyarrow.parquet
