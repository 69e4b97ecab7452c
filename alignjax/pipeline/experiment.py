"""What an experiment is, what a stage is, and how a stage reaches its inputs."""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from alignjax.distributed import sharding
from alignjax.distributed.hosts import Hosts
from alignjax.errors import RunAgain, UserError
from alignjax.fields import stage_inputs
from alignjax.models.build import build
from alignjax.models.model import tempered
from alignjax.models.tokenizer import Tokenizer, placeholder_tokenizer
from alignjax.pipeline import networks
from alignjax.pipeline.fingerprint import fingerprint, input_names
from alignjax.pipeline.networks import Network, NetworkRecord
from alignjax.tasks.task import Task
from alignjax.training.loop import TrainingRun
from alignjax.types import Tokens


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A task, a mesh, a seed and an ordered dict of stages."""

    task: Task | None  # None where no stage needs texts
    stages: dict[str, Any]  # name -> Stage
    mesh: sharding.Mesh = sharding.Mesh()
    seed: int = 0
    wandb: str | None = None  # a Weights & Biases project that metrics go to, beside the files

    def __post_init__(self) -> None:
        for name, kind in {"stages": dict, "mesh": sharding.Mesh, "seed": int}.items():
            if not isinstance(value := getattr(self, name), kind):
                raise UserError(f"Experiment.{name} is a {type(value).__name__}; give it a {kind.__name__}")
        if not isinstance(self.task, Task | None):
            raise UserError(
                f"Experiment.task is a {type(self.task).__name__}; give it a Task, whose source that may be"
            )

    def with_stages(self, **stages: Any) -> Experiment:
        """Returns the experiment with stages added or replaced."""
        return dataclasses.replace(self, stages={**self.stages, **stages})


class Program(NamedTuple):
    """A jitted function of a stage, with abstract arguments: ``run`` calls the function, ``plan`` compiles it.

    The name ends in the prompt bucket where there are several.
    """

    name: str
    function: Any  # jitted
    arguments: tuple[Any, ...]  # abstract
    tokens: int  # that one call reads or writes
    resident: Any = ()  # abstract arrays that live at the time and are no argument


def programs_of(programs: Iterable[Program], name: str, buckets: Sequence[int] = ()) -> tuple[Program, ...]:
    """Returns the programs with this name; with ``buckets``, those with this name and one of the buckets behind it."""
    names = {f"{name} {bucket}" for bucket in buckets} or {name}
    return tuple(program for program in programs if program.name in names)


def function_of(programs: Iterable[Program], name: str, buckets: Sequence[int] = ()) -> Any:
    """Returns the jitted function of the programs with this name; the buckets share it."""
    return programs_of(programs, name, buckets)[0].function


class Exposure(NamedTuple):
    """What a result depends on, as far as the held-out law asks. Models and pairs are digests of their content."""

    identity: frozenset[str] = frozenset()  # the network that it is, whatever it is asked
    made_from: frozenset[str] = frozenset()  # the networks that its training began with
    trained_against: frozenset[str] = frozenset()  # the networks that rewarded, ranked or labelled what it learned from
    fitted: frozenset[str] = frozenset()  # pairs that it, or such a model, was trained on
    measured: frozenset[str] = frozenset()  # pairs that such a model was measured on, and may have been chosen by

    def __or__(self, other: Exposure) -> Exposure:
        return Exposure(*(a | b for a, b in zip(self, other, strict=True)))


class NetworkSpec(NamedTuple):
    """What is known of a stage's network before the stage runs."""

    record: NetworkRecord
    tokenizer: Tokenizer | None  # None: the stage makes it
    token_digest: str  # equal digests share token ids


