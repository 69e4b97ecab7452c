"""A stage's network: a base, adapters over it, and heads beside it; in memory and in the stage's folder.

model.json   the configuration; the stage whose base the network lies over and its adapters' description; chat
params/      what this stage owns of it: the base and the heads, or the adapters and the heads
kept/AT/     as params/, without heads, at another time of its training: after AT steps, or their moving average
tokenizer/   a Hugging Face tokenizer folder
"""

from __future__ import annotations

import dataclasses
import functools
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
Read = Callable[[Any, Any], Params]
"""(shapes, places) -> the parameters that a stage owns: arrays, or abstract."""


@dataclasses.dataclass(frozen=True)
class SharedBase:
    """The stage whose base parameters a network shares, and what the network adds to them."""

    stage: str
    lora: Lora | None  # None: the network adds at most heads
    fingerprint: str = ""  # of that stage when this network was made


@dataclasses.dataclass(frozen=True)
class NetworkRecord:
    """model.json: what a network is, without its arrays."""

    config: ModelConfig
    dtype: str  # of the base's parameters
    heads: dict[str, Any]  # name -> nested shapes
    chat: bool
    shared_base: SharedBase | None
    temperature: float = 1.0  # the network is softmax(logits / temperature)


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
    shared_base: SharedBase | None = None
    chat: bool = False
    temperature: float = 1.0  # ``model`` has it in its logits

    @functools.cached_property  # one overlay, so that every user of the network shares its arrays
    def params(self) -> Params:
        """The backbone's parameters with the adapters beside their kernels, and without heads."""
        if self.shared_base is None or self.shared_base.lora is None:
            return self.base
        return lora.overlay(self.base, self.adapters, self.shared_base.lora.scale)

    @property
    def all_params(self) -> Params:
        """The backbone's parameters and the heads."""
        return {**self.params, **self.heads}

    def merged(self) -> Params:
        """Returns the backbone's parameters with the adapters added to their kernels."""
        return self.base if not self.adapters else apply_or_abstract(lora.merge, self.params)


def read_network_record(folder: Path) -> NetworkRecord:
    """Reads model.json. Raises UserError when it is missing or damaged."""
    try:
        found = json.loads((folder / "model.json").read_text())
        shared, config = found["shared_base"], from_json(found["config"])
        if shared is not None:
            spec = shared["lora"] and Lora(**{**shared["lora"], "targets": tuple(shared["lora"]["targets"])})
            shared = SharedBase(shared["stage"], spec, shared["fingerprint"])
        temperature = float(found.get("temperature", 1.0))
        return NetworkRecord(config, found["dtype"], found["heads"], bool(found["chat"]), shared, temperature)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} holds no model ({one_line(error)}); run its stage first") from None


def save(folder: Path, network: Network) -> None:
    """Writes what the stage owns of a network: without ``over`` the base and heads, else adapters and heads."""
    owned = {**owned_params(network), **network.heads}
    if jax.tree.leaves(owned):
        save_tree(folder / "params", owned)
    if jax.process_index() == 0:
        with storage.write_through(folder / "tokenizer") as local:
            network.tokenizer.save(local)
    shared, backbone = network.shared_base, jax.tree.leaves(network.base)
    if shared:
        shared = dataclasses.replace(shared, fingerprint=stage_fingerprint(folder.parent / shared.stage))
    dtype = str(backbone[0].dtype) if backbone and not shared else "float32"
    heads = head_shapes(network.heads)
    record = NetworkRecord(network.model.config, dtype, heads, network.chat, shared, network.temperature)
    storage.write_json(folder / "model.json", {**dataclasses.asdict(record), "config": to_json(record.config)})


def owned_params(network: Network) -> Params:
    """Returns what a stage owns of its network, without heads."""
    return network.adapters if network.shared_base else network.base


def save_kept(folder: Path, at: int | str, network: Network) -> None:
    """Writes what the stage owns of its network at another time of its training, without heads. ``at`` names it."""
    save_tree(folder / "kept" / str(at), owned_params(network))


def load_kept(folder: Path, at: int | str, network: Network) -> Network:
    """Returns the network, without heads, that ``save_kept`` wrote to the stage's folder.

    ``network`` is the stage's own, whose arrays may be abstract. Arrays that it lies over are left out. Raises
    UserError when it is missing or damaged.
    """
    shapes = owned_params(network)
    owned = restore_tree(folder / "kept" / str(at), shapes, jax.tree.map(lambda x: x.sharding, shapes))
    parts = {"base": {}, "adapters": owned} if network.shared_base else {"base": owned}
    return dataclasses.replace(network, **parts, heads={})


def head_shapes(heads: Params) -> dict[str, Any]:
    """Returns the nested shapes of heads, as a NetworkRecord keeps them."""
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


def check_base(workdir: Path, name: str, shared: SharedBase) -> None:
    """Raises UserError when the base that the stage ``name`` shares has been made again since."""
    if shared.fingerprint != stage_fingerprint(workdir / shared.stage):
        raise UserError(f"{workdir / name} was made over another {shared.stage!r} than {workdir} holds now; "
                        "make it again")  # fmt: skip


def restore(folder: Path) -> Read:
    """Returns (shapes, places) -> the arrays that the stage's folder holds."""
    return lambda shapes, places: restore_tree(folder / "params", shapes, places)


def abstract(shapes: Any, places: Any) -> Params:
    """Returns shapes with their places on the mesh: what ``plan`` has instead of arrays."""
    return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)


def fill_network(
    network: Network, record: NetworkRecord, below: Network | None, mesh: jax.sharding.Mesh, read: Read
) -> Network:
    """Returns the network with its parameters; ``below`` is the network whose base it lies over."""
    owned, heads = owned_shapes(network.model, record, below)
    shapes = {**owned, **heads}
    rules = (*((rf"^{name}/", _REPLICATED) for name in heads), *lora.ADAPTER_RULES, *network.model.rules)
    params = read(shapes, sharding.shardings(shapes, sharding.matching_rules(rules, shapes), mesh)) if shapes else {}
    own, heads = {name: params[name] for name in owned}, {name: params[name] for name in heads}
    if record.shared_base is None or below is None:
        return dataclasses.replace(network, base=own, heads=heads)
    if record.shared_base.lora is None:  # the network below, with other heads
        return dataclasses.replace(below, heads=heads)
    return dataclasses.replace(network, base=below.base, adapters=own, heads=heads, shared_base=record.shared_base)


def owned_shapes(model: Model, record: NetworkRecord, below: Network | None) -> tuple[Params, Params]:
    """Returns the shapes of what a stage owns of its network, beside heads, and of its heads."""
    heads = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(tuple(shape), "float32"), record.heads,
        is_leaf=lambda node: isinstance(node, list),
    )  # fmt: skip
    backbone = jax.eval_shape(model.init, jax.random.key(0))
    if record.shared_base is None or below is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, record.dtype), backbone), heads
    if (spec := record.shared_base.lora) is None:
        return {}, heads
    return jax.eval_shape(lambda base, key: lora.init_adapters(spec, base, key), backbone, jax.random.key(0)), heads


def apply_or_abstract(function: Callable[[Params], Params], params: Params) -> Params:
    """Returns function(params), jitted; of abstract parameters its shapes."""
    is_abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    return jax.eval_shape(function, params) if is_abstract else jax.jit(function)(params)
