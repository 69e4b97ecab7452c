"""Folders of checkpoints as files: JSON objects, safetensors in one file or in shards, and a digest of a folder."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from alignjax.errors import UserError, one_line

MEBIBYTE = 2**20
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_DIGESTED = (".json", ".jinja", ".safetensors", ".model", ".txt")


def read_json_object(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file.

    Raises UserError when the file cannot be read, holds no object, or holds an integer beyond 64 bits, over which the
    libraries that read it too would not end.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), parse_int=_parse_integer)
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); give a Hugging Face folder") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object; fetch it again")
    return content


def _parse_integer(digits: str) -> int:
    """Returns the integer. Raises ValueError when it has more than 64 bits."""
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise ValueError(f"the integer {digits[:30]} is beyond 64 bits")
    return int(digits)


def folder_digest(folder: Path) -> str:
    """Returns 16 hexadecimal digits that change when the checkpoint in a folder changes; "" when there is no folder.

    The digest covers names and sizes of all files, the whole of files up to 64 MiB, and 1001 pieces of 4 KiB, evenly
    spaced, of larger ones: training changes nearly every weight, so that no other checkpoint agrees in all pieces.
    """
    if folder == Path():  # an empty path is no folder, and not the current one
        return ""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.is_file() and path.suffix in _DIGESTED:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                if size <= 64 * MEBIBYTE:
                    digest.update(file.read())
                    continue
                for piece in range(1001):
                    file.seek(piece * (size - 4096) // 1000)
                    digest.update(file.read(4096))
    return digest.hexdigest()[:16] if folder.is_dir() else ""


def tensor_files(folder: Path) -> dict[str, Path]:
    """Returns the safetensors file of every tensor name: one file, or shards with an index.

    Where both are there, the one file holds the weights and the index is left over, as for transformers. Raises
    UserError when there is no safetensors file, or when the index is damaged or names a file that lies outside the
    folder or is not safetensors.
    """
    single = folder / _SINGLE
    if not single.exists() and (folder / _INDEX).exists():
        return {name: folder / file for name, file in _read_index(folder / _INDEX).items()}
    check_present(single)
    with open_tensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def check_present(path: Path) -> None:
    """Raises UserError when a safetensors file is missing; names a pickle that lies in its place."""
    if not path.exists():
        pickles = [other.name for other in sorted(path.parent.glob("*")) if other.suffix in _PICKLES]
        advice = f"convert {pickles[0]} to safetensors" if pickles else "give a folder that has it"
        raise UserError(f"{path} is missing; {advice}")


def _read_index(index: Path) -> dict[str, str]:
    """Returns tensor name -> file name of an index of shards. Raises UserError on a file name that is not safe."""
    names = read_json_object(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
        raise UserError(f"{index} is damaged: it has no weight_map of names to files; fetch it again")
    for file in names.values():
        if Path(file).name != file or file == ".." or "\0" in file:
            raise UserError(f"{index}: shard {file!r} points outside the folder; correct the index")
        if not file.endswith(".safetensors"):
            raise UserError(f"{index}: shard {file!r} is no safetensors file; convert it to one")
    return names


def open_tensors(path: Path):
    """Opens a safetensors file for reading by name and range. Raises UserError when it is damaged or missing."""
    try:
        return safetensors.safe_open(path, framework="numpy")
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is damaged or missing ({one_line(error)}); fetch it again") from None


def write_tensors(folder: Path, tensors: Mapping[str, Callable[[], np.ndarray]], max_shard_bytes: int) -> None:
    """Writes tensors as safetensors files of at most ``max_shard_bytes`` (or one tensor) each.

    ``tensors`` holds a function for each name; it is called once, and the host holds one shard at a time. Several files
    get the index that Hugging Face expects. Files have temporary names until their number is known.
    """
    shards: list[list[str]] = []  # the tensor names of each
    pending: dict[str, np.ndarray] = {}
    total = 0
    for name, make in tensors.items():
        value = make()
        total += value.nbytes
        if pending and sum(array.nbytes for array in pending.values()) + value.nbytes > max_shard_bytes:
            shards.append(_write_part(folder, len(shards), pending))
            pending = {}
        pending[name] = value
    shards.append(_write_part(folder, len(shards), pending))
    count = len(shards)
    files = [_SINGLE] if count == 1 else [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    for i, file in enumerate(files):
        (folder / f"{i}.part").rename(folder / file)
    if count > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / _INDEX).write_text(json.dumps(index, indent=1))


def _write_part(folder: Path, number: int, tensors: dict[str, np.ndarray]) -> list[str]:
    """Writes one shard under its temporary name; returns its tensor names. Raises UserError when it cannot."""
    try:
        safetensors.numpy.save_file(tensors, folder / f"{number}.part", metadata={"format": "pt"})
    except safetensors.SafetensorError as error:  # of a full disk too
        raise UserError(f"{folder} cannot be written ({one_line(error)}); correct that and run again") from None
    return list(tensors)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a temporary folder to write into, which becomes ``folder`` at the end; after an error, neither is left.

    Raises UserError when ``folder`` exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder")
    partial = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