class Stage(Protocol):
    """A frozen dataclass. Fields that name other stages are declared with ``fields.stage_input``."""

    makes: Any  # a Kind
    meanings: dict[str, str]  # metric or figure -> what it shows

    def check(self, context: Context) -> None:
        """Raises UserError for what can be known to fail before anything runs."""
        ...

    def network(self, context: Context) -> NetworkSpec | None:
        """Returns what network the stage makes; None where it makes none, or does not say."""
        ...

    def exposure(self, context: Context) -> Exposure:
        """Returns what the stage's result depends on."""
        ...

    def programs(self, context: Context) -> tuple[Program, ...]:
        """Returns the jitted programs of the stage, from abstract networks alone."""
        ...

    def run(self, context: Context, programs: tuple[Program, ...]) -> dict[str, Any]:
        """Does the work with those programs, resuming an interrupted run; returns figures for the report."""
        ...


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a stage runs: its name, its folder, and how it reaches its inputs."""

    experiment: Experiment
    workdir: Path | None  # None: nothing has run and nothing will, for ``plan``
    name: str
    mesh: jax.sharding.Mesh
    hosts: Hosts = Hosts()
    loaded: dict[str, Network] = dataclasses.field(default_factory=dict, compare=False)  # networks with arrays
    abstracts: dict[str, Network] = dataclasses.field(default_factory=dict, compare=False)  # networks with shapes

    @property
    def folder(self) -> Path:
        """The stage's folder."""
        return self.folder_of(self.name)

    def folder_of(self, name: str) -> Path:
        """Returns the folder of the stage ``name``."""
        assert self.workdir is not None  # ``plan`` reads no folder
        return self.workdir / name

    @property
    def task(self) -> Task:
        """The experiment's task. Raises UserError when it has none."""
        if self.experiment.task is None:
            raise UserError(f"stage {self.name!r} needs a task and the experiment has none; give it one")
        return self.experiment.task

    def seed(self, own: int = 0) -> int:
        """Returns the seed of the stage. Stages of one type share it, so that the arms of a table share their prompts
        and keys; ``own``, where it is not 0, makes it another."""
        kind = type(self.experiment.stages[self.name]).__name__
        return zlib.crc32(f"{self.experiment.seed}/{kind}/{own}".encode()) % 2**31

    def key(self, own: int = 0) -> jax.Array:
        """Returns the root key of the stage."""
        return jax.random.key(self.seed(own))

    def for_stage(self, name: str) -> Context:
        """Returns the context of another stage, which shares this one's networks."""
        return dataclasses.replace(self, name=name)

    def training_run(self, own_seed: int) -> TrainingRun:
        """Returns where the training loop of this stage works."""
        return TrainingRun(self.name, self.folder, self.mesh, self.hosts, self.key(own_seed), self.experiment.wandb)

    def stop_if_preempted(self) -> None:
        """Raises RunAgain where several processes have been told to end. (One process ends at once: ``__main__``.)"""
        if self.hosts.preempted():
            raise RunAgain(f"{self.name}: preempted; finished parts are kept, the same command continues from there")

    def spec(self, name: str) -> NetworkSpec | None:
        """Returns what is known of the network of the stage ``name`` before it runs."""
        return self.experiment.stages[name].network(self.for_stage(name))

    def exposure(self, *names: str) -> Exposure:
        """Returns what the results of these stages depend on, together."""
        exposures = (self.experiment.stages[name].exposure(self.for_stage(name)) for name in names)
        return Exposure(*(frozenset().union(*parts) for parts in zip(Exposure(), *exposures, strict=True)))

    def asked_exposure(self, source: str) -> Exposure:
        """Returns the exposure of the language model of ``source`` that is asked, as it is, which of two replies is
        better.

        As such it is a preference model of its own. Others that merely began with the same weights are not made from
        it, as two reward models over one base are not made from each other.
        """
        start = self.exposure(source)
        return start._replace(identity=frozenset(f"{name} asked" for name in start.identity))

    def derived_exposure(self, *sources: str) -> Exposure:
        """Returns the exposure of a network that this stage trains from the networks of ``sources``."""
        start = self.exposure(*sources)
        own = frozenset({self.fingerprint(self.name)})
        return start._replace(identity=own, made_from=start.identity | start.made_from)

    def fingerprint(self, name: str, stage: Any = None) -> str:
        """Returns the fingerprint of a stage; ``stage`` stands for it where it is given."""
        return fingerprint(self.experiment, name, stage)

    def load(self, name: str) -> Network:
        """Returns a finished stage's network with its arrays on the mesh. A base that several share is read once."""
        if name not in self.loaded:
            record = networks.read_network_record(self.folder_of(name))
            self.loaded[name] = self._assemble(name, record, networks.restore(self.folder_of(name)), self.load)
        return self.loaded[name]

    def abstract(self, name: str) -> Network:
        """Returns the network of a stage as shapes with their places, whether or not the stage has run.

        Raises UserError when the stage has not run and does not say what it makes.
        """
        if name not in self.abstracts:
            record = self._record(name)
            self.abstracts[name] = self._assemble(name, record, networks.abstract, self.abstract)
        return self.abstracts[name]

    def release(self) -> None:
        """Forgets the arrays of the networks that were loaded; memory is freed where nobody else holds them."""
        self.loaded.clear()

    def _record(self, name: str) -> NetworkRecord:
        if self._is_written(name):
            return networks.read_network_record(self.folder_of(name))
        if (spec := self.spec(name)) is None:
            raise UserError(f"stage {name!r} does not say what network it makes, and has not run; run it first")
        return spec.record

    def _is_written(self, name: str) -> bool:
        return self.workdir is not None and (self.workdir / name / "model.json").exists()

    def _tokenizer(self, name: str, record: NetworkRecord) -> tuple[Tokenizer, str]:
        if self._is_written(name):
            return networks.read_stage_tokenizer(self.folder_of(name), record.chat, self.experiment.task)
        spec = self.spec(name)
        assert spec is not None  # ``_record`` has asked
        return spec.tokenizer or placeholder_tokenizer(record.config.vocab_size), spec.token_digest

    def _assemble(self, name: str, record: NetworkRecord, read: Any, below: Any) -> Network:
        base = below(record.shared_base.stage) if record.shared_base else None
        if record.shared_base and self._is_written(name):
            assert self.workdir is not None
            networks.check_base(self.workdir, name, record.shared_base)
        tokenizer, digest = self._tokenizer(name, record)
        model = tempered(build(record.config), record.temperature)
        network = Network(name, model, tokenizer, digest, base={}, chat=record.chat, temperature=record.temperature)
        return networks.fill_network(network, record, base, self.mesh, read)


