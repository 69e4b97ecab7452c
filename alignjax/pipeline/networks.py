"""How a stage's network lies in its folder: all its parameters, or what was trained over another stage's.

model.json   its configuration; the stage it is an adapter of, and the adapter's, if it is one; chat
params/      the parameters, or the small tree: adapters and head
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
from alignjax.models.build import ModelConfig, build, from_json, to_json
from alignjax.models.lora import Lora
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer, as_chat
from alignjax.preferences.models import Preference
from alignjax.tasks.task import Task, one_message
from alignjax.training import learn as train
from alignjax.training.checkpointing import restore_tree, save_tree
from alignjax.types import Params, Rules


@dataclasses.dataclass(frozen=True)
class Adapter:
    """What a network is over another stage's."""

    base: str  # the stage
    lora: Lora | None  # None: it adds at most a head
    mark: str = ""  # the base's fingerprint when this was made


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
            adapter = Adapter(adapter["base"], spec, adapter["mark"])
        return Record(from_json(found["config"]), found["dtype"], found["heads"], bool(found["chat"]), adapter)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{folder} holds no model ({one_line(error)}); run its stage first") from None


def save(
    folder: Path, config: ModelConfig, params: Params, tokenizer: Tokenizer, chat: bool, adapter: Adapter | None
) -> None:
    """Writes a network; of an adapter, ``params`` is the small tree."""
    backbone = jax.eval_shape(build(config).init, jax.random.key(0))
    if jax.tree.leaves(params):
        save_tree(folder / "params", params)
    if jax.process_index() == 0:
        with storage.delivered(folder / "tokenizer") as here:
            tokenizer.save(here)
    own = jax.tree.leaves({name: part for name, part in params.items() if name in backbone})
    record = {
        "config": to_json(config),
        "dtype": str(own[0].dtype) if own else "float32",
        "heads": jax.tree.map(lambda x: list(x.shape), {n: part for n, part in params.items() if n not in backbone}),
        "chat": chat,
        "adapter": dataclasses.asdict(adapter) | {"mark": stage_mark(folder.parent / adapter.base)}
        if adapter
        else None,
    }
    storage.write_json(folder / "model.json", record)


def stage_mark(folder: Path) -> str:
    """The fingerprint of the stage that made a folder; empty where none says so."""
    path = folder / "stage.json"
    text = storage.read(path)
    return "" if text is None else str(storage.from_json(text, path).get("fingerprint", ""))


def load(workdir: Path, name: str, mesh: jax.sharding.Mesh, loaded: dict[str, Network], task: Task | None) -> Network:
    """Restores a stage's network onto the mesh, once: later calls, and adapters of it, find it in ``loaded``."""
    if name in loaded:
        return loaded[name]
    folder = workdir / name
    record = read_record(folder)
    with storage.fetched(folder / "tokenizer") as here:
        model, tokenizer = build(record.config), huggingface.read_tokenizer(here)
        mark = str(zlib.crc32((here / "tokenizer.json").read_bytes()))
    if record.chat:
        tokenizer = as_chat(tokenizer, task.messages if task else one_message)
    if record.chat and tokenizer.render:
        mark += f" chat {tokenizer.render(one_message('a'))!r}"
    below = None
    if record.adapter:
        below = load(workdir, record.adapter.base, mesh, loaded, task)
        if record.adapter.mark != stage_mark(workdir / record.adapter.base):
            raise UserError(
                f"{folder} was made over another {record.adapter.base!r} than lies in {workdir} now; make it again"
            )

    def read(shapes: Any, where: Any) -> Params:
        return restore_tree(folder / "params", shapes, where)

    loaded[name] = assembled(Network(name, model, {}, tokenizer, mark, record.chat), record, below, mesh, read)
    return loaded[name]


def sketch(
    name: str, record: Record, tokenizer: Tokenizer, mark: str, below: Network | None, mesh: jax.sharding.Mesh
) -> Network:
    """The network of a stage that need not have run, its arrays as shapes with their places on the mesh."""

    def read(shapes: Any, where: Any) -> Params:
        return jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, where)

    return assembled(Network(name, build(record.config), {}, tokenizer, mark, record.chat), record, below, mesh, read)


