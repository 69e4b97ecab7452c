"""Small wrong changes over the wiring, each of which must turn a test red: ``make mutants``.

    python -m tests.mutants [--only WORD]     # mutants whose name contains the word

Each mutant is one replacement in a copy of the package. The tests that guard it run over the copy; the mutant survives
when they pass. Prints every mutant with the test that failed and its seconds. The exit status is the number of
survivors.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants.mutants import MUTANTS, Mutant

ROOT = Path(__file__).parents[2]


def main() -> int:
    """Runs the mutants; returns the number of survivors."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD", help="mutants whose name contains the word")
    chosen = [mutant for mutant in MUTANTS if parser.parse_args().only in mutant.name]
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = copy_checkout(Path(folder))
        for mutant in chosen:
            begin = time.perf_counter()
            failed = failing_test(copy, mutant)
            survivors += failed is None
            verdict = failed or "SURVIVED"
            print(f"{mutant.name}: {verdict} ({time.perf_counter() - begin:.0f} s)", flush=True)
    print(f"{len(chosen) - survivors} of {len(chosen)} mutants were caught")
    return min(survivors, 99)


def copy_checkout(folder: Path) -> Path:
    """Copies the package, its tests and the experiments; returns the copy's root."""
    for name in ("alignjax", "tests", "experiments", "notebooks", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def failing_test(copy: Path, mutant: Mutant) -> str | None:
    """Returns the first test that fails over the copy with the mutant; None when all pass."""
    path = copy / mutant.file
    original = path.read_text()
    if original.count(mutant.old) != 1:
        raise SystemExit(f"{mutant.name}: {mutant.file} holds its text {original.count(mutant.old)} times, not once")
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        words = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *mutant.tests]
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        result = subprocess.run(words, cwd=copy, env=environment, capture_output=True, text=True)
    finally:
        path.write_text(original)
    if result.returncode == 0:
        return None
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", result.stdout, re.MULTILINE)
    if failed is None or result.returncode != 1:
        raise SystemExit(f"{mutant.name}: the tests did not run\n{result.stdout[-2000:]}{result.stderr[-2000:]}")
    return failed[1]


if __name__ == "__main__":
    sys.exit(main())
