"""How a stage's network lies in its folder: all its parameters, or what was trained over another stage's.

model.json   its configuration; the stage it is an adapter of, and the adapter's, if it is one; chat
params/      the parameters, or the small tree: adapters and head
tokenizer/   a Hugging Face tokenizer folder
"""

from __future__ import annotations

import dataclasses
import json
import zlib
from pathlib import Path
from typing import Any

import jax

from alignjax.config import one_line
from alignjax.models import huggingface, lora
from alignjax.models.build import ModelConfig, build, from_json, to_json
from alignjax.models.lora import Lora
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, as_chat
from alignjax.preference import Preference
from alignjax.runtime import metrics, sharding, train
from alignjax.runtime.checkpoint import restore_tree, save_tree
from alignjax.tasks.task import Task, one_message
from alignjax.types import Params, Rules, UserError


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a network is over another stage's."""

    base: str  # the stage
    lora: Lora | None  # None: it adds at most a head


@dataclasses.dataclass(frozen=True)
class Network:
    """A stage's result as others use it."""

    name: str  # of the stage
    model: Model
    params: Params  # whole: for an adapter, laid over the base's own arrays
    tokenizer: Tokenizer
    fingerprint: str  # of the tokenizer: equal ones share token ids
    chat: bool = False
    heads: Params = dataclasses.field(default_factory=dict)  # what a preference model has beyond its backbone
    adapter: Adapter | None = None
    small: Params = dataclasses.field(default_factory=dict)  # an adapter's own parameters
    base: Params = dataclasses.field(default_factory=dict)  # and what they lie over


@dataclasses.dataclass(frozen=True)
class Record:
    """model.json."""

    config: ModelConfig
    dtype: str  # of the backbone's parameters
    heads: dict[str, Any]  # name -> nested shapes
    chat: bool
    adapter: Adapter | None


def read_record(folder: Path) -> Record:
    """Raises UserError when there is none, or a damaged one."""
    try:
        found = json.loads((folder / "model.json").read_text())
        adapter = found["adapter"]
        if adapter is not None:
            spec = adapter["lora"] and Lora(**{**adapter["lora"], "targets": tuple(adapter["lora"]["targets"])})
            adapter = Adapter(adapter["base"], spec)
        return Record(from_json(found["config"]), found["dtype"], found["heads"], bool(found["chat"]), adapter)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} holds no model ({one_line(error)}); run its stage first") from None


def save(
    folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer, chat: bool, adapter: Adapter | None
) -> None:
    """Writes a network; of an adapter, ``params`` is the small tree."""
    backbone = jax.eval_shape(build(config).init, jax.random.key(0))
    if jax.tree.leaves(params):
        save_tree(folder / "params", params)
    tokenizer.save(folder / "tokenizer")
    own = jax.tree.leaves({name: part for name, part in params.items() if name in backbone})
    record = {
        "config": to_json(config),
        "dtype": str(own[0].dtype) if own else "float32",
        "heads": jax.tree.map(lambda x: list(x.shape), {n: part for n, part in params.items() if n not in backbone}),
        "chat": chat,
        "adapter": dataclasses.asdict(adapter) if adapter else None,
    }
    metrics.write_json(folder / "model.json", record)


def load(workdir: Path, name: str, mesh: jax.sharding.Mesh, loaded: dict[str, Network], task: Task | None) -> Network:
    """Restores a stage's network onto the mesh, once: later calls, and adapters of it, find it in ``loaded``."""
    if name in loaded:
        return loaded[name]
    folder = workdir / name
    record = read_record(folder)
    model, tokenizer = build(record.config), huggingface.read_tokenizer(folder / "tokenizer")
    if record.chat:
        tokenizer = as_chat(tokenizer, task.messages if task else one_message)
    mark = zlib.crc32((folder / "tokenizer" / "tokenizer.json").read_bytes())
    network = Network(name, model, {}, tokenizer, f"{mark}{' chat' if record.chat else ''}", record.chat)

    def restored(backbone: Any, dtype: str) -> Params:
        heads = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(tuple(shape), "float32"), record.heads,
            is_leaf=lambda node: isinstance(node, list),
        )  # fmt: skip
        shapes = {**jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), backbone), **heads}
        rules = (*((rf"^{head}/", jax.sharding.PartitionSpec()) for head in heads), *lora.RULES, *model.rules)
        where = sharding.shardings(shapes, sharding.live(rules, shapes), mesh)
        return restore_tree(folder / "params", shapes, where) if shapes else {}

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if record.adapter is None:
        network = dataclasses.replace(network, params=restored(shapes, record.dtype))
    else:
        base, spec = load(workdir, record.adapter.base, mesh, loaded, task).params, record.adapter.lora
        adapters = jax.eval_shape(lambda p, k: lora.init(spec, p, k), shapes, jax.random.key(0)) if spec else {}
        small = restored(adapters, "float32")
        whole = lora.overlay(base, small, spec.scale if spec else 1.0)
        network = dataclasses.replace(network, params=whole, adapter=record.adapter, small=small, base=base)
    heads = {head: network.params[head] for head in record.heads}
    backbone = {name: part for name, part in network.params.items() if name not in heads}
    loaded[name] = dataclasses.replace(network, params=backbone, heads=heads)
    return loaded[name]


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What a stage trains, and how it makes a model's parameters."""

    params: Params
    frozen: dict[str, Params]  # {"base": ...} under adapters, else empty
    whole: train.Whole
    adapter: Adapter | None
    rules: Rules


def trainable(start: Network, spec: Lora | None, key: jax.Array, form: Preference | None = None) -> Trainable:
    """All of the start's parameters; or with ``spec`` adapters over its base, which go on from the start's own. Of a
    form of preference model, its head too. Raises UserError when the start has other adapters."""
    rules = form.rules if form else start.model.rules
    if spec is None:
        params = in_full(start)
        return Trainable(form.extend(params, key) if form else params, {}, train.trained, None, rules)
    base, name = (start.base, start.adapter.base) if start.adapter else (start.params, start.name)
    base = {part: base[part] for part in start.params}  # without the head of a preference model
    small = lora.init(spec, base, key)
    if start.adapter and start.adapter.lora:
        if start.adapter.lora != spec:
            raise UserError(
                f"stage {start.name!r} has adapters {start.adapter.lora}, not {spec}; use the same, or None"
            )
        small = {part: start.small[part] for part in small}
    heads = {part: value for part, value in form.extend(base, key).items() if part not in base} if form else {}

    def whole(params: Params, frozen: Any) -> Params:
        return lora.overlay(frozen["base"], params, spec.scale)

    return Trainable({**small, **heads}, {"base": base}, whole, Adapter(name, spec), (*lora.RULES, *rules))


def in_full(network: Network) -> Params:
    """The parameters without adapters: merged, where it is one."""
    return jax.jit(lora.merge)(network.params) if network.adapter else network.params
