"""The command line.

Modules that import JAX are imported inside the commands, so that help and usage errors answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from alignjax.arguments import json_target, parse_arguments, settings_of
from alignjax.errors import RUN_AGAIN, RunAgain, UserError, one_line
from alignjax.pipeline import config
from alignjax.terminal import prepare_terminal, require_encodable


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status: 0, 2 after an error that the user can correct, 75 where the same command
    continues the work."""
    prepare_terminal()
    try:
        arguments = parse_arguments(require_encodable(sys.argv[1:] if argv is None else argv))
        status = COMMANDS[arguments.command](arguments)
        sys.stdout.flush()  # here, where a full disk or a closed pipe is answered
        return status
    except (UserError, RunAgain) as error:
        _complain(one_line(error))
        return _exit_status(error)
    except BrokenPipeError:  # the reader of our output has ended: `alignjax ... | head`
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115  (Python flushes it at exit)
        return 0
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        _complain(f"{file}{error.strerror or one_line(error)}; correct that and run again")
        return 2
    except Exception as error:
        if not _is_out_of_memory(error):
            raise
        _complain(f"out of memory ({one_line(error)[:120]}); make batches, prompts or new tokens fewer or shorter, or "
                  "use more devices")  # fmt: skip
        return 2


def _complain(message: str) -> None:
    """Prints a line to stderr. Where stderr cannot be written, the exit status alone tells of the error."""
    with contextlib.suppress(OSError):
        print(f"alignjax: {message}", file=sys.stderr, flush=True)


def _is_out_of_memory(error: Exception) -> bool:
    """Returns whether Python or JAX found no memory. JAX's error is told by its name, so that help imports no JAX."""
    is_jax = type(error).__name__ == "JaxRuntimeError" and "RESOURCE_EXHAUSTED" in str(error)
    return is_jax or isinstance(error, MemoryError)


def run_command(arguments: argparse.Namespace) -> int:
    """Runs an experiment's stages that are not finished, as one process or as one of several."""
    if arguments.help:
        return show_settings(arguments.file, settings_of(arguments))
    workdir = _workdir(arguments)
    from alignjax.distributed import storage
    from alignjax.distributed.hosts import Launch, connect
    from alignjax.pipeline import run

    hosts = connect(Launch(arguments.coordinator, arguments.processes, arguments.process))
    try:
        with storage.bucket_errors(workdir):
            experiment = load_experiment(arguments.file, settings_of(arguments))
            run.run(experiment, workdir, arguments.only, arguments.redo, hosts, arguments.keep_going)
    except (UserError, RunAgain, OSError) as error:
        _end_processes(hosts, workdir, error)
        raise
    except Exception as error:  # of any kind: the other processes would wait for this one for ever
        if hosts.count > 1:
            traceback.print_exc()
            hosts.confirm_others_alive()
            hosts.end_all(1, f"{type(error).__name__}: {one_line(error)}")
        raise
    return 0


def _end_processes(hosts: Any, workdir: Path, error: Exception) -> None:
    """Ends all processes after an expected error. It returns where this is the only process and works on a disk."""
    from alignjax.distributed import storage
    from alignjax.distributed.watchdog import exit_now

    hosts.end_all(_exit_status(error), one_line(error))
    if storage.is_bucket(workdir) and not isinstance(error, BrokenPipeError):
        # A normal exit would wait for threads that still try to reach the bucket.
        exit_now(_exit_status(error), one_line(error))


def _exit_status(error: Exception) -> int:
    """Returns the exit status that an expected error ends the process with."""
    return RUN_AGAIN if isinstance(error, RunAgain) else 2


def table_command(arguments: argparse.Namespace) -> int:
    """Shows the tables of a finished run and writes its report again."""
    if arguments.help:
        return show_settings(arguments.file, settings_of(arguments))
    from alignjax.distributed import sharding, storage
    from alignjax.pipeline import run

    sharding.available_devices()  # raises UserError where there are none
    experiment, workdir = load_experiment(arguments.file, settings_of(arguments)), _workdir(arguments)
    with storage.bucket_errors(workdir):
        run.show_report(experiment, workdir, arguments.keep_going)
    return 0


