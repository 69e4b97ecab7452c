"""Runs an experiment's stages in order, each once, and shows its tables."""

from __future__ import annotations

import contextlib
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from alignjax.distributed import sharding, storage
from alignjax.distributed.hosts import Hosts
from alignjax.errors import UserError
from alignjax.pipeline import store
from alignjax.pipeline.experiment import Context, Experiment, order
from alignjax.pipeline.fingerprint import difference, input_names, resolve
from alignjax.reporting import report
from alignjax.reporting.tables import flatten
from alignjax.training.metrics import import_wandb


def run(
    experiment: Experiment, workdir: Path, only: Sequence[str] = (), redo: bool = False, hosts: Hosts = Hosts()
) -> None:
    """Runs the stages that are not finished, inputs first; with ``only``, those named, whose inputs must be finished.

    A stage that was made with another configuration, its own or an input's, is refused, or made again with ``redo``.
    What can be known to fail is refused before anything runs. With ``hosts`` this is one process of several, which all
    call it alike. Raises UserError, and RunAgain where the run was ended from outside.
    """
    names = order(experiment.stages)
    if unknown := [name for name in only if name not in names]:
        raise UserError(f"unknown stage {unknown[0]!r}; this experiment has {', '.join(names)}")
    mesh = sharding.make_mesh(experiment.mesh)
    contexts = [Context(experiment, workdir, name, mesh, hosts) for name in names if not only or name in only]
    unfinished = [context for context in contexts if not store.is_finished(experiment, workdir, context.name)]
    for context in unfinished:
        experiment.stages[context.name].check(context)
    if unfinished and experiment.wandb:
        import_wandb()  # raises UserError when it is not installed
    hosts.broadcast(lambda: storage.try_writing(workdir))
    if not becomes_visible(workdir):
        raise UserError(f"{workdir} is not there on {socket.gethostname()}; give a --workdir that all hosts share")
    keep_compiled(workdir / "compiled")
    for context in contexts:
        with store.locked(workdir, context.name) if hosts.is_first else contextlib.nullcontext():
            run_stage(context, redo)
    if hosts.is_first and all(store.is_finished(experiment, workdir, name) for name in names):
        show_report(experiment, workdir)
    elif hosts.is_first:  # the tables of the stages that were asked for
        print(*filter(None, (report.stage_section(context.folder) for context in contexts)), sep="\n")
    hosts.barrier("the end of the run")


def becomes_visible(folder: Path, seconds: int = 90) -> bool:
    """Returns whether a folder that another host has made is seen here, at the latest after ``seconds``.

    A network file system may remember for a minute that it was missing. A bucket has no folders.
    """
    if storage.is_bucket(folder):
        return True
    for _ in range(seconds):
        if folder.is_dir():
            return True
        time.sleep(1)
    return False


def run_stage(context: Context, redo: bool) -> None:
    """Runs one stage, or resumes it, unless it is finished."""
    name, folder, hosts = context.name, context.folder, context.hosts
    stage, record = context.experiment.stages[name], resolve(context.experiment, name)
    state = hosts.broadcast(lambda: stage_state(context, record, redo))
    if state not in ("resumed", "new"):
        say(context, state)
        return
    try:
        figures, seconds = execute(context)
        hosts.barrier(f"the end of {name}")
    except BaseException as error:
        if hosts.is_first:
            store.clean_up_failed(folder, refused=isinstance(error, UserError) and state == "new")
        raise
    hosts.broadcast(lambda: store.finish(folder, {**record, "figures": figures, "meanings": stage.meanings}, seconds))
    values = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in flatten(figures) if v is not None]
    say(context, f"{seconds:.1f} s; {', '.join(values)}")


def stage_state(context: Context, record: dict[str, Any], redo: bool) -> str:
    """Returns what the stage's folder holds, and makes it ready to be worked in.

    Raises UserError when it cannot run.
    """
    experiment, name, folder = context.experiment, context.name, context.folder
    assert context.workdir is not None
    if store.is_finished(experiment, context.workdir, name):
        return "finished before"
    for source in input_names(experiment.stages[name]):
        if not store.is_finished(experiment, context.workdir, source):
            raise UserError(
                f"stage {name!r} needs {source!r}, which is not finished in {context.workdir}; run it first"
            )
    if store.prepare(folder, record, experiment.stages[name], redo):
        return "finished before, and put back"
    return "resumed" if store.has_work(folder) else "new"


def execute(context: Context) -> tuple[dict[str, Any], float]:
    """Runs a stage's programs under the mesh; returns its figures and its wall seconds."""
    stage, begin = context.experiment.stages[context.name], time.perf_counter()
    try:
        with jax.set_mesh(context.mesh):
            figures = stage.run(context, stage.programs(context))
    finally:
        context.release()  # the next stage needs the memory
    return figures, time.perf_counter() - begin


def say(context: Context, words: str) -> None:
    """Prints a line about the stage, on the first host alone."""
    if context.hosts.is_first:
        print(f"{context.name}: {words}", file=sys.stderr)


def keep_compiled(folder: Path) -> None:
    """Keeps compiled programs in the folder, for other stages and for a resumed run. A cache that the user has set up
    is left alone."""
    if jax.config.values["jax_compilation_cache_dir"] is None:
        jax.config.update("jax_compilation_cache_dir", str(storage.absolute(folder)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        if storage.is_bucket(folder):  # XLA's own part of the cache knows no buckets
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        # A disk that is too full for the cache is reported where it matters: by the results.
        warnings.filterwarnings("ignore", "Error (writing|reading) persistent compilation cache")


def show_report(experiment: Experiment, workdir: Path) -> None:
    """Writes WORKDIR/report.md with its pictures and prints the tables.

    Raises UserError when a stage is not finished.
    """

    for name, stage in experiment.stages.items():
        if not store.is_finished(experiment, workdir, name):
            found = store.read_record(workdir / name)
            made_with = f"was made with {difference(found, resolve(experiment, name), stage)}"
            what = made_with if found.get("finished") else "is not finished"
            raise UserError(f"stage {name!r} in {workdir} {what}; run the experiment first")
    print(report.write_report(workdir, {name: store.read_record(workdir / name) for name in experiment.stages}))
