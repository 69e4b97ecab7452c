"""Files and folders on a disk or in a bucket (``gs://...``), for what pathlib and etils' epath do differently.

A folder on a disk is a ``pathlib.Path``. A folder in a bucket is an ``etils.epath`` path, which has pathlib's methods
but is no ``pathlib.Path``. Functions here accept both.
"""

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

from alignjax.errors import RunAgain, UserError, one_line

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BUCKET_PACKAGES = {"gs": "gcsfs"}  # URL scheme -> the package that it needs
_BUCKET_LIBRARIES = ("gcsfs", "fsspec", "aiohttp", "google", "requests")  # modules whose errors are about the bucket
_OUTAGE_WORDS = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "annot connect", "onnect call failed", "timed out", "Timeout")


# Paths


def parse_path(text: str) -> Path:
    """Returns the path that a text names: a pathlib path with ``~`` expanded, or for a URL an epath path.

    Raises UserError when the URL is not gs://BUCKET/FOLDER, when its package is not installed, or when ``~NAME`` is
    not a user of this machine.
    """
    scheme, separator, rest = text.partition("://")
    if not separator:
        try:
            return Path(text).expanduser()
        except RuntimeError:
            raise UserError(f"{text} starts with an unknown user's home folder; write the whole path") from None
    if scheme not in _BUCKET_PACKAGES or not rest.strip("/"):
        raise UserError(
            f"{text} is neither a path nor gs://BUCKET/FOLDER; mount other stores and give the mount's path"
        )
    if not importlib.util.find_spec(_BUCKET_PACKAGES[scheme]):
        raise UserError(f"{text} needs {_BUCKET_PACKAGES[scheme]}; pip install 'alignjax[{scheme}]'")
    import fsspec  # imported here, as in list_files: only buckets need it
    from etils import epath

    fsspec.config.conf.setdefault(scheme, {})["use_listings_cache"] = False  # other hosts write there too
    return cast(Path, epath.Path(text))


def is_bucket(path: Path) -> bool:
    """Returns whether the path lies in a bucket."""
    return not isinstance(path, Path)


def absolute(path: Path) -> Path:
    """Returns the path without links and relative parts; a path in a bucket as it is."""
    return path if is_bucket(path) else path.resolve()


# Errors


def short_reason(error: BaseException) -> str:
    """Returns the error's message as one line of at most 160 characters."""
    return one_line(error)[:160]


def is_unavailable(error: BaseException) -> bool:
    """Returns whether the error says that a bucket cannot be reached now, rather than that the request is wrong."""
    code = getattr(error, "code", None)  # the HTTP status, which errors of several optional libraries have
    if isinstance(code, int | str) and str(code).isdigit():
        return int(code) >= 500 or int(code) in (408, 429)
    from_library = _is_library_error(error) and not isinstance(error, FileNotFoundError)
    return from_library or any(word in str(error) for word in _OUTAGE_WORDS)


def _is_library_error(error: BaseException) -> bool:
    return type(error).__module__.partition(".")[0] in _BUCKET_LIBRARIES


@contextlib.contextmanager
def bucket_errors(folder: Path) -> Iterator[None]:
    """Turns errors of the bucket libraries into errors of one line, inside the block.

    The libraries retry for some minutes before they raise. Raises RunAgain when the bucket may be reachable later,
    and UserError when it refuses access. Other errors, and all errors of a folder on a disk, pass unchanged.
    """
    if not is_bucket(folder):
        yield
        return
    logging.getLogger("gcsfs").setLevel(logging.CRITICAL + 1)  # it logs a traceback for each retry
    try:
        yield
    except (UserError, RunAgain):
        raise
    except Exception as error:
        if is_unavailable(error):
            raise RunAgain(
                f"{folder} is out of reach ({short_reason(error)}); the same command goes on from the last save"
            ) from error
        if _is_library_error(error):
            raise UserError(f"{folder} cannot be used ({short_reason(error)}); fix that and run again") from error
        raise


# Folders


def make_folder(folder: Path) -> None:
    """Makes the folder and its parents. A bucket has no folders, so nothing is done there."""
    if not is_bucket(folder):
        folder.mkdir(parents=True, exist_ok=True)


