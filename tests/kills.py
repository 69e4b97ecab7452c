"""Kills a small experiment at random moments: every run must end with the bits of an undisturbed one.

    python -m tests.kills --kills 30 --processes 1
    python -m tests.kills --kills 30 --processes 2     # two processes of two devices each
    python -m tests.kills --experiment experiments/rlcd/sandbox.py --each     # every stage is killed at least once

A run that saves every few steps is killed and resumed until it is finished. Then a new run starts, until there were
enough kills. Every finished run is compared with the undisturbed one: parameters, metrics and every JSON file of a
result. This is not part of the tests: it takes a quarter of an hour.
"""

import argparse
import collections
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from alignjax.pipeline import config
from alignjax.pipeline.experiment import order
from tests import QUICK
from tests.conftest import ROOT
from tests.test_hosts import free_port
from tests.test_quickstart import parameters, same_bits

SMALL = {"small": "True"}
RESULTS = ("win_rates.json", "numbers.json", "metrics.jsonl", "chunks/*.json", "replies-*.json")
"""Of a stage: its files that must be equal to the letter."""


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Starts runs of a small experiment, each as ``processes`` processes."""

    file: str
    folder: Path
    processes: int

    @property
    def stages(self) -> dict[str, Any]:
        """The experiment's stages by name, in the order in which they run."""
        stages = config.load(ROOT / self.file, SMALL).stages
        return {name: stages[name] for name in order(stages)}

    def command(self, workdir: Path) -> list[str]:
        """Returns the command of a run that saves every few steps."""
        saves = {f"{name}.loop.save_every": 2 for name, stage in self.stages.items() if hasattr(stage, "loop")}
        settings = {**SMALL, **saves, "base.loop.save_every": 6}
        sets = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
        return [sys.executable, "-m", "alignjax", "run", str(ROOT / self.file), "--workdir", str(workdir), *sets]

    def start(self, workdir: Path) -> list[subprocess.Popen]:
        """Returns the running processes of a run."""
        words, several = self.command(workdir), self.processes > 1
        if several:
            words += ["--set", "mesh.data=2", "--set", f"mesh.fsdp={self.processes}"]
            words += ["--coordinator", f"127.0.0.1:{free_port()}", "--processes", str(self.processes), "--process"]
        log = self.log(workdir).open("a")
        return [
            subprocess.Popen(
                [*words, str(index)] if several else words,
                env=environment(self.folder, 2 if several else 1), stdout=log, stderr=log,
            )
            for index in range(self.processes)
        ]  # fmt: skip

    def log(self, workdir: Path) -> Path:
        """Returns the file with the output of a run."""
        return self.folder / f"{workdir.name}.log"

    def finish(self, workdir: Path) -> float:
        """Runs to the end; returns the seconds. Exits when the run fails."""
        begin = time.monotonic()
        if any([process.wait() for process in self.start(workdir)]):
            raise SystemExit(self.log(workdir).read_text()[-3000:])
        return time.monotonic() - begin

    def run_and_kill(self, workdir: Path, seconds: float, rng: random.Random) -> bool:
        """Starts or resumes a run and kills it after ``seconds``; returns whether it finished before. Exits when it
        fails."""
        running, end = self.start(workdir), time.monotonic() + seconds
        while time.monotonic() < end and any(process.poll() is None for process in running):
            time.sleep(0.01)
        if all(process.poll() == 0 for process in running):
            return True
        if any(process.poll() not in (None, 0, -9) for process in running):
            raise SystemExit(self.log(workdir).read_text()[-3000:])
        for process in rng.sample(running, len(running)):
            process.kill()
            process.wait()
        return False


