"""Runs an experiment's stages in order, each once, and shows its table."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import json
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import alignjax
from alignjax.distributed import storage
from alignjax.errors import UserError
from alignjax.pipeline import config

RECORD = "stage.json"
NOT_SCIENCE = {"log_every", "save_every", "keep", "gather", "decode", "remat"}  # fields that change no result


def run(
    experiment: Any, workdir: Path, only: Sequence[str] = (), redo: bool = False, hosts: Any = None
) -> None:  # fmt: skip
    """Runs the stages that are not finished, inputs first; with ``only``, those named (their inputs must be
    finished). A stage that was made with another configuration, its own or an input's, is refused, or made again
    with ``redo``. What can be known to fail is refused before anything runs. With ``hosts`` (runtime.hosts.connect)
    this is one process of several, which all call it alike. Raises UserError, and RunAgain where a run was ended
    from outside."""
    from alignjax import stages  # here, so that a typo answers before JAX starts
    from alignjax.distributed import sharding
    from alignjax.distributed.hosts import Hosts

    hosts = hosts or Hosts()

    names = stages.order(experiment.stages)
    for name in only:
        if name not in names:
            raise UserError(f"unknown stage {name!r}; this experiment has {', '.join(names)}")
    mesh = sharding.make_mesh(experiment.mesh)
    contexts = [stages.Context(experiment, workdir, name, mesh, hosts) for name in names if not only or name in only]
    for context in contexts:
        if not is_finished(experiment, workdir, context.name):
            stages.check(context)
    hosts.first(lambda: storage.try_writing(workdir))
    if not appears(workdir):
        raise UserError(f"{workdir} is not there on {socket.gethostname()}; give a --workdir that all hosts share")
    keep_compiled(workdir / "compiled")
    for context in contexts:
        with locked(workdir, context.name) if hosts.leads else contextlib.nullcontext():
            run_stage(context, redo)
    if hosts.leads and all(is_finished(experiment, workdir, name) for name in names):
        show_report(experiment, workdir)
    hosts.meet("the end of the run")


def appears(folder: Path, seconds: int = 90) -> bool:
    """Whether what another host has made is seen here, at last: a network file system may remember for a minute that
    it was not there. (In a bucket there are no folders, and all hosts see the same.)"""
    if storage.is_bucket(folder):
        return True
    for _ in range(seconds):
        if folder.is_dir():
            return True
        time.sleep(1)
    return False


def run_stage(context: Any, redo: bool) -> None:
    """Runs one stage, or resumes it, unless it is finished."""
    from alignjax.pipeline import stages

    experiment, name, folder, hosts = context.experiment, context.name, context.folder, context.hosts
    stage, record = experiment.stages[name], resolved(experiment, name)

    def state() -> str:
        """What lies in the folder, which is made ready to be worked in."""
        if is_finished(experiment, context.workdir, name):
            return "finished before"
        for source in stage.inputs():
            if not is_finished(experiment, context.workdir, source):
                raise UserError(
                    f"stage {name!r} needs {source!r}, which is not finished in {context.workdir}; run it first"
                )
        if prepare(folder, record, redo):
            return "finished before, and taken back"
        return "resumed" if has_work(folder) else "new"

    found = hosts.first(state)
    if found not in ("resumed", "new"):
        say(context, found)
        return
    try:
        figures, seconds = stages.timed(stage, context)
        hosts.meet(f"the end of {name}")
    except BaseException as error:
        if hosts.leads:
            withdraw(folder, refused=isinstance(error, UserError) and found == "new")
        raise
    hosts.first(lambda: finish(folder, {**record, "finished": True, "figures": figures}, seconds))
    told = [f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in flat(figures).items() if v is not None]
    say(context, f"{seconds:.1f} s; {', '.join(told)}")


def finish(folder: Path, record: dict[str, Any], seconds: float) -> None:
    """Writes the record of a finished stage; what only a resumed run would use goes."""
    spent = read_record(folder).get("seconds", 0.0) + seconds
    write_record(folder, {**record, "seconds": spent})
    storage.remove_tree(folder / "checkpoints")
    remove(aside(folder))


def say(context: Any, words: str) -> None:
    if context.hosts.leads:
        print(f"{context.name}: {words}", file=sys.stderr)


@contextlib.contextmanager
def locked(workdir: Path, name: str) -> Iterator[None]:
    """One process at a time works on a stage; the lock of a killed one is gone with it. (A bucket has no locks.)"""
    if storage.is_bucket(workdir):
        yield
        return
    with (workdir / f".{name}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"stage {name!r} in {workdir} is at work in another process; wait for it, "
                            "or choose another --workdir") from None  # fmt: skip
        except OSError:  # a file system without locks
            pass
        yield


def is_finished(experiment: Any, workdir: Path, name: str) -> bool:
    """With this very configuration."""
    record = read_record(workdir / name)
    return bool(record.get("finished")) and record.get("fingerprint") == resolved(experiment, name)["fingerprint"]


def keep_compiled(folder: Path) -> None:
    """Stages share compiled programs, and a resumed run does not compile them again; a cache that the user
    has set up is left alone."""
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(storage.absolute(folder)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
        if storage.is_bucket(folder):  # XLA's own part of the cache knows none
            jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
        # A disk too full for it is told by what matters: the results.
        warnings.filterwarnings("ignore", "Error (writing|reading) persistent compilation cache")


def flat(figures: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested figures with dotted names."""
    result: dict[str, Any] = {}
    for name, value in figures.items():
        inner = flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
        result.update(inner)
    return result


