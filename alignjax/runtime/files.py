"""Folders on this machine or in a bucket (``gs://...``): what pathlib and etils' epath do not do alike."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from alignjax.types import RunAgain, UserError

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


def try_writing(folder: Path) -> None:
    """Makes the folder. Raises UserError when nothing can be written in it."""
    probe = folder / ".probe"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("probe")
        probe.unlink()
    except Exception as error:  # of a bucket, whatever its libraries raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{folder} cannot be written ({reason}); mend that, or choose another --workdir") from None


@contextlib.contextmanager
def reached(folder: Path) -> Iterator[None]:
    """Turns what a bucket's libraries raise, after some minutes of trying again, into RunAgain with one line."""
    if not is_bucket(folder):
        yield
        return
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)  # the tracebacks of what it will try again
    try:
        yield
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in ("gcsfs", "aiohttp", "google", "requests"):
            raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise RunAgain(f"{folder} is out of reach ({reason}); the same command goes on from the last save") from error


def contents(folder: Path) -> Iterator[Path]:
    """Every file below the folder."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            yield from contents(path)
        else:
            yield path


def is_empty(path: Path) -> bool:
    """Of a file."""
    found: Any = path.stat()
    return not (found.length if is_bucket(path) else found.st_size)


def remove_tree(folder: Path, last: str = "") -> None:
    """Removes a folder and all in it, if it is there; of its own files the one called ``last`` after all others."""
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in sorted(contents(folder), key=lambda path: path == folder / last):
        path.unlink(missing_ok=True)


def copy(source: Path, target: Path, last: str = "") -> None:
    """Copies every file below one folder to another, of which either may lie in a bucket; of its own files the one
    called ``last`` after all others."""
    for path in sorted(contents(source), key=lambda path: path == source / last):
        there = target.joinpath(*path.parts[len(source.parts) :])
        there.parent.mkdir(parents=True, exist_ok=True)
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