def plan_command(arguments: argparse.Namespace) -> int:
    """Compiles an experiment's stages for the given topologies and prints what they need."""
    from alignjax.planning import plan, topology

    target = json_target(arguments.json, Path(arguments.file))
    topology.prepare_environment(shape for name in arguments.topology for shape in plan.expand_topology(name))
    meshes = [plan.parse_mesh(text) for text in arguments.mesh]
    experiment = load_experiment(arguments.file, settings_of(arguments))
    rows = []
    for row in plan.plan(experiment, arguments.topology, meshes, arguments.only, arguments.every_bucket):
        rows.append(row)
        print(f"{row.topology} {row.mesh} {row.stage}: {row.program} {row.seconds:.0f} s", file=sys.stderr)
    print(plan.plan_table(rows), plan.smallest_fit(rows), sep="\n\n")
    if arguments.largest:
        print(plan.largest_arrays(rows))
    if target:
        plan.write_plan(target, rows)
    return 0


def export_command(arguments: argparse.Namespace) -> int:
    """Writes the network of a finished stage as a folder, or its pairs as a file, for other libraries."""
    from alignjax.distributed import storage
    from alignjax.pipeline import export, export_pairs

    stage, target = storage.parse_path(arguments.stage), Path(arguments.target).expanduser()
    options = [name for name in ("split", "labels", "messages") if vars(arguments)[name]]
    with storage.bucket_errors(stage):
        if not export_pairs.has_pairs(stage):
            if options:
                raise UserError(f"--{options[0]} is for a stage of pairs, and {stage} holds none; leave it out")
            print(export.export(stage, target, arguments.merge))
        elif arguments.merge:
            raise UserError(f"--merge is for adapters, and {stage} holds pairs; leave it out")
        else:
            form = export_pairs.PairForm(arguments.labels, arguments.messages)
            print(export_pairs.export_pairs(stage, target, arguments.split or "train", form))
    return 0


def sample_command(arguments: argparse.Namespace) -> int:
    """Prints what a checkpoint writes after a prompt, token by token."""
    from alignjax.pipeline import preview

    options = _preview_options(arguments)
    preview.stream(_open_network(arguments.folder, arguments.chat), arguments.prompt, options)
    return 0


def compare_command(arguments: argparse.Namespace) -> int:
    """Prints the replies of two checkpoints side by side."""
    from alignjax.pipeline import preview
    from alignjax.tasks.json_lines import read_prompts

    options = _preview_options(arguments)
    if arguments.count < 1:
        raise UserError(f"--count={arguments.count} must be at least 1")
    prompts = read_prompts(str(Path(arguments.prompts).expanduser()))[: arguments.count]
    networks = [_open_network(folder, arguments.chat) for folder in arguments.folders]
    preview.compare(networks, prompts, options)
    return 0


def outputs_command(arguments: argparse.Namespace) -> int:
    """Writes the replies of a finished tournament in the format of a public evaluator."""
    import time

    from alignjax.distributed import storage
    from alignjax.reporting import exchange

    stage = storage.parse_path(arguments.stage)
    with storage.bucket_errors(stage):
        folder = Path(arguments.folder).expanduser()
        print(exchange.write_outputs(stage, folder, arguments.format, time.time()))
    return 0


