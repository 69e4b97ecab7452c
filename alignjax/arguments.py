"""What the command line takes: its commands and their options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import alignjax
from alignjax.errors import UserError

OUTPUT_FORMATS = ("alpaca_eval", "arena_hard", "mt_bench")
"""The formats of ``alignjax outputs`` (``reporting.exchange.FORMATS``)."""
_STAGE_OR_FOLDER = "a Hugging Face folder, or the folder WORKDIR/NAME of a finished stage"


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Returns the parsed command line. Ends the process after --help without a FILE, and on wrong usage."""
    arguments = build_parser().parse_args(argv)
    if vars(arguments).get("file", "") is None:
        if arguments.help:
            arguments.parser.print_help()
            sys.exit(0)
        arguments.parser.error("FILE is missing; give an experiment, such as experiments/quickstart.py")
    return arguments


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of all commands. Its result has ``command``, the name of one."""
    summary = (alignjax.__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="alignjax", description=summary)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_table(commands)
    _add_plan(commands)
    _add_export(commands)
    _add_sample(commands)
    _add_compare(commands)
    _add_outputs(commands)
    _add_rate(commands)
    return parser


def _add_run(commands: Any) -> None:
    """Adds ``alignjax run``."""
    summary = "run the stages of an experiment file that are not finished, then show its tables"
    parser = _add_experiment_command(commands, "run", summary)
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="run only this stage; repeatable")
    parser.add_argument("--redo", action="store_true", help="make the stages again whose configuration has changed")
    parser.add_argument(
        "--keep-going", action="store_true",
        help="when a stage fails, run those that do not need it; the exit status is 2 all the same",
    )  # fmt: skip
    several = parser.add_argument_group(
        "several processes",
        "found automatically on TPU slices, under Slurm and under Open MPI; elsewhere give all three",
    )
    several.add_argument("--coordinator", metavar="HOST:PORT", help="the address at which process 0 listens")
    several.add_argument("--processes", type=int, metavar="N", help="the number of processes; 1 runs this one alone")
    several.add_argument("--process", type=int, metavar="I", help="the number of this process, from 0")
    parser.set_defaults(command="run")


def _add_table(commands: Any) -> None:
    """Adds ``alignjax table``."""
    summary = "show the tables of a finished run and write its report again"
    parser = _add_experiment_command(commands, "table", summary)
    parser.add_argument("--keep-going", action="store_true", help="show what is finished and leave out the rest")
    parser.set_defaults(command="table")


def _add_experiment_command(commands: Any, name: str, summary: str) -> argparse.ArgumentParser:
    """Adds a command on an experiment file. Its --help shows the file's own settings (``show_settings``)."""
    parser = commands.add_parser(name, help=summary, description=summary, add_help=False)
    parser.set_defaults(parser=parser)
    _add_experiment(parser, nargs="?")
    parser.add_argument("-h", "--help", action="store_true", help="with FILE: show the settings of the experiment")
    parser.add_argument("--workdir", metavar="WORKDIR", help="the folder that everything is written to")
    return parser


def _add_experiment(parser: argparse.ArgumentParser, **options: Any) -> None:
    """Adds the experiment file, with options of argparse, and --set."""
    parser.add_argument(
        "file", metavar="FILE", help="an experiment: a Python file that defines get_config()", **options
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE", help="change a value of the experiment; repeatable"
    )


def _add_plan(commands: Any) -> None:
    """Adds ``alignjax plan``."""
    summary = (
        "compile the stages of an experiment for TPUs or GPUs that this machine does not have: memory, FLOPs, traffic"
    )
    parser = commands.add_parser("plan", help=summary, description=summary)
    _add_experiment(parser)
    parser.add_argument(
        "--topology", action="append", required=True, metavar="KIND[:SHAPE]",
        help="for example v5e:4x4, v5p:4x4x8, v6e:16x16 or h100:2x8 (hosts x GPUs); a KIND without SHAPE finds its "
        "smallest shape that fits; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--mesh", action="append", default=[], metavar="AXIS=N,...",
        help="a mesh in place of the experiment's, for example fsdp=-1,tensor=4 (-1: all other devices); repeatable",
    )  # fmt: skip
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="plan only this stage; repeatable")
    parser.add_argument("--every-bucket", action="store_true", help="plan every prompt bucket, not only the largest")
    parser.add_argument("--largest", action="store_true", help="also show the largest arrays of each program")
    parser.add_argument("--json", metavar="FILE", help="write all results to FILE as JSON")
    parser.set_defaults(command="plan")