def main() -> int:
    """Returns 0 when every killed run ended with the bits of the undisturbed one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experiment", default="experiments/quickstart.py", help="with a parameter ``small``")
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--each", action="store_true", help="kill every stage once, in its middle, in one run")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp())
    launcher, undisturbed = Launcher(arguments.experiment, folder, arguments.processes), folder / "undisturbed"
    launcher.finish(folder / "first")  # fills the cache of compiled programs
    length = launcher.finish(undisturbed)
    compare_runs(launcher.stages, folder / "first", undisturbed)
    print(f"undisturbed: {length:.0f} s, twice the same bits", flush=True)
    kill = kill_each if arguments.each else kill_at_random
    kill(launcher, undisturbed, arguments.kills, length, random.Random(arguments.seed))
    shutil.rmtree(folder)
    return 0


def kill_at_random(launcher: Launcher, undisturbed: Path, count: int, length: float, rng: random.Random) -> None:
    """Kills runs at random moments, ``count`` times in all."""
    finished, kills = 0, collections.Counter()  # by stage
    while kills.total() < count:
        workdir = launcher.folder / f"killed{finished}"
        seconds = rng.uniform(0.1, 0.5) * length
        while not launcher.run_and_kill(workdir, seconds, rng):
            kills[stage := current_stage(launcher.stages, workdir)] += 1
            print(f"kill {kills.total()}: {stage}", flush=True)
            seconds = rng.uniform(0.1, 0.5) * length if kills.total() < count else float("inf")
        compare_runs(launcher.stages, undisturbed, workdir)
        finished += 1
        shutil.rmtree(workdir)
    print(f"{kills.total()} kills, {finished} runs finished, all with the undisturbed run's bits; {dict(kills)}")


def kill_each(launcher: Launcher, undisturbed: Path, count: int, length: float, rng: random.Random) -> None:
    """Kills one run once in each stage that keeps its work, as soon as that has kept some."""
    workdir = launcher.folder / "killed"
    for name in launcher.stages:
        running = launcher.start(workdir)
        while all(process.poll() is None for process in running) and not (
            has_begun(workdir / name) or is_finished(workdir / name)
        ):
            time.sleep(0.01)
        killed = all(process.poll() is None for process in running) and not is_finished(workdir / name)
        for process in running:
            process.kill()
            process.wait()
        print(f"{name}: {'killed' if killed else 'was finished before it could be killed'}", flush=True)
    launcher.finish(workdir)
    compare_runs(launcher.stages, undisturbed, workdir)
    print("the run that was killed in each of these stages has the undisturbed run's bits")


def has_begun(stage: Path) -> bool:
    """Returns whether a stage has kept a part of its work."""
    kept = ("chunks/*.json", "checkpoints/*", "replies-*.json", "params")
    return any(True for pattern in kept for _ in stage.glob(pattern))


def is_finished(stage: Path) -> bool:
    """Returns whether a stage is finished."""
    record = stage / "stage.json"
    return record.exists() and json.loads(record.read_text())["finished"]


def compare_runs(stages: Iterable[str], a: Path, b: Path) -> None:
    """Compares the results of two runs. Raises AssertionError where they differ."""
    for name in stages:
        if (a / name / "params").exists():
            same_bits(name, parameters(a / name), parameters(b / name))
        kept = [sorted(path.name for path in (run / name / "kept").glob("*")) for run in (a, b)]
        assert kept[0] == kept[1], f"{name}: kept"
        for at in kept[0]:
            same_bits(f"{name} at {at}", *(parameters(run / name, f"kept/{at}") for run in (a, b)))
        for pattern in RESULTS:
            first, second = (sorted((run / name).glob(pattern)) for run in (a, b))
            assert [path.name for path in first] == [path.name for path in second], f"{name}: {pattern}"
            for one, other in zip(first, second, strict=True):
                assert one.read_text() == other.read_text(), f"{name}: {one.name}"


def environment(folder: Path, devices: int) -> dict[str, str]:
    """Returns the environment of a process with that many emulated devices."""
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def current_stage(stages: Iterable[str], workdir: Path) -> str:
    """Returns the first stage that is not finished, and whether it was saving."""
    for name in stages:
        if not is_finished(workdir / name):
            saving = any((workdir / name).rglob("*orbax-checkpoint-tmp*"))
            return f"{name}{', saving' if saving else ''}"
    return "the report"


if __name__ == "__main__":
    sys.exit(main())
