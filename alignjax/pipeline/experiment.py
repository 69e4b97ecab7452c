"""What a run is, and how a stage reaches its inputs."""

from __future__ import annotations

import dataclasses
import re
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax

from alignjax.distributed import sharding
from alignjax.distributed.hosts import Hosts
from alignjax.errors import RunAgain, UserError
from alignjax.models.build import ModelConfig, build
from alignjax.models.decoder import TransformerConfig
from alignjax.models.lora import Lora, init
from alignjax.models.tokenizer import Tokenizer, stand_in
from alignjax.pipeline import networks
from alignjax.pipeline.networks import Network
from alignjax.preferences.models import Preference
from alignjax.tasks.task import Task
from alignjax.types import Key, Params, Tokens


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run is: a task, a mesh, a seed and an ordered dict of stages."""

    task: Task | None  # None where no stage needs texts
    stages: dict[str, Any]  # name -> Stage
    mesh: sharding.Mesh = sharding.Mesh()
    seed: int = 0
    wandb: str | None = None  # a Weights & Biases project to report to, beside the files

    def __post_init__(self) -> None:
        for name, kind in {"stages": dict, "mesh": sharding.Mesh, "seed": int}.items():
            if not isinstance(value := getattr(self, name), kind):
                raise UserError(f"Experiment.{name} is a {type(value).__name__}; give it a {kind.__name__}")

    def with_stages(self, **stages: Any) -> Experiment:
        """The experiment with stages added or replaced."""
        return dataclasses.replace(self, stages={**self.stages, **stages})


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a stage runs: its name, its folder and how to reach its inputs."""

    experiment: Experiment
    workdir: Path
    name: str
    mesh: jax.sharding.Mesh
    hosts: Hosts = Hosts()
    loaded: dict[str, Any] = dataclasses.field(default_factory=dict, compare=False)
    """Networks that this stage has read: what shares a base shares its arrays."""
    sketched: bool = False
    """Nothing has run and nothing will: networks are shapes, for ``plan``."""

    @property
    def folder(self) -> Path:
        return self.workdir / self.name

    @property
    def task(self) -> Task:
        if self.experiment.task is None:
            raise UserError(f"stage {self.name!r} needs a task and the experiment has none; give it one")
        return self.experiment.task

    @property
    def seed(self) -> int:
        """The stage's own seed: the experiment's with the stage's name mixed in."""
        return zlib.crc32(f"{self.experiment.seed}/{self.name}".encode()) % 2**31

    @property
    def key(self) -> Key:
        return jax.random.key(self.seed)

    def expect(self, source: str, *kinds: str) -> None:
        """Raises UserError when the stage ``source`` is known to make something else."""
        made = getattr(self.experiment.stages[source], "makes", kinds[0])
        if made not in kinds:
            raise UserError(f"stage {self.name!r} needs {kinds[0]} and {source!r} makes {made}; name another")

    def origin(self, source: str) -> Any:
        """The stage whose model and tokenizer those of the stage ``source`` are made from."""
        stage = self.experiment.stages[source]
        while getattr(stage, "start", None) in self.experiment.stages:
            stage = self.experiment.stages[stage.start]
        return stage

    def tokenizer(self, source: str) -> Tokenizer | None:
        """That of the stage ``source`` where it is known before anything runs."""
        known = getattr(self.origin(source), "tokenizer", None)
        return known() if callable(known) else None

    def is_compared(self) -> bool:
        """Whether a preference model is made from this stage's model."""
        stages = self.experiment.stages
        makers = [name for name, stage in stages.items() if getattr(stage, "makes", None) == PREFERENCE]
        return any(self.origin(name) is stages[self.name] for name in makers)

    def rehearse(self, field: str, call: Callable[[], Any]) -> None:
        """Calls what the user gave as ``field`` with nothing to work on, so that what it refuses of its own settings is
        told before anything runs. Any other complaint is about the nothing, and waits for the real thing."""
        try:
            with warnings.catch_warnings(action="ignore"):
                call()
        except UserError as error:
            raise UserError(f"{self.name}.{field}: {error}") from None
        except Exception:  # of any kind: it is a user's function that was given nothing
            return

    def expect_room(self, source: str, field: str, tokens: int) -> None:
        """Raises UserError when the model of the stage ``source`` is known to have fewer positions than ``tokens``."""
        found = self.config(source)
        if isinstance(found, TransformerConfig) and found.positions == "learned" and found.context < tokens:
            raise UserError(f"{self.name}.{field} wants room for {tokens} tokens and the model of {source!r} has "
                            f"{found.context} positions; lower it")  # fmt: skip

    def expect_targets(self, source: str, lora: Lora | None) -> None:
        """Raises UserError when the model of the stage ``source`` is known to have no such projections."""
        if lora and (found := self.config(source)):
            jax.eval_shape(lambda key: init(lora, build(found).init(key), key), jax.random.key(0))

    def config(self, source: str) -> ModelConfig | None:
        """That of the stage ``source`` where it is known before anything runs."""
        stage = self.origin(source)
        known = getattr(stage, "config", None)
        found = known() if callable(known) else getattr(stage, "model", None)
        return found if isinstance(found, ModelConfig) else None

    def stop_if_preempted(self) -> None:
        """Raises RunAgain where several processes have been told to end. (One ends at once: see ``__main__``.)"""
        if self.hosts.preempted():
            raise RunAgain(f"{self.name}: preempted; what is whole is kept, the same command goes on from there")

    def policy(self, name: str) -> Network:
        """A stage's network, on the mesh; of a preference model, its backbone."""
        if self.sketched:
            if name not in self.loaded:
                self.loaded[name] = self.sketch(name)
            return self.loaded[name]
        return networks.load(self.workdir, name, self.mesh, self.loaded, self.experiment.task)

    def sketch(self, name: str) -> Network:
        """A stage's network as shapes. Raises UserError when what it is made from is not known before the run."""
        record, origin = self.record(name), self.origin(name)
        below = self.policy(record.adapter.base) if record.adapter else None
        tokenizer = self.tokenizer(name) or stand_in(record.config.vocab_size)
        # Folders of models with as many tokens are taken for one family.
        mark = f"{record.config.vocab_size} tokens" if hasattr(origin, "path") else f"the tokenizer of {id(origin)}"
        mark += " chat" if record.chat else ""
        return networks.sketch(name, record, tokenizer, mark, below, self.mesh)

    def record(self, name: str) -> networks.Record:
        """What a stage's model.json will say."""
        known = getattr(self.experiment.stages[name], "record", None)
        if not callable(known):
            raise UserError(f"stage {name!r} does not say what network it makes; it cannot be planned")
        return known(self)

    def preference(self, name: str) -> tuple[Network, Preference]:
        """A fitted preference model and its form."""
        found = self.policy(name)
        built = self.experiment.stages[name].build(self.task, found.model, found.tokenizer)
        return dataclasses.replace(found, params={**found.params, **found.heads}), built

    def released(self, network: Network) -> Network:
        """The network without its arrays, which go where nobody else holds them: a stage that trains wants the
        memory."""
        self.loaded.clear()
        return dataclasses.replace(network, params={}, heads={}, small={}, base={})

    def save(self, start: Network, params: Params, adapter: networks.Adapter | None) -> None:
        """Writes what was trained from ``start``: its parameters, or the small tree of an adapter."""
        networks.save(self.folder, start.model.config, params, start.tokenizer, start.chat, adapter)


