"""What a run tells: JSON lines always, TensorBoard beside them, a progress bar while it lasts."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import tqdm

from alignjax.distributed import storage
from alignjax.errors import UserError

if TYPE_CHECKING:
    pass


class MetricsWriter:
    """Appends one JSON object a line to ``metrics.jsonl`` and the same scalars to TensorBoard files, and to
    a Weights & Biases project where one is named. Of several processes the first alone writes."""

    def __init__(self, folder: Path, resume_step: int, project: str | None = None):
        """Keeps the lines of steps before ``resume_step``: what a killed run wrote past its checkpoint goes.

        Raises UserError when a project is named and wandb is not installed.
        """
        self.leads = jax.process_index() == 0
        if not self.leads:
            return
        import tensorboardX  # here, for it takes seconds where torch is there: it imports that

        kept = [r for r in read_metrics(folder / "metrics.jsonl") if r["step"] < resume_step]
        self.folder = folder
        self.here = Path(tempfile.mkdtemp()) if storage.is_bucket(folder) else folder
        self.wandb = start_wandb(project, folder) if project else None
        self.here.mkdir(parents=True, exist_ok=True)
        path = self.here / "metrics.jsonl"
        storage.write_atomic(path, "".join(json.dumps(row) + "\n" for row in kept))
        self.file = path.open("a", encoding="utf-8")
        self.board = tensorboardX.SummaryWriter(str(self.here / "tensorboard"), purge_step=resume_step)

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        if not self.leads:
            return
        row = {name: float(value) for name, value in values.items()}
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        for name, value in row.items():
            self.board.add_scalar(name, value, step)
        if self.wandb:
            self.wandb.log(row, step=step)

    def keep(self) -> None:
        """Before a save: what was written until now is not lost any more. A bucket, where nothing can be appended to,
        has it from now on."""
        if not self.leads:
            return
        os.fsync(self.file.fileno())
        if self.here != self.folder:
            self.board.flush()
            storage.copy(self.here, self.folder)

    def close(self) -> None:
        if not self.leads:
            return
        self.file.close()
        self.board.close()
        if self.wandb:
            self.wandb.finish()
        if self.here != self.folder:
            storage.copy(self.here, self.folder)
            storage.remove_tree(self.here)


def start_wandb(project: str, folder: Path) -> Any:
    """A run of the project, named by the work folder and the stage; a resumed stage goes on with its own."""
    name = f"{folder.parent.name}-{folder.name}"
    here = tempfile.mkdtemp() if storage.is_bucket(folder) else str(folder)
    return import_wandb().init(project=project, id=name, name=name, dir=here, resume="allow")


def import_wandb() -> Any:
    """Raises UserError when it is not installed."""
    try:
        return importlib.import_module("wandb")
    except ImportError:
        raise UserError("an experiment with wandb= needs wandb; pip install 'alignjax[wandb]'") from None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a metrics file; a torn last line, which a kill can leave, is dropped."""
    rows = []
    for line in (storage.read(path) or "").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def progress(total: int, initial: int, name: str, unit: str) -> tqdm.tqdm:
    """A bar with rate and time left; where nobody watches a terminal, a line every half minute."""
    interval = 0.2 if sys.stderr.isatty() else 30.0
    return tqdm.tqdm(
        total=total, initial=initial, desc=name, unit=unit, mininterval=interval, leave=True,
        disable=jax.process_index() > 0,
    )  # fmt: skip
