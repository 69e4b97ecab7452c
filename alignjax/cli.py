"""The command line."""

from __future__ import annotations

import argparse
import inspect
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import alignjax
from alignjax.distributed import storage
from alignjax.errors import RUN_AGAIN, RunAgain, UserError, one_line
from alignjax.pipeline import config


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for what the user can mend, or 75 where the same command goes on."""
    arguments = parser().parse_args(argv)
    try:
        return arguments.command(arguments)
    except UserError as error:
        print(f"alignjax: {one_line(error)}", file=sys.stderr)
        return 2
    except RunAgain as error:
        print(f"alignjax: {one_line(error)}", file=sys.stderr)
        return RUN_AGAIN
    except BrokenPipeError:  # the reader of our output has gone: `alignjax ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (Python flushes it at exit)
        return 0
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(f"alignjax: {where}{error.strerror or one_line(error)}; mend that and run again", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(prog="alignjax", description=alignjax.__doc__)
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    experiment_commands(commands)
    plan_command_line(commands)
    checkpoint_commands(commands)
    return top


def experiment_commands(commands: Any) -> None:
    for name, command, words in (
        ("run", run_command, "run the stages of an experiment file that are not finished, then show its table"),
        ("table", table_command, "show the table of a finished run and write its report again"),
    ):
        sub = commands.add_parser(name, help=words, description=words, add_help=False)
        sub.add_argument("file", metavar="FILE", help="an experiment: a Python file with get_config()")
        sub.add_argument("-h", "--help", action="store_true", help="show what the experiment file can set")
        sub.add_argument("--workdir", metavar="W", help="where everything is written")
        sub.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a leaf; repeatable")
        if command is run_command:
            sub.add_argument(
                "--only", action="append", default=[], metavar="NAME", help="run these stages alone; repeatable"
            )
            sub.add_argument("--redo", action="store_true", help="make stages again whose configuration has changed")
            several = sub.add_argument_group(
                "several processes", "found out on TPU slices, Slurm and Open MPI; else all three"
            )
            several.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
            several.add_argument("--processes", type=int, metavar="N", help="how many there are (1: this one alone)")
            several.add_argument("--process", type=int, metavar="I", help="which one this is, from 0")
        sub.set_defaults(command=command)


def plan_command_line(commands: Any) -> None:
    words = "compile an experiment's stages for TPUs or GPUs that are not here: memory, arithmetic, traffic"
    sub = commands.add_parser("plan", help=words, description=words)
    sub.add_argument("file", metavar="FILE", help="an experiment: a Python file with get_config()")
    sub.add_argument(
        "--topology", action="append", required=True, metavar="KIND[:SHAPE]",
        help="v5e:4x4, v5p:4x4x8, v6e:16x16, h100:2x8 (hosts x GPUs); a kind alone searches the smallest; repeatable",
    )  # fmt: skip
    sub.add_argument(
        "--mesh", action="append", default=[], metavar="AXIS=N,...",
        help="instead of the experiment's own, as fsdp=-1,tensor=4 (-1: all the rest); repeatable",
    )  # fmt: skip
    sub.add_argument("--set", action="append", default=[], metavar="PATH=VALUE", help="change a leaf; repeatable")
    sub.add_argument("--only", action="append", default=[], metavar="NAME", help="these stages alone; repeatable")
    sub.add_argument("--every-bucket", action="store_true", help="not the largest bucket of prompts alone")
    sub.add_argument("--largest", action="store_true", help="show each program's largest arrays too")
    sub.add_argument("--json", metavar="FILE", help="write all that is known as JSON")
    sub.set_defaults(command=plan_command)


def checkpoint_commands(commands: Any) -> None:
    words = "write a finished stage's network as a folder that transformers (or PEFT, for adapters) opens"
    sub = commands.add_parser("export", help=words, description=words)
    sub.add_argument("stage", metavar="W/NAME", help="the folder of a finished stage")
    sub.add_argument("folder", metavar="DIR", help="what to write; it must not exist")
    sub.add_argument("--merge", action="store_true", help="write adapters merged into their base, as one checkpoint")
    sub.set_defaults(command=export_command)

    words = "a quick look at a checkpoint: what it says after a prompt, as it says it"
    sub = commands.add_parser("sample", help=words, description=words)
    sub.add_argument("folder", metavar="DIR", help="a Hugging Face folder, or W/NAME of a finished stage")
    sub.add_argument("--prompt", required=True, metavar="TEXT")
    sampling_options(sub)
    sub.set_defaults(command=sample_command)

    words = "two checkpoints' replies to the same prompts, side by side"
    sub = commands.add_parser("compare", help=words, description=words)
    sub.add_argument("folders", nargs=2, metavar="DIR", help="a Hugging Face folder, or W/NAME of a finished stage")
    sub.add_argument("--prompts", required=True, metavar="FILE", help='one a line, or JSON lines {"prompt": text}')
    sub.add_argument("--count", type=int, default=8, help="how many prompts of the file (8)")
    sampling_options(sub)
    sub.set_defaults(command=compare_command)


def sampling_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="at most so many tokens (128)")
    sub.add_argument("--temperature", type=float, default=1.0, help="0 is greedy (1)")
    sub.add_argument("--top-p", type=float, default=1.0, help="the fewest likeliest tokens of this mass (1)")
    sub.add_argument("--top-k", type=int, default=0, help="the so many likeliest tokens (0: all)")
    sub.add_argument("--seed", type=int, default=0)
    sub.add_argument("--stop", metavar="TEXT", help="ends a reply, beside the tokenizer's own end tokens")
    sub.add_argument("--chat", action="store_true", help="ask through the tokenizer's chat template")


def export_command(arguments: argparse.Namespace) -> int:
    """Writes a stage's network as a folder."""
    from alignjax.pipeline import export

    stage = storage.parse_path(arguments.stage)
    with storage.bucket_errors(stage):
        print(export.export(stage, Path(arguments.folder).expanduser(), arguments.merge))
    return 0


