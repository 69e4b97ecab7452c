"""What a run reports: metrics as JSON lines, in TensorBoard and Weights & Biases, and a progress bar."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import tqdm

from alignjax.distributed import storage
from alignjax.errors import UserError

_FILE = "metrics.jsonl"


class MetricsWriter:
    """Writes the metrics of each step as one JSON object a line to ``metrics.jsonl``, as TensorBoard scalars, and to a
    Weights & Biases project where one is named. Only process 0 writes."""

    def __init__(self, folder: Path, resume_step: int, project: str | None = None):
        """Opens the files in ``folder`` and keeps what they hold of steps before ``resume_step``. A run that was killed
        may have written later steps, which the resumed run writes again.

        Raises UserError when a project is named and wandb is not installed.
        """
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        import tensorboardX  # imported here: it imports torch where that is installed, which takes seconds

        kept = [row for row in read_metrics(folder / _FILE) if row["step"] < resume_step]
        self._folder = folder
        self._local = Path(tempfile.mkdtemp()) if storage.is_bucket(folder) else folder
        self._wandb = _start_wandb(project, folder) if project else None
        self._local.mkdir(parents=True, exist_ok=True)
        path = self._local / _FILE
        storage.write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a", encoding="utf-8")
        self._board = tensorboardX.SummaryWriter(str(self._local / "tensorboard"), purge_step=resume_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes the metrics, which must be scalars, of one step."""
        if not self._writes:
            return
        row = {name: float(value) for name, value in values.items()}
        self._file.write(json.dumps({"step": step, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, step)
        if self._wandb:
            self._wandb.log(row, step=step)

    def flush(self) -> None:
        """Makes what has been written durable; call it before a checkpoint is saved. Files cannot be appended to in a
        bucket, so this copies them there whole."""
        if not self._writes:
            return
        os.fsync(self._file.fileno())
        if self._local != self._folder:
            self._board.flush()
            storage.copy_tree(self._local, self._folder)

    def close(self) -> None:
        """Closes the files, and copies them where the folder is in a bucket."""
        if not self._writes:
            return
        self._file.close()
        self._board.close()
        if self._wandb:
            self._wandb.finish()
        if self._local != self._folder:
            storage.copy_tree(self._local, self._folder)
            storage.remove_tree(self._local)


def _start_wandb(project: str, folder: Path) -> Any:
    """Returns a wandb run, named by the work folder and the stage; a resumed stage continues its own run."""
    name = f"{folder.parent.name}-{folder.name}"
    local = tempfile.mkdtemp() if storage.is_bucket(folder) else str(folder)
    return import_wandb().init(project=project, id=name, name=name, dir=local, resume="allow")


def import_wandb() -> Any:
    """Returns the module wandb. Raises UserError when it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError("an experiment with wandb= needs wandb; pip install 'alignjax[wandb]'") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file up to the first line that is not whole, which a kill can leave at the end.
    A missing file has no rows."""
    rows = []
    for line in (storage.read_text(path) or "").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def progress_bar(total: int, initial: int, name: str, unit: str) -> tqdm.tqdm:
    """Returns a progress bar on stderr with rate and time left. Without a terminal it prints a line every half minute;
    in processes other than 0 it prints nothing. A bar inside another one goes when it is done."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm.tqdm(
        total=total, initial=initial, desc=name, unit=unit, mininterval=interval, leave=None,
        disable=jax.process_index() > 0,
    )  # fmt: skip
