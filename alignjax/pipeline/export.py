"""A finished stage's network as a folder that other programs open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from alignjax.checkpoints import huggingface, peft
from alignjax.distributed import sharding, storage
from alignjax.errors import UserError, one_line
from alignjax.models.config import T5Config
from alignjax.pipeline.experiment import load_network
from alignjax.pipeline.networks import Network

HEAD_FILE, PREFERENCE_FILE = "alignjax_head.safetensors", "preference.json"

_PAIR = (
    "P(first > second) = sigmoid(s(first, second) - s(second, first)); s(y, y'), after the text prompt + before + y + "
    "between + y' + question of the template, is "
)
_ONE_ORDER = "; it was fitted as P(first > second) = sigmoid(2 s(first, second)), which has a position bias"
_FORMULAS = {
    "pairwise": _PAIR + "the logit of the token `answer`",
    "choice": _PAIR + "half of the logit of the token `answer` minus that of `other`",
    "pairwise_head": _PAIR + "the last state times the head",
    "one_order": _PAIR + "half of the logit of the token `answer`" + _ONE_ORDER,
    "bradley_terry": "P(first > second) = sigmoid(r(first) - r(second)); r(y): head times the state after prompt, y",
}
_REPLIES = (
    "; each reply stands as format.before + reply + format.end; an encoder-decoder reads it all, the state is its first"
)


def export(stage: Path, folder: Path, merge: bool) -> str:
    """Writes ``stage`` = WORKDIR/NAME as the folder; returns a line that says what it is, and its temperature if not 1.

    A policy becomes a checkpoint of its family; adapters a PEFT folder, or with ``merge`` the merged checkpoint; a
    Bradley-Terry model the family's sequence classification, where it is decoder-only. Any other preference model is
    its backbone, preference.json (how it is asked) and, if it has one, its head in alignjax_head.safetensors. Raises
    UserError when the stage holds no network or the folder exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder")
    network = load_network(stage, sharding.make_mesh(sharding.Mesh(data=1, fsdp=-1)))
    is_tempered = f"; it is the policy at temperature {network.temperature:g}" if network.temperature != 1 else ""
    if network.shared_base and network.shared_base.lora and not merge:
        return _export_adapters(network, stage, folder) + is_tempered
    params, config = network.merged(), network.model.config
    folder.parent.mkdir(parents=True, exist_ok=True)
    if "reward" in network.heads and not isinstance(config, T5Config):
        huggingface.write_folder(folder, config, {**params, **network.heads}, network.tokenizer)
        return f"{folder}: a reward model, as {config.family}'s sequence classification"
    description = read_preference_description(stage)
    partial = folder.with_name(f".{folder.name}.partial")  # so that the folder appears with its head, or not at all
    shutil.rmtree(partial, ignore_errors=True)
    huggingface.write_folder(partial, config, params, network.tokenizer)
    if description:
        _write_preference(partial, network, description)
    partial.rename(folder)
    return (
        f"{folder}: {'a preference model' if description else 'a policy'}, of the family {config.family}{is_tempered}"
    )


def _export_adapters(network: Network, stage: Path, folder: Path) -> str:
    """Writes a PEFT folder. Raises UserError when the network has a head, for which PEFT has no place."""
    assert network.shared_base is not None and network.shared_base.lora is not None
    if network.heads:
        raise UserError(f"{stage} has a head beside its adapters, for which a PEFT folder has no place; add --merge")
    folder.parent.mkdir(parents=True, exist_ok=True)
    base = str(stage.parent / network.shared_base.stage)
    peft.write_adapters(folder, network.model.config, network.adapters, network.shared_base.lora, base)
    return f"{folder}: adapters over {network.shared_base.stage}, in PEFT's format"


def read_preference_description(stage: Path) -> dict[str, Any] | None:
    """Returns how a preference model is asked; None for a policy. Raises UserError when the file is damaged."""
    path = stage / PREFERENCE_FILE
    try:
        text = storage.read_text(path)
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); remove {stage} to make the stage again") from None


def _write_preference(folder: Path, network: Network, description: dict[str, Any]) -> None:
    """Writes preference.json and, where there is one, the head's arrays by their paths ("reward/kernel": [D])."""
    formula = _FORMULAS.get(description["form"])
    words = formula + _REPLIES if formula else f"as the function {description['form']} of the experiment does"
    (folder / PREFERENCE_FILE).write_text(json.dumps({**description, "read": words}, indent=2))
    if network.heads:
        leaves = jax.tree_util.tree_leaves_with_path(network.heads)
        arrays = {sharding.path_name(path): np.asarray(leaf) for path, leaf in leaves}
        safetensors.numpy.save_file(arrays, folder / HEAD_FILE)
