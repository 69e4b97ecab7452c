"""Folders on this machine or in a bucket (``gs://...``): what pathlib and etils' epath do not do alike."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import jax

from alignjax.errors import RunAgain, UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUCKETS = {"gs": "gcsfs"}  # what is known to work, and the package it takes


def at(text: str) -> Path:
    """The path of a folder; of a URL, epath's, which has pathlib's methods. Raises UserError when the kind of URL is
    unknown, or its package not installed."""
    scheme, found, rest = text.partition("://")
    if not found:
        return Path(text)
    if scheme not in BUCKETS or not rest.strip("/"):
        raise UserError(
            f"{text} is neither a path nor gs://BUCKET/FOLDER; mount other stores and give the mount's path"
        )
    if not importlib.util.find_spec(BUCKETS[scheme]):
        raise UserError(f"{text} needs {BUCKETS[scheme]}; pip install 'alignjax[{scheme}]'")
    import fsspec  # here, as below: only buckets need them
    from etils import epath

    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False  # other hosts write here too
    return cast(Path, epath.Path(text))


def is_bucket(path: Path) -> bool:
    return not isinstance(path, Path)


def absolute(path: Path) -> Path:
    return path if is_bucket(path) else path.resolve()


def make_folder(folder: Path) -> None:
    """In a bucket there are none to be made: a file's name is all of its path."""
    if not is_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


def try_writing(folder: Path) -> None:
    """Makes the folder. Raises UserError when nothing can be written in it."""
    probe = folder / ".probe"
    try:
        make_folder(folder)
        probe.write_text("probe")
        probe.unlink(missing_ok=True)
    except Exception as error:  # of a bucket, whatever its libraries raise
        raise UserError(
            f"{folder} cannot be written ({reason(error)}); mend that, or choose another --workdir"
        ) from None


def reason(error: BaseException) -> str:
    """The error in a line of at most 160 characters."""
    return " ".join(str(error).split())[:160] or type(error).__name__


LIBRARIES = ("gcsfs", "fsspec", "aiohttp", "google", "requests")
OUTAGE = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "annot connect", "onnect call failed", "timed out", "Timeout")


def out_of_reach(error: BaseException) -> bool:
    """Whether a bucket's libraries have given up for now, and not because of what they were asked for."""
    code = getattr(error, "code", None)  # HTTP's
    if isinstance(code, int | str) and str(code).isdigit():
        return int(code) >= 500 or int(code) in (408, 429)
    theirs = type(error).__module__.partition(".")[0] in LIBRARIES and not isinstance(error, FileNotFoundError)
    return theirs or any(word in str(error) for word in OUTAGE)


@contextlib.contextmanager
def reached(folder: Path) -> Iterator[None]:
    """Turns what a bucket's libraries raise, after some minutes of trying again, into one line: RunAgain when they may
    reach it later, UserError when it does not let them."""
    if not is_bucket(folder):
        yield
        return
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)  # the tracebacks of what it will try again
    try:
        yield
    except (UserError, RunAgain):
        raise
    except Exception as error:  # of many kinds; ours go on
        if out_of_reach(error):
            raise RunAgain(
                f"{folder} is out of reach ({reason(error)}); the same command goes on from the last save"
            ) from error
        if type(error).__module__.partition(".")[0] in LIBRARIES:
            raise UserError(f"{folder} cannot be used ({reason(error)}); mend that and run again") from error
        raise


def read(path: Path) -> str | None:
    """The text of a file, None where there is none. (``exists`` of a path in a bucket is false, too, where the bucket
    cannot be reached.)"""
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return None


def contents(folder: Path) -> Iterator[Path]:
    """Every file below the folder."""
    if is_bucket(folder):
        import fsspec

        store, name = fsspec.core.url_to_fs(str(folder))
        for found in store.find(name):
            if not found.endswith("/"):  # which other programs write, to have folders
                yield folder / found[len(name) :].lstrip("/")
        return
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            yield from contents(path)
        else:
            yield path


def is_empty(path: Path) -> bool:
    """Of a file."""
    found: Any = path.stat()
    return not (found.length if is_bucket(path) else found.st_size)


def remove_tree(folder: Path, first: str = "") -> None:
    """Removes a folder and all in it, if it is there; in a bucket, of its own files the one called ``first`` before all
    others."""
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in sorted(contents(folder), key=lambda path: path != folder / first):
        path.unlink(missing_ok=True)


def copy(source: Path, target: Path, last: str = "") -> None:
    """Copies every file below one folder to another, of which either may lie in a bucket; of its own files the one
    called ``last`` after all others."""
    for path in sorted(contents(source), key=lambda path: path == source / last):
        there: Any = target.joinpath(*path.parts[len(source.parts) :])
        make_folder(there.parent)
        if is_bucket(path) and is_bucket(there):  # without coming by here
            cast(Any, path).copy(there, overwrite=True)
        else:
            there.write_bytes(path.read_bytes())


@contextlib.contextmanager
def fetched(folder: Path) -> Iterator[Path]:
    """The folder on this machine, to be read by what knows no buckets: itself, or a copy for as long."""
    if not is_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as here:
        copy(folder, Path(here))
        yield Path(here)


@contextlib.contextmanager
def delivered(folder: Path) -> Iterator[Path]:
    """The folder on this machine, to be written by what knows no buckets: itself, or one that takes its place at the
    end, if all went well."""
    if not is_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as here:
        yield Path(here)
        remove_tree(folder)
        copy(Path(here), folder)


def write_atomic(path: Path, text: str) -> None:
    """Writes beside the file and renames: readers see the old text or the new, never half. Of several processes the
    first alone writes, and the others must ``meet`` it before they read."""
    if jax.process_index():
        return
    if is_bucket(path):  # where a file appears whole
        path.write_bytes(text.encode())
        return
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def write_picture(path: Path, figure: Figure) -> None:
    """A PNG. Of several processes the first alone writes."""
    if jax.process_index():
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    path.write_bytes(buffer.getvalue())


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, json.dumps(value, indent=1, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """What write_json wrote. Raises UserError when the file is missing or damaged."""
    return from_json(read(path) or "", path)


def from_json(text: str, path: Path) -> Any:
    """What the file's text says. Raises UserError when it is damaged."""
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"{path} is missing or damaged; remove {path.parent} to make the stage again") from None
