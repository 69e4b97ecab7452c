"""A stage's network: a base, adapters over it, and heads beside it; in memory and in the stage's folder.

model.json   the configuration; the stage whose base the network lies over and its adapters' description; chat
params/      what this stage owns of it: the base and the heads, or the adapters and the heads
tokenizer/   a Hugging Face tokenizer folder
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from alignjax.checkpoints import huggingface
from alignjax.distributed import sharding, storage
from alignjax.errors import UserError, one_line
from alignjax.models import lora
from alignjax.models.build import ModelConfig, from_json, to_json
from alignjax.models.lora import Lora
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, with_chat_template
from alignjax.tasks.task import Task, one_message
from alignjax.training.checkpointing import restore_tree, save_tree
from alignjax.types import Params

_REPLICATED = jax.sharding.PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Over:
    """Says that a network lies over the base of another stage."""

    base: str  # the stage that owns the base
    lora: Lora | None  # None: the network adds at most heads
    fingerprint: str = ""  # of the base's stage when this network was made


@dataclasses.dataclass(frozen=True)
class Record:
    """model.json: what a network is, without its arrays."""

    config: ModelConfig
    dtype: str  # of the base's parameters
    heads: dict[str, Any]  # name -> nested shapes
    chat: bool
    over: Over | None


@dataclasses.dataclass(frozen=True)
class Network:
    """A stage's network as other stages use it. Its arrays may be abstract (shapes with their places)."""

    stage: str
    model: Model
    tokenizer: Tokenizer
    token_digest: str  # equal digests share token ids
    base: Params  # the backbone's own parameters; networks over one base share these arrays
    adapters: Params = dataclasses.field(default_factory=dict)
    heads: Params = dataclasses.field(default_factory=dict)  # what a preference model has beside its backbone
    over: Over | None = None
    chat: bool = False

    @property
    def params(self) -> Params:
        """The backbone's parameters with the adapters beside their kernels, and without heads."""
        if self.over is None or self.over.lora is None:
            return self.base
        return lora.overlay(self.base, self.adapters, self.over.lora.scale)

    @property
    def all_params(self) -> Params:
        """The backbone's parameters and the heads."""
        return {**self.params, **self.heads}

    def merged(self) -> Params:
        """Returns the backbone's parameters with the adapters added to their kernels."""
        return self.base if not self.adapters else apply_or_abstract(lora.merge, self.params)


def read_network_record(folder: Path) -> Record:
    """Reads model.json. Raises UserError when it is missing or damaged."""
    try:
        found = json.loads((folder / "model.json").read_text())
        over = found["over"]
        if over is not None:
            spec = over["lora"] and Lora(**{**over["lora"], "targets": tuple(over["lora"]["targets"])})
            over = Over(over["base"], spec, over["fingerprint"])
        return Record(from_json(found["config"]), found["dtype"], found["heads"], bool(found["chat"]), over)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} holds no model ({one_line(error)}); run its stage first") from None


def save(folder: Path, network: Network) -> None:
    """Writes what the stage owns of a network: without ``over`` the base and heads, else adapters and heads."""
    owned = {**(network.adapters if network.over else network.base), **network.heads}
    if jax.tree.leaves(owned):
        save_tree(folder / "params", owned)
    if jax.process_index() == 0:
        with storage.write_through(folder / "tokenizer") as local:
            network.tokenizer.save(local)
    backbone = [] if network.over else jax.tree.leaves(network.base)
    record = Record(
        network.model.config,
        str(backbone[0].dtype) if backbone else "float32",
        head_shapes(network.heads),
        network.chat,
        network.over
        and dataclasses.replace(network.over, fingerprint=stage_fingerprint(folder.parent / network.over.base)),
    )
    storage.write_json(folder / "model.json", {**dataclasses.asdict(record), "config": to_json(record.config)})


def head_shapes(heads: Params) -> dict[str, Any]:
    """Returns the nested shapes of heads, as a Record keeps them."""
    return jax.tree.map(lambda x: list(x.shape), heads)


def stage_fingerprint(folder: Path) -> str:
    """Returns the fingerprint of the stage that made a folder; empty where no record names it."""
    path = folder / "stage.json"
    text = storage.read_text(path)
    return "" if text is None else str(storage.parse_json(text, path).get("fingerprint", ""))


def read_stage_tokenizer(folder: Path, chat: bool, task: Task | None) -> tuple[Tokenizer, str]:
    """Reads a stage's tokenizer; returns it and its token digest."""
    with storage.local_copy(folder / "tokenizer") as local:
        tokenizer, digest = huggingface.read_tokenizer(local), str(zlib.crc32((local / "tokenizer.json").read_bytes()))
    if chat:
        tokenizer = with_chat_template(tokenizer, task.messages if task else one_message)
        if tokenizer.render:
            digest += f" chat {tokenizer.render(one_message('a'))!r}"
    return tokenizer, digest


def check_base(workdir: Path, name: str, over: Over) -> None:
    """Raises UserError when the base of the stage ``name`` is not the one that it was made over."""
    if over.fingerprint != stage_fingerprint(workdir / over.base):
        raise UserError(f"{workdir / name} was made over another {over.base!r} than {workdir} holds now; make it again")


def restore(folder: Path) -> Callable[[Any, Any], Params]:
    """Returns (shapes, places) -> the arrays that the stage's folder holds."""
    return lambda shapes, places: restore_tree(folder / "params", shapes, places)


def abstract(shapes: Any, places: Any) -> Params:
    """Returns shapes with their places on the mesh: what ``plan`` has instead of arrays."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)


def assemble(
    network: Network, record: Record, below: Network | None, mesh: jax.sharding.Mesh, read: Callable[[Any, Any], Params]
) -> Network:
    """Returns the network with its parameters.

    ``read(shapes, places)`` returns those that its stage owns; ``below`` is the network whose base it lies over.
    """
    model = network.model
    heads = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(tuple(shape), "float32"), record.heads,
        is_leaf=lambda node: isinstance(node, list),
    )  # fmt: skip
    backbone = jax.eval_shape(model.init, jax.random.key(0))
    if record.over is None or below is None:
        owned = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, record.dtype), backbone)
    elif record.over.lora is None:
        owned = {}
    else:
        spec = record.over.lora
        owned = jax.eval_shape(lambda p, k: lora.init_adapters(spec, p, k), backbone, jax.random.key(0))
    shapes = {**owned, **heads}
    rules = (*((rf"^{name}/", _REPLICATED) for name in heads), *lora.ADAPTER_RULES, *model.rules)
    params = read(shapes, sharding.shardings(shapes, sharding.matching_rules(rules, shapes), mesh)) if shapes else {}
    own, heads = {name: params[name] for name in owned}, {name: params[name] for name in heads}
    if record.over is None or below is None:
        return dataclasses.replace(network, base=own, heads=heads)
    if record.over.lora is None:  # the network below, with other heads
        return dataclasses.replace(below, heads=heads)
    return dataclasses.replace(network, base=below.base, adapters=own, heads=heads, over=record.over)


def apply_or_abstract(function: Callable[[Params], Params], params: Params) -> Params:
    """Returns function(params), jitted; of abstract parameters its shapes."""
    is_abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    return jax.eval_shape(function, params) if is_abstract else jax.jit(function)(params)