def load_network(folder: Path, mesh: jax.sharding.Mesh) -> Network:
    """Returns the network of a finished stage WORKDIR/NAME, without its experiment."""
    return Context(Experiment(None, {}), folder.parent, folder.name, mesh).load(folder.name)


def abstract_array(dtype: str, *shape: int) -> Any:
    """Returns an array's shape and dtype, in the place of the array."""
    return jax.ShapeDtypeStruct(shape, dtype)


def abstract_tokens(batch: int, length: int) -> Tokens:
    """Returns padded ids as shapes, [batch, length]."""
    return Tokens(abstract_array("int32", batch, length), abstract_array("bool", batch, length))


def order(stages: Mapping[str, Any]) -> list[str]:
    """Returns the stages' names, inputs first. Raises UserError on a name that cannot be, an input that is no stage or
    makes something else than its user needs, and on a cycle."""
    if not stages:
        raise UserError("the experiment has no stages; give it some")
    for name, stage in stages.items():
        _check_stage(name, stage)
    for name, stage in stages.items():
        _check_inputs(name, stage, stages)
    done: list[str] = []
    for name in stages:
        done += [source for source in _inputs_first(name, stages, ()) if source not in done]
    return list(dict.fromkeys(done))


def _check_stage(name: Any, stage: Any) -> None:
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "compiled":
        raise UserError(f"{name!r} cannot name a stage, because it names a folder; use letters, digits, _ and -")
    if isinstance(stage, type):
        raise UserError(f"stage {name!r} is the class {stage.__name__}; make an instance: {stage.__name__}(...)")
    members = ("makes", "meanings", "check", "network", "exposure", "programs", "run")
    if not dataclasses.is_dataclass(stage) or (missing := [m for m in members if m not in dir(stage)]):
        lacks = f"lacks {missing[0]}" if dataclasses.is_dataclass(stage) else "is no dataclass"
        raise UserError(
            f"stage {name!r} is a {type(stage).__name__}, which {lacks}; see alignjax.pipeline.experiment.Stage"
        )


def _check_inputs(name: str, stage: Any, stages: Mapping[str, Any]) -> None:
    for field, source, kinds in stage_inputs(stage):
        if not isinstance(source, str) or source not in stages:
            raise UserError(f"stage {name!r} names the input {source!r} ({field}), which is no stage; "
                            f"there are {', '.join(stages)}")  # fmt: skip
        if stages[source].makes not in kinds:
            raise UserError(f"stage {name!r} needs {kinds[0].value} as {field}, and {source!r} makes "
                            f"{stages[source].makes.value}; name another stage")  # fmt: skip


def _inputs_first(name: str, stages: Mapping[str, Any], users: tuple[str, ...]) -> Iterator[str]:
    if name in users:
        raise UserError(f"stages form a cycle: {' -> '.join((*users, name))}; an input must come before its user")
    for source in input_names(stages[name]):
        yield from _inputs_first(source, stages, (*users, name))
    yield name


def ancestors(stages: Mapping[str, Any], names: Iterable[str]) -> set[str]:
    """Returns the named stages and everything that they are made from."""
    return {source for name in names for source in _inputs_first(name, stages, ())}
