"""Kills the small quickstart at random moments: every run must end with the bits of an undisturbed one.

    python -m tests.kills --kills 30 --processes 1
    python -m tests.kills --kills 30 --processes 2     # two processes of two devices each

A run that saves every few steps is killed and resumed until it is finished. Then a new run starts, until there were
enough kills. Every finished run is compared with the undisturbed one, parameter by parameter. This is not part of the
tests: it takes a quarter of an hour.
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
from pathlib import Path

from tests import QUICK
from tests.conftest import ROOT
from tests.test_hosts import free_port
from tests.test_quickstart import STAGES, command, compare, same_bits

FREQUENT_SAVES = {"base__loop__save_every": 6, "base__loop__steps": 150}
FREQUENT_SAVES |= {f"{name}__loop__save_every": 2 for name in ("preference", "judge", "nash_md", "self_play")}


@dataclasses.dataclass(frozen=True)
class Launcher:
    """Starts runs of the small quickstart, each as ``processes`` processes."""

    folder: Path
    processes: int

    def start(self, workdir: Path) -> list[subprocess.Popen]:
        """Returns the running processes of a run."""
        words, several = command(workdir, **FREQUENT_SAVES), self.processes > 1
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
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, folder = random.Random(arguments.seed), Path(tempfile.mkdtemp())
    launcher, undisturbed = Launcher(folder, arguments.processes), folder / "undisturbed"
    launcher.finish(folder / "first")  # fills the cache of compiled programs
    length = launcher.finish(undisturbed)
    compare(folder / "first", undisturbed, same_bits)
    print(f"undisturbed: {length:.0f} s, twice the same bits", flush=True)
    finished, kills = 0, collections.Counter()  # by stage
    while kills.total() < arguments.kills:
        workdir = folder / f"killed{finished}"
        seconds = rng.uniform(0.1, 0.5) * length
        while not launcher.run_and_kill(workdir, seconds, rng):
            kills[stage := current_stage(workdir)] += 1
            print(f"kill {kills.total()}: {stage}", flush=True)
            seconds = rng.uniform(0.1, 0.5) * length if kills.total() < arguments.kills else float("inf")
        compare(undisturbed, workdir, same_bits)
        finished += 1
        shutil.rmtree(workdir)
    print(f"{kills.total()} kills, {finished} runs finished, all with the undisturbed run's bits; {dict(kills)}")
    shutil.rmtree(folder)
    return 0


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


def current_stage(workdir: Path) -> str:
    """Returns the first stage that is not finished, and whether it was saving."""
    for name in STAGES:
        record = workdir / name / "stage.json"
        if not record.exists() or not json.loads(record.read_text())["finished"]:
            saving = any((workdir / name).rglob("*orbax-checkpoint-tmp*"))
            return f"{name}{', saving' if saving else ''}"
    return "the report"


if __name__ == "__main__":
    sys.exit(main())