def assembled(
    network: Network, record: Record, below: Network | None, mesh: jax.sharding.Mesh, read: Callable[[Any, Any], Params]
) -> Network:
    """The network with its parameters, as ``read`` gets those of its own; ``below`` is what an adapter lies over."""
    model = network.model

    def restored(backbone: Any, dtype: str) -> Params:
        beyond = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(tuple(shape), "float32"), record.heads,
            is_leaf=lambda node: isinstance(node, list),
        )  # fmt: skip
        shapes = {**jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), backbone), **beyond}
        rules = (*((rf"^{head}/", jax.sharding.PartitionSpec()) for head in beyond), *lora.RULES, *model.rules)
        where = sharding.shardings(shapes, sharding.live(rules, shapes), mesh)
        return read(shapes, where) if shapes else {}

    shapes = jax.eval_shape(model.init, jax.random.key(0))
    if record.adapter is None or below is None:
        network = dataclasses.replace(network, params=restored(shapes, record.dtype))
    else:
        spec = record.adapter.lora
        if spec is None:  # a head at most: else it is what it lies over
            network = dataclasses.replace(below, params={**below.params, **restored({}, "float32")}, heads={})
        else:
            adapters = jax.eval_shape(lambda p, k: lora.init(spec, p, k), shapes, jax.random.key(0))
            small = restored(adapters, "float32")
            whole = lora.overlay(below.params, small, spec.scale)
            network = dataclasses.replace(
                network, params=whole, adapter=record.adapter, small=small, base=below.params
            )  # fmt: skip
    own = {head: network.params[head] for head in record.heads}
    backbone = {part: value for part, value in network.params.items() if part not in own}
    return dataclasses.replace(network, params=backbone, heads=own)


@dataclasses.dataclass(frozen=True)
class Trainable:
    """What a stage trains, and how it makes a model's parameters."""

    params: Params  # arrays of its own, whose memory the training takes over
    frozen: dict[str, Params]  # {"base": ...} under adapters, else empty
    whole: train.Whole
    adapter: Adapter | None
    rules: Rules


def trainable(start: Network, spec: Lora | None, key: jax.Array, form: Preference | None = None) -> Trainable:
    """All of the start's parameters; or with ``spec`` adapters over its base, which go on from the start's own. Of a
    form of preference model, its head too. Raises UserError when the start has other adapters."""
    rules = form.rules if form else start.model.rules
    if spec is None:
        params = in_full(dataclasses.replace(start, params=in_float32(start.params)))
        return Trainable({**params, **heads(start, params, key, form)}, {}, train.trained, None, rules)
    base, name = (start.base, start.adapter.base) if start.adapter else (start.params, start.name)
    base = {part: base[part] for part in start.params}  # without the head of a preference model
    small = lora.init(spec, base, key)
    if start.adapter and start.adapter.lora:
        if start.adapter.lora != spec:
            raise UserError(
                f"stage {start.name!r} has adapters {start.adapter.lora}, not {spec}; use the same, or None"
            )
        small = in_float32({part: start.small[part] for part in small})

    def whole(params: Params, frozen: Any) -> Params:
        return lora.overlay(frozen["base"], params, spec.scale)

    new = heads(start, base, key, form)
    return Trainable({**small, **new}, {"base": base}, whole, Adapter(name, spec), (*lora.RULES, *rules))


def heads(start: Network, backbone: Params, key: jax.Array, form: Preference | None) -> Params:
    """What the form has beyond the backbone: the start's own where it has it, as a reward model's folder does."""
    if form is None:
        return {}
    fresh = {name: part for name, part in form.extend(backbone, key).items() if name not in backbone}
    return {**fresh, **in_float32({name: start.heads[name] for name in fresh.keys() & start.heads.keys()})}


def gathering(model: Model) -> Model:
    """The model, its parameters gathered (runtime.sharding.gathered) before it begins to write."""
    dtype = model.config.compute_dtype
    return model._replace(
        start=lambda params, prompt, new: model.start(sharding.gathered(params, model.rules, dtype), prompt, new)
    )


def in_full(network: Network) -> Params:
    """The parameters without adapters: merged, where it is one."""
    return made(lora.merge, network.params) if network.adapter else network.params


def in_float32(params: Params) -> Params:
    """A copy, wide enough for steps of Adam: in bfloat16 most would round to nothing."""
    return made(lambda p: jax.tree.map(lambda x: x.astype("float32"), p), params)


def made(function: Callable[[Params], Params], params: Params) -> Params:
    """What the function makes of the parameters; of a sketch's, the shapes."""
    sketched = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(params))
    return jax.eval_shape(function, params) if sketched else jax.jit(function)(params)


def derived(start: Record, name: str, spec: Lora | None, heads: dict[str, Any]) -> Record:
    """The record of what ``trainable`` makes of the stage ``name``, whose record is ``start``."""
    if spec is None:
        return dataclasses.replace(start, dtype="float32", heads=heads, adapter=None)
    return dataclasses.replace(start, heads=heads, adapter=Adapter(start.adapter.base if start.adapter else name, spec))
