"""Damages every entry and line of what the package reads: ``make fuzz``.

    python -m tests.fuzz [--part config] [--only WORD] [--sample N] [--seed S]

Prints for each part how many inputs worked and agreed, how many were refused, and every other outcome with the input's
name. The exit status is the number of those findings.
"""

from __future__ import annotations

import argparse
import collections
import os
import random
import sys
import tempfile
import time
from pathlib import Path

from tests import QUICK
from tests.fuzz.outcomes import AGREED, REFUSED, outcome

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", QUICK)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from tests.fuzz.parts import PARTS  # after the environment is set


def main() -> int:
    """Runs the parts; returns the number of findings, at most 99."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, help="this part alone")
    parser.add_argument("--only", default="", metavar="WORD", help="inputs whose name contains the word")
    parser.add_argument("--sample", type=int, metavar="N", help="so many inputs of each part, drawn by the seed")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--verbose", action="store_true", help="print every outcome")
    options = parser.parse_args()
    findings = 0
    for part in [options.part] if options.part else PARTS:
        findings += run_part(part, options)
    return min(findings, 99)


def run_part(part: str, options: argparse.Namespace) -> int:
    """Runs one part and prints its counts; returns the number of findings."""
    begin, counts = time.perf_counter(), collections.Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        chosen = [damaged for damaged in PARTS[part](Path(folder), options.seed) if options.only in damaged.name]
        if options.sample is not None and options.sample < len(chosen):
            chosen = random.Random(options.seed).sample(chosen, options.sample)
        for damaged in chosen:
            result = outcome(damaged)
            counts[result if result in (AGREED, REFUSED) else "else"] += 1
            if options.verbose or result not in (AGREED, REFUSED):
                print(f"{part}: {damaged.name[:200]}: {result}", flush=True)
    print(f"{part}: {len(chosen)} inputs, {counts[AGREED]} {AGREED}, {counts[REFUSED]} {REFUSED}, "
          f"{counts['else']} else ({time.perf_counter() - begin:.0f} s)", flush=True)  # fmt: skip
    return counts["else"]


if __name__ == "__main__":
    sys.exit(main())
