"""Work in chunks that are kept on disk, so that a resumed stage goes on after the last complete one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from alignjax.distributed import storage
from alignjax.pipeline.experiment import Context
from alignjax.training import metrics

_FOLDER = "chunks"


def in_chunks(
    context: Context, count: int, size: int, unit: str, work: Callable[[range], dict[str, Any]], part: str = ""
) -> list[dict[str, Any]]:
    """Returns ``work(numbers)``, which is JSON, for every ``size`` of the numbers below ``count``.

    Each chunk lies in a file of its own in the stage's folder. ``unit`` is what the progress bar counts. ``part`` names
    the work where a stage has several.
    """
    folder = context.folder / _FOLDER / part
    storage.make_folder(folder)
    done = context.hosts.broadcast(lambda: sum(path.suffix == ".json" for path in storage.list_files(folder)))
    chunks = [storage.read_json(chunk_file(folder, i)) for i in range(done)]
    with metrics.progress_bar(count, done * size, context.name, unit) as bar:
        for start in range(done * size, count, size):
            numbers = range(start, min(start + size, count))
            chunks.append(work(numbers))
            storage.write_json(chunk_file(folder, len(chunks) - 1), chunks[-1])
            bar.update(len(numbers))
            context.stop_if_preempted()
    return chunks


def chunk_file(folder: Path, index: int) -> Path:
    """Returns the file of chunk ``index``."""
    return folder / f"{index:06d}.json"
