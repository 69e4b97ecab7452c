"""Each run draws new configurations; its summary has the seed and how close the two implementations are."""

import os
import secrets

SEED = int(os.environ.get("ALIGNJAX_PARITY_SEED") or secrets.randbelow(10**6))
NOTES = []


def pytest_terminal_summary(terminalreporter):
    """Prints the notes of the run and its seed."""
    terminalreporter.section("parity with transformers on torch")
    for note in NOTES:
        terminalreporter.write_line(note)
    terminalreporter.write_line(f"ALIGNJAX_PARITY_SEED={SEED} repeats these configurations")