def try_writing(folder: Path) -> None:
    """Makes the folder, then writes and removes a file in it. Raises UserError when that fails."""
    probe = folder / ".probe"
    try:
        make_folder(folder)
        probe.write_text("probe")
        probe.unlink(missing_ok=True)
    except Exception as error:  # the libraries of buckets raise many types
        raise UserError(
            f"{folder} cannot be written ({short_reason(error)}); fix that, or choose another --workdir"
        ) from None


def list_files(folder: Path) -> Iterator[Path]:
    """Yields every file below the folder; nothing when the folder does not exist."""
    if is_bucket(folder):
        yield from _list_objects(folder)
        return
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir():
            yield from list_files(path)
        else:
            yield path


def _list_objects(folder: Path) -> Iterator[Path]:
    import fsspec

    store, prefix = fsspec.core.url_to_fs(str(folder))
    for name in store.find(prefix):
        if not name.endswith("/"):  # other programs write such objects to mark folders
            yield folder / name[len(prefix) :].lstrip("/")


def remove_tree(folder: Path, first: str = "") -> None:
    """Removes the folder with all its files, if it exists. In a bucket the file ``folder / first`` is removed first."""
    if not is_bucket(folder):
        shutil.rmtree(folder, ignore_errors=True)
        return
    for path in sorted(list_files(folder), key=lambda path: path != folder / first):
        path.unlink(missing_ok=True)


def copy_tree(source: Path, target: Path, last: str = "") -> None:
    """Copies every file below ``source`` to ``target``, the file ``source / last`` after all others. Either folder may
    be in a bucket."""
    for path in sorted(list_files(source), key=lambda path: path == source / last):
        copied: Any = target.joinpath(*path.parts[len(source.parts) :])
        make_folder(copied.parent)
        if is_bucket(path) and is_bucket(copied):  # the bucket copies it itself
            cast(Any, path).copy(copied, overwrite=True)
        else:
            copied.write_bytes(path.read_bytes())


@contextlib.contextmanager
def local_copy(folder: Path) -> Iterator[Path]:
    """Yields a folder on a disk with the same files, for libraries that cannot read buckets.

    That is the folder itself, or a temporary copy of a folder in a bucket.
    """
    if not is_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy_tree(folder, Path(temporary))
        yield Path(temporary)


@contextlib.contextmanager
def write_through(folder: Path) -> Iterator[Path]:
    """Yields a folder on a disk to write into, for libraries that cannot write to buckets.

    That is the folder itself, or a temporary folder. When the block ends without an error, the temporary folder's
    files replace those of the folder in the bucket.
    """
    if not is_bucket(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        yield Path(temporary)
        remove_tree(folder)
        copy_tree(Path(temporary), folder)


# Files


def is_empty_file(path: Path) -> bool:
    """Returns whether the file, which must exist, has no bytes."""
    status: Any = path.stat()
    return not (status.length if is_bucket(path) else status.st_size)


def read_text(path: Path) -> str | None:
    """Returns the text of a file, or None when the file does not exist.

    ``exists()`` is no substitute: in a bucket it is also false when the bucket cannot be reached.
    """
    try:
        return path.read_bytes().decode(errors="replace")
    except FileNotFoundError:
        return None


def write_atomic(path: Path, text: str) -> None:
    """Writes a file so that readers see the old text or the new text, never a part.

    The text is written to a file next to it, which is then renamed. Only process 0 writes; the other processes must
    pass a ``Hosts.barrier`` before they read the file.
    """
    if jax.process_index():
        return
    if is_bucket(path):  # an object appears whole
        path.write_bytes(text.encode())
        return
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def write_picture(path: Path, figure: Figure) -> None:
    """Writes a Matplotlib figure as a PNG. Only process 0 writes."""
    if jax.process_index():
        return
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    path.write_bytes(buffer.getvalue())


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON value with ``write_atomic``."""
    write_atomic(path, json.dumps(value, indent=1, sort_keys=False) + "\n")


def read_json(path: Path) -> Any:
    """Returns the value that ``write_json`` wrote. Raises UserError when the file is missing or damaged."""
    return parse_json(read_text(path) or "", path)


def parse_json(text: str, path: Path) -> Any:
    """Returns the value of JSON text that was read from ``path``. Raises UserError when the text is damaged."""
    try:
        return json.loads(text)
    except ValueError:
        raise UserError(f"{path} is missing or damaged; remove {path.parent} to make the stage again") from None
