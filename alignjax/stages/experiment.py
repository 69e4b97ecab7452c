"""What a run is, and how a stage reaches its inputs."""

from __future__ import annotations

import dataclasses
import json
import re
import time
import zlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax

from alignjax import config
from alignjax.models import huggingface
from alignjax.models.build import ModelConfig, build, from_json, to_json
from alignjax.models.model import Model
from alignjax.models.tokenizer import Tokenizer
from alignjax.preference import Preference
from alignjax.runtime import metrics, sharding
from alignjax.runtime.checkpoint import restore_tree, save_tree
from alignjax.tasks.task import Task
from alignjax.types import Key, Params, UserError


@dataclasses.dataclass(frozen=True)
class Experiment:
    """What a run is: a task, a mesh, a seed and an ordered dict of stages."""

    task: Task | None  # None where no stage needs texts
    stages: dict[str, Any]  # name -> Stage
    mesh: sharding.Mesh = sharding.Mesh()
    seed: int = 0
    wandb: str | None = None  # a Weights & Biases project to report to, beside the files

    def with_stages(self, **stages: Any) -> Experiment:
        """The experiment with stages added or replaced."""
        return dataclasses.replace(self, stages={**self.stages, **stages})


@dataclasses.dataclass(frozen=True)
class Network:
    """A stage's result as others use it."""

    model: Model
    params: Params
    tokenizer: Tokenizer
    fingerprint: str  # of the tokenizer: equal ones share token ids


@dataclasses.dataclass(frozen=True)
class Context:
    """Where a stage runs: its name, its folder and how to reach its inputs."""

    experiment: Experiment
    workdir: Path
    name: str
    mesh: jax.sharding.Mesh

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

    def preference(self, name: str) -> tuple[Network, Preference]:
        """A fitted preference model and its form."""
        stage = self.experiment.stages[name]
        return self.network(name, lambda m, t: stage.build(self.task, m, t))

    def policy(self, name: str) -> Network:
        return self.network(name, None)[0]

    def network(self, name: str, form: Callable[[Model, Tokenizer], Preference] | None):
        """Restores a stage's network onto the mesh."""
        folder = self.workdir / name
        try:
            sizes = from_json(json.loads((folder / "model.json").read_text()))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder} holds no model ({config.one_line(error)}); run its stage first") from None
        model, tokenizer = build(sizes), huggingface.read_tokenizer(folder / "tokenizer")
        shapes = jax.eval_shape(model.init, jax.random.key(0))
        built = form(model, tokenizer) if form else None
        if built:
            shapes = jax.eval_shape(built.extend, shapes, jax.random.key(0))
        rules = sharding.live(built.rules if built else model.rules, shapes)
        params = restore_tree(folder / "params", shapes, sharding.shardings(shapes, rules, self.mesh))
        mark = str(zlib.crc32((folder / "tokenizer" / "tokenizer.json").read_bytes()))
        return Network(model, params, tokenizer, mark), built

    def save_network(self, sizes: ModelConfig, params: Params, tokenizer: Tokenizer) -> None:
        save_tree(self.folder / "params", params)
        tokenizer.save(self.folder / "tokenizer")
        metrics.write_json(self.folder / "model.json", to_json(sizes))

    def inherit(self, start: str, params: Params) -> None:
        """Saves parameters of the same sizes and tokenizer as the stage ``start``."""
        sizes = from_json(json.loads((self.workdir / start / "model.json").read_text()))
        self.save_network(sizes, params, huggingface.read_tokenizer(self.workdir / start / "tokenizer"))


POLICY, PREFERENCE, PAIRS, TABLES, FINDINGS = "a policy", "a preference model", "pairs", "tables", "findings"
"""What a stage may say that it ``makes``, so that a wrong input is told before anything runs."""


class Stage(Protocol):
    """A frozen dataclass. Beside these it may have ``check(context)``, which raises UserError for what can be known
    to fail before anything runs, and a class attribute ``makes``."""

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
    with jax.set_mesh(context.mesh):
        figures = stage.run(context)
    return figures, time.perf_counter() - begun


def order(stages: Mapping[str, Stage]) -> list[str]:
    """The stages' names, inputs first. Raises UserError on an unknown input, a circle, or what is no stage."""
    done: list[str] = []
    for name, stage in stages.items():
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or name == "compiled":
            raise UserError(f"{name!r} cannot name a stage, whose folder it is; use letters, digits, _ and -")
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