def _add_export(commands: Any) -> None:
    """Adds ``alignjax export``."""
    summary = (
        "write the network of a finished stage as a folder that transformers (for adapters: PEFT) opens, "
        "or the pairs of a finished stage as a file that other libraries read"
    )
    parser = commands.add_parser("export", help=summary, description=summary)
    parser.add_argument("stage", metavar="WORKDIR/NAME", help="the folder of a finished stage")
    parser.add_argument(
        "target", metavar="DIR|FILE", help="what to write; it must not exist. Pairs: FILE.jsonl or FILE.parquet"
    )
    parser.add_argument("--merge", action="store_true", help="add adapters to their base and write one checkpoint")
    pairs = parser.add_argument_group("pairs", "a row is {prompt, chosen, rejected} unless --labels is given")
    pairs.add_argument("--split", metavar="NAME", help="the split to write (train)")
    form = pairs.add_mutually_exclusive_group()
    form.add_argument(
        "--labels", action="store_true", help="write {prompt, first, second, p}: every pair in its order, with its P"
    )
    form.add_argument("--messages", action="store_true", help="write chats: lists of {role, content}, not texts")
    parser.set_defaults(command="export")


def _add_sample(commands: Any) -> None:
    """Adds ``alignjax sample``."""
    summary = "print what a checkpoint writes after a prompt, token by token"
    parser = commands.add_parser("sample", help=summary, description=summary)
    parser.add_argument("folder", metavar="DIR", help=_STAGE_OR_FOLDER)
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text that the checkpoint continues")
    _add_sampling(parser)
    parser.set_defaults(command="sample")


def _add_compare(commands: Any) -> None:
    """Adds ``alignjax compare``."""
    summary = "print the replies of two checkpoints to the same prompts, side by side"
    parser = commands.add_parser("compare", help=summary, description=summary)
    parser.add_argument("folders", nargs=2, metavar="DIR", help=_STAGE_OR_FOLDER)
    parser.add_argument(
        "--prompts", required=True, metavar="FILE", help='a file with one prompt a line, or JSON lines {"prompt": text}'
    )
    parser.add_argument("--count", type=int, default=8, metavar="N", help="use the first N prompts of the file (8)")
    _add_sampling(parser)
    parser.set_defaults(command="compare")


def _add_outputs(commands: Any) -> None:
    """Adds ``alignjax outputs``."""
    summary = "write the replies of a finished tournament in the format of a public evaluator"
    parser = commands.add_parser("outputs", help=summary, description=summary)
    parser.add_argument("stage", metavar="WORKDIR/NAME", help="the folder of a finished Tournament")
    parser.add_argument("folder", metavar="DIR", help="the folder to write; it must not exist")
    parser.add_argument("--format", required=True, choices=OUTPUT_FORMATS, help="whose format")
    parser.set_defaults(command="outputs")


def _add_rate(commands: Any) -> None:
    """Adds ``alignjax rate``."""
    summary = (
        "rate the policies of a finished tournament, or of a matrix of win rates: the lottery that none beats, "
        "Elo, cycles, and what a copy changes"
    )
    parser = commands.add_parser("rate", help=summary, description=summary)
    parser.add_argument(
        "file", metavar="FILE",
        help='the folder WORKDIR/NAME of a finished Tournament, its win_rates.json, JSON {"policies": [...], '
        '"win_rate": [[...]], "n": optional}, or a CSV matrix with names in its first row and column; '
        "a cell says how often its row's policy beats its column's",
    )  # fmt: skip
    parser.add_argument(
        "--bootstrap", type=int, default=1000, metavar="N", help="intervals from N resamples (1000); 0: none"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the seed of the resamples (0)")
    parser.add_argument(
        "--probabilities", action="store_true", help="rate the means of the judge's probabilities, not its votes"
    )
    parser.add_argument("--json", metavar="FILE", help="write all results to FILE as JSON, another than the input")
    parser.set_defaults(command="rate")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """Adds the options of sampling; defaults stand in parentheses."""
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="write at most N tokens (128)")
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="X", help="divide the logits by X; 0 is greedy (1)"
    )
    parser.add_argument(
        "--top-p", type=float, default=1.0, metavar="P",
        help="draw from the fewest most likely tokens whose probabilities sum to P (1: from all)",
    )  # fmt: skip
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="K", help="draw from the K most likely tokens (0: from all)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the seed of the random draws (0)")
    parser.add_argument(
        "--stop", metavar="TEXT", help="end a reply at TEXT too, not only at the tokenizer's end tokens"
    )
    parser.add_argument("--chat", action="store_true", help="put prompts into the tokenizer's chat template")


def settings_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Returns the settings that --set gives, path -> text."""
    return dict(_split_setting(text) for text in arguments.set)


def _split_setting(text: str) -> tuple[str, str]:
    """Returns (path, text) of PATH=VALUE. Raises UserError when it has another form."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise UserError(f"--set {text!r} is not PATH=VALUE; write, for example, --set nash_md.adam.lr=1e-4")
    return name, value


def json_target(text: str | None, source: Path) -> Path | None:
    """Returns the file of --json. Raises UserError where it is the input, or cannot be written."""
    if text is None:
        return None
    path = Path(text).expanduser()
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(
            f"--json={text} is {'a folder' if path.is_dir() else 'in no folder that is there'}; name a file"
        )
    if path.resolve() == source.resolve():
        raise UserError(f"--json={text} is the file that is read; name another")
    return path
