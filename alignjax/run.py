"""The command line: run an experiment's stages in order, each once, and show its table."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import alignjax
from alignjax import config
from alignjax.types import UserError

RECORD = "stage.json"
NOT_SCIENCE = {"log_every", "save_every"}  # fields that change no result


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for what the user can mend; ends the process with 130 when interrupted."""
    arguments = parser().parse_args(argv)
    try:
        settings = dict(split_setting(text) for text in arguments.set)
        if arguments.help:
            return show_leaves(arguments.file, settings)
        return arguments.command(arguments, settings)
    except UserError as error:
        print(f"alignjax: {config.one_line(error)}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of our output has gone: `alignjax ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (Python flushes it at exit)
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"alignjax: {where}{error.strerror or config.one_line(error)}; mend that and run again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nalignjax: interrupted; the same command goes on from the last save", file=sys.stderr)
        sys.stderr.flush()
        os._exit(130)  # a tidy exit would take the interpreter from under threads at work, which can crash


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="alignjax", description=alignjax.__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for name, command, words in (
        ("run", run_command, "run the stages of an experiment file that are not finished, then show its table"),
        ("table", table_command, "show the table of a finished run and write its report again"),
    ):
        sub = commands.add_parser(name, help=words, description=words, add_help=False)
        sub.add_argument("file", metavar="FILE", help="an experiment: a Python file with get_config()")
        sub.add_argument("-h", "--help", action="store_true", help="show what the experiment file can set")
        sub.add_argument("--workdir", type=Path, metavar="W", help="where everything is written")
        sub.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a leaf; repeatable")
        sub.add_argument(
            "--only", action="append", default=[], metavar="NAME", help="run these stages alone; repeatable"
        )
        sub.add_argument("--redo", action="store_true", help="make stages again whose configuration has changed")
        sub.set_defaults(command=command, usage=sub.format_help())
    return top


def split_setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--set {text!r} is not PATH=VALUE; write, for example, --set nash_md.adam.lr=1e-4")
    return name, value


def show_leaves(path: str, settings: Mapping[str, str]) -> int:
    """Prints every leaf of an experiment with its value."""
    experiment = config.load(path, settings)
    print(f"usage: alignjax run {path} --workdir W [--set PATH=VALUE ...] [--only NAME ...] [--redo]\n")
    print("What --set can change, and its value now:")
    for name, value in config.leaves(experiment):
        print(f"  {name.removeprefix('stages.')} = {value!r}")
    return 0


def run_command(arguments: argparse.Namespace, settings: Mapping[str, str]) -> int:
    experiment = config.load(arguments.file, settings)
    run(experiment, workdir_of(arguments), only=arguments.only, redo=arguments.redo)
    return 0


def table_command(arguments: argparse.Namespace, settings: Mapping[str, str]) -> int:
    experiment = config.load(arguments.file, settings)
    show_report(experiment, workdir_of(arguments))
    return 0


def workdir_of(arguments: argparse.Namespace) -> Path:
    if arguments.workdir is None:
        raise UserError("--workdir is missing; say where to write, for example --workdir runs/quickstart")
    return arguments.workdir


def run(experiment: Any, workdir: Path, only: Sequence[str] = (), redo: bool = False) -> None:
    """Runs the stages that are not finished, inputs first; with ``only``, those named (their inputs must be
    finished). A finished stage whose configuration, or an input's, has changed is refused, or made again
    with ``redo``. Raises UserError."""
    from alignjax import stages  # here, so that --help and a typo answer before JAX starts
    from alignjax.runtime import sharding

    names = stages.order(experiment.stages)
    for name in only:
        if name not in names:
            raise UserError(f"unknown stage {name!r}; this experiment has {', '.join(names)}")
    mesh = sharding.make_mesh(experiment.mesh)
    workdir.mkdir(parents=True, exist_ok=True)
    if not os.access(workdir, os.W_OK):
        raise UserError(f"{workdir} cannot be written; choose another --workdir")
    keep_compiled(workdir / "compiled")
    for name in [n for n in names if not only or n in only]:
        stage = experiment.stages[name]
        context = stages.Context(experiment, workdir, name, mesh)
        record = resolved(experiment, name)
        if prepare(context.folder, record, redo):
            print(f"{name}: finished before", file=sys.stderr)
            continue
        for source in stage.inputs():
            if not is_finished(experiment, workdir, source):
                raise UserError(f"stage {name!r} needs {source!r}, which is not finished in {workdir}; run it first")
        figures, seconds = stages.timed(stage, context)
        spent = read_record(context.folder).get("seconds", 0.0) + seconds
        write_record(context.folder, {**record, "finished": True, "seconds": spent, "figures": figures})
        shutil.rmtree(context.folder / "checkpoints", ignore_errors=True)
        told = ", ".join(f"{k} {v:.3g}" for k, v in flat(figures).items() if isinstance(v, int | float))
        print(f"{name}: {seconds:.1f} s; {told}", file=sys.stderr)
    if all(is_finished(experiment, workdir, name) for name in names):
        show_report(experiment, workdir)


def is_finished(experiment: Any, workdir: Path, name: str) -> bool:
    """With this very configuration."""
    record = read_record(workdir / name)
    return bool(record.get("finished")) and record.get("fingerprint") == resolved(experiment, name)["fingerprint"]


def keep_compiled(folder: Path) -> None:
    """Stages share compiled programs, and a resumed run does not compile them again; a cache that the user
    has set up is left alone."""
    import jax

    if getattr(jax.config, "jax_compilation_cache_dir", None) is None:
        jax.config.update("jax_compilation_cache_dir", str(folder.resolve()))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
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
    """Makes the stage's folder ready. True when it is finished with this very configuration. Raises
    UserError when it was begun with another, unless ``redo``, which empties it."""
    found = read_record(folder)
    if found and found.get("fingerprint") != record["fingerprint"]:
        if not redo:
            raise UserError(
                f"stage {record['stage']!r} in {folder.parent} was made with {difference(found, record)}; "
                "use another --workdir, or --redo to make it again"
            )
        shutil.rmtree(folder)
        found = {}
    if not found:
        folder.mkdir(parents=True, exist_ok=True)
        write_record(folder, {**record, "finished": False})
    return bool(found.get("finished"))


def difference(found: dict[str, Any], record: dict[str, Any]) -> str:
    """The first leaf in which two records differ, in words."""
    old, new = (flat({k: r.get(k) for k in ("config", "task", "seed", "inputs")}) for r in (found, record))
    for name in [*new, *old]:
        if old.get(name) != new.get(name) and name.rsplit(".", 1)[-1] not in NOT_SCIENCE:
            return f"{name.removeprefix('config.')}={old.get(name)!r}, now {new.get(name)!r}"
    return "another configuration"


def read_record(folder: Path) -> dict[str, Any]:
    """A stage's record, empty when there is none. Raises UserError when it is damaged."""
    from alignjax.runtime import metrics

    path = folder / RECORD
    if not path.exists():
        return {}
    record = metrics.read_json(path)
    if not isinstance(record, dict):
        raise UserError(f"{path} is damaged; remove {folder} to make the stage again")
    return record


def write_record(folder: Path, record: dict[str, Any]) -> None:
    from alignjax.runtime import metrics

    metrics.write_json(folder / RECORD, dataclasses.asdict(record) if dataclasses.is_dataclass(record) else record)


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
    from alignjax import report

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