def sample_command(arguments: argparse.Namespace) -> int:
    """Streams what a checkpoint says after a prompt."""
    from alignjax.pipeline import preview

    network, options = open_network(arguments.folder, arguments.chat), preview_options(arguments)
    preview.stream(network, arguments.prompt, options)
    return 0


def compare_command(arguments: argparse.Namespace) -> int:
    """Shows two checkpoints' replies side by side."""
    from alignjax.pipeline import preview

    options = preview_options(arguments)
    if arguments.count < 1:
        raise UserError(f"--count={arguments.count} must be at least 1")
    prompts = preview.read_prompts(Path(arguments.prompts).expanduser())[: arguments.count]
    networks = [open_network(folder, arguments.chat) for folder in arguments.folders]
    preview.compare(networks, prompts, options)
    return 0


def open_network(folder: str, chat: bool) -> Any:
    """Opens a Hugging Face folder or a finished stage's network."""
    from alignjax.pipeline import preview

    path = storage.parse_path(folder)
    with storage.bucket_errors(path):
        return preview.open_network(path, chat)


def preview_options(arguments: argparse.Namespace) -> Any:
    """Returns PreviewOptions. Raises UserError when one is out of range."""
    from alignjax.pipeline.preview import PreviewOptions
    from alignjax.sampling.process import Sampling

    if arguments.max_new_tokens < 1:
        raise UserError(f"--max-new-tokens={arguments.max_new_tokens} must be at least 1")
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    return PreviewOptions(arguments.stop, arguments.max_new_tokens, sampling, arguments.seed)


