"""Draws anew each time, and says at the end from which seed and how near the two came."""

import os
import secrets

SEED = int(os.environ.get("ALIGNJAX_PARITY_SEED") or secrets.randbelow(10**6))
NOTES = []


def pytest_terminal_summary(terminalreporter):
    terminalreporter.section("parity with transformers on torch")
    for note in NOTES:
        terminalreporter.write_line(note)
    terminalreporter.write_line(f"ALIGNJAX_PARITY_SEED={SEED} draws these configurations again")
