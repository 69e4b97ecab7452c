"""Runs an experiment's stages in order, each once, and shows its tables."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
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
from alignjax.errors import UserError, one_line
from alignjax.pipeline import store
from alignjax.pipeline.experiment import Context, Experiment, order
from alignjax.pipeline.fingerprint import difference, input_names, resolve
from alignjax.pipeline.gathering import does_gather, gathered, is_part
from alignjax.reporting import report
from alignjax.reporting.tables import flatten
from alignjax.training.metrics import import_wandb

_MEETING = 60.0  # seconds in which all of several processes meet after an error that they raise alike
_SKIPPED, _EXTENDED = "skipped", "extended"


def run(
    experiment: Experiment,
    workdir: Path,
    only: Sequence[str] = (),
    redo: bool = False,
    hosts: Hosts = Hosts(),
    keep_going: bool = False,
) -> None:
    """Runs the stages that are not finished, inputs first; with ``only``, those named, whose inputs must be finished.

    A stage that was made with another configuration, its own or an input's, is refused, or made again with ``redo``.
    What can be known to fail is refused before anything runs. With ``hosts`` this is one process of several, which all
    call it alike. With ``keep_going`` a stage that raises UserError ends alone: stages that need it are skipped, the
    others run, and the UserError at the end names it. Raises UserError, and RunAgain where the run was ended from
    outside.
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
    failed, skipped = run_stages(contexts, redo, keep_going)
    if hosts.is_first and all(store.is_finished(experiment, workdir, name) for name in names):
        show_report(experiment, workdir)
    elif hosts.is_first:
        show_tables([context for context in contexts if context.name not in (*failed, *skipped)])
    hosts.barrier("the end of the run")
    if failed:
        raise UserError(f"failed: {', '.join(failed)}; {_SKIPPED}: {', '.join(skipped) or 'none'}; the lines above say "
                        "why, the same command tries them again")  # fmt: skip


def run_stages(contexts: Sequence[Context], redo: bool, keep_going: bool) -> tuple[list[str], list[str]]:
    """Runs the stages in this order; returns the names of those that failed and of those that were skipped.

    Raises the first UserError, unless ``keep_going``. Of several processes that all raise it alike, as they do where
    process 0 decides and where all compute the same, all go on; an error of one alone ends all.
    """
    failed: list[str] = []
    skipped: list[str] = []
    for context in contexts:
        try:
            with contextlib.ExitStack() as stack:
                lock = store.locked(context.folder.parent, context.name)
                context.hosts.broadcast(functools.partial(stack.enter_context, lock))
                if run_stage(context, redo, [*failed, *skipped]) == _SKIPPED:
                    skipped.append(context.name)
        except UserError as error:
            if not keep_going or not context.hosts.all_meet(f"the failure of {context.name}", _MEETING):
                raise
            failed.append(context.name)
            say(context, f"failed; {one_line(error)}")
    return failed, skipped


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


def run_stage(context: Context, redo: bool, ended: Sequence[str] = ()) -> str:
    """Runs one stage, or resumes it, unless it is finished or needs one of ``ended``; returns what it did."""
    name, folder, hosts, whole = context.name, context.folder, context.hosts, context.experiment
    finished = hosts.broadcast(lambda: finished_inputs(context))
    experiment, missing = gathered(whole, name, finished)
    context = dataclasses.replace(context, experiment=experiment)
    stage, record = experiment.stages[name], {**resolve(experiment, name), **({"missing": missing} if missing else {})}
    for source in input_names(stage):
        if source in ended and source not in finished:
            say(context, f"{_SKIPPED}, because {source} is not finished")
            return _SKIPPED
    state: str = hosts.broadcast(lambda: stage_state(context, whole, record, redo))
    if missing:
        say(context, f"without {', '.join(missing)}, not finished")
    if state not in ("resumed", "new", _EXTENDED):
        say(context, state)
        return state
    try:
        figures, seconds = execute(context)
        hosts.barrier(f"the end of {name}")
    except BaseException as error:
        if hosts.is_first:
            refused = isinstance(error, UserError)
            store.clean_up_failed(folder, refused and state == "new", refused and state == _EXTENDED)
        raise
    hosts.broadcast(lambda: store.finish(folder, {**record, "figures": figures, "meanings": stage.meanings}, seconds))
    values = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in flatten(figures) if v is not None]
    say(context, f"{seconds:.1f} s; {', '.join(values)}")
    return state


def finished_inputs(context: Context) -> list[str]:
    """Returns the names of the stage's inputs that are finished."""
    experiment, workdir = context.experiment, context.folder.parent
    return [name for name in input_names(experiment.stages[context.name])
            if store.is_finished(experiment, workdir, name)]  # fmt: skip


def stage_state(context: Context, whole: Experiment, record: dict[str, Any], redo: bool) -> str:
    """Returns what the stage's folder holds, and makes it ready to be worked in. ``whole`` is the experiment with all
    policies of a stage that gathers.

    Raises UserError when it cannot run.
    """
    experiment, name, folder = context.experiment, context.name, context.folder
    assert context.workdir is not None
    if store.is_finished(experiment, context.workdir, name):
        if (found := store.read_record(folder)).get("missing", []) != (missing := record.get("missing", [])):
            store.write_record(folder, {**found, "missing": missing})
        return "finished before"
    for source in input_names(experiment.stages[name]):
        if not store.is_finished(experiment, context.workdir, source):
            raise UserError(
                f"stage {name!r} needs {source!r}, which is not finished in {context.workdir}; run it first"
            )
    found = store.read_record(folder)
    extend = is_part(whole, name, found) or (redo and does_gather(whole.stages[name]))
    if store.prepare(folder, record, experiment.stages[name], redo, extend):
        return "finished before, and put back"
    if extend and found.get("finished"):
        return _EXTENDED
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


def show_tables(contexts: Sequence[Context]) -> None:
    """Prints the tables of these stages, which are finished."""
    tables = (report.stage_tables(context.folder, store.read_record(context.folder)) for context in contexts)
    print(*filter(None, tables), sep="\n")


def show_report(experiment: Experiment, workdir: Path, keep_going: bool = False) -> None:
    """Writes WORKDIR/report.md with its pictures and prints the tables; with ``keep_going``, of what is finished.

    Raises UserError when a stage is not finished, or none is.
    """
    records: dict[str, Any] = {}
    for name, stage in experiment.stages.items():
        found = store.read_record(workdir / name)
        is_gathered = bool(found.get("finished")) and is_part(experiment, name, found)
        if is_gathered or store.is_finished(experiment, workdir, name):
            records[name] = found
        elif not keep_going:
            made_with = f"was made with {difference(found, resolve(experiment, name), stage)}"
            what = made_with if found.get("finished") else "is not finished"
            raise UserError(f"stage {name!r} in {workdir} {what}; run the experiment first")
    if not records:
        raise UserError(f"no stage is finished in {workdir}; run the experiment first")
    print(report.write_report(workdir, records))