def resolved(experiment: Any, name: str) -> dict[str, Any]:
    """What a stage amounts to: its configuration, the task's, the seed and its inputs' fingerprints."""
    stage = experiment.stages[name]
    record = {
        "stage": name,
        "config": {"kind": type(stage).__name__, **config.describe(stage)},
        "task": config.describe(experiment.task),
        "seed": experiment.seed,
        "inputs": {source: resolved(experiment, source)["fingerprint"] for source in stage.inputs()},
    }
    text = json.dumps(without(record, NOT_SCIENCE), sort_keys=True)
    return {"fingerprint": hashlib.sha256(text.encode()).hexdigest()[:16], **record, "code": code_version()}


def without(node: Any, names: set[str]) -> Any:
    if isinstance(node, dict):
        return {k: without(v, names) for k, v in node.items() if k not in names}
    return node


def prepare(folder: Path, record: dict[str, Any], redo: bool) -> bool:
    """Makes the stage's folder ready: to be resumed, or empty.

    Work done with another configuration is refused with UserError; with ``redo`` a finished stage is put aside until
    the new one is finished, and what was put aside with this very configuration comes back: then True.
    """
    found = read_record(folder)
    if found.get("fingerprint") not in (None, record["fingerprint"]):
        if has_work(folder) and not redo:
            raise UserError(
                f"stage {record['stage']!r} in {folder.parent} was made with {difference(found, record)}; "
                "use another --workdir, or --redo to make it again"
            )
        if found.get("finished"):
            remove(aside(folder))
            move(folder, aside(folder))
        else:
            remove(folder)
    if not is_there(folder) and read_record(aside(folder)).get("fingerprint") == record["fingerprint"]:
        move(aside(folder), folder)
    found = read_record(folder)
    if not found:
        if storage.is_bucket(folder):  # what a kill left of one that came or went
            remove(folder)
        storage.make_folder(folder)
        write_record(folder, {**record, "finished": False})
    return bool(found.get("finished"))


def aside(folder: Path) -> Path:
    """Where a finished stage waits while it is made again."""
    return folder.with_name(f".{folder.name}.before")


def withdraw(folder: Path, refused: bool = False) -> None:
    """After a failure: a stage that left no work is as if never begun, and what was put aside for it comes back. So it
    does for one that was begun in this run and ``refused``: it would be refused again. One that was resumed keeps its
    work, and the mend may be elsewhere."""
    waits = is_there(aside(folder))
    if not has_work(folder) or (refused and waits):
        remove(folder)
        if waits:
            move(aside(folder), folder)


def remove(folder: Path) -> None:
    """All at once, as others see it: a kill leaves no half of it to be resumed. In a bucket its record goes first, and
    what has none is no stage."""
    if storage.is_bucket(folder):
        storage.remove_tree(folder, first=RECORD)
        return
    gone = folder.with_name(f".{folder.name}.gone")
    storage.remove_tree(gone)
    if folder.exists():
        folder.rename(gone)
        storage.remove_tree(gone)


def move(folder: Path, new: Path) -> None:
    """Gives the folder another name; in a bucket file by file, and whichever of the two has a record is whole."""
    if not storage.is_bucket(folder):
        folder.rename(new)
        return
    remove(new)
    storage.copy(folder, new, last=RECORD)
    remove(folder)


def is_there(folder: Path) -> bool:
    return bool(read_record(folder)) if storage.is_bucket(folder) else folder.exists()


def has_work(folder: Path) -> bool:
    """Whether a stage is finished or left what a resumed run would use."""
    if read_record(folder).get("finished"):
        return True
    told = (RECORD, "metrics.jsonl", "tensorboard", "wandb")
    left = (path for path in storage.contents(folder) if path.parts[len(folder.parts)] not in told)
    return not all(map(storage.is_empty, left))


def difference(found: dict[str, Any], record: dict[str, Any]) -> str:
    """The first leaf in which two records differ, in words."""
    old, new = (flat({k: r.get(k) for k in ("config", "task", "seed", "inputs")}) for r in (found, record))
    for name in [*new, *old]:
        if old.get(name) != new.get(name) and name.rsplit(".", 1)[-1] not in NOT_SCIENCE:
            return f"{name.removeprefix('config.')}={old.get(name)!r}, now {new.get(name)!r}"
    return "another configuration"


def read_record(folder: Path) -> dict[str, Any]:
    """A stage's record, empty when there is none. Raises UserError when it is damaged."""

    path = folder / RECORD
    text = storage.read(path)
    if text is None:
        return {}
    record = storage.from_json(text, path)
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged; remove {folder} to make the stage again")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:

    storage.write_json(folder / RECORD, dataclasses.asdict(record) if dataclasses.is_dataclass(record) else record)


@functools.cache
def code_version() -> str:
    """The package's version and, in a checkout, its commit (with + when it has changes)."""
    here = Path(__file__).parent
    words = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return alignjax.__version__
    commit = found.stdout.strip() if found.returncode == 0 else ""
    return f"{alignjax.__version__} {commit}".strip()


def show_report(experiment: Any, workdir: Path) -> None:
    """Writes WORKDIR/report.md with its pictures and prints the tables."""
    from alignjax.reporting import report

    for name in experiment.stages:
        if not is_finished(experiment, workdir, name):
            found = read_record(workdir / name)
            what = (
                f"was made with {difference(found, resolved(experiment, name))}"
                if found.get("finished")
                else ("is not finished")
            )
            raise UserError(f"stage {name!r} in {workdir} {what}; run the experiment first")
    records = {name: read_record(workdir / name) for name in experiment.stages}
    print(report.write(workdir, records))