def rate_command(arguments: argparse.Namespace) -> int:
    """Prints the ratings of the policies of a finished tournament, or of a matrix of win rates."""
    from alignjax.distributed import storage
    from alignjax.preferences.rating_intervals import rate_fully
    from alignjax.reporting.pools import read_pools
    from alignjax.reporting.rating_report import rating_numbers, rating_section

    for name, high in (("bootstrap", 10**6), ("seed", 2**32 - 1)):
        if not 0 <= (value := vars(arguments)[name]) <= high:
            raise UserError(f"--{name}={value} must be at least 0 and at most {high}")
    path = storage.parse_path(arguments.file)
    target = json_target(arguments.json, path)
    with storage.bucket_errors(path):
        pools = read_pools(path, arguments.probabilities)
    rated = [rate_fully(title, pool, arguments.bootstrap, arguments.seed) for title, pool in pools]
    if target:
        storage.write_json(target, list(map(rating_numbers, rated)))
    print("\n".join(map(rating_section, rated)))
    return 0


def _open_network(folder: str, chat: bool) -> Any:
    """Opens a Hugging Face folder, or the network of a finished stage."""
    from alignjax.distributed import storage
    from alignjax.pipeline import preview

    path = storage.parse_path(folder)
    with storage.bucket_errors(path):
        return preview.open_preview_network(path, chat)


def _preview_options(arguments: argparse.Namespace) -> Any:
    """Returns PreviewOptions. Raises UserError when an option is out of range."""
    from alignjax.pipeline.preview import PreviewOptions
    from alignjax.sampling.process import Sampling

    for name, low, high in (("max_new_tokens", 1, 10**6), ("seed", 0, 2**32 - 1), ("top_k", 0, 10**6)):
        value = vars(arguments)[name]
        if not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')}={value} must be at least {low} and at most {high}")
    sampling = Sampling(arguments.temperature, arguments.top_k, arguments.top_p)
    return PreviewOptions(arguments.stop, arguments.max_new_tokens, sampling, arguments.seed)


def load_experiment(path: str, settings: Mapping[str, str]) -> Any:
    """Returns the experiment of a file. Raises UserError when the file does not define a valid one."""
    experiment = config.load(path, settings)
    from alignjax.pipeline.experiment import Experiment, order

    if not isinstance(experiment, Experiment):
        kind = type(experiment).__name__
        raise UserError(f"{path}: get_config() returned a {kind}; it must return an alignjax.Experiment")
    order(experiment.stages)  # raises UserError on invalid stages
    return experiment


def show_settings(path: str, settings: Mapping[str, str]) -> int:
    """Prints the documentation of an experiment file and everything that --set can change in it."""
    get_config = config.load_get_config(path)
    usage = f"usage: alignjax run {path} --workdir WORKDIR [--set PATH=VALUE ...] [--only NAME ...] [--redo]"
    print(f"{usage} [--keep-going]\n")
    if documentation := get_config.__globals__.get("__doc__"):
        print(f"{documentation.strip()}\n")
    if parameters := inspect.signature(get_config).parameters.values():
        print("Parameters of the file, which --set can give, with their defaults:")
        for p in parameters:
            print(f"  {p.name}" + (" (required)" if p.default is p.empty else f" = {p.default!r}"))
        print()
    if missing := [name for name in config.required_parameters(get_config) if name not in settings]:
        print(f"To see all other settings, give {' and '.join(f'--set {name}=...' for name in missing)} with --help.")
        return 0
    print("All other settings, which --set can change, with their values:")
    for name, value in config.leaves(load_experiment(path, settings)):
        print(f"  {name.removeprefix('stages.')} = {config.display(value)}")
    return 0


def _workdir(arguments: argparse.Namespace) -> Path:
    """Returns the work folder. Raises UserError when --workdir is missing or malformed."""
    from alignjax.distributed import storage

    if not arguments.workdir:
        raise UserError("--workdir is missing; say where to write, for example --workdir runs/quickstart")
    return storage.parse_path(arguments.workdir)


COMMANDS = {
    "run": run_command,
    "table": table_command,
    "plan": plan_command,
    "export": export_command,
    "sample": sample_command,
    "compare": compare_command,
    "outputs": outputs_command,
    "rate": rate_command,
}
"""Each returns the exit status."""
