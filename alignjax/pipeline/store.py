"""What a work folder holds: which stages are finished, resumable, or made with another configuration.

A stage's folder is WORKDIR/NAME; its record is ``stage.json``. In a bucket a folder without a record is no stage.
"""

from __future__ import annotations

import contextlib
import fcntl
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from alignjax.distributed import storage
from alignjax.errors import UserError
from alignjax.pipeline.fingerprint import difference, fingerprint

RECORD = "stage.json"
_NOT_WORK = (RECORD, "metrics.jsonl", "tensorboard", "wandb")  # what a resumed run does not need


def read_record(folder: Path) -> dict[str, Any]:
    """Returns a stage's record, empty when there is none. Raises UserError when it is damaged."""
    path = folder / RECORD
    text = storage.read_text(path)
    if text is None:
        return {}
    record = storage.parse_json(text, path)
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged; remove {folder} to make the stage again")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    """Writes a stage's record."""
    storage.write_json(folder / RECORD, record)


def is_finished(experiment: Any, workdir: Path, name: str) -> bool:
    """Returns whether the stage is finished with its present configuration."""
    record = read_record(workdir / name)
    return bool(record.get("finished")) and record.get("fingerprint") == fingerprint(experiment, name)


def has_work(folder: Path) -> bool:
    """Returns whether a stage is finished or left what a resumed run would use."""
    if read_record(folder).get("finished"):
        return True
    files = (path for path in storage.list_files(folder) if path.parts[len(folder.parts)] not in _NOT_WORK)
    return not all(map(storage.is_empty_file, files))


def prepare(folder: Path, record: dict[str, Any], stage: Any, redo: bool, extend: bool = False) -> bool:
    """Makes the stage's folder ready, to be resumed or empty; returns whether a finished stage was put back.

    Work done with another configuration is refused with UserError. With ``redo`` a finished stage is set aside until
    the new one is finished; a stage that was set aside with this very configuration is put back. With ``extend`` a copy
    of it is set aside and the folder is resumed as it is: the stage knows which of its files are still right.
    """
    found = read_record(folder)
    if found.get("fingerprint") not in (None, record["fingerprint"]):
        if has_work(folder) and not redo and not extend:
            raise UserError(
                f"stage {record['stage']!r} in {folder.parent} was made with {difference(found, record, stage)}; "
                "use another --workdir, or --redo to make it again"
            )
        if found.get("finished"):
            remove(set_aside(folder))
        if extend:
            if found.get("finished"):
                storage.copy_tree(folder, set_aside(folder), last=RECORD)
            write_record(folder, {**record, "finished": False})
        elif found.get("finished"):
            move(folder, set_aside(folder))
        else:
            remove(folder)
    if not exists(folder) and read_record(set_aside(folder)).get("fingerprint") == record["fingerprint"]:
        move(set_aside(folder), folder)
    found = read_record(folder)
    if not found:
        if storage.is_bucket(folder):  # what a killed copy or removal left
            remove(folder)
        storage.make_folder(folder)
        write_record(folder, {**record, "finished": False})
    return bool(found.get("finished"))


def finish(folder: Path, record: dict[str, Any], seconds: float) -> None:
    """Writes the record of a finished stage and removes what only a resumed run would use."""
    spent = read_record(folder).get("seconds", 0.0) + seconds
    write_record(folder, {**record, "finished": True, "seconds": spent})
    storage.remove_tree(folder / "checkpoints")
    remove(set_aside(folder))


def clean_up_failed(folder: Path, refused: bool = False, extended: bool = False) -> None:
    """Cleans up after a failure. A stage that left no work is removed, and what was set aside for it is put back.

    So it is for a stage that began in this run and was ``refused``: it would be refused again. A resumed stage keeps
    its work, because the mistake may lie elsewhere. A finished stage that was ``extended`` is as it was, and keeps
    beside its own files those that were added.
    """
    waiting = exists(set_aside(folder))
    if extended and waiting:
        storage.copy_tree(set_aside(folder), folder, last=RECORD)
        remove(set_aside(folder))
        return
    if not has_work(folder) or (refused and waiting):
        remove(folder)
        if waiting:
            move(set_aside(folder), folder)


def set_aside(folder: Path) -> Path:
    """Returns where a finished stage waits while it is made again."""
    return folder.with_name(f".{folder.name}.before")


def remove(folder: Path) -> None:
    """Removes a folder, as others see it all at once: a kill leaves no half of it that would be resumed."""
    if storage.is_bucket(folder):
        storage.remove_tree(folder, first=RECORD)
        return
    trash = folder.with_name(f".{folder.name}.gone")
    storage.remove_tree(trash)
    if folder.exists():
        folder.rename(trash)
        storage.remove_tree(trash)


def move(folder: Path, target: Path) -> None:
    """Renames the folder; in a bucket it copies file by file, the record last, and then removes the original."""
    if not storage.is_bucket(folder):
        folder.rename(target)
        return
    remove(target)
    storage.copy_tree(folder, target, last=RECORD)
    remove(folder)


def exists(folder: Path) -> bool:
    """Returns whether the folder is there; in a bucket, whether it has a record."""
    return bool(read_record(folder)) if storage.is_bucket(folder) else folder.exists()


@contextlib.contextmanager
def locked(workdir: Path, name: str) -> Iterator[None]:
    """Lets one process at a time work on a stage.

    The lock of a killed process is gone with it; a bucket has no locks.
    """
    if storage.is_bucket(workdir):
        yield
        return
    with (workdir / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"stage {name!r} in {workdir} is at work in another process; wait for it, "
                            "or choose another --workdir") from None  # fmt: skip
        except OSError:  # a file system without locks
            pass
        yield
