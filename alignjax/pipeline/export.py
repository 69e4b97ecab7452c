"""A finished stage's network as a folder that others open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import safetensors.numpy

from alignjax.checkpoints import huggingface, peft
from alignjax.distributed import sharding, storage
from alignjax.errors import UserError, one_line
from alignjax.models.t5 import T5Config
from alignjax.pipeline import networks
from alignjax.pipeline.networks import Network

HEAD, PREFERENCE = "alignjax_head.safetensors", "preference.json"


def export(stage: Path, folder: Path, merge: bool) -> str:
    """Writes ``stage`` = WORKDIR/NAME as the folder; returns what it is, in a line.

    A policy becomes a checkpoint of its family; adapters a PEFT folder, or with ``merge`` the whole checkpoint; a
    Bradley-Terry model the family's sequence classification, where it is decoder-only. Any other preference model
    is its backbone, preference.json (how it is asked) and, if it has one, its head in alignjax_head.safetensors.
    Raises UserError when the stage holds no network or the folder exists.
    """
    if folder.exists():
        raise UserError(f"{folder} exists; choose another folder")
    mesh = sharding.make_mesh(sharding.Mesh(data=1, fsdp=-1))
    network = networks.load(stage.parent, stage.name, mesh, {}, None)
    form = read_form(stage)
    if network.adapter and network.adapter.lora and not merge:
        if network.heads:
            raise UserError(
                f"{stage} has a head beside its adapters, for which a PEFT folder has no place; add --merge"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        base = str(stage.parent / network.adapter.base)
        peft.write_adapters(folder, network.model.config, network.small, network.adapter.lora, base)
        return f"{folder}: adapters over {network.adapter.base}, in PEFT's format"
    params, config = networks.in_full(network), network.model.config
    folder.parent.mkdir(parents=True, exist_ok=True)
    if "reward" in network.heads and not isinstance(config, T5Config):
        huggingface.write_folder(folder, config, {**params, **network.heads}, network.tokenizer)
        return f"{folder}: a reward model, as {config.family}'s sequence classification"
    whole = folder.with_name(f".{folder.name}.whole")  # so that it is there with its head, or not at all
    shutil.rmtree(whole, ignore_errors=True)
    huggingface.write_folder(whole, config, params, network.tokenizer)
    if form:
        write_head(whole, network, form)
    whole.rename(folder)
    return f"{folder}: {'a preference model' if form else 'a policy'}, of the family {config.family}"


def read_form(stage: Path) -> dict | None:
    """How a preference model is asked; None for a policy."""
    path = stage / PREFERENCE
    try:
        text = storage.read(path)
        return None if text is None else json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is damaged ({one_line(error)}); remove {stage} to make the stage again") from None


BOTH = (
    "P(first > second) = sigmoid(s(first, second) - s(second, first)); s(y, y'), after the text prompt + before + y + "
    "between + y' + question of the template, is "
)
READ = {
    "pairwise": BOTH + "the logit of the token `answer`",
    "choice": BOTH + "half of the logit of the token `answer` minus that of `other`",
    "pairwise_head": BOTH + "the last state times the head",
    "bradley_terry": "P(first > second) = sigmoid(r(first) - r(second)); r(y): head times the state after prompt, y",
}
EVERY = (
    "; each reply stands as format.before + reply + format.end; an encoder-decoder reads it all, the state is its first"
)


def write_head(folder: Path, network: Network, form: dict) -> None:
    """preference.json and, where there is one, the head's arrays by their paths ("reward/kernel": [D])."""
    read = READ.get(form["form"])
    said = {**form, "read": read + EVERY if read else f"as the function {form['form']} of the experiment does"}
    (folder / PREFERENCE).write_text(json.dumps(said, indent=2))
    if network.heads:
        leaves = jax.tree_util.tree_leaves_with_path(network.heads)
        safetensors.numpy.save_file({sharding.path_name(p): np.asarray(leaf) for p, leaf in leaves}, folder / HEAD)
