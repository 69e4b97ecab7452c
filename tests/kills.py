"""SIGKILL at random moments, many times over: does every run end with the bits of the undisturbed one?

    python -m tests.kills --kills 30 --processes 1
    python -m tests.kills --kills 30 --processes 2     # two processes of two devices each

The small quickstart, saving every few steps, is killed again and again until it is finished, and begun anew until
there were so many kills. Every finished run is compared with the undisturbed one, parameter by parameter. Not part of
the tests: it takes a quarter of an hour.
"""

import argparse
import collections
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

OFTEN = {"base__loop__save_every": 6, "base__loop__steps": 150}
OFTEN |= {f"{name}__loop__save_every": 2 for name in ("preference", "judge", "nash_md", "self_play")}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng, folder = random.Random(arguments.seed), Path(tempfile.mkdtemp())

    def start(workdir: Path) -> list[subprocess.Popen]:
        port, words = free_port(), command(workdir, **OFTEN)
        several = ["--coordinator", f"127.0.0.1:{port}", "--processes", str(arguments.processes), "--process"]
        if arguments.processes > 1:
            words += ["--set", "mesh.data=2", "--set", f"mesh.fsdp={arguments.processes}"]
        log = (folder / f"{workdir.name}.log").open("a")
        return [
            subprocess.Popen(
                [*words, *several, str(me)] if arguments.processes > 1 else words,
                env=environment(folder, 2 if arguments.processes > 1 else 1), stdout=log, stderr=log,
            ) for me in range(arguments.processes)
        ]  # fmt: skip

    def finish(workdir: Path) -> float:
        begun = time.monotonic()
        if any([process.wait() for process in start(workdir)]):
            raise SystemExit((folder / f"{workdir.name}.log").read_text()[-3000:])
        return time.monotonic() - begun

    finish(folder / "first")  # fills the cache of compiled programs
    length = finish(folder / "whole")
    compare(folder / "first", folder / "whole", same_bits)
    print(f"undisturbed: {length:.0f} s, twice the same bits", flush=True)
    kills, finished, seen = 0, 0, collections.Counter()
    while kills < arguments.kills:
        workdir = folder / f"killed{finished}"
        while True:
            running, begun = start(workdir), time.monotonic()
            end = begun + rng.uniform(0.1, 0.5) * length if kills < arguments.kills else float("inf")
            while time.monotonic() < end and any(process.poll() is None for process in running):
                time.sleep(0.01)
            if all(process.poll() == 0 for process in running):
                break
            if any(process.poll() not in (None, 0, -9) for process in running):
                raise SystemExit((folder / f"{workdir.name}.log").read_text()[-3000:])
            for process in rng.sample(running, len(running)):
                process.kill()
                process.wait()
            kills += 1
            seen[moment(workdir)] += 1
            print(f"kill {kills}: {moment(workdir)}", flush=True)
        compare(folder / "whole", workdir, same_bits)
        finished += 1
        shutil.rmtree(workdir)
    print(f"{kills} kills, {finished} runs finished, all with the undisturbed run's bits; {dict(seen)}")
    shutil.rmtree(folder)
    return 0


def environment(folder: Path, devices: int) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {QUICK}",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def moment(workdir: Path) -> str:
    """The stage at work, and whether a save was under way."""
    for name in STAGES:
        record = workdir / name / "stage.json"
        if not record.exists() or not json.loads(record.read_text())["finished"]:
            saving = any((workdir / name).rglob("*orbax-checkpoint-tmp*"))
            return f"{name}{', saving' if saving else ''}"
    return "the report"


if __name__ == "__main__":
    sys.exit(main())