POLICY, PREFERENCE, PAIRS, TABLES, FINDINGS = "a policy", "a preference model", "pairs", "tables", "findings"
REWARD = "a reward model"  # a folder's; it writes nothing
"""What a stage may say that it ``makes``, so that a wrong input is told before anything runs."""


class Program(NamedTuple):
    """A compiled program of a stage, with shapes for arguments: what ``plan`` compiles for machines that are elsewhere.
    A name ends in the prompt bucket where there are several."""

    name: str
    function: Any  # jitted
    arguments: tuple[Any, ...]
    tokens: int  # that it reads or writes in one call
    beside: Any = ()  # what lives at the time and is no argument


def shape(dtype: str, *sizes: int) -> Any:
    return jax.ShapeDtypeStruct(sizes, dtype)


def ids_of(batch: int, length: int) -> Tokens:
    """Padded ids as shapes."""
    return Tokens(shape("int32", batch, length), shape("bool", batch, length))


class Stage(Protocol):
    """A frozen dataclass. Beside these it may have ``check(context)``, which raises UserError for what can be known
    to fail before anything runs; a class attribute ``makes``; ``record(context)``, what network it will make; and
    ``programs(context)``, what it will compile."""

    def inputs(self) -> tuple[str, ...]: ...
    def run(self, context: Context) -> dict[str, Any]:
        """Does the work, resuming what an interrupted run left; returns figures for the report."""
        ...


def check(context: Context) -> None:
    """Calls the stage's own check, if it has one."""
    getattr(context.experiment.stages[context.name], "check", lambda context: None)(context)


def timed(stage: Stage, context: Context) -> tuple[dict[str, Any], float]:
    """Runs a stage under the mesh; its figures and its wall seconds."""
    begun = time.perf_counter()
    try:
        with jax.set_mesh(context.mesh):
            figures = stage.run(context)
    finally:
        context.loaded.clear()  # the next stage wants the memory
    return figures, time.perf_counter() - begun


def order(stages: Mapping[str, Stage]) -> list[str]:
    """The stages' names, inputs first. Raises UserError on an unknown input, a circle, or what is no stage."""
    done: list[str] = []
    if not stages:
        raise UserError("the experiment has no stages; give it some")
    for name, stage in stages.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "compiled":
            raise UserError(f"{name!r} cannot name a stage, whose folder it is; use letters, digits, _ and -")
        if isinstance(stage, type):
            raise UserError(f"stage {name!r} is the class {stage.__name__}; make one: {stage.__name__}(...)")
        if not (callable(getattr(stage, "inputs", None)) and callable(getattr(stage, "run", None))):
            raise UserError(f"stage {name!r} is a {type(stage).__name__}, which has no inputs() and run(context)")

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            raise UserError(f"stages form a circle: {' -> '.join((*above, name))}; an input must come before its user")
        if name not in stages:
            raise UserError(
                f"stage {above[-1]!r} names the input {name!r}, which is no stage; there are {', '.join(stages)}"
            )
        for source in stages[name].inputs():
            visit(source, (*above, name))
        if name not in done:
            done.append(name)

    for name in stages:
        visit(name, ())
    return done


def ancestors(stages: Mapping[str, Stage], names: Iterable[str]) -> set[str]:
    """The stages themselves and all they are made from."""
    seen: set[str] = set()
    left = list(names)
    while left:
        name = left.pop()
        if name not in seen:
            seen.add(name)
            left += stages[name].inputs()
    return seen