def settings_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns what --set says, path -> text."""
    return dict(split_setting(text) for text in arguments.set)


def split_setting(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--set {text!r} is not PATH=VALUE; write, for example, --set nash_md.adam.lr=1e-4")
    return name, value


def show_leaves(path: str, settings: Mapping[str, str]) -> int:
    """Prints what an experiment file says of itself and all that ``--set`` can change in it."""
    get_config = config.get_config_of(path)
    print(f"usage: alignjax run {path} --workdir W [--set PATH=VALUE ...] [--only NAME ...] [--redo]\n")
    if words := get_config.__globals__.get("__doc__"):
        print(f"{words.strip()}\n")
    parameters = inspect.signature(get_config).parameters.values()
    if parameters:
        print("What --set gives to the file, and what it is without:")
        for p in parameters:
            print(f"  {p.name}" + (" must be given" if p.default is p.empty else f" = {p.default!r}"))
        print()
    missing = [name for name in config.required(get_config) if name not in settings]
    if missing:
        print(f"What else can be set is shown when {' and '.join(missing)} are given with --help." if len(missing) > 1
              else f"What else can be set is shown when {missing[0]} is given with --help.")  # fmt: skip
        return 0
    print("What else --set can change, and its value now:")
    for name, value in config.leaves(load_experiment(path, settings)):
        print(f"  {name.removeprefix('stages.')} = {value!r}")
    return 0


def load_experiment(path: str, settings: Mapping[str, str]) -> Any:
    """Raises UserError when the file makes no experiment."""
    from alignjax.pipeline.experiment import Experiment, order

    experiment = config.load(path, settings)
    if not isinstance(experiment, Experiment):
        kind = type(experiment).__name__
        raise UserError(f"{path}: get_config() returned a {kind}; it must return an alignjax.Experiment")
    order(experiment.stages)  # refuses what is no stage
    return experiment


def run_command(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    if arguments.help:
        return show_leaves(arguments.file, settings)
    from alignjax.distributed.hosts import Launch, connect
    from alignjax.distributed.watchdog import exit_now
    from alignjax.pipeline import run

    workdir = workdir_of(arguments)
    hosts = connect(Launch(arguments.coordinator, arguments.processes, arguments.process))
    try:
        with storage.bucket_errors(workdir):
            run.run(load_experiment(arguments.file, settings), workdir, arguments.only, arguments.redo, hosts)
    except (UserError, RunAgain, OSError) as error:
        hosts.end_all(status_of(error), one_line(error))  # goes on where there are no others
        if storage.is_bucket(workdir) and not isinstance(error, BrokenPipeError):
            # A tidy exit would wait for threads that go on trying to reach the bucket.
            exit_now(status_of(error), one_line(error))
        raise
    except Exception as error:  # of any kind: the others would wait for this process for ever
        if hosts.count > 1:
            traceback.print_exc()
            hosts.confirm_others_alive()
            hosts.end_all(1, f"{type(error).__name__}: {one_line(error)}")
        raise
    return 0


def status_of(error: Exception) -> int:
    return RUN_AGAIN if isinstance(error, RunAgain) else 2


def table_command(arguments: argparse.Namespace) -> int:
    settings = settings_of(arguments)
    if arguments.help:
        return show_leaves(arguments.file, settings)
    from alignjax.pipeline import run

    experiment, workdir = load_experiment(arguments.file, settings), workdir_of(arguments)
    with storage.bucket_errors(workdir):
        run.show_report(experiment, workdir)
    return 0


def plan_command(arguments: argparse.Namespace) -> int:
    from alignjax.planning import plan, topology

    topology.prepare_environment(shape for name in arguments.topology for shape in plan.shapes(name))
    meshes = [plan.read_mesh(text) for text in arguments.mesh]
    experiment = load_experiment(arguments.file, settings_of(arguments))
    rows = []
    for row in plan.plan(experiment, arguments.topology, meshes, arguments.only, arguments.every_bucket):
        rows.append(row)
        print(f"{row.topology} {row.mesh} {row.stage}: {row.program} {row.seconds:.0f} s", file=sys.stderr)
    print(plan.table(rows), plan.smallest(rows), sep="\n\n")
    if arguments.largest:
        print(plan.largest(rows))
    if arguments.json:
        plan.write(Path(arguments.json), rows)
    return 0


def workdir_of(arguments: argparse.Namespace) -> Path:
    if not arguments.workdir:
        raise UserError("--workdir is missing; say where to write, for example --workdir runs/quickstart")
    return storage.parse_path(arguments.workdir)
